"""The brute-force index and definitions against still simpler statements."""

import itertools
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignops.reference.spans import (
    Category,
    NaiveIndex,
    NaiveMatcher,
    Rule,
    cbd_penalty,
    passing_span,
    prov_decode,
    top_docs,
)

DOCS = [[1, 2, 1, 2], [2, 1], [], [3, 1, 2, 3]]
INDEX = NaiveIndex(DOCS, 5)

corpora = st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=4)
texts = st.lists(st.integers(0, 3), max_size=10)


def occurrences(docs: list[list[int]], q: list[int]) -> list[tuple[int, int]]:
    return [
        (d, i)
        for d, doc in enumerate(docs)
        for i in range(len(doc) - len(q) + 1)
        if doc[i : i + len(q)] == q and i < len(doc)
    ]


@given(corpora, texts)
def test_counts_and_hits(docs: list[list[int]], q: list[int]) -> None:
    index = NaiveIndex(docs, 4)
    found = occurrences(docs, q)
    assert index.count(q) == len(found)
    hits = index.locate(q, 10**6)
    assert sorted(zip(hits.document.tolist(), hits.offset.tolist(), strict=True)) == found
    ((lo, hi),) = index.find(q).tolist()
    assert hi - lo == len(found)


def test_suffixes_are_ordered_with_the_separator_last_and_the_end_first() -> None:
    docs, separator = [[1, 0], [1], [0, 1]], 9
    text = [1, 0, separator, 1, separator, 0, 1, separator]
    expected = sorted((p for p in range(8) if text[p] != separator), key=lambda p: text[p:])
    assert NaiveIndex(docs, 2).suffixes.tolist() == expected == [5, 1, 0, 6, 3]


@given(corpora, texts)
def test_matches(docs: list[list[int]], x: list[int]) -> None:
    index = NaiveIndex(docs, 4)
    stats = index.matching_stats(x).tolist()
    for i, k in enumerate(stats):
        assert index.longest_prefix(x[i:]).length == k
        assert not k or occurrences(docs, x[i : i + k])
        assert i + k == len(x) or not occurrences(docs, x[i : i + k + 1])
    suffix = index.longest_suffix(x).length
    assert suffix == max(
        len(x) - i for i in range(len(x) + 1) if i == len(x) or i + stats[i] == len(x)
    )


@given(corpora, texts)
def test_maximal_spans_are_the_matches_in_no_other(docs: list[list[int]], x: list[int]) -> None:
    index = NaiveIndex(docs, 4)
    matches = [
        (a, b) for a, b in itertools.combinations(range(len(x) + 1), 2) if occurrences(docs, x[a:b])
    ]
    outer = [
        (a, b)
        for a, b in matches
        if not any(m != (a, b) and m[0] <= a and b <= m[1] for m in matches)
    ]
    spans = index.maximal_spans(x)
    assert list(zip(spans.start, spans.end, strict=True)) == outer
    assert spans.count.tolist() == [index.count(x[a:b]) for a, b in outer]


def test_filters_of_maximal_spans() -> None:
    index = NaiveIndex([list(range(10))] * 2 + [[4, 5]], 20)
    x = [0, 1, 2, 3, 4, 5, 15, 4, 5]

    def places(**options: object) -> list[tuple[int, int]]:
        spans = index.maximal_spans(x, **options)  # type: ignore[arg-type]
        return list(zip(spans.start.tolist(), spans.end.tolist(), strict=True))

    assert places() == [(0, 6), (7, 9)]
    assert places(min_len=3) == [(0, 6)]
    assert places(max_count=2) == [(0, 6)]
    assert places(delimiters=[2]) == [(0, 3), (3, 6), (7, 9)]
    words = [t in (0, 2, 15) for t in x]
    assert places(word_start=words) == [(0, 6)]
    assert places(word_start=words, delimiters=[3]) == [(0, 2)]


@given(corpora, texts)
def test_next_tokens(docs: list[list[int]], ctx: list[int]) -> None:
    index = NaiveIndex(docs, 4)
    ids, counts, approx = index.next_dist(ctx)
    expected = [len(occurrences(docs, [*ctx, t])) for t in range(4)]
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {
        t: m for t, m in enumerate(expected) if m
    }
    assert not approx
    assert index.next_counts(ctx, range(4)).tolist() == expected
    ends = sum(len(doc) >= len(ctx) and doc[len(doc) - len(ctx) :] == ctx for doc in docs)
    assert not ctx or index.eos_count(ctx) == ends
    for t in range(4):
        p = index.ngram_prob(ctx, t)
        m = index.count(ctx)
        assert p == expected[t] / m if m else math.isnan(p)


