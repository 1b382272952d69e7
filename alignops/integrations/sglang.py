"""SGLang: tree tables and tree verification of alignops under the engine's names. Experimental.

Written against recorded signatures of the engine and tested with tensors of the shapes that it
documents, not inside a running engine. `install` puts the functions of this module in the place of
the engine's: same tensors, same order, results written where the engine's functions write them. The
engine's kernels spell some names `retrive_*`; so do their stand-ins here.

- `verify_tree_greedy` walks from the root to the child that the target would have chosen.
- `tree_speculative_sampling_target_only` reaches each child with the target's probability.
- `tree_speculative_sampling_rrs` uses the draft probabilities, which the engine's tree kernel
  ignores: children drawn from the drafter are tried in turn, each against what is left of the
  target.
- `chain_speculative_sampling` and `chain_block_speculative_sampling` verify trees without branches
  by the rules "lossless" and "block".

The random words of a request follow from its coins, so they are repeatable where the engine's coins
are, or from `seeds` and `positions` if these are given. Of a request whose probabilities hold NaN,
the root is kept and id 0 follows; the next call raises ValueError, since reading errors at once
would wait for the GPU.

Shape letters: B requests, n nodes of a tree, D most nodes of a path, the root included, V ids.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alignops.integrations._engines import (
    TreeCase,
    check_signature,
    self_test_failed,
    self_test_trees,
)
from alignops.integrations._sglang_tables import (
    build_tree_kernel_efficient as build_tree_kernel_efficient,
)
from alignops.integrations._sglang_tables import tree_parents as tree_parents
from alignops.speculative import TreeOut, VerifyOut, build_tree, verify, verify_tree

_TREE = (
    "predicts",
    "accept_index",
    "accept_token_num",
    "candidates",
    "retrive_index",
    "retrive_next_token",
    "retrive_next_sibling",
)
_COINS = ("uniform_samples", "uniform_samples_for_final_sampling", "target_probs", "draft_probs")
_THRESHOLDS = ("threshold_single", "threshold_acc", "deterministic")
#: Parameters of the engine's functions that are replaced.
SIGNATURES: dict[str, tuple[str, ...]] = {
    "sglang.srt.speculative.eagle_utils:verify_tree_greedy_func": (
        *(name.replace("retrive", "retrieve") for name in _TREE),
        "target_predict",
        "topk",
    ),
    "sglang.srt.speculative.eagle_utils:build_tree_kernel_efficient": (
        "bonus_tokens",
        "parent_list",
        "top_scores_index",
        "draft_tokens",
        "seq_lens",
        "seq_lens_sum",
        "topk",
        "spec_steps",
        "num_verify_tokens",
        "tree_mask_mode",
        "tree_mask_buf",
    ),
    "sglang.kernels.ops.speculative.sampling:tree_speculative_sampling_target_only": (
        *_TREE,
        *_COINS,
        *_THRESHOLDS,
    ),
    "sglang.kernels.ops.speculative.reject_sampling:chain_speculative_sampling_triton": (
        *_TREE,
        *_COINS,
        *_THRESHOLDS,
    ),
}


def _greedy_path(
    candidates: Tensor, parent: Tensor, target_predict: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """Nodes (B, D) of the walk, its last one repeated, and the number of accepted drafts (B,)."""
    rows, size = candidates.shape
    node = torch.arange(size, device=candidates.device).expand(rows, size)
    above = parent.clamp(min=0)
    fits = (parent >= 0) & (candidates == target_predict.gather(1, above))
    child = torch.full((rows, size), size, dtype=torch.int64, device=candidates.device)
    child.scatter_reduce_(1, above, torch.where(fits, node, size), "amin")
    at = torch.zeros(rows, 1, dtype=torch.int64, device=candidates.device)
    path, accepted = [at], torch.zeros_like(at)
    for _ in range(longest - 1):
        following = child.gather(1, at)
        accepted = accepted + (following < size)
        at = torch.where(following < size, following, at)
        path.append(at)
    return torch.cat(path, 1), accepted[:, 0]


def _write(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    retrieve_index: Tensor,
    path: Tensor,
    accepted: Tensor,
    tokens: Tensor,
) -> None:
    """Results where the engine wants them: `tokens` (B, D) follow the nodes of `path` (B, D)."""
    step = torch.arange(path.shape[1], device=path.device)
    last = accepted[:, None].long()
    within = step <= last
    # Behind the end the last entry is written again.
    column = torch.minimum(step, last)
    places = retrieve_index.long().gather(1, path.long().gather(1, column))
    predicts.scatter_(0, places.flatten(), tokens.gather(1, column).flatten().to(predicts.dtype))
    accept_index.copy_(torch.where(within, places.to(accept_index.dtype), accept_index))
    accept_token_num.copy_(accepted)


def verify_tree_greedy(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Accept the drafts that greedy decoding of the target would give. Experimental.

    Args:
        predicts: int32 (B * n,), written: what follows each accepted node.
        accept_index: int32 (B, D), written: accepted nodes, as `retrive_index` numbers them; what
            is behind them stays.
        accept_token_num: int32 (B,), written: accepted drafts.
        candidates: int64 (B, n), ids of the nodes.
        retrive_index: int64 (B, n), numbers of the nodes.
        retrive_next_token: int64 (B, n), first children.
        retrive_next_sibling: int64 (B, n), next siblings.
        target_predict: int64 (B, n), the target's best id after each node.

    Example:
        >>> out = torch.zeros(2, dtype=torch.int32), torch.full((1, 2), -1, dtype=torch.int32)
        >>> num, index = torch.zeros(1, dtype=torch.int32), torch.tensor([[0, 1]])
        >>> child, sibling = torch.tensor([[1, -1]]), torch.tensor([[-1, -1]])
        >>> ids, best = torch.tensor([[5, 7]]), torch.tensor([[7, 9]])
        >>> verify_tree_greedy(*out, num, ids, index, child, sibling, best)
        >>> out[0].tolist(), out[1].tolist(), num.tolist()
        ([7, 9], [[0, 1]], [1])
    """
    parent = tree_parents(retrive_next_token, retrive_next_sibling)
    path, accepted = _greedy_path(candidates, parent, target_predict, accept_index.shape[1])
    tokens = target_predict.gather(1, path)
    _write(predicts, accept_index, accept_token_num, retrive_index, path, accepted, tokens)


