"""Measures what this project claims about speed; writes Markdown, JSON and a roofline plot.

    python -m benchmarks.report [--quick] [--only gemv,gemm,...] [--out benchmarks/results]

Each bar is a ratio of medians taken alternately in one process. Peers that are not installed are
left out and named.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import alignops
from alignops import ternary, testing
from benchmarks import classic, contestants, peers, roofline, shapes, timing
from benchmarks.timing import Runner

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass
class Measurement:
    """Median seconds of one contestant in one case; `ratio` is floor / seconds."""

    case: str
    name: str
    seconds: float
    threads: int
    m: int = 1
    shape: tuple[int, int] | None = None
    cold: bool | None = None
    weight_bytes: int = 0
    floor_s: float | None = None
    ratio: float | None = None


@dataclasses.dataclass
class Bar:
    """One claim: `value` is to reach `bar`. Without a bar it is there for comparison."""

    what: str
    case: str
    value: float
    bar: float | None
    unit: str
    note: str = ""

    @property
    def hit(self) -> bool:
        return self.bar is None or self.value >= self.bar


class Report:
    """Collects measurements and bars of one run."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.rounds = 3 if quick else 7
        self.threads = sorted({1, len(os.sched_getaffinity(0))})
        self.limits = {t: roofline.measure(t) for t in self.threads}
        self.patterns = {t: roofline.best_pattern(t) for t in self.threads}
        self.measurements: list[Measurement] = []
        self.bars: list[Bar] = []
        self.absent: list[str] = []

    def time(
        self, case: str, runners: list[Runner], threads: int, **fields: object
    ) -> dict[str, float]:
        """Alternates the runners and records them; returns seconds by name."""
        torch.set_num_threads(threads)
        many = fields.get("m", 1) != 1  # passes of many tokens are long
        seconds = timing.alternate(runners, min(self.rounds, 5) if many else self.rounds)
        for runner in runners:
            entry = Measurement(
                case, runner.name, seconds[runner.name], threads, weight_bytes=runner.weight_bytes
            )
            for key, value in fields.items():
                setattr(entry, key, value)
            self._floor(entry)
            self.measurements.append(entry)
        return seconds

    def _floor(self, entry: Measurement) -> None:
        if entry.shape is None or not entry.name.startswith("alignops"):
            return
        n, k = entry.shape
        traffic = entry.weight_bytes if entry.cold else 0.0
        work = entry.m * n * k
        limits = self.limits[entry.threads]
        # Few tokens go through table lookups (4 weights each), many through dot products.
        entry.floor_s = (
            limits.floor(traffic, lookups=work / 4)
            if entry.m <= 4
            else limits.floor(traffic, macs=work)
        )
        entry.ratio = entry.floor_s / entry.seconds

    def bar(
        self, what: str, case: str, value: float, bar: float | None, unit: str, note: str = ""
    ) -> None:
        self.bars.append(Bar(what, case, value, bar, unit, note))

    def on_all_cores(self, threads: int, bar: float) -> float | None:
        """Bandwidth is a matter of all cores together; with fewer the share is only shown."""
        return bar if threads == self.threads[-1] else None

    def read(self, threads: int) -> Runner:
        return roofline.read_runner(threads, self.patterns[threads])


def _peers(
    report: Report,
    weight: torch.Tensor,
    m: int,
    threads: int,
    cold: bool,
    kinds: tuple[tuple[str, bool], ...],
) -> list[peers.GgmlLinear]:
    if peers.ggml() is None:
        if "llama-cpp-python" not in report.absent:
            report.absent.append("llama-cpp-python")
        return []
    return [peers.llama_cpp(weight, kind, m, threads, cold, repack) for kind, repack in kinds]


PACKED_KINDS = (("TQ1_0", False), ("TQ2_0", False), ("Q4_0", True))
ALL_KINDS = (*PACKED_KINDS, ("Q4_0", False))


