"""The native search against the plain one, edge by edge."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from alignops import tree
from alignops.reference.tree import search
from alignops.tree import TreeStore
from tests.tree.worlds import Driver, World

PRESETS = {
    "muzero": (tree.muzero(), search.score_muzero),
    "lightzero": (tree.lightzero(), search.score_lightzero),
    "rain": (tree.rain(), search.score_rain),
    "uct": (tree.UCT(c=1.3), search.score_uct(1.3)),
}


def same(store: TreeStore, t: int, id: int, node: search.Node, discount: float) -> None:
    """A node and everything below it is as in the plain tree."""
    assert int(store.column("fn")[t, id]) == node.n
    assert float(store.column("value")[t, id]) == pytest.approx(node.value, abs=2e-6)
    edges = store.edges(t, id)
    q, visits = node.edges(discount)
    assert len(edges.child) == len(node.children)
    assert edges.visits.tolist() == visits.tolist()
    for slot, child in enumerate(node.children):
        assert (child is None) == (edges.child[slot] == -1)
        if child is not None:
            assert float(edges.q[slot]) == pytest.approx(q[slot], abs=3e-6)
            same(store, t, int(edges.child[slot]), child, discount)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("width", [1, 3, 8, 9, 40])
def test_one_leaf_at_a_time_is_the_plain_search(name: str, width: int, isa: str) -> None:
    policy, score = PRESETS[name]
    worlds = [World(seed, width, depth=4 if width == 3 else 100) for seed in range(5)]
    store = TreeStore(len(worlds), policy, capacity=100)
    driver = Driver(store, worlds)
    for _ in range(61):
        driver.step()
    store.validate()
    for t, world in enumerate(worlds):
        root, bounds = search.search(world.evaluate, 60, score)
        same(store, t, 0, root, 1.0)
        assert float(store.trees().high[t]) == pytest.approx(
            max(bounds.high, 1.0 if name == "rain" else -1), abs=2e-6
        )


def test_rewards_and_discount() -> None:
    worlds = [World(seed, 4, rewards=True) for seed in range(4)]
    store = TreeStore(4, tree.muzero(), tree.Mean(discount=0.9), capacity=100)
    driver = Driver(store, worlds)
    for _ in range(51):
        driver.step()
    score = partial(search.score_muzero, discount=0.9)
    for t, world in enumerate(worlds):
        root, _ = search.search(world.evaluate, 50, score, discount=0.9)
        same(store, t, 0, root, 0.9)


def everything(store: TreeStore) -> list[torch.Tensor]:
    names = ("parent", "parent_slot", "depth", "flags", "value_sum", "n", "fn", "value", "pending")
    return [store.column(name) for name in names]


def grown(policy: tree.Policy, trees: int, k: int, steps: int, seed: int = 3) -> TreeStore:
    store = TreeStore(trees, policy, capacity=k * steps + 1, seed=seed)
    driver = Driver(store, [World(t, 6) for t in range(trees)])
    for _ in range(steps):
        driver.step(k)
    store.validate()
    return store


@pytest.mark.parametrize("policy", [tree.muzero(), tree.Boltzmann(), tree.lightzero()])
def test_threads_and_levels_change_no_bit(policy: tree.Policy, isa: str) -> None:
    threads = torch.get_num_threads()
    want = everything(grown(policy, 70, 3, 8))
    try:
        torch.set_num_threads(1)
        got = everything(grown(policy, 70, 3, 8))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    if isa == "scalar":
        everything_scalar.append((policy, want))
    for other, scalar in everything_scalar:
        if other == policy:
            assert all(torch.equal(a, b) for a, b in zip(want, scalar, strict=True))


everything_scalar: list[tuple[tree.Policy, list[torch.Tensor]]] = []


@pytest.mark.parametrize(
    "policy",
    [
        tree.muzero(),
        tree.wu_uct(),
        tree.PUCT(in_flight="virtual_loss", loss_weight=3.0),
        tree.PUCT(in_flight="none"),
        tree.PUCT(on_collision="skip"),
        tree.Boltzmann(),
    ],
)
@pytest.mark.parametrize("k", [1, 2, 7])
def test_nothing_stays_in_flight(policy: tree.Policy, k: int) -> None:
    store = TreeStore(9, policy, capacity=1000)
    driver = Driver(store, [World(t, 5, depth=3) for t in range(9)])
    order = np.random.default_rng(0)
    done = torch.zeros(9, dtype=torch.int64)
    for _ in range(12):
        before = store.column("fn")[:, 0].clone()
        driver.step(k, order)
        done += store.column("fn")[:, 0] - before
        store.validate()
        assert int(store.column("pending").abs().sum()) == 0
    assert torch.equal(done, store.column("fn")[:, 0].to(torch.int64))
    if policy.on_collision == "share":
        assert done.tolist() == [12 * k] * 9
    for t in range(9):
        edges = store.edges(t, 0)
        made = edges.child >= 0
        children = edges.child[made].long()
        assert torch.equal(edges.visits[made], store.column("n")[t, children])
        assert torch.equal(edges.q[made], store.column("value")[t, children])


def test_visits_in_flight_spread_the_leaves() -> None:
    worlds = [World(t, 8) for t in range(6)]
    apart = {}
    for in_flight in ("wu_uct", "none"):
        store = TreeStore(6, tree.PUCT(in_flight=in_flight), capacity=1000)
        driver = Driver(store, worlds)
        for _ in range(10):
            driver.step()
        leaves = store.select(8)
        apart[in_flight] = len({*zip(leaves.tree.tolist(), leaves.node.tolist(), strict=True)})
        store.cancel(leaves.ticket)
    assert apart["none"] == 6  # the same leaf eight times
    assert apart["wu_uct"] > 30


def test_cancelled_selections_leave_no_trace() -> None:
    worlds = [World(t, 5) for t in range(4)]
    plain, cancelled = (TreeStore(4, tree.muzero(), capacity=1000) for _ in range(2))
    drivers = Driver(plain, worlds), Driver(cancelled, worlds)
    for _ in range(20):
        leaves = cancelled.select(3)
        cancelled.cancel(leaves.ticket.flip(0))
        for driver in drivers:
            driver.step()
    cancelled.validate()
    for t in range(4):
        root, _ = search.search(worlds[t].evaluate, 19, search.score_muzero)
        same(plain, t, 0, root, 1.0)
        assert plain.edges(t, 0).visits.tolist() == cancelled.edges(t, 0).visits.tolist()


def test_max_and_subtree_mean_are_what_the_children_say() -> None:
    for rule in (tree.Max(), tree.SubtreeMean()):
        worlds = [World(t, 4, depth=5) for t in range(5)]
        store = TreeStore(5, tree.UCT(c=0.4, fpu="inf"), rule, capacity=1000)
        driver = Driver(store, worlds)
        for _ in range(100):
            driver.step(2)
        value, raw = store.column("value"), store.column("raw_value")
        for t in range(5):
            for id in range(int(store.trees().nodes[t])):
                q = store.edges(t, id).q
                q = q[~q.isnan()].double()
                own = float(raw[t, id])
                if isinstance(rule, tree.Max):
                    want = max([own, *q.tolist()])
                else:
                    want = (own + float(q.sum())) / (1 + len(q))
                assert float(value[t, id]) == pytest.approx(want, abs=1e-6)


def test_empty_calls() -> None:
    empty = TreeStore(0)
    assert len(empty.select(4).tree) == 0
    empty.validate()
    store = TreeStore(3, capacity=10)
    assert len(store.select(0).tree) == 0
    none = torch.empty(0, dtype=torch.int64)
    store.backup(none, torch.empty(0))
    store.cancel(none)
    store.expand(none, none, torch.empty(0, 5, dtype=torch.int64), torch.empty(0, 5))
    assert store.trees().nodes.tolist() == [1, 1, 1]


def test_memory_is_what_was_promised() -> None:
    store = TreeStore(7, capacity=100)
    leaves = store.select()
    store.expand(
        leaves.tree, leaves.node, torch.arange(16).expand(7, 16), torch.full((7, 16), 1 / 16)
    )
    assert store.bytes == 7 * (64 + 20 * 16)
