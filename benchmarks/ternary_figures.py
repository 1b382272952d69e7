"""The ternary core's results as a picture and as the block of figures in the README."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.render import table

README_CASE = "8192x2048, M=1, cold"


def readme(document: dict[str, Any], name: str) -> str:
    """The figures at the top of the README."""
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
    return f"""\
Greedy decoding of SmolLM2-135M, {threads} thread{plural}:

{table(["", "tokens/s"], rates)}

One token times a {README_CASE.split(",")[0]} matrix that is not in cache, {threads} thread{plural}:

{table(["", "us", "time against ours"], products)}

Measured on {facts["cpu"]}, {facts["cores"]} cores, {facts["date"][:10]}.
[All figures, bars reached and missed](benchmarks/results/{name}.md)."""


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