def gemv(report: Report) -> Iterator[str]:
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
    report: Report,
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
    elif threads == 1 and "vpermw" in report.limits[1].rates and _isa() == "avx512":
        n, k = (int(v) for v in case.split(",")[0].split("x"))
        rate = n * k / ours
        report.bar("one core, hot", case, rate / 1e9, 120, "Gweight/s")
        limit = report.limits[1].rates
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


def _isa() -> str:
    return testing.available_isas()[-1]


def avx2(report: Report) -> Iterator[str]:
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


def batch(report: Report) -> Iterator[str]:
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


def gemm(report: Report) -> Iterator[str]:
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


def decode(report: Report) -> Iterator[str]:
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


def training(report: Report) -> Iterator[str]:
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


def smollm(report: Report) -> Iterator[str]:
    """SmolLM2-135M end to end: tokens per second, greedy."""
    from benchmarks import bench_smollm

    yield "SmolLM2-135M"
    outcome = bench_smollm.measure(report.threads, quick=report.quick)
    report.absent += outcome.absent
    for threads, rates in outcome.tokens_per_second.items():
        for name, rate in rates.items():
            case = f"SmolLM2-135M, {threads} thread{'s' * (threads > 1)}"
            report.measurements.append(Measurement(case, name, 1 / rate, threads))
        for bar in bench_smollm.bars(rates):
            report.bar(bar[0], case, bar[1], bar[2], "x", bar[3])


SECTIONS: dict[str, Callable[[Report], Iterator[str]]] = {
    "gemv": gemv,
    "avx2": avx2,
    "batch": batch,
    "gemm": gemm,
    "decode": decode,
    "training": training,
    "smollm": smollm,
}


def environment(report: Report) -> dict[str, object]:
    """What the figures depend on."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": roofline.cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": _isa(),
        "alignops": alignops.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
        "niceness": os.nice(0),
        "quick": report.quick,
        "limits": {
            t: {
                "read_GBps": v.bandwidth / 1e9,
                "rates_Gps": {k: r / 1e9 for k, r in v.rates.items()},
            }
            for t, v in report.limits.items()
        },
    }


def stem(cpu: str) -> str:
    """File name for results of this machine, today."""
    device = re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")
    return f"{device}-{datetime.date.today().isoformat()}"


def unused(folder: Path, name: str) -> Path:
    """`folder/name`, or name-2, name-3 and so on: results are never overwritten."""
    names = [name, *(f"{name}-{i}" for i in range(2, 1000))]
    return next(folder / n for n in names if not (folder / f"{n}.json").exists())


def main(arguments: list[str] | None = None) -> int:
    """Runs the report; returns the number of bars missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one matrix, three rounds: 1-2 minutes"
    )
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma separated")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--readme", action="store_true", help="put the figures into README.md")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",")
    unknown = sorted(set(wanted) - set(SECTIONS))
    if unknown:
        parser.error(f"--only: must be among {', '.join(SECTIONS)}, got {', '.join(unknown)}")

    from benchmarks import render

    start = time.perf_counter()
    report = Report(options.quick)
    facts = environment(report)
    with torch.no_grad(), tqdm(unit="case", file=sys.stderr) as progress:
        for name in wanted:
            for case in SECTIONS[name](report):
                progress.set_description(case)
                progress.update()
    facts["minutes"] = round((time.perf_counter() - start) / 60, 1)
    facts["absent"] = report.absent
    document = {
        "environment": facts,
        "bars": [{**dataclasses.asdict(b), "hit": b.hit} for b in report.bars],
        "measurements": [dataclasses.asdict(m) for m in report.measurements],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    target = unused(options.out, stem(str(facts["cpu"])) + ("-quick" if options.quick else ""))
    target.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    text = render.markdown(document, target.with_suffix(".png").name)
    target.with_suffix(".md").write_text(text)
    render.plot(document, target.with_suffix(".png"))
    if options.readme:
        page = Path(__file__).parents[1] / "README.md"
        page.write_text(render.with_figures(page.read_text(), document, target.name))
    print(render.summary(document))
    print(f"written: {target}.md, .json, .png")
    return sum(not bar.hit for bar in report.bars)


if __name__ == "__main__":
    main()
