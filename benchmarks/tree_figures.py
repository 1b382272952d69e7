"""The tree core's results as a picture and as the block of figures in the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.render import claims

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
    """The figures of the core in the README."""
    return claims(document, name, README_ROWS)
