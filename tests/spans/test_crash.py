"""Builds that are killed, interrupted, out of disk or memory, or not alone.

The old index or the new one is there, whole, and nothing but a folder that `open` refuses is left
behind.
"""

import functools
import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignops.spans import build_index, clean_stale, store
from alignops.spans._folder import build_lock
from alignops.spans.errors import IndexIncompleteError
from tests.spans.index_files import flat_of, manifest_of, names_in, random_docs

OLD, NEW = 11, 22
#: Several shards, all optional files.
OPTIONS: dict[str, Any] = {"vocab_size": 400, "shard_tokens": 40_000, "directory_tokens": 1}


@functools.cache
def documents(seed: int) -> list[list[int]]:
    return random_docs(np.random.default_rng(seed), 400, 60, 4000)


def build(out: Path, seed: int, **options: Any) -> None:
    docs = documents(seed)
    build_index(
        docs,
        out,
        fingerprint=str(seed),
        labels=range(60),
        meta=({"seed": seed} for _ in docs),
        byte_offsets=[range(len(doc)) for doc in docs],
        overwrite=True,
        **OPTIONS,
        **options,
    )


def seed_of(out: Path) -> int:
    """Which of the indexes this is, after checking every byte of it."""
    opened, manifest = store.open_store(out, verify="full")
    seed = int(manifest.fingerprint or 0)
    docs = documents(seed)
    assert opened.documents == len(docs)
    for d in range(0, 60, 7):
        assert opened.document_tokens(d).tolist() == docs[d]
        assert json.loads(opened.meta(d)) == {"seed": seed}
    return seed


# Kill -9


def count_calls(die_at: int) -> list[int]:
    """Counts the calls of native functions from the modules that build; dies at one of them."""
    calls = [0]

    def hook(frame: Any, event: str, argument: Any) -> None:
        name = frame.f_globals.get("__name__", "")
        if event == "c_call" and name.startswith(("alignops.spans", "shutil", "pathlib")):
            calls[0] += 1
            if calls[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(hook)
    return calls


def killed_builds(folder: str) -> None:
    """In a process that forks one per point: at calls, mostly in the last fifth, and at times."""
    out = Path(folder) / "index"
    build(out, OLD)
    documents(NEW)
    start = time.monotonic()
    calls = count_calls(0)
    build(out, NEW)
    sys.setprofile(None)
    whole = time.monotonic() - start
    points: list[tuple[str, float]] = [("call", calls[0] * (i + 0.5) / 15) for i in range(15)]
    points += [("call", calls[0] * (1 - i / 100)) for i in range(20)]
    points += [("time", whole * (i + 0.5) / 15) for i in range(15)]
    outcomes = []
    for what, point in points:
        build(out, OLD)
        pid = os.fork()
        if pid == 0:
            if what == "call":
                count_calls(int(point))
            build(out, NEW)
            os._exit(0)
        if what == "time":
            time.sleep(point)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status)
        seed = seed_of(out)
        left = [p for p in out.parent.iterdir() if ".building-" in p.name]
        for path in left:
            with pytest.raises(IndexIncompleteError):
                store.open_store(path)
        clean_stale(out.parent)
        assert names_in(out.parent) == ["index"]
        assert killed or seed == NEW
        outcomes.append((killed, seed, bool(left)))
    print(json.dumps(outcomes))


def in_process(body: Callable[..., None], *arguments: str) -> str:
    """Runs a function of this module in a new interpreter and returns what it printed."""
    code = f"import sys\nfrom {__name__} import {body.__name__}\n{body.__name__}(*sys.argv[1:])"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kill_at_fifty_points(tmp_path: Path) -> None:
    outcomes = json.loads(in_process(killed_builds, str(tmp_path)))
    assert len(outcomes) == 50
    assert sum(killed for killed, _, _ in outcomes) >= 30
    # Before and after the new index took its place, with an unfinished or the old one left over.
    assert {(seed, left) for _, seed, left in outcomes} >= {(OLD, True), (NEW, True)}


# Resume


