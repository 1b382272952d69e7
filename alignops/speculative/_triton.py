"""Registers the Triton kernels as operators on CUDA tensors; the first call imports triton.

Verification on a GPU is Triton's: there is no second implementation. Checks and shapes are those of
the fake kernels. What lies in device memory is not read to be checked: kernels stay inside the
tensors whatever `cu`, ids and nodes say, and report rows that cannot be decided.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignops._checks import check_devices
from alignops.speculative import verify_ops

_library = torch.library.Library("alignops", "FRAGMENT")


def _kernels() -> Any:
    from alignops.triton_kernels import speculative

    return speculative


def _warp(
    like: Tensor,
    rows: int,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> Any:
    if temperature is None:
        temperature = like.new_ones(rows, dtype=torch.float32)
    return _kernels().Warp(temperature, top_k, top_p, min_p)


def _verify(
    target: Tensor,
    draft_ids: Tensor,
    draft: Tensor | None,
    draft_stats: Tensor | None,
    draft_lens: Tensor | None,
    cu: Tensor | None,
    rule: int,
    params: list[float],
    word_start: Tensor | None,
    given: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
    uniforms: Tensor | None,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    eos_ids: list[int],
    remaining: Tensor | None,
    state: Tensor | None,
    active: Tensor | None,
    is_probs: bool,
) -> tuple[Tensor, ...]:
    warp = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    check_devices(
        "speculative_verify",
        target,
        **{"draft_ids": draft_ids, "draft": draft, "draft_stats": draft_stats},
        **{"draft_lens": draft_lens, "cu": cu, "word_start": word_start, "given": given},
        **{"seeds": seeds, "positions": positions, "uniforms": uniforms, **warp},
        **{"remaining": remaining, "state": state, "active": active},
    )
    results: tuple[Tensor, ...] = verify_ops.verify_outputs(
        *(target, draft_ids, draft, draft_stats, draft_lens, cu, rule, params, word_start, given),
        *(seeds, positions, uniforms, temperature, top_k, top_p, min_p, eos_ids, remaining),
        *(state, active, is_probs),
    )
    kernels = _kernels()
    b, k = draft_ids.shape
    kernels.verify(
        target,
        kernels.Drafts(draft_ids, (b, k), draft_lens, cu, active),
        kernels.Rule.of(rule, params, word_start, given),
        _warp(target, b, **warp),
        kernels.Words(seeds, positions, uniforms),
        kernels.Outputs(*results),
        draft=draft,
        draft_stats=draft_stats,
        is_probs=is_probs,
        eos_ids=tuple(eos_ids),
        remaining=remaining,
        state=state,
    )
    return results


def _propose(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    race: bool,
) -> tuple[Tensor, ...]:
    warp = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    check_devices("speculative_propose", logits, seeds=seeds, positions=positions, **warp)
    results: tuple[Tensor, ...] = verify_ops.propose_outputs(
        logits, seeds, positions, temperature, top_k, top_p, min_p, race
    )
    kernels = _kernels()
    kernels.propose(
        logits,
        kernels.Words(seeds, positions),
        _warp(logits, logits.shape[0], **warp),
        *results,
        race=race,
    )
    return results


def _verify_tree(
    target: Tensor,
    tokens: Tensor,
    parent: Tensor,
    rule: int,
    draft: Tensor | None,
    replacement: bool,
    seeds: Tensor | None,
    positions: Tensor | None,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    eos_ids: list[int],
    remaining: Tensor | None,
    active: Tensor | None,
    is_probs: bool,
) -> tuple[Tensor, ...]:
    warp = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    check_devices(
        "speculative_verify_tree",
        target,
        **{"tokens": tokens, "parent": parent, "draft": draft, "seeds": seeds},
        **{"positions": positions, **warp, "remaining": remaining, "active": active},
    )
    path, *results = verify_ops.verify_tree_outputs(
        *(target, tokens, parent, rule, draft, replacement, seeds, positions, temperature),
        *(top_k, top_p, min_p, eos_ids, remaining, active, is_probs),
    )
    kernels = _kernels()
    kernels.verify_tree(
        target,
        tokens,
        parent,
        rule,
        _warp(target, tokens.shape[0], **warp),
        kernels.Words(seeds, positions),
        path,
        kernels.Outputs.of_tree(*results),
        draft=draft,
        replacement=replacement,
        is_probs=is_probs,
        eos_ids=tuple(eos_ids),
        remaining=remaining,
        active=active,
    )
    return path, *results


_library.impl("speculative_verify", _verify, "CUDA")
_library.impl("speculative_propose", _propose, "CUDA")
_library.impl("speculative_verify_tree", _verify_tree, "CUDA")
