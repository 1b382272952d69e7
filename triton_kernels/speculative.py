"""Launchers of the speculative core on GPUs: chains of drafts, trees, and one draft step.

`speculative_rows` reads the logits once, `speculative_chains` once more where a rule needs it,
`speculative_decide` and `speculative_trees` walk the drafts, `speculative_draw` draws the token
that follows and writes the outputs. Scratch has a few words per row and tile, nothing is read by
the host, and which kernels are launched depends on the rule and on what is given, not on values: a
call can be captured in a CUDA graph. Arguments are not checked here.

In Triton because the rules are reductions over the vocabulary, which one source serves for all
dtypes. Letters: B sequences, K drafts, N nodes, V ids (Vd of the drafter), T tiles of 4096 ids.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import speculative_chains as chains
from . import speculative_decide as decide
from . import speculative_draw as draw
from . import speculative_rsd as rsd
from . import speculative_stats as steps
from . import speculative_trees as trees
from .speculative_launch import (
    DESCEND,
    NARROW,
    NO_RETRY,
    TILE,
    WIDE,
    Drafts,
    Laws,
    Outputs,
    Rule,
    Warp,
    Words,
    bits_of,
    device_of,
    read,
    restore,
)


def _of_drafter(q: Laws | None) -> tuple[Tensor | None, int, int, Tensor | None]:
    return (None, 0, 0, None) if q is None else (q.logits, *q.strides, q.records)


def _second_read(
    p: Laws, q: Laws | None, drafts: Drafts, warp: Warp, rule: Rule, words: Words, block: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(ratios, winners) of races, and what else a rule needs of whole rows, tile by tile."""
    b, k = drafts.shape
    records, t = p.records, p.tiles
    common = (
        *(p.logits, drafts.cu, *p.strides, drafts.ids, drafts.lens, drafts.active),
        *(warp.temperature, records),
    )
    flags: dict[str, Any] = {**drafts.flags, "IS_PROBS": p.is_probs, "BLOCK": block, **WIDE}
    if rule.name == "coupled":
        count = b * (k + 1)
        ratios = records.new_empty((count, t), dtype=torch.float32)
        winners = records.new_empty((count, t), dtype=torch.int32)
        chains.race_kernel[(count, t)](
            *common, words.seeds, words.positions, ratios, winners, k, p.size, **flags
        )
        return ratios, winners, None
    kinds = {"block": torch.int64, "typical": torch.float64, "relaxed": torch.int32}
    kinds["rsd"] = torch.int32
    if rule.name not in kinds:
        return None, None, None
    second = records.new_empty((b * k, t), dtype=kinds[rule.name])
    if k > 0 and rule.name == "block":
        size = 0 if q is None else q.size
        chains.block_kernel[(b * k, t)](
            *common, *_of_drafter(q), second, k, p.size, size, HAS_DRAFT=q is not None, **flags
        )
    elif k > 0 and rule.name == "typical":
        chains.entropy_kernel[(b * k, t)](*common, second, k, p.size, **flags)
    elif k > 0:
        chains.rank_kernel[(b * k, t)](*common, second, k, p.size, **flags)
    return None, None, second


def _retry(
    p: Laws,
    draft: Tensor,
    drafts: Drafts,
    test: Warp,
    warp: Warp,
    rule: Rule,
    words: Words,
    request: Tensor,
    following: Tensor,
    out: Outputs,
    block: int,
) -> Tensor:
    """The first further token of the teacher that the student accepts (B,), or -1."""
    b, k = drafts.shape
    count = rule.trials - 1
    q = read(draft, p.is_probs, drafts, warp, 0, at=out.accept_len, block=block)
    candidates = request.new_empty((b, count))
    ranks = request.new_empty((b * count, p.tiles), dtype=torch.int32)
    retries = request.new_empty(b)
    common = (*_of_drafter(q), warp.temperature, request)
    if rule.retry == DESCEND:
        rsd.descend_kernel[(b,)](
            *common, drafts.ids, candidates, k, q.size, count,
            IS_PROBS=p.is_probs, BLOCK=block, **WIDE,
        )  # fmt: skip
    else:
        sums = request.new_empty((b, q.tiles))
        rsd.teacher_sums_kernel[(b, q.tiles)](
            *common, sums, q.size, IS_PROBS=p.is_probs, BLOCK=block, **WIDE
        )
        rsd.candidates_kernel[(b, count)](
            *common, sums, words.seeds, words.positions, candidates, q.size, q.tiles, count,
            IS_PROBS=p.is_probs, T_PAD=triton.next_power_of_2(q.tiles), BLOCK=block, **WIDE,
        )  # fmt: skip
    student = (p.logits, drafts.cu, *p.strides, p.records)
    flags = {"PACKED": drafts.cu is not None, "IS_PROBS": p.is_probs}
    rsd.candidate_ranks_kernel[(b * count, p.tiles)](
        *student, test.temperature, request, candidates, ranks, k, p.size, count,
        BLOCK=block, **flags, **WIDE,
    )  # fmt: skip
    rsd.choose_kernel[(b,)](
        *student, q.records, test.temperature, request, candidates, ranks, following,
        out.accept_len, out.row_error, retries, k, p.size, count, p.tiles, rule.p_th,
        min(rule.top_n, p.size), T_PAD=triton.next_power_of_2(p.tiles), **flags, **NARROW,
    )  # fmt: skip
    return retries


