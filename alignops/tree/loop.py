"""A search loop: the caller's nets propose and evaluate, trees grow, a budget ends it.

    result = search(states, propose, evaluate, policy=muzero(), budget=Budget(sims=200))

Both callbacks get a `Context` of M new leaves and answer for all of them at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignops._checks import check
from alignops.tree._progress import Bar
from alignops.tree.errors import CallbackError, CapacityError, InvalidValueError
from alignops.tree.policies import Backup, Policy
from alignops.tree.store import Leaves, TreeStore

_EVENT_SECONDS = 0.2


@dataclass(frozen=True)
class Budget:
    """When a search ends: at the first of these that is reached. None is no bound.

    Attributes:
        sims: simulations per tree, the evaluation of its root not counted.
        seconds: wall time.
        evals: leaves evaluated, over all trees.
        tokens, nfe: what the callbacks told `Context.spend`.
        nodes: nodes, over all trees.
    """

    sims: int | None = None
    seconds: float | None = None
    evals: int | None = None
    tokens: int | None = None
    nfe: int | None = None
    nodes: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            check(
                value is None or value >= 0,
                f"Budget: {field.name} must be at least 0, got {value}",
            )
        check(
            any(getattr(self, field.name) is not None for field in fields(self)),
            "Budget: at least one bound must be given",
        )


class Actions(NamedTuple):
    """What follows M leaves.

    Attributes:
        actions: (M, A), or (E,) with `ptr`: integers of at least 0.
        priors: floats of the same shape; or None with `logits`.
        logits: floats of the same shape, whose softmax over a row are its priors.
        ptr: (M + 1,) bounds of the rows.
        terminal: (M,) bool: ends; their rows are ignored.
        values: (M,) if the same net also evaluates; then no `evaluate` is needed.
    """

    actions: Tensor
    priors: Tensor | None = None
    logits: Tensor | None = None
    ptr: Tensor | None = None
    terminal: Tensor | None = None
    values: Tensor | None = None


class Context:
    """M new leaves, and how they were reached.

    Attributes:
        tree, node, parent, slot, depth: (M,) as in `Leaves`.
        states: the root state of each leaf's tree.
    """

    def __init__(self, store: TreeStore, leaves: Leaves, roots: Sequence[Any]) -> None:
        self.tree, self.node, self.parent, self.slot, self.depth, *_ = leaves
        self.states = [roots[t] for t in leaves.tree.tolist()]
        self._store = store
        self.spent = {"tokens": 0, "nfe": 0}

    def __len__(self) -> int:
        return len(self.tree)

    def tokens(self, pad: int = 0, side: str = "right") -> tuple[Tensor, Tensor]:
        """Actions from the roots to the leaves.

        Args:
            pad: fills shorter rows.
            side: where, "left" or "right".

        Returns:
            (M, L) int64, and the (M,) lengths.

        Raises:
            ValueError: `side` is neither.
        """
        check(side in ("left", "right"), f"tokens: side must be 'left' or 'right', got {side!r}")
        paths = self._store.paths(self.tree, self.node)
        lengths = paths.ptr.diff()
        rows = torch.repeat_interleave(torch.arange(len(self)), lengths)
        columns = torch.arange(len(paths.action)) - paths.ptr[:-1].repeat_interleave(lengths)
        longest = int(lengths.max()) if len(self) else 0
        if side == "left":
            columns += (longest - lengths).repeat_interleave(lengths)
        out = torch.full((len(self), longest), pad)
        out[rows, columns] = paths.action.long()
        return out, lengths

    def spend(self, *, tokens: int = 0, nfe: int = 0) -> None:
        """Count generated tokens or evaluations of a network for the budget."""
        self.spent["tokens"] += tokens
        self.spent["nfe"] += nfe


Propose = Callable[[Context], Actions]
Evaluate = Callable[[Context], Tensor]


@dataclass(frozen=True)
class SearchResult:
    """What a search found; `status` is the bound that ended it.

    "exhausted": no tree has anything left to try; "cancelled": interrupted; "nodes": a budget or a
    tree is full.

    Attributes:
        action: (B,) int64: of the most visited edge of each root (of equals the one of larger Q),
            -1 where there is none.
        slot: (B,) int64: which edge that is, -1 where there is none.
        distribution: per tree, (A,) share of the visits of each edge of the root; its priors before
            the first visit.
        value: (B,) float32 of the roots.
        store: the trees.
        counts: sims, evals, tokens, nfe, nodes, seconds, collisions, iterations.
    """

    action: Tensor
    slot: Tensor
    distribution: list[Tensor]
    value: Tensor
    status: str
    store: TreeStore
    counts: dict[str, float]


class Searcher:
    """A search that can be stopped and asked at any time; see `search`."""

    def __init__(
        self,
        root_states: Sequence[Any],
        propose: Propose,
        evaluate: Evaluate | None = None,
        *,
        policy: Policy | None = None,
        backup: Backup | None = None,
        batch_leaves: int = 8,
        seed: int = 0,
        capacity: int = 1 << 20,
        store: TreeStore | None = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        check(batch_leaves >= 1, f"search: batch_leaves must be at least 1, got {batch_leaves}")
        self.store = store or TreeStore(
            len(root_states), policy, backup, capacity=capacity, seed=seed
        )
        check(
            len(self.store) == len(root_states),
            f"search: store must have {len(root_states)} trees (one per root state), got "
            f"{len(self.store)}",
        )
        self._roots = list(root_states)
        self._propose, self._evaluate = propose, evaluate
        self._k = batch_leaves
        self._on_event = on_event
        self._last_event = 0.0
        self._exhausted = False
        self.counts: dict[str, float] = dict.fromkeys(
            ("sims", "evals", "tokens", "nfe", "collisions", "iterations", "seconds"), 0
        )

    def step(self, n: int = 1) -> None:
        """Run `n` iterations; each leaves a consistent tree, whatever happens in it.

        Raises:
            CallbackError: a callback raised, or answered with a wrong shape, dtype or value; what
                was selected in this iteration is forgotten.
            CapacityError: a tree is full; nothing was changed.
        """
        for _ in range(n):
            if self._exhausted:
                return
            self._iterate()

    def _iterate(self) -> None:
        start = time.perf_counter()
        first = self.counts["iterations"] == 0 and not bool(self._root_column("fn").any())
        leaves = self.store.select(1 if first else self._k)
        try:
            values = self._answer(leaves)
            self.store.backup(leaves.ticket, values)
        except BaseException:
            self.store.cancel(leaves.ticket)
            raise
        self._exhausted = bool(leaves.evaluated.all()) and bool((leaves.parent < 0).all())
        self.counts["sims"] += 0 if first else len(leaves.ticket) / max(len(self.store), 1)
        self.counts["collisions"] += int(leaves.collision.sum())
        self.counts["iterations"] += 1
        self.counts["seconds"] += time.perf_counter() - start
        self._tell()

    def _answer(self, leaves: Leaves) -> Tensor:
        """Values of all leaves; new ones get their edges."""
        known = self.store.gather("value", leaves.tree, leaves.node)
        fresh = ~(leaves.evaluated | leaves.collision)
        # Several selections may begin in one call at a leaf that none waited for before.
        new = Leaves(*(column[fresh] for column in leaves))
        if not len(new.tree):
            return known
        context = Context(self.store, new, self._roots)
        actions = self._call("propose", self._propose, context)
        values = actions.values
        if values is None:
            if self._evaluate is None:
                raise ValueError("search: evaluate must be given, since propose returns no values")
            values = self._call("evaluate", self._evaluate, context)
        values = self._checked(values, (len(context),), "values", context)
        if bool(values.isnan().any()):
            row = int(values.isnan().int().argmax())
            node, t = int(context.node[row]), int(context.tree[row])
            raise InvalidValueError(
                f"search: values must not be NaN, got one for node {node} of tree {t}"
            )
        self._expand(actions, context)
        for name, spent in context.spent.items():
            self.counts[name] += spent
        self.counts["evals"] += len(context)
        keys = {key: i for i, key in enumerate(_keys(new))}
        rows = torch.tensor([keys.get(key, -1) for key in _keys(leaves)])
        return torch.where(leaves.evaluated | (rows < 0), known, values[rows])

    def _expand(self, actions: Actions, context: Context) -> None:
        count = len(context)
        ends = torch.zeros(count, dtype=torch.bool)
        if actions.terminal is not None:
            ends = self._checked(actions.terminal, (count,), "terminal", context, torch.bool)
        flat, ptr = actions.actions.cpu(), actions.ptr
        if ptr is None:
            flat = self._checked(flat, (count, *flat.shape[-1:]), "actions", context, flat.dtype)
            ptr = torch.arange(count + 1) * flat.shape[-1]
        else:
            ptr = self._checked(ptr.long(), (count + 1,), "ptr", context, torch.int64)
        shape = tuple(flat.shape)
        if actions.priors is not None:
            priors = self._checked(actions.priors, shape, "priors", context)
        elif actions.logits is not None:
            logits = self._checked(actions.logits, shape, "logits", context)
            priors = _softmax(logits.reshape(-1), ptr)
        else:
            raise CallbackError("search: propose must return priors or logits", context.node)
        flat, priors = flat.reshape(-1), priors.reshape(-1)
        self.store.end(context.tree[ends], context.node[ends])
        keep = torch.repeat_interleave(~ends, ptr.diff())
        lengths = ptr.diff()[~ends]
        self.store.expand(
            context.tree[~ends],
            context.node[~ends],
            flat[keep],
            priors[keep],
            torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        )

    def _call(self, name: str, callback: Callable[[Context], Any], context: Context) -> Any:
        try:
            return callback(context)
        except Exception as error:
            raise CallbackError(f"search: {name} raised {error!r}", context.node) from error

    def _checked(
        self,
        value: Any,
        shape: tuple[int, ...],
        name: str,
        context: Context,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise CallbackError(
                f"search: {name} must be a tensor of shape {shape}, got {got}", context.node
            )
        if value.is_floating_point() != dtype.is_floating_point:
            raise CallbackError(f"search: {name} must be {dtype}, got {value.dtype}", context.node)
        return value.detach().to("cpu", dtype)

    def _root_column(self, name: str) -> Tensor:
        trees = torch.arange(len(self.store))
        return self.store.gather(name, trees, self.store.trees().root)

    def result(self, status: str = "") -> SearchResult:
        """What is known so far."""
        slots, actions, shares = [], [], []
        for t, root in enumerate(self.store.trees().root.tolist()):
            edges = self.store.edges(t, root)
            if not len(edges.action):
                slots.append(-1)
                actions.append(-1)
                shares.append(torch.empty(0))
                continue
            total = edges.visits.sum()
            shares.append(edges.visits / total if total > 0 else edges.prior)
            rank = edges.visits if total > 0 else edges.prior
            q = edges.q.nan_to_num(-torch.inf).where(rank == rank.max(), torch.tensor(-torch.inf))
            best = int(q.argmax()) if bool((q > -torch.inf).any()) else int(rank.argmax())
            slots.append(best)
            actions.append(int(edges.action[best]))
        nodes = float(self.store.trees().nodes.sum())
        return SearchResult(
            torch.tensor(actions, dtype=torch.int64),
            torch.tensor(slots, dtype=torch.int64),
            shares,
            self._root_column("value"),
            status,
            self.store,
            self.counts | {"nodes": nodes},
        )

    def spent(self, budget: Budget) -> str | None:
        """The bound that is reached, if any."""
        if self._exhausted:
            return "exhausted"
        nodes = float(self.store.trees().nodes.sum())
        for field in fields(budget):
            bound = getattr(budget, field.name)
            have = nodes if field.name == "nodes" else self.counts[field.name]
            if bound is not None and have >= bound:
                return field.name
        return None

    def _tell(self) -> None:
        now = time.perf_counter()
        if self._on_event is None or now - self._last_event < _EVENT_SECONDS:
            return
        self._last_event = now
        depth = self.store.column("depth")
        seconds = max(self.counts["seconds"], 1e-9)
        self._on_event(
            {
                **self.counts,
                "nodes": int(self.store.trees().nodes.sum()),
                "depth_max": int(depth.max()) if depth.numel() else 0,
                "root_value": self._root_column("value").tolist(),
                "sims_per_s": self.counts["sims"] * len(self.store) / seconds,
                "bytes": self.store.bytes,
            }
        )


def search(
    root_states: Sequence[Any],
    propose: Propose,
    evaluate: Evaluate | None = None,
    *,
    budget: Budget,
    policy: Policy | None = None,
    backup: Backup | None = None,
    batch_leaves: int = 8,
    seed: int = 0,
    capacity: int = 1 << 20,
    store: TreeStore | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = False,
) -> SearchResult:
    """Search from each state until a budget is spent.

    Ctrl-C between iterations ends the search with what it has found.

    Args:
        root_states: one per tree; handed to the callbacks as they are.
        propose: `Context` of M leaves -> `Actions`.
        evaluate: `Context` -> (M,) values; not needed if `propose` returns values.
        budget: when to stop.
        policy: of selection; default `PUCT()`.
        backup: of values; default `Mean()`.
        batch_leaves: leaves per tree and iteration.
        seed: of draws.
        capacity: nodes per tree.
        store: trees to go on with, instead of new ones.
        on_event: is told the state of the search, at most every 0.2 s.
        progress: show a bar.

    Raises:
        ValueError: an argument is out of range.
        CallbackError: a callback raised or answered wrongly; carries the nodes it was asked about.
    """
    searcher = Searcher(
        root_states,
        propose,
        evaluate,
        policy=policy,
        backup=backup,
        batch_leaves=batch_leaves,
        seed=seed,
        capacity=capacity,
        store=store,
        on_event=on_event,
    )
    status = "exhausted" if not root_states else searcher.spent(budget)
    with Bar(progress, "search", "sim", budget.sims) as bar:
        while status is None:
            try:
                searcher.step()
            except KeyboardInterrupt:
                status = "cancelled"
                break
            except CapacityError:
                status = "nodes"
                break
            bar.at(searcher.counts["sims"])
            status = searcher.spent(budget)
    return searcher.result(status)


def _keys(leaves: Leaves) -> list[tuple[int, int]]:
    return list(zip(leaves.tree.tolist(), leaves.node.tolist(), strict=True))


def _softmax(logits: Tensor, ptr: Tensor) -> Tensor:
    """Over the elements of each row."""
    lengths = ptr.diff()
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    most = torch.full((len(lengths),), -torch.inf).scatter_reduce(0, rows, logits, "amax")
    mass = (logits - most[rows]).exp()
    return mass / torch.zeros(len(lengths)).index_add(0, rows, mass)[rows]
