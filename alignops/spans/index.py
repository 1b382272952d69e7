"""An index that this process has opened."""

from __future__ import annotations

import hashlib
import json
import os
import uuid as uuids
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from alignops._native import library
from alignops.spans.arrays import Ints, as_ids
from alignops.spans.queries import Queries
from alignops.spans.results import Document, Hits, NextDist, Spans
from alignops.spans.store import Manifest, open_store

__all__ = ["SpanIndex"]


class SpanIndex(Queries["library.SpanBatch"]):
    """An opened index: exact counts, places, longest matches and next tokens of a corpus.

    Open one with `SpanIndex.open`. It is immutable: one object serves any number of threads, and
    processes that were forked after opening it. Pickling stores the path and the UUID; unpickling
    opens the index again. Calls release the GIL and use torch's threads; no answer depends on the
    number of threads or shards, or on the instruction set.

    All queries raise IndexError for an id outside [0, V), TypeError for ids that are not integers,
    ValueError for a wrong shape or offsets that decrease, and IndexCorruptError when they meet a
    damaged file: a count is right or missing, never wrong. Matches do not cross documents.

    Attributes:
        path: folder of the index.
        uuid: identity of the build and of what was removed since, in hexadecimal.
        fingerprint: of the tokenizer, as given to `build_index`, or None.
        vocab_size: V.
        token_bits: width of a stored token, 8, 16 or 32.
        n_tokens: N, over all shards.
        n_docs: documents of all shards, removed ones included, which keep their numbers.
        removed: numbers of the removed documents, ascending, int64; see `remove_documents`. Of
            their tokens no query counts or finds any.
        n_shards: parts of the index.
        max_match: no longest match is longer, 4096.

    Example:
        >>> import tempfile
        >>> from alignops.spans import SpanIndex, build_index
        >>> folder = tempfile.mkdtemp() + "/index"
        >>> _ = build_index([[1, 2, 1, 2], [2, 1]], folder, vocab_size=4, fingerprint="toy")
        >>> with SpanIndex.open(folder, fingerprint="toy") as index:
        ...     index.n_tokens, index.n_docs, index.count([1, 2])
        (6, 2, 2)
    """

    def __init__(
        self,
        store: library.SpanStore,
        manifest: Manifest,
        path: Path,
        mode: str,
        verify: str,
    ) -> None:
        self.path = path
        self.removed: Ints = store.removed
        self.removed.flags.writeable = False
        self.uuid = str(
            uuids.uuid5(manifest.uuid, hashlib.sha256(self.removed.tobytes()).hexdigest())
            if len(self.removed)
            else manifest.uuid
        )
        self.fingerprint = manifest.fingerprint
        self.vocab_size = manifest.vocab_size
        self.token_bits = manifest.token_bits
        self.n_tokens = store.tokens
        self.n_docs = store.documents
        self.n_shards = store.shards
        self._how = mode, verify
        self._opened: tuple[library.SpanStore, library.SpanIndex] | None = (
            store,
            library.SpanIndex(store),
        )

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        mode: Literal["mmap", "ram"] = "mmap",
        verify: Literal["quick", "lazy", "full"] = "lazy",
        fingerprint: str | None = None,
    ) -> SpanIndex:
        """Open the folder of a finished index.

        Args:
            path: what `build_index` wrote.
            mode: "mmap" maps the files, so that opening takes milliseconds and processes share
                memory; "ram" reads them into memory.
            verify: "quick" checks headers, sizes, and a sample of blocks and of neighbours in the
                suffix array; "lazy" also checks each block of 64 KiB when a query first reads it;
                "full" checks every block now.
            fingerprint: of the caller's tokenizer, compared with the stored one.

        Raises:
            FileNotFoundError: there is no such folder.
            IndexIncompleteError: the folder holds no finished index.
            NotAnIndexError: something else.
            IndexVersionError: an index of another major version.
            IndexCorruptError: a check failed.
            TokenizerMismatchError: another fingerprint.
            ValueError: unknown mode or verify.
        """
        store, manifest = open_store(path, mode, verify, fingerprint)
        return cls(store, manifest, Path(path), mode, verify)

    # Life

    def close(self) -> None:
        """Release the files. Queries raise ValueError from now on; running ones end normally."""
        self._opened = None

    def verify(self, level: str = "full") -> None:
        """Check the files now, "quick" or "full", see `open`. Raises IndexCorruptError."""
        self._store.verify(level)

    def __enter__(self) -> SpanIndex:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (os.fspath(self.path), self.uuid, *self._how)

    def __repr__(self) -> str:
        state = "" if self._opened else ", closed"
        return (
            f"SpanIndex({str(self.path)!r}, {self.n_tokens} tokens, {self.n_docs} documents, "
            f"{self.n_shards} shards{state})"
        )

    def _open(self) -> tuple[library.SpanStore, library.SpanIndex]:
        opened = self._opened  # another thread may close the index
        if opened is None:
            raise ValueError(f"SpanIndex: the index {self.path} is closed")
        return opened

    @property
    def _store(self) -> library.SpanStore:
        return self._open()[0]

    @property
    def _index(self) -> library.SpanIndex:
        return self._open()[1]

    @cached_property
    def counts(self) -> Ints:
        """Occurrences c_t of each token, int64 (V,)."""
        ids, counts = self._store.counts()
        if ids is None:
            dense: Ints = counts
        else:
            dense = np.zeros(self.vocab_size, np.int64)
            dense[ids] = counts
        dense.flags.writeable = False
        return dense

    def _document(self, d: int) -> Document:
        store = self._store
        return Document(
            store.document_tokens(d).astype(np.int64),
            json.loads(store.meta(d)) if store.has("meta") else None,
            store.label(d) if store.has("lab") else None,
            store.byte_offsets(d) if store.has("boff") else None,
        )

    def hits(self, shard: int, ranks: Any) -> Hits:
        """Where the suffixes at these ranks of a shard begin; `find` gives ranks.

        Raises:
            IndexError: there is no such shard or rank.

        Example:
            >>> from alignops.testing import span_index
            >>> index = span_index([[1, 2, 1, 2], [2, 1]], vocab_size=4)
            >>> (lo, hi), = index.find([1])
            >>> hits = index.hits(0, range(lo, hi))
            >>> sorted(zip(hits.document.tolist(), hits.offset.tolist()))
            [(0, 0), (0, 2), (1, 1)]
        """
        return Hits(*self._index.hits(shard, as_ids(ranks, "hits", "ranks")))

    # Searches

    def _encode(
        self, op: str, argument: str, ids: npt.NDArray[Any], offsets: Ints | None = None
    ) -> library.SpanBatch:
        return self._index.encode(op, argument, ids, offsets)

    def _count(self, batch: library.SpanBatch) -> Ints:
        return self._index.count(batch)

    def _find(self, batch: library.SpanBatch) -> Ints:
        return self._index.find(batch)

    def _occurrences(
        self, batch: library.SpanBatch, rows: Ints, numbers: Ints
    ) -> tuple[Hits, Ints]:
        *hits, row = self._index.occurrences(batch, rows, numbers)
        return Hits(*hits), row

    def _longest_prefix(self, batch: library.SpanBatch) -> int:
        return int(self._index.longest_prefix(batch, self.max_match)[0])

    def _longest_suffix(self, batch: library.SpanBatch) -> int:
        return int(self._index.longest_suffix(batch, self.max_match)[0])

    def _match(self, batch: library.SpanBatch, counts: bool) -> tuple[Ints, Ints]:
        return self._index.match(batch, self.max_match, counts)

    def _maximal_spans(
        self,
        op: str,
        batch: library.SpanBatch,
        min_len: int,
        max_count: int | None,
        word_start: npt.NDArray[np.bool_] | None,
        delimiters: npt.NDArray[Any] | None,
    ) -> tuple[Spans, Ints]:
        *spans, row = self._index.maximal_spans(
            op, batch, self.max_match, min_len, max_count, word_start, delimiters
        )
        return Spans(*spans), row

    def _next_counts(self, context: library.SpanBatch, cand: library.SpanBatch) -> Ints:
        return self._index.next_counts(context, cand)

    def _next_dist(self, context: library.SpanBatch) -> NextDist:
        return NextDist(*self._index.next_dist(context), False)

    def _next_tokens(self, context: library.SpanBatch, numbers: Ints) -> Ints:
        return self._index.next_tokens(context, numbers)

    def _eos_count(self, context: library.SpanBatch) -> int:
        return self._index.eos_count(context)


def _reopen(path: str, uuid: str, mode: Any, verify: Any) -> SpanIndex:
    index = SpanIndex.open(path, mode, verify)
    if index.uuid != uuid:
        raise ValueError(
            f"SpanIndex: the index {path} must be the pickled one, uuid {uuid}, got {index.uuid}: "
            "it was replaced"
        )
    return index
