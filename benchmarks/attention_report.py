"""The attention core: the operator against PyTorch and the bandwidth of memory, the host's work in
a step, errors, and SmolLM2 with several workers.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks import (
    attention_accuracy,
    attention_cases,
    attention_figures,
    attention_host,
    attention_layouts,
    attention_models,
    attention_pools,
    roofline,
    shapes,
    timing,
)
from benchmarks.render import table
from benchmarks.report import Measurement, Report

MODEL = "QwQ-32B"
TOKENS = 16384  # of the bars against B2
B2_BARS = {"1 segment": 1.0, "headers": 1.0, "8 segments": 2.0, "64 segments": 4.0}
BANDWIDTH_BARS = {torch.float32: 0.65, torch.bfloat16: 0.5}
BANDWIDTH_TOKENS, BANDWIDTH_WORKERS = 8192, 4
GROWTH_BAR = 1.5  # time of four workers over that of one
PEER_BYTES = 1 << 31  # dense copies for each worker are left out beyond


@dataclasses.dataclass
class Attention(Measurement):
    """One call over `bytes` of distinct keys and values; `least_s` is the fastest turn."""

    bytes: int = 0
    least_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Row:
    """Cases that differ in the number of workers."""

    model: str
    tokens: int
    pattern: str
    dtype: torch.dtype
    workers: tuple[int, ...]
    peers: tuple[str, ...] = ("B1", "B2")
    all_threads: bool = True


class AttentionReport(Report):
    """Compares with what PyTorch can do on the same keys, and with the bandwidth of memory."""

    core = "attention"
    title = "Attention core: measured figures"
    method = """\
Medians of alternating turns in one process, all contestants checked to compute the same before.
Keys and values rotate over as many layers as make 256 MiB, so that none is in a cache. One new
token per worker. `floor / median` compares with the bytes of the distinct keys and values that
somebody sees, at the bandwidth measured in the same run; shares of the bandwidth are taken against
a read that alternates with the contestants.

B0: each worker rotates the keys of all blocks, concatenates, and calls SDPA. B1: dense copies for
each worker, rotated before; the heads of a group folded into the query axis of SDPA. B2: one call
of the flash operator per segment, the queries of all workers that see it folded into the query
axis, and a merge by logsumexp; queries are rotated before, which is not counted but in "B2 with
rotations". "B2 by matmul": two products and a softmax instead of that operator; in 16 bits its
scores are rounded to them. Ours rotates queries in the call that is timed.

Layouts: "1 segment" is a history of one segment and the workers' own steps, seen by themselves;
"headers" the combined layout with a history of one segment; "8 segments" and "64 segments" the same
with so many spliced paragraphs."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.roofs = {t: roofline.read_bandwidth(t) for t in self.threads}
        self.patterns = {t: roofline.best_pattern(t) for t in self.threads}

    def limits(self) -> dict[int, dict[str, Any]]:
        return {t: {"read_GBps": value / 1e9} for t, value in self.roofs.items()}

    @staticmethod
    def limits_table(limits: dict[str, Any]) -> str:
        rows = [[threads, f"{entry['read_GBps']:.1f}"] for threads, entry in limits.items()]
        return table(["threads", "read GB/s"], rows)

    def time(
        self, case: str, runners: Sequence[timing.Runner], threads: int, turn: float = 0.05
    ) -> dict[str, float]:
        """Alternates the runners and records them; returns seconds by name."""
        torch.set_num_threads(threads)
        found = timing.turns(runners, self.rounds, turn)
        for runner in runners:
            samples = found[runner.name]
            entry = Attention(case, runner.name, statistics.median(samples), threads)
            entry.least_s = min(samples)
            if runner.weight_bytes:
                entry.bytes = runner.weight_bytes
                entry.floor_s = entry.bytes / self.roofs[threads]
            self.record(entry)
        return {name: statistics.median(samples) for name, samples in found.items()}

    def add(self, case: str, seconds: dict[str, float], threads: int) -> None:
        """Records what contestants took."""
        for name, value in seconds.items():
            self.record(Attention(case, name, value, threads))

    def read(self, threads: int) -> timing.Runner:
        return roofline.read_runner(threads, self.patterns[threads])

    plot = staticmethod(attention_figures.plot)
    readme = staticmethod(attention_figures.readme)


