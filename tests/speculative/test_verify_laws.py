"""The operators emit text with the law of the target: counts, and sums over grids of words."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignops.speculative import propose, verify, verify_tree
from tests.speculative.test_reference import assert_law

V = 6
DRAWS = 200_000


class World:
    """Logits of a target and of a drafter for the first token, and after each first token."""

    def __init__(self, seed: int, ids: int = V) -> None:
        make = torch.Generator().manual_seed(seed)
        self.start, self.q_start = (1.5 * torch.randn(ids, generator=make) for _ in range(2))
        self.after, self.q_after = (1.5 * torch.randn(ids, ids, generator=make) for _ in range(2))

    def pairs(self) -> np.ndarray:
        """Exact probabilities of the first two tokens."""
        p = self.start.double().softmax(0)[:, None] * self.after.double().softmax(1)
        return p.numpy()


def two_tokens(out: Any, world: World, seeds: Tensor, rule: str) -> np.ndarray:
    """Counts of the first two tokens; rows that emitted one go on without drafts."""
    first, second = out.tokens[:, 0], out.tokens[:, 1].clone()
    short = out.num_emitted == 1
    more = verify(
        world.after[first[short]][:, None],
        torch.zeros(int(short.sum()), 0, dtype=torch.int64),
        rule=rule,
        seeds=seeds[short],
        positions=torch.ones_like(seeds[short]),
    )
    more.raise_errors()
    second[short] = more.tokens[:, 0]
    counts = torch.bincount(first * V + second, minlength=V * V)
    return counts.reshape(V, V).numpy()


@pytest.mark.parametrize(
    ("rule", "certain"),
    [
        *(("lossless", False), ("block", False), ("coupled", False)),
        *(("lossless", True), ("block", True), ("coupled", True), ("threshold", True)),
    ],
)
def test_chains_have_the_law_of_the_target(rule: str, certain: bool) -> None:
    world, seeds = World(11), torch.arange(DRAWS)
    places = torch.zeros_like(seeds)
    if certain:
        drafts, draft = torch.tensor([2, 4]).expand(DRAWS, 2).contiguous(), None
    else:
        rows = world.q_start.expand(DRAWS, V)
        first = propose(rows, seeds=seeds, positions=places).ids
        second = propose(world.q_after[first], seeds=seeds, positions=places + 1).ids
        drafts = torch.stack([first, second], 1)
        draft = torch.stack([rows, world.q_after[first]], 1)
    first, second = drafts.unbind(1)
    target = torch.stack([world.start.expand(DRAWS, V), world.after[first], world.after[second]], 1)
    out = verify(target, drafts, draft=draft, rule=rule, seeds=seeds, positions=places)
    out.raise_errors()
    assert_law(
        two_tokens(out, world, seeds, "coupled" if rule == "coupled" else "lossless"), world.pairs()
    )
    if rule == "lossless":
        p = world.start.double().softmax(0)
        q = world.q_start.double().softmax(0)
        accepted = float(p[2]) if certain else float(torch.minimum(p, q).sum())
        sigma = math.sqrt(accepted * (1 - accepted) / DRAWS)
        assert abs(float((out.accept_len > 0).double().mean()) - accepted) < 4 * sigma
    if rule == "block" and not certain:
        single = verify(target, drafts, draft=draft, rule="lossless", seeds=seeds, positions=places)
        assert out.accept_len.sum() > single.accept_len.sum()


def draw_children(logits: Tensor, count: int, replacement: bool, make: torch.Generator) -> Tensor:
    return torch.multinomial(logits.softmax(-1), count, replacement, generator=make)


@pytest.mark.parametrize("rule", ["tree_target", "without", "with"])
def test_trees_have_the_law_of_the_target(rule: str) -> None:
    """Two children of the root, one of each of them."""
    world, seeds = World(12), torch.arange(DRAWS)
    make = torch.Generator().manual_seed(5)
    draft = None
    if rule == "tree_target":
        children = world.start.topk(2).indices.expand(DRAWS, 2)
        below = world.after.argmax(1)[children]
    else:
        children = draw_children(world.q_start.expand(DRAWS, V), 2, rule == "with", make)
        below = draw_children(world.q_after[children].reshape(-1, V), 1, False, make)
        below = below.reshape(DRAWS, 2)
        rows = world.q_start.expand(DRAWS, 1, V)
        # Nothing was drawn from the leaves: their rows are not read.
        draft = torch.cat([rows, world.q_after[children], world.q_after[below]], 1)
    tokens = torch.cat([torch.zeros(DRAWS, 1, dtype=torch.int64), children, below], 1)
    parent = torch.tensor([-1, 0, 0, 1, 2]).expand(DRAWS, 5).contiguous()
    target = torch.cat(
        [world.start.expand(DRAWS, 1, V), world.after[children], world.after[below]], 1
    )
    out = verify_tree(
        target,
        tokens,
        parent,
        rule="tree_target" if rule == "tree_target" else "tree_rrs",
        draft=draft,
        replacement=rule == "with",
        seeds=seeds,
        positions=torch.zeros_like(seeds),
    )
    out.raise_errors()
    assert 0.2 < float((out.accept_len > 1).double().mean()) < 0.9
    assert_law(two_tokens(out, world, seeds, "lossless"), world.pairs())


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("rule", ["lossless", "block"])
def test_sum_over_all_words_of_a_grid_is_the_law_of_the_target(rule: str, certain: bool) -> None:
    """Every pair of drafts with its probability, every triple of words: no chance is left."""
    ids, grid = 3, 64
    world = World(13, ids)
    q_first = world.q_start.double().softmax(0)
    q_second = world.q_after.double().softmax(1)
    after = world.after.double().softmax(1)
    steps = (torch.arange(grid) * 2 + 1) * (2**32 // (2 * grid))
    words = torch.cartesian_prod(steps, steps, steps)  # test of each draft, token that is drawn
    n = len(words)
    uniforms = torch.zeros(n, 3, 2, dtype=torch.int64)
    uniforms[:, 0, 0], uniforms[:, 1, 0] = words[:, 0], words[:, 1]
    uniforms[..., 1] = words[:, 2, None]
    found = torch.zeros(ids, ids, dtype=torch.float64)
    pairs = [(1, 2)] if certain else list(itertools.product(range(ids), repeat=2))
    for first, second in pairs:
        chance = 1.0 if certain else float(q_first[first] * q_second[first, second])
        target = torch.stack([world.start, world.after[first], world.after[second]])
        draft = None if certain else torch.stack([world.q_start, world.q_after[first]])
        out = verify(
            target.expand(n, 3, ids),
            torch.tensor([[first, second]]).expand(n, 2).contiguous(),
            draft=None if draft is None else draft.expand(n, 2, ids),
            rule=rule,
            uniforms=uniforms.to(torch.uint32),
        )
        out.raise_errors()
        for row, number in zip(*out.tokens[:, :2].unique(dim=0, return_counts=True), strict=True):
            weight = chance * int(number) / n
            if row[1] >= 0:
                found[row[0], row[1]] += weight
            else:
                found[row[0]] += weight * after[row[0]]
    assert (found - torch.from_numpy(world.pairs())).abs().max() < 1.5 / grid
    assert abs(float(found.sum()) - 1) < 1e-9