def verify_tree_greedy_func(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    target_predict: Tensor,
    topk: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """`verify_tree_greedy` as the engine's workers call it; returns what it has written."""
    verify_tree_greedy(
        predicts,
        accept_index,
        accept_token_num,
        candidates,
        retrieve_index,
        retrieve_next_token,
        retrieve_next_sibling,
        target_predict,
    )
    return predicts, accept_index, accept_token_num


def speculative_sampling(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor | None = None,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
    *,
    rule: str = "tree_target",
    replacement: bool = False,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
) -> None:
    """Accept drafts so that what is emitted follows the target's law. Experimental.

    Args:
        predicts: int32 (B * n,), written: what follows each accepted node.
        accept_index: int32 (B, D), written: accepted nodes.
        accept_token_num: int32 (B,), written: accepted drafts.
        candidates: int64 (B, n), ids of the nodes.
        retrive_index: int64 (B, n), numbers of the nodes.
        retrive_next_token: int64 (B, n), first children; of trees.
        retrive_next_sibling: int64 (B, n), next siblings; of trees.
        uniform_samples: float32 (B, n), coins, which seeds are made of if none are given.
        uniform_samples_for_final_sampling: float32 (B,), as `uniform_samples`.
        target_probs: float32 (B, n, V), the target's law after each node.
        draft_probs: float32, never written. "tree_rrs": (B, n, V), row i is what the children of
            node i were drawn from; the best k of a drafter are not drawn, and need "tree_target",
            which does not read it. Chains: (B, n - 1 or n, V), row i is of node i + 1.
        threshold_single: must be 1; other values change the law.
        threshold_acc: must be 1, too.
        deterministic: not used, all decisions are.
        rule: "tree_target" or "tree_rrs"; "lossless" or "block" for chains, in which node i + 1
            follows node i.
        replacement: children of a node were drawn with replacement, for "tree_rrs".
        seeds: int64 (B,), of the requests.
        positions: int64 (B,), of the token behind the root; needed with seeds.

    Raises:
        ValueError: a threshold is not 1, `rule` is unknown, shapes do not fit, or the last call had
            a request with bad probabilities.
    """
    last = _last.copy()
    _last.clear()
    for result in last:
        result.raise_errors()
    for name, value in (("threshold_single", threshold_single), ("threshold_acc", threshold_acc)):
        if value != 1:
            raise ValueError(f"sglang: {name} must be 1, got {value}")
    if seeds is None:
        seeds, positions = _seeds(uniform_samples, uniform_samples_for_final_sampling)
    out: VerifyOut | TreeOut
    if rule in _CHAIN_RULES:
        if draft_probs is None:
            raise ValueError(f"sglang: draft_probs must be given for the rule {rule!r}")
        drafts = candidates[:, 1:].contiguous()
        out = verify(
            target_probs,
            drafts,
            draft=draft_probs[:, : drafts.shape[1]],
            rule=rule,
            seeds=seeds,
            positions=positions,
            is_probs=True,
        )
        path = torch.arange(candidates.shape[1], device=candidates.device).expand_as(candidates)
    else:
        parent = tree_parents(retrive_next_token, retrive_next_sibling)
        # Nodes that no list names are not there.
        linked = torch.nn.functional.pad(parent[:, 1:] >= 0, (1, 0), value=True)
        out = verify_tree(
            target_probs,
            torch.where(linked, candidates, -1),
            parent.clamp(min=0),
            rule=rule,
            draft=draft_probs if rule == "tree_rrs" else None,
            replacement=replacement,
            seeds=seeds,
            positions=positions,
            is_probs=True,
        )
        path = out.path
    _last.append(out)
    # Nodes that accept_index has no room for are cut. The token behind the cut is an accepted
    # draft, so it follows the target's law like any other.
    longest = accept_index.shape[1]
    accepted = (out.num_emitted - 1).clamp(min=0, max=longest - 1)
    room = (0, max(0, longest - path.shape[1]))
    path, tokens = (
        torch.nn.functional.pad(t[:, :longest].clamp(min=0), room) for t in (path, out.tokens)
    )
    _write(predicts, accept_index, accept_token_num, retrive_index, path, accepted, tokens)


#: `speculative_sampling` under the names of the engine's functions, and of their kin.
tree_speculative_sampling_target_only = partial(speculative_sampling, rule="tree_target")
tree_speculative_sampling_rrs = partial(speculative_sampling, rule="tree_rrs")
chain_speculative_sampling = partial(speculative_sampling, rule="lossless")
chain_block_speculative_sampling = partial(speculative_sampling, rule="block")

_TREE_RULES, _CHAIN_RULES = ("tree_target", "tree_rrs"), ("lossless", "block")
#: Results of the last call, whose errors the next one raises.
_last: list[VerifyOut | TreeOut] = []


def _seeds(coins: Tensor, final_coins: Tensor) -> tuple[Tensor, Tensor]:
    """Seeds made of the bits of the coins, and positions for them."""
    high, low = (
        t.float().contiguous().view(torch.int32).long() for t in (coins[:, 0], final_coins)
    )
    return high << 32 | low, torch.zeros_like(high)


# Installation


def install(tree: str = "tree_target", chain: str = "lossless") -> list[str]:
    """Put the functions of this module in the place of the engine's. Experimental.

    Call it in every process of the engine before its workers are made. Nothing is replaced unless
    the engine's functions have the recorded parameters and 64 random cases agree with the
    definition of the rules.

    Args:
        tree: "tree_target" or "tree_rrs", for trees.
        chain: "lossless" or "block", for drafts without branches and with probabilities.

    Returns:
        The places whose functions were replaced.

    Raises:
        ValueError: an unknown rule.
        ImportError: the engine is not there.
        RuntimeError: it has functions with other parameters, or the self-test fails.
    """
    if tree not in _TREE_RULES:
        raise ValueError(f"sglang: tree must be one of {', '.join(_TREE_RULES)}, got {tree!r}")
    if chain not in _CHAIN_RULES:
        raise ValueError(f"sglang: chain must be one of {', '.join(_CHAIN_RULES)}, got {chain!r}")
    for place, parameters in SIGNATURES.items():
        check_signature(place, parameters)
    self_test()
    ours: list[Callable[..., Any]] = [
        verify_tree_greedy_func,
        build_tree_kernel_efficient,
        partial(speculative_sampling, rule=tree),
        partial(speculative_sampling, rule=chain),
    ]
    for place, function in zip(SIGNATURES, ours, strict=True):
        module, _, name = place.partition(":")
        setattr(importlib.import_module(module), name, function)
    return list(SIGNATURES)


def self_test(device: torch.device | str = "cpu") -> None:
    """Compare 64 random trees for each rule with the definition.

    Raises:
        RuntimeError: they differ.

    Example:
        >>> self_test()
    """
    for rule in ("tree_greedy", *_TREE_RULES):
        for number, case in enumerate(self_test_trees(rule)):
            got = _run_case(rule, case, device)
            if got != case.expected:
                raise self_test_failed("sglang", number, case.expected, got)


def _run_case(
    rule: str, case: TreeCase, device: torch.device | str
) -> list[tuple[list[int], list[int]]]:
    """Accepted nodes and emitted ids of each request of a case."""
    rows, size = case.parent.shape
    tree = build_tree(case.parent)
    index = torch.arange(rows * size).view(rows, size)
    given: list[Any] = [case.tokens, index, tree.first_child.long(), tree.next_sibling.long()]
    predicts = torch.zeros(rows * size, dtype=torch.int32, device=device)
    accepted = torch.full((rows, size), -1, dtype=torch.int32, device=device)
    number = torch.zeros(rows, dtype=torch.int32, device=device)
    tables = [t.to(device) for t in given]
    if rule == "tree_greedy":
        tables.append(case.target.argmax(-1).to(device))
        verify_tree_greedy(predicts, accepted, number, *tables)
    else:
        coins = torch.zeros(rows, size, device=device)
        laws = [case.target.to(device), case.draft.to(device)]
        seeds, positions = case.seeds.to(device), case.positions.to(device)
        speculative_sampling(
            *(predicts, accepted, number, *tables, coins, coins[:, 0], *laws),
            rule=rule,
            seeds=seeds,
            positions=positions,
        )
    out = []
    for r, count in enumerate(number.tolist()):
        places = accepted[r, : count + 1].tolist()
        out.append(([p - r * size for p in places], [int(predicts[p]) for p in places]))
    return out