def rows(quick: bool) -> list[Row]:
    """What is measured: the cases of the bars, then other lengths, models and thread counts."""
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    if quick:
        return [
            Row(MODEL, TOKENS, "1 segment", bf16, (1, 4)),
            Row(MODEL, TOKENS, "64 segments", f32, (1, 4)),
            Row("Qwen2.5-0.5B", 1024, "headers", f32, (1, 4), ("B0", "B1", "B2", "B2 by matmul")),
        ]
    every = ("B0", "B1", "B2", "B2 with rotations", "B2 by matmul")
    found = [
        Row(MODEL, TOKENS, pattern, dtype, (1, 2, 4), every[1:])
        for dtype in (f32, bf16)
        for pattern in B2_BARS
    ]
    found.append(Row(MODEL, TOKENS, "headers", f16, (1, 4)))
    found += [Row(MODEL, n, "headers", bf16, (1, 2, 4, 8)) for n in (300, 1024, 4096, 65536)]
    found.append(Row("Qwen2.5-0.5B", 4096, "headers", bf16, (1, 4), every))
    found += [Row(MODEL, n, "headers", f32, (1, 4)) for n in (300, 65536)]
    for model in ("LLaMA-3-8B", "Qwen2.5-0.5B"):
        found += [Row(model, TOKENS, "headers", dtype, (1, 4)) for dtype in (f32, bf16)]
    found.append(Row("Qwen2.5-0.5B", 300, "headers", bf16, (1, 4)))
    for dtype in (f32, bf16):
        found.append(Row(MODEL, TOKENS, "headers", dtype, (1, 4), ("B2",), all_threads=False))
    return found


def operator(report: AttentionReport) -> Iterator[str]:
    """The operator on all threads, and some cases on one."""
    for row in rows(report.quick):
        threads = report.threads[-1 if row.all_threads else 0]
        torch.set_num_threads(threads)
        kept: dict[int, timing.Runner] = {}
        for workers in row.workers:
            layout = attention_layouts.make(row.pattern, row.tokens, workers)
            case = attention_cases.make(shapes.ATTENTION[row.model], layout, row.dtype)
            name = f"{case}, {threads} thread{'s' * (threads > 1)}"
            yield name
            ours = attention_pools.ours(case)
            kept[workers] = attention_cases.runner(case, f"alignops W={workers}", ours)
            _against_peers(report, row, case, name, threads, ours)
        if {1, 4} <= kept.keys():
            name = name.rsplit(", W=", 1)[0] + f", {threads} thread{'s' * (threads > 1)}"
            yield f"{name}, workers"
            seconds = report.time(f"{name}, workers", [kept[1], kept[4]], threads)
            one, four = seconds.values()
            report.bar(
                "time of 4 workers over that of one", name, four / one, GROWTH_BAR, "x",
                at_most=True,
            )  # fmt: skip


def _against_peers(
    report: AttentionReport,
    row: Row,
    case: attention_cases.Case,
    name: str,
    threads: int,
    ours: attention_cases.Contestant,
) -> None:
    peers = row.peers if case.bytes * case.layout.workers <= PEER_BYTES else ("B2",)
    contestants = {"alignops": ours, **{p: attention_cases.PEERS[p](case) for p in peers}}
    attention_cases.check(case, contestants)
    runners = [attention_cases.runner(case, who, c) for who, c in contestants.items()]
    seconds = report.time(name, [*runners, report.read(threads)], threads)

    workers, everywhere = case.layout.workers, threads == report.threads[-1]
    for peer in peers:
        bar = None
        if peer == "B2" and everywhere and case.dtype in BANDWIDTH_BARS and workers <= 4:
            bar = B2_BARS[row.pattern] if row.tokens == TOKENS else None
        what = f"against {peer}, {row.pattern}"
        report.bar(what, name, seconds[peer] / seconds["alignops"], bar, "x")
    read = roofline.BUFFER_BYTES / seconds["read"]
    report.bar(
        f"what the bandwidth allows against B2, {row.pattern}",
        name,
        seconds["B2"] * read / case.bytes,
        None,
        "x",
    )
    large = row.tokens >= BANDWIDTH_TOKENS and workers <= BANDWIDTH_WORKERS and everywhere
    report.bar(
        f"share of the read bandwidth, {str(case.dtype).removeprefix('torch.')}",
        name,
        case.bytes / seconds["alignops"] / read,
        BANDWIDTH_BARS.get(case.dtype) if large else None,
        "",
    )


AttentionReport.sections = {
    "operator": operator,
    "host": attention_host.section,
    "accuracy": attention_accuracy.section,
    "model": attention_models.section,
}
REPORT = AttentionReport
