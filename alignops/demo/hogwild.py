"""`alignops demo hogwild`: SmolLM2-135M as one, two and four workers over one cache.

The workers are shown while they write. Then: one worker is compared with plain decoding, token for
token; the time of a forward with that of independent runs and of one run, in turns; and a table
says whose text each worker attended to. A model of 135M parameters does not collaborate in any
useful way: what is shown is the mechanism.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from alignops import testing
from alignops._checks import ceil_div, check
from alignops._version import __version__
from alignops.attention.generate import PAGE
from alignops.attention.layouts import LAYOUTS
from alignops.attention.prompts import Texts, prompt_ids, worker_names
from alignops.attention.session import HogwildSession
from alignops.attention.workers import Piece
from alignops.demo._common import load_smollm2
from alignops.demo._hogwild_view import View
from alignops.integrations.attention import concurrent_model
from alignops.speculative.adapter import Sampling

PROBLEM = (
    "Name six things that a small town can do to save water, and say for each of them in one "
    "sentence why it helps."
)


@dataclass
class Speed:
    """Medians over the rounds of the same number of forwards.

    Attributes:
        workers: W.
        tokens_per_second: of W workers over one cache.
        independent_tokens_per_second: of a batch of W rows that do not see each other.
        one_tokens_per_second: of one row.
    """

    workers: int
    tokens_per_second: float
    independent_tokens_per_second: float
    one_tokens_per_second: float

    @property
    def against_independent(self) -> float:
        """Ratio of tokens per second."""
        return self.tokens_per_second / self.independent_tokens_per_second

    @property
    def against_one(self) -> float:
        """Ratio of tokens per second."""
        return self.tokens_per_second / self.one_tokens_per_second


class Plain:
    """Greedy decoding as transformers does it, with the library's own cache.

    Args:
        model: of transformers.
        ids: the prompt.
        rows: equal ones in a batch.
    """

    def __init__(self, model: Any, ids: Sequence[int], rows: int = 1) -> None:
        from transformers import DynamicCache

        # Renamed between releases of transformers.
        names = inspect.signature(model.forward).parameters
        self._name = "cache" if "cache" in names else "past_key_values"
        self._cache = DynamicCache()
        self._model = model
        self._rows = 1
        self.next = self.feed(ids)
        self._rows = rows
        self._cache.batch_repeat_interleave(rows)

    def fork(self) -> Plain:
        """The same with a cache of its own."""
        twin = copy(self)
        twin._cache = deepcopy(self._cache)
        return twin

    @torch.no_grad()
    def feed(self, ids: Sequence[int]) -> int:
        """Feed tokens to every row; returns the most likely next one of the first row."""
        inputs = torch.tensor([list(ids)] * self._rows)
        options = {self._name: self._cache, "use_cache": True, "logits_to_keep": 1}
        logits = self._model(inputs, **options).logits
        self.next = int(logits[:, -1].argmax(-1)[0])
        return self.next


def run(
    workers: Sequence[int] = (1, 2, 4),
    forwards: int = 96,
    rounds: int = 3,
    layout: str = "combined",
    problem: str = PROBLEM,
    seed: int = 0,
    threads: int | None = None,
    json_path: Path | None = None,
) -> dict[str, Any]:
    """Run the demonstration.

    Args:
        workers: how many, one run for each number.
        forwards: of each run; each gives every worker a token.
        rounds: of the comparison of times.
        layout: what the workers see.
        problem: what they work on.
        seed: of the first worker's random words.
        threads: torch's threads; None: as they are.
        json_path: where the figures go as JSON.

    Returns:
        The figures, as in the JSON file.

    Raises:
        RuntimeError: a package is not installed, or one worker differs from plain decoding.
        ValueError: an argument is out of range.
    """
    check(
        len(workers) > 0 and min(workers) >= 1 and forwards >= 1 and rounds >= 1,
        f"run: workers, forwards and rounds must be at least 1, got {list(workers)}, {forwards} "
        f"and {rounds}",
    )
    check(layout in LAYOUTS, f"run: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    console = Console()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        figures = _run(console, list(workers), forwards, rounds, layout, problem, seed)
    finally:
        torch.set_num_threads(before)
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=2) + "\n")
        console.print(f"Figures written to {json_path}")
    if figures["proof"]["different"]:
        raise RuntimeError("demo: one worker differs from plain decoding")
    return figures


def _run(
    console: Console,
    workers: list[int],
    forwards: int,
    rounds: int,
    layout: str,
    problem: str,
    seed: int,
) -> dict[str, Any]:
    with console.status("Loading SmolLM2-135M ..."):
        model, tokenizer = load_smollm2()
        texts = Texts.load()
        most = worker_names(max(workers), texts)
        prompt = prompt_ids(problem, most, texts, tokenizer)
        # Of each session: the prompt, what is written, prefixes and page ends.
        tokens = len(prompt) + len(most) * (3 * forwards + 256)
        pages = (len(workers) + 2) * ceil_div(tokens, PAGE)
        concurrent = concurrent_model(model, num_pages=pages, page_size=PAGE)

    def session(count: int, **options: Any) -> HogwildSession:
        return HogwildSession(
            concurrent, tokenizer, problem, workers=count, layout=layout, seed=seed, **options
        )

    console.print(
        "A model of 135M parameters does not collaborate in any useful way. What you see is the "
        "mechanism: all workers write at once, over one cache, and read each other's tokens."
    )
    masses = {}
    for count in workers:
        names = "one worker" if count == 1 else f"{count} workers"
        console.print(
            f"\n[bold]{names}[/bold], layout {layout}, {forwards} forwards", highlight=False
        )
        masses[count] = _show(console, session, count, forwards)
    with console.status("Comparing one worker with plain decoding ..."):
        proof = _prove(model, session, forwards)
    console.print(
        f"\nOne worker against plain decoding in float32: {proof['sampled']} greedy tokens, "
        f"{proof['steps']} steps moved, {proof['different']} tokens differ.",
        highlight=False,
    )
    with console.status("Measuring, in turns ..."):
        speeds = _measure(model, session, workers, forwards, rounds)
    _print_speeds(console, speeds)
    for count, mass in masses.items():
        if count > 1:
            _print_mass(console, mass)
    return {
        "alignops": __version__,
        "torch": torch.__version__,
        "isa": testing.active_isa(),
        "threads": torch.get_num_threads(),
        "layout": layout,
        "forwards": forwards,
        "proof": proof,
        "speed": [
            {
                **asdict(speed),
                "against_independent": speed.against_independent,
                "against_one": speed.against_one,
            }
            for speed in speeds
        ],
        "mass": {str(count): mass for count, mass in masses.items()},
    }


def _show(console: Console, session: Any, count: int, forwards: int) -> dict[str, dict[str, float]]:
    """Workers write while somebody looks; returns who attended to whom."""
    made: list[View] = []
    writers = session(
        count,
        sampling=Sampling(temperature=0.7, top_p=0.95),
        mass_every=4,
        stream=lambda piece: made[0].stream(piece),
        on_step=lambda step: made[0].on_step(step),
    )
    made.append(View(console, writers.workers))
    with made[0]:
        for _ in range(forwards):
            if writers.done:
                break
            writers.step()
    if not console.is_terminal:
        for name, text in writers.unfinished.items():
            console.print(
                f"{name} is writing  {' '.join(text.split())}", soft_wrap=True, markup=False
            )
    table: dict[str, dict[str, float]] = writers.stats.mass.table()
    return table


def _prove(model: Any, session: Any, forwards: int) -> dict[str, int]:
    """One worker, greedy, against plain decoding of the same given tokens."""
    pieces: list[Piece] = []
    # The end of text is a token like any other here, for both.
    one = session(1, forbid=(), eos_ids=(), mass_every=0, check_every=0, stream=pieces.append)
    for _ in range(forwards):
        one.step()
    plain = Plain(model, one.prompt_ids)
    sampled = different = 0
    for piece in pieces:
        if not piece.given:
            sampled += 1
            different += plain.next != piece.tokens[0]
        plain.feed(piece.tokens)
    return {"sampled": sampled, "steps": len(one.steps), "different": different}


def _measure(
    model: Any, session: Any, workers: list[int], forwards: int, rounds: int
) -> list[Speed]:
    """Seconds of the same number of forwards, after the prompt, all contestants in turns."""
    found: dict[tuple[str, int], list[float]] = {}
    starts = {count: session(count, mass_every=0) for count in sorted({1, *workers})}
    for start_of in starts.values():
        start_of.step()  # openings, which are longer
    plains = {count: Plain(model, s.prompt_ids, count) for count, s in starts.items()}
    for turn in range(rounds + 1):
        for count, start_of in starts.items():
            ours = start_of.fork()
            start = time.perf_counter()
            for _ in range(forwards):
                ours.step()
            seconds = {"ours": time.perf_counter() - start}
            plain = plains[count].fork()
            start = time.perf_counter()
            for _ in range(forwards):
                plain.feed([plain.next])
            seconds["plain"] = time.perf_counter() - start
            if turn:  # the first one warms up
                for kind, value in seconds.items():
                    found.setdefault((kind, count), []).append(value)
    rate = {key: key[1] * forwards / median(values) for key, values in found.items()}
    return [
        Speed(count, rate["ours", count], rate["plain", count], rate["plain", 1])
        for count in workers
    ]


def _print_speeds(console: Console, speeds: Sequence[Speed]) -> None:
    table = Table(title="Tokens per second, float32", box=SIMPLE, padding=(0, 1, 0, 0))
    for name in (
        "workers",
        "one cache",
        "independent",
        "one run",
        "against\nindep.",
        "against\none",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for speed in speeds:
        table.add_row(
            str(speed.workers),
            f"{speed.tokens_per_second:.1f}",
            f"{speed.independent_tokens_per_second:.1f}",
            f"{speed.one_tokens_per_second:.1f}",
            f"{speed.against_independent:.2f} x",
            f"{speed.against_one:.2f} x",
        )
    console.print(table)
    console.print(
        "Independent: transformers decodes a batch of as many rows, which hold a copy of the "
        "prompt each and do not see each other. One run: a single row."
    )


def _print_mass(console: Console, mass: dict[str, dict[str, float]]) -> None:
    """Who attends to whom; headers together."""
    names = list(mass)
    table = Table(title="Share of attention", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("worker")
    for name in ("prompt,\nhistory", "headers", *names):
        table.add_column(name, justify="right", no_wrap=True)
    for reader, sources in mass.items():
        headers = sum(v for source, v in sources.items() if source not in ("common", *names))
        shares = [sources["common"], headers, *(sources.get(name, 0.0) for name in names)]
        table.add_row(reader, *(f"{share:.1%}" for share in shares))
    console.print(table)
