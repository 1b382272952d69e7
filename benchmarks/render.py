"""Results as text and as a picture; input is the document that `report` writes as JSON."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.report import Report


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _value(bar: dict[str, Any]) -> str:
    return f"{_number(bar['value'])} {bar['unit']}".strip()


def _limit(bar: dict[str, Any]) -> str:
    return ("<= " if bar.get("at_most") else "") + _number(bar["bar"])


def _time(seconds: float) -> str:
    if seconds < 1e-6:
        return f"{seconds * 1e9:.0f} ns"
    if seconds < 1e-2:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"


def summary(document: dict[str, Any]) -> str:
    """One line per claim: the range of what was measured, in how many cases the bar was reached."""
    claims: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for bar in document["bars"]:
        if bar["bar"] is not None:
            claims[bar["what"], bar["bar"]].append(bar)
    rows = []
    for (what, _), entries in claims.items():
        entries.sort(key=lambda bar: bar["value"])
        ends = [_number(entries[0]["value"]), _number(entries[-1]["value"])]
        measured = " - ".join(dict.fromkeys(ends)) + f" {entries[0]['unit']}"
        reached = sum(bar["hit"] for bar in entries)
        verdict = "hit" if reached == len(entries) else "**missed**"
        if 0 < reached < len(entries):
            verdict = "**missed in part**"
        count = f"{reached} of {len(entries)}"
        rows.append([what, _limit(entries[0]), measured.strip(), f"{verdict}, {count}"])
    return table(["what", "bar", "measured", "cases"], rows)


def bars(document: dict[str, Any]) -> str:
    """The claims, case by case: measured value against bar, hit or missed."""
    rows = []
    for bar in document["bars"]:
        limit, verdict = "", ""
        if bar["bar"] is not None:
            limit, verdict = _limit(bar), "hit" if bar["hit"] else "**missed**"
        rows.append([bar["what"], bar["case"], _value(bar), limit, verdict, bar["note"]])
    return table(["what", "case", "measured", "bar", "", "note"], rows)


def measurements(document: dict[str, Any]) -> str:
    """Medians by case."""
    cases: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in document["measurements"]:
        if entry["name"] != "read":
            cases[entry["case"]].append(entry)
    parts = []
    for case, entries in cases.items():
        rows = []
        for entry in sorted(entries, key=lambda e: e["seconds"]):
            seconds = entry["seconds"]
            rate = f"{1 / seconds:.1f} tokens/s"
            time = rate if case.startswith("SmolLM2") else _time(seconds)
            ratio = _ratio(entry["ratio"]) if entry["ratio"] else ""
            rows.append([entry["name"], time, ratio])
        parts.append(f"### {case}\n\n" + table(["", "median", "floor / median"], rows))
    return "\n\n".join(parts)


def markdown(document: dict[str, Any], picture: str, core: type[Report]) -> str:
    """The whole report."""
    facts = document["environment"]
    absent = ", ".join(facts["absent"]) or "nothing"
    note = f"\n{facts['note']}\n" if "note" in facts else ""
    return f"""# {core.title}

{facts["cpu"]}, {facts["cores"]} cores, best instruction set {facts["isa"]};
alignops {facts["alignops"]}, torch {facts["torch"]}, Python {facts["python"]};
{facts["date"]}, {facts["minutes"]} minutes{", quick run" if facts["quick"] else ""}; load average
before the run {facts["load_before"]:.2f}, niceness {facts["niceness"]}. Absent: {absent}.

{core.method}
{note}
## Limits of this machine

{core.limits_table(facts["limits"])}

![roofline]({picture})

## Bars

{summary(document)}

## Bars, case by case

Rows without a bar are there for comparison.

{bars(document)}

## All medians

{measurements(document)}
"""


def readme_block(core: str) -> re.Pattern[str]:
    """A core's figures in the README, between marks; the first one names the result file."""
    mark = figures_mark(core)
    return re.compile(f"<!-- {mark}: (.*?) -->\\n(.*?)\\n<!-- end of {mark} -->", re.DOTALL)


def figures_mark(core: str) -> str:
    return "figures" if core == "ternary" else f"{core} figures"


def with_figures(page: str, core: str, name: str, figures: str) -> str:
    """`page` with the block of figures of `core` replaced."""
    mark = figures_mark(core)
    block = f"<!-- {mark}: {name} -->\n{figures}\n<!-- end of {mark} -->"
    return readme_block(core).sub(lambda _: block, page, count=1)


def claims(document: dict[str, Any], name: str, rows: Sequence[str]) -> str:
    """Figures for the README: of each bar named in `rows` the range over its cases."""
    facts = document["environment"]
    shown = []
    for what in rows:
        found = [bar for bar in document["bars"] if bar["what"] == what and bar["bar"] is not None]
        if found:
            ends = sorted(bar["value"] for bar in found)
            ranges = " - ".join(dict.fromkeys(f"{value:.3g}" for value in (ends[0], ends[-1])))
            shown.append([what, f"{ranges} {found[0]['unit']}".strip()])
    return f"""\
{table(["", "measured"], shown)}

Measured on {facts["cpu"]}, {facts["cores"]} cores, {facts["date"][:10]}.
[All figures, bars reached and missed](benchmarks/results/{name}.md)."""
