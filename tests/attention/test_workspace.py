"""Blocks, workers and plans of a workspace: what is refused, what is left behind, what is moved."""

import threading

import numpy as np
import pytest
import torch

from alignops.attention import (
    KVPool,
    LayoutError,
    PoolExhausted,
    RopeSpec,
    StalePlan,
    StepError,
    Workspace,
    append_kv,
)
from alignops.attention.errors import BlockBusy
from alignops.attention.workspace import Block

LAYERS, HEADS, D = 2, 1, 8


def make_pool(pages: int = 32, page_size: int = 16) -> KVPool:
    pool = KVPool(
        LAYERS,
        HEADS,
        D,
        dtype=torch.float32,
        page_size=page_size,
        num_pages=pages,
        rope=RopeSpec.default(D, theta=100.0),
    )
    for t in (*pool.k, *pool.v):
        t.fill_(float("nan"))
    return pool


@pytest.fixture
def ws() -> Workspace:
    return Workspace(make_pool())


def write(ws: Workspace, block: Block, ids: list[int]) -> None:
    """Tokens whose keys are made of their ids."""
    plan = ws.plan([len(ids)], views=[[block]])
    for layer in range(LAYERS):
        k = torch.tensor(ids, dtype=torch.float32)[:, None, None] + torch.arange(D) + layer
        append_kv(ws.pool, layer, plan, k, -k)
    ws.commit(plan, [ids])


