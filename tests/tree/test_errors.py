"""Every misuse of a tree store is refused by name, and nothing is changed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from alignops import tree
from alignops.tree import TreeStore


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def started(capacity: int = 50, policy: tree.Policy | None = None) -> TreeStore:
    """Two trees whose roots have three edges."""
    store = TreeStore(2, policy, capacity=capacity, edge_capacity=64)
    leaves = store.select()
    store.expand(leaves.tree, leaves.node, torch.arange(3).expand(2, 3), torch.ones(2, 3))
    store.backup(leaves.ticket, torch.zeros(2))
    return store


ROW = {"tree": tensor(1), "node": tensor(1), "actions": torch.arange(3)[None]}


def expand(store: TreeStore, **changes: object) -> None:
    leaves = store.select()
    arguments = ROW | {"priors": torch.ones(1, 3)} | changes
    try:
        store.expand(**arguments)
    finally:
        store.cancel(leaves.ticket)


CASES: list[tuple[str, Callable[[TreeStore], object], type[Exception], str]] = [
    ("k", lambda s: s.select(-1), ValueError, "k must be at least 0, got -1"),
    ("tree", lambda s: expand(s, tree=tensor(2)), IndexError, "tree must be 0 to 1, got 2"),
    ("node", lambda s: expand(s, node=tensor(7)), IndexError, "must be 0 to 1, got 7"),
    ("node sign", lambda s: expand(s, node=tensor(-1)), tree.NodeIndexError, "got -1"),
    ("twice", lambda s: expand(s, node=tensor(0)), tree.StateError, "is expanded already"),
    (
        "shapes",
        lambda s: expand(s, priors=torch.ones(3)),
        ValueError,
        r"priors must have the shape of actions \(1, 3\), got \(3,\)",
    ),
    (
        "rows",
        lambda s: expand(s, actions=torch.ones(2, 3).long(), priors=torch.ones(2, 3)),
        ValueError,
        "actions must have 1 rows, as tree has, got 2",
    ),
    (
        "dtype",
        lambda s: expand(s, actions=torch.ones(1, 3)),
        ValueError,
        "actions must be integers, got torch.float32",
    ),
    (
        "priors dtype",
        lambda s: expand(s, priors=torch.ones(1, 3).long()),
        ValueError,
        "priors must be floating point, got torch.int64",
    ),
    (
        "prior NaN",
        lambda s: expand(s, priors=tensor(0.1, float("nan"), 1)[None]),
        tree.InvalidPriorError,
        r"priors of row 0 \(tree 1\) must be finite and at least 0, got nan",
    ),
    (
        "prior sign",
        lambda s: expand(s, priors=tensor(0.1, -0.5, 1)[None]),
        tree.InvalidPriorError,
        "got -0.5",
    ),
    (
        "prior sum",
        lambda s: expand(s, priors=torch.zeros(1, 3)),
        tree.InvalidPriorError,
        "sum to 0",
    ),
    (
        "action twice",
        lambda s: expand(s, actions=torch.tensor([[4, 1, 4]])),
        ValueError,
        "actions of row 0 must be distinct",
    ),
    (
        "large action twice",
        lambda s: expand(s, actions=torch.tensor([[1 << 30, 1, 1 << 30]])),
        ValueError,
        "actions of row 0 must be distinct",
    ),
    (
        "action sign",
        lambda s: expand(s, actions=torch.tensor([[0, 1, -4]])),
        ValueError,
        "actions of row 0 must be at least 0, got -4",
    ),
    (
        "ptr falls",
        lambda s: expand(
            s,
            tree=tensor(0, 1),
            node=tensor(1, 1),
            actions=torch.arange(3),
            priors=torch.ones(3),
            ptr=torch.tensor([0, 4, 3]),
        ),
        ValueError,
        "ptr must not fall, got 4 before 3",
    ),
    (
        "ptr ends",
        lambda s: expand(
            s, actions=torch.arange(3), priors=torch.ones(3), ptr=torch.tensor([0, 2])
        ),
        ValueError,
        "ptr must run from 0 to 3, got 0 to 2",
    ),
    (
        "value",
        lambda s: s.backup(s.select().ticket, tensor(0.5, float("inf"))),
        tree.InvalidValueError,
        "values must be finite, got inf in row 1",
    ),
    (
        "values",
        lambda s: s.backup(s.select().ticket, tensor(0.5)),
        ValueError,
        "values must have 2 elements, as tickets has, got 1",
    ),
    ("ticket", lambda s: s.backup(tensor(0), tensor(1.0)), tree.StateError, "is not open"),
    ("foreign", lambda s: s.cancel(tensor(1 << 40)), tree.StateError, "was not given out"),
    ("ticket sign", lambda s: s.cancel(tensor(-1)), tree.StateError, "was not given out"),
    (
        "ticket twice",
        lambda s: s.cancel(s.select().ticket[[0, 0]]),
        tree.StateError,
        "a selection ends once",
    ),
    ("bare leaf", lambda s: s.descend(s.select().ticket), tree.StateError, "expand it first"),
    ("end", lambda s: s.end(tensor(0), tensor(0)), tree.StateError, "has edges"),
    (
        "reward late",
        lambda s: s.set_rewards(tensor(0), tensor(0), tensor(1.0)),
        tree.StateError,
        "was backed up already",
    ),
    ("column", lambda s: s.column("colour"), ValueError, "no column is named 'colour'"),
    ("edges", lambda s: s.edges(0, 9), tree.NodeIndexError, "must be 0 to 0, got 9"),
]


@pytest.mark.parametrize(
    ("call", "error", "text"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_misuse_is_refused(
    call: Callable[[TreeStore], object], error: type[Exception], text: str
) -> None:
    store, twin = started(), started()
    with pytest.raises(error, match=text):
        call(store)
    store.validate()
    leaves = store.select(0)
    assert len(leaves.tree) == 0
    for name in ("value_sum", "n", "fn", "n_edges"):
        assert torch.equal(store.column(name)[:, :1], twin.column(name))


def test_a_full_tree_says_so() -> None:
    store = TreeStore(2, capacity=3, edge_capacity=16)
    leaves = store.select()
    store.expand(leaves.tree, leaves.node, torch.arange(8).expand(2, 8), torch.ones(2, 8))
    store.backup(leaves.ticket, torch.zeros(2))
    with pytest.raises(tree.CapacityError, match="tree 0 has 1 of 3 nodes and may need 3 more"):
        store.select(3)
    leaves = store.select(2)
    with pytest.raises(tree.CapacityError, match="tree 0 has 8 of 16 lanes and needs 16 more"):
        store.expand(leaves.tree[:1], leaves.node[:1], torch.arange(9)[None], torch.ones(1, 9))
    store.cancel(leaves.ticket)
    store.validate()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: TreeStore(-1), "trees must be at least 0, got -1"),
        (lambda: TreeStore(1, capacity=0), "capacity must be 1 to"),
        (lambda: TreeStore(1, edge_capacity=0), "edge_capacity must be 8 to"),
        (lambda: TreeStore(1 << 40), "do not fit the address space"),
        (lambda: TreeStore(1, tree.PUCT(fpu="best")), "fpu must be one of zero, low, .*'best'"),
        (
            lambda: TreeStore(1, tree.PUCT(in_flight="virtual_loss"), tree.Max()),
            "virtual loss changes the values of edges",
        ),
        (lambda: tree.PUCT(c1=-1), "c1 must be at least 0, got -1"),
        (lambda: tree.PUCT(low=1, high=0), "low must not exceed high"),
        (lambda: tree.UCT(c=-0.1), "c must be at least 0"),
        (lambda: tree.Boltzmann(rate=-1), "rate must be finite and at least 0, got -1"),
        (lambda: tree.dts(growth=1.0), "growth must be between 0 and 1, got 1.0"),
        (lambda: tree.dts(width=-2), "width must be at least 0, got -2"),
        (lambda: tree.Mean(discount=1.5), "discount must be between 0 and 1, got 1.5"),
        (lambda: tree.Soft(rate=0), "rate must be above 0, got 0"),
    ],
)
def test_options_out_of_range(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_minus_infinity_is_a_soft_value_of_no_weight() -> None:
    store = TreeStore(1, tree.Boltzmann(), tree.Soft(), capacity=50)
    leaves = store.select()
    store.expand(leaves.tree, leaves.node, torch.arange(2)[None], torch.ones(1, 2))
    store.cancel(leaves.ticket)
    for value in (-float("inf"), 0.5):
        for _ in range(20):
            leaves = store.select()
            if not bool(leaves.evaluated[0]):
                break
            store.cancel(leaves.ticket)
        store.end(leaves.tree, leaves.node)
        store.backup(leaves.ticket, tensor(value))
    assert float(store.column("value")[0, 0]) == pytest.approx(0.5 - torch.log(tensor(2.0)).item())


def test_a_store_notices_two_threads() -> None:
    store = TreeStore(400, capacity=2000)
    errors: list[Exception] = []
    texts: list[str] = []

    def work() -> None:
        for _ in range(300):
            try:
                leaves = store.select(2)
                store.cancel(leaves.ticket)
            except tree.StateError as error:
                texts.append(str(error))
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert set(texts) <= {"TreeStore: is used by another thread"}
