"""Search trees in native memory: batched selection, expansion and backup."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignops import _native
from alignops._checks import check
from alignops.tree.errors import TreeFormatError
from alignops.tree.policies import PUCT, Backup, Mean, Policy

if TYPE_CHECKING:
    from alignops._C import TreeMark


class Leaves(NamedTuple):
    """Selected leaves, by tree and in the order of their selection: tensors of shape (M,).

    Attributes:
        tree, node: int32 ids.
        parent, slot: int32, the node above and the edge of it that leads here; -1, 0 at a root.
        depth: int32, edges from the root that the tree began with.
        collision: bool, another selection in flight had this leaf already.
        evaluated: bool, a leaf that was backed up before and has no edges: an end.
        ticket: int64, for one `backup` or `cancel`.
    """

    tree: Tensor
    node: Tensor
    parent: Tensor
    slot: Tensor
    depth: Tensor
    collision: Tensor
    evaluated: Tensor
    ticket: Tensor


class Edges(NamedTuple):
    """The edges of a node: tensors of shape (n_edges,), copies.

    Attributes:
        action: int32.
        prior: float32.
        q: float32, reward + discount * value of the child; NaN while nothing was backed up.
        visits: float32, those in flight as the policy counts them.
        child: int32 node; -1 not made yet, -2 pruned.
    """

    action: Tensor
    prior: Tensor
    q: Tensor
    visits: Tensor
    child: Tensor


class Paths(NamedTuple):
    """Path i is elements ptr[i] to ptr[i + 1].

    Attributes:
        ptr: (M + 1,) int64.
        node: (E,) int32, from the first node below the root to the node asked for.
        action: (E,) int32, of the edges into these nodes.
    """

    ptr: Tensor
    node: Tensor
    action: Tensor


class Trees(NamedTuple):
    """One number per tree, shape (B,).

    Attributes:
        root, nodes: int32, id of the root and nodes in use.
        low, high: float32, smallest and largest value seen; inf and -inf before the first.
    """

    root: Tensor
    nodes: Tensor
    low: Tensor
    high: Tensor


def _array(value: Any, dtype: torch.dtype, op: str, argument: str) -> np.ndarray:
    """One dimension, on the CPU, of this dtype."""
    tensor = torch.as_tensor(value)
    check(tensor.device.type == "cpu", f"{op}: {argument} must be on the CPU, got {tensor.device}")
    if dtype.is_floating_point:
        check(
            tensor.dtype.is_floating_point,
            f"{op}: {argument} must be floating point, got {tensor.dtype}",
        )
    else:
        check(
            not tensor.dtype.is_floating_point and not tensor.dtype.is_complex,
            f"{op}: {argument} must be integers, got {tensor.dtype}",
        )
    return tensor.detach().to(dtype).contiguous().reshape(-1).numpy()


def _signed(array: NDArray[Any]) -> Tensor:
    """A copy, in a dtype that torch has."""
    signed = {np.dtype(np.uint16): np.int32, np.dtype(np.uint32): np.int64}
    return torch.from_numpy(array.astype(signed.get(array.dtype, array.dtype)))


class TreeStore:
    """B search trees that grow together, and one search over them.

    An iteration is `select`, then `expand` and `backup` of what was selected, in any order; nets
    run in between, in the caller's code. A node is 64 bytes, an edge 20. Address space for the
    capacities is reserved, memory is taken as the trees grow.

    Trees do not depend on each other: results are the same for any number of threads, any
    instruction set, any order of the trees.

    Args:
        trees: B, 0 or more.
        policy: of selection; see `alignops.tree.policies`.
        backup: of values.
        capacity: nodes per tree.
        edge_capacity: edges per tree, each node's rounded up to 8 times a power of two; default 64
            for each node.
        seed: of Boltzmann draws (Philox4x32-10, counted by tree, selection and depth).

    Raises:
        ValueError: an option or a capacity is out of range.
        MemoryError: the address space does not hold the capacities.
    """

    def __init__(
        self,
        trees: int,
        policy: Policy | None = None,
        backup: Backup | None = None,
        *,
        capacity: int = 1 << 20,
        edge_capacity: int | None = None,
        seed: int = 0,
    ) -> None:
        self.policy = PUCT() if policy is None else policy
        self.backup_rule = Mean() if backup is None else backup
        lanes = 64 * capacity if edge_capacity is None else -(-edge_capacity // 8) * 8
        self._native = _native.library.TreeStore(
            trees, capacity, lanes, {**self.policy.options(), **self.backup_rule.options()}, seed
        )
        self._size = trees
        self.arguments: dict[str, Any] = {
            "trees": trees,
            "policy": self.policy,
            "backup": self.backup_rule,
            "capacity": capacity,
            "edge_capacity": lanes,
            "seed": seed,
        }

    def __len__(self) -> int:
        return self._size

    def select(self, leaves: int = 1) -> Leaves:
        """Select up to `leaves` leaves of each tree.

        A leaf is a node without edges: one made by this call, an end, or one that waits for its
        evaluation (a collision). Until their tickets are used, selections count as in flight.

        Raises:
            ValueError: `leaves` is negative.
            CapacityError: a tree may lack room for so many new nodes.
            StateError: another thread is using the store.
        """
        return Leaves(*map(torch.from_numpy, self._native.select(leaves)))

    def expand(
        self,
        tree: Tensor,
        node: Tensor,
        actions: Tensor,
        priors: Tensor,
        ptr: Tensor | None = None,
        *,
        normalize: bool = True,
    ) -> None:
        """Give nodes their edges.

        Args:
            tree: (M,) ids.
            node: (M,) ids.
            actions: (M, A), or (E,) with `ptr`: integers of at least 0, distinct within a row.
            priors: floats of the same shape, at least 0.
            ptr: (M + 1,) row i has the elements ptr[i] to ptr[i + 1]; a row without any makes its
                node a dead end.
            normalize: to a sum of 1; else priors are weights as they are.

        Raises:
            ValueError: a shape or dtype is wrong, an action negative or there twice.
            InvalidPriorError: priors are negative, not finite, or sum to 0.
            NodeIndexError: there is no such node.
            StateError: a node has edges already or is terminal.
            CapacityError: a tree lacks lanes.
        """
        op = "TreeStore.expand"
        check(
            tuple(actions.shape) == tuple(priors.shape),
            f"{op}: priors must have the shape of actions {tuple(actions.shape)}, got "
            f"{tuple(priors.shape)}",
        )
        check(
            actions.dim() == (2 if ptr is None else 1),
            f"{op}: actions must have shape {'(M, A)' if ptr is None else '(E,)'}, got "
            f"{tuple(actions.shape)}",
        )
        trees = _array(tree, torch.int32, op, "tree")
        check(
            ptr is not None or actions.shape[0] == len(trees),
            f"{op}: actions must have {len(trees)} rows, as tree has, got {actions.shape[0]}",
        )
        self._native.expand(
            trees,
            _array(node, torch.int32, op, "node"),
            None if ptr is None else _array(ptr, torch.int64, op, "ptr"),
            actions.shape[-1] if ptr is None else 0,
            _array(actions, torch.int32, op, "actions"),
            _array(priors, torch.float32, op, "priors"),
            normalize,
        )

    def backup(self, ticket: Tensor, values: Tensor) -> None:
        """End selections with the values of their leaves, (M,) each.

        Raises:
            InvalidValueError: a value is NaN or infinite (-inf is allowed with `Soft`).
            StateError: a ticket is not open.
            CapacityError: a tree would count more than 2^24 visits.
        """
        op = "TreeStore.backup"
        self._native.backup(
            _array(ticket, torch.int64, op, "ticket"), _array(values, torch.float32, op, "values")
        )

    def cancel(self, ticket: Tensor) -> None:
        """End selections as if they had not been; nodes that they made stay, without edges.

        Raises:
            StateError: a ticket is not open.
        """
        self._native.cancel(_array(ticket, torch.int64, "TreeStore.cancel", "ticket"))

    def descend(self, ticket: Tensor) -> Leaves:
        """Go on with selections whose leaves have edges by now; the tickets stay open.

        Returns:
            The leaves that were reached, in the order of the tickets.

        Raises:
            StateError: a ticket is not open, or its leaf has no edges.
            CapacityError: a tree may lack room.
        """
        tickets = _array(ticket, torch.int64, "TreeStore.descend", "ticket")
        return Leaves(*map(torch.from_numpy, self._native.descend(tickets)))

    def visit(self, tree: Tensor, node: Tensor, slot: Tensor) -> Leaves:
        """Select the children behind given edges, (M,) each, whatever the policy would say.

        Returns:
            The children, in the order of the rows.

        Raises:
            NodeIndexError: there is no such node below the root, or no such edge.
            CapacityError: a tree lacks room.
        """
        op = "TreeStore.visit"
        leaves = self._native.visit(
            _array(tree, torch.int32, op, "tree"),
            _array(node, torch.int32, op, "node"),
            _array(slot, torch.int32, op, "slot"),
        )
        return Leaves(*map(torch.from_numpy, leaves))

    def grow(self, ticket: Tensor, actions: Tensor, *, merge: bool = False) -> Leaves:
        """Give the leaf of each selection one more child, and move the selection there.

        Args:
            ticket: (M,) of open selections.
            actions: (M,) integers of at least 0. Weights (priors) of new edges are 1.
            merge: a child behind an edge of the same action is taken, and its weight rises by 1;
                else every call makes a child of its own.

        Returns:
            The children, in the order of the tickets.

        Raises:
            ValueError: an action is negative, or a shape or dtype wrong.
            StateError: a ticket is not open, or its leaf is an end.
            CapacityError: a tree may lack room.
        """
        op = "TreeStore.grow"
        leaves = self._native.grow(
            _array(ticket, torch.int64, op, "ticket"),
            _array(actions, torch.int32, op, "actions"),
            merge,
        )
        return Leaves(*map(torch.from_numpy, leaves))

    def end(self, tree: Tensor, node: Tensor) -> None:
        """Mark nodes as ends: they are evaluated, and get no edges.

        Raises:
            NodeIndexError, StateError: there is no such node, or it has edges.
        """
        op = "TreeStore.end"
        self._native.end(
            _array(tree, torch.int32, op, "tree"), _array(node, torch.int32, op, "node")
        )

    def set_rewards(self, tree: Tensor, node: Tensor, rewards: Tensor) -> None:
        """Rewards of the edges into nodes that were not backed up yet, (M,) each.

        Raises:
            NodeIndexError, StateError: there is no such node, or it was backed up already.
            InvalidValueError: a reward is not finite.
        """
        op = "TreeStore.set_rewards"
        self._native.set_rewards(
            _array(tree, torch.int32, op, "tree"),
            _array(node, torch.int32, op, "node"),
            _array(rewards, torch.float32, op, "rewards"),
        )

    def column(self, name: str) -> Tensor:
        """A field of all nodes, (B, nodes in use of the largest tree), a copy.

        What is behind a tree's own `trees().nodes` is 0. `n`: visits; `fn`: backups; `value`: as
        the backup rule says; `raw_value`: what was backed up at the node itself.

        Raises:
            ValueError: there is no such column.
        """
        used = int(self.trees().nodes.max()) if self._size else 0
        return _signed(self._native.column(name)[:, :used])

    def gather(self, name: str, tree: Tensor, node: Tensor) -> Tensor:
        """A field of some nodes, (M,): see `column`.

        Raises:
            ValueError: there is no such column.
            IndexError: there is no such node.
        """
        op = "TreeStore.gather"
        rows = _array(tree, torch.int32, op, "tree"), _array(node, torch.int32, op, "node")
        return _signed(self._native.column(name)[rows])

    def paths(self, tree: Tensor, node: Tensor) -> Paths:
        """What lies between the roots and some nodes, (M,) each.

        Raises:
            NodeIndexError: there is no such node, or it is not below the root.
        """
        op = "TreeStore.paths"
        found = self._native.paths(
            _array(tree, torch.int32, op, "tree"), _array(node, torch.int32, op, "node")
        )
        return Paths(*map(torch.from_numpy, found))

    def set_payloads(self, tree: Tensor, node: Tensor, payloads: Tensor) -> None:
        """Numbers of the caller's that nodes carry (column `payload`), int32, (M,) each.

        Raises:
            NodeIndexError: there is no such node.
        """
        op = "TreeStore.set_payloads"
        self._native.set_payloads(
            _array(tree, torch.int32, op, "tree"),
            _array(node, torch.int32, op, "node"),
            _array(payloads, torch.int32, op, "payloads"),
        )

    def sample(self, tree: int, n: int, *, rate: float = 1.0, seed: int = 0) -> Tensor:
        """Ends of independent descents through edges that have values; no model is called.

        Args:
            tree: which one.
            n: how many.
            rate: an edge is drawn with probability proportional to prior * exp(rate * Q); inf
                takes the largest Q.
            seed: of the draws.

        Returns:
            (n,) int32 node ids.

        Raises:
            ValueError: `n` or `rate` is negative.
            NodeIndexError: there is no such tree.
        """
        check(rate >= 0, f"TreeStore.sample: rate must be at least 0, got {rate}")
        return torch.from_numpy(self._native.descents(tree, n, rate, seed))

    def edges(self, tree: int, node: int) -> Edges:
        """The edges of a node.

        Raises:
            NodeIndexError: there is no such node.
        """
        return Edges(*map(torch.from_numpy, self._native.edges(tree, node)))

    def trees(self) -> Trees:
        """Roots, sizes and bounds."""
        return Trees(*map(torch.from_numpy, self._native.trees()))

    def reroot(self, edges: Tensor, trees: Tensor | None = None) -> None:
        """Make the child behind an edge of each root the new root; all statistics stay.

        A child that was not made yet becomes a root without any. What is not below the new root is
        dead, but takes room until `compact`.

        Args:
            edges: (M,) slots.
            trees: (M,) ids, distinct; default all.

        Raises:
            ValueError: `edges` has another length than `trees`.
            NodeIndexError: there is no such tree or edge, or the edge was pruned.
            StateError: selections are in flight.
            CapacityError: no room for a new root.
        """
        op = "TreeStore.reroot"
        which = torch.arange(self._size) if trees is None else trees
        self._native.reroot(
            _array(which, torch.int32, op, "trees"), _array(edges, torch.int64, op, "edges")
        )

    def compact(self) -> Tensor:
        """Free the room of dead nodes: what is below a root moves to the front, breadth first.

        Returns:
            (B, nodes of the largest tree before) int32: the new id of each node, or -1.

        Raises:
            StateError: selections are in flight.
        """
        return torch.from_numpy(self._native.compact())

    def prune(
        self,
        *,
        keep_top_k: int | None = None,
        by: str = "n",
        min_visits: float = 0.0,
        value_below: float = -math.inf,
    ) -> int:
        """Cut children off; the edges keep their statistics, so values above do not change.

        Args:
            keep_top_k: of the children of a node only so many stay.
            by: what orders them: "n" (visits) or "value".
            min_visits: children with fewer visits are cut.
            value_below: children with a value below this are cut.

        Returns:
            How many edges were cut. The nodes below are dead until `compact`.

        Raises:
            ValueError: `keep_top_k` is negative, or `by` unknown.
            StateError: selections are in flight.
        """
        check(by in ("n", "value"), f"TreeStore.prune: by must be 'n' or 'value', got {by!r}")
        check(
            keep_top_k is None or keep_top_k >= 0,
            f"TreeStore.prune: keep_top_k must be at least 0, got {keep_top_k}",
        )
        most = (1 << 40) if keep_top_k is None else keep_top_k
        return self._native.prune(most, by == "value", min_visits, value_below)

    def mark(self) -> TreeMark:
        """A copy of all trees, to go back to; costs as many bytes as they hold."""
        return self._native.mark()

    def restore(self, mark: TreeMark) -> None:
        """Go back to a mark; tickets given out since are void, those open then are open.

        Raises:
            ValueError: the mark is of a store with another number of trees.
        """
        self._native.restore(mark)

    def state_dict(self) -> dict[str, Tensor]:
        """Every field of all trees as a one-dimensional tensor, for files and copies."""
        return {name: torch.from_numpy(x) for name, x in self._native.columns().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state_dict` told; a search goes on as it would have there.

        Raises:
            TreeFormatError: a column is missing, or holds what no store can have written. The store
                must not be used any more then.
        """
        missing = self._native.columns().keys() - state.keys()
        if missing:
            raise TreeFormatError(f"column {min(missing)} is missing")
        self._native.load({name: column.numpy() for name, column in state.items()})

    def __getstate__(self) -> dict[str, Any]:
        return {"arguments": self.arguments, "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["arguments"])  # type: ignore[misc]
        self.load_state_dict(state["state"])

    def validate(self) -> None:
        """Check every link and count.

        Raises:
            StateError: naming the first that does not hold.
        """
        self._native.validate()

    @property
    def bytes(self) -> int:
        """Bytes of records and lanes in use."""
        return self._native.bytes()
