"""Measures what this project claims about speed; writes Markdown, JSON and a roofline plot.

    python -m benchmarks.report [--core CORE] [--quick] [--only SECTION,...] [--out FOLDER]

Each bar is a ratio of medians taken alternately in one process. Peers that are not installed are
left out and named. What is measured stands in `<core>_report.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm

import alignops
from alignops import testing
from benchmarks import render, roofline

RESULTS = Path(__file__).parent / "results"
CORES = ("ternary", "spans", "speculative", "attention", "tree")


@dataclasses.dataclass
class Measurement:
    """Median seconds of one contestant in one case; `ratio` is floor / seconds."""

    case: str
    name: str
    seconds: float
    threads: int
    floor_s: float | None = dataclasses.field(default=None, kw_only=True)
    ratio: float | None = dataclasses.field(default=None, kw_only=True)


@dataclasses.dataclass
class Bar:
    """One claim: `value` is to reach `bar`, or to stay below. Without a bar it is a comparison."""

    what: str
    case: str
    value: float
    bar: float | None
    unit: str
    note: str = ""
    at_most: bool = False

    @property
    def hit(self) -> bool:
        if self.bar is None:
            return True
        return self.value <= self.bar if self.at_most else self.value >= self.bar


class Report:
    """Collects measurements and bars of one run. Each core derives from it."""

    core: ClassVar[str]
    title: ClassVar[str]
    method: ClassVar[str]  # how the figures were taken, for the page of results
    sections: ClassVar[dict[str, Callable[[Any], Iterator[str]]]]

    def __init__(self, options: argparse.Namespace) -> None:
        self.quick: bool = options.quick
        self.rounds = 3 if self.quick else 7
        self.threads = sorted({1, len(os.sched_getaffinity(0))})
        self.measurements: list[Measurement] = []
        self.bars: list[Bar] = []
        self.absent: list[str] = []
        self.notes: list[str] = []

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Options of this core alone."""

    def limits(self) -> dict[int, dict[str, Any]]:
        """What this machine can do, by thread count; `limits_table` and `plot` read it."""
        raise NotImplementedError

    @staticmethod
    def limits_table(limits: dict[str, Any]) -> str:
        raise NotImplementedError

    @staticmethod
    def plot(document: dict[str, Any], path: Path) -> None:
        raise NotImplementedError

    @staticmethod
    def readme(document: dict[str, Any], name: str) -> str:
        """What stands between the marks in README.md; `name` is that of the result files."""
        raise NotImplementedError

    def record(self, entry: Measurement) -> None:
        if entry.floor_s is not None:
            entry.ratio = entry.floor_s / entry.seconds
        self.measurements.append(entry)

    def bar(
        self,
        what: str,
        case: str,
        value: float,
        bar: float | None,
        unit: str,
        note: str = "",
        at_most: bool = False,
    ) -> None:
        self.bars.append(Bar(what, case, value, bar, unit, note, at_most))

    def missing(self, package: str) -> None:
        """Notes that a peer is not installed."""
        if package not in self.absent:
            self.absent.append(package)


def environment(report: Report) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "core": report.core,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": roofline.cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": testing.available_isas()[-1],
        "alignops": alignops.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
        "niceness": os.nice(0),
        "quick": report.quick,
    }


def stem(cpu: str, core: str) -> str:
    """File name for results of this machine, today; of ternary, the first core, without a name."""
    device = re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")
    prefix = "" if core == "ternary" else f"{core}-"
    return f"{prefix}{device}-{datetime.date.today().isoformat()}"


def unused(folder: Path, name: str) -> Path:
    """`folder/name`, or name-2, name-3 and so on: results are never overwritten."""
    names = [name, *(f"{name}-{i}" for i in range(2, 1000))]
    return next(folder / n for n in names if not (folder / f"{n}.json").exists())


def report_of(core: str) -> type[Report]:
    """The class that measures and shows a core."""
    found: type[Report] = importlib.import_module(f"benchmarks.{core}_report").REPORT
    return found


def run(report: Report, wanted: list[str]) -> dict[str, Any]:
    """Measures the sections and returns the document of the results."""
    start = time.perf_counter()
    facts = environment(report)
    facts["limits"] = report.limits()
    with torch.no_grad(), tqdm(unit="case", file=sys.stderr) as progress:
        for name in wanted:
            for case in report.sections[name](report):
                progress.set_description(case)
                progress.update()
    facts["minutes"] = round((time.perf_counter() - start) / 60, 1)
    facts["absent"] = report.absent
    if report.notes:
        facts["note"] = "\n\n".join(report.notes)
    document = {
        "environment": facts,
        "bars": [{**dataclasses.asdict(b), "hit": b.hit} for b in report.bars],
        "measurements": [dataclasses.asdict(m) for m in report.measurements],
    }
    return json.loads(json.dumps(document))  # type: ignore[no-any-return]


def main(arguments: list[str] | None = None) -> int:
    """Runs the report; returns the number of bars missed."""
    chooser = argparse.ArgumentParser(add_help=False)
    chooser.add_argument("--core", choices=CORES, default="ternary", help="what to measure")
    kind = report_of(chooser.parse_known_args(arguments)[0].core)

    parser = argparse.ArgumentParser(
        prog="benchmarks.report", description=__doc__, parents=[chooser]
    )
    parser.add_argument("--quick", action="store_true", help="few cases, three rounds: 1-2 minutes")
    parser.add_argument("--only", default=",".join(kind.sections), help="sections, comma separated")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--readme", action="store_true", help="put the figures into README.md")
    kind.add_options(parser)
    options = parser.parse_args(arguments)
    wanted = options.only.split(",")
    unknown = sorted(set(wanted) - set(kind.sections))
    if unknown:
        parser.error(f"--only: must be among {', '.join(kind.sections)}, got {', '.join(unknown)}")

    document = run(kind(options), wanted)
    options.out.mkdir(parents=True, exist_ok=True)
    name = stem(str(document["environment"]["cpu"]), kind.core) + (
        "-quick" if options.quick else ""
    )
    target = unused(options.out, name)
    target.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    text = render.markdown(document, target.with_suffix(".png").name, kind)
    target.with_suffix(".md").write_text(text)
    kind.plot(document, target.with_suffix(".png"))
    if options.readme:
        page = Path(__file__).parents[1] / "README.md"
        figures = kind.readme(document, target.name)
        page.write_text(render.with_figures(page.read_text(), kind.core, target.name, figures))
    print(render.summary(document))
    print(f"written: {target}.md, .json, .png")
    return sum(not bar["hit"] for bar in document["bars"])


if __name__ == "__main__":
    main()
