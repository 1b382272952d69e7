"""Documents to shards: where one ends and the next begins, how much memory sorting may take."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid as uuids
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignops._native import library
from alignops.spans._documents import Batch
from alignops.spans._progress import Reporter, run

#: Longest text of a shard, separators included (csrc/spans/writer.h).
MAX_SHARD_TEXT = 2_000_000_000
# Shards are not made smaller than this to save memory.
_MIN_SHARD_TEXT = 1 << 20
# Tokens per native call while documents are read: some milliseconds.
_STEP_TOKENS = 1 << 21
#: Names that callers may give.
BUILDERS = ("auto", "sais", "radix")
# From this number of threads on "radix", which takes about three times the work of "sais" but all
# threads, is faster.
_RADIX_THREADS = 8
# Files that depend on the documents alone, not on sorting.
_SORTED = ("suf", "dir")


def builders_of(name: str) -> tuple[str, ...]:
    """What may sort, in the order of preference, for a name that callers give."""
    radix, sais = ("radix", "radix-stream"), ("sais",)
    if name == "auto":
        return radix + sais if torch.get_num_threads() >= _RADIX_THREADS else sais + radix
    return sais if name == "sais" else radix


@dataclass(frozen=True)
class Settings:
    """What all shards of an index share."""

    vocab_size: int
    token_bytes: int
    builders: tuple[str, ...]  # in the order of preference
    shard_text: int
    mem_bytes: int
    directory_tokens: int
    split_long_docs: bool
    labels: bool
    meta: bool
    byte_offsets: bool

    def bytes_of(self, builder: str, text_size: int) -> int:
        """Peak memory of sorting a text."""
        return library.spans_builder_bytes(builder, text_size, self.token_bytes, self.vocab_size)

    def builder_for(self, text_size: int) -> str | None:
        """The first choice that fits into `mem_bytes`."""
        for builder in self.builders:
            if self.bytes_of(builder, text_size) <= self.mem_bytes:
                return builder
        return None

    def memory_error(self, text_size: int) -> MemoryError:
        """Says what sorting a text would take."""
        least = min(self.bytes_of(builder, text_size) for builder in self.builders)
        return MemoryError(
            f"build_index: sorting {text_size} tokens by {' or '.join(self.builders)} needs "
            f"{least} bytes, mem_bytes is {self.mem_bytes}"
        )

    def text_limit(self) -> int:
        """Longest text of a shard: `shard_text`, or less, so that sorting fits into memory.

        Raises:
            MemoryError: not even a small shard fits.
        """
        least = min(_MIN_SHARD_TEXT, self.shard_text)
        in_memory = [builder for builder in self.builders if builder != "radix-stream"]
        for builders in (in_memory, self.builders):
            if (limit := self._largest(builders)) >= least:
                return limit
        raise self.memory_error(least)

    def _largest(self, builders: Sequence[str]) -> int:
        def fits(size: int) -> bool:
            return any(self.bytes_of(builder, size) <= self.mem_bytes for builder in builders)

        if fits(self.shard_text):
            return self.shard_text
        low, high = 0, self.shard_text  # high does not fit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def check_mark(self, mark: dict[str, Any], op: str) -> None:
        """ValueError if a finished shard has another vocabulary or width."""
        for name in ("vocab_size", "token_bytes"):
            if mark[name] != getattr(self, name):
                raise ValueError(
                    f"{op}: {name} must be {mark[name]}, as of the shard that is finished, got "
                    f"{getattr(self, name)}"
                )


def marker(folder: Path, shard: int) -> Path:
    """The file that says that a shard is finished."""
    return folder / f"{shard}.done"


def finished_shard(folder: Path, shard: int) -> dict[str, Any] | None:
    """What the marker of a shard says, if it is there and the files have the right sizes."""
    try:
        mark: dict[str, Any] = json.loads(marker(folder, shard).read_bytes())
        for name, (size, _) in mark["shard"]["files"].items():
            if (folder / f"{name}.{shard}").stat().st_size != size:
                return None
    except (FileNotFoundError, ValueError):
        return None
    return mark


def remove_unfinished(folder: Path, shard: int) -> None:
    """Remove the files of a shard that has no marker."""
    for path in folder.glob(f"*.{shard}"):
        path.unlink()
    marker(folder, shard).unlink(missing_ok=True)


class ShardSink:
    """Takes batches of documents and writes shards, one after the other, from number `first` on.

    `documents`, `tokens` and `split` count what was taken; `builders` holds what sorted the shards.
    """

    def __init__(
        self,
        folder: Path,
        uuid: uuids.UUID,
        settings: Settings,
        report: Reporter,
        *,
        first: int = 0,
        single: bool = False,
        expected: tuple[int, int] | None = None,
    ) -> None:
        self.folder, self.uuid, self.settings, self.report = folder, uuid, settings, report
        self.limit = settings.shard_text if single else settings.text_limit()
        self.first, self.single, self.expected = first, single, expected
        self.shards: list[dict[str, Any]] = []
        self.builders: set[str] = set()
        self.documents = self.tokens = self.split = 0
        self._writer: Any = None
        self._finished: dict[str, Any] | None = None  # the mark of an earlier build
        self._text = 0  # of the open shard
        self._continued = False

    def add(self, batch: Batch) -> None:
        """Append documents."""
        n = len(batch.offsets) - 1
        cost = batch.offsets + np.arange(n + 1)  # tokens and separators before each document
        i = 0
        while i < n:
            fit = int(np.searchsorted(cost, cost[i] + self.limit - self._text, side="right")) - 1
            if fit > i:
                self._put(batch, i, fit)
                i = fit
            elif self._text > 0 and self.single:
                raise ValueError(
                    f"build_shard: docs must fit into one shard of shard_tokens={self.limit}, "
                    f"document {self.documents + i} does not; use more shards"
                )
            elif self._text > 0:
                self._close()
            else:
                self._put_long(batch, i)
                i += 1
        self.documents += n
        self.tokens += int(batch.offsets[-1])

    def close(self, allow_empty: bool) -> None:
        """Finish the last shard.

        Raises:
            ValueError: there were no tokens, unless allow_empty.
        """
        if self.tokens == 0 and not allow_empty:
            raise ValueError(
                "build_index: docs must hold at least one token, got "
                f"{self.documents or 'no'} documents without any; allow_empty=True permits that"
            )
        if self._writer is not None or not self.shards:
            self._open()
            self._close()

    @property
    def _number(self) -> int:
        return self.first + len(self.shards)

    def _open(self) -> None:
        if self._writer is not None:
            return
        self._finished = finished_shard(self.folder, self._number)
        if self._finished is None:
            remove_unfinished(self.folder, self._number)
        else:
            self.settings.check_mark(self._finished, "build_index: resume")
        s = self.settings
        self._writer = library.SpanShardWriter(
            "" if self._finished is not None else str(self.folder),
            self._number,
            self.uuid.bytes,
            s.vocab_size,
            s.token_bytes,
            s.labels,
            s.meta,
            s.byte_offsets,
        )
        if self.expected is not None:
            text = self.expected[0] - self.tokens + self.expected[1] - self.documents
            if text <= self.limit:
                self._writer.reserve(text, self.expected[1] - self.documents)

    def _put(self, batch: Batch, begin: int, end: int) -> None:
        """Documents [begin, end), which fit."""
        self._put_tokens(batch, begin, end, int(batch.offsets[begin]), int(batch.offsets[end]))

    def _put_long(self, batch: Batch, i: int) -> None:
        """A document that is longer than a shard, which is empty."""
        begin, end = int(batch.offsets[i]), int(batch.offsets[i + 1])
        size = end - begin + 1
        if size <= self.settings.shard_text and self.settings.builder_for(size) is not None:
            self._put(batch, i, i + 1)
            self._close()
        elif self.settings.split_long_docs:
            self.split += 1
            while begin < end:
                stop = min(begin + self.limit - 1, end)
                self._put_tokens(batch, i, i + 1, begin, stop)
                begin = stop
                if begin < end:
                    self._close()
                    self._continued = True
        elif size <= self.settings.shard_text:
            raise self.settings.memory_error(size)
        else:
            raise ValueError(
                f"build_index: docs: a document must have fewer than shard_tokens="
                f"{self.settings.shard_text} tokens, document {self.documents + i} has {size - 1}; "
                "split_long_docs=True cuts it"
            )

    def _put_tokens(self, batch: Batch, begin: int, end: int, at: int, stop: int) -> None:
        """Documents [begin, end), of which tokens [at, stop) in all are taken."""
        self._open()
        offsets = batch.offsets
        doc = begin
        while doc < end:
            part = min(at + _STEP_TOKENS, stop)
            # Documents that end within this part; the last one ends where the tokens do.
            if part == stop:
                after = end
            else:
                after = int(np.searchsorted(offsets[: end + 1], part, side="right")) - 1
            ends = np.minimum(offsets[doc + 1 : after + 1], part) - at
            meta = batch.meta[doc:after] if batch.meta is not None else []
            self._writer.add(
                batch.tokens[at:part],
                ends,
                None if batch.byte_offsets is None else batch.byte_offsets[at:part],
                None if batch.labels is None else batch.labels[doc:after],
                b"".join(meta),
                np.cumsum([len(text) for text in meta], dtype=np.int64)
                if batch.meta is not None
                else None,
                self.documents + doc,
                at - int(offsets[doc]),
            )
            self._text += part - at + after - doc
            doc, at = after, part
            known = 0 if self.expected is None else self.expected[0]
            self.report("read", self.tokens + at, known)

    def _close(self) -> None:
        """Complete the open shard: sort it, or compare it with what an earlier build made of it."""
        writer, number, continued = self._writer, self._number, self._continued
        if self._finished is not None:
            writer.end_text(continued)
            self._compare(writer.info(), self._finished["shard"])
            self.shards.append(self._finished["shard"])
            self.builders.add(self._finished["builder"])
        else:
            builder = self.settings.builder_for(self._text)
            if builder is None:
                raise self.settings.memory_error(self._text)

            def work(progress: library.SpanProgress) -> None:
                writer.end_text(continued)
                writer.sort(
                    builder, self.settings.mem_bytes, self.settings.directory_tokens, progress
                )

            run(work, self.report)
            mark = {
                "vocab_size": self.settings.vocab_size,
                "token_bytes": self.settings.token_bytes,
                "builder": builder,
                "shard": writer.info(),
            }
            _write_durably(marker(self.folder, number), json.dumps(mark).encode())
            self.shards.append(mark["shard"])
            self.builders.add(builder)
        self._writer, self._finished, self._text, self._continued = None, None, 0, False

    def _compare(self, info: dict[str, Any], finished: dict[str, Any]) -> None:
        def of_documents(shard: dict[str, Any]) -> dict[str, Any]:
            files = {k: tuple(v) for k, v in shard["files"].items() if k not in _SORTED}
            return {**shard, "files": files}

        if of_documents(info) != of_documents(finished):
            raise ValueError(
                "build_index: resume: documents, shard_tokens and mem_bytes must be those of the "
                f"unfinished build; its shard {self._number} has other content"
            )


def check_disk(folder: Path, settings: Settings, tokens: int, documents: int) -> None:
    """OSError (ENOSPC) if the files of so many tokens have no room on the disk of `folder`."""
    text = tokens + documents
    per_token = 4 + settings.token_bytes + (4 if settings.byte_offsets else 0)
    needed = text * per_token + 8 * documents
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"build_index: the index needs {needed} bytes, the disk has {free}",
            str(folder),
        )


def available_memory() -> int:
    """Bytes that a build may use: four fifths of what the machine and the control group have."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        free = int(line.split()[1]) * 1024
    # A limit of "max" is no number.
    with contextlib.suppress(OSError, ValueError, KeyError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
        cache = dict(line.split() for line in lines)["inactive_file"]
        free = min(free, max(limit - used + int(cache), 0))
    return free // 5 * 4


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
