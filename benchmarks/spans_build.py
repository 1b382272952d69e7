"""Builds one index in a process of its own and prints what it took, as JSON.

    python -m benchmarks.spans_build infini-gram --text FILE --out FOLDER --threads 2

The input, uint16 tokens with a separator behind each document, is brought into the form that the
contestant reads before the clock starts. Memory is the peak of the resident set over what the
process had before it read the text. Of infini-gram, which works through programs of its own, it is
the peak of the largest of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import corpus


@dataclasses.dataclass
class Built:
    """What one build took; `cpu_seconds` are of all threads and programs."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


Prepare = Callable[[Path, Path, int], Callable[[], None]]


def _alignops(builder: str) -> Prepare:
    def prepare(text: Path, out: Path, threads: int) -> Callable[[], None]:
        import torch

        from alignops import spans

        torch.set_num_threads(threads)
        tokens = np.fromfile(text, np.uint16)
        ends = np.flatnonzero(tokens == corpus.SEPARATOR)
        offsets = np.concatenate([[0], ends - np.arange(len(ends))])
        documents = (tokens[tokens != corpus.SEPARATOR], offsets)
        del tokens

        def run() -> None:
            spans.build_index(
                documents,
                out,
                vocab_size=corpus.VOCABULARY,
                builder=builder,
                fingerprint="SmolLM2",
            )

        return run

    return prepare


def _infini_gram(text: Path, out: Path, threads: int) -> Callable[[], None]:
    # A document follows its separator there, so the last separator moves to the front.
    tokens = np.roll(np.fromfile(text, np.uint16), 1)
    out.mkdir(parents=True)
    tokens.tofile(out / "tokenized.0")
    (2 * np.flatnonzero(tokens == corpus.SEPARATOR)).astype(np.uint64).tofile(out / "offset.0")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    command = [sys.executable, "-m", "infini_gram.indexing", "--token_dtype", "u16"]
    command += ["--data_dir", str(out), "--save_dir", str(out), "--mem", "8"]
    command += ["--cpus", str(threads), "--ulimit", str(files)]

    def run() -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not (out / "table.0").exists():
            raise RuntimeError(f"infini_gram.indexing failed:\n{done.stdout}{done.stderr}")

    return run


def _tokengrams(text: Path, out: Path, threads: int) -> Callable[[], None]:
    from tokengrams import MemmapIndex

    out.mkdir(parents=True)
    target = str(out / "index")
    return lambda: MemmapIndex.build(str(text), target, vocab=1 << 16)


def _divsufsort(text: Path, out: Path, threads: int) -> Callable[[], None]:
    from pydivsufsort import divsufsort

    tokens = np.fromfile(text, np.uint16)
    return lambda: divsufsort(tokens)


# What prepares a build, and the module that it needs.
CONTESTANTS: dict[str, tuple[Prepare, str]] = {
    "alignops sais": (_alignops("sais"), "alignops.spans"),
    "alignops radix": (_alignops("radix"), "alignops.spans"),
    "infini-gram": (_infini_gram, "infini_gram"),
    "tokengrams": (_tokengrams, "tokengrams"),
    "divsufsort": (_divsufsort, "pydivsufsort"),
}


def installed(name: str) -> bool:
    return importlib.util.find_spec(CONTESTANTS[name][1].partition(".")[0]) is not None


def _cpu_seconds() -> float:
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(name: str, text: Path, out: Path, threads: int) -> Built:
    """Builds in this process."""
    prepare, module = CONTESTANTS[name]
    importlib.import_module(module)
    before = _resident("VmRSS")
    run = prepare(text, out, threads)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    cpu, start = _cpu_seconds(), time.perf_counter()
    run()
    seconds, cpu = time.perf_counter() - start, _cpu_seconds() - cpu
    peak = _resident("VmHWM") - before
    if name == "infini-gram":
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return Built(seconds, cpu, peak)


def build(name: str, text: Path, out: Path, threads: int) -> Built:
    """Builds in a new process.

    Raises:
        RuntimeError: the build failed; the text has what it wrote.
    """
    command = [sys.executable, "-m", "benchmarks.spans_build", name, "--text", str(text)]
    done = subprocess.run(
        [*command, "--out", str(out), "--threads", str(threads)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    return Built(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.spans_build", description=__doc__)
    parser.add_argument("name", choices=sorted(CONTESTANTS))
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    built = measure(options.name, options.text, options.out, options.threads)
    print(json.dumps(dataclasses.asdict(built)))


if __name__ == "__main__":
    main()
