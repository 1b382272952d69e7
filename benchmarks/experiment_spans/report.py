"""Tables and plots of the stored runs."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks.experiment_spans.evaluate import BEAMS, LOOKAHEAD
from benchmarks.experiment_spans.world import STYLES

Run = dict[str, Any]

#: Rows of the tables: key of the figures, what it is called.
DEFENCES = {
    "none": "none",
    "shield": "TraceShield",
    "cbd": "CBD",
    "prov": "Prov-Decode",
    "all": "all three",
}
VARIANTS = {
    "cbd_shield": "TraceShield on CBD, no search",
    "lookahead": f"Prov-Decode, lookahead {LOOKAHEAD}",
}
SEARCHES = {"beam_none": "none, beam search", "beam_cbd": "CBD, beam search"}


def spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "min": min(values),
        "max": max(values),
        "values": values,
    }


def summarise(runs: list[Run]) -> dict[str, Any]:
    """Mean and range over the seeds of every number of the runs."""

    def merge(nodes: list[Any]) -> Any:
        if isinstance(nodes[0], dict):
            return {key: merge([node[key] for node in nodes]) for key in nodes[0]}
        return spread([float(node) for node in nodes])

    summary = {key: merge([run[key] for run in runs]) for key in ("rows", "text", "cpu_seconds")}
    summary["cpu_ms_per_100"] = merge([run["cpu_ms_per_100"] for run in runs])
    rows = summary["rows"]
    summary["reduction"] = {
        name: {
            key: less(row[key], rows["none"][key])
            for key in ("drift", "drift_verbatim", "drift_paraphrase")
        }
        for name, row in rows.items()
    }
    return {
        "seeds": [run["seed"] for run in runs],
        "setting": runs[0]["setting"],
        "world": runs[0]["world"],
        **summary,
    }


def less(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """By which share a is less than b, seed by seed; nothing is no less than nothing."""
    pairs = zip(a["values"], b["values"], strict=True)
    return spread([1 - x / y if y else 0.0 for x, y in pairs])


def cell(value: dict[str, Any], factor: float = 100.0, digits: int = 1) -> str:
    """Mean and range."""
    mean, low, high = (f"{value[k] * factor:.{digits}f}" for k in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low} - {high})"


def tables(summary: dict[str, Any]) -> str:
    rows, text = summary["rows"], summary["text"]
    lines = [
        "| defence | drift, % | verbatim facts | paraphrased facts | less than none, % | "
        "refusal quality, 0-5 | false refusals, % | without A | dPPL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, name in (DEFENCES | VARIANTS | SEARCHES).items():
        r = rows[key]
        less = "" if key == "none" else cell(summary["reduction"][key]["drift"], digits=0)
        change = cell(text[key]["change"], 1, 3) if key in text else ""
        bare = "" if key == "lookahead" else cell(r["false_refusals_without_allow"])
        lines.append(
            f"| {name} | {cell(r['drift'])} | {cell(r['drift_verbatim'])} "
            f"| {cell(r['drift_paraphrase'])} | {less} | {cell(r['quality'], 1, 2)} "
            f"| {cell(r['false_refusals'])} | {bare} | {change} |"
        )
    lines += [
        "\n| defence | harmless requests answered right, % | harmless answers changed, "
        "% | without A | plain drift, % | role | prefix | synonym |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, name in (DEFENCES | VARIANTS | SEARCHES).items():
        r = rows[key]
        bare = "" if key == "lookahead" else cell(r["changed_without_allow"])
        styles = " | ".join(cell(r["drift_by_style"][style], digits=0) for style in STYLES)
        lines.append(
            f"| {name} | {cell(r['procedures_right'])} | {cell(r['changed'])} | {bare} | {styles} |"
        )
    lines.append("\n" + costs(summary))
    return "\n".join(lines)


def costs(summary: dict[str, Any]) -> str:
    """What does not go by defence, in words."""
    rows, text = summary["rows"], summary["text"]
    latency, seconds = summary["cpu_ms_per_100"], summary["cpu_seconds"]

    def refused(name: str) -> str:
        return cell(spread([1 - share for share in text[name]["texts"]["values"]]))

    cbd, veto = (
        less(seconds["DPO with CBD"], seconds["DPO"]),
        less(latency["veto"], latency["search"]),
    )
    more = {
        name: spread([-value for value in change["values"]])
        for name, change in (("cbd", cbd), ("veto", veto))
    }
    searches = less(rows["prov"]["drift"], rows["beam_none"]["drift"])
    rewordings = rows["shield"]["unsafe_rewordings"]
    return (
        f"Prov-Decode against the same beam search without veto: {cell(searches, digits=0)} % less "
        f"drift. TraceShield with the rewordings of training in the index as well: drift "
        f"{cell(rewordings['drift'])} %, on paraphrased facts "
        f"{cell(rewordings['drift_paraphrase'])} %. Held-out harmless texts, stories and all, that "
        f"TraceShield refuses: {refused('shield')} % with A, {refused('shield_without_allow')} % "
        f"without.\n\nCost in CPU time: TraceShield {cell(latency['shield'], 1, 2)} ms per 100 "
        f"tokens, one completion at a time, five categories and A; Prov-Decode "
        f"{cell(latency['veto'], 1, 0)} ms per 100 steps of {BEAMS} beams, {cell(more['veto'])} % "
        f"more than without veto; preference tuning with CBD {cell(more['cbd'])} % more than "
        "without, its weights included.\n\nMean (smallest - largest) over seeds "
        f"{', '.join(map(str, summary['seeds']))}."
    )


def plot(summary: dict[str, Any], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    rows = summary["rows"]

    def bars(axes: Any, shift: float, values: list[dict[str, Any]], **style: Any) -> None:
        x = [i + shift for i in range(len(values))]
        means = [100 * v["mean"] for v in values]
        reach = [
            [100 * (v["mean"] - v["min"]) for v in values],
            [100 * (v["max"] - v["mean"]) for v in values],
        ]
        axes.bar(x, means, yerr=reach, error_kw={"lw": 1}, **style)

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    kinds = {
        "drift_verbatim": ("#1f6fb4", "verbatim"),
        "drift_paraphrase": ("#d95f02", "paraphrased"),
    }
    for shift, (key, (color, label)) in zip((-0.2, 0.2), kinds.items(), strict=True):
        bars(left, shift, [rows[k][key] for k in DEFENCES], width=0.38, color=color, label=label)
    left.set_title("Unsafe requests whose answer tells the fact, %")
    bars(right, 0.0, [rows[k]["procedures_right"] for k in DEFENCES], width=0.5, color="#2ca02c")
    right.set_title("Harmless requests that are answered right, %")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.set_xticks(range(len(DEFENCES)), DEFENCES.values())
        axes.grid(alpha=0.25, axis="y")
    figure.savefig(folder / "drift.png", dpi=130)

    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    palette = ("#222222", "#1f6fb4", "#2ca02c", "#d95f02", "#8c564b")
    for i, ((key, name), color) in enumerate(zip(DEFENCES.items(), palette, strict=True)):
        values = [rows[key]["drift_by_style"][style] for style in STYLES]
        bars(axes, 0.16 * (i - 2), values, width=0.15, color=color, label=name)
    axes.set_xticks(range(len(STYLES)), STYLES)
    axes.set_title("Drift by style of the request, %")
    axes.set_ylim(top=1.15 * axes.get_ylim()[1])
    axes.legend(frameon=False, ncols=5, loc="upper center", fontsize=8.5, columnspacing=1)
    axes.grid(alpha=0.25, axis="y")
    figure.savefig(folder / "styles.png", dpi=130)
    plt.close("all")


def put(page: Path, mark: str, body: str) -> None:
    """Replaces what is between the two comments of that name; without a page makes one."""
    text = page.read_text() if page.exists() else f"<!-- {mark} -->\n<!-- /{mark} -->\n"
    block = f"<!-- {mark} -->\n{body}\n<!-- /{mark} -->"
    found = re.compile(f"<!-- {mark} -->.*<!-- /{mark} -->", re.S)
    page.write_text(found.sub(lambda _: block, text))


def report(folder: Path) -> None:
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("runs/seed-*.json"))]
    summary = summarise(runs)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(summary, folder)
    put(folder / "README.md", "table", tables(summary))
