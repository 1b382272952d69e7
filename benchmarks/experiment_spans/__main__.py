"""Drift of a small model with and without the defences of alignops.spans, in an invented world.

    python -m benchmarks.experiment_spans                 # three seeds, plots and tables
    python -m benchmarks.experiment_spans --report-only   # plots and tables from the stored runs

Seeds that are already stored in the folder are not repeated. The tables go into the README.md of
the folder, between its two `table` comments; the text around them is left alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from alignops.demo._ablation import SmallLM
from benchmarks.experiment_spans.evaluate import evaluate, open_shields
from benchmarks.experiment_spans.report import report
from benchmarks.experiment_spans.training import (
    Setting,
    pretrain,
    shape,
    tune_preferences,
    tune_refusals,
)
from benchmarks.experiment_spans.world import World, make_world

RESULTS = Path(__file__).parents[1] / "results" / "spans-experiment"


def pretrained(
    world: World, setting: Setting, say: Callable[[str], None], kept: Path | None
) -> tuple[SmallLM, float]:
    """The model before tuning and the CPU seconds it took, from the file `kept` if that exists."""
    if kept is not None and kept.exists():
        state = torch.load(kept, weights_only=True)
        model = SmallLM(shape(world, setting))
        model.load_state_dict(state["model"])
        return model, state["seconds"]
    started = time.process_time()
    model = pretrain(world, setting, say)
    seconds = time.process_time() - started
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": model.state_dict(), "seconds": seconds}, kept)
    return model, seconds


def run(
    world: World, setting: Setting, say: Callable[[str], None], kept: Path | None = None
) -> dict[str, Any]:
    """Trains the models of a world and evaluates all defences.

    Args:
        world, setting: what is run.
        say: is told how far it is.
        kept: file of the pretrained model, made if it does not exist; None: none.

    Returns:
        dict: `setting`, sizes of the `world`, CPU `seconds` of each phase, and what `evaluate`
        returns.
    """
    seconds: dict[str, float] = {}

    def timed(phase: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = work()
        seconds[phase] = round(time.process_time() - started, 2)
        return result

    base, seconds["pretraining"] = pretrained(world, setting, say, kept)
    tuned = timed("refusal tuning", lambda: tune_refusals(base, world, setting, say))
    with tempfile.TemporaryDirectory() as folder, open_shields(world, Path(folder)) as shields:

        def prefer(shield: Any) -> Any:
            return tune_preferences(tuned, world, setting, shield, say)

        models = {
            "none": timed("DPO", lambda: prefer(None)),
            "cbd": timed("DPO with CBD", lambda: prefer(shields.with_allow)),
        }
        figures = timed("evaluation", lambda: evaluate(world, models, shields, say))
    return {
        "seed": world.seed,
        "setting": asdict(setting),
        "world": {
            "vocabulary": len(world.vocabulary),
            "parameters": sum(p.numel() for p in base.parameters()),
            "harmless_tokens": sum(len(d.split()) + 1 for d in world.harmless),
            "unsafe_training_tokens": sum(len(d.split()) + 1 for d in world.unsafe_training),
            "indexed_tokens": sum(
                len(d.split()) for texts in world.sources.values() for d in texts
            ),
            "unsafe_documents": len(world.unsafe_training),
        },
        "cpu_seconds": seconds,
        **figures,
    }


def run_path(folder: Path, seed: int) -> Path:
    return folder / "runs" / f"seed-{seed}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", type=Path, help="keep and reuse the pretrained models there")
    parser.add_argument("--report-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.report_only:
        (arguments.folder / "runs").mkdir(parents=True, exist_ok=True)
        for seed in arguments.seeds:
            path = run_path(arguments.folder, seed)
            if not path.exists():
                kept = arguments.models and arguments.models / f"seed-{seed}.pt"
                result = run(
                    make_world(seed),
                    Setting(),
                    lambda s, n=seed: print(f"seed {n}: {s}", flush=True),
                    kept,
                )
                path.write_text(json.dumps(result, indent=1) + "\n")
    report(arguments.folder)


if __name__ == "__main__":
    main()
