"""The kernels of the speculative core compiled ahead, see tests.triton_ahead; run as a program."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch

from alignops.triton_kernels import (
    speculative,
    speculative_chains,
    speculative_decide,
    speculative_draw,
    speculative_rows,
    speculative_rsd,
    speculative_stats,
    speculative_trees,
)
from alignops.triton_kernels.speculative_launch import DESCEND, Drafts, Rule, Warp, Words
from tests import triton_ahead
from tests.speculative.triton_batches import outputs

MODULES = [
    speculative_chains,
    speculative_decide,
    speculative_draw,
    speculative_rows,
    speculative_rsd,
    speculative_stats,
    speculative_trees,
]
TYPICAL = speculative_chains.RULES.index("typical")


def names() -> list[str]:
    """All kernels."""
    return [name for module in MODULES for name in triton_ahead.kernels_of(module)]


def look(arguments: dict[str, Any], compiled: Any) -> dict[str, Any]:
    """How it rounds."""
    assert arguments["enable_fp_fusion"] is False
    ptx = compiled.asm["ptx"]
    return {
        "typical": arguments.get("RULE") == TYPICAL or compiled.name == "entropy_kernel",
        "fused32": len(re.findall(r"\bfma\.\S*f32", ptx)),
        "fused64": len(re.findall(r"\bfma\.\S*f64", ptx)),
        "products": len(re.findall(r"\bmul\.(?:rn\.)?f32", ptx)),
        "loose": len(re.findall(r"\b(?:div|rcp|ex2|lg2)\.(?:full|approx)|\.ftz\b", ptx)),
    }


def launch_all() -> None:
    """Every launcher, with what changes the code of its kernels."""
    b, k, v = 4, 3, 9000
    numbers, reals = torch.zeros(b, dtype=torch.int32), torch.ones(b)
    ids, tokens = (torch.zeros(b, n, dtype=torch.int64) for n in (k, k + 1))
    seeds = torch.zeros(b, dtype=torch.int64)
    words = Words(seeds, seeds)
    given = Words(seeds, seeds, torch.zeros(b, k + 1, 2, dtype=torch.uint32))
    plain, cut = Warp(reals), Warp(reals, numbers, reals, reals)
    logits = torch.zeros(b, k + 1, v, dtype=torch.bfloat16)
    drafter = logits[:, :k]
    live = torch.ones(b, dtype=torch.bool)
    state = torch.zeros(b, dtype=torch.uint8)
    starts = torch.ones(v, dtype=torch.bool)
    out = outputs(b, k + 1)
    chain, whole = Drafts(ids, (b, k), numbers, None, live), Drafts(ids, (b, k))
    packed = Drafts(ids, (b, k), None, numbers.new_zeros(b + 1))
    rows, probabilities = torch.rand(2 * b, v), torch.rand(b, k, v)
    more: dict[str, Any] = {"eos_ids": (3, 7), "remaining": numbers, "state": state}
    for name in speculative_chains.RULES:
        rule = Rule(name, given=numbers, word_start=starts)
        warp = cut if name == "lossless" else plain
        speculative.verify(logits, chain, rule, warp, words, out, draft=drafter, **more)
    descend = Rule("rsd", retry=DESCEND, warped=True)
    speculative.verify(rows, packed, descend, plain, given, out, draft=probabilities, is_probs=True)
    stats = torch.zeros(b, k, 6, dtype=torch.int64)
    lossless = Rule("lossless")
    speculative.verify(logits, whole, lossless, plain, words, out, draft=drafter, draft_stats=stats)
    for race in (False, True):
        speculative.propose(logits[:, 0], words, cut, seeds, stats[:, 0], state, race=race)
    path = torch.zeros(b, k + 1, dtype=torch.int32)
    for tree in range(3):
        speculative.verify_tree(
            *(logits, tokens, tokens, tree, plain, words, path, out),
            draft=logits if tree == 2 else None,
            eos_ids=(3,),
            active=live,
        )


if __name__ == "__main__":
    with triton_ahead.recorded(MODULES, look) as found:
        launch_all()
    json.dump(found, sys.stdout)
