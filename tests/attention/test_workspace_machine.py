"""Random changes of a workspace against a plain model: every block a list of tokens."""

from dataclasses import dataclass, field

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from alignops.attention import KVPool, PoolExhausted, RopeSpec, Workspace, append_kv
from alignops.attention.workspace import Block

PAGES, PAGE, D = 24, 16, 4
SPEC = RopeSpec.default(D, theta=50.0)


@dataclass
class Model:
    """Tokens with their positions, and the positions up to the end."""

    tokens: list[tuple[int, int]] = field(default_factory=list)
    extent: int = 0

    def append(self, ids: list[int]) -> None:
        self.tokens += [(self.extent + i, token) for i, token in enumerate(ids)]
        self.extent += len(ids)

    def evict(self, start: int, stop: int, close: bool) -> None:
        shift = stop - start if close else 0
        self.tokens = [
            (p - shift if p >= stop else p, t) for p, t in self.tokens if not start <= p < stop
        ]
        self.extent -= shift

    def copy(self) -> "Model":
        return Model(list(self.tokens), self.extent)


class Machine(RuleBasedStateMachine):
    @initialize(mode=st.sampled_from(["raw", "local"]))
    def begin(self, mode: str) -> None:
        self.pool = KVPool(1, 1, D, dtype=torch.float32, page_size=PAGE, num_pages=PAGES, rope=SPEC)
        for t in (*self.pool.k, *self.pool.v):
            t.fill_(float("nan"))
        self.local = mode == "local"
        self.worlds = [(Workspace(self.pool, rope_mode=mode), {})]
        self.next = 1
        for _ in range(3):
            self.world(0)[1][self.world(0)[0].new_block()] = Model()

    def world(self, i: int) -> tuple[Workspace, dict[Block, Model]]:
        return self.worlds[i % len(self.worlds)]

    def pick(self, w: int, b: int) -> tuple[Workspace, dict[Block, Model], Block]:
        ws, models = self.world(w)
        return ws, models, list(models)[b % len(models)]

    @rule(w=st.integers(0, 3), b=st.integers(0, 5), n=st.integers(0, 40), keep=st.booleans())
    def append(self, w: int, b: int, n: int, keep: bool) -> None:
        ws, models, block = self.pick(w, b)
        ids = list(range(self.next, self.next + n))
        self.next += n
        free = self.pool.free_pages
        try:
            plan = ws.plan([n], views=[[block]])
        except PoolExhausted:
            assert self.pool.free_pages == free
            return
        k = torch.tensor(ids, dtype=torch.float32)[:, None, None] + torch.arange(D)
        rotated = SPEC.rotate(k[:, 0], plan.local_index)[:, None] if self.local else k
        append_kv(self.pool, 0, plan, rotated, -k)
        if keep:
            ws.commit(plan, [ids])
            models[block].append(ids)
        else:
            ws.abort(plan)
            assert self.pool.free_pages == free

    @rule(
        w=st.integers(0, 3),
        a=st.integers(0, 5),
        b=st.integers(0, 5),
        mode=st.sampled_from(["auto", "splice", "rewrite"]),
        most=st.integers(1, 4),
    )
    def move(self, w: int, a: int, b: int, mode: str, most: int) -> None:
        ws, models, src = self.pick(w, a)
        dst = self.pick(w, b)[2]
        if src is dst:
            with pytest.raises(ValueError, match="dst"):
                ws.move(src, dst)
            return
        try:
            ws.move(src, dst, mode=mode, max_segments=most)
        except PoolExhausted:
            assert mode == "rewrite"
            return
        to = models[dst]
        to.tokens += [(to.extent + p, t) for p, t in models[src].tokens]
        to.extent += models[src].extent
        models[src] = Model()

    @rule(w=st.integers(0, 3), b=st.integers(0, 5), x=st.floats(0, 1), y=st.floats(0, 1))
    def evict(self, w: int, b: int, x: float, y: float) -> None:
        ws, models, block = self.pick(w, b)
        start, stop = sorted(int(z * models[block].extent) for z in (x, y))
        ws.evict(block, start, stop, close_gap=x < y)
        models[block].evict(start, stop, x < y)

    @rule(w=st.integers(0, 3), b=st.integers(0, 5), x=st.floats(0, 1))
    def truncate(self, w: int, b: int, x: float) -> None:
        ws, models, block = self.pick(w, b)
        length = int(x * models[block].extent)
        ws.truncate(block, length)
        models[block].evict(length, models[block].extent, True)

    @rule(w=st.integers(0, 3), b=st.integers(0, 5))
    def fork_block(self, w: int, b: int) -> None:
        ws, models, block = self.pick(w, b)
        if len(models) < 6:
            models[ws.fork_block(block)] = models[block].copy()

    @rule(w=st.integers(0, 3))
    def fork(self, w: int) -> None:
        ws, models = self.world(w)
        if len(self.worlds) < 3:
            twin = ws.fork()
            self.worlds.append((twin, {twin.block(b.id): m.copy() for b, m in models.items()}))

    @rule()
    def drop(self) -> None:
        if len(self.worlds) > 1:
            self.worlds.pop()

    @invariant()
    def blocks_are_what_the_model_says(self) -> None:
        for ws, models in self.worlds:
            for block, model in models.items():
                assert block.tokens == [t for _, t in model.tokens]
                assert block.length == model.extent
                entries, place = ws.native.segments(block.id)[1], 0
                found = []
                for n, first, s0, r0, _ in block.segments.tolist():
                    slots = np.arange(first, first + n)
                    pages = entries[place + slots // PAGE]
                    place += -(-(first + n) // PAGE)
                    found += range(s0, s0 + n)
                    k, v = (c[pages, 0, slots % PAGE] for c in (self.pool.k[0], self.pool.v[0]))
                    plain = SPEC.rotate(-v, torch.arange(r0, r0 + n))
                    torch.testing.assert_close(k, plain, rtol=1e-4, atol=2e-3)
                assert found == [p for p, _ in model.tokens]
                stored = self.values(block, entries)
                assert stored == [-t for _, t in model.tokens]

    def values(self, block: Block, entries: np.ndarray) -> list[int]:
        out, place = [], 0
        for n, first, *_ in block.segments.tolist():
            slots = np.arange(first, first + n)
            pages = entries[place + slots // PAGE]
            place += -(-(first + n) // PAGE)
            out += [int(x) for x in self.pool.v[0][pages, 0, slots % PAGE, 0]]
        return out

    @invariant()
    def pages_are_counted(self) -> None:
        counts = np.zeros(PAGES, np.int64)
        for ws, models in self.worlds:
            for block in models:
                np.add.at(counts, ws.native.segments(block.id)[1], 1)
        assert (counts == self.pool.native.references()).all()
        assert self.pool.native.waiting == 0
        assert self.pool.free_pages == int((counts == 0).sum())


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
