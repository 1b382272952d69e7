"""A*-decoding on trees whose scores are known."""

from __future__ import annotations

import heapq
from functools import cache

import numpy as np
import pytest
import torch

from alignops import tree
from alignops.reference.tree.backup import astar_cost
from alignops.tree import Continuation

Parts = tuple[int, ...]


class Puzzle:
    """Random scores; answers are three parts long."""

    def __init__(self, seed: int, width: int = 3, depth: int = 3) -> None:
        self.width, self.depth = width, depth
        self.score = cache(
            lambda parts: float(np.float32(np.random.default_rng([seed, 7, *parts]).uniform()))
        )
        self.asked: list[Parts] = []

    def propose(self, parts: Parts, k: int) -> list[Continuation]:
        self.asked.append(parts)
        return [
            Continuation(i, end=len(parts) + 1 == self.depth, tokens=2, logprob=-0.1 * i)
            for i in range(min(k, self.width))
        ]


def propose(states: list[tuple[Puzzle, Parts]], k: int) -> list[list[Continuation]]:
    return [puzzle.propose(parts, k) for puzzle, parts in states]


def score(states: list[tuple[Puzzle, Parts]]) -> torch.Tensor:
    return torch.tensor([puzzle.score(parts) for puzzle, parts in states])


def plain(puzzle: Puzzle, cost: str) -> tuple[Parts, list[Parts]]:
    """The first answer that is popped, and the order of expansions."""
    heap: list[tuple[float, int, int, Parts, float, float]] = []
    h = 1 - puzzle.score(())
    count = 0
    heapq.heappush(heap, (h, 0, 0, (), 0.0, h))
    order = []
    while heap:
        _, _, _, parts, g, h = heapq.heappop(heap)
        if len(parts) == puzzle.depth:
            return parts, order
        order.append(parts)
        for i in range(puzzle.width):
            count += 1
            new = (*parts, i)
            after = 1 - puzzle.score(new)
            cost_g = astar_cost(g, h, after, cost, -0.1 * i)
            heapq.heappush(heap, (cost_g + after, -len(new), count, new, cost_g, after))
    raise AssertionError


@pytest.mark.parametrize("cost", ["h_rise", "h_drop", "steps", "neg_logprob", "zero"])
def test_states_are_continued_in_the_order_of_their_cost(cost: str) -> None:
    puzzles = [Puzzle(seed) for seed in range(8)]
    answers, store = tree.astar_decode(puzzles, propose, score, k=3, max_expansions=1000, cost=cost)
    store.validate()
    for puzzle, answer in zip(puzzles, answers, strict=True):
        parts, order = plain(puzzle, cost)
        assert answer.status == "goal"
        assert answer.parts == parts
        assert puzzle.asked == order
        assert answer.score == pytest.approx(puzzle.score(parts))
        assert answer.expansions == len(order)
        assert answer.tokens == 6 * len(order)
        assert answer.scored == 1 + 3 * len(order)


def test_going_on_finds_the_best_answer_of_all() -> None:
    puzzles = [Puzzle(seed) for seed in range(5)]
    answers, store = tree.astar_decode(
        puzzles, propose, score, k=3, max_expansions=1000, continue_until_budget=True
    )
    best = [
        max(p.score((a, b, c)) for a in range(3) for b in range(3) for c in range(3))
        for p in puzzles
    ]
    assert [a.score for a in answers] == pytest.approx(best)
    assert {a.status for a in answers} == {"goal"}
    largest = store.column("value")[:, 0]
    assert bool((largest >= torch.tensor(best) - 1e-6).all())


def test_budgets_end_without_an_answer() -> None:
    puzzle = Puzzle(0, depth=50)
    for bounds in ({"max_expansions": 4}, {"max_tokens": 24}, {"max_scored": 13}):
        (answer,), _ = tree.astar_decode([puzzle], propose, score, k=3, **bounds)
        assert (answer.status, answer.expansions) == ("budget", 4)
        assert 0 < len(answer.parts) < 50
    (answer,), _ = tree.astar_decode([puzzle], propose, score, max_expansions=0)
    assert (answer.status, answer.parts) == ("budget", ())
    assert tree.astar_decode([], propose, score, max_expansions=3)[0] == []


def test_nothing_to_propose() -> None:
    answers, _ = tree.astar_decode(
        ["a"],
        lambda states, k: [[] for _ in states],
        lambda s: torch.full((len(s),), 0.3),
        max_tokens=9,
    )
    assert answers[0].status == "exhausted"
    assert answers[0].parts == ()


def test_beam_children_and_cap() -> None:
    puzzles = [Puzzle(seed, depth=4) for seed in range(4)]
    for options in ({"beam": 3}, {"scope": "children"}, {"frontier_cap": 2}):
        answers, _ = tree.astar_decode(puzzles, propose, score, k=3, max_expansions=500, **options)
        assert {a.status for a in answers} == {"goal"}
        if options == {"scope": "children"}:
            assert [a.expansions for a in answers] == [4] * 4  # straight down


def test_fewer_tokens_than_best_of_n_on_a_planted_path() -> None:
    """One path is right; the reward model sees with some noise whether a prefix still is."""
    rng = np.random.default_rng(0)
    planted = [tuple(rng.integers(0, 4, 8).tolist()) for _ in range(40)]

    def judge(states: list[tuple[Parts, Parts]]) -> torch.Tensor:
        right = [parts == target[: len(parts)] for target, parts in states]
        noise = rng.uniform(0, 0.3, len(states))
        return torch.tensor(
            [0.95 - x if ok else 0.4 - x for ok, x in zip(right, noise, strict=True)]
        )

    def options(states: list[tuple[Parts, Parts]], k: int) -> list[list[Continuation]]:
        return [[Continuation(i, len(p) == 7, 1) for i in range(k)] for _, p in states]

    answers, _ = tree.astar_decode(planted, options, judge, k=4, max_tokens=400)
    solved = np.mean([a.parts == t for a, t in zip(answers, planted, strict=True)])
    spent = np.mean([a.tokens for a in answers])
    assert solved == 1
    # Best of n draws whole paths of 8 tokens; a right one is 4^-8 of them.
    assert spent <= 0.6 * 8 * 4**8


def test_misuse() -> None:
    puzzle = [Puzzle(0)]
    for changes, error, text in [
        ({"cost": "best"}, ValueError, "cost must be one of h_rise, .*'best'"),
        ({"scope": "all"}, ValueError, "scope must be 'frontier' or 'children'"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"max_expansions": None}, ValueError, "one of max_expansions, max_tokens and max_scored"),
        ({"max_tokens": -3}, ValueError, "max_tokens must be at least 0, got -3"),
        ({"score": lambda s: torch.full((len(s),), 1.5)}, tree.InvalidValueError, "scores must be"),
        ({"score": lambda s: torch.ones(7)}, tree.CallbackError, "score must return shape"),
        ({"propose": lambda s, k: []}, tree.CallbackError, "propose must return 1 lists"),
    ]:
        arguments = {"roots": puzzle, "propose": propose, "score": score, "max_expansions": 9}
        with pytest.raises(error, match=text):
            tree.astar_decode(**(arguments | changes))  # type: ignore[arg-type]
