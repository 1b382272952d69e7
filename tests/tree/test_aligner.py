"""P-Aligner's search on instructions whose principles have known effects."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alignops import tree
from alignops.tree import instruct_search, principles_for

NAMES = principles_for("math")
EFFECTS = dict(zip(NAMES, [0.5, -0.4, 0.3, 0.1, -0.2], strict=True))


def rewrite(pairs: list[tuple[str, str]]) -> list[str]:
    return [f"{text}+{principle}" for text, principle in pairs]


def respond(texts: list[str], n: int) -> list[list[str]]:
    return [[f"{text} #{i}" for i in range(n)] for text in texts]


def worth(text: str) -> float:
    return sum(EFFECTS[name] for name in text.split(" #")[0].split("+")[1:])


def score(pairs: list[tuple[str, str]]) -> torch.Tensor:
    return torch.tensor([worth(answer) + 0.001 * int(answer[-1]) for _, answer in pairs])


def test_principles_of_labels() -> None:
    assert NAMES[:2] == ["hint addition", "solution verification"]
    assert len(principles_for()) == 3
    assert len(principles_for("harmlessness", "helpfulness")) == 5
    with pytest.raises(ValueError, match=r"label must be one of harmlessness, .*'cooking'"):
        principles_for("cooking")


def test_the_best_wording_beats_random_chains() -> None:
    questions = [f"q{i}" for i in range(6)]
    results, store = instruct_search(questions, rewrite, respond, score, principles=NAMES, iters=20)
    store.validate()
    rng = np.random.default_rng(0)
    for question, result in zip(questions, results, strict=True):
        chains = []
        for _ in range(20):
            names = rng.permutation(NAMES)[: rng.integers(1, 6)]
            chains.append(sum(EFFECTS[name] for name in names) + 0.001)
        assert len(result.wordings) == 21
        assert result.best.score >= max(chains) - 0.25
        assert result.best.score >= np.median(chains)
        assert [w.score for w in result.wordings] == sorted(
            (w.score for w in result.wordings), reverse=True
        )
        for wording in result.wordings:
            assert wording.text == "+".join([question, *wording.principles])
            assert wording.texts[0] == question
            assert wording.texts[-1] == wording.text
            assert len(set(wording.principles)) == len(wording.principles)
            assert wording.score == pytest.approx(worth(wording.text) + 0.001, abs=1e-5)
        for before, principle, after in result.improving:
            assert after == f"{before}+{principle}"
            assert EFFECTS[principle] > 0


def test_every_principle_is_tried_before_any_twice() -> None:
    (result,), store = instruct_search(["q"], rewrite, respond, score, principles=NAMES, iters=5)
    assert {w.principles for w in result.wordings} == {(), *((name,) for name in NAMES)}
    assert store.edges(0, 0).visits.tolist() == [1] * 5


def test_values_are_means_over_subtrees() -> None:
    _, store = instruct_search(["q"], rewrite, respond, score, principles=NAMES, iters=60, w=1.0)

    def mean(node: int) -> float:
        edges = store.edges(0, node)
        below = [mean(child) for child in edges.child.tolist() if child >= 0]
        own = float(store.gather("raw_value", torch.tensor([0]), torch.tensor([node])))
        return (own + sum(below)) / (1 + len(below))

    for child in store.edges(0, 0).child.tolist():
        got = float(store.gather("value", torch.tensor([0]), torch.tensor([child])))
        assert got == pytest.approx(mean(child), abs=1e-5)


def test_a_tree_that_is_used_up_goes_on_quietly() -> None:
    (result,), _ = instruct_search(
        ["q"], rewrite, respond, score, principles=NAMES[:2], iters=30, w=2.0
    )
    assert len(result.wordings) == 5  # nothing, a, b, ab, ba


def test_seeds() -> None:
    runs = [
        instruct_search(["q"], rewrite, respond, score, principles=NAMES, iters=9, seed=seed)[0][0]
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_misuse() -> None:
    def call(**changes: object) -> None:
        arguments = {
            "instructions": ["a", "b"],
            "rewrite": rewrite,
            "respond": respond,
            "score": score,
            "principles": NAMES,
            "iters": 2,
        }
        instruct_search(**(arguments | changes))  # type: ignore[arg-type]

    for changes, error, text in [
        ({"iters": -1}, ValueError, "iters must be at least 0"),
        ({"responses": 0}, ValueError, "responses must be at least 1"),
        ({"w": -1}, ValueError, "w must be at least 0"),
        ({"principles": [["x"]]}, ValueError, "principles must have 2 lists, got 1"),
        ({"principles": ["x", "x"]}, ValueError, "principles must be distinct"),
        ({"rewrite": lambda p: ["x"]}, tree.CallbackError, "rewrite must return 2 results, got 1"),
        ({"respond": lambda t, n: [["x"], ["y"]]}, tree.CallbackError, "respond must return 3"),
        ({"score": lambda p: torch.ones(2)}, tree.CallbackError, "score must return 6 results"),
    ]:
        with pytest.raises(error, match=text):
            call(**changes)
