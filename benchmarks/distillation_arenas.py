"""Distils SmolLM2-135M into 1.25 bits with and without the Arenas residual, and compares.

    python benchmarks/distillation_arenas.py --minutes 8            # each of the two
    python benchmarks/distillation_arenas.py --report-only

The same text, batches, steps and learning rates for both. The second one takes as many steps as the
first. Stored results are not repeated; README.md gets the table between its `table` comments.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from alignops.demo import arenas

RESULTS = Path(__file__).parent / "results" / "arenas-distillation"
NAMES = {"arenas": "Arenas", "direct": "direct (no residual)"}


def run(folder: Path, minutes: float, steps: int | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        if not (folder / f"{name}.json").exists():
            setting = arenas.Setting(residual=name == "arenas")
            with tempfile.TemporaryDirectory() as temporary:
                path = Path(temporary) / "state.pt"
                result = arenas.run(minutes, steps, path, setting=setting)
            (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        steps = json.loads((folder / f"{name}.json").read_text())["steps"]


def table(results: dict[str, dict[str, Any]]) -> str:
    rows = [
        "| training | steps | tokens | seconds | perplexity of the original | converted, not "
        "trained | after training | latent within [0.8, 1.2] alpha, % | below 0.2 alpha, % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        perplexity, shares = result["perplexity"], result["latent_shares"]
        rows.append(
            f"| {NAMES[name]} | {result['steps']} | {result['tokens']:,} "
            f"| {result['history'][-1]['seconds']:.0f} | {perplexity['original']:.2f} "
            f"| {perplexity['converted']:,.0f} | {perplexity['trained']:,.0f} "
            f"| {100 * shares['near_scale']:.1f} | {100 * shares['near_zero']:.1f} |"
        )
    return "\n".join(rows)


def plot(results: dict[str, dict[str, Any]], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colors = {"arenas": "#1f6fb4", "direct": "#d95f02"}
    for name, result in results.items():
        history = result["history"]
        steps = [record["step"] for record in history]
        perplexities = [result["perplexity"]["converted"], *(r["perplexity"] for r in history)]
        left.plot([0, *steps], perplexities, label=NAMES[name], color=colors[name], lw=1.8)
        flips = [100 * record["flipped"] for record in history]
        right.plot(steps, flips, label=NAMES[name], color=colors[name], lw=1.8)
    original = next(iter(results.values()))["perplexity"]["original"]
    left.axhline(original, color="#222222", ls=":", lw=1.2, label="original")
    left.set_yscale("log")
    left.set_title("Held-out perplexity as deployed (1.25 bits)")
    left.legend(frameon=False)
    right.set_title("Codes that changed since the previous point, %")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
    figure.savefig(folder / "perplexity.png", dpi=130)


def report(folder: Path) -> None:
    paths = {name: folder / f"{name}.json" for name in NAMES}
    results = {name: json.loads(p.read_text()) for name, p in paths.items() if p.exists()}
    plot(results, folder)
    page = folder / "README.md"
    text = page.read_text() if page.exists() else "<!-- table -->\n<!-- /table -->\n"
    body = f"<!-- table -->\n{table(results)}\n<!-- /table -->"
    page.write_text(re.sub("<!-- table -->.*<!-- /table -->", lambda _: body, text, flags=re.S))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.report_only:
        run(arguments.folder, arguments.minutes, arguments.steps)
    report(arguments.folder)


if __name__ == "__main__":
    main()
