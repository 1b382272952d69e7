"""The tree core's results as a picture and as the block of figures in the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.render import table

README_ROWS = (
    "bookkeeping of a simulation",
    "time of mctx gumbel over ours",
    "time of mctx muzero over ours",
    "an iteration on tensors",
)


def plot(document: dict[str, Any], path: Path) -> None:
    """Microseconds per simulation of each contestant in each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = [m for m in document["measurements"] if m["name"] != "tensors" and m["threads"] == 1]
    cases = list(dict.fromkeys(m["case"] for m in entries))
    figure, ax = pyplot.subplots(figsize=(10, 4.5))
    for name in dict.fromkeys(m["name"] for m in entries):
        found = {m["case"]: m["seconds"] * 1e6 for m in entries if m["name"] == name}
        ax.plot([cases.index(c) for c in found], found.values(), "o", label=name)
    ax.set(yscale="log", ylabel="us per simulation and tree")
    ax.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases], fontsize=8)
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def readme(document: dict[str, Any], name: str) -> str:
    """The figures of the core in the README: the range of each claim over its cases."""
    facts = document["environment"]
    rows = []
    for what in README_ROWS:
        found = [bar for bar in document["bars"] if bar["what"] == what and bar["bar"] is not None]
        if found:
            ends = sorted(bar["value"] for bar in found)
            shown = " - ".join(dict.fromkeys(f"{value:.3g}" for value in (ends[0], ends[-1])))
            rows.append([what, f"{shown} {found[0]['unit']}"])
    return f"""\
{table(["", "measured"], rows)}

Measured on {facts["cpu"]}, {facts["cores"]} cores, {facts["date"][:10]}.
[All figures, bars reached and missed](benchmarks/results/{name}.md)."""
