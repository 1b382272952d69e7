"""The spans core's results as a picture and as the block of figures in the README."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from benchmarks.render import table

MARKERS = "osD^v<>xP*"
README_ROWS = (
    "build against infini-gram",
    "8-token counts against infini-gram",
    "8-token counts against tokengrams",
    "maximal spans against infini-gram attribute",
    "open, lazy verification",
    "matcher extend",
    "matcher peek",
    "TraceShield check",
)


def plot(document: dict[str, Any], path: Path) -> None:
    """Searches per second over random reads per search, one panel per size of the index."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    limits = document["environment"]["limits"]["1"]["random_read_ns"]
    figure, panels = pyplot.subplots(1, len(limits), figsize=(10 * len(limits), 5), squeeze=False)
    for panel, (size, by_chains) in zip(panels[0], limits.items(), strict=True):
        reads = [2**i for i in range(2, 14)]
        for chains, nanoseconds in by_chains.items():
            roof = [1e9 / (nanoseconds * r) for r in reads]
            panel.plot(reads, roof, linewidth=1, label=f"limit: {chains} read(s) in flight")
        found = [m for m in document["measurements"] if m["tokens"] == int(size) and m["reads"]]
        for m, marker in zip(found, itertools.cycle(MARKERS)):
            label = f"{m['case'].split(', ')[1]}: {m['name']}"
            panel.plot([m["reads"]], [1 / m["seconds"]], marker, label=label)
        panel.set(
            xscale="log",
            yscale="log",
            xlabel="random reads per operation, at least",
            ylabel="operations per second, one thread",
            title=f"{int(size) / 1e6:g} M tokens",
        )
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def readme(document: dict[str, Any], name: str) -> str:
    """The figures of the core in the README: the claims on the largest corpus."""
    facts = document["environment"]
    rows = []
    for what in README_ROWS:
        found = [bar for bar in document["bars"] if bar["what"] == what]
        if found:
            bar = found[-1]
            value = f"{bar['value']:.3g} {bar['unit']}"
            rows.append([what, bar["case"], value, bar["note"]])
    return f"""\
{table(["", "", "measured", ""], rows)}

Measured on {facts["cpu"]}, {facts["cores"]} cores, {facts["date"][:10]}.
[All figures, bars reached and missed](benchmarks/results/{name}.md)."""
