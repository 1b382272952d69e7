"""`alignops demo arenas`: trains SmolLM2-135M towards 1.25-bit weights, with itself as the teacher.

The student starts as a copy of the original, its linear layers under Arenas. On docstrings of the
installed packages it learns to give the original's next-token distributions and hidden states.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignops.demo import _ablation
from alignops.demo._common import load_smollm2
from alignops.demo._text import load_corpus
from alignops.ternary.arenas import ArenasSchedule, finalize, prepare_arenas
from alignops.ternary.diagnostics import codes, flip_rate, latent_shares

PACKAGES = ("stdlib", "torch", "numpy", "sympy", "networkx")


@dataclass(frozen=True)
class Setting:
    """What a checkpoint has to agree on."""

    context: int = 128
    batch: int = 4
    learning_rate: float = 1e-3
    warmup_share: float = 0.05
    hidden_weight: float = 1.0
    residual: bool = True
    seed: int = 0


def _relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """Squared error over squared norm, token by token: a few tokens have enormous states."""
    difference = (ours.float() - theirs.float()).square().sum(-1)
    return (difference / theirs.float().square().sum(-1)).mean()


class Distillation:
    """Student, teacher, optimizer and schedule: what a checkpoint resumes bit for bit.

    Args:
        model: the original, a causal language model of transformers in float32.
        train, held_out: token streams, int64, on the device of the model.
        steps: optimizer steps of the whole training.
    """

    def __init__(
        self, model: nn.Module, train: Tensor, held_out: Tensor, steps: int, setting: Setting
    ) -> None:
        self.train_tokens, self.held_out_tokens = train, held_out
        self.setting, self.steps = setting, steps
        self.student = copy.deepcopy(model).train()
        self.teacher = copy.deepcopy(model).to(torch.bfloat16).eval().requires_grad_(False)
        self.schedule = ArenasSchedule(steps, max_lambda=1.0 if setting.residual else 0.0)
        prepare_arenas(self.student, self.schedule)
        self.student.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
        self.trained = {n: p for n, p in self.student.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(),
            setting.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=True,
        )
        self.schedule.attach(self.optimizer)
        self.batches = torch.Generator().manual_seed(setting.seed)

    def _loss(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher = self.teacher(windows, output_hidden_states=True)
        with self._autocast():
            student = self.student(windows, output_hidden_states=True)
        divergence = F.kl_div(
            F.log_softmax(student.logits.float().flatten(0, 1), -1),
            F.log_softmax(teacher.logits.float().flatten(0, 1), -1),
            reduction="batchmean",
            log_target=True,
        )
        pairs = zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True)
        hidden = torch.stack([_relative_error(ours, theirs) for ours, theirs in pairs]).mean()
        return divergence, hidden

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.train_tokens.device.type, torch.bfloat16)

    def step(self) -> tuple[float, float]:
        """One optimizer step; returns divergence (nats per token) and hidden-state error."""
        setting, t = self.setting, self.schedule.t
        warmup = max(1, round(setting.warmup_share * self.steps))
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(t / self.steps, 1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = setting.learning_rate * min((t + 1) / warmup, 1.0) * cosine
        starts = torch.randint(
            len(self.train_tokens) - setting.context, (setting.batch, 1), generator=self.batches
        )
        places = (starts + torch.arange(setting.context)).to(self.train_tokens.device)
        divergence, hidden = self._loss(self.train_tokens[places])
        (divergence + setting.hidden_weight * hidden).backward()
        torch.nn.utils.clip_grad_norm_(list(self.trained.values()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return divergence.item(), hidden.item()

    def seconds_per_step(self) -> float:
        """Measured on a forward and backward pass; changes nothing that a step would change."""
        windows = self.train_tokens[: self.setting.batch * self.setting.context]
        for _ in range(2):  # the first pass also allocates
            started = time.perf_counter()
            divergence, hidden = self._loss(windows.view(self.setting.batch, -1))
            (divergence + hidden).backward()
        self.optimizer.zero_grad()
        return time.perf_counter() - started

    @torch.no_grad()
    def perplexity(self, model: nn.Module, windows: int = 16) -> float:
        """Of the first windows of the held-out text; a ternary student counts as deployed."""
        length = self.setting.context
        tokens = self.held_out_tokens[: windows * length].view(windows, length)
        training = model.training
        model.eval()
        total = 0.0
        for batch in tokens.split(self.setting.batch):
            with self._autocast():
                logits = model(batch).logits[:, :-1]
            total += F.cross_entropy(
                logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
            ).item()
        model.train(training)
        return math.exp(total / (windows * (length - 1)))

    def state_dict(self) -> dict[str, Any]:
        """Weights in training, optimizer, schedule, and the place in the stream of batches."""
        return {
            "setting": asdict(self.setting),
            "weights": {name: p.detach() for name, p in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "batches": self.batches.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was saved; ValueError if that was under another setting."""
        if state["setting"] != asdict(self.setting):
            raise ValueError(
                f"checkpoint must have the setting {asdict(self.setting)}, got {state['setting']}"
            )
        self.schedule.load_state_dict(state["schedule"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.set_state(state["batches"])
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(state["weights"][name])

    def save(self, path: Path) -> None:
        """Writes a checkpoint; an interrupted write leaves the old one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        torch.save(self.state_dict(), temporary)
        temporary.replace(path)


def run(
    minutes: float = 8.0,
    steps: int | None = None,
    checkpoint: Path = Path("arenas-smollm2.pt"),
    resume: bool = False,
    setting: Setting | None = None,
    echo: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains the student and reports what it is worth.

    Args:
        minutes: how long to train, about; sets the number of steps where `steps` is not given.
        steps: optimizer steps, over which lambda rises and returns to 0.
        checkpoint: written every two minutes, at the end and on Ctrl-C.
        resume: continue from `checkpoint` to the end it was planned for.
        setting: lengths, rates and the seed.
        echo: takes the lines of the report.

    Returns:
        dict: held-out perplexities of the original, of plain conversion and after training, the
        course of the training, and the settings. Also written next to the checkpoint as JSON.
    """
    setting = setting or Setting()
    state = torch.load(checkpoint, map_location="cpu", weights_only=True) if resume else None
    echo("Loading SmolLM2-135M and the docstrings of the installed packages ...")
    model, tokenizer = load_smollm2()
    corpus = load_corpus(PACKAGES)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    end = tokenizer.eos_token_id
    train, held_out = (
        torch.tensor([i for ids in tokenizer(texts)["input_ids"] for i in (*ids, end)]).to(device)
        for texts in (corpus.train, corpus.held_out)
    )
    echo(f"Text: {len(train):,} tokens to train on, {len(held_out):,} held out, {corpus.digest}")

    if state is not None:
        steps = int(state["schedule"]["total_steps"])
    elif steps is None:
        seconds = Distillation(model, train, held_out, 1, setting).seconds_per_step()
        steps = max(10, int(60 * minutes / (1.25 * seconds)))
        echo(f"{seconds:.1f} s per step on {torch.get_num_threads()} threads: {steps} steps")
    work = Distillation(model, train, held_out, steps, setting)
    perplexity = {"original": work.perplexity(work.teacher)}
    echo(f"Held-out perplexity of the original (bfloat16): {perplexity['original']:.2f}")
    perplexity["converted"] = work.perplexity(work.student)
    echo(f"Converted to 1.25 bits, not trained: {perplexity['converted']:.3g}")
    if state is not None:
        work.load_state_dict(state)
        echo(f"Resumed at step {work.schedule.t} of {steps}")

    history = _train(work, checkpoint, echo)
    result: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "text": {"digest": corpus.digest, "train": len(train), "held_out": len(held_out)},
        "setting": asdict(setting),
        "threads": torch.get_num_threads(),
        "steps": steps,
        "tokens": work.schedule.t * setting.batch * setting.context,
        "history": history,
    }
    if work.schedule.value == 0:
        shares = latent_shares(work.student)
        finalize(work.student)
        perplexity["trained"] = work.perplexity(work.student)
        result["latent_shares"] = shares._asdict()
        result["sample"] = _sample(work.student, tokenizer)
        echo(f"After {steps} steps of Arenas, 1.25 bits: {perplexity['trained']:.4g}")
        echo(f"It continues {result['sample']['prompt']!r} with {result['sample']['text']!r}")
    result["perplexity"] = perplexity
    checkpoint.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    echo(
        f"{result['tokens']:,} tokens of training are a proof that the mechanism works, not a "
        "usable model: the paper trains on 10,000,000,000. For quality, train far longer, on a GPU."
    )
    return result


def _train(
    work: Distillation, checkpoint: Path, echo: Callable[[str], None]
) -> list[dict[str, float]]:
    """Runs the remaining steps; returns a record of every tenth of the training."""
    every = max(1, work.steps // 10)
    history: list[dict[str, float]] = []
    started = saved = time.perf_counter()
    before = codes(work.student)
    try:
        while work.schedule.t < work.steps:
            lam = work.schedule.value
            divergence, hidden = work.step()
            if work.schedule.t % every == 0 or work.schedule.t == work.steps:
                after = codes(work.student)
                record = {
                    "step": work.schedule.t,
                    "lambda": lam,
                    "divergence": divergence,
                    "hidden": hidden,
                    "flipped": flip_rate(before, after),
                    "perplexity": work.perplexity(work.student),
                    "seconds": time.perf_counter() - started,
                }
                before = after
                history.append(record)
                echo(
                    "step {step}: lambda {lambda:.3f}, divergence {divergence:.3f}, hidden-state "
                    "error {hidden:.3f}, codes flipped {flipped:.1%}, held-out perplexity "
                    "{perplexity:.4g}, {seconds:.0f} s".format(**record)
                )
            if time.perf_counter() - saved > 120:
                work.save(checkpoint)
                saved = time.perf_counter()
    except KeyboardInterrupt:
        echo(f"Interrupted at step {work.schedule.t}; --resume continues from {checkpoint}")
    work.save(checkpoint)
    return history


@torch.no_grad()
def _sample(model: nn.Module, tokenizer: Any) -> dict[str, str]:
    prompt = "Return the number of elements in the"
    ids = tokenizer(prompt, return_tensors="pt").to(next(model.parameters()).device)
    model.eval()
    out = model.generate(**ids, max_new_tokens=24, do_sample=False)  # type: ignore[operator]
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"prompt": prompt, "text": text}


def ablate(
    steps: int | None = None, seeds: int = 1, echo: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Trains a small language model from scratch in every configuration and compares them.

    Returns:
        list: the record of every run, see `alignops.demo._ablation.train`.
    """
    setting = _ablation.Setting() if steps is None else _ablation.Setting(steps=steps)
    echo("Reading the docstrings of the installed packages ...")
    text = _ablation.Text(load_corpus(), setting.vocabulary)
    runs = [
        _ablation.train(configuration, seed, text, setting, echo)
        for seed in range(seeds)
        for configuration in _ablation.CONFIGURATIONS
    ]
    echo(f"Held-out loss after {setting.steps} steps, nats per token, as deployed:")
    for run_ in runs:
        echo(f"  {run_['configuration']:15} seed {run_['seed']}: {run_['held_out'][-1][1]:.3f}")
    return runs
