"""The ternary core: matrix products, training operator and SmolLM2 against peers and floors."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from alignops import ternary, testing
from benchmarks import classic, contestants, peers, roofline, shapes, ternary_figures, timing
from benchmarks.render import table
from benchmarks.report import Measurement, Report
from benchmarks.timing import Runner


@dataclasses.dataclass
class Product(Measurement):
    """A product of m tokens with one matrix of `weight_bytes`."""

    m: int = 1
    shape: tuple[int, int] | None = None
    cold: bool | None = None
    weight_bytes: int = 0


class TernaryReport(Report):
    """Compares with the roofline of bandwidth and instruction rates."""

    core = "ternary"
    title = "Ternary core: measured figures"
    method = """\
Medians of alternating turns in one process. *Cold*: a pass visits more than 256 MiB of distinct
copies of the weight. *Hot*: one weight, again and again. llama.cpp computes a whole pass in one
graph; alignops and torch are called from Python once per product. `floor / median` compares with
the larger of traffic over measured read bandwidth and work over measured instruction rate."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.roofs = {t: roofline.measure(t) for t in self.threads}
        self.patterns = {t: roofline.best_pattern(t) for t in self.threads}

    def limits(self) -> dict[int, dict[str, Any]]:
        return {
            t: {
                "read_GBps": v.bandwidth / 1e9,
                "rates_Gps": {k: r / 1e9 for k, r in v.rates.items()},
            }
            for t, v in self.roofs.items()
        }

    @staticmethod
    def limits_table(limits: dict[str, Any]) -> str:
        rows = [
            [
                threads,
                f"{entry['read_GBps']:.1f}",
                ", ".join(f"{name} {rate:.2f}" for name, rate in entry["rates_Gps"].items()),
            ]
            for threads, entry in limits.items()
        ]
        return table(["threads", "read GB/s", "instructions, G/s"], rows)

    def time(
        self, case: str, runners: list[Runner], threads: int, **fields: Any
    ) -> dict[str, float]:
        """Alternates the runners and records them; returns seconds by name."""
        torch.set_num_threads(threads)
        many = fields.get("m", 1) != 1  # passes of many tokens are long
        seconds = timing.alternate(runners, min(self.rounds, 5) if many else self.rounds)
        for runner in runners:
            entry = Product(case, runner.name, seconds[runner.name], threads, **fields)
            entry.weight_bytes = runner.weight_bytes
            self._floor(entry)
            self.record(entry)
        return seconds

    def _floor(self, entry: Product) -> None:
        if entry.shape is None or not entry.name.startswith("alignops"):
            return
        n, k = entry.shape
        traffic = entry.weight_bytes if entry.cold else 0.0
        work = entry.m * n * k
        limits = self.roofs[entry.threads]
        # Few tokens go through table lookups (4 weights each), many through dot products.
        entry.floor_s = (
            limits.floor(traffic, lookups=work / 4)
            if entry.m <= 4
            else limits.floor(traffic, macs=work)
        )

    def on_all_cores(self, threads: int, bar: float) -> float | None:
        """Bandwidth is a matter of all cores together; with fewer the share is only shown."""
        return bar if threads == self.threads[-1] else None

    def read(self, threads: int) -> Runner:
        return roofline.read_runner(threads, self.patterns[threads])

    plot = staticmethod(ternary_figures.plot)
    readme = staticmethod(ternary_figures.readme)


def _peers(
    report: TernaryReport,
    weight: torch.Tensor,
    m: int,
    threads: int,
    cold: bool,
    kinds: tuple[tuple[str, bool], ...],
) -> list[peers.GgmlLinear]:
    if peers.ggml() is None:
        report.missing("llama-cpp-python")
        return []
    return [peers.llama_cpp(weight, kind, m, threads, cold, repack) for kind, repack in kinds]


PACKED_KINDS = (("TQ1_0", False), ("TQ2_0", False), ("Q4_0", True))
ALL_KINDS = (*PACKED_KINDS, ("Q4_0", False))


