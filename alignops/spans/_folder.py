"""The folder of an index while it is built: locked, published in one step, cleaned up after."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import uuid as uuids
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignops._native import library
from alignops.spans._shards import marker
from alignops.spans.store import BUILDING, MANIFEST

_LOCK = ".lock"


@contextlib.contextmanager
def build_lock(out: Path) -> Iterator[None]:
    """Holds `<out>.lock`, a file with process id and host, or raises BlockingIOError.

    On one machine the lock is the kernel's, which a killed process loses; the file of another
    machine always counts as held.
    """
    path = out.with_name(out.name + _LOCK)
    host = socket.gethostname()
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner = _owner(fd)
            if owner.get("host", host) != host:
                raise BlockingIOError
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), path.stat()):
                    break
        except BlockingIOError:
            owner = _owner(fd)
            os.close(fd)
            raise BlockingIOError(
                errno.EAGAIN,
                f"{out} is being built by process {owner.get('pid')} on {owner.get('host')}; if "
                "that machine is not building, remove the lock",
                str(path),
            ) from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # of a file that its owner has removed meanwhile
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps({"pid": os.getpid(), "host": host}).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def _owner(fd: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def check_output(out: Path, overwrite: bool) -> None:
    """FileExistsError unless `out` is free, or an index that may be replaced."""
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise FileExistsError(
            errno.EEXIST, "build_index: the output exists; overwrite=True replaces it", str(out)
        )
    if not (out / MANIFEST).exists():
        raise FileExistsError(
            errno.EEXIST, "build_index: the output is not an index and is not replaced", str(out)
        )


def building_folders(out: Path) -> list[Path]:
    """Folders of unfinished builds of `out`, newest first."""
    found = out.parent.glob(f"{_escape(out.name)}{BUILDING}*")
    return sorted((p for p in found if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def open_folder(out: Path, resume: bool) -> tuple[Path, uuids.UUID]:
    """The folder to build in: a new one, or with `resume` the newest of an unfinished build."""
    for folder in building_folders(out) if resume else ():
        with contextlib.suppress(ValueError):
            uuid = uuids.UUID(folder.name.rpartition(BUILDING)[2])
            (folder / MANIFEST).unlink(missing_ok=True)
            return folder, uuid
    uuid = uuids.uuid4()
    folder = out.with_name(f"{out.name}{BUILDING}{uuid}")
    folder.mkdir()
    return folder, uuid


def publish(folder: Path, out: Path, shards: int) -> None:
    """Make `folder`, complete with its manifest, the index `out`, whose former one is removed."""
    old = out.with_name(f"{out.name}{BUILDING}{uuids.uuid4()}")
    if not os.path.lexists(out):
        folder.rename(out)
        old = folder
    elif library.spans_exchange(str(folder), str(out)):
        old = folder
    else:
        # Two steps where the file system has no single one: a kill between them leaves `out` under
        # the name of an unfinished build.
        out.rename(old)
        folder.rename(out)
    library.spans_sync_folder(str(out.parent.absolute()))
    shutil.rmtree(old, ignore_errors=True)
    for s in range(shards):
        marker(out, s).unlink(missing_ok=True)


def clean_stale(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove what killed builds have left in a folder: `*.building-*` and `*.lock`.

    Builds that are running, also those of other machines, are left alone.

    Returns:
        What was removed.
    """
    folder = Path(folder)
    removed: list[Path] = []
    stale = [(p, p.name.split(BUILDING)[0]) for p in folder.glob(f"*{BUILDING}*") if p.is_dir()]
    locks = [(p, p.name.removesuffix(_LOCK)) for p in folder.glob(f"*{_LOCK}") if p.is_file()]
    for path, name in stale + locks:
        with contextlib.suppress(BlockingIOError), build_lock(folder / name):
            if path.is_dir():
                shutil.rmtree(path)
            removed.append(path)
    return sorted(removed)