def partial_build(out: Path, docs: list[list[int]], after: int, **options: Any) -> Path:
    """The folder of a build that failed when it had read this many documents."""

    def failing() -> Iterator[list[int]]:
        yield from docs[:after]
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        build_index(failing(), out, keep_partial=True, **OPTIONS, **options)
    (folder,) = (path for path in out.parent.iterdir() if ".building-" in path.name)
    return folder


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents reach the shards at once, so that some are finished before a failure."""
    monkeypatch.setattr("alignops.spans._documents.BATCH_TOKENS", 1)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("after", [1, 20, 45, 60])
def test_resume(tmp_path: Path, after: int) -> None:
    docs = documents(OLD)
    out = tmp_path / "index"
    folder = partial_build(out, docs, after)
    finished = sorted(folder.glob("*.done"))
    assert bool(finished) == (after > 1)
    inodes = {p.name: p.stat().st_ino for d in finished for p in folder.glob(f"*.{d.stem}")}
    report = build_index(docs, out, resume=True, **OPTIONS)
    assert report.n_docs == 60
    for name, inode in inodes.items():
        assert (out / name).stat().st_ino == inode  # neither sorted nor written again
    build_index(docs, tmp_path / "other", **OPTIONS)
    shards = [manifest_of(tmp_path / name)["shards"] for name in ("index", "other")]
    assert shards[0] == shards[1]
    store.open_store(out, verify="full")
    assert names_in(tmp_path) == ["index", "other"]


@pytest.mark.usefixtures("small_batches")
def test_resume_notices_other_documents(tmp_path: Path) -> None:
    docs = documents(OLD)
    partial_build(tmp_path / "index", docs, 40, labels=range(60))
    changed = [list(doc) for doc in docs]
    next(doc for doc in changed if doc)[0] += 1
    keep: dict[str, Any] = {"resume": True, "keep_partial": True, **OPTIONS}
    for arguments, text in (
        ({"docs": docs, "labels": range(1, 61)}, "its shard 0 has other content"),
        ({"docs": docs}, "its shard 0 has other content"),
        ({"docs": changed, "labels": range(60)}, "its shard 0 has other content"),
        ({"docs": docs, "labels": range(60), "shard_tokens": 50_000}, "has other content"),
        ({"docs": docs, "labels": range(60), "vocab_size": 401}, "vocab_size must be 400"),
        ({"docs": docs, "labels": range(60), "token_bits": 32}, "token_bytes must be 2"),
    ):
        with pytest.raises(ValueError, match=text):
            build_index(out=tmp_path / "index", **{**keep, **arguments})
    build_index(docs, tmp_path / "index", labels=range(60), **keep)
    assert names_in(tmp_path) == ["index"]


@pytest.mark.usefixtures("small_batches")
def test_resume_does_not_trust_a_shard_that_was_cut(tmp_path: Path) -> None:
    docs = documents(OLD)
    folder = partial_build(tmp_path / "index", docs, 50)
    os.truncate(folder / "suf.0", 5000)
    (folder / "1.done").write_bytes(b"{")
    build_index(docs, tmp_path / "index", resume=True, **OPTIONS)
    store.open_store(tmp_path / "index", verify="full")


def test_resume_without_anything_to_resume(tmp_path: Path) -> None:
    build(tmp_path / "index", OLD, resume=True)
    assert seed_of(tmp_path / "index") == OLD


# Ctrl-C


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Ctrl-C is an exception, also in a background job of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("phase", ["read", "sort"])
def test_interrupt(tmp_path: Path, phase: str) -> None:
    build(tmp_path / "index", OLD)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 400, 8_000_000)
    reached: list[int] = []

    def interrupt(now: str, done: int, total: int) -> None:
        if now == phase and not reached:
            reached.append(done)
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()

    def docs() -> Iterator[Any]:
        for part in np.split(tokens, 100):
            yield part
            if phase == "read":
                time.sleep(0.005)

    with pytest.raises(KeyboardInterrupt):
        build_index(docs(), tmp_path / "index", vocab_size=400, overwrite=True, progress=interrupt)
    assert reached
    assert names_in(tmp_path) == ["index"]
    assert seed_of(tmp_path / "index") == OLD


# No room


def refused_for_space(out: Path, seed: int, **options: Any) -> int | None:
    """errno of a build that fails, after checking what it left."""
    before = seed_of(out) if out.exists() else None
    try:
        build(out, seed, **options)
    except OSError as error:
        assert names_in(out.parent) == (["index"] if before else [])
        assert before is None or seed_of(out) == before
        return error.errno
    return None


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: every write or reservation may be the one that fails."""
    out = tmp_path / "index"
    build(out, OLD)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    codes = []
    try:
        for kib in (0, 1, 4, 5, 30, 60, 90, 120, 160, 200):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kib, hard))
            codes.append(refused_for_space(out, NEW))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert codes[0] is not None
    assert codes[-1] is None
    assert len(set(codes)) == 2
    assert seed_of(out) == NEW


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many KiB and returns its folder."""
    folder = tmp_path / "mount"
    folder.mkdir()
    mounted = []

    def make(kib: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "alignops", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"cannot mount a file system: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


def test_full_file_system(mount: Callable[[int], Path]) -> None:
    room = mount(6 * 1024)
    out = room / "index"
    build(out, OLD)
    assert refused_for_space(out, NEW) is None
    filler = room / "filler"
    codes = []
    for kib in (0, 100, 300, 600, 1000, 1500, 2000, 2500, 4000):
        status = os.statvfs(room)
        free = status.f_bavail * status.f_frsize
        filler.write_bytes(bytes(max(free - 1024 * kib, 0)))
        try:
            build(out, OLD)
            codes.append(None)
        except OSError as error:
            codes.append(error.errno)
            assert names_in(room) == ["filler", "index"]
            assert seed_of(out) == NEW
        filler.unlink()
    assert codes[0] is not None
    assert codes[-1] is None
    assert seed_of(out) == OLD


def test_room_is_checked_before_long_work(mount: Callable[[int], Path]) -> None:
    room = mount(1024)
    docs = flat_of([[1] * 500_000])
    with pytest.raises(OSError, match=r"the index needs \d+ bytes, the disk has \d+") as caught:
        build_index(docs, room / "index", vocab_size=2)
    assert caught.value.errno == 28
    assert names_in(room) == []


# Company


# Memory


def build_in(folder: str, memory: str, limit: str) -> None:
    """Build one document of 4 million tokens while the process may take `limit` MiB more."""
    Path(folder).mkdir(exist_ok=True)
    flat = np.random.default_rng(0).integers(0, 60, 4_000_000, np.uint8)
    flat[2_000_000:] = flat[:2_000_000]
    options: dict[str, Any] = {"vocab_size": 60, "fingerprint": "memory", "builder": "radix"}
    build_index([flat[:100_000]], Path(folder, "warm"), **options)  # starts what starts once
    with Path("/proc/self/status").open() as status:
        (data,) = (int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    most = data + (int(limit) << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    try:
        report = build_index([flat], Path(folder, "new"), mem_bytes=int(memory) << 20, **options)
        print(*report.builders, report.n_shards)
    except MemoryError:
        print("no memory")


def test_memory_that_the_system_refuses(tmp_path: Path) -> None:
    """A budget is kept where the kernel enforces little more; a budget that is not there fails."""
    assert in_process(build_in, str(tmp_path), "12", "40").split() == ["radix-stream", "1"]
    assert in_process(build_in, str(tmp_path / "b"), "1000", "24").split() == ["no", "memory"]
    assert names_in(tmp_path / "b") == ["warm"]
    assert in_process(build_in, str(tmp_path / "c"), "1000", "1000").split() == ["radix", "1"]
    for name in ("tok.0", "suf.0", "doc.0"):
        found = [(tmp_path / of / "new" / name).read_bytes()[4096:] for of in (".", "c")]
        assert found[0] == found[1], name


def test_readers_while_an_index_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "index"
    small: dict[str, Any] = {"vocab_size": 10, "overwrite": True}
    build_index([[1, 2, 3]] * 5, out, fingerprint="5", shard_tokens=9, **small)
    failures: list[BaseException] = []
    seen: set[int] = set()
    stop = threading.Event()

    def read() -> None:
        try:
            while not stop.is_set():
                opened, manifest = store.open_store(out)
                count = opened.documents
                assert str(count) == manifest.fingerprint
                assert opened.document_tokens(count - 1).tolist() == [1, 2, 3]
                opened.verify("full")
                seen.add(count)
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for i in range(20):
        count = 5 + i % 2
        build_index([[1, 2, 3]] * count, out, fingerprint=str(count), shard_tokens=9, **small)
    stop.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert seen == {5, 6}
    assert names_in(tmp_path) == ["index"]


def test_two_builders_of_one_output(tmp_path: Path) -> None:
    out = tmp_path / "index"

    def docs() -> Iterator[list[int]]:
        yield [1, 2]
        with pytest.raises(BlockingIOError, match=f"built by process {os.getpid()} on"):
            build_index([[3]], out, vocab_size=10)
        build_index([[3]], tmp_path / "other", vocab_size=10)
        yield [3]

    build_index(docs(), out, vocab_size=10)
    assert store.open_store(out)[0].documents == 2
    assert names_in(tmp_path) == ["index", "other"]


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "index"

    def docs() -> Iterator[list[int]]:
        yield [1, 2]
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")

    for overwrite in (False, True):
        with pytest.raises(FileExistsError):
            build_index(docs(), out, vocab_size=10, overwrite=overwrite)
        assert names_in(out) == ["thesis.tex"]
        (out / "thesis.tex").unlink()
        out.rmdir()
    assert names_in(tmp_path) == []


def hold_lock(out: Path, held: Any) -> None:
    with build_lock(out):
        held.set()
        time.sleep(60)


def test_locks_of_other_processes(tmp_path: Path) -> None:
    out = tmp_path / "index"
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=hold_lock, args=(out, held))
    process.start()
    try:
        assert held.wait(60)
        with pytest.raises(BlockingIOError, match=f"built by process {process.pid} on"):
            build_index([[1]], out, vocab_size=10)
        assert clean_stale(tmp_path) == []
    finally:
        process.kill()
        process.join()
    assert names_in(tmp_path) == ["index.lock"]  # its owner is dead
    build_index([[1]], out, vocab_size=10)
    assert names_in(tmp_path) == ["index"]


def test_locks_of_other_machines(tmp_path: Path) -> None:
    lock = tmp_path / "index.lock"
    lock.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with pytest.raises(BlockingIOError, match="built by process 1 on elsewhere"):
        build_index([[1]], tmp_path / "index", vocab_size=10)
    assert clean_stale(tmp_path) == []
    lock.write_text(json.dumps({"pid": 1, "host": socket.gethostname()}))
    assert clean_stale(tmp_path) == [lock]
    assert names_in(tmp_path) == []
