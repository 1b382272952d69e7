"""Times the ternary core on a GPU: against torch, and as shares of what the hardware allows.

    python -m benchmarks.bench_ternary_cuda [--out FOLDER] [--seconds N]

Weights rotate through copies of 512 MiB in total, several times any L2 cache; one pass over the
copies is one CUDA graph, so launches cost what they cost in a captured decode loop. Times are
medians between CUDA events; `eager` is the same pass launched from Python. The floor is the larger
of bytes / bandwidth and operations / rate, both measured here: bandwidth by a copy between buffers
(bytes read and written), rate by a large bfloat16 product of random numbers.

Writes <out>/<device>-<date>.json and prints a table. Does nothing without a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import alignops
from benchmarks.shapes import MATRICES, MODELS

RING_BYTES = 512 << 20
FEW = (1, 2, 4, 8)
MANY = (16, 32, 64, 128, 512, 2048)
BOTH = 64  # up to here the C++ kernel for few tokens is timed beside Triton's
LAYOUT = 3
_op = torch.ops.alignops


@dataclasses.dataclass
class Limits:
    """Measured rates of this GPU: bytes/s moved, multiply-adds/s of dense bfloat16 products."""

    bandwidth: float
    macs: float

    def floor(self, moved: float, macs: float = 0) -> float:
        """Seconds that `moved` bytes and `macs` multiply-adds take at least."""
        return max(moved / self.bandwidth, macs / self.macs)


def median_seconds(run: Callable[[], object], seconds: float = 0.15) -> float:
    """Median time of `run` between CUDA events, warmed up."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    begin, samples = time.perf_counter(), []
    while len(samples) < 5 or time.perf_counter() - begin < seconds:
        start.record()
        run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(samples)


