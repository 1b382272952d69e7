"""`alignops demo ternary`: SmolLM2-135M in 1.25 bits per weight, measured in front of you.

The model is loaded dense, converted, and timed while it generates: as it was in float32 and
bfloat16, and with ternary weights in the lossless and the fast mode, with the output layer as it
was and in int8. Two checks follow: the lossless mode generates the tokens of the dense model that
has the same (dequantized) weights; and the perplexity on text shows what conversion without
training costs.
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from alignops import testing
from alignops._version import __version__
from alignops.demo._common import load_smollm2
from alignops.demo._text import load_corpus
from alignops.integrations.decode import GreedyDecoder
from alignops.ternary import TernaryLinear, convert
from alignops.ternary.convert import model_bytes

PROMPT = "The capital of France is"
WINDOW = 512  # tokens that the model sees at once when its perplexity is measured

Generate = Callable[[int], Tensor]


@dataclass
class Row:
    """One line of the table."""

    model: str
    head: str
    path: str
    bytes_total: int
    bytes_per_token: int
    tokens_per_second: dict[int, float] = field(default_factory=dict)  # by number of threads


def run(
    threads: Sequence[int] | None = None,
    tokens: int = 32,
    compiled: str = "best",
    text_tokens: int = 2048,
    json_path: Path | None = None,
) -> dict[str, Any]:
    """Run the demonstration and print a table.

    Args:
        threads: numbers of threads to measure with; None: 1 and 2, as far as the machine has them.
        tokens: to generate per measurement.
        compiled: which ternary models are measured with the compiled decoder, too: the "best" one,
            "all" or "none". Each takes a minute or so the first time.
        text_tokens: to measure perplexity on, rounded to windows of 512.
        json_path: where the figures go as JSON.

    Returns:
        The figures, as in the JSON file.

    Raises:
        RuntimeError: a package is not installed.
        ValueError: an argument is out of range.
    """
    if tokens < 2 or text_tokens < WINDOW:
        raise ValueError(
            f"run: tokens must be at least 2 and text_tokens at least {WINDOW}, got {tokens} and "
            f"{text_tokens}"
        )
    if compiled not in ("best", "all", "none"):
        raise ValueError(f'run: compiled must be "best", "all" or "none", got {compiled!r}')
    threads = threads or [n for n in (1, 2) if n <= (os.cpu_count() or 1)]
    console = Console()
    before = torch.get_num_threads()
    try:
        figures = _run(console, list(threads), tokens, compiled, text_tokens)
    finally:
        torch.set_num_threads(before)
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=2) + "\n")
        console.print(f"Figures written to {json_path}")
    return figures


def _run(
    console: Console, threads: list[int], tokens: int, compiled: str, text_tokens: int
) -> dict[str, Any]:
    torch.set_num_threads(max(threads))
    with console.status("Loading SmolLM2-135M ..."):
        dense, tokenizer = load_smollm2()
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    rows = []

    def measure(model: Any, name: str, head: str, path: str) -> None:
        with console.status(f"Measuring {name}, {head} head, {path} ..."):
            generate = (
                _compiled(model, prompt, tokens) if path == "compiled" else _eager(model, prompt)
            )
            row = Row(name, head, path, model_bytes(model), bytes_per_token(model))
            for count in threads:
                torch.set_num_threads(count)
                row.tokens_per_second[count] = tokens_per_second(generate, tokens)
            torch.set_num_threads(max(threads))
            rows.append(row)

    measure(dense, "float32", "float32", "eager")
    small = with_dtype(dense, torch.bfloat16)
    measure(small, "bfloat16", "bfloat16", "eager")
    for head in (None, "int8"):
        for act in ("none", "a8g"):
            model = copy.deepcopy(small)
            first = head is None and act == "none"
            convert(model, head=head, act=act, fuse=True, progress=first)
            best = head == "int8" and act == "a8g"
            for path in ("eager", "compiled"):
                if path == "eager" or compiled == "all" or (compiled == "best" and best):
                    measure(model, f"1.25 bits, {act}", head or "bfloat16", path)
    del small, model
    _print_table(console, rows, threads)

    with console.status("Comparing with the dense model that holds the dequantized weights ..."):
        lossless = copy.deepcopy(dense)
        convert(lossless, act="none", fuse=True, progress=False)
        reference = dequantized(dense, lossless)
        ours, theirs = _eager(lossless, prompt)(tokens), _eager(reference, prompt)(tokens)
        same = torch.equal(ours, theirs)
    console.print(
        f"Mode none generates {'the same' if same else '[red]other[/red]'} {tokens} tokens as the "
        "dense float32 model with the dequantized weights."
    )

    with console.status("Measuring perplexity on docstrings of the standard library ..."):
        windows = _windows(tokenizer, text_tokens)
        perplexities = {
            "float32": perplexity(dense, windows),
            "1.25 bits, none": perplexity(lossless, windows),
        }
        for layer in lossless.modules():
            if isinstance(layer, TernaryLinear):
                layer.act = "a8g"
        perplexities["1.25 bits, a8g"] = perplexity(lossless, windows)
    console.print(
        f"\nPerplexity on {windows.numel()} tokens of real text: "
        + ", ".join(f"{name} {value:,.1f}" for name, value in perplexities.items())
        + ".\n[bold]Conversion alone ruins the model[/bold], as every rounding of trained weights "
        "to so few bits does: the speed is real, the text is not. Weights like these have to be "
        "trained, which [bold]alignops demo arenas[/bold] shows."
    )
    return {
        "alignops": __version__,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "isa": testing.active_isa(),
        "threads": threads,
        "tokens": tokens,
        "rows": [asdict(row) for row in rows],
        "same_tokens_as_dequantized": same,
        "perplexity_tokens": windows.numel(),
        "perplexity": perplexities,
    }


# Models


def with_dtype(model: Any, dtype: torch.dtype) -> Any:
    """A copy whose parameters have another dtype; buffers (rotary frequencies) keep theirs."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def dequantized(dense: Any, model: nn.Module) -> Any:
    """A copy of `dense` with the weights of the converted `model`."""
    copied = copy.deepcopy(dense)
    for name, layer in model.named_modules():
        if isinstance(layer, TernaryLinear):
            copied.get_submodule(name).weight.copy_(layer.weight.dequantize())
    return copied


