"""Building an index: from documents to a folder, safe against kills, full disks and rivals."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
import uuid as uuids
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignops._native import library
from alignops.spans import _documents, _folder
from alignops.spans._folder import clean_stale as clean_stale
from alignops.spans._progress import Callback, Reporter, run
from alignops.spans._shards import (
    BUILDERS,
    MAX_SHARD_TEXT,
    Settings,
    ShardSink,
    available_memory,
    builders_of,
    check_disk,
    finished_shard,
)
from alignops.spans.arrays import as_int
from alignops.spans.errors import IndexIncompleteError
from alignops.spans.store import Manifest, write_manifest

__all__ = ["BuildReport", "build_index", "build_shard", "clean_stale", "merge_manifest", "shard_of"]

_WIDTHS = (8, 16, 32)


@dataclass(frozen=True)
class BuildReport:
    """What `build_index` made.

    Attributes:
        path: the folder.
        uuid: of the index.
        n_tokens: tokens, without separators.
        n_docs: documents; the parts of a cut one count.
        n_shards: shards.
        split_docs: documents that were cut (`split_long_docs`): a match across a cut is not found.
        token_bits: width of a token, 8, 16 or 32.
        builders: what sorted the shards: "sais", "radix", "radix-stream".
        disk_bytes: size of all files.
        seconds: from the first document to the published index.
    """

    path: Path
    uuid: str
    n_tokens: int
    n_docs: int
    n_shards: int
    split_docs: int
    token_bits: int
    builders: tuple[str, ...]
    disk_bytes: int
    seconds: float


def build_index(
    docs: Iterable[Any] | tuple[Any, Any],
    out: str | os.PathLike[str],
    *,
    vocab_size: int,
    token_bits: int | str = "auto",
    builder: str = "auto",
    shard_tokens: int = 2**30,
    mem_bytes: int | None = None,
    meta: Iterable[Any] | None = None,
    labels: Iterable[int] | None = None,
    byte_offsets: Any = None,
    fingerprint: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    allow_empty: bool = False,
    split_long_docs: bool = False,
    keep_partial: bool = False,
    progress: bool | Callback | None = None,
    directory_tokens: int = 2**26,
) -> BuildReport:
    """Sort all suffixes of documents into an index, the folder `out`.

    Documents are consumed once, as they come. The folder appears in one step when everything is on
    disk; until then its content is beside it in `<out>.building-<uuid>`.

    Args:
        docs: integer sequences, arrays or tensors, one per document, some of which may be empty; or
            (flat, offsets), two arrays or tensors: document i is flat[offsets[i]:offsets[i + 1]].
        out: a folder that does not exist yet.
        vocab_size: V; ids are in [0, V).
        token_bits: 8, 16 or 32, with V <= 2^bits - 1; "auto" takes the smallest.
        builder: "sais" (one thread, linear time), "radix" (all threads, works within `mem_bytes` on
            any size) or "auto". All give the same bytes.
        shard_tokens: longest text of a shard, documents with one separator each; at most 2e9.
        mem_bytes: memory for sorting; None takes most of what is free. Shards become smaller where
            that is too little for `shard_tokens`.
        meta: one JSON value per document.
        labels: one integer in [0, 65536) per document.
        byte_offsets: one integer in [0, 2^32) per token, in the form of `docs` (or, for (flat,
            offsets), like flat).
        fingerprint: identifies the tokenizer; opening the index with another one fails.
        overwrite: replace an index at `out`. Who has it open keeps the old one.
        resume: continue the newest unfinished build of `out`, given the same documents: finished
            shards are compared, not sorted again.
        allow_empty: permit an index without tokens.
        split_long_docs: cut documents that are longer than a shard. Matches across a cut are lost.
        keep_partial: leave the unfinished folder after a failure, for `resume`.
        progress: True shows a bar (needs tqdm); a callable gets (phase, done, total) several times
            a second, phase "read", "sort" or "write", in tokens, total 0 if not known.
        directory_tokens: shards from this size on get a directory, which saves reads from a cold
            disk.

    Returns:
        A report.

    Raises:
        IndexError: an id is negative or not below V; the text names document and offset.
        TypeError: ids, offsets, labels or byte offsets are not integers.
        ValueError: no tokens; a document is too long; shapes do not fit; another argument is out of
            range; with resume, documents or settings differ from those of the unfinished build.
        FileExistsError: `out` exists, unless overwrite.
        BlockingIOError: another process builds `out`.
        MemoryError: sorting does not fit into mem_bytes; the text has the estimate.
        OSError: the disk is full, or another error of the system. As after every failure, `out` is
            what it was before.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> report = build_index([[1, 2, 3], [2, 3]], folder + "/index", vocab_size=10)
        >>> report.n_tokens, report.n_docs, report.token_bits
        (5, 2, 8)
    """
    start = time.monotonic()
    settings = _settings(
        "build_index",
        vocab_size,
        token_bits,
        builder,
        shard_tokens,
        mem_bytes,
        directory_tokens,
        split_long_docs,
        {"labels": labels, "meta": meta, "byte_offsets": byte_offsets},
    )
    out = Path(out)
    reporter = Reporter(progress)
    with contextlib.closing(reporter), _folder.build_lock(out):
        _folder.check_output(out, overwrite)
        folder, uuid = _folder.open_folder(out, resume)
        with _removed_on_failure(folder, keep_partial):
            expected = _expected(docs)
            if expected is not None:
                check_disk(folder, settings, *expected)
            sink = ShardSink(folder, uuid, settings, reporter, expected=expected)
            for batch in _documents.batches(docs, labels, meta, byte_offsets):
                sink.add(batch)
            sink.close(allow_empty)
            manifest = Manifest(
                uuid,
                settings.vocab_size,
                8 * settings.token_bytes,
                fingerprint,
                _joined(sink.builders),
                tuple(sink.shards),
            )
            _finish(folder, out, manifest, reporter, overwrite)
    return _report(out, manifest, sink.split, start)


def build_shard(
    docs: Iterable[Any] | tuple[Any, Any],
    folder: str | os.PathLike[str],
    shard: int,
    *,
    vocab_size: int,
    token_bits: int | str = "auto",
    builder: str = "auto",
    shard_tokens: int = MAX_SHARD_TEXT,
    mem_bytes: int | None = None,
    meta: Iterable[Any] | None = None,
    labels: Iterable[int] | None = None,
    byte_offsets: Any = None,
    progress: bool | Callback | None = None,
    directory_tokens: int = 2**26,
) -> None:
    """Build one shard of an index, in a task of its own; `merge_manifest` joins the shards.

    The task may be run again: a finished shard is left as it is, an unfinished one is begun anew.
    Which documents go where is for the caller, for example by `shard_of`; a shard may be empty.
    `docs` are those of this shard and are not read if it is finished. `folder` holds all shards of
    the index and is made if it is missing; `shard` counts from 0. The other arguments are those of
    `build_index` and must be equal for all shards.

    Raises:
        What `build_index` raises; ValueError if the documents do not fit into one shard.
    """
    settings = _settings(
        "build_shard",
        vocab_size,
        token_bits,
        builder,
        shard_tokens,
        mem_bytes,
        directory_tokens,
        False,
        {"labels": labels, "meta": meta, "byte_offsets": byte_offsets},
    )
    if shard < 0:
        raise ValueError(f"build_shard: shard must not be negative, got {shard}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    reporter = Reporter(progress)
    with contextlib.closing(reporter), _folder.build_lock(folder / str(shard)):
        if (mark := finished_shard(folder, shard)) is not None:
            settings.check_mark(mark, "build_shard")
            return
        sink = ShardSink(folder, uuids.uuid4(), settings, reporter, first=shard, single=True)
        for batch in _documents.batches(docs, labels, meta, byte_offsets):
            sink.add(batch)
        sink.close(allow_empty=True)


def merge_manifest(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    shards: int,
    fingerprint: str | None = None,
    overwrite: bool = False,
    allow_empty: bool = False,
) -> BuildReport:
    """Join the shards that `build_shard` made in `folder` to the index `out`, which replaces it.

    `folder` must be on the file system of `out` and have this many shards; the other arguments are
    those of `build_index`.

    Raises:
        IndexIncompleteError: a shard is missing or not finished.
        ValueError: shards differ in vocabulary, width or optional files; or there are no tokens.
        FileExistsError, BlockingIOError, OSError: as for `build_index`.
    """
    start = time.monotonic()
    folder, out = Path(folder), Path(out)
    with _folder.build_lock(out):
        _folder.check_output(out, overwrite)
        marks = [finished_shard(folder, s) for s in range(shards)]
        done = [mark for mark in marks if mark is not None]
        if len(done) < len(marks) or not done:
            missing = marks.index(None) if marks else 0
            raise IndexIncompleteError(f"merge_manifest: {folder}: shard {missing} is not finished")
        for s, mark in enumerate(done):
            for what, got, want in _differences(mark, done[0]):
                raise ValueError(
                    f"merge_manifest: {what} of shard {s} must be {want}, as of shard 0, got {got}"
                )
        manifest = Manifest(
            uuids.uuid4(),
            done[0]["vocab_size"],
            8 * done[0]["token_bytes"],
            fingerprint,
            _joined(mark["builder"] for mark in done),
            tuple(mark["shard"] for mark in done),
        )
        if manifest.tokens == 0 and not allow_empty:
            raise ValueError("merge_manifest: the shards must hold at least one token, got none")
        _finish(folder, out, manifest, Reporter(None), overwrite)
    return _report(out, manifest, 0, start)


def shard_of(key: str | bytes, shards: int) -> int:
    """Where a document belongs in a build of several tasks: the same for a key in every run.

    Args:
        key: identifies the document, for example its path or address.
        shards: how many shards there are.

    Example:
        >>> shard_of("books/moby-dick.txt", 8) == shard_of(b"books/moby-dick.txt", 8)
        True
    """
    data = key.encode() if isinstance(key, str) else key
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") % shards


def _settings(
    op: str,
    vocab_size: int,
    token_bits: int | str,
    builder: str,
    shard_tokens: int,
    mem_bytes: int | None,
    directory_tokens: int,
    split_long_docs: bool,
    optional: dict[str, Any],
) -> Settings:
    """Checks of the arguments that both ways to build share."""
    vocab_size = as_int(vocab_size, op, "vocab_size")
    shard_tokens = as_int(shard_tokens, op, "shard_tokens")
    directory_tokens = as_int(directory_tokens, op, "directory_tokens")
    if token_bits == "auto":
        token_bits = next((bits for bits in _WIDTHS if vocab_size < 1 << bits), _WIDTHS[-1])
    if token_bits not in _WIDTHS:
        raise ValueError(f"{op}: token_bits must be 8, 16, 32 or 'auto', got {token_bits!r}")
    most = (1 << int(token_bits)) - 1
    if not 1 <= vocab_size <= most:
        raise ValueError(
            f"{op}: vocab_size must be in [1, {most}] for tokens of {token_bits} bits, the largest "
            f"of which separates documents, got {vocab_size}"
        )
    if builder not in BUILDERS:
        raise ValueError(f"{op}: builder must be one of {', '.join(BUILDERS)}, got {builder!r}")
    if not 2 <= shard_tokens <= MAX_SHARD_TEXT:
        raise ValueError(f"{op}: shard_tokens must be in [2, {MAX_SHARD_TEXT}], got {shard_tokens}")
    if mem_bytes is None:
        mem_bytes = available_memory()
    return Settings(
        vocab_size,
        int(token_bits) // 8,
        builders_of(builder),
        shard_tokens,
        mem_bytes,
        directory_tokens,
        split_long_docs,
        **{name: values is not None for name, values in optional.items()},
    )


def _expected(docs: Any) -> tuple[int, int] | None:
    """Tokens and documents, where they are known before reading."""
    if not _documents.is_flat(docs):
        return None
    return int(docs[0].shape[0]), max(int(docs[1].shape[0]) - 1, 0)


def _differences(mark: dict[str, Any], first: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in ("vocab_size", "token_bytes"):
        if mark[name] != first[name]:
            yield name, mark[name], first[name]
    # The directory depends on the size of the shard.
    got, want = (sorted(m["shard"]["files"].keys() - {"dir"}) for m in (mark, first))
    if got != want:
        yield "files", got, want


def _joined(builders: Iterable[str]) -> str:
    return "+".join(sorted(set(builders)))


@contextlib.contextmanager
def _removed_on_failure(folder: Path, keep: bool) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _finish(
    folder: Path, out: Path, manifest: Manifest, reporter: Reporter, overwrite: bool
) -> None:
    """What was not known before goes into the headers; then the manifest, then the name."""

    def stamp(_: library.SpanProgress) -> None:
        shards = len(manifest.shards)
        for s, shard in enumerate(manifest.shards):
            for name in shard["files"]:
                library.spans_restamp(str(folder / f"{name}.{s}"), manifest.uuid.bytes, s, shards)

    run(stamp, reporter)
    write_manifest(manifest, folder)
    _folder.check_output(out, overwrite)  # it may have come into being meanwhile
    _folder.publish(folder, out, len(manifest.shards))


def _report(out: Path, manifest: Manifest, split: int, start: float) -> BuildReport:
    return BuildReport(
        out,
        str(manifest.uuid),
        manifest.tokens,
        manifest.documents,
        len(manifest.shards),
        split,
        manifest.token_bits,
        tuple(manifest.builder.split("+")),
        sum(path.stat().st_size for path in out.iterdir()),
        time.monotonic() - start,
    )