def values(ws: Workspace, block: Block) -> list[float]:
    """First column of the values of a block, in order."""
    entries, place, out = ws.native.segments(block.id)[1], 0, []
    p = ws.pool.page_size
    for n, first, *_ in block.segments.tolist():
        slots = np.arange(first, first + n)
        pages = entries[place + slots // p]
        out += ws.pool.v[0][pages, 0, slots % p, 0].tolist()
        place += -(-(first + n) // p)
    return out


def idle(ws: Workspace) -> bool:
    """Every reference is that of a segment's page, and no page is both used and free."""
    counts = np.zeros(ws.pool.num_pages, np.int64)
    for block in ws.blocks:
        np.add.at(counts, ws.native.segments(block.id)[1], 1)
    references = ws.pool.native.references()
    return bool(
        (counts == references).all()
        and ws.pool.free_pages + (references > 0).sum() == ws.pool.num_pages
    )


# --------------------------------------------------------------------------------------------------
# Refusals


def test_views_are_checked(ws: Workspace) -> None:
    a, b = ws.new_block("alpha"), ws.new_block("beta")
    worker = ws.add_worker("Ann", [a, b])
    with pytest.raises(LayoutError, match=r"'Ann'.*'beta'.*'alpha'"):
        ws.set_view(worker, [b, a])
    with pytest.raises(LayoutError, match=r"'Ann'.*'alpha' twice"):
        ws.set_view(worker, [a, a, b])
    with pytest.raises(LayoutError, match=r"'Ann'.*no blocks"):
        ws.set_view(worker, [])
    with pytest.raises(LayoutError, match=r"'Bob'.*'beta'.*'Ann'"):
        ws.add_worker("Bob", [a, b])
    stranger = Workspace(make_pool()).new_block("gamma")
    with pytest.raises(LayoutError, match=r"Ann.*gamma"):
        ws.set_view(worker, [stranger, b])
    with pytest.raises(LayoutError, match="gamma"):
        ws.move(stranger, a)
    with pytest.raises(LayoutError, match="'beta'"):
        ws.plan([1, 1], views=[[b], [a, b]])
    with pytest.raises(LayoutError, match="entry 0"):
        ws.plan([1], views=[[]])
    assert [block.name for block in ws.view(worker)] == ["alpha", "beta"]


def test_numbers_are_checked(ws: Workspace) -> None:
    a, b = ws.new_block(), ws.new_block()
    write(ws, a, [1, 2, 3])
    worker = ws.add_worker("Ann", [a, b])
    for start, stop in ((-1, 2), (2, 1), (0, 4)):
        with pytest.raises(IndexError, match="length 3"):
            ws.evict(a, start, stop)
    with pytest.raises(IndexError, match="got 4"):
        ws.truncate(a, 4)
    with pytest.raises(ValueError, match="dst"):
        ws.move(a, a)
    with pytest.raises(ValueError, match="mode"):
        ws.move(a, b, mode="fast")
    with pytest.raises(ValueError, match="keep"):
        ws.finish_worker(worker, keep="all")
    with pytest.raises(ValueError, match="counts"):
        ws.plan([1, 2])
    with pytest.raises(ValueError, match="at least 0"):
        ws.plan([-1])
    with pytest.raises(ValueError, match="visibility"):
        ws.plan([1], visibility="late")
    with pytest.raises(IndexError, match="worker"):
        ws.plan([1], workers=[7])
    with pytest.raises(IndexError, match="at_index"):
        ws.add_worker("Bob", [a], at_index=3)
    for bias, gain in ((float("nan"), 1.0), (float("inf"), 1.0), (0.0, float("inf"))):
        with pytest.raises(ValueError, match="set_weight"):
            ws.set_weight(worker, a, bias, gain)
    with pytest.raises(ValueError, match="tokens"):
        ws.commit(ws.plan([2]), [[1]])
    for bad in ({"page_size": 24}, {"num_pages": 0}, {"dtype": torch.int32}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            KVPool(1, 1, 8, **{"dtype": torch.float32, "num_pages": 4, **bad})
    with pytest.raises(ValueError, match="num_pages or bytes"):
        KVPool(1, 1, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="head of 4"):
        KVPool(1, 1, 4, dtype=torch.float32, num_pages=1, rope=RopeSpec.default(8))


def test_pool_sizes() -> None:
    pool = KVPool(2, [1, 2], [8, 4], 2, dtype=torch.bfloat16, bytes=100_000, page_size=16)
    assert pool.token_bytes == 2 * (1 * (8 + 2) + 2 * (4 + 2))
    assert pool.num_pages == 100_000 // (16 * pool.token_bytes)
    assert pool.k[1].shape == (pool.num_pages, 2, 16, 4)
    assert pool.v[0].shape == (pool.num_pages, 1, 16, 2)


def test_one_writer_per_block(ws: Workspace) -> None:
    a, b = ws.new_block("a"), ws.new_block("b")
    write(ws, a, [1])
    plan = ws.plan([1], views=[[b, a]], visibility="lagged")
    for change in (
        lambda: ws.plan([1], views=[[a]], visibility="lagged"),
        lambda: ws.move(a, b),
        lambda: ws.move(b, a),
        lambda: ws.evict(a, 0, 1),
        lambda: ws.truncate(a, 0),
        lambda: ws.clear(a),
    ):
        with pytest.raises(BlockBusy, match="'a'"):
            change()
    other = ws.plan([1], views=[[a, b]], visibility="lagged")
    ws.commit(other)
    ws.commit(plan)
    assert (a.length, b.length) == (2, 1)
    assert idle(ws)


def test_plans_go_stale(ws: Workspace) -> None:
    a, b = ws.new_block(), ws.new_block()
    write(ws, a, [1, 2])
    ws.add_worker("Ann", [a, b])
    plan = ws.plan([1])
    ws.evict(a, 0, 1)
    with pytest.raises(StalePlan, match="changed"):
        plan.require(0, "append")
    with pytest.raises(StalePlan, match="changed"):
        ws.commit(plan)
    assert plan.open
    ws.abort(plan)
    for use in (
        lambda: plan.data,
        lambda: plan.host,
        lambda: plan.decode(),
        lambda: plan.require(0, "attend"),
        lambda: plan.scratch(1, 1, 8, False),
        lambda: ws.commit(plan),
        lambda: ws.abort(plan),
    ):
        with pytest.raises(StalePlan):
            use()
    lagged = ws.plan([1], visibility="lagged")
    ws.evict(a, 0, 1)
    lagged.require(0, "append")
    ws.abort(lagged)
    assert idle(ws)


def test_layers_have_their_turn(ws: Workspace) -> None:
    a = ws.new_block()
    plan = ws.plan([1], views=[[a]])
    with pytest.raises(IndexError, match="below 2"):
        plan.require(2, "append")
    with pytest.raises(StepError, match="attend"):
        plan.require(0, "attend")
    with pytest.raises(StepError, match="must be 0"):
        plan.require(1, "append")
    plan.require(0, "append")
    plan.require(0, "attend")
    with pytest.raises(StepError, match="must be 1"):
        plan.require(0, "append")
    with pytest.raises(StepError, match="all 2 layers"):
        ws.commit(plan)
    plan.require(1, "append")
    ws.commit(plan)
    assert a.length == 1


def test_a_full_pool_refuses_before_anything() -> None:
    ws = Workspace(make_pool(pages=3))
    a, b = ws.new_block(), ws.new_block()
    write(ws, a, list(range(20)))
    with pytest.raises(PoolExhausted, match=r"needs 3 .* got 1"):
        ws.plan([20, 20], views=[[a], [b]])
    assert (a.length, b.length, ws.pool.free_pages) == (20, 0, 1)
    ws.evict(a, 0, 16)
    write(ws, b, list(range(20)))
    assert idle(ws)


def test_a_forgotten_plan_returns_its_pages(ws: Workspace) -> None:
    a = ws.new_block()
    plan = ws.plan([20], views=[[a]])
    assert ws.pool.free_pages == 30
    del plan
    assert ws.pool.free_pages == 32
    write(ws, a, [1])


# --------------------------------------------------------------------------------------------------
# Steps


def test_nobody_has_new_tokens(ws: Workspace) -> None:
    a, b = ws.new_block(), ws.new_block()
    write(ws, a, [1])
    ws.add_worker("Ann", [a, b])
    plan = ws.plan([0])
    assert (plan.rows, plan.counts, plan.blocks) == (0, (0,), (a, b))
    assert plan.position_ids().shape == (1, 0)
    assert plan.decode()["segments"] == 0
    ws.commit(plan)
    assert a.length == 1


@pytest.mark.parametrize("mode", ["raw", "local"])
def test_tables_of_a_plan(mode: str) -> None:
    ws = Workspace(make_pool(), rope_mode=mode)
    common, a, b = (ws.new_block(name) for name in ("common", "a", "b"))
    write(ws, common, list(range(20)))
    write(ws, a, [1, 2, 3])
    ws.move(a, common, mode="splice")
    ann = ws.add_worker("Ann", [common, b, a])
    ws.add_worker("Bob", [common, a, b])
    ws.set_weight(ann, b, bias=-1.5, gain=2.0)
    plan = ws.plan([2, 1])
    tables = plan.decode()
    assert tables["segment"][["block", "n", "s0", "r0", "token"]].tolist() == [
        (0, 20, 0, 0, 0),
        (0, 3, 20, 0, 20),
        (1, 1, 0, 0, 23),
        (2, 2, 0, 0, 24),
    ]
    raw = mode == "raw"
    # Ann's rows are at 24 (behind Bob's new token), Bob's at 25 (behind Ann's two).
    assert tables["pair"].tolist() == [
        [(1, 20, 24, 24), (1, 20, 25, 25)],
        [(1, 3, 4, 4), (1, 3, 5, 5)],
        [(1, 1, 1, 1), (1, 1, 0, 0)],
        [(2, 1, 0, 0), (1, 2, 2, 2)],
    ]
    assert tables["weight"][2].tolist() == [(-1.5, 2.0), (0.0, 1.0)]
    assert tables["step"] == int(raw)
    assert plan.first_positions == (24, 25)
    assert plan.local_index.tolist() == [0, 1, 0]
    assert plan.position_ids().tolist() == ([[0, 0], [0, 0]] if raw else [[0, 1], [0, 0]])
    positions = torch.from_numpy(
        np.concatenate([tables["pair"]["delta0"].ravel(), [0, 1], [0, 1, 0]])
    )
    expected = ws.pool.specs[0].rotations(positions)
    torch.testing.assert_close(torch.from_numpy(tables["rope"][0]), expected, rtol=0, atol=1e-7)
    ws.abort(plan)


def test_lagged_and_hidden_blocks(ws: Workspace) -> None:
    a, b = ws.new_block("a"), ws.new_block("b")
    write(ws, a, [1, 2])
    ann, bob = ws.add_worker("Ann", [b, a]), ws.add_worker("Bob", [a, b])
    plan = ws.plan([1, 1], visibility="lagged")
    pair = plan.decode()["pair"]
    # Bob's block is new: Ann sees none of it, and Bob of hers only what was there.
    assert pair[["state", "limit0"]].tolist() == [[(0, 0), (1, 1)], [(1, 3), (1, 2)]]
    assert plan.first_positions == (2, 2)
    ws.abort(plan)
    ws.set_weight(bob, a, bias=float("-inf"))
    plan = ws.plan([0, 1])
    tables = plan.decode()
    assert tables["segment"]["block"].tolist() == [plan.blocks.index(b)]
    assert plan.first_positions == (3, 2)  # behind Bob's new token
    ws.abort(plan)
    ws.set_weight(bob, a)
    plan = ws.plan([1], views=[[a]], workers=[ann], implicit_self=True)
    tables = plan.decode()
    assert tables["segment"][["n", "s0", "first"]].tolist() == [(1, 2, 2)]
    ws.abort(plan)


def test_rows_are_packed_and_unpacked(ws: Workspace) -> None:
    a, b = ws.new_block(), ws.new_block()
    plan = ws.plan([2, 1], views=[[a], [b]])
    x = torch.arange(2 * 3 * 2 * 4.0).view(2, 3, 2, 4)
    packed = plan.rows_of(x)
    assert packed.tolist() == [x[0, :, 0].tolist(), x[0, :, 1].tolist(), x[1, :, 1].tolist()]
    batch = plan.unpack(packed, fill=7.0)
    assert batch[0].equal(x[0])
    assert batch[1, :, 1].equal(x[1, :, 1])
    assert bool((batch[1, :, 0] == 7).all())
    with pytest.raises(ValueError, match="rows_of"):
        plan.rows_of(x[:1])
    with pytest.raises(ValueError, match="unpack"):
        plan.unpack(packed[:2])


def test_memory_of_plans_is_used_again(ws: Workspace) -> None:
    a = ws.new_block()
    plan = ws.plan([3], views=[[a]])
    place, scratch = plan.data.data_ptr(), plan.scratch(1, 1, D, True).data_ptr()
    ws.abort(plan)
    plan = ws.plan([2], views=[[a]])
    assert plan.data.data_ptr() == place
    assert plan.scratch(1, 1, D, True).data_ptr() == scratch


# --------------------------------------------------------------------------------------------------
# Changes of blocks


def test_splices_move_no_byte(ws: Workspace) -> None:
    history, own = ws.new_block(), ws.new_block()
    write(ws, history, list(range(5)))
    write(ws, own, list(range(10, 40)))
    before = [t.clone() for t in (*ws.pool.k, *ws.pool.v)]
    ws.move(own, history, mode="splice")
    after = (*ws.pool.k, *ws.pool.v)
    assert all(
        a.equal(b) or (a.isnan() == b.isnan()).all() for a, b in zip(before, after, strict=True)
    )
    assert history.tokens == [*range(5), *range(10, 40)]
    assert history.segments[["s0", "r0", "n"]].tolist() == [(0, 0, 5), (5, 0, 30)]
    assert own.length == 0
    assert idle(ws)


def test_rewrites_turn_keys_once(ws: Workspace) -> None:
    history, own, third = (ws.new_block() for _ in range(3))
    write(ws, history, list(range(5)))
    write(ws, own, list(range(10, 40)))
    ws.move(own, history, mode="rewrite")
    assert history.segments[["n", "s0", "r0", "rewritten"]].tolist() == [(35, 0, 0, 1)]
    assert values(ws, history) == [-float(i) for i in history.tokens]
    whole = ws.new_block()
    write(ws, whole, [*range(5), *range(10, 40)])
    for layer in range(LAYERS):
        for b, c in zip(keys(ws, history, layer), keys(ws, whole, layer), strict=True):
            torch.testing.assert_close(b, c, rtol=1e-5, atol=1e-4)
    # A second move leaves their bytes alone.
    write(ws, third, [7])
    before = keys(ws, history, 0)
    ws.move(history, third, mode="rewrite")
    assert torch.equal(torch.stack(keys(ws, third, 0)[1:]), torch.stack(before))
    assert third.segments[["s0", "r0", "rewritten"]].tolist() == [(0, 0, 0), (1, 0, 1)]
    assert idle(ws)


def keys(ws: Workspace, block: Block, layer: int) -> list[torch.Tensor]:
    entries, place, out = ws.native.segments(block.id)[1], 0, []
    p = ws.pool.page_size
    for n, first, *_ in block.segments.tolist():
        out += [
            ws.pool.k[layer][entries[place + s // p], 0, s % p].clone()
            for s in range(first, first + n)
        ]
        place += -(-(first + n) // p)
    return out


def test_automatic_moves_join_segments(ws: Workspace) -> None:
    history, own = ws.new_block(), ws.new_block()
    write(ws, history, list(range(20)))
    ids = history.tokens
    for step in range(12):
        fresh = [100 * step + i for i in range(1, 10)]
        write(ws, own, fresh)
        ws.move(own, history, max_segments=4)
        ids += fresh
        assert len(history.segments) <= 5
    assert history.tokens == ids
    assert values(ws, history) == [-float(i) for i in ids]
    assert idle(ws)


def test_forks_share_pages_until_they_grow(ws: Workspace) -> None:
    a = ws.new_block("a")
    write(ws, a, list(range(20)))
    twin = ws.fork_block(a)
    assert ws.stats()["pages_used"] == ws.stats()["pages_shared"] == 2
    write(ws, twin, [50])
    write(ws, a, [60, 61])
    assert (a.tokens[-2:], twin.tokens[-2:]) == ([60, 61], [19, 50])
    assert values(ws, a) == [-float(i) for i in a.tokens]
    assert values(ws, twin) == [-float(i) for i in twin.tokens]
    assert ws.stats()["pages_used"] == 3
    other = ws.fork()
    other.clear(other.block(a.id))
    assert a.tokens[-1] == 61
    del other
    assert idle(ws)
    ann = ws.add_worker("Ann", [twin, a])
    bob = ws.fork_worker(ann, "Bob")
    assert ws.view(bob)[0] is twin
    assert ws.view(bob)[1].tokens == a.tokens
    assert ws.workers == (ann, bob)


def test_an_aborted_step_leaves_a_fork_alone(ws: Workspace) -> None:
    a = ws.new_block()
    write(ws, a, [1, 2])
    twin = ws.fork_block(a)
    plan = ws.plan([1, 1], views=[[a], [twin]])
    assert ws.pool.free_pages == 30
    ws.abort(plan)
    assert ws.pool.free_pages == 31
    assert idle(ws)


@pytest.mark.parametrize("keep", ["history", "frozen", "drop"])
def test_workers_leave_and_come(ws: Workspace, keep: str) -> None:
    common, a, b, c = (ws.new_block() for _ in range(4))
    ann, bob = ws.add_worker("Ann", [common, b, a]), ws.add_worker("Bob", [common, a, b])
    write(ws, a, [1, 2])
    ws.finish_worker(ann, keep=keep)
    eve = ws.add_worker("Eve", [common, a, c], at_index=0)
    assert ws.workers == (eve, bob)
    assert (common.tokens, a.tokens) == {
        "history": ([1, 2], []),
        "frozen": ([], [1, 2]),
        "drop": ([], []),
    }[keep]
    assert ws.plan([1, 1]).workers == (eve, bob)


def test_two_workspaces_in_two_threads() -> None:
    pool = make_pool(pages=64)
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            ws = Workspace(pool)
            history, own = ws.new_block(), ws.new_block()
            for i in range(40):
                write(ws, own, [seed + i, seed + i + 1])
                if i % 5 == 4:
                    ws.move(own, history)
            ids = [seed + i + d for i in range(40) for d in (0, 1)]
            assert history.tokens == ids
            assert values(ws, history) == [-float(i) for i in ids]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(1000 * i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert pool.free_pages == 64
