"""Whether a model computes a row the same way wherever it is: what `stable=True` relies on."""

from __future__ import annotations

import torch
from torch import Tensor

from alignops._checks import check
from alignops.speculative.adapter import ModelAdapter
from alignops.speculative.placement import StablePlacement
from alignops.speculative.stats import SpecStats

# Tokens of the sequence that is computed again and again.
_LENGTH = 24


def check_row_invariance(target: ModelAdapter, B: int, Q: int) -> None:
    """Check that logits of a row do not depend on its slot, its neighbours, or the query's column.

    The same sequence is computed in other rows of the batch, beside other sequences, alone, and in
    pieces that begin at every other column; keys, values and logits must be equal bit for bit.

    Args:
        target: the model.
        B: rows.
        Q: columns of every forward, K + 1.

    Raises:
        ValueError: B or Q is below 1.
        RuntimeError: they differ; names the first layer whose keys or values do.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from alignops.integrations.speculative import HFAdapter
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=99))
        >>> check_row_invariance(HFAdapter(model.eval()), B=2, Q=4)
    """
    check(B >= 1, f"check_row_invariance: B must be at least 1, got {B}")
    check(Q >= 1, f"check_row_invariance: Q must be at least 1, got {Q}")
    check(
        "ragged" in target.layouts,
        f"check_row_invariance: the model must allow for the layout ragged, has {target.layouts}",
    )
    most = _LENGTH if target.max_length is None else min(_LENGTH, target.max_length)
    generator = torch.Generator().manual_seed(B + Q)
    others = torch.randint(target.vocab_size, (2, B, most), generator=generator)
    tokens = others[0, 0].to(target.device)
    expected = _compute(target, B, Q, 0, tokens, others[0], first=Q)
    elsewhere = [(B, (B - first) % B, first) for first in range(1, Q + 1)]
    for rows, row, first in [(B, B - 1, Q), (1, 0, Q), *elsewhere]:
        found = _compute(target, rows, Q, row, tokens, others[1, :rows], first)
        for i, (a, b) in enumerate(zip(expected, found, strict=True)):
            if not torch.equal(a, b):
                last = i == len(expected) - 1
                where = "the logits" if last else f"keys or values of layer {i // 2}"
                raise RuntimeError(
                    f"check_row_invariance: {where} of a row depend on its slot, neighbours or "
                    f"column at B={B}, Q={Q}: with stable=True this model would not be exact"
                )


def _compute(
    target: ModelAdapter, B: int, Q: int, row: int, tokens: Tensor, others: Tensor, first: int
) -> list[Tensor]:
    """Keys and values of a sequence in a row, and logits behind its last token.

    The first forward takes `first` tokens of it, the others Q.
    """
    length = len(tokens)
    placement = StablePlacement(target, B, length + 2 * Q, SpecStats(target.device), Q)
    device = target.device
    beside = others.to(device)
    done, logits = 0, torch.empty(0)
    while done < length:
        taken = min(first if done == 0 else Q, length - done)
        ids = beside[:, :Q].clone()
        if ids.shape[1] < Q:
            ids = torch.cat([ids, ids.new_zeros(B, Q - ids.shape[1])], dim=1)
        ids[row, :taken] = tokens[done : done + taken]
        starts = [(3 * r) % length for r in range(B)]
        starts[row] = done
        logits = placement.forward_at(ids, starts)[row, taken - 1]
        done += taken
    return [*(t[row, :, :length] for t in placement.cache.tensors), logits]
