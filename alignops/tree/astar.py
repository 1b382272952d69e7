"""A*-decoding (arXiv 2505.13672): the most promising partial answer of all is continued next.

A state is a partial answer. A process reward model says r in [0, 1] of it; h = 1 - r is what is
still to be feared, g what its path has cost, and the open state of the smallest f = g + h is
continued by k proposals. All trees are proposed for and scored together.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alignops._checks import check
from alignops.tree._progress import Bar
from alignops.tree.errors import CallbackError, InvalidValueError
from alignops.tree.policies import Greedy, Max
from alignops.tree.store import Leaves, TreeStore

COSTS = ("h_rise", "h_drop", "steps", "neg_logprob", "zero")


@dataclass(frozen=True)
class Continuation:
    """One step of an answer: what the caller calls it, and what it cost.

    Attributes:
        part: text, token ids, anything.
        end: the answer is complete.
        tokens: generated for it.
        logprob: of the part, for the cost "neg_logprob".
    """

    part: Any
    end: bool = False
    tokens: int = 0
    logprob: float = 0.0


@dataclass(frozen=True)
class AStarAnswer:
    """What was found for one root.

    Attributes:
        parts: of the answer, or of the best open state if none was completed.
        score: r of it.
        cost: f of it.
        status: "goal"; "budget"; "exhausted": no open state was left.
        expansions, tokens, scored: states continued, tokens generated, states scored by the reward
            model.
    """

    parts: tuple[Any, ...]
    score: float
    cost: float
    status: str
    expansions: int
    tokens: int
    scored: int


@dataclass
class _Search:
    """The open states of one root: (f, -depth, node) in a heap; `g` and `r` by node."""

    heap: list[tuple[float, int, int]] = field(default_factory=list)
    g: dict[int, float] = field(default_factory=dict)
    r: dict[int, float] = field(default_factory=dict)
    parts: list[Continuation] = field(default_factory=list)  # by action
    goals: list[int] = field(default_factory=list)
    expansions: int = 0
    tokens: int = 0
    scored: int = 0
    status: str | None = None


Propose = Callable[[list[tuple[Any, tuple[Any, ...]]], int], Sequence[Sequence[Continuation]]]
Score = Callable[[list[tuple[Any, tuple[Any, ...]]]], Tensor]


def astar_decode(
    roots: Sequence[Any],
    propose: Propose,
    score: Score,
    *,
    k: int = 4,
    max_expansions: int | None = None,
    max_tokens: int | None = None,
    max_scored: int | None = None,
    cost: str = "h_rise",
    beam: int = 1,
    scope: str = "frontier",
    frontier_cap: int | None = None,
    continue_until_budget: bool = False,
    progress: bool = False,
) -> tuple[list[AStarAnswer], TreeStore]:
    """Search answers to each root.

    Args:
        roots: what is asked; handed to the callbacks.
        propose: [(root, parts so far), ...], k -> for each up to k continuations.
        score: [(root, parts), ...] -> (M,) r in [0, 1] of the partial answers.
        k: proposals per state.
        max_expansions: states continued per root; one of the three bounds must be given.
        max_tokens: tokens generated per root.
        max_scored: states scored per root.
        cost: g of a state: "h_rise" adds what h rose on the way (the default; the paper is known
            second-hand), "h_drop" what it fell, "steps" 1 per step, "neg_logprob", "zero".
        beam: open states that are continued per round and root.
        scope: "frontier": all open states compete; "children": only those of the state that was
            continued last.
        frontier_cap: no more open states than these, the worst are dropped.
        continue_until_budget: after an answer, go on, and return the one of the largest r.
        progress: show a bar of rounds.

    Returns:
        An answer per root, and the trees: actions of edges count the proposals of a root, `value`
        is the largest r below a node.

    Raises:
        ValueError: an argument is out of range.
        CallbackError: a callback answered with a wrong length.
        InvalidValueError: a score is not in [0, 1].
    """
    op = "astar_decode"
    check(cost in COSTS, f"{op}: cost must be one of {', '.join(COSTS)}, got {cost!r}")
    check(
        scope in ("frontier", "children"),
        f"{op}: scope must be 'frontier' or 'children', got {scope!r}",
    )
    for name, value in (("k", k), ("beam", beam), ("frontier_cap", frontier_cap)):
        check(value is None or value >= 1, f"{op}: {name} must be at least 1, got {value}")
    bounds = {"expansions": max_expansions, "tokens": max_tokens, "scored": max_scored}
    for name, value in bounds.items():
        check(value is None or value >= 0, f"{op}: max_{name} must be at least 0, got {value}")
    check(
        any(value is not None for value in bounds.values()),
        f"{op}: one of max_expansions, max_tokens and max_scored must be given",
    )
    searches = [_Search() for _ in roots]
    store = TreeStore(len(roots), Greedy(), Max(), edge_capacity=1 << 26)
    if roots:
        _open_roots(store, searches, _scores(score([(root, ()) for root in roots]), len(roots)))
    rounds = 0
    with Bar(progress, "A*", "round") as bar:
        while True:
            chosen = _pop(searches, beam, scope, bounds, continue_until_budget)
            if not chosen:
                break
            states = [(roots[t], _parts(store, searches[t], t, node)) for t, node in chosen]
            proposals = propose(states, k)
            if len(proposals) != len(states) or any(len(row) > k for row in proposals):
                raise CallbackError(
                    f"{op}: propose must return {len(states)} lists of up to {k}, got "
                    f"{[len(row) for row in proposals]}",
                    [node for _, node in chosen],
                )
            new = [
                (root, (*parts, continuation.part))
                for (root, parts), row in zip(states, proposals, strict=True)
                for continuation in row
            ]
            r = _scores(score(new), len(new)) if new else torch.empty(0)
            _push(store, searches, chosen, proposals, r, cost, scope, frontier_cap)
            rounds += 1
            bar.at(rounds)
    return [_answer(store, search, t) for t, search in enumerate(searches)], store


def _scores(r: Tensor, count: int) -> Tensor:
    if tuple(r.shape) != (count,):
        raise CallbackError(
            f"astar_decode: score must return shape {(count,)}, got {tuple(r.shape)}", []
        )
    r = r.detach().cpu().float()
    if not bool(((r >= 0) & (r <= 1)).all()):
        raise InvalidValueError("astar_decode: scores must be in [0, 1]")
    return r


def _open_roots(store: TreeStore, searches: list[_Search], r: Tensor) -> None:
    leaves = store.select()
    store.backup(leaves.ticket, r)
    for search, score in zip(searches, r.tolist(), strict=True):
        search.r[0], search.g[0], search.scored = score, 0.0, 1
        heapq.heappush(search.heap, (1 - score, 0, 0))


def _pop(
    searches: list[_Search],
    beam: int,
    scope: str,
    bounds: dict[str, int | None],
    continue_until_budget: bool,
) -> list[tuple[int, int]]:
    """(tree, node) of the states to continue now; searches that have ended get their status."""
    chosen = []
    for t, search in enumerate(searches):
        taken = 0
        while search.status is None and taken < beam:
            spent = any(
                bound is not None and getattr(search, name) >= bound
                for name, bound in bounds.items()
            )
            if spent or not search.heap:
                if not taken:
                    search.status = "budget" if spent else "exhausted"
                    if search.goals and not spent:
                        search.status = "goal"
                break
            _, _, node = heapq.heappop(search.heap)
            if node in search.goals:
                if not continue_until_budget:
                    search.goals = [node]
                    search.status = "goal"
                continue
            search.expansions += 1
            taken += 1
            chosen.append((t, node))
        if scope == "children" and taken:
            search.heap.clear()
    return chosen


def _push(
    store: TreeStore,
    searches: list[_Search],
    chosen: list[tuple[int, int]],
    proposals: Sequence[Sequence[Continuation]],
    r: Tensor,
    cost: str,
    scope: str,
    cap: int | None,
) -> None:
    trees = torch.tensor([t for t, _ in chosen])
    parents = torch.tensor([node for _, node in chosen])
    lengths = torch.tensor([len(row) for row in proposals])
    actions: list[int] = []
    for (t, _), row in zip(chosen, proposals, strict=True):
        first = len(searches[t].parts)
        searches[t].parts += row
        actions += range(first, first + len(row))
    ptr = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    flat = torch.tensor(actions, dtype=torch.int64)
    store.expand(trees, parents, flat, torch.ones(len(flat)), ptr)
    slots = torch.arange(len(flat)) - ptr[:-1].repeat_interleave(lengths)
    leaves: Leaves = store.visit(
        trees.repeat_interleave(lengths), parents.repeat_interleave(lengths), slots
    )
    ends = torch.tensor([c.end for row in proposals for c in row], dtype=torch.bool)
    store.end(leaves.tree[ends], leaves.node[ends])
    store.backup(leaves.ticket, r)
    rows = zip(leaves.tree.tolist(), leaves.node.tolist(), leaves.depth.tolist(), strict=True)
    continuations = [c for row in proposals for c in row]
    owners = parents.repeat_interleave(lengths).tolist()
    for (t, node, depth), continuation, parent, score in zip(
        rows, continuations, owners, r.tolist(), strict=True
    ):
        search = searches[t]
        h, before = 1 - score, 1 - search.r[parent]
        added = {
            "h_rise": max(0.0, h - before),
            "h_drop": max(0.0, before - h),
            "steps": 1.0,
            "neg_logprob": -continuation.logprob,
            "zero": 0.0,
        }[cost]
        search.r[node], search.g[node] = score, search.g[parent] + added
        search.tokens += continuation.tokens
        search.scored += 1
        if continuation.end:
            search.goals.append(node)
        heapq.heappush(search.heap, (search.g[node] + h, -depth, node))
    if cap is not None:
        for search in searches:
            if len(search.heap) > cap:
                search.heap = heapq.nsmallest(cap, search.heap)


def _parts(store: TreeStore, search: _Search, t: int, node: int) -> tuple[Any, ...]:
    path = store.paths(torch.tensor([t]), torch.tensor([node]))
    return tuple(search.parts[action].part for action in path.action.tolist())


def _answer(store: TreeStore, search: _Search, t: int) -> AStarAnswer:
    if search.goals:
        node = max(search.goals, key=lambda goal: search.r[goal])
    else:
        node = search.heap[0][2] if search.heap else max(search.r, key=search.r.__getitem__)
    return AStarAnswer(
        _parts(store, search, t, node),
        search.r[node],
        search.g[node] + 1 - search.r[node],
        search.status or "exhausted",
        search.expansions,
        search.tokens,
        search.scored,
    )
