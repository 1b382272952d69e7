"""TraceShield against a look at all spans, its stream against its check, calibration, failures."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignops.reference import spans as reference
from alignops.spans import TraceShield
from alignops.spans.ends import Batch, passing_ends
from alignops.spans.errors import IndexCorruptError, TokenizerMismatchError
from tests.spans.worlds import World, make_index, worlds

UNSAFE = [[11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [1, 2, 3] * 40]


@pytest.fixture
def index() -> Any:
    return make_index(UNSAFE, 32)


def brute_risk(world: World) -> float:
    text, first = world.seen()
    return reference.risk(text, world.categories(), first, world.settings["max_match"])


@given(worlds())
def test_risk_is_that_of_all_spans(world: World) -> None:
    shield = world.shield()
    verdict = shield.check(world.text, world.prompt)
    assert verdict.risk == pytest.approx(brute_risk(world), abs=1e-9)
    assert verdict.refused == (verdict.risk > world.settings["tau"])
    assert verdict.complete
    assert verdict.reason == ("matched-span" if verdict.refused else None)
    assert shield.risks([world.text], None, [world.prompt]).tolist() == [verdict.risk]


@settings(max_examples=300)
@given(worlds(covered=True))
def test_tokens_of_harmless_matches_count_nothing(world: World) -> None:
    """At every end, the longest match scores as much as the best of all that end there."""
    text, first = world.seen()
    shield, limit = world.shield(plain=True), world.settings["max_match"]
    batch = Batch(np.array(text, np.int64), np.array([0, len(text)]), np.array([first]))
    for category, plain in zip(shield.categories, world.categories(), strict=True):
        ends = passing_ends(category, shield.filters, batch)
        found = dict(zip(ends.end.tolist(), ends.score.tolist(), strict=True))
        every = (
            reference.spans_ending(text, e, plain, limit) for e in range(first + 1, len(text) + 1)
        )
        expected = {spans[0].end: max(s.score for s in spans) for spans in every if spans}
        assert found == pytest.approx(expected, abs=1e-9)


@given(worlds(covered=True))
def test_stream_covers_as_the_check_does(world: World) -> None:
    shield = world.shield()
    stream = shield.stream(world.text[: world.prompt])
    for end in range(world.prompt + 1, len(world.text) + 1):
        refused = stream.push(world.text[end - 1])
        assert refused == shield.check(world.text[:end], world.prompt).refused


@given(worlds())
def test_spans_are_the_flagged_ones_outside_others(world: World) -> None:
    verdict = world.shield().check(world.text, world.prompt)
    text, first = world.seen()
    shift = len(world.text) - len(text)
    expected = set()
    for name, category in enumerate(world.categories()):
        rule = category.rule
        flagged = [
            span
            for end in range(first + 1, len(text) + 1)
            for span in reference.spans_ending(text, end, category, world.settings["max_match"])
            if rule.severity * span.score > rule.tau
        ]
        for s in flagged:
            if not any(o != s and o.start <= s.start and s.end <= o.end for o in flagged):
                held = set(category.index.locate(text[s.start : s.end]).document.tolist())
                place = s.start + shift, s.end + shift
                expected.add((f"category {name}", *place, s.count, tuple(sorted(held))))
    found = {(s.category, s.start, s.end, s.count, s.documents) for s in verdict.spans}
    assert found == expected
    assert len(verdict.spans) == len(expected)
    if verdict.spans:
        severity = {f"category {i}": s for i, (_, s) in enumerate(world.unsafe)}
        risk = max(severity[s.category] * s.score for s in verdict.spans)
        # In mode "cover" an inner span, which ends earlier, can score more.
        assert verdict.risk >= risk > world.settings["tau"]


@given(worlds(), st.data())
def test_a_batch_is_its_rows(world: World, data: st.DataObject) -> None:
    shield = world.shield()
    ids = st.lists(st.integers(0, world.vocab - 1), max_size=12)
    rows = [world.text, *data.draw(st.lists(ids, max_size=4)), world.text[::-1]]
    prompts = [data.draw(st.integers(0, len(row))) for row in rows]
    flat = np.concatenate([np.empty(0, np.int32), *(np.array(r, np.int32) for r in rows)])
    offsets = np.cumsum([0, *map(len, rows)])
    single = [shield.check(row, p) for row, p in zip(rows, prompts, strict=True)]
    assert shield.check_batch(flat, offsets, prompts) == single
    assert shield.check_batch(rows, prompt_lengths=prompts) == single
    assert shield.risks(flat, offsets, prompts).tolist() == [v.risk for v in single]


@given(worlds())
def test_stream_refuses_when_the_check_does(world: World) -> None:
    shield = world.shield()
    stream = shield.stream(world.text[: world.prompt])
    assert not stream.refused
    for end in range(world.prompt + 1, len(world.text) + 1):
        refused = stream.push(world.text[end - 1])
        assert refused == shield.check(world.text[:end], world.prompt).refused
    assert stream.verdict() == shield.check(world.text, world.prompt)
    assert stream.tokens == world.text


def test_stream_takes_several_tokens(index: Any) -> None:
    stream = TraceShield(index).stream([5])
    assert not stream.push([11, 12, 13])
    assert stream.push(torch.tensor([14, 15, 16, 17, 18]))
    assert stream.verdict().spans[0][:2] == (1, 9)


def test_inputs_of_any_kind(index: Any) -> None:
    shield, text = TraceShield(index), UNSAFE[0]
    expected = shield.check(text)
    assert expected.refused
    for ids in (np.array(text, np.uint16), torch.tensor(text, dtype=torch.int32), tuple(text)):
        assert shield.check(ids) == expected
    assert shield.check([]).risk == 0
    assert not shield.check([]).refused
    assert shield.check_batch([]) == []


def test_scope_says_where_spans_may_begin(index: Any) -> None:
    text = UNSAFE[0]
    assert not TraceShield(index).check(text, 5).refused
    both = TraceShield(index, scope="prompt+completion")
    assert both.check(text, 5).spans[0][:2] == (0, 10)
    assert not both.check(text, 10).refused, "a prompt alone is never refused"


def test_thresholds(index: Any) -> None:
    n = index.n_tokens
    assert TraceShield(index).tau == 20
    assert TraceShield(index, "corpus").tau == pytest.approx(math.log(n) - 1)
    null = TraceShield(index, "null", length=128, alpha=0.01)
    assert null.tau == pytest.approx(math.log(128 * n / 0.01))
    two = TraceShield({"a": (index, 1.0), "b": (index, 0.5)}, "corpus")
    assert two.tau == pytest.approx(math.log(2 * n) - 1)


def test_a_risk_of_tau_is_not_refused(index: Any) -> None:
    shield = TraceShield(index)
    shield.tau = shield.check(UNSAFE[0]).risk
    verdict = shield.check(UNSAFE[0])
    assert (verdict.risk, verdict.refused, verdict.spans) == (shield.tau, False, ())


def test_presets(index: Any) -> None:
    paper, released = TraceShield(index, preset="paper"), TraceShield(index, preset="reference")
    assert (paper.tau, paper.min_len, paper.max_match) == (20, 8, 4096)
    assert (released.tau, released.min_len, released.documents) == (10, 8, 5)
    assert TraceShield(index, preset="reference", tau=12.0).tau == 12
    probs = index.unigram
    windows = [reference.bci(UNSAFE[0][i : i + 8], probs) for i in range(3)]
    assert released.check(UNSAFE[0]).risk == pytest.approx(max(windows))
    assert paper.check(UNSAFE[0]).risk == pytest.approx(reference.bci(UNSAFE[0], probs))


def test_probabilities_of_a_larger_text(index: Any) -> None:
    probs = np.full(32, 0.5)
    assert TraceShield(index, probs=probs).check(UNSAFE[0]).risk == pytest.approx(10 * math.log(2))
    with pytest.raises(TokenizerMismatchError, match="probs"):
        TraceShield(index, probs=probs[1:])


@given(st.lists(st.integers(0, 3), max_size=40), st.sampled_from([0.1, 0.3, 0.5]))
def test_conformal_threshold(flat: list[int], fpr: float) -> None:
    shield = TraceShield(make_index([[0, 1, 2, 1, 0, 2], [3, 1, 1]], 4), min_len=1)
    texts = [flat[i : i + 3] for i in range(len(flat))]
    m = len(texts)
    if m < (1 - fpr) / fpr:
        with pytest.raises(ValueError, match="at least"):
            shield.calibrate(texts, fpr=fpr)
        return
    tau = shield.calibrate(texts, fpr=fpr)
    assert (
        tau == shield.tau == sorted(shield.risks(texts))[math.ceil((m + 1) * (1 - fpr) - 1e-9) - 1]
    )
    assert sum(v.refused for v in shield.check_batch(texts)) <= fpr * (m + 1)


def test_conformal_threshold_keeps_its_promise(index: Any) -> None:
    rng = np.random.default_rng(0)
    fpr, refused, draws = 0.1, 0, 300
    shield = TraceShield(index, min_len=1)
    for _ in range(draws):
        texts = [rng.integers(0, 21, 12) for _ in range(20)]
        shield.calibrate(texts[:19], fpr=fpr)
        refused += shield.check(texts[19]).refused
    assert refused / draws <= fpr + 3 * math.sqrt(fpr * (1 - fpr) / draws)


def test_youden_threshold(index: Any) -> None:
    shield = TraceShield(index, min_len=2)
    benign = [[1, 2, 3], [11, 12, 5], [30, 31]]
    harmful = [UNSAFE[0], UNSAFE[0][2:], [7, 8]]
    tau = shield.calibrate(benign, harmful, method="youden")
    risks = shield.risks([*benign, *harmful])
    gains = {
        t: np.mean(shield.risks(harmful) > t) - np.mean(shield.risks(benign) > t) for t in risks
    }
    assert tau == max(t for t, g in gains.items() if g == max(gains.values()))


class Broken:
    """An index whose searches fail."""

    def __init__(self, index: Any) -> None:
        self._index = index

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)

    def matching_stats_batch(self, *args: Any, **options: Any) -> Any:
        raise IndexCorruptError("tok.0: block 3 is damaged")


def test_failures_refuse(index: Any) -> None:
    text = [5, 6, 7]
    closed = TraceShield(Broken(index)).check(text)
    assert (closed.refused, closed.reason, closed.complete) == (True, "index-unavailable", False)
    opened = TraceShield(Broken(index), fail_open=True).check(text)
    assert (opened.refused, opened.reason, opened.complete) == (False, "index-unavailable", False)


def test_the_categories_that_answer_still_count(index: Any) -> None:
    categories = {"broken": (Broken(index), 1.0), "whole": (index, 1.0)}
    verdict = TraceShield(categories, fail_open=True).check(UNSAFE[0])
    assert verdict.refused
    assert (verdict.reason, verdict.complete) == ("matched-span", False)
    assert [s.category for s in verdict.spans] == ["whole"]
    allowed = TraceShield(index, allow=Broken(index)).check(UNSAFE[0])
    assert (allowed.refused, allowed.reason) == (True, "index-unavailable")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"kind": "density"}, ValueError, "kind must be one of bci, norm, max"),
        ({"scope": "prompt"}, ValueError, "scope"),
        ({"allow_mode": "some"}, ValueError, "allow_mode"),
        ({"preset": "mine"}, ValueError, "preset"),
        ({"tau": "calibrated"}, ValueError, "tau"),
        ({"tau": -1.0}, ValueError, "tau"),
        ({"tau": math.nan}, ValueError, "tau"),
        ({"tau": "null", "kind": "norm"}, ValueError, "tau"),
        ({"min_len": 0}, ValueError, "min_len"),
        ({"min_len": 9, "preset": "reference"}, ValueError, "max_match=8"),
        ({"max_count": 0}, ValueError, "max_count"),
        ({"documents": 0}, ValueError, "documents"),
        ({"allow_mode": "cover", "max_match": 7, "min_len": 2}, ValueError, "max_match"),
    ],
)
def test_bad_settings(index: Any, arguments: dict[str, Any], error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        TraceShield(index, **arguments)


def test_bad_categories(index: Any) -> None:
    with pytest.raises(ValueError, match="severity of 'a'"):
        TraceShield({"a": (index, 0.0)})
    with pytest.raises(ValueError, match="must name a category"):
        TraceShield({})
    other = make_index(UNSAFE, 33)
    with pytest.raises(TokenizerMismatchError, match="'b' must be 32"):
        TraceShield({"a": (index, 1.0), "b": (other, 1.0)})
    with pytest.raises(TokenizerMismatchError, match="'allow' must be 32"):
        TraceShield(index, allow=other)


def test_bad_texts(index: Any) -> None:
    shield = TraceShield(index)
    with pytest.raises(IndexError):
        shield.check([1, 32])
    with pytest.raises(TypeError, match="must be integers"):
        shield.check([1.0])
    with pytest.raises(ValueError, match="dimensions"):
        shield.check([[1, 2]])
    with pytest.raises(ValueError, match="prompt_lengths"):
        shield.check([1, 2], 3)
    with pytest.raises(ValueError, match="offsets"):
        shield.check_batch([1, 2], [0, 1])
    with pytest.raises(ValueError, match="harmful"):
        shield.calibrate([[1]], method="youden")
