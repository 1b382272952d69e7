"""New roots, cut edges, marks, files, exports."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from alignops import tree
from alignops.tree import TreeStore
from alignops.tree.export import draw, nodes, to_dot, to_json, to_networkx
from alignops.tree.files import load, save
from tests.tree.worlds import Driver, World

TREES = 6
STATISTICS = ("n", "fn", "value_sum", "value", "raw_value", "depth", "reward")


def grown(
    steps: int = 40, policy: tree.Policy | None = None, k: int = 2, depth: int = 6
) -> tuple[TreeStore, Driver]:
    store = TreeStore(TREES, policy or tree.muzero(), capacity=4000, seed=11)
    driver = Driver(store, [World(t, 5, depth=depth) for t in range(TREES)])
    for _ in range(steps):
        driver.step(k)
    return store, driver


def paths(store: TreeStore, t: int) -> dict[tuple[int, ...], dict[str, float]]:
    """Statistics of the nodes below the root, by their slots from there."""
    where: dict[int, tuple[int, ...]] = {}
    out = {}
    for row in nodes(store, t):
        parent = row["parent"]
        where[row["id"]] = () if parent is None else (*where[parent], row["slot"])
        out[where[row["id"]]] = {
            k: row[k] for k in ("n", "fn", "value", "depth", "action", "prior")
        }
    return out


def best_edges(store: TreeStore) -> torch.Tensor:
    return torch.stack(
        [store.edges(t, int(store.trees().root[t])).visits.argmax() for t in range(TREES)]
    )


def known(store: TreeStore, driver: Driver) -> Driver:
    """A driver for a store whose ids have changed; path -1 of the old one leads to the root."""
    out = Driver(store, driver.worlds)
    for t in range(TREES):
        parent, slot = store.column("parent")[t].tolist(), store.column("parent_slot")[t].tolist()
        out.paths[t][0] = driver.paths[t][-1]
        for id in range(1, int(store.trees().nodes[t])):
            out.paths[t][id] = (*out.paths[t][parent[id]], slot[id])
    return out


def test_a_new_root_keeps_every_statistic() -> None:
    store, _ = grown()
    before = [paths(store, t) for t in range(TREES)]
    edges = best_edges(store)
    store.reroot(edges)
    store.validate()
    for t in range(TREES):
        edge = int(edges[t])
        want = {p[1:]: s for p, s in before[t].items() if p[:1] == (edge,)}
        got = paths(store, t)
        for row in (want[()], got[()]):
            row["action"] = row["prior"] = None
        assert got == want


def test_compact_then_search_is_search_then_compact() -> None:
    (lazy, driver), (moved, _) = grown(), grown()
    edges = best_edges(lazy)
    for t in range(TREES):
        driver.paths[t][-1] = (int(edges[t]),)
    sizes = moved.trees().nodes.clone()
    lazy.reroot(edges)
    moved.reroot(edges)
    ids = moved.compact()
    moved.validate()
    for t in range(TREES):
        kept = ids[t][: int(sizes[t])] >= 0
        assert int(kept.sum()) == int(moved.trees().nodes[t]) < int(sizes[t])
        new = ids[t][: int(sizes[t])][kept].long()
        for name in STATISTICS:
            old_column = lazy.column(name)[t, : int(sizes[t])][kept]
            assert torch.equal(
                moved.column(name)[t, new].nan_to_num(7.0), old_column.nan_to_num(7.0)
            )
    drivers = Driver(lazy, driver.worlds), known(moved, driver)
    drivers[0].paths = driver.paths
    for x in drivers:
        for _ in range(15):
            x.step(2)
    for t in range(TREES):
        assert paths(lazy, t) == paths(moved, t)
    assert moved.bytes < lazy.bytes


def test_roots_that_were_never_visited_are_cold() -> None:
    store, _ = grown(steps=3)
    missing = torch.stack([(store.edges(t, 0).child < 0).int().argmax() for t in range(TREES)])
    store.reroot(missing)
    store.validate()
    root = store.trees().root.long()
    assert store.column("n").gather(1, root[:, None]).abs().sum() == 0
    leaves = store.select()
    assert torch.equal(leaves.node.long(), root)
    assert leaves.parent.tolist() == [-1] * TREES
    with pytest.raises(tree.StateError, match="tree 0 has 1 selections in flight"):
        store.reroot(missing)
    with pytest.raises(tree.StateError, match="in flight"):
        store.compact()
    with pytest.raises(tree.StateError, match="in flight"):
        store.prune(keep_top_k=1)


def test_memory_does_not_grow_with_new_roots() -> None:
    store, driver = grown(steps=20, depth=1000)
    sizes = []
    for _ in range(60):
        for t, edge in enumerate(best_edges(store).tolist()):
            driver.paths[t] = {-1: (*driver.paths[t][0], edge)}
        store.reroot(best_edges(store))
        store.compact()
        driver = known(store, driver)
        for _ in range(20):
            driver.step(2)
        sizes.append(store.bytes)
    store.validate()
    assert max(sizes[30:]) <= 1.5 * max(sizes[:30])


def test_pruned_edges_keep_what_is_known_above() -> None:
    store, _ = grown(policy=tree.UCT(c=1.0))  # visits every edge first
    value, n = store.column("value").clone(), store.column("n").clone()
    edges = [store.edges(t, 0) for t in range(TREES)]
    cut = store.prune(keep_top_k=2)
    assert cut > 0
    store.validate()
    for t in range(TREES):
        after = store.edges(t, 0)
        kept = (after.child >= 0).sum()
        assert kept == min(2, int((edges[t].child >= 0).sum()))
        assert torch.equal(after.visits, edges[t].visits)
        best = edges[t].visits.topk(int(kept)).values.min()
        assert bool((after.visits[after.child >= 0] >= best).all())
    assert torch.equal(store.column("value"), value)
    assert torch.equal(store.column("n"), n)
    store.compact()
    store.validate()
    leaves = store.select(3)
    assert bool((store.column("parent")[leaves.tree.long(), leaves.node.long()] != -2).all())
    store.cancel(leaves.ticket)
    with pytest.raises(tree.NodeIndexError, match="was pruned"):
        store.reroot(
            torch.stack([(store.edges(t, 0).child == -2).int().argmax() for t in range(TREES)])
        )
    assert store.prune(value_below=2.0) > 0
    assert all(bool((store.edges(t, 0).child < 0).all()) for t in range(TREES))
    shut = [bool((store.edges(t, 0).child == -2).all()) for t in range(TREES)]
    assert any(shut)
    leaves = store.select()
    assert leaves.evaluated.tolist() == shut  # of an edge that is left, a child was made
    assert [bool(x) for x in leaves.parent < 0] == shut
    store.backup(leaves.ticket, torch.zeros(TREES))
    store.validate()


def test_marks_go_back_to_the_bit() -> None:
    store, driver = grown(policy=tree.Boltzmann())
    mark = store.mark()
    want = store.state_dict()
    for t in range(TREES):
        driver.paths[t] = dict(driver.paths[t])
    later = []
    for _ in range(2):
        for _ in range(10):
            driver.step(3)
        later.append(store.state_dict())
        store.restore(mark)
        store.validate()
        got = store.state_dict()
        assert all(torch.equal(got[k].nan_to_num(9), want[k].nan_to_num(9)) for k in want)
    assert all(torch.equal(later[0][k].nan_to_num(9), later[1][k].nan_to_num(9)) for k in want)
    with pytest.raises(ValueError, match="the mark is of 6 trees, the store has 2"):
        TreeStore(2).restore(mark)


@pytest.mark.parametrize("policy", [tree.Boltzmann(), tree.rain()])
def test_a_saved_search_goes_on_as_if_nothing_had_been(tmp_path: Path, policy: tree.Policy) -> None:
    store, _ = grown(policy=policy)
    waiting = store.select(2)
    save(store, tmp_path / "trees")
    others = [load(tmp_path / "trees"), pickle.loads(pickle.dumps(store))]
    for x in (store, *others):
        x.validate()
        x.backup(waiting.ticket, torch.linspace(-1, 1, len(waiting.ticket)))
        x.validate()
    states = [x.state_dict() for x in (store, *others)]
    for state in states[1:]:
        assert all(torch.equal(state[k].nan_to_num(9), states[0][k].nan_to_num(9)) for k in state)
    for x in (store, *others):
        leaves = x.select(3)
        assert torch.equal(leaves.node, store.column("parent")[:0].new_tensor(leaves.node.tolist()))
        x.cancel(leaves.ticket)
    assert len({tuple(x.state_dict()["draws"].tolist()) for x in (store, *others)}) == 1


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    store, _ = grown(steps=5)
    path = tmp_path / "trees"
    save(store, path)
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    header = struct.unpack_from("<I", data, 12)[0]
    columns = 16 + header
    refused = 0
    for place in rng.integers(0, len(data), 150):
        broken = bytearray(data)
        broken[place] ^= 0x41
        path.write_bytes(broken)
        try:
            load(path).validate()
        except tree.TreeFormatError:
            refused += 1
    assert refused > 100  # the rest is padding, or numbers of the header that are as good
    for length in (0, 5, 14, 40, columns, len(data) // 2, len(data) - 200):
        path.write_bytes(data[:length])
        with pytest.raises(tree.TreeFormatError, match=str(path)):
            load(path)
    path.write_bytes(data[:8] + struct.pack("<I", 9) + data[12:])
    with pytest.raises(tree.TreeFormatError, match="has version 9, this release reads up to 1"):
        load(path)
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(tree.TreeFormatError, match="is not a file of search trees"):
        load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["trees"]


def test_columns_that_no_store_can_have_written_are_refused() -> None:
    store, _ = grown(steps=4)
    state = store.state_dict()
    rng = np.random.default_rng(1)
    for name, column in state.items():
        if column.dtype.is_floating_point or not len(column):
            continue
        for value in (-5, 1 << 20, int(column.max()) + 1):
            broken = {k: v.clone() for k, v in state.items()}
            broken[name][int(rng.integers(len(column)))] = value
            fresh = TreeStore(TREES, tree.muzero(), capacity=4000)
            try:
                fresh.load_state_dict(broken)
            except tree.TreeFormatError:
                continue
            fresh.select(2)  # whatever was let through is harmless
    for name in state:
        fresh = TreeStore(TREES, tree.muzero(), capacity=4000)
        with pytest.raises(tree.TreeFormatError, match=f"column {name} is missing"):
            fresh.load_state_dict({k: v for k, v in state.items() if k != name})
        if len(state[name]):
            with pytest.raises(tree.TreeFormatError):
                fresh.load_state_dict(state | {name: state[name][:-1]})


def test_exports_agree_with_the_store() -> None:
    store, _ = grown()
    rows = list(nodes(store, 2))
    assert len(rows) == int(store.trees().nodes[2])
    document = json.loads(json.dumps(to_json(store, 2, max_nodes=10)))
    assert document["root"] == 0
    assert document["nodes"] == rows[:10]
    graph = to_networkx(store, 2)
    assert graph.number_of_nodes() == len(rows)
    assert graph.number_of_edges() == len(rows) - 1
    assert all(graph.nodes[r["id"]]["value"] == r["value"] for r in rows)
    dot = to_dot(store, 2, min_visits=3, label=lambda row: f'say "{row["id"]}"')
    assert dot.count("->") == sum(r["n"] >= 3 for r in rows) - 1
    assert '[label="say \\"0\\""]' in dot
    assert "value" in {axis.get_ylabel() for axis in draw(store, 2).figure.axes}
    with pytest.raises(ValueError, match="tree must be 0 to 5, got 6"):
        to_json(store, 6)
