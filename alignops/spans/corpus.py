"""Files of text to an index: plain text, JSON lines and Parquet, tokenised as they are read.

Documents are streamed: what is in memory at a time is one batch of about a million characters, or
one document if that is larger. Every document keeps where it came from: `{"source": path}` and,
for files with many documents, the line or row.
"""

from __future__ import annotations

import glob as globbing
import gzip
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from alignops.spans.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from alignops.spans.build import BuildReport

__all__ = ["PATTERNS", "TextDocument", "build_corpus", "find_files", "read_documents", "tokenise"]

#: File names that are read in folders, unless other patterns are given.
PATTERNS = ("*.txt", "*.md", "*.rst", "*.jsonl", "*.ndjson", "*.parquet", "*.txt.gz", "*.jsonl.gz")

FORMATS = ("auto", "text", "jsonl", "parquet")
SPLITS = ("file", "paragraph", "line")
ERRORS = ("strict", "replace", "skip")

_BATCH = 1 << 20  # characters that are tokenised in one call
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}


class TextDocument(NamedTuple):
    """A text and what is known about it, to be stored as JSON."""

    text: str
    meta: dict[str, Any]


class TokenDocument(NamedTuple):
    """A tokenised document: what `build_index` takes of each."""

    ids: npt.NDArray[np.uint32]
    meta: dict[str, Any]
    byte_offsets: npt.NDArray[np.uint32] | None


def find_files(
    sources: Iterable[str | Path], patterns: Sequence[str] | None = None
) -> Iterator[Path]:
    """The files that sources name, each once.

    Args:
        sources: files, folders (searched with their subfolders) and patterns such as
            `data/**/*.txt`.
        patterns: names of files that count in a folder. Default: `PATTERNS`.

    Yields:
        Path: files in the order of the sources, those of one source sorted.

    Raises:
        FileNotFoundError: a source names nothing.
    """
    seen: set[Path] = set()
    for source in sources:
        path = Path(source)
        if path.is_dir():
            found = {p for pattern in patterns or PATTERNS for p in path.rglob(pattern)}
        elif path.exists():
            found = {path}
        else:
            names = globbing.glob(str(source), recursive=True)  # noqa: PTH207 (absolute, too)
            found = {Path(name) for name in names}
        files = sorted(p for p in found if p.is_file())
        if not files:
            wanted = f" that matches {', '.join(patterns or PATTERNS)}" if path.is_dir() else ""
            raise FileNotFoundError(f"find_files: {source} names no file{wanted}")
        for file in files:
            if file not in seen:
                seen.add(file)
                yield file


def read_documents(
    files: Iterable[str | Path],
    *,
    format: str = "auto",
    field: str = "text",
    meta_fields: Sequence[str] = (),
    split: str = "file",
    errors: str = "strict",
) -> Iterator[TextDocument]:
    """Documents of files of text (UTF-8), JSON lines or Parquet.

    Args:
        files: paths; a name that ends in `.gz` is decompressed.
        format: "text", "jsonl", "parquet", or "auto": by the suffix (.jsonl, .ndjson, .parquet,
            .pq; everything else is text).
        field: key or column of the text in JSON lines and Parquet.
        meta_fields: keys or columns to keep.
        split: what a document is in a text file: the whole "file", a "paragraph" between blank
            lines, or a "line". Documents of white space alone are left out.
        errors: what happens to text that is not Unicode (a text file that is not UTF-8, half a
            surrogate pair in JSON): "strict": ValueError; "skip": the document is left out;
            "replace": what is wrong becomes U+FFFD, and byte offsets count those.

    Yields:
        TextDocument: with `source` in its `meta`, and `line` (from 1) or `row` (from 0).

    Raises:
        ValueError: an argument is none of its choices; text that is not Unicode; a line that is no
            JSON object, or has no such text field. The message names file and line.
    """
    for name, value, choices in (
        ("format", format, FORMATS),
        ("split", split, SPLITS),
        ("errors", errors, ERRORS),
    ):
        if value not in choices:
            raise ValueError(
                f"read_documents: {name} must be one of {', '.join(choices)}, got {value!r}"
            )
    for file in map(Path, files):
        kind = format
        if kind == "auto":
            kind = _SUFFIXES.get(Path(file.name.removesuffix(".gz")).suffix.lower(), "text")
        if kind == "text":
            yield from _read_text(file, split, errors)
        elif kind == "jsonl":
            yield from _read_jsonl(file, field, meta_fields, errors)
        else:
            yield from _read_parquet(file, field, meta_fields)


