"""Removing documents from an index that stays as it is.

The text and the suffixes of removed documents remain in the files. A list per shard names the
documents and the ranks of their suffixes, and the manifest names the lists: with it an index
changes from one set of removed documents to another in one step. Readers leave the listed suffixes
out, so that every answer is exactly that of an index in which the removed documents are empty.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alignops._native import library
from alignops.spans._folder import build_lock
from alignops.spans.arrays import Ints, as_ids
from alignops.spans.index import SpanIndex
from alignops.spans.store import REMOVED, Manifest, file_name, open_store, write_manifest

__all__ = ["Removal", "find_documents", "remove_documents"]


class Removal(NamedTuple):
    """What `remove_documents` changed: documents and tokens that it removed, and all removed ones.

    Documents that had been removed before do not count among the first two.
    """

    documents: int
    tokens: int
    total: int


def remove_documents(path: str | os.PathLike[str], documents: Any) -> Removal:
    """Remove documents: from now on who opens the index neither counts nor finds their tokens.

    Nothing is approximate: counts, places, matches, probabilities and verdicts are exactly those of
    an index in which these documents are empty. The others keep their numbers. Who has the index
    open, or a matcher on it, keeps the old answers; `SpanIndex.uuid` changes, so that pickled
    indexes and cached weights of the loss are refused. The tokens themselves stay in the files
    until the index is built anew, as does their cost: opening reads 8 bytes per removed token into
    memory. One pass over the suffixes, about 0.5 s for 100 million.

    Args:
        path: folder of the index.
        documents: their numbers, in any order; those that are removed already are no error.

    Returns:
        What changed.

    Raises:
        IndexError: there is no such document; nothing is removed.
        TypeError: the numbers are no integers.
        BlockingIOError: the index is being built or changed by another process.
        OSError: the disk is full, or another error of the system. The index is what it was before.
        What `SpanIndex.open` raises.

    Example:
        >>> import tempfile
        >>> from alignops.spans import SpanIndex, build_index, remove_documents
        >>> folder = tempfile.mkdtemp() + "/index"
        >>> _ = build_index([[1, 2, 1, 2], [2, 1]], folder, vocab_size=4, fingerprint="toy")
        >>> remove_documents(folder, [0])
        Removal(documents=1, tokens=4, total=1)
        >>> with SpanIndex.open(folder) as index:
        ...     index.count([1, 2]), index.count([2, 1]), index.n_tokens
        (0, 1, 2)
    """
    wanted = np.unique(as_ids(documents, "remove_documents", "documents"))
    path = Path(path)
    open_store(path, verify="quick")  # before a lock is left beside what is no index
    with build_lock(path):
        store, manifest = open_store(path)
        for d in wanted.tolist():
            if not 0 <= d < store.documents:
                raise IndexError(
                    f"remove_documents: documents must lie in [0, {store.documents}), got {d}"
                )
        before, after = store.removed, np.union1d(store.removed, wanted)
        if len(after) > len(before):
            try:
                write_manifest(_with_lists(manifest, store, before, after, path), path)
            finally:
                _clean(path)
        left = open_store(path)[0].tokens
        return Removal(len(after) - len(before), store.tokens - left, len(after))


def _with_lists(
    manifest: Manifest, store: library.SpanStore, before: Ints, after: Ints, path: Path
) -> Manifest:
    """The manifest that names lists of these removed documents, which are written."""
    shards = list(manifest.shards)
    for s, shard in enumerate(shards):
        begin, end = store.first_document(s), store.first_document(s + 1)
        mine, known = (d[(d >= begin) & (d < end)] for d in (after, before))
        if len(mine) > len(known):
            written = store.write_removal(s, (mine - begin).astype(np.uint64), os.fspath(path))
            shards[s] = {**shard, "files": {**shard["files"], REMOVED: written}}
    return replace(manifest, shards=tuple(shards))


def _clean(path: Path) -> None:
    """Delete lists that the manifest does not name: older ones, and those of a failed removal."""
    named = {
        file_name(REMOVED, s, shard["files"][REMOVED][1])
        for s, shard in enumerate(open_store(path, verify="quick")[1].shards)
        if REMOVED in shard["files"]
    }
    for file in path.glob(f"{REMOVED}.*"):
        if file.name not in named:
            file.unlink(missing_ok=True)


def find_documents(index: SpanIndex, key: str, value: str) -> Iterator[int]:
    """Numbers of the documents whose metadata have this value under this key.

    Values that are no text are compared as `str` writes them. Removed documents are left out.

    Raises:
        ValueError: the index was built without metadata.

    Example:
        >>> from alignops.testing import span_index
        >>> meta = [{"source": "a.txt"}, {"source": "b.txt"}]
        >>> index = span_index([[1, 2], [2, 1]], vocab_size=4, meta=meta)
        >>> list(find_documents(index, "source", "b.txt"))
        [1]
    """
    store = index._store
    if not store.has("meta"):
        raise ValueError("find_documents: index must have metadata, got one without")
    removed = set(index.removed.tolist())
    for d in range(index.n_docs):
        meta = None if d in removed else json.loads(store.meta(d))
        if isinstance(meta, dict) and key in meta and str(meta[key]) == value:
            yield d
