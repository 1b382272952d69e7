"""What this machine can do at best, measured: read bandwidth, instruction rates, memory latency.

    python -m benchmarks.roofline

Bandwidth is the best median over a few access patterns of plain vector loads from a buffer of 512
MiB (no copy, no store), in the same kind of memory the weights live in (`torch.empty`). Rates are
of one core, registers only. Latency is that of dependent reads of random cache lines.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import platform
import statistics
from pathlib import Path

import numpy as np
import torch

from benchmarks import native
from benchmarks.timing import Runner

BUFFER_BYTES = 512 << 20
PATTERNS = (1, 2, 4, 8)  # cursors per thread
CHAINS = (1, 4, 16, 32)  # independent chains of dependent reads on one thread
LINE_BYTES = 64
MACS_PER_DOT = {"vpdpbusd": 64, "vpmaddubsw": 32}


def cpu_name() -> str:
    """Model name of the CPU with its family and stepping, as the kernel reports them."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    except OSError:
        return platform.processor() or platform.machine()
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def cpu_flags() -> set[str]:
    """Instruction set flags of the first CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    for line in text.splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Measured limits of this machine with `threads` threads; rates are of all threads together."""

    threads: int
    bandwidth: float  # bytes/s, reading
    rates: dict[str, float]  # instructions/s by mnemonic

    def floor(self, bytes_moved: float, lookups: float = 0.0, macs: float = 0.0) -> float:
        """Seconds below which no implementation of this traffic and work can go on this machine."""
        times = [bytes_moved / self.bandwidth]
        if lookups:
            key = "vpermw" if "vpermw" in self.rates else "vpshufb"
            per_instruction = 32 if key == "vpermw" else 16
            if key in self.rates:
                times.append(lookups / per_instruction / self.rates[key])
        if macs:
            key = "vpdpbusd" if "vpdpbusd" in self.rates else "vpmaddubsw"
            if key in self.rates:
                times.append(macs / MACS_PER_DOT[key] / self.rates[key])
        return max(times)


@functools.cache
def _buffer() -> torch.Tensor:
    return torch.empty(BUFFER_BYTES, dtype=torch.uint8).fill_(1)


def read_runner(threads: int, streams: int) -> Runner:
    """One pass of reading the buffer as a contestant, so that shares are of the same minute."""
    probe, seconds = native.load("probe").probe_read, np.zeros(1)

    def run() -> None:
        probe(
            ctypes.c_void_p(_buffer().data_ptr()),
            ctypes.c_size_t(BUFFER_BYTES),
            ctypes.c_int(threads),
            ctypes.c_int(streams),
            ctypes.c_int(1),
            ctypes.c_void_p(seconds.ctypes.data),
        )

    return Runner("read", run, 1, BUFFER_BYTES)


def read_bandwidth(threads: int, repeats: int = 7) -> float:
    """Bytes per second that `threads` threads read from memory: the best pattern's median pass."""
    return max(_bandwidth(threads, streams, repeats) for streams in PATTERNS)


def best_pattern(threads: int) -> int:
    """Number of cursors per thread that reads fastest."""
    return max(PATTERNS, key=lambda streams: _bandwidth(threads, streams, 5))


def _bandwidth(threads: int, streams: int, repeats: int) -> float:
    runner = read_runner(threads, streams)
    return BUFFER_BYTES / statistics.median(runner.seconds(1) for _ in range(repeats))


@functools.cache
def instruction_rates(seconds: float = 0.1) -> dict[str, float]:
    """Instructions per second of one core, for those this CPU has.

    `t5w_*` is the register-only instruction mix of the AVX-512 lookup (3 permutes, 2 shifts or
    multiplications, 3 adds), counted in permutes.
    """
    flags = cpu_flags()
    wanted = []
    if {"avx512bw", "avx512vl", "avx512_vnni"} <= flags:
        wanted += ["vpermw", "t5w_shift", "t5w_multiply", "vpdpbusd", "fma512"]
    if {"avx2", "fma"} <= flags:
        wanted += ["vpshufb", "vpmaddubsw", "fma256"]
    library = native.load("probe") if wanted else None
    rates = {}
    for name in wanted:
        probe = getattr(library, f"probe_{name}")
        probe.restype, probe.argtypes = ctypes.c_double, [ctypes.c_double]
        rates[name] = max(probe(seconds) for _ in range(3))
    return rates


def random_reads(nbytes: int, repeats: int = 5, steps: int = 100_000) -> dict[int, float]:
    """Seconds per read of a random cache line among `nbytes`, by the chains that one thread has.

    The next line of a chain is known only when the last one has arrived; so one chain shows the
    latency (with the misses of the address translation), and k chains what k searches in flight
    can reach.
    """
    count = nbytes // LINE_BYTES
    rng = np.random.default_rng(0)
    order = rng.permutation(count).astype(np.uint32)
    lines = np.zeros((count, LINE_BYTES // 4), np.uint32)
    lines[order, 0] = np.roll(order, -1)
    probe = native.load("probe").probe_chase
    probe.restype = ctypes.c_double
    found = {}
    for chains in CHAINS:
        cursors = np.ascontiguousarray(rng.choice(order, chains))
        times = [
            probe(
                ctypes.c_void_p(lines.ctypes.data),
                ctypes.c_void_p(cursors.ctypes.data),
                ctypes.c_int(chains),
                ctypes.c_int64(steps // chains),
            )
            for _ in range(repeats)
        ]
        found[chains] = statistics.median(times) / (steps // chains * chains)
    return found


def measure(threads: int) -> Roofline:
    """Measures bandwidth and rates now."""
    rates = {name: threads * rate for name, rate in instruction_rates().items()}
    return Roofline(threads, read_bandwidth(threads), rates)


def main() -> None:
    print(cpu_name())
    for name, rate in instruction_rates().items():
        print(f"{name:12s} {rate / 1e9:6.2f} G/s on one core")
    for threads in sorted({1, torch.get_num_threads()}):
        print(f"read         {read_bandwidth(threads) / 1e9:6.1f} GB/s with {threads} thread(s)")
    for chains, seconds in random_reads(BUFFER_BYTES).items():
        print(f"random read  {seconds * 1e9:6.1f} ns with {chains} chain(s) on one thread")


if __name__ == "__main__":
    main()