def test_infinity_gram() -> None:
    assert INDEX.infgram_prob([4, 3, 1], 2) == (1.0, 2, 1, 1)
    assert INDEX.infgram_prob([4], 2) == (0.4, 0, 10, 4)


def test_attribution() -> None:
    found = INDEX.attribute([1, 2, 1, 4, 3, 1], share=0.5)
    assert [(a.start, a.end, a.count, a.documents) for a in found] == [
        (0, 3, 1, (0,)),
        (4, 6, 1, (3,)),
    ]
    assert [d for d, _, _ in top_docs(found, 5)] == [0, 3]


def test_refusals_and_copies() -> None:
    with pytest.raises(IndexError, match="document 1 at 0"):
        NaiveIndex([[1], [7]], 5)
    with pytest.raises(IndexError, match="got 5"):
        INDEX.count([5])
    other = pickle.loads(pickle.dumps(INDEX))
    assert other.uuid == INDEX.uuid != NaiveIndex(DOCS, 6).uuid
    assert other.count([1, 2]) == 3


def test_allowed_text_excuses() -> None:
    x = list(range(12))
    unsafe, harmless = NaiveIndex([x], 20), NaiveIndex([x[:9]], 20)
    rule = Rule(min_len=2)
    exact, cover = (
        Category(unsafe, replace(rule, allow_mode=mode), harmless) for mode in ("exact", "cover")
    )
    assert passing_span(x, 0, 9, exact) is None
    whole = passing_span(x, 0, 12, exact)
    assert whole is not None
    assert whole.score == pytest.approx(12 * math.log(12))
    partly = passing_span(x, 0, 12, cover)
    assert partly is not None
    assert partly.score == pytest.approx(3 * math.log(12))
    early = passing_span(x, 0, 7, cover)
    assert early is not None
    assert early.score == pytest.approx(7 * math.log(12)), "the harmless match has not reached 8"


@given(corpora, st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), max_size=12))
def test_matcher(docs: list[list[int]], steps: list[tuple[int, int]]) -> None:
    index = NaiveIndex(docs, 4)
    matcher = NaiveMatcher(index, batch=2, rule=Rule(tau=2.0, min_len=2), max_match=5)
    rows: list[list[int]] = [[], []]
    for token, parent in steps:
        cand = np.array([[0, 1, 2, 3]] * 2)
        peeked = matcher.peek(cand, exact=True)
        matcher.advance([token, 3 - token], [parent, 1])
        rows = [[*rows[parent], token], [*rows[1], 3 - token]]
        state = matcher.state()
        for field, ahead in zip(state, peeked, strict=True):
            assert field[0] == ahead[parent, token]
        for b, row in enumerate(rows):
            match = index.longest_suffix(row[-5:])
            assert (state.length[b], state.count[b]) == match[:2]
    assert matcher.copy().rows == matcher.rows == rows


def test_penalty_at_the_ends_of_its_range() -> None:
    logps = torch.tensor([[0.0, -1e-9, -0.5, -5.0, -1000.0]], dtype=torch.float64)
    u = [cbd_penalty(logps[:, i : i + 1], *(torch.ones(1, 1),) * 2).item() for i in range(5)]
    expected = [-math.log(1e-6), -math.log(1e-6), -math.log(1 - math.exp(-0.5))]
    assert u == pytest.approx([*expected, -math.log(1 - math.exp(-5)), 0.0], rel=1e-6)


def test_plain_beam_search_finds_the_best_sequence() -> None:
    table = torch.randn(4, 4, dtype=torch.float64).log_softmax(-1)

    def logprobs(x: tuple[int, ...]) -> list[float]:
        values: list[float] = table[x[-1] if x else 3].tolist()
        return values

    best = prov_decode(logprobs, lambda x, c: False, None, max_new_tokens=3, beams=64, candidates=4)
    assert best is not None
    paths = itertools.product(range(4), repeat=3)
    scores = {p: sum(logprobs(p[:i])[p[i]] for i in range(3)) for p in paths}
    assert best.tokens == max(scores, key=lambda p: scores[p])
    assert prov_decode(logprobs, lambda x, c: True, None, max_new_tokens=3) is None
