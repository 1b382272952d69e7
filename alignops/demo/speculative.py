"""`alignops demo speculative`: SmolLM2-135M decodes batches by drafts, checked token by token.

A ragged batch of real prompts, source code and questions, is decoded one by one as transformers
does it, and then in batches that draft and verify: with the model's own first layers as the drafter
and with prompt lookup, by every scheduler, in every layout of the cache. Each row must come out the
same. The table shows what it took.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from alignops import testing
from alignops._version import __version__
from alignops.demo._common import load_smollm2
from alignops.integrations.early_exit import early_exit
from alignops.speculative import PromptLookup, speculative_generate

SCHEDULERS = ("static", "refill", "exspec")
LAYOUTS = ("ragged", "defer", "realign", "rollback")

# Modules whose first lines are prompts, and how many tokens of each.
SOURCES = {
    "textwrap": 180,
    "bisect": 64,
    "statistics": 400,
    "colorsys": 120,
    "string": 33,
    "heapq": 256,
    "fractions": 300,
    "calendar": 90,
}
QUESTIONS = (
    "Name three primary colours.",
    "Write a Python function that reverses a list in place, and explain each line of it.",
    "What is the capital of France, and which river flows through it?",
    "Repeat this sentence three times: the quick brown fox jumps over the lazy dog.",
)


@dataclass
class Run:
    """One line of the table."""

    drafter: str
    scheduler: str
    layout: str
    equal_rows: int
    rounds: int
    tokens_per_round: float
    acceptance: float
    overhead: float
    tokens_per_second: float


def prompts(tokenizer: Any, count: int) -> list[Tensor]:
    """Real prompts (L,) of different lengths: beginnings of modules, and questions."""
    found = []
    for module, length in SOURCES.items():
        source = inspect.getsource(import_module(module))
        found.append(tokenizer(source, return_tensors="pt").input_ids[0, :length])
    for question in QUESTIONS:
        message = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        found.append(tokenizer(text, return_tensors="pt").input_ids[0])
    if count > len(found):
        raise ValueError(f"prompts: count must be at most {len(found)}, got {count}")
    step = len(found) / count
    return [found[int(i * step)] for i in range(count)]


@torch.no_grad()
def one_by_one(model: Any, rows: Sequence[Tensor], tokens: int) -> tuple[list[list[int]], float]:
    """New tokens of plain greedy decoding of each row alone, and seconds."""
    start = time.perf_counter()
    found = []
    for row in rows:
        mask = torch.ones_like(row)[None]
        whole = model.generate(
            row[None], attention_mask=mask, max_new_tokens=tokens, do_sample=False
        )
        found.append(whole[0, row.numel() :].tolist())
    return found, time.perf_counter() - start


def run(
    batch: int = 8,
    tokens: int = 48,
    drafts: int = 5,
    exit_layer: int = 10,
    threads: int | None = None,
    json_path: Path | None = None,
) -> dict[str, Any]:
    """Run the demonstration and print a table.

    Args:
        batch: rows that are decoded together; half as many more wait in the pool.
        tokens: to generate per row, at most.
        drafts: tokens drafted per round, K.
        exit_layer: how many of the model's layers the early-exit drafter runs.
        threads: torch's threads; None: as they are.
        json_path: where the figures go as JSON.

    Returns:
        The figures, as in the JSON file.

    Raises:
        RuntimeError: a package is not installed, or a row differs from plain decoding.
        ValueError: an argument is out of range.
    """
    if batch < 1 or tokens < 1 or drafts < 0:
        raise ValueError(
            "run: batch and tokens must be at least 1 and drafts at least 0, got "
            f"{batch}, {tokens} and {drafts}"
        )
    console = Console()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        figures = _run(console, batch, tokens, drafts, exit_layer)
    finally:
        torch.set_num_threads(before)
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=2) + "\n")
        console.print(f"Figures written to {json_path}")
    wrong = [r for r in figures["runs"] if r["equal_rows"] != figures["rows"]]
    if wrong:
        raise RuntimeError(f"demo: rows differ from plain decoding in {len(wrong)} runs")
    return figures


def _run(console: Console, batch: int, tokens: int, drafts: int, exit_layer: int) -> dict[str, Any]:
    with console.status("Loading SmolLM2-135M ..."):
        model, tokenizer = load_smollm2()
    rows = prompts(tokenizer, min(batch + (batch + 1) // 2, len(SOURCES) + len(QUESTIONS)))
    lengths = ", ".join(str(row.numel()) for row in rows)
    console.print(f"{len(rows)} prompts of {lengths} tokens; batches of {batch} rows.")

    with console.status("Decoding each prompt alone, without drafts ..."):
        expected, seconds = one_by_one(model, rows, tokens)
    count = sum(map(len, expected))
    console.print(
        f"One by one, {count} tokens: {count / seconds:.1f} tokens/s, {count} forwards of one row."
    )

    drafters = {
        f"{exit_layer} layers": early_exit(model, exit_layer),
        "lookup": PromptLookup(3),
        "none": None,
    }
    combinations = [
        *(("lookup", s, layout) for s in SCHEDULERS for layout in LAYOUTS),
        *((f"{exit_layer} layers", s, "ragged") for s in SCHEDULERS),
        ("none", "static", "ragged"),
    ]
    runs = []
    for drafter, scheduler, layout in combinations:
        with console.status(f"{drafter}, {scheduler}, {layout} ..."):
            options: dict[str, Any] = {"scheduler": scheduler, "layout": layout}
            output: Any = speculative_generate(
                model,
                drafters[drafter],
                rows,
                max_new_tokens=tokens,
                num_draft_tokens=drafts if drafters[drafter] is not None else 0,
                batch_size=batch,
                return_stats=True,
                **options,
            )
        stats = output.stats
        runs.append(
            Run(
                drafter,
                scheduler,
                layout,
                sum(new == row for new, row in zip(_new(output, rows), expected, strict=True)),
                stats.rounds,
                stats.tokens_per_round,
                stats.acceptance,
                stats.overhead,
                stats.tokens_per_second,
            )
        )
        last = stats
    _print_table(console, runs, len(rows))
    best = max(runs, key=lambda run: run.tokens_per_second)
    console.print(
        f"Drafts from {best.drafter}, {best.scheduler}, {best.layout} are the fastest here. A "
        "batch of many rows keeps a CPU busy without drafts; few rows gain most: try --batch 2."
    )
    console.print(f"\nThe last line in full:\n{last}")
    return {
        "alignops": __version__,
        "torch": torch.__version__,
        "isa": testing.active_isa(),
        "threads": torch.get_num_threads(),
        "rows": len(rows),
        "batch": batch,
        "tokens": count,
        "one_by_one_tokens_per_second": count / seconds,
        "runs": [asdict(r) for r in runs],
    }


def _new(output: Any, rows: Sequence[Tensor]) -> list[list[int]]:
    """Generated tokens of each row; prompts were padded in front."""
    width = max(row.numel() for row in rows)
    return [
        sequence[width : width + int(length) - row.numel()].tolist()
        for sequence, length, row in zip(output.sequences, output.lengths, rows, strict=True)
    ]


def _print_table(console: Console, runs: Sequence[Run], rows: int) -> None:
    table = Table(title="SmolLM2-135M, float32, greedy", box=SIMPLE, padding=(0, 1, 0, 0))
    for name in ("drafts", "scheduler", "layout"):
        table.add_column(name, no_wrap=True)
    for name in (
        "equal",
        "rounds",
        "tokens/\nround",
        "accep-\nted",
        "over-\nhead",
        "tok/s",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for r in runs:
        equal = f"{r.equal_rows}/{rows}"
        table.add_row(
            r.drafter,
            r.scheduler,
            r.layout,
            equal if r.equal_rows == rows else f"[red]{equal}[/red]",
            str(r.rounds),
            f"{r.tokens_per_round:.2f}",
            f"{r.acceptance:.0%}",
            f"{r.overhead:.1%}",
            f"{r.tokens_per_second:.1f}",
        )
    console.print(table)
