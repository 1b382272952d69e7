"""The speculative core's results as a picture and as the block of figures in the README."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.render import claims

README_ROWS = (
    "prompt lookup against plain batched decoding",
    "overhead: verify, compact, schedule and host",
    "tokens equal to plain decoding, stable mode",
    "rounds of static over those of refill",
    "verify greedy against eager",
    "verify lossless against eager",
    "shift in place against copy_",
)
_CURVE = re.compile(r"SmolLM2-135M on code, B=(\d+), \d+ threads?")


def plot(document: dict[str, Any], path: Path) -> None:
    """Left: bandwidth of each operation against the roof. Right: tokens per second over K."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(15, 5))
    for threads, entry in document["environment"]["limits"].items():
        left.axhline(entry["read_GBps"], linewidth=1, label=f"read, {threads} thread(s)")
    styles = {"alignops": "o", "kv_shift_ in place": "s", "ragged_append_": "^", "copy_": "x"}
    for name, marker in styles.items():
        found = [m for m in document["measurements"] if m["name"] == name and m["bytes"]]
        if found:
            rates = [m["bytes"] / m["seconds"] / 1e9 for m in found]
            label = "verify" if name == "alignops" else name
            left.plot([m["bytes"] for m in found], rates, marker, label=label)
    left.set(xscale="log", yscale="log", xlabel="bytes of a call, at least", ylabel="GB/s")

    curves: dict[int, dict[int, float]] = {}
    for m in document["measurements"]:
        batch, drafts = _CURVE.fullmatch(m["case"]), re.fullmatch(r"alignops K=(\d+)", m["name"])
        if batch and drafts:
            curves.setdefault(int(batch[1]), {})[int(drafts[1])] = 1 / m["seconds"]
    for size, curve in curves.items():
        right.plot(curve.keys(), [curve[k] / curve[0] for k in curve], "o-", label=f"B={size}")
    right.axhline(1.0, linewidth=1)
    right.set(xlabel="drafts per round, K", ylabel="tokens per second, of those without drafts")
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
