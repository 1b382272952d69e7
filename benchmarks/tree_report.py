"""The tree core: bookkeeping per simulation, against mctx; Python's share; threads; memory."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import timing, tree_cases, tree_figures
from benchmarks.render import table
from benchmarks.report import Measurement, Report
from benchmarks.tree_cases import Case, Model

MICROSECONDS = {(64, 8, 200): 0.30, (256, 64, 200): 0.6}
MCTX = {"mctx gumbel": 20.0, "mctx muzero": 50.0}
# Where mctx is timed: it copies whole arrays in every step, and larger cases take it minutes.
PEERS = ((64, 8, 200), (1, 8, 200))
PYTHON = {1: 25.0, 64: 60.0}
# A search whose records and lanes stay in the second-level cache of a core.
RESIDENT = Case(128, 8, 20)


class TreeReport(Report):
    """Microseconds are those of this machine; ratios to mctx were taken in the same process."""

    core = "tree"
    title = "Tree core: measured figures"
    method = """\
A search whose model is a table of random priors and values, MuZero's policy, one leaf per tree and
iteration, on new trees each time; the time of the table is in it. "Bookkeeping" is taken at the
boundary of the native code, NumPy arrays in and out; "an iteration" is select, expand and backup by
the public functions on tensors. mctx is compiled before it is timed and reads a table of the same
size. Alternating turns in one process; the smallest of all turns counts, since other processes can
only add."""

    def limits(self) -> dict[int, dict[str, Any]]:
        return {t: {"cores": len(os.sched_getaffinity(0))} for t in self.threads}

    @staticmethod
    def limits_table(limits: dict[str, Any]) -> str:
        return table(
            ["threads", "cores"], [[t, str(entry["cores"])] for t, entry in limits.items()]
        )

    plot = staticmethod(tree_figures.plot)
    readme = staticmethod(tree_figures.readme)


def search(report: TreeReport) -> Iterator[str]:
    """Bookkeeping per simulation on one thread."""
    torch.set_num_threads(1)
    for shape in tree_cases.SHAPES[:2] if report.quick else tree_cases.SHAPES:
        case = Case(*shape)
        model = Model(case)
        runners = [timing.Runner("alignops", lambda m=model: tree_cases.bookkeeping(m), case.total)]
        peers = tree_cases.mctx(case) if shape in PEERS else {}
        if peers is None:
            report.missing("mctx")
        for name, run in (peers or {}).items():
            runners.append(timing.Runner(name, run, case.total))
        best = {n: min(v) for n, v in timing.turns(runners, report.rounds).items()}
        for name, seconds in best.items():
            report.record(Measurement(str(case), name, seconds, 1))
        ours = best["alignops"]
        report.bar(
            "bookkeeping of a simulation",
            str(case),
            ours * 1e6,
            MICROSECONDS.get(shape),
            "us",
            at_most=True,
        )
        for name, bar in MCTX.items():
            if name in best:
                cores = len(os.sched_getaffinity(0))
                note = f"{best[name] * 1e6:.3g} us, compiled by XLA for {cores} cores"
                report.bar(
                    f"time of {name} over ours", str(case), best[name] / ours, bar, "x", note
                )
        yield str(case)


def python(report: TreeReport) -> Iterator[str]:
    """What an iteration costs by the public functions."""
    torch.set_num_threads(1)
    for trees, bar in PYTHON.items():
        case = Case(trees, 8, 200)
        model = Model(case)
        runner = timing.Runner(
            "tensors", lambda m=model: tree_cases.through_tensors(m), case.simulations + 1
        )
        seconds = min(timing.turns([runner], report.rounds)["tensors"])
        report.record(Measurement(str(case), "tensors", seconds, 1))
        report.bar("an iteration on tensors", str(case), seconds * 1e6, bar, "us", at_most=True)
        yield str(case)


def threads(report: TreeReport) -> Iterator[str]:
    """One thread and all, on a batch that stays in the caches."""
    if len(report.threads) < 2:
        return
    model = Model(RESIDENT)
    best = {}
    for count in report.threads:
        torch.set_num_threads(count)
        runner = timing.Runner("alignops", lambda: tree_cases.bookkeeping(model), RESIDENT.total)
        best[count] = statistics.median(timing.turns([runner], report.rounds)["alignops"])
        report.record(Measurement(str(RESIDENT), "alignops", best[count], count))
    report.bar("one thread over two", str(RESIDENT), best[1] / best[report.threads[-1]], 1.6, "x")
    yield str(RESIDENT)


def memory(report: TreeReport) -> Iterator[str]:
    """Bytes of records and lanes against 64 per node and 24 per edge."""
    case = Case(16, 8, 200)
    store = tree_cases.bookkeeping(Model(case))
    nodes = int(store.trees().nodes.sum())
    edges = int(store.column("n_edges").sum())
    promised = 64 * nodes + 24 * edges
    report.bar(
        "bytes, of 64 per node and 24 per edge",
        str(case),
        store.bytes / promised,
        1.0,
        "x",
        f"{store.bytes} bytes, {nodes} nodes, {edges} edges",
        at_most=True,
    )
    yield str(case)


TreeReport.sections = {
    "search": search,
    "python": python,
    "threads": threads,
    "memory": memory,
}
REPORT = TreeReport