def gemv(report: TernaryReport) -> Iterator[str]:
    """M = 1, cold and hot, every matrix, every thread count."""
    matrices = shapes.MATRICES[:1] if report.quick else shapes.MATRICES
    for n, k in matrices:
        weight = contestants.random_weight(n, k)
        for cold in (True, False):
            if not cold and (n, k) not in shapes.MATRICES[:2]:
                continue
            for threads in report.threads:
                torch.set_num_threads(threads)
                state = "cold" if cold else "hot"
                case = f"{n}x{k}, M=1, {state}, {threads} thread{'s' * (threads > 1)}"
                yield case
                others = _peers(report, weight, 1, threads, cold, ALL_KINDS)
                runners = [
                    contestants.linear(n, k, 1, cold),
                    contestants.linear(n, k, 1, cold, act="none"),
                    peers.torch_bf16(weight, 1, cold),
                    peers.torch_int8(weight, 1, cold),
                    *(other.runner() for other in others),
                ]
                if cold:
                    runners.append(report.read(threads))
                s = report.time(case, runners, threads, shape=(n, k), cold=cold)
                _gemv_bars(report, case, s, runners, threads, cold)
                for other in others:
                    other.close()


def _gemv_bars(
    report: TernaryReport,
    case: str,
    s: dict[str, float],
    runners: list[Runner],
    threads: int,
    cold: bool,
) -> None:
    ours = s["alignops a8g"]
    if cold:
        bandwidth = roofline.BUFFER_BYTES / s["read"]
        share = runners[0].weight_bytes / ours / bandwidth
        note = f"reading {bandwidth / 1e9:.1f} GB/s"
        bar = report.on_all_cores(threads, 0.75)
        report.bar("weight bytes / read bandwidth", case, share, bar, "of bandwidth", note)
        report.bar("against torch bf16", case, s["torch bf16"] / ours, 12, "x")
    elif (
        threads == 1 and "vpermw" in report.roofs[1].rates and "avx512" in testing.available_isas()
    ):
        n, k = (int(v) for v in case.split(",")[0].split("x"))
        rate = n * k / ours
        report.bar("one core, hot", case, rate / 1e9, 120, "Gweight/s")
        limit = report.roofs[1].rates
        mix = max(limit["t5w_shift"], limit["t5w_multiply"])
        note = f"{rate / (128 * mix):.0%} of the rate of lookups with their shifts and sums"
        report.bar(
            "of the core's vpermw rate", case, rate / (128 * limit["vpermw"]), 0.85, "", note
        )
    for kind in ("TQ1_0", "TQ2_0"):
        if f"llama.cpp {kind}" in s:
            value = s[f"llama.cpp {kind}"] / ours
            report.bar(f"against llama.cpp {kind}", case, value, 2 if cold else 2.5, "x")
    report.bar("none (lossless) against a8g", case, ours / s["alignops none"], 0.5, "x")


def _best_isa() -> str:
    return testing.available_isas()[-1]


def avx2(report: TernaryReport) -> Iterator[str]:
    """The AVX2 kernel against the usual lookup form, hot, one thread."""
    if "avx2" not in testing.available_isas():
        report.absent.append("AVX2")
        return
    for n, k in shapes.MATRICES[:1] if report.quick else shapes.MATRICES[:3]:
        case = f"{n}x{k}, M=1, hot, 1 thread, AVX2"
        yield case
        torch.set_num_threads(1)
        weight = contestants.random_weight(n, k)
        with testing.use_isa("avx2"):
            packed = ternary.quantize(weight)
            usual = classic.ClassicLookup(packed.idx, packed.sign, packed.scale)
            ours = contestants.linear(n, k, 1, cold=False, dtype=torch.float32)
            s = report.time(
                case, [ours, usual.runner(1), usual.runner(2)], 1, shape=(n, k), cold=False
            )
        best = min(value for name, value in s.items() if name.startswith("classic"))
        note = f"{n * k / s[ours.name] / 1e9:.0f} against {n * k / best / 1e9:.0f} Gweight/s"
        report.bar("AVX2 against unpack-then-lookup", case, best / s[ours.name], 1.4, "x", note)


def batch(report: TernaryReport) -> Iterator[str]:
    """M = 8, cold: a small batch, or speculative decoding."""
    for n, k in shapes.MATRICES[:1] if report.quick else shapes.MATRICES[:2]:
        weight = contestants.random_weight(n, k)
        for threads in report.threads:
            torch.set_num_threads(threads)
            case = f"{n}x{k}, M=8, cold, {threads} thread{'s' * (threads > 1)}"
            yield case
            others = _peers(report, weight, 8, threads, True, PACKED_KINDS)
            runners = [
                contestants.linear(n, k, 8, True),
                contestants.linear(n, k, 8, True, act="none"),
                peers.torch_bf16(weight, 8, True),
                peers.torch_int8(weight, 8, True),
                *(other.runner() for other in others),
            ]
            s = report.time(case, runners, threads, m=8, shape=(n, k), cold=True)
            report.bar("M=8 against torch bf16", case, s["torch bf16"] / s["alignops a8g"], 4, "x")
            for other in others:
                other.close()