def bytes_per_token(model: Any) -> int:
    """Bytes of weights that one decode step reads: all but the embedding, unless it is the head."""
    embedding = model.get_input_embeddings().weight
    if model.get_output_embeddings().weight is embedding:
        return model_bytes(model)
    unread: int = (embedding.shape[0] - 1) * embedding.shape[1] * embedding.element_size()
    return model_bytes(model) - unread


# Measuring


def tokens_per_second(generate: Generate, tokens: int) -> float:
    """Rate of the tokens after the first, whose time is that of the prompt; the best of three."""
    generate(2)

    def seconds(count: int) -> float:
        start = time.perf_counter()
        generate(count)
        return time.perf_counter() - start

    return max((tokens - 1) / (seconds(tokens) - seconds(1)) for _ in range(3))


def _eager(model: Any, prompt: Tensor) -> Generate:
    def generate(count: int) -> Tensor:
        result: Tensor = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )
        return result

    return generate


def _compiled(model: Any, prompt: Tensor, tokens: int) -> Generate:
    decoder = GreedyDecoder(model, max_length=prompt.shape[1] + tokens)
    return lambda count: decoder.generate(prompt, count)


def _windows(tokenizer: Any, count: int) -> Tensor:
    """Held-out text as tokens (windows, 512)."""
    ids: list[int] = []
    for document in load_corpus(("stdlib",)).held_out:
        ids += [*tokenizer(document).input_ids, tokenizer.eos_token_id]
        if len(ids) >= count:
            break
    return torch.tensor(ids[: count - count % WINDOW]).view(-1, WINDOW)


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    """Exp of the mean negative log-likelihood of the tokens (n, L) after the first of each row."""
    losses = []
    for row in windows:
        logits = model(row[None]).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, row[1:]).item())
    return math.exp(sum(losses) / len(losses))


# Printing


def _print_table(console: Console, rows: list[Row], threads: list[int]) -> None:
    table = Table(title="SmolLM2-135M, greedy decoding", box=SIMPLE, padding=(0, 1, 0, 0))
    for name in ("weights", "head", "path"):
        table.add_column(name, no_wrap=True)
    for name in ("MB", "MB a\ntoken"):
        table.add_column(name, justify="right", no_wrap=True)
    for count in threads:
        heading = f"tok/s\n{count} thr."
        table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("to\nbf16", justify="right", no_wrap=True)
    base = next(row for row in rows if row.model == "bfloat16").tokens_per_second
    for row in rows:
        cells = [row.model, row.head, row.path]
        cells += [f"{row.bytes_total / 1e6:.1f}", f"{row.bytes_per_token / 1e6:.1f}"]
        for count in threads:
            rate = row.tokens_per_second[count]
            cells += [f"{rate:.1f}", f"{rate / base[count]:.1f}x"]
        table.add_row(*cells)
    console.print(table)
