"""Results as text and as a picture; input is the document that `report` writes as JSON."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _value(bar: dict[str, Any]) -> str:
    return f"{_number(bar['value'])} {bar['unit']}".strip()


def summary(document: dict[str, Any]) -> str:
    """One line per claim: the range of what was measured, in how many cases the bar was reached."""
    claims: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for bar in document["bars"]:
        if bar["bar"] is not None:
            claims[bar["what"], bar["bar"]].append(bar)
    rows = []
    for (what, limit), entries in claims.items():
        entries.sort(key=lambda bar: bar["value"])
        ends = [_number(entries[0]["value"]), _number(entries[-1]["value"])]
        measured = " - ".join(dict.fromkeys(ends)) + f" {entries[0]['unit']}"
        reached = sum(bar["hit"] for bar in entries)
        verdict = "hit" if reached == len(entries) else "**missed**"
        if 0 < reached < len(entries):
            verdict = "**missed in part**"
        count = f"{reached} of {len(entries)}"
        rows.append([what, _number(limit), measured.strip(), f"{verdict}, {count}"])
    return _table(["what", "bar", "measured", "cases"], rows)


def bars(document: dict[str, Any]) -> str:
    """The claims, case by case: measured value against bar, hit or missed."""
    rows = []
    for bar in document["bars"]:
        limit, verdict = "", ""
        if bar["bar"] is not None:
            limit, verdict = _number(bar["bar"]), "hit" if bar["hit"] else "**missed**"
        rows.append([bar["what"], bar["case"], _value(bar), limit, verdict, bar["note"]])
    return _table(["what", "case", "measured", "bar", "", "note"], rows)


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
            if case.startswith("SmolLM2"):
                time = f"{1 / seconds:.1f} tokens/s"
            else:
                time = f"{seconds * 1e6:.1f} us" if seconds < 1e-2 else f"{seconds * 1e3:.1f} ms"
            ratio = f"{entry['ratio']:.2f}" if entry["ratio"] else ""
            rows.append([entry["name"], time, ratio])
        parts.append(f"### {case}\n\n" + _table(["", "median", "floor / median"], rows))
    return "\n\n".join(parts)


def markdown(document: dict[str, Any], picture: str) -> str:
    """The whole report."""
    facts = document["environment"]
    limits = [
        [
            str(threads),
            f"{entry['read_GBps']:.1f}",
            ", ".join(f"{name} {rate:.2f}" for name, rate in entry["rates_Gps"].items()),
        ]
        for threads, entry in facts["limits"].items()
    ]
    absent = ", ".join(facts["absent"]) or "nothing"
    note = f"\n{facts['note']}\n" if "note" in facts else ""
    return f"""# Ternary core: measured figures

{facts["cpu"]}, {facts["cores"]} cores, best instruction set {facts["isa"]};
alignops {facts["alignops"]}, torch {facts["torch"]}, Python {facts["python"]};
{facts["date"]}, {facts["minutes"]} minutes{", quick run" if facts["quick"] else ""}; load average
before the run {facts["load_before"]:.2f}, niceness {facts["niceness"]}. Absent: {absent}.

Medians of alternating turns in one process. *Cold*: a pass visits more than 256 MiB of distinct
copies of the weight. *Hot*: one weight, again and again. llama.cpp computes a whole pass in one
graph; alignops and torch are called from Python once per product. `floor / median` compares with
the larger of traffic over measured read bandwidth and work over measured instruction rate.
{note}
## Limits of this machine

{_table(["threads", "read GB/s", "instructions, G/s"], limits)}

![roofline]({picture})

## Bars

{summary(document)}

## Bars, case by case

Rows without a bar are there for comparison.

{bars(document)}

## All medians

{measurements(document)}
"""


README_CASE = "8192x2048, M=1, cold"
README_BLOCK = re.compile(r"<!-- figures: (.*?) -->.*?<!-- end of figures -->", re.DOTALL)


def readme(document: dict[str, Any], name: str) -> str:
    """The figures at the top of the README, between marks that name the result file."""
    facts = document["environment"]
    threads = facts["cores"]
    plural = "s" * (threads > 1)
    of = {(m["case"], m["name"]): m["seconds"] for m in document["measurements"]}

    matrix, decode = (
        f"{README_CASE}, {threads} thread{plural}",
        f"SmolLM2-135M, {threads} thread{plural}",
    )
    ours = of[matrix, "alignops a8g"]
    products = [
        [contestant, f"{seconds * 1e6:.0f}", f"{seconds / ours:.1f} x"]
        for (case, contestant), seconds in sorted(of.items(), key=lambda item: item[1])
        if case == matrix and contestant != "read"
    ]
    rates = [
        [contestant, f"{1 / seconds:.0f}"]
        for (case, contestant), seconds in sorted(of.items(), key=lambda item: item[1])
        if case == decode
    ]
    return f"""<!-- figures: {name} -->
Greedy decoding of SmolLM2-135M, {threads} thread{plural}:

{_table(["", "tokens/s"], rates)}

One token times a {README_CASE.split(",")[0]} matrix that is not in cache, {threads} thread{plural}:

{_table(["", "us", "time against ours"], products)}

Measured on {facts["cpu"]}, {facts["cores"]} cores, {facts["date"][:10]}.
[All figures, bars reached and missed](benchmarks/results/{name}.md).
<!-- end of figures -->"""


def with_figures(page: str, document: dict[str, Any], name: str) -> str:
    """`page` with its block of figures replaced."""
    return README_BLOCK.sub(lambda _: readme(document, name), page, count=1)


def plot(document: dict[str, Any], path: Path) -> None:
    """Roofline, one panel per thread count: work per second over work per byte of weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    limits = document["environment"]["limits"]
    figure, panels = pyplot.subplots(1, len(limits), figsize=(7 * len(limits), 5), squeeze=False)
    styles = {
        "alignops a8g": "o",
        "alignops none": "s",
        "torch bf16": "^",
        "torch int8 dynamic": "v",
        "llama.cpp TQ1_0": "1",
        "llama.cpp TQ2_0": "2",
        "llama.cpp Q4_0": "x",
        "llama.cpp Q4_0 repacked": "+",
    }
    for panel, (threads, entry) in zip(panels[0], limits.items(), strict=True):
        intensity = [10 ** (i / 20) for i in range(-10, 84)]
        for name, per_instruction in (("vpermw", 128), ("vpdpbusd", 64), ("fma512", 16)):
            if name in entry["rates_Gps"]:
                peak = entry["rates_Gps"][name] * per_instruction
                roof = [min(peak, entry["read_GBps"] * i) for i in intensity]
                panel.plot(intensity, roof, linewidth=1, label=f"limit: memory, {name}")
        points: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        for m in document["measurements"]:
            if m["threads"] != int(threads) or not m["shape"] or m["name"].startswith("classic"):
                continue
            if "AVX2" in m["case"] or not m["weight_bytes"] or (m["m"] == 1 and not m["cold"]):
                continue
            work = m["m"] * m["shape"][0] * m["shape"][1]
            if m["name"] != "read":
                points[m["name"]][0].append(work / m["weight_bytes"])
                points[m["name"]][1].append(work / m["seconds"] / 1e9)
        for name, (x, y) in points.items():
            panel.plot(x, y, styles.get(name, "x"), label=name, alpha=0.8)
        panel.set(
            xscale="log",
            yscale="log",
            xlabel="multiply-adds per byte of weights",
            ylabel="G multiply-adds / s",
            title=f"{threads} thread{'s' * (int(threads) > 1)}, {entry['read_GBps']:.0f} GB/s read",
        )
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
