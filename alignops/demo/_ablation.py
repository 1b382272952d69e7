"""What Arenas changes, on a language model small enough to train on one CPU core.

The same decoder (about three million parameters) is trained from scratch on the docstrings of the
installed packages, with its linear layers dense, 3:4 ternary or binary, the latter two with and
without the Arenas residual. Everything else (text, order of the batches, initial weights,
optimizer, learning rate) is the same for all configurations of a seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignops.demo._text import Corpus
from alignops.ternary import quantize
from alignops.ternary.arenas import ArenasSchedule, prepare_arenas
from alignops.ternary.diagnostics import effective_rank

CONFIGURATIONS = ("dense", "3:4 + Arenas", "3:4 direct", "1-bit + Arenas", "1-bit direct")
HISTOGRAM_EDGES = [i / 20 for i in range(81)]  # of |w| / alpha, 0..4


@dataclass(frozen=True)
class Setting:
    """Everything that defines a run besides configuration and seed."""

    vocabulary: int = 2048
    width: int = 256
    layers: int = 4
    heads: int = 4
    hidden: int = 512
    context: int = 128
    batch: int = 8
    steps: int = 1000
    warmup: int = 50
    learning_rate: float = 6e-4
    residual_share: float = 1.0  # of the steps, after which lambda is 0
    residual_peak: float = 1.0  # largest lambda
    evaluate_every: int = 100
    evaluate_windows: int = 128
    measure_every: int = 50


class Block(nn.Module):
    mask: Tensor

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        width, hidden = setting.width, setting.hidden
        self.heads = setting.heads
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)
        future = torch.full((setting.context, setting.context), -math.inf).triu(1)
        self.register_buffer("mask", future, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_attention(x)
        q, k, v = (
            project(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        # Written out: for heads this small it is several times faster on CPU than the fused form.
        scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5 + self.mask[
            : x.shape[1], : x.shape[1]
        ]
        attended = scores.softmax(-1).to(v.dtype) @ v
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        h = self.norm_mlp(x)
        mixed: Tensor = self.down(F.silu(self.gate(h)) * self.up(h))
        return x + mixed


class SmallLM(nn.Module):
    """Pre-norm decoder with learned positions, SwiGLU and a head tied to the embedding."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.embedding = nn.Embedding(setting.vocabulary, setting.width)
        self.position = nn.Embedding(setting.context, setting.width)
        self.blocks = nn.ModuleList(Block(setting) for _ in range(setting.layers))
        self.norm = nn.RMSNorm(setting.width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("o.weight", "down.weight"))
                scale = math.sqrt(2 * setting.layers) if into_residual else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, context, vocabulary) of tokens (B, context)."""
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)


class BinaryLinear(nn.Linear):
    """1-bit weights, sign times the mean magnitude of the row, by the rules of `ArenasLinear`."""

    schedule: ArenasSchedule

    def forward(self, x: Tensor) -> Tensor:
        latent = self.weight.detach()
        binary = torch.where(latent < 0, -1.0, 1.0) * latent.abs().mean(1, keepdim=True)
        lam = self.schedule.tensor(x.device) if self.training else torch.zeros(())
        # The last term is zero; it carries the straight-through gradient, (1 + lambda) g^T x.
        weight = binary + lam * latent + (1 + lam) * (self.weight - latent)
        return F.linear(x, weight, self.bias)


def _prepare(model: SmallLM, configuration: str, setting: Setting) -> ArenasSchedule | None:
    """Swaps the linear layers of the blocks in place; the schedule of lambda, None for dense."""
    if configuration == "dense":
        return None
    bits, _, residual = configuration.partition(" ")
    peak = 0.0 if residual == "direct" else setting.residual_peak
    schedule = ArenasSchedule(round(setting.residual_share * setting.steps), max_lambda=peak)
    if bits == "3:4":
        prepare_arenas(model, schedule)
    else:
        for module in list(model.modules()):
            if type(module) is nn.Linear:
                module.__class__ = BinaryLinear
                module.schedule = schedule  # type: ignore[assignment]
    return schedule


@torch.no_grad()
def _quantized(weight: Tensor, configuration: str) -> tuple[Tensor, Tensor]:
    """Codes (N, K) in {-1, 0, 1} and alpha (N, 1) of a latent weight."""
    if configuration.startswith("1-bit"):
        return torch.where(weight < 0, -1, 1), weight.abs().mean(1, keepdim=True)
    grid = quantize(weight).dequantize()
    return grid.sign().long(), grid.abs().amax(1, keepdim=True)


def _latent(weights: dict[str, Tensor], configuration: str) -> dict[str, Any]:
    """Distribution of |w| / alpha over all quantized layers."""
    scaled = torch.cat(
        [(w.detach().abs() / _quantized(w, configuration)[1]).flatten() for w in weights.values()]
    )
    counts = torch.histc(scaled.clamp(max=4.0), len(HISTOGRAM_EDGES) - 1, 0.0, 4.0)
    return {
        "histogram": [round(share, 6) for share in (counts / counts.sum()).tolist()],
        "near_scale": ((scaled >= 0.8) & (scaled <= 1.2)).float().mean().item(),
        "near_zero": (scaled < 0.2).float().mean().item(),
    }


class Text:
    """Token streams of a corpus under a byte-pair vocabulary trained on its training part."""

    def __init__(self, corpus: Corpus, vocabulary: int) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(
            corpus.train,
            trainers.BpeTrainer(
                vocab_size=vocabulary,
                special_tokens=["<|end|>"],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )

        def stream(documents: list[str]) -> Tensor:
            encoded = tokenizer.encode_batch(documents)
            return torch.tensor([token for document in encoded for token in (*document.ids, 0)])

        self.digest = corpus.digest
        self.train, self.held_out = stream(corpus.train), stream(corpus.held_out)
        held_out_bytes = sum(len(document.encode()) + 1 for document in corpus.held_out)
        self.bytes_per_token = held_out_bytes / len(self.held_out)


def _loss(model: SmallLM, windows: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def _held_out_loss(model: SmallLM, text: Text, setting: Setting) -> float:
    """Mean loss of the first windows of the held-out text, as deployed: eval mode, lambda = 0."""
    length = setting.context + 1
    count = min(setting.evaluate_windows, len(text.held_out) // length)
    windows = text.held_out[: count * length].view(count, length)
    model.eval()
    losses = [_loss(model, batch).item() for batch in windows.split(setting.batch)]
    model.train()
    return sum(losses) / len(losses)


def _learning_rate(setting: Setting) -> Callable[[int], float]:
    """Linear warm-up, then a half cosine down to a tenth."""

    def factor(step: int) -> float:
        if step < setting.warmup:
            return (step + 1) / setting.warmup
        done = (step - setting.warmup) / (setting.steps - setting.warmup)
        return 0.55 + 0.45 * math.cos(math.pi * done)

    return factor


def train(
    configuration: str,
    seed: int,
    text: Text,
    setting: Setting,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains one model.

    Returns:
        dict: the setting; `loss` per step; `held_out` [step, loss in nats per token]; `rank`
        [step, mean effective rank of the weight gradients]; `flips` [step, share of weights whose
        code this step changed]; the latent weights |w| / alpha at start and end (for the dense
        model alpha is the 3:4 scale, which it never uses); for the dense model the held-out loss
        after plain conversion to 3:4; seconds.
    """
    started = time.perf_counter()
    torch.manual_seed(seed)
    model = SmallLM(setting)
    schedule = _prepare(model, configuration, setting)
    weights: dict[str, Tensor] = {
        name: module.weight
        for name, module in model.blocks.named_modules()
        if isinstance(module, nn.Linear)
    }
    optimizer = torch.optim.AdamW(
        model.parameters(), setting.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    if schedule is not None:
        schedule.attach(optimizer)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate(setting))
    batches = torch.Generator().manual_seed(seed)
    offsets = torch.arange(setting.context + 1)

    at_start = _latent(weights, configuration)
    loss_of_step: list[float] = []
    held_out: list[tuple[int, float]] = []
    rank: list[tuple[int, float]] = []
    flips: list[tuple[int, float]] = []
    for step in range(setting.steps):
        measure = step % setting.measure_every == 0
        starts = torch.randint(
            len(text.train) - setting.context, (setting.batch, 1), generator=batches
        )
        loss = _loss(model, text.train[starts + offsets])
        loss.backward()
        loss_of_step.append(round(loss.item(), 4))
        if measure:
            gradients = [weight.grad for weight in weights.values()]
            ranks = [effective_rank(gradient) for gradient in gradients if gradient is not None]
            rank.append((step, round(sum(ranks) / len(ranks), 2)))
            before = {name: _quantized(w, configuration)[0] for name, w in weights.items()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        if measure:
            changed = sum(
                int((_quantized(w, configuration)[0] != before[name]).sum())
                for name, w in weights.items()
            )
            flips.append((step, changed / sum(w.numel() for w in weights.values())))
        if (step + 1) % setting.evaluate_every == 0 or step + 1 == setting.steps:
            held_out.append((step + 1, round(_held_out_loss(model, text, setting), 4)))
            report(f"{configuration}, seed {seed}: step {step + 1}, held out {held_out[-1][1]:.3f}")

    result = {
        "configuration": configuration,
        "seed": seed,
        "setting": asdict(setting),
        "text": {
            "digest": text.digest,
            "train_tokens": len(text.train),
            "held_out_tokens": len(text.held_out),
            "bytes_per_token": round(text.bytes_per_token, 4),
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "quantized_parameters": sum(w.numel() for w in weights.values()),
        "loss": loss_of_step,
        "held_out": held_out,
        "rank": rank,
        "flips": flips,
        "latent_at_start": at_start,
        "latent_at_end": _latent(weights, configuration),
        "seconds": round(time.perf_counter() - started, 1),
    }
    if configuration == "dense":
        prepare_arenas(model, ArenasSchedule(1))
        result["held_out_converted"] = round(_held_out_loss(model, text, setting), 4)
    return result
