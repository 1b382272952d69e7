"""The attention core's results as a picture and as the block of figures in the README."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.render import claims

README_ROWS = (
    "against B2, 1 segment",
    "against B2, headers",
    "against B2, 8 segments",
    "against B2, 64 segments",
    "share of the read bandwidth, float32",
    "share of the read bandwidth, bfloat16",
    "time of 4 workers over that of one",
    "plan of a step",
    "splice of a finished step",
    "error against that of dense SDPA",
)
_CASE = re.compile(r"(.*), W=(\d+), (\d+) threads?")


def plot(document: dict[str, Any], path: Path) -> None:
    """Left: bandwidth of each call against the roof. Right: time over the number of workers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(15, 5))
    limits = document["environment"]["limits"]
    for threads, entry in limits.items():
        left.axhline(entry["read_GBps"], linewidth=1, label=f"read, {threads} thread(s)")
    most = int(max(limits, key=int))
    times: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for m in document["measurements"]:
        case = _CASE.fullmatch(m["case"])
        if case and m["threads"] == most and m["name"] in ("alignops", "B1", "B2"):
            points[m["name"]].append((m["bytes"], m["bytes"] / m["seconds"] / 1e9))
            times[case[1], m["name"]][int(case[2])] = m["seconds"]
    for (name, found), marker in zip(points.items(), "osx", strict=False):
        left.plot(*zip(*found, strict=True), marker, label=name)
    left.set(xscale="log", yscale="log", xlabel="bytes of distinct keys and values", ylabel="GB/s")

    shown = [key for key in times if len(times[key]) > 2 and "S=16k, headers" in key[0]]
    for key in shown:
        curve = dict(sorted(times[key].items()))
        one = times[key[0], "alignops"][min(curve)]
        right.plot(curve.keys(), [s / one for s in curve.values()], "o-", label=", ".join(key))
    right.set(xlabel="workers", ylabel="time, of alignops with one worker")
    for panel in (left, right):
        panel.grid(alpha=0.3, which="both")
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def readme(document: dict[str, Any], name: str) -> str:
    """The figures of the core in the README."""
    return claims(document, name, README_ROWS)
