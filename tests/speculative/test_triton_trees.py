"""Triton kernels of trees and of the draft step: interpreted, or compiled where there is a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from alignops.reference.speculative import Tree, laws, rules

pytest.importorskip("triton", reason="triton is not installed")
from alignops.triton_kernels import speculative as kernels
from alignops.triton_kernels.speculative_launch import Warp, Words
from tests.speculative.triton_batches import DEVICE, Batch, outputs, to_device, wide

# Trees


# By the codes of the operator.
WALKS = {
    "greedy": rules.tree_greedy,
    "tree_target": rules.tree_target,
    "tree_rrs": rules.tree_rrs,
}


@dataclass
class Forest:
    """Random trees, and what the definition says of them."""

    rule: str
    b: int = 3
    n: int = 9
    v: int = 40
    vd: int | None = None
    dtype: torch.dtype = torch.float32
    temperature: float = 1.0
    replacement: bool = False
    seed: int = 0
    repeated: bool = True

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        b, n, v = self.b, self.n, self.v
        logits = rng.standard_normal((2, b, n, v)).astype(np.float32) * 1.5
        self.target = torch.from_numpy(logits[0]).to(self.dtype)
        drafter = torch.from_numpy(logits[0] + 0.5 * logits[1])[..., : self.vd or v]
        self.draft = drafter.to(self.dtype) if self.rule == "tree_rrs" else None
        self.parent = torch.zeros(b, n, dtype=torch.int64)
        self.tokens = torch.zeros(b, n, dtype=torch.int64)
        for i in range(b):
            for node in range(1, n):
                # Few parents: several children of each, of tokens that are likely.
                self.parent[i, node] = int(rng.integers(0, (node + 2) // 3))
                likely = self.target[i, self.parent[i, node], : self.vd or v].float().topk(4)
                self.tokens[i, node] = likely.indices[int(rng.integers(0, 4))]
        self.seeds = torch.from_numpy(rng.integers(-(2**62), 2**62, b))
        self.positions = torch.from_numpy(rng.integers(0, 1000, b))
        self.remaining = torch.from_numpy(rng.integers(0, 6, b).astype(np.int32))

    def check(self) -> None:
        out = outputs(self.b, self.n)
        path = torch.full((self.b, self.n), 113, dtype=torch.int32, device=DEVICE)
        kernels.verify_tree(
            self.target.to(DEVICE),
            self.tokens.to(DEVICE),
            self.parent.to(DEVICE),
            list(WALKS).index(self.rule),
            Warp(torch.full((self.b,), self.temperature, device=DEVICE)),
            Words(to_device(self.seeds), to_device(self.positions)),
            path,
            out,
            draft=to_device(self.draft),
            replacement=self.replacement,
            eos_ids=(3,),
            remaining=to_device(self.remaining),
        )
        assert not out.row_error.cpu().any()
        for i in range(self.b):
            tree = Tree(
                self.parent[i].tolist(),
                self.tokens[i].tolist(),
                [laws.law(wide(row, self.v), self.temperature) for row in self.target[i]],
                (
                    self.draft is not None
                    and [laws.law(wide(row, self.v), self.temperature) for row in self.draft[i]]
                )
                or None,
                int(self.seeds[i]),
                int(self.positions[i]),
            )
            options = {"replacement": self.replacement} if self.rule == "tree_rrs" else {}
            expected = WALKS[self.rule](tree, **options)
            tokens = [int(self.tokens[i, node]) for node in expected.nodes[1:]]
            tokens.append(int(expected.following))
            limit = int(self.remaining[i])
            length = tokens.index(3) + 1 if 3 in tokens else len(tokens)
            length = min(length, limit)
            accepted = min(len(expected.nodes) - 1, length)
            assert out.tokens[i].tolist() == tokens[:length] + [-1] * (self.n - length), i
            nodes = expected.nodes[: accepted + 1]
            assert path[i].tolist() == nodes + [-1] * (self.n - len(nodes))
            assert int(out.accept_len[i]) == accepted
            assert int(out.num_emitted[i]) == length


@pytest.mark.parametrize("rule", ["greedy", "tree_target", "tree_rrs"])
def test_trees(rule: str) -> None:
    for seed, n in ((0, 1), (1, 9), (2, 9), (3, 20)):
        Forest(rule, n=n, seed=seed).check()
    Forest(rule, b=1, n=5, v=4500, dtype=torch.bfloat16, temperature=0.5, seed=4).check()


@pytest.mark.parametrize("replacement", [False, True])
def test_children_that_were_drawn(replacement: bool) -> None:
    for seed in range(5, 9):
        Forest("tree_rrs", replacement=replacement, temperature=2.0, seed=seed).check()
    Forest("tree_rrs", vd=30, replacement=replacement, seed=9).check()


def test_what_is_no_tree() -> None:
    forest = Forest("tree_target", b=5, n=4)
    forest.parent[0, 2] = 2
    forest.tokens[1, 3] = forest.v
    forest.tokens[2, 1], forest.parent[2, 3] = -1, 1
    forest.tokens[3, 2:] = -1
    forest.parent[3, 1], forest.parent[3, 2] = 0, 77
    out = outputs(5, 4)
    kernels.verify_tree(
        forest.target.to(DEVICE),
        forest.tokens.to(DEVICE),
        forest.parent.to(DEVICE),
        list(WALKS).index("tree_target"),
        Warp(torch.ones(5, device=DEVICE)),
        Words(to_device(forest.seeds), to_device(forest.positions)),
        torch.empty(5, 4, dtype=torch.int32, device=DEVICE),
        out,
        active=torch.tensor([True, True, True, True, False], device=DEVICE),
    )
    assert out.row_error.tolist() == [3, 3, 3, 0, 0]
    assert out.num_emitted[:3].eq(0).all()
    assert out.num_emitted[3] > 0
    assert out.num_emitted[4] == 0


# One draft step


def propose(batch: Batch, logits: Tensor, position: int = 0, race: bool = False) -> list[Tensor]:
    """(ids, statistics, errors)"""
    out = [torch.zeros(batch.b, *shape, dtype=torch.int64, device=DEVICE) for shape in ((), (6,))]
    out.append(torch.zeros(batch.b, dtype=torch.uint8, device=DEVICE))
    words = Words(to_device(batch.seeds), to_device(batch.positions + position))
    kernels.propose(logits.to(DEVICE), words, batch.warp(), *out, race=race)
    return out


@pytest.mark.parametrize("filters", [{}, {"top_k": 6, "top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_propose(filters: dict[str, float]) -> None:
    batch = Batch("lossless", b=5, k=0, v=4200, filters=filters, seed=20)
    batch.temperatures[3] = -1
    logits = batch.target[:, 0]
    ids, stats, errors = propose(batch, logits)
    raced, *_ = propose(batch, logits, race=True)
    assert errors.tolist() == [0, 0, 0, 4, 0]
    assert ids[2] == raced[2] == logits[2].argmax()
    assert ids[3] == raced[3] == -1
    for i in (0, 1, 4):
        law = batch.law(logits[i], 1.0, filters)
        seed, position = int(batch.seeds[i]), int(batch.positions[i])
        assert ids[i] == laws.sample(law.p, laws.uniform(seed, position, laws.PROPOSE))
        noise = laws.race_noise(seed, position, batch.v)
        assert raced[i] == laws.race_winner(law, noise)
        drawn = int(ids[i])
        assert stats[i, :4].tolist() == [
            *(law.top, law.total, law.mantissa[drawn], law.exponent[drawn])
        ]


def test_statistics_of_a_draft_step_replace_the_read() -> None:
    filters = {"top_k": 20, "top_p": 0.9}
    batch = Batch("lossless", b=4, k=2, filters=filters, seed=21, greedy_rows=False)
    assert batch.draft is not None
    batch.lens[:] = batch.k
    known = []
    for i in range(batch.k):
        ids, stats, _ = propose(batch, batch.draft[:, i], i)
        batch.ids[:, i] = ids.cpu()
        known.append(stats)
    expected = batch.run()
    batch.stats = torch.stack(known, 1)
    for name, t in vars(batch.run()).items():
        assert torch.equal(t, getattr(expected, name)), name
    batch.stats[1, 0, 1] = 0
    assert batch.run().row_error.tolist() == [0, 4, 0, 0]
