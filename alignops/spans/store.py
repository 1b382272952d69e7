"""Folders that hold an index: the manifest, and opening the files that it names."""

from __future__ import annotations

import hashlib
import json
import os
import uuid as uuids
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignops import _native
from alignops._native import library
from alignops.spans.errors import (
    IndexCorruptError,
    IndexIncompleteError,
    IndexVersionError,
    NotAnIndexError,
    TokenizerMismatchError,
)

__all__ = ["MANIFEST", "Manifest", "open_store", "read_manifest", "write_manifest"]

#: Name of the manifest in the folder of an index.
MANIFEST = "index.json"
#: In the name of the folder of an unfinished build: "<out>.building-<uuid>".
BUILDING = ".building-"
#: Kind of the files that list removed documents.
REMOVED = "del"
FORMAT = "alignops-spans"
VERSION = (1, 0)
# An index may be replaced while it is being opened; each further attempt needs another replacement.
_ATTEMPTS = 20

_warned = False


@dataclass(frozen=True)
class Manifest:
    """What `index.json` says. `shards` holds the dicts of `SpanShardWriter.info`."""

    uuid: uuids.UUID
    vocab_size: int
    token_bits: int
    fingerprint: str | None
    builder: str
    shards: tuple[dict[str, Any], ...]

    @property
    def tokens(self) -> int:
        """Tokens of all shards, without separators."""
        return sum(shard["tokens"] for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents of all shards."""
        return sum(shard["documents"] for shard in self.shards)


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def encode_manifest(fields: dict[str, Any]) -> bytes:
    """The bytes of a manifest: canonical JSON with the SHA-256 of what it is without that field."""
    digest = hashlib.sha256(_canonical(fields)).hexdigest()
    return _canonical({**fields, "sha256": digest}) + b"\n"


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `index.json` through a temporary name: it is there as a whole or not at all."""
    from alignops import __version__

    fields: dict[str, Any] = {
        "format": FORMAT,
        "version": list(VERSION),
        "uuid": str(manifest.uuid),
        "vocab_size": manifest.vocab_size,
        "token_bits": manifest.token_bits,
        "fingerprint": manifest.fingerprint,
        "tokens": manifest.tokens,
        "documents": manifest.documents,
        "builder": manifest.builder,
        "created_by": f"alignops {__version__}",
        "shards": [
            {
                **shard,
                "files": {
                    kind: {"name": file_name(kind, s, crc), "bytes": size, "table_crc32c": crc}
                    for kind, (size, crc) in shard["files"].items()
                },
            }
            for s, shard in enumerate(manifest.shards)
        ],
    }
    temporary = folder / (MANIFEST + ".tmp")
    with temporary.open("wb") as file:
        file.write(encode_manifest(fields))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / MANIFEST)
    library.spans_sync_folder(str(folder))


def file_name(kind: str, shard: int, crc: int) -> str:
    """Name of a file of a shard; lists of removed documents have one by their checksum."""
    return library.spans_removal_name(shard, crc) if kind == REMOVED else f"{kind}.{shard}"


def read_manifest(data: bytes, path: Path) -> Manifest:
    """Check and parse the bytes of a manifest; `path` is for messages.

    Raises:
        NotAnIndexError: the file is JSON of something else.
        IndexVersionError: another major version.
        IndexCorruptError: the file is not what was written.
    """
    try:
        fields = json.loads(data)
    except ValueError as error:
        raise IndexCorruptError(f"{path}: the manifest is not JSON: {error}") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise NotAnIndexError(f"{path}: not the manifest of an index: it has no format '{FORMAT}'")
    version = fields.get("version")
    if isinstance(version, list) and version and version[0] != VERSION[0]:
        raise IndexVersionError(
            f"{path}: format version {'.'.join(map(str, version))} cannot be read by this release, "
            f"which reads version {VERSION[0]}.x"
        )
    digest = fields.pop("sha256", None)
    if data != encode_manifest(fields):
        raise IndexCorruptError(f"{path}: the manifest does not have its SHA-256 {digest}")
    shards = tuple(
        {
            "tokens": shard["tokens"],
            "documents": shard["documents"],
            "continued": shard["continued"],
            "files": {
                name: (entry["bytes"], entry["table_crc32c"])
                for name, entry in shard["files"].items()
            },
        }
        for shard in fields["shards"]
    )
    return Manifest(
        uuids.UUID(fields["uuid"]),
        fields["vocab_size"],
        fields["token_bits"],
        fields["fingerprint"],
        fields["builder"],
        shards,
    )


def open_store(
    path: str | os.PathLike[str],
    mode: str = "mmap",
    verify: str = "lazy",
    fingerprint: str | None = None,
) -> tuple[_native.library.SpanStore, Manifest]:
    """Open the folder of an index; see `SpanIndex.open` for arguments and errors.

    A folder that is replaced meanwhile, or from which documents are removed, is opened as it was
    before or as it is after, never as a mixture.
    """
    path = Path(path)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except NotADirectoryError:
            raise NotAnIndexError(f"{path}: not an index, which is a folder") from None
        read: Manifest | None = None
        try:
            manifest = read = manifest_of(folder, path)
            store = _store_of(folder, path, manifest, mode, verify)
            break
        except OSError:
            if attempt == _ATTEMPTS or not _changed(folder, path, read):
                raise
        finally:
            os.close(folder)
    _check_fingerprint(manifest, fingerprint, path)
    return store, manifest


def manifest_of(folder: int, path: Path) -> Manifest:
    """The manifest in an opened folder, whose path is for messages."""
    if BUILDING in path.name:
        raise IndexIncompleteError(f"{path}: the folder of a build that has not finished")
    try:
        file = os.open(MANIFEST, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        raise IndexIncompleteError(f"{path}: not a finished index, {MANIFEST} is missing") from None
    with open(file, "rb") as stream:  # noqa: PTH123 (a descriptor)
        return read_manifest(stream.read(), path / MANIFEST)


def _store_of(
    folder: int, path: Path, manifest: Manifest, mode: str, verify: str
) -> _native.library.SpanStore:
    shards = [
        (shard["tokens"], shard["documents"], shard["continued"], shard["files"])
        for shard in manifest.shards
    ]
    return library.SpanStore(
        folder,
        str(path),
        manifest.uuid.bytes,
        manifest.vocab_size,
        manifest.token_bits // 8,
        shards,
        mode,
        verify,
    )


def _changed(folder: int, path: Path, manifest: Manifest | None) -> bool:
    """Whether the path now means another folder than the one opened, or that another manifest."""
    try:
        now, then = path.stat(), os.fstat(folder)
    except FileNotFoundError:
        return True
    if (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino):
        return True
    return manifest is not None and manifest != manifest_of(folder, path)


def _check_fingerprint(manifest: Manifest, fingerprint: str | None, path: Path) -> None:
    global _warned
    if manifest.fingerprint is None:
        if not _warned:
            _warned = True
            warnings.warn(
                f"{path}: the index stores no fingerprint of its tokenizer, so that queries of "
                "another tokenizer cannot be noticed; pass fingerprint= to build_index",
                UserWarning,
                stacklevel=4,
            )
    elif fingerprint is not None and fingerprint != manifest.fingerprint:
        raise TokenizerMismatchError(
            f"{path}: fingerprint must be {manifest.fingerprint!r} (of the tokenizer that the "
            f"index was built with), got {fingerprint!r}"
        )
