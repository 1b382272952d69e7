"""Random layouts through pool, workspace, plan and kernels, as a program would do it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alignops.attention import Block, KVPool, Plan, Workspace
from alignops.attention.ops import append_kv, concurrent_attention
from tests.attention.layouts import Append, Evict, Fork, Move, Op, Scenario
from tests.attention.oracle import Array, Step


@dataclass(frozen=True)
class Result:
    """out (R, Hq, Dv), lse (R, Hq), mass (R, Hq, B): of all blocks of the scenario, in float64."""

    out: Array
    lse: Array
    mass: Array


class Native:
    """The blocks of a scenario in a workspace of one layer."""

    def __init__(
        self, case: Scenario, dtype: torch.dtype = torch.float32, mode: str = "raw"
    ) -> None:
        shape = case.shape
        self.case, self.shape, self.dtype, self.mode = case, shape, dtype, mode
        tokens = sum(len(op.k) for op in case.ops if isinstance(op, Append))
        pages = 2 * (tokens // case.page_size + len(case.ops) + case.blocks + len(case.step.views))
        self.pool = KVPool(
            1,
            shape.hkv,
            shape.d,
            shape.dv,
            dtype=dtype,
            page_size=case.page_size,
            num_pages=pages,
            rope=shape.rope,
        )
        self.workspace = Workspace(self.pool, rope_mode=mode)
        self.blocks: list[Block] = [self.workspace.new_block(str(i)) for i in range(case.blocks)]
        for op in case.ops:
            self.apply(op)

    def apply(self, op: Op) -> None:
        ws, blocks = self.workspace, self.blocks
        if isinstance(op, Append):
            if len(op.k):
                plan = ws.plan([len(op.k)], views=[[blocks[op.block]]])
                self.append(plan, op.k, op.v)
                ws.commit(plan)
        elif isinstance(op, Move):
            mode = "rewrite" if op.rewrite else "splice"
            ws.move(blocks[op.source], blocks[op.target], mode=mode)
        elif isinstance(op, Evict):
            ws.evict(blocks[op.block], op.start, op.stop, close_gap=op.close_gap)
        elif isinstance(op, Fork):
            blocks[op.target] = ws.fork_block(blocks[op.source])

    def arriving(self, x: Array, plan: Plan) -> Tensor:
        """Queries or keys (R, H, D) as the model hands them over in the mode of the workspace."""
        spec, t = self.shape.rope, torch.from_numpy(x).float()
        if spec is not None:
            local = self.mode == "local"
            t = spec.rotate(t, plan.local_index[:, None]) if local else spec.scale(t)
        return t.to(self.dtype)

    def append(self, plan: Plan, k: Array, v: Array) -> None:
        values = torch.from_numpy(v).to(self.dtype)
        append_kv(self.pool, 0, plan, self.arriving(k, plan), values)

    def plan(self, step: Step) -> Plan:
        """Workers with their views and weights, and the plan of the step."""
        ws = self.workspace
        workers = [
            ws.add_worker(str(i), [self.blocks[b] for b in view])
            for i, view in enumerate(step.views)
        ]
        for (worker, block), (bias, gain) in step.weights.items():
            ws.set_weight(workers[worker], self.blocks[block], bias=bias, gain=gain)
        return ws.plan(step.counts, visibility="lagged" if step.lagged else "inclusive")

    def attend(self, plan: Plan, step: Step) -> Result:
        shape = self.shape
        out, lse, mass = concurrent_attention(
            self.arriving(step.q, plan),
            self.pool,
            0,
            plan,
            scale=shape.scale,
            softcap=shape.softcap,
            window=shape.window,
            sinks=None if shape.sinks is None else torch.from_numpy(shape.sinks).float(),
            return_lse=True,
            return_mass=True,
        )
        columns = [self.blocks.index(block) for block in plan.blocks]
        all_mass = np.zeros((*mass.shape[:2], len(self.blocks)))
        all_mass[..., columns] = mass.double().numpy()
        return Result(out.double().numpy(), lse.double().numpy(), all_mass)

    def run(self) -> Result:
        """The step, from plan to commit."""
        step = self.case.step
        plan = self.plan(step)
        self.append(plan, step.k, step.v)
        result = self.attend(plan, step)
        self.workspace.commit(plan)
        return result