def _name(path: Path) -> str:
    """The path as text, even if its bytes are none."""
    return os.fsencode(path).decode("utf-8", "replace")


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _read_text(path: Path, split: str, errors: str) -> Iterator[TextDocument]:
    with _open(path) as file:
        raw = file.read()
    try:
        text = raw.decode("utf-8", "replace" if errors == "replace" else "strict")
    except UnicodeDecodeError as error:
        if errors == "skip":
            return
        raise ValueError(f"{path}: not UTF-8: byte {error.start}: {error.reason}") from None
    del raw
    if split == "file":
        if text.strip():
            yield TextDocument(text, {"source": _name(path)})
        return
    lines: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            lines.append(line)
        if lines and (split == "line" or not line.strip()):
            first = number - len(lines) + (1 if line.strip() else 0)
            yield TextDocument(
                "\n".join(lines).rstrip("\r"), {"source": _name(path), "line": first}
            )
            lines = []


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_jsonl(
    path: Path, field: str, meta_fields: Sequence[str], errors: str
) -> Iterator[TextDocument]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from None
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                raise ValueError(f"{path}:{number}: no text in the field {field!r}")
            text: str = record[field]
            if not _is_unicode(text):  # "\ud800" is legal JSON
                if errors == "strict":
                    raise ValueError(f"{path}:{number}: the text holds half a surrogate pair")
                if errors == "skip":
                    continue
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            meta = {"source": _name(path), "line": number}
            meta |= {key: record[key] for key in meta_fields if key in record}
            yield TextDocument(text, meta)


def _read_parquet(path: Path, field: str, meta_fields: Sequence[str]) -> Iterator[TextDocument]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise ValueError(f"{path}: Parquet needs pip install 'alignops[corpus]'") from None
    try:
        file = parquet.ParquetFile(path)
    except ArrowException as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from None
    with file:
        columns = file.schema_arrow.names
        if field not in columns:
            raise ValueError(f"{path}: no column {field!r} among {', '.join(columns)}")
        kept = [key for key in meta_fields if key in columns]
        rows = itertools.count()
        for batch in file.iter_batches(batch_size=1024, columns=[field, *kept]):
            for record, row in zip(batch.to_pylist(), rows, strict=False):
                if not isinstance(record[field], str):
                    raise ValueError(f"{path}: row {row}: no text in the column {field!r}")
                meta = {"source": _name(path), "row": row, **{key: record[key] for key in kept}}
                yield TextDocument(record[field], meta)


def tokenise(
    documents: Iterable[TextDocument], tokenizer: TextTokenizer, byte_offsets: bool = False
) -> Iterator[TokenDocument]:
    """Token ids of documents, in batches, so that a fast tokenizer uses all cores.

    Args:
        documents: consumed as the result is.
        tokenizer: from `load_tokenizer`.
        byte_offsets: also where each token begins in the UTF-8 text.

    Yields:
        TokenDocument: in the order of `documents`.

    Example:
        >>> from alignops.spans.tokenizer import ByteTokenizer
        >>> document = next(tokenise([TextDocument("abc", {})], ByteTokenizer()))
        >>> document.ids.tolist()
        [97, 98, 99]
    """
    batch: list[TextDocument] = []
    size = 0
    for document in itertools.chain(documents, [None]):
        if document is not None:
            batch.append(document)
            size += len(document.text)
        if batch and (document is None or size >= _BATCH):
            encoded = tokenizer.encode([d.text for d in batch], byte_offsets)
            for d, (ids, offsets) in zip(batch, encoded, strict=True):
                yield TokenDocument(ids, d.meta, offsets)
            batch, size = [], 0


def build_corpus(
    documents: Iterable[TextDocument],
    out: str | Path,
    tokenizer: TextTokenizer,
    *,
    byte_offsets: bool = False,
    max_tokens: int | None = None,
    **options: Any,
) -> BuildReport:
    """Tokenise documents into a new index.

    Args:
        documents: from `read_documents`, or any iterable of texts with metadata; consumed once.
        out: folder of the index.
        tokenizer: from `load_tokenizer`; a copy goes into the folder, for `load_tokenizer(out)`.
        byte_offsets: store where each token begins in its text (4 bytes per token more).
        max_tokens: the document with which there are as many is the last.
        **options: see `build_index`: token_bits, builder, shard_tokens, mem_bytes, labels,
            overwrite, resume, allow_empty, split_long_docs, keep_partial, progress.

    Returns:
        BuildReport: what was built.

    Raises:
        OSError, ValueError, IndexError, MemoryError: see `build_index` and `read_documents`.
    """
    from alignops.spans.build import build_index

    tokens = tokenise(documents, tokenizer, byte_offsets)
    if max_tokens is not None:
        tokens = _until(tokens, max_tokens)
    ids, meta, offsets = itertools.tee(tokens, 3)
    report = build_index(
        (d.ids for d in ids),
        out,
        vocab_size=tokenizer.vocab_size,
        fingerprint=tokenizer.fingerprint,
        meta=(d.meta for d in meta),
        byte_offsets=(d.byte_offsets for d in offsets) if byte_offsets else None,
        **options,
    )
    tokenizer.save(Path(out) / "tokenizer.json")
    return report


def _until(documents: Iterator[TokenDocument], tokens: int) -> Iterator[TokenDocument]:
    for document in documents:
        yield document
        tokens -= len(document.ids)
        if tokens <= 0:
            return