def gemm(report: TernaryReport) -> Iterator[str]:
    """M = 128 and 512: prefill and training-size batches, hot."""
    for n, k in shapes.MATRICES[:1] if report.quick else shapes.MATRICES[:2]:
        weight = contestants.random_weight(n, k)
        for m in (128, 512):
            for threads in report.threads:
                torch.set_num_threads(threads)
                case = f"{n}x{k}, M={m}, hot, {threads} thread{'s' * (threads > 1)}"
                yield case
                kinds = PACKED_KINDS[2:] if m > 128 or report.quick else PACKED_KINDS
                others = _peers(report, weight, m, threads, False, kinds)
                runners = [
                    contestants.linear(n, k, m, False, hot_calls=1),
                    contestants.linear(n, k, m, False, act="none", hot_calls=1),
                    peers.torch_bf16(weight, m, False),
                    peers.torch_int8(weight, m, False),
                    *(other.runner() for other in others),
                ]
                s = report.time(case, runners, threads, m=m, shape=(n, k), cold=False)
                value = s["torch bf16"] / s["alignops a8g"]
                report.bar(f"M={m} against torch bf16", case, value, 1.3, "x")
                for other in others:
                    other.close()


def decode(report: TernaryReport) -> Iterator[str]:
    """All products of one decode step of named models, weights of all layers distinct."""
    names = ("LLaMA-3.2-1B",) if report.quick else ("LLaMA-3.2-1B", "bitnet-0.7B", "LLaMA-3.2-3B")
    for name in names:
        yield f"decode step {name}"
        step = contestants.decode_step(shapes.MODELS[name])
        for threads in report.threads:
            case = f"{name}, {threads} thread{'s' * (threads > 1)}"
            s = report.time(case, [step, report.read(threads)], threads, cold=True)
            bandwidth = roofline.BUFFER_BYTES / s["read"]
            share = step.weight_bytes / s[step.name] / bandwidth
            note = (
                f"{1 / s[step.name]:.1f} steps/s of {step.weight_bytes / 1e6:.0f} MB, "
                f"reading {bandwidth / 1e9:.1f} GB/s"
            )
            bar = report.on_all_cores(threads, 0.6) if name == "LLaMA-3.2-1B" else None
            report.bar("decode step / bandwidth floor", case, share, bar, "of bandwidth", note)


def training(report: TernaryReport) -> Iterator[str]:
    """Quantize and pack; fake-quant forward and backward."""
    n, k = shapes.MATRICES[0]
    for threads in report.threads:
        torch.set_num_threads(threads)
        plural = "s" * (threads > 1)
        case = f"quantize + pack {n}x{k} bf16, {threads} thread{plural}"
        yield case
        runner = contestants.quantize(contestants.random_weight(n, k, torch.bfloat16))
        s = report.time(case, [runner], threads)
        rate = runner.weight_bytes / s[runner.name] / threads / 1e9
        report.bar("quantize + pack", case, rate, 1, "GB/s per core")
        case = f"fake-quant forward + backward {n}x{k} fp32, {threads} thread{plural}"
        yield case
        weight = contestants.random_weight(n, k)
        ours, reference = (
            contestants.fake_quant(weight, True),
            contestants.fake_quant(weight, False),
        )
        s = report.time(case, [ours, reference], threads)
        report.bar("fake-quant against top-k", case, s[reference.name] / s[ours.name], 5, "x")


def smollm(report: TernaryReport) -> Iterator[str]:
    """SmolLM2-135M end to end: tokens per second, greedy."""
    from benchmarks import bench_smollm

    yield "SmolLM2-135M"
    outcome = bench_smollm.measure(report.threads, quick=report.quick)
    report.absent += outcome.absent
    for threads, rates in outcome.tokens_per_second.items():
        for name, rate in rates.items():
            case = f"SmolLM2-135M, {threads} thread{'s' * (threads > 1)}"
            report.record(Product(case, name, 1 / rate, threads))
        for bar in bench_smollm.bars(rates):
            report.bar(bar[0], case, bar[1], bar[2], "x", bar[3])


TernaryReport.sections = {
    "gemv": gemv,
    "avx2": avx2,
    "batch": batch,
    "gemm": gemm,
    "decode": decode,
    "training": training,
    "smollm": smollm,
}
REPORT = TernaryReport