def graph_of(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a CUDA graph."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def per_call(calls: list[Callable[[], object]]) -> tuple[float, float]:
    """Seconds of one of `calls`, run in turn: in a graph, and eagerly."""

    def ring() -> None:
        for call in calls:
            call()

    eager = median_seconds(ring, 0.05) / len(calls)
    return median_seconds(graph_of(ring)) / len(calls), eager


def limits() -> Limits:
    """Rates of this GPU."""
    a, b = (torch.empty(1 << 31, dtype=torch.uint8, device="cuda") for _ in range(2))
    bandwidth = 2 * a.numel() / median_seconds(lambda: b.copy_(a))
    x, y = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return Limits(bandwidth, 8192**3 / median_seconds(lambda: x @ y))


def ring_length(weight_bytes: int) -> int:
    """Copies of a weight in the ring."""
    return max(2, min(256, -(-RING_BYTES // weight_bytes)))


def packed_ring(n: int, k: int, group: int) -> list[tuple[Tensor, Tensor]]:
    """Random packed weights with their scales; every byte is a valid code."""
    tile_bytes = 640 * -(-n // 32) * -(-k // 128)
    return [
        (
            torch.randint(0, 256, (tile_bytes,), dtype=torch.uint8, device="cuda"),
            F.pad(torch.rand(k // group, n, device="cuda") * 0.02, (0, -n % 64)),
        )
        for _ in range(ring_length(tile_bytes))
    ]


class Report:
    """Collects results; `add` computes floor and ratio."""

    def __init__(self, rates: Limits) -> None:
        self.rates = rates
        self.rows: list[dict[str, Any]] = []

    def add(
        self,
        what: str,
        shape: str,
        m: int,
        times: tuple[float, float],
        moved: float,
        macs: float = 0,
        against: float | None = None,
    ) -> float:
        """One result; `against` is the time of torch's bfloat16 product."""
        seconds, eager = times
        floor = self.rates.floor(moved, macs)
        row = {
            "what": what,
            "shape": shape,
            "m": m,
            "seconds": seconds,
            "eager_seconds": eager,
            "bytes": moved,
            "floor_seconds": floor,
            "ratio": floor / seconds,
            "bytes_per_second": moved / seconds,
        }
        if against is not None:
            row["speedup"] = against / seconds
        self.rows.append(row)
        return seconds

    def table(self) -> str:
        """The results as text."""
        lines = [
            f"{'what':<30} {'shape':<12} {'m':>5} {'us':>9} {'eager':>8} {'ratio':>6} {'x bf16':>7}"
        ]
        for row in self.rows:
            lines.append(
                f"{row['what']:<30} {row['shape']:<12} {row['m']:>5} {row['seconds'] * 1e6:>9.2f} "
                f"{row['eager_seconds'] * 1e6:>8.2f} {row['ratio']:>6.2f} "
                + (f"{row['speedup']:>7.2f}" if "speedup" in row else "")
            )
        return "\n".join(lines)


def bench_matrix(report: Report, n: int, k: int, tokens: tuple[int, ...]) -> None:
    """One matrix: torch bfloat16, then ours in modes none and a8, and none with groups of 128."""
    shape, weights = f"{n}x{k}", n * k * 5 / 32
    dense = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(ring_length(2 * n * k))]
    rings = {group: packed_ring(n, k, group) for group in (k, 128)}
    for m in tokens:
        x = torch.randn(m, k, device="cuda").bfloat16()
        io = 2 * m * (n + k)
        base = per_call([partial(F.linear, x, w) for w in dense])
        against = report.add("torch bf16", shape, m, base, 2 * n * k + io, m * n * k)
        kernels = {"": _op.ternary_linear if m <= 8 else _op.ternary_linear_triton}
        if 8 < m <= BOTH:
            kernels[" (C++)"] = _op.ternary_linear
        for (act, group), (note, linear) in itertools.product(
            ((0, k), (1, k), (0, 128)), kernels.items()
        ):
            calls = [
                partial(linear, x, p, s, None, n, k, group, 1, act, LAYOUT) for p, s in rings[group]
            ]
            label = f"{'none' if act == 0 else 'a8'}{'' if group == k else ', groups of 128'}{note}"
            moved = weights + io + 4 * n * (k // group)
            report.add(f"ternary {label}", shape, m, per_call(calls), moved, m * n * k, against)


def bench_head(report: Report, n: int, k: int) -> None:
    """The int8 head, one token."""
    x = torch.randn(1, k, device="cuda").bfloat16()
    dense = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(2)]
    against = report.add(
        "torch bf16",
        f"{n}x{k}",
        1,
        per_call([partial(F.linear, x, w) for w in dense]),
        2 * n * k,
    )
    heads = [_op.ternary_int8_quantize(w) for w in dense]
    for act, name in ((0, "none"), (1, "a8")):
        calls = [partial(_op.ternary_int8_linear, x, q, s, None, act) for q, s in heads]
        report.add(f"int8 head {name}", f"{n}x{k}", 1, per_call(calls), n * k, 0, against)


def bench_weights(report: Report) -> None:
    """Quantization, packing and fake quantization of a 8192 x 4096 bfloat16 weight."""
    n, k = 8192, 4096
    w = torch.randn(n, k, device="cuda").bfloat16()
    lam = torch.tensor(0.5, device="cuda")
    idx, sign, _ = _op.ternary_quantize(w, k, 1)

    def both(run: Callable[[], object]) -> tuple[float, float]:
        seconds = median_seconds(run)
        return seconds, seconds

    size = 2 * n * k
    report.add("quantize", f"{n}x{k}", 0, both(lambda: _op.ternary_quantize(w, k, 1)), size * 1.08)
    pack = both(lambda: _op.ternary_prepack(idx, sign, k, LAYOUT))
    report.add("prepack", f"{n}x{k}", 0, pack, n * k * 10 / 32)
    naive = median_seconds(lambda: _topk_fake_quant(w, lam))
    run = both(lambda: _op.ternary_fake_quant(w, lam, k, 1, torch.bfloat16))
    report.add("fake quant (x top-k)", f"{n}x{k}", 0, run, 2 * size, 0, naive)


def _topk_fake_quant(w: Tensor, lam: Tensor) -> Tensor:
    """Fake quantization as usually written: top-k masks."""
    blocks = w.float().unflatten(1, (-1, 4))
    keep = torch.zeros_like(blocks).scatter_(-1, blocks.abs().topk(3, -1).indices, 1)
    scale = (blocks.abs() * keep).sum((1, 2), keepdim=True) / keep.sum((1, 2), keepdim=True)
    return (scale * blocks.sign() * keep + lam * blocks).flatten(1).to(w.dtype)


def bench_decode(report: Report, name: str) -> None:
    """All products of one decode step: every layer's own weights, then the int8 head."""
    model = MODELS[name]
    shapes = [(n, k) for _ in range(model.layers) for _, n, k in model.linears]
    packed = [
        (
            torch.randint(
                0, 256, (640 * -(-n // 32) * -(-k // 128),), dtype=torch.uint8, device="cuda"
            ),
            n,
            k,
        )
        for n, k in shapes
    ]
    xs = {k: torch.randn(1, k, device="cuda").bfloat16() for k in {k for _, k in shapes}}
    scales = {n: torch.rand(1, -(-n // 64) * 64, device="cuda") for n in {n for n, _ in shapes}}
    rows, columns = model.head
    q = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device="cuda")
    head_scale = torch.rand(rows, device="cuda")

    def step() -> None:
        for p, n, k in packed:
            _op.ternary_linear(xs[k], p, scales[n], None, n, k, k, 1, 0, LAYOUT)
        _op.ternary_int8_linear(xs[columns], q, head_scale, None, 0)

    moved = model.linear_weights * 5 / 32 + rows * columns
    report.add("decode step", name, 1, per_call([step]), moved)


def environment() -> dict[str, Any]:
    """Device and versions."""
    p = torch.cuda.get_device_properties(0)
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    try:
        smi = subprocess.check_output(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], text=True
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        smi = ""
    return {
        "device": p.name,
        "multiprocessors": p.multi_processor_count,
        "l2_bytes": p.L2_cache_size,
        "torch": torch.__version__,
        "alignops": alignops.__version__,
        "python": platform.python_version(),
        query: smi,
    }


def main() -> None:
    """Run everything that the time allows, most important first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seconds", type=float, default=150, help="stop after about this long")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing to measure")
        return
    torch.manual_seed(0)
    begin = time.perf_counter()
    rates = limits()
    report = Report(rates)
    jobs: list[Callable[[], None]] = [
        *(partial(bench_matrix, report, n, k, FEW) for n, k in (*MATRICES, (28672, 8192))),
        *(partial(bench_decode, report, name) for name in ("LLaMA-3.2-1B", "LLaMA-3-8B")),
        partial(bench_head, report, 128256, 2048),
        partial(bench_weights, report),
        *(partial(bench_matrix, report, n, k, MANY) for n, k in ((8192, 2048), (14336, 4096))),
    ]
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    device = torch.cuda.get_device_name().lower().replace(" ", "-")
    path = options.out / f"{device}-{today}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    result = {
        "date": today,
        **environment(),
        "bandwidth_bytes_per_second": rates.bandwidth,
        "bf16_macs_per_second": rates.macs,
        "jobs_skipped_for_time": 0,
        "results": report.rows,
    }
    for job in jobs:
        if time.perf_counter() - begin > options.seconds:
            result["jobs_skipped_for_time"] += 1
        else:
            job()
            torch.cuda.empty_cache()
        path.write_text(json.dumps(result, indent=1))
    print(report.table())
    print(
        f"copy {rates.bandwidth / 1e12:.2f} TB/s, bf16 {2 * rates.macs / 1e12:.0f} TFLOP/s, "
        f"{result['jobs_skipped_for_time']} jobs skipped, {path}"
    )


if __name__ == "__main__":
    main()