def verify(
    target: Tensor,
    drafts: Drafts,
    rule: Rule,
    warp: Warp,
    words: Words,
    out: Outputs,
    *,
    draft: Tensor | None = None,
    draft_stats: Tensor | None = None,
    is_probs: bool = False,
    eos_ids: tuple[int, ...] = (),
    remaining: Tensor | None = None,
    state: Tensor | None = None,
    block: int = TILE,
) -> None:
    """Fills `out` as the operator `speculative_verify`. `block` divides 4096."""
    b, k = drafts.shape
    with device_of(target):
        if b == 0:
            out.cu_emitted.zero_()
            return
        # The student's test of `rsd` looks at its law as it is.
        plain = rule.name == "rsd" and not rule.warped
        test = Warp(torch.ones_like(warp.temperature)) if plain else warp
        sums = rule.name not in ("greedy", "scripted")
        p = read(target, is_probs, drafts, test, 1, sums=sums, block=block)
        q = None
        if draft is not None and rule.name in ("lossless", "block"):
            if draft_stats is None:
                q = read(draft, is_probs, drafts, warp, 0, block=block)
            else:
                q = restore(draft_stats, draft, is_probs)
        ratios, winners, second = _second_read(p, q, drafts, test, rule, words, block)

        following = out.tokens.new_empty(b)
        request = out.tokens.new_empty((b, chains.REQUEST.value))
        flags = {"IS_PROBS": is_probs, "HAS_DRAFT": q is not None, "EOS": eos_ids}
        flags["HAS_WORDS"] = words.given is not None
        t = p.tiles
        decide.decide_kernel[(b,)](
            *(p.logits, drafts.cu, *p.strides, drafts.ids, drafts.lens, drafts.active),
            *(warp.temperature, *warp.filters, test.temperature, p.records, *_of_drafter(q)),
            *(words.seeds, words.positions, words.given, ratios, winners, second, rule.given),
            *(rule.word_start, state, out.accept_len, following, request, out.source),
            *(out.row_error, out.state, out.zero_q, k, p.size, 0 if q is None else q.size, t),
            *(bits_of(rule.eps), bits_of(rule.delta), rule.m, rule.r, rule.below_best),
            *(rule.t_single, rule.t_acc, rule.p_th, min(rule.top_n, p.size), rule.gamma),
            rule.eos_lookahead,
            RULE=chains.RULES.index(rule.name), HAS_STATE=state is not None,
            T_PAD=triton.next_power_of_2(t), **flags, **drafts.flags, **warp.flags, **NARROW,
        )  # fmt: skip
        retries, own = None, p
        if rule.name == "rsd" and k > 0:
            if draft is not None and rule.retry != NO_RETRY and rule.trials > 1:
                retries = _retry(
                    p, draft, drafts, test, warp, rule, words, request, following, out, block
                )
            if plain:
                own = read(target, is_probs, drafts, warp, 1, at=out.accept_len, block=block)
        _finish(
            own, q, drafts, warp, words, request, following, out, remaining, block,
            rule.name in ("lossless", "block", "threshold", "rsd"),
            retries=retries, OWN=own is not p, TREE=False, REPLACEMENT=False, **flags,
        )  # fmt: skip


