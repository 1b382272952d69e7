"""Belief conflict: published vectors, identities, the definition, refusals."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignops.reference import spans as reference
from alignops.spans import bci, token_surprisal, unigram_probs
from alignops.spans.scores import KINDS

PROBS = [0.1, 0.01, 0.001]  # of a, b, c
AB, BC = [0, 1], [1, 2]


@pytest.mark.parametrize(
    ("span", "kind", "value"),
    [
        (AB, "bci", 6.907755),
        (BC, "bci", 11.512925),
        (AB, "density", 3.453878),
        (AB, "kl", 2.760731),
        (BC, "max", 6.907755),
    ],
)
def test_golden_values(span: list[int], kind: str, value: float) -> None:
    assert bci(span, [0, 2], PROBS, kind)[0] == pytest.approx(value, abs=1.1e-6)


spans_of = st.lists(st.lists(st.integers(0, 4), max_size=12), max_size=6)
probs_of = st.lists(st.floats(0, 1), min_size=5, max_size=5)


@given(spans_of, probs_of, st.sampled_from(KINDS))
def test_equals_definition(spans: list[list[int]], probs: list[float], kind: str) -> None:
    counts = [1 + len(s) for s in spans]
    found = bci(spans, None, probs, kind, n_tokens=1000, counts=counts)
    expected = [
        reference.bci(s, probs, kind, n_tokens=1000, count=m) if s else 0.0
        for s, m in zip(spans, counts, strict=True)
    ]
    if kind == "lift":
        expected = [e if s else -math.log(1000) for e, s in zip(expected, spans, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@given(spans_of, probs_of)
def test_density_is_kl_plus_entropy(spans: list[list[int]], probs: list[float]) -> None:
    density, kl = (bci(spans, None, probs, kind) for kind in ("density", "kl"))
    for s, d, k in zip(spans, density, kl, strict=True):
        q = [s.count(t) / len(s) for t in set(s)]
        assert d == pytest.approx(k - sum(f * math.log(f) for f in q), abs=1e-9)
        assert d >= k - 1e-9


@given(st.lists(st.integers(0, 4), min_size=1), probs_of, st.data())
def test_bci_is_additive_and_grows(x: list[int], probs: list[float], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(x)))
    whole, left, right = bci([x, x[:cut], x[cut:]], None, probs)
    assert whole == pytest.approx(left + right)
    assert 0 <= left <= whole + 1e-12


def test_unseen_tokens_count_the_floor() -> None:
    assert token_surprisal([3], [1, 0, 0, 0])[0] == pytest.approx(20.723266)
    assert token_surprisal([3, 0], [1, 0, 0, 0], floor=0.5).tolist() == [math.log(2), 0.0]


def test_smoothing() -> None:
    counts = torch.tensor([8, 2, 0])
    np.testing.assert_allclose(unigram_probs(counts), [0.8, 0.2, 0])
    np.testing.assert_allclose(unigram_probs(counts, 0.5), np.array([8.5, 2.5, 0.5]) / 11.5)
    assert unigram_probs([0, 0]).tolist() == [0, 0]
    assert unigram_probs([]).shape == (0,)


def test_forms_of_a_batch() -> None:
    expected = bci([0, 1, 1, 2], [0, 2, 4], PROBS)
    for ids, offsets in (
        (torch.tensor([0, 1, 1, 2]), torch.tensor([0, 2, 4])),
        (np.array([0, 1, 1, 2], np.uint16), np.array([0, 2, 4], np.uint64)),
        ([AB, BC], None),
        (np.array([AB, BC]), None),
    ):
        assert bci(ids, offsets, PROBS).tolist() == expected.tolist()
    assert bci([], [0], PROBS).shape == (0,)
    assert bci([], None, PROBS, "kl").shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([0, 3], [0, 2], PROBS), IndexError, "got 3 at 1"),
        (([-1], [0, 1], PROBS), IndexError, "got -1 at 0"),
        (([0.5], [0, 1], PROBS), TypeError, "integers"),
        (([[0, 1]], [0, 1], PROBS), ValueError, "1 dimensions"),
        (([0, 1], [0, 2, 1], PROBS), ValueError, "offsets"),
        (([0, 1], [1, 2], PROBS), ValueError, "offsets"),
        (([0, 1], [], PROBS), ValueError, "offsets"),
        (([0, 1], None, PROBS), ValueError, "ids"),
        (([0], [0, 1], [1.5]), ValueError, "probs"),
        (([0], [0, 1], [math.nan]), ValueError, "NaN"),
        (([0], [0, 1], PROBS, "mean"), ValueError, "kind"),
        (([0], [0, 1], PROBS, "norm"), ValueError, "n_tokens"),
        (([0], [0, 1], PROBS, "bci", 0.0), ValueError, "floor"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        bci(*arguments)


def test_bad_counts() -> None:
    with pytest.raises(ValueError, match="counts"):
        bci([AB], None, PROBS, "lift", n_tokens=9)
    with pytest.raises(ValueError, match="counts"):
        bci([AB], None, PROBS, "lift", n_tokens=9, counts=[1, 2])
    with pytest.raises(ValueError, match="alpha"):
        unigram_probs([1], -1.0)
    with pytest.raises(ValueError, match="counts"):
        unigram_probs([-1])
