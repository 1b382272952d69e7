"""Ablation of Arenas on a small language model: runs all configurations, writes plots and a table.

    python benchmarks/ablation_arenas.py                 # all runs, about 40 minutes of a CPU core
    python benchmarks/ablation_arenas.py --report-only   # plots and table from the stored runs

Runs that are already stored in the folder are not repeated. The table goes into the README.md of
the folder, between its two `table` comments; the text around it is left alone.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import torch

from alignops.demo._ablation import (
    CONFIGURATIONS,
    HISTOGRAM_EDGES,
    Setting,
    Text,
    train,
)
from alignops.demo._text import load_corpus
from alignops.ternary.arenas import ArenasSchedule

RESULTS = Path(__file__).parent / "results" / "arenas-ablation"
Runs = dict[str, list[dict[str, Any]]]

# Side runs with one seed: what the comparison owes to the learning rate and to when lambda ends.
VARIANTS = {
    "learning rate 1.5e-3": (Setting(learning_rate=1.5e-3), CONFIGURATIONS),
    "lambda 0 from half of the steps on": (Setting(residual_share=0.5), ("3:4 + Arenas",)),
    "lambda at most 0.25": (Setting(residual_peak=0.25), ("3:4 + Arenas",)),
}

STYLE = {
    "dense": {"color": "#222222", "linestyle": "-"},
    "3:4 + Arenas": {"color": "#1f6fb4", "linestyle": "-"},
    "3:4 direct": {"color": "#1f6fb4", "linestyle": (0, (4, 2))},
    "1-bit + Arenas": {"color": "#d95f02", "linestyle": "-"},
    "1-bit direct": {"color": "#d95f02", "linestyle": (0, (4, 2))},
}


def run_path(folder: Path, configuration: str, seed: int) -> Path:
    return folder / "runs" / f"{slug(configuration)}-{seed}.json"


def run_all(folder: Path, seeds: list[int], setting: Setting) -> None:
    text = Text(load_corpus(), setting.vocabulary)
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for configuration in CONFIGURATIONS:
            path = run_path(folder, configuration, seed)
            if not path.exists():
                result = train(configuration, seed, text, setting, lambda s: print(s, flush=True))
                path.write_text(json.dumps(result) + "\n")


def slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower())


def run_variants(folder: Path) -> None:
    text = Text(load_corpus(), Setting().vocabulary)
    (folder / "variants").mkdir(parents=True, exist_ok=True)
    for variant, (setting, configurations) in VARIANTS.items():
        for configuration in configurations:
            path = folder / "variants" / f"{slug(variant)}--{slug(configuration)}.json"
            if not path.exists():
                result = train(configuration, 0, text, setting, lambda s: print(s, flush=True))
                path.write_text(json.dumps({"variant": variant, **result}) + "\n")


def load_runs(folder: Path) -> Runs:
    runs: Runs = {}
    for configuration in CONFIGURATIONS:
        paths = sorted(folder.glob(f"runs/{run_path(folder, configuration, 0).stem[:-1]}*.json"))
        if paths:
            runs[configuration] = [json.loads(path.read_text()) for path in paths]
    return runs


def last_half(series: list[list[float]]) -> float:
    """Mean of the values of the second half of a [step, value] series."""
    values = [value for _, value in series]
    return statistics.fmean(values[len(values) // 2 :])


def spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "values": values,
    }


def load_variants(folder: Path) -> list[dict[str, Any]]:
    """Final figures of the side runs, in the order of VARIANTS."""
    found = []
    for variant, (_, configurations) in VARIANTS.items():
        for configuration in configurations:
            path = folder / "variants" / f"{slug(variant)}--{slug(configuration)}.json"
            if path.exists():
                run = json.loads(path.read_text())
                found.append(
                    {
                        "variant": variant,
                        "configuration": configuration,
                        "held_out_loss": run["held_out"][-1][1],
                        "effective_rank_second_half": last_half(run["rank"]),
                    }
                )
    return found


def summarise(runs: Runs, variants: list[dict[str, Any]]) -> dict[str, Any]:
    first = next(iter(runs.values()))[0]
    bits = 1 / (math.log(2) * first["text"]["bytes_per_token"])
    summary: dict[str, Any] = {
        "setting": first["setting"],
        "text": first["text"],
        "parameters": first["parameters"],
        "quantized_parameters": first["quantized_parameters"],
        "configurations": {},
    }
    for configuration, seeds in runs.items():
        final = [run["held_out"][-1][1] for run in seeds]
        summary["configurations"][configuration] = {
            "held_out_loss": spread(final),
            "held_out_bits_per_byte": spread([loss * bits for loss in final]),
            "above_dense": spread(
                [
                    loss - dense["held_out"][-1][1]
                    for loss, dense in zip(final, runs["dense"], strict=False)
                ]
            ),
            "training_loss_last_100": spread(
                [statistics.fmean(run["loss"][-100:]) for run in seeds]
            ),
            "effective_rank_second_half": spread([last_half(run["rank"]) for run in seeds]),
            "flips_per_step_second_half": spread([last_half(run["flips"]) for run in seeds]),
            "near_scale_at_end": spread([run["latent_at_end"]["near_scale"] for run in seeds]),
            "near_zero_at_end": spread([run["latent_at_end"]["near_zero"] for run in seeds]),
            "seconds": spread([run["seconds"] for run in seeds]),
        }
    summary["variants"] = variants
    summary["dense_converted_held_out_loss"] = spread(
        [run["held_out_converted"] for run in runs["dense"]]
    )
    return summary


def table(summary: dict[str, Any]) -> str:
    def cell(value: dict[str, Any], digits: int, factor: float = 1.0) -> str:
        return f"{value['mean'] * factor:.{digits}f} ± {value['std'] * factor:.{digits}f}"

    rows = [
        "| configuration | held-out loss, nats/token | above dense | bits/byte | training loss, "
        "last 100 steps | effective rank of dL/dW | codes flipped per step, % | latent within "
        "[0.8, 1.2] alpha, % | below 0.2 alpha, % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, values in summary["configurations"].items():
        above = "" if name == "dense" else cell(values["above_dense"], 3)
        rows.append(
            f"| {name} | {cell(values['held_out_loss'], 3)} | {above} "
            f"| {cell(values['held_out_bits_per_byte'], 3)} "
            f"| {cell(values['training_loss_last_100'], 3)} "
            f"| {cell(values['effective_rank_second_half'], 1)} "
            f"| {cell(values['flips_per_step_second_half'], 3, 100)} "
            f"| {cell(values['near_scale_at_end'], 1, 100)} "
            f"| {cell(values['near_zero_at_end'], 1, 100)} |"
        )
    converted = summary["dense_converted_held_out_loss"]
    rows.append(
        f"\nThe dense models converted to 3:4 without training: {cell(converted, 3)} nats/token. "
        "Mean ± standard deviation over the seeds; rank and flips are means over the second half "
        "of training."
    )
    if summary["variants"]:
        rows += [
            "\nSide runs, seed 0; in brackets the same configuration and seed of the main runs:\n",
            "| variant | configuration | held-out loss, nats/token | effective rank of dL/dW |",
            "|---|---|---|---|",
        ]
    for run in summary["variants"]:
        main = summary["configurations"][run["configuration"]]
        rows.append(
            f"| {run['variant']} | {run['configuration']} "
            f"| {run['held_out_loss']:.3f} ({main['held_out_loss']['values'][0]:.3f}) "
            f"| {run['effective_rank_second_half']:.1f} "
            f"({main['effective_rank_second_half']['values'][0]:.1f}) |"
        )
    return "\n".join(rows)


def plot(runs: Runs, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    steps = next(iter(runs.values()))[0]["setting"]["steps"]

    def curve(axes: Any, name: str, series: list[list[list[float]]]) -> None:
        x = [step for step, _ in series[0]]
        columns = list(zip(*([value for _, value in run] for run in series), strict=True))
        axes.plot(x, [statistics.fmean(c) for c in columns], label=name, lw=1.8, **STYLE[name])
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axes.fill_between(x, low, high, color=STYLE[name]["color"], alpha=0.12, lw=0)

    def smooth(losses: list[float], width: int = 50) -> list[list[float]]:
        return [
            [end, statistics.fmean(losses[end - width : end])]
            for end in range(width, len(losses) + 1, width // 2)
        ]

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for name, seeds in runs.items():
        curve(left, name, [smooth(run["loss"]) for run in seeds])
        curve(right, name, [run["held_out"] for run in seeds])
    schedule = ArenasSchedule(steps)
    residual = left.twinx()
    residual.fill_between(
        range(steps), [schedule.at(t) for t in range(steps)], color="#2ca02c", alpha=0.10, lw=0
    )
    residual.set_ylim(0, 3)
    residual.set_yticks([0, 1])
    residual.spines["right"].set_visible(True)
    residual.set_ylabel("lambda (shaded)", loc="bottom")
    left.set_title("Training loss, mean of 50 steps (with the residual)")
    right.set_title("Held-out loss as deployed (lambda = 0)")
    for axes in (left, right):
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("nats per token")
        axes.grid(alpha=0.25)
    right.legend(frameon=False)
    figure.savefig(folder / "loss.png", dpi=130)

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, seeds in runs.items():
        curve(left, name, [run["rank"] for run in seeds])
        curve(right, name, [[[s, 100 * v] for s, v in run["flips"]] for run in seeds])
    left.set_title("Effective rank of the weight gradients (of 256)")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    right.set_title("Weights whose code one step changes, %")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
    figure.savefig(folder / "rank.png", dpi=130)

    figure, panels = plt.subplots(
        2, len(runs), figsize=(13, 5), layout="constrained", sharex=True, sharey="row"
    )
    width = HISTOGRAM_EDGES[1] - HISTOGRAM_EDGES[0]
    for column, (name, seeds) in enumerate(runs.items()):
        start, end = (
            [
                statistics.fmean(shares) / width
                for shares in zip(*(run[key]["histogram"] for run in seeds), strict=True)
            ]
            for key in ("latent_at_start", "latent_at_end")
        )
        color = STYLE[name]["color"]
        upper, lower = panels[0][column], panels[1][column]
        upper.stairs(start, HISTOGRAM_EDGES, color="#999999", lw=1.6, label="start")
        upper.stairs(end, HISTOGRAM_EDGES, color=color, lw=1.6, label="end")
        upper.legend(frameon=False)
        upper.set_title(name)
        change = [e - s for s, e in zip(start, end, strict=True)]
        lower.stairs(change, HISTOGRAM_EDGES, color=color, fill=True, alpha=0.7, baseline=0)
        lower.axhline(0, color="#222222", lw=0.8)
        lower.set_xlabel("|w| / alpha")
        lower.set_xlim(0, 3.5)
        for axes in (upper, lower):
            axes.axvline(1, color="#2ca02c", lw=1, ls=":")
    panels[0][0].set_ylabel("density")
    panels[1][0].set_ylabel("end minus start")
    figure.savefig(folder / "weights.png", dpi=130)


def report(folder: Path) -> None:
    runs = load_runs(folder)
    summary = summarise(runs, load_variants(folder))
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(runs, folder)
    page = folder / "README.md"
    text = page.read_text() if page.exists() else "<!-- table -->\n<!-- /table -->\n"
    body = f"<!-- table -->\n{table(summary)}\n<!-- /table -->"
    page.write_text(re.sub("<!-- table -->.*<!-- /table -->", lambda _: body, text, flags=re.S))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Setting.steps)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", action="store_true", help="the side runs, instead")
    parser.add_argument("--report-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.variants:
        run_variants(arguments.folder)
    elif not arguments.report_only:
        run_all(arguments.folder, arguments.seeds, Setting(steps=arguments.steps))
    report(arguments.folder)


if __name__ == "__main__":
    main()