def _finish(
    p: Laws,
    q: Laws | None,
    drafts: Drafts,
    warp: Warp,
    words: Words,
    request: Tensor,
    following: Tensor,
    out: Outputs,
    remaining: Tensor | None,
    block: int,
    draws: bool,
    *,
    retries: Tensor | None = None,
    tree: tuple[Tensor, ...] = (),
    path: Tensor | None = None,
    **flags: Any,
) -> None:
    """Draws what the requests ask for, cuts, and fills the outputs."""
    b, k = drafts.shape
    t = p.tiles
    size = 0 if q is None else q.size
    rest_sums = sums = None
    nodes = tree if tree else (None, None, None, None)
    common = (
        *(p.logits, drafts.cu, *p.strides, p.records, *_of_drafter(q)),
        *(warp.temperature, request),
    )
    packed = drafts.cu is not None
    if draws:
        rest_sums, sums = request.new_empty((2, b, t))
        laws = {n: f for n, f in flags.items() if n not in ("EOS", "HAS_WORDS")}
        draw.sums_kernel[(b, t)](
            *common, rest_sums, sums, *nodes, k, p.size, size, PACKED=packed, BLOCK=block,
            **laws, **WIDE,
        )  # fmt: skip
    pad = triton.next_power_of_2(k + 1)
    draw.finish_kernel[(b,)](
        *common, rest_sums, sums, *nodes, words.seeds, words.positions, words.given,
        drafts.ids, following, out.accept_len, remaining, retries, path, out.next_token,
        out.num_emitted, out.tokens, out.source, out.finished, k, p.size, size, t,
        DRAWS=draws, RETRIES=retries is not None, HAS_REMAINING=remaining is not None,
        PACKED=packed, K_PAD=pad, T_PAD=triton.next_power_of_2(t), BLOCK=block, **flags, **WIDE,
    )  # fmt: skip
    draw.flatten_kernel[(b + 1,)](
        out.num_emitted, out.tokens, out.cu_emitted, out.flat, b, k,
        B_PAD=triton.next_power_of_2(b), K_PAD=pad, **NARROW,
    )  # fmt: skip


def verify_tree(
    target: Tensor,
    tokens: Tensor,
    parent: Tensor,
    rule: int,
    warp: Warp,
    words: Words,
    path: Tensor,
    out: Outputs,
    *,
    draft: Tensor | None = None,
    replacement: bool = False,
    is_probs: bool = False,
    eos_ids: tuple[int, ...] = (),
    remaining: Tensor | None = None,
    active: Tensor | None = None,
    block: int = TILE,
) -> None:
    """Fills `path` and `out` as the operator `speculative_verify_tree`. `block` divides 4096."""
    b, n = tokens.shape
    with device_of(target):
        if b == 0:
            out.cu_emitted.zero_()
            return
        every = Drafts(None, (b, n), active=active)
        draws = rule != trees.TREE_GREEDY.value
        p = read(target, is_probs, every, warp, 0, sums=draws, block=block)
        q = None if draft is None else read(draft, is_probs, every, warp, 0, block=block)
        following = tokens.new_empty(b)
        request = tokens.new_empty((b, chains.REQUEST.value))
        chosen = tokens.new_empty((b, n - 1))
        totals = tokens.new_empty((2, b, n))
        size = 0 if q is None else q.size
        trees.walk_kernel[(b,)](
            *(p.logits, *p.strides, tokens, parent, active, warp.temperature, *warp.filters),
            *(p.records, *_of_drafter(q), words.seeds, words.positions, *totals, path, chosen),
            *(out.accept_len, following, request, out.source, out.row_error, out.zero_q),
            *(n, p.size, size),
            RULE=rule, REPLACEMENT=replacement, IS_PROBS=is_probs,
            HAS_ACTIVE=active is not None, N_PAD=triton.next_power_of_2(n), BLOCK=block,
            **warp.flags, **WIDE,
        )  # fmt: skip
        _finish(
            p, q, Drafts(chosen, (b, n - 1)), warp, words, request, following, out, remaining,
            block, draws, tree=(tokens, parent, *totals), path=path, EOS=eos_ids, OWN=False,
            TREE=True, REPLACEMENT=replacement, IS_PROBS=is_probs, HAS_DRAFT=q is not None,
            HAS_WORDS=False,
        )  # fmt: skip


def propose(
    logits: Tensor,
    words: Words,
    warp: Warp,
    ids: Tensor,
    stats: Tensor,
    errors: Tensor,
    *,
    race: bool = False,
    block: int = TILE,
) -> None:
    """Fills ids, stats and errors as the operator `speculative_propose`. `block` divides 4096."""
    b = logits.shape[0]
    with device_of(logits):
        if b == 0:
            return
        rows = Drafts(ids.new_empty((b, 0)), (b, 0))
        p = read(logits.unsqueeze(1), False, rows, warp, 1, block=block)
        sums = ratios = winners = None
        if race:
            rule = Rule("coupled")
            ratios, winners, _ = _second_read(p, None, rows, warp, rule, words, block)
        else:
            sums = ids.new_empty((b, p.tiles))
            steps.sums_of_law_kernel[(b, p.tiles)](
                logits, logits.stride(0), p.records, warp.temperature, sums, p.size,
                BLOCK=block, **WIDE,
            )  # fmt: skip
        steps.propose_kernel[(b,)](
            *(logits, logits.stride(0), p.records, warp.temperature, *warp.filters),
            *(words.seeds, words.positions, sums, ratios, winners, ids, stats, errors),
            *(p.size, p.tiles),
            RACE=race, T_PAD=triton.next_power_of_2(p.tiles), BLOCK=block, **warp.flags, **WIDE,
        )  # fmt: skip
