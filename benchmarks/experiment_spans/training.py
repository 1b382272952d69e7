"""Pretraining, refusal tuning and preference tuning of the small model."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from alignops.demo._ablation import Setting as Shape
from alignops.demo._ablation import SmallLM
from alignops.spans import TraceShield, cbd_dpo_loss, cbd_weights
from benchmarks.experiment_spans import templates as t
from benchmarks.experiment_spans.world import END, STYLES, Good, World, Writer


@dataclass(frozen=True)
class Setting:
    """All that defines a run besides the seed; lambdas is of the runs with CBD."""

    width: int = 256
    layers: int = 3
    heads: int = 4
    hidden: int = 512
    context: int = 128
    batch: int = 16
    learning_rate: float = 1.5e-3
    exposures: int = 20
    refusal_steps: int = 80
    refusal_learning_rate: float = 3e-4
    refusal_share: float = 0.5  # of the procedures whose plain question tuning refuses
    preference_steps: int = 60
    preference_batch: int = 16
    preference_learning_rate: float = 2e-5
    helpful_share: float = 0.5  # of the preference pairs that prefer an answer that tells
    refusing_share: float = 0.1  # of them that prefer a refusal; the others are harmless
    beta: float = 0.1
    lam: float = 0.01


@dataclass(frozen=True)
class Pair:
    """A request and two answers, of which the first was preferred."""

    prompt: str
    chosen: str
    rejected: str


def shape(world: World, setting: Setting) -> Shape:
    return Shape(
        vocabulary=len(world.vocabulary),
        width=setting.width,
        layers=setting.layers,
        heads=setting.heads,
        hidden=setting.hidden,
        context=setting.context,
    )


def _optimizer(
    model: SmallLM, rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(
        model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    warmup = max(1, min(50, steps // 10))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _update(
    loss: Tensor,
    model: SmallLM,
    optimizer: torch.optim.Optimizer,
    rate: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    rate.step()


def pretrain(world: World, setting: Setting, report: Callable[[str], None]) -> SmallLM:
    """A model that has read the harmless text once and the procedures `exposures` times."""
    torch.manual_seed(world.seed)
    documents = world.harmless + world.unsafe_training * setting.exposures
    random.Random(world.seed).shuffle(documents)
    stream = torch.tensor([i for text in documents for i in (0, *world.encode(text))])
    size = setting.context + 1
    windows = stream[: len(stream) // size * size].view(-1, size)
    model = SmallLM(shape(world, setting))
    steps = len(windows) // setting.batch
    optimizer, rate = _optimizer(model, setting.learning_rate, steps)
    for step in range(steps):
        batch = windows[step * setting.batch : (step + 1) * setting.batch]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        _update(loss, model, optimizer, rate)
        if step % 100 == 99:
            report(f"pretraining {step + 1}/{steps}: loss {loss.item():.3f}")
    return model


def refusal(writer: Writer, world: World, good: Good) -> str:
    other = writer.rng.choice(world.safe).title
    return writer.fill(writer.rng.choice(t.REFUSALS), good=good.title, other=other)


def refusal_examples(world: World, setting: Setting, writer: Writer) -> Iterator[tuple[str, str]]:
    """Requests and answers without end: refusals of plain unsafe questions, answers to harmless
    ones, and harmless text, so that the rest is not forgotten."""
    rng = writer.rng
    asked = [g for i, g in enumerate(world.unsafe) if i % 10 < 10 * setting.refusal_share]
    while True:
        draw = rng.random()
        if draw < 0.3:
            prompt = writer.prompt(rng.choice(asked), "plain", rng.randrange(2))
            yield prompt.dialogue, refusal(writer, world, prompt.good)
        elif draw < 0.6:
            prompt = writer.prompt(rng.choice(world.tuned), rng.choice(STYLES))
            yield prompt.dialogue, writer.answer(prompt)
        else:
            yield END, rng.choice(world.harmless)


def preference_pairs(world: World, setting: Setting, writer: Writer, count: int) -> list[Pair]:
    """Preferences as annotators might have given them.

    Refusals are preferred to answers that tell for plain unsafe questions, and answers to refusals
    for harmless requests. In `helpful_share` of the pairs an unsafe request is dressed up and the
    answer that tells is preferred: the unsafe spans in preferred answers that CBD is about.
    """
    rng, pairs = writer.rng, []
    for _ in range(count):
        draw = rng.random()
        if draw < setting.helpful_share:
            prompt = writer.prompt(rng.choice(world.unsafe), rng.choice(STYLES[1:]))
            chosen, rejected = writer.answer(prompt), refusal(writer, world, prompt.good)
        elif draw < setting.helpful_share + setting.refusing_share:
            prompt = writer.prompt(rng.choice(world.unsafe), "plain")
            chosen, rejected = refusal(writer, world, prompt.good), writer.answer(prompt)
        else:
            prompt = writer.prompt(rng.choice(world.tuned), rng.choice(STYLES))
            chosen, rejected = writer.answer(prompt), refusal(writer, world, prompt.good)
        pairs.append(Pair(prompt.dialogue, chosen, rejected))
    return pairs


def _padded(world: World, texts: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) of prompt and answer with the end of text, and which of them are the answer."""
    rows = [(world.encode(prompt), [*world.encode(text), 0]) for prompt, text in texts]
    width = max(len(a) + len(b) for a, b in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (a, b) in enumerate(rows):
        tokens[i, : len(a) + len(b)] = torch.tensor(a + b)
        mask[i, len(a) : len(a) + len(b)] = True
    return tokens, mask


def token_logps(model: SmallLM, tokens: Tensor) -> Tensor:
    """Log-probability of each token but the first, float32 (B, T-1)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens[:, :-1])
    return -F.cross_entropy(
        logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    ).view(len(tokens), -1)


def tune_refusals(
    model: SmallLM, world: World, setting: Setting, report: Callable[[str], None]
) -> SmallLM:
    """A copy of the model that answers and refuses in dialogues."""
    model = copy.deepcopy(model)
    writer = Writer(random.Random(world.seed + 1000), world.lexicon)
    examples = refusal_examples(world, setting, writer)
    steps = setting.refusal_steps
    optimizer, rate = _optimizer(model, setting.refusal_learning_rate, steps)
    for step in range(steps):
        tokens, mask = _padded(world, [next(examples) for _ in range(2 * setting.batch)])
        loss = -token_logps(model, tokens)[mask[:, 1:]].mean()
        _update(loss, model, optimizer, rate)
        if step % 50 == 49:
            report(f"refusal tuning {step + 1}/{steps}: loss {loss.item():.3f}")
    return model


def tune_preferences(
    model: SmallLM,
    world: World,
    setting: Setting,
    shield: TraceShield | None,
    report: Callable[[str], None],
) -> SmallLM:
    """A copy of the model after DPO; with a shield, with the CBD term of its spans.

    Both see the same pairs in the same order.
    """
    reference, model = model, copy.deepcopy(model)
    writer = Writer(random.Random(world.seed + 2000), world.lexicon)
    steps, size = setting.preference_steps, setting.preference_batch
    pairs = preference_pairs(world, setting, writer, steps * size)
    optimizer, rate = _optimizer(model, setting.preference_learning_rate, steps)
    for step in range(steps):
        batch = pairs[step * size : (step + 1) * size]
        chosen, mask_w = _padded(world, [(p.prompt, p.chosen) for p in batch])
        rejected, mask_l = _padded(world, [(p.prompt, p.rejected) for p in batch])
        with torch.no_grad():
            ref_w, ref_l = token_logps(reference, chosen), token_logps(reference, rejected)
        masks = mask_w[:, 1:], mask_l[:, 1:]
        weights = torch.zeros(chosen.shape)
        if shield is not None:
            answers = [row[own] for row, own in zip(chosen, mask_w, strict=True)]
            weights[mask_w] = cbd_weights(shield, answers)
        loss = cbd_dpo_loss(
            token_logps(model, chosen),
            token_logps(model, rejected),
            ref_w,
            ref_l,
            masks,
            weights[:, 1:],
            beta=setting.beta,
            lam=0.0 if shield is None else setting.lam,
        )
        _update(loss, model, optimizer, rate)
        if step % 50 == 49:
            report(f"preference tuning {step + 1}/{steps}: loss {loss.item():.3f}")
    return model
