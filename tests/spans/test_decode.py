"""Prov-Decode against its definition, its promise, and the veto of samplers."""

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alignops.reference import spans as reference
from alignops.spans import (
    ProvResult,
    SpanIndex,
    SpanVeto,
    TraceShield,
    build_index,
    prov_decode,
)
from alignops.spans.decode import top_candidates
from tests.spans.worlds import World, make_index, worlds

UNSAFE = [list(range(10))]


class TinyModel:
    """A random recurrent model that likes some sequences: (tokens, parents) to logits.

    `coarse` gives logits 0 and -inf only, so that scores tie.
    """

    def __init__(self, vocab: int, seed: int, liked: list[list[int]], coarse: bool = False) -> None:
        g = torch.Generator().manual_seed(seed)
        self.embed = torch.randn(vocab, 8, generator=g, dtype=torch.float64)
        self.mix = torch.randn(8, 8, generator=g, dtype=torch.float64) / 4
        self.head = torch.randn(8, vocab, generator=g, dtype=torch.float64)
        self.bonus = torch.zeros(vocab, vocab, dtype=torch.float64)
        for doc in liked:
            for a, b in itertools.pairwise(doc):
                self.bonus[a, b] = 3.0
        self.coarse = coarse
        self.state = torch.empty(0, 8, dtype=torch.float64)
        self.calls = 0

    def logits(self, state: Tensor, last: Tensor) -> Tensor:
        out = state @ self.head + self.bonus[last]
        if self.coarse:
            return torch.where(out >= out.quantile(0.4, dim=-1, keepdim=True), 0.0, -torch.inf)
        return out

    def __call__(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        self.calls += 1
        state = self.state.new_zeros(len(tokens), 8) if parents is None else self.state[parents]
        for column in tokens.T:
            state = torch.tanh(state @ self.mix + self.embed[column])
        self.state = state
        return self.logits(state, tokens[:, -1])

    def logprobs(self, prompt: list[int]) -> Callable[[tuple[int, ...]], list[float]]:
        def of(x: tuple[int, ...]) -> list[float]:
            logits = self(torch.tensor([[*prompt, *x]]), None)
            values: list[float] = logits.log_softmax(-1)[0].tolist()
            return values

        return of


def decode(world: World, model: TinyModel, **options: Any) -> ProvResult:
    prompt = world.text[: world.prompt] or [0]
    return prov_decode(model, prompt, world.shield(), eos=world.vocab - 1, **options)


def liking(world: World, seed: int, coarse: bool = False) -> TinyModel:
    return TinyModel(world.vocab, seed, [d for docs, _ in world.unsafe for d in docs], coarse)


searches = st.fixed_dictionaries(
    {
        "beams": st.integers(1, 4),
        "candidates": st.none() | st.integers(1, 9),
        "rescans": st.integers(0, 3),
        "length_power": st.sampled_from([0.0, 1.0, 0.7]),
        "max_new_tokens": st.integers(1, 7),
        "mode": st.sampled_from(["hard", "hard", "soft"]),
        "gamma": st.sampled_from([0.5, 2.0]),
    }
)


@given(worlds(), searches, st.integers(0, 99), st.booleans())
def test_search_equals_definition(
    world: World, options: dict[str, Any], seed: int, coarse: bool
) -> None:
    model, categories = liking(world, seed, coarse), world.categories()
    prompt = world.text[: world.prompt] or [0]
    seen = prompt if world.settings["scope"] == "prompt+completion" else []
    plain = {k: v for k, v in options.items() if k not in ("mode", "gamma")}
    plain["candidates"] = plain["candidates"] or 2 * plain["beams"]
    expected = reference.prov_decode(
        model.logprobs(prompt),
        lambda x, c: reference.vetoed([*seen, *x], c, categories, world.settings["max_match"]),
        world.vocab - 1,
        gamma=options["gamma"] if options["mode"] == "soft" else None,
        **plain,
    )
    result = decode(world, model, **options)
    if expected is None:
        assert (result.tokens, result.reason, result.refused) == ((), "all-vetoed", True)
        return
    assert not result.refused
    assert result.score == pytest.approx(expected.score, abs=1e-9)
    ties = [h for h in result.hypotheses if h.score > expected.score - 1e-9]
    assert expected.tokens in [h.tokens for h in ties]
    if coarse or len(ties) == 1:
        assert result.tokens == expected.tokens
        assert result.reason == ("eos" if expected.ended else "length")


@given(worlds(), searches, st.integers(0, 99), st.integers(0, 3))
def test_the_filter_never_refuses_what_hard_mode_writes(
    world: World, options: dict[str, Any], seed: int, lookahead: int
) -> None:
    options = {**options, "mode": "hard", "max_new_tokens": 20}
    options["lookahead"] = lookahead if world.settings["kind"] != "max" else 0
    result = decode(world, liking(world, seed), **options)
    prompt = world.text[: world.prompt] or [0]
    for hypothesis in result.hypotheses:
        verdict = world.shield().check([*prompt, *hypothesis.tokens], len(prompt))
        assert not verdict.refused
    assert result.steps <= 20


def test_without_veto_the_model_repeats_the_unsafe_text() -> None:
    model = TinyModel(12, 0, UNSAFE)
    model.head *= 0.01
    shield = TraceShield(make_index(UNSAFE, 12), tau=15.0, min_len=4)
    options = {"max_new_tokens": 9, "beams": 2}
    free = prov_decode(model, [0], shield, mode="soft", gamma=0.0, **options)
    assert free.tokens == tuple(range(1, 10))
    assert shield.check(free.tokens).refused
    soft = prov_decode(model, [0], shield, mode="soft", gamma=9.0, **options)
    hard = prov_decode(model, [0], shield, **options)
    for result in (soft, hard):
        assert not shield.check(result.tokens).refused
        assert result.vetoed
        assert result.score < free.score


def test_all_vetoed() -> None:
    docs = [[t] * 5 for t in range(4)]
    shield = TraceShield(make_index(docs, 4), tau=0.1, min_len=1)
    result = prov_decode(TinyModel(4, 1, []), [0], shield, max_new_tokens=5)
    assert result == ProvResult((), -math.inf, "all-vetoed", True, (), result.vetoed, 1)
    assert result.vetoed >= 4
    ending = prov_decode(TinyModel(4, 1, []), [0], shield, max_new_tokens=5, eos=2)
    assert (ending.tokens, ending.reason) == ((), "eos"), "the end of text is never vetoed"


def test_ties_go_to_the_lower_beam_then_the_lower_token() -> None:
    def step(tokens: Tensor, parents: Tensor | None) -> Tensor:
        return torch.zeros(len(tokens), 5)

    shield = TraceShield(make_index(UNSAFE, 12))
    result = prov_decode(step, [0], shield, beams=3, max_new_tokens=2)
    assert [h.tokens for h in result.hypotheses] == [(0, 0), (0, 1), (0, 2)]


def test_rescans_look_further_down() -> None:
    def step(tokens: Tensor, parents: Tensor | None) -> Tensor:
        return -torch.arange(12.0).expand(len(tokens), 12)

    docs = [[t] for t in range(6)]
    shield = TraceShield(make_index(docs, 12), tau=1.0, min_len=1)
    for rescans, tokens in ((0, ()), (2, ()), (3, (6,))):
        result = prov_decode(
            step, [0], shield, beams=1, candidates=2, max_new_tokens=1, rescans=rescans
        )
        assert result.tokens == tokens


def test_lookahead_vetoes_earlier() -> None:
    index = make_index(UNSAFE, 12)
    model = TinyModel(12, 0, UNSAFE)
    model.head *= 0.01
    runs = []
    for lookahead in range(4):
        shield = TraceShield(index, tau=12.0, min_len=4)
        result = prov_decode(model, [0], shield, beams=1, max_new_tokens=8, lookahead=lookahead)
        runs.append(next(i for i, t in enumerate(result.tokens) if t != i + 1))
    assert runs == [5, 4, 3, 2]


@given(worlds(), st.integers(1, 3))
def test_lookahead_equals_definition(world: World, k: int) -> None:
    """A token goes iff the index continues its match to a flagged span within k tokens."""
    world.settings.update(scope="prompt+completion", max_match=4096, max_count=None)
    if world.settings["kind"] == "max":
        world.settings["kind"] = "bci"
    text = world.text or [0]
    expected = set()
    for category in world.categories():
        rule = category.rule
        for c in range(world.vocab):
            x = [*text, c]
            length = category.index.longest_suffix(x).length
            span = x[len(x) - length :]
            state = reference.NaiveMatcher(category.index, category.allow, rule=rule)
            state.rows = [x]
            score = state.state().bci[0]
            if state.state().flag[0]:
                expected.add(c)
            if not length or category.index.count(span) > 16:
                continue
            hits = category.index.locate(span, 16)
            for d, o in zip(hits.document.tolist(), hits.offset.tolist(), strict=True):
                after = category.index.docs[d][o + length :][:k]
                total = score + sum(-math.log(category.index.unigram[t]) for t in after)
                if rule.kind == "norm":
                    total /= math.log(category.index.n_tokens)
                excused = (
                    category.allow is not None
                    and rule.allow_mode == "exact"
                    and category.allow.count(span + after)
                )
                long_enough = length + len(after) >= rule.min_len
                if long_enough and not excused and rule.severity * total > rule.tau + 1e-12:
                    expected.add(c)

    def step(tokens: Tensor, parents: Tensor | None) -> Tensor:
        return torch.zeros(len(tokens), world.vocab)

    options = {"beams": world.vocab, "candidates": world.vocab, "max_new_tokens": 1, "rescans": 0}
    result = prov_decode(step, text, world.shield(), lookahead=k, **options)
    assert {h.tokens[0] for h in result.hypotheses} == set(range(world.vocab)) - expected


def test_indexes_that_fail_meanwhile(tmp_path: Path) -> None:
    build_index(UNSAFE, tmp_path / "u", vocab_size=12, fingerprint="test")
    with SpanIndex.open(tmp_path / "u", fingerprint="test") as index:
        closed, opened = TraceShield(index), TraceShield(index, fail_open=True)
        model, cut = TinyModel(12, 0, UNSAFE), []

        def step(tokens: Tensor, parents: Tensor | None) -> Tensor:
            if parents is not None and not cut:
                cut.append(os.truncate(tmp_path / "u" / "suf.0", 4097))
            return model(tokens, parents)

        veto = SpanVeto(closed)
        rows = torch.tensor([[1, 2]])
        veto(rows[:, :1], torch.zeros(1, 12))
        result = prov_decode(step, [0], closed, max_new_tokens=3)
        assert (result.reason, result.refused, result.tokens) == ("index-unavailable", True, ())
        assert result.steps == 2
        result = prov_decode(model, [0], opened, max_new_tokens=3)
        assert (result.reason, len(result.tokens)) == ("length", 3)
        with pytest.raises(OSError, match="suf"):
            veto(rows, torch.zeros(1, 12))
        scores = torch.randn(1, 12)
        assert torch.equal(SpanVeto(opened)(rows, scores), scores)
        for shield in (closed, opened):
            stream = shield.stream()
            assert stream.push(3) == stream.verdict().refused == (shield is closed)


def test_padded_vocabularies() -> None:
    def step(tokens: Tensor, parents: Tensor | None) -> Tensor:
        return torch.zeros(len(tokens), 16).scatter_(1, (tokens[:, -1:] + 1) % 16, 5.0)

    shield = TraceShield(make_index(UNSAFE, 10), tau=3.0, min_len=2)
    result = prov_decode(step, [9], shield, beams=1, max_new_tokens=8)
    assert result.tokens[:3] == (10, 11, 12)
    assert not shield.check([t for t in result.tokens if t < 10]).refused


@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 14), st.integers(0, 99))
def test_candidates_are_the_best_ties_by_token(b: int, v: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.integers(-2, 3, (b, v)) / 2)
    values, ids = top_candidates(logits, k)
    lp = logits.log_softmax(-1).numpy()
    for row in range(b):
        order = sorted(range(v), key=lambda c: (-logits[row, c].item(), c))[:k]
        assert ids[row].tolist() == order
        np.testing.assert_allclose(values[row], lp[row, order], atol=1e-12)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mode": "firm"}, "mode"),
        ({"beams": 0}, "beams"),
        ({"candidates": 0}, "candidates"),
        ({"gamma": -1.0}, "gamma"),
        ({"lookahead": -1}, "lookahead"),
        ({"rescans": -1}, "rescans"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": []}, "prompt"),
        ({"step": lambda tokens, parents: torch.full((1, 12), torch.nan)}, "finite"),
    ],
)
def test_bad_arguments(change: dict[str, Any], text: str) -> None:
    shield = TraceShield(make_index(UNSAFE, 12))
    arguments = {"step": TinyModel(12, 0, []), "prompt": [0], "shield": shield} | change
    with pytest.raises(ValueError, match=text):
        prov_decode(**arguments)
    with pytest.raises(ValueError, match="kind 'max'"):
        prov_decode(
            TinyModel(12, 0, []), [0], TraceShield(make_index(UNSAFE, 12), kind="max"), lookahead=1
        )


# The veto of samplers


def brute_veto(world: World, row: list[int], prompt: int) -> set[int]:
    categories = world.categories()
    seen = row if world.settings["scope"] == "prompt+completion" else row[prompt:]
    return {
        c
        for c in range(world.vocab)
        if reference.vetoed(seen, c, categories, world.settings["max_match"])
    }


@given(worlds(), st.data())
def test_veto_is_exact_over_the_vocabulary(world: World, data: st.DataObject) -> None:
    veto = SpanVeto(world.shield())
    rows = [(world.text[: world.prompt] or [0]) for _ in range(3)]
    prompt = len(rows[0])
    width = world.vocab + 2  # a padded vocabulary
    sources = [d for docs, _ in world.unsafe for d in docs if d]
    for _ in range(data.draw(st.integers(1, 6))):
        scores = torch.randn(3, width)
        out = veto(torch.tensor(rows), scores)
        for row, before, after in zip(rows, scores, out, strict=True):
            flagged = brute_veto(world, row, prompt)
            assert {i for i in range(width) if after[i] == -torch.inf} == flagged
            kept = [i for i in range(width) if i not in flagged]
            assert torch.equal(before[kept], after[kept])
        # A beam search would reorder, repeat and drop.
        parents = data.draw(st.lists(st.integers(0, 2), min_size=3, max_size=3))
        nexts = [
            data.draw(st.sampled_from(sources))[0]
            if data.draw(st.booleans())
            else (rows[p][-1] + 1) % world.vocab
            for p in parents
        ]
        rows = [[*rows[p], t] for p, t in zip(parents, nexts, strict=True)]


def small_veto(**options: Any) -> SpanVeto:
    return SpanVeto(TraceShield(make_index(UNSAFE, 12), tau=6.0, min_len=3), **options)


def flagged_after(veto: SpanVeto, rows: list[list[int]], **options: Any) -> list[list[int]]:
    out = veto(torch.tensor(rows), torch.zeros(len(rows), 12), **options)
    return [row.isinf().nonzero().flatten().tolist() for row in out]


def test_veto_follows_parents_and_rereads_other_rows() -> None:
    veto = small_veto()
    assert flagged_after(veto, [[11], [11]]) == [[], []]
    assert flagged_after(veto, [[11, 4], [11, 2]]) == [[], []]
    assert flagged_after(veto, [[11, 2, 3], [11, 4, 5]]) == [[4], [6]]
    assert flagged_after(veto, [[11, 4, 5, 8]], parent=[1]) == [[]]
    # A step back, several tokens at once: rows are read again from the prompt.
    assert flagged_after(veto, [[11, 4, 5], [11, 2, 3]]) == [[6], [4]]
    assert flagged_after(veto, [[11, 4, 5, 1, 2], [11, 2, 3, 7, 8]]) == [[3], [9]]
    # Another prompt.
    assert flagged_after(veto, [[2, 3], [1, 2]]) == [[], []]
    assert flagged_after(veto, [[2, 3, 4], [1, 2, 3]]) == [[], []]
    veto.reset()
    assert flagged_after(veto, [[2, 3, 4], [1, 2, 3]]) == [[], []]
    assert flagged_after(veto, [[2, 3, 4, 5], [1, 2, 3, 4]]) == [[], []]
    assert flagged_after(veto, [[2, 3, 4, 5, 6], [1, 2, 3, 4, 5]]) == [[7], [6]]


def test_veto_modes() -> None:
    rows = [[11], [11, 2], [11, 2, 3]]
    soft, ending, normal = (
        small_veto(mode="soft", gamma=1.5),
        small_veto(eos=4),
        small_veto(renormalize=True),
    )
    for row in rows:
        ids, scores = torch.tensor([row]), torch.zeros(1, 12)
        lowered, kept, sums = (v(ids, scores) for v in (soft, ending, normal))
    assert lowered[0].tolist() == [0.0] * 4 + [-1.5] + [0.0] * 7
    assert torch.equal(kept, torch.zeros(1, 12))
    assert sums.exp().sum().item() == pytest.approx(1)
    assert sums[0, 4] == -torch.inf


def test_padding_of_prompts() -> None:
    shield = TraceShield(make_index(UNSAFE, 12), tau=6.0, min_len=3, scope="prompt+completion")
    rows = [[0, 0, 1, 2], [5, 9, 3, 4]]
    assert flagged_after(SpanVeto(shield, pad=0), rows) == [[3], [5]]
    assert flagged_after(SpanVeto(shield), rows) == [[3], [5]]
    together = [[0, 0, 0, 1], [5, 9, 3, 4]]
    assert flagged_after(SpanVeto(shield), together) == [[2], [5]]
    assert flagged_after(SpanVeto(shield, pad=0), together) == [[], [5]]


def test_veto_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="mode"):
        small_veto(mode="x")
    with pytest.raises(ValueError, match="gamma"):
        small_veto(gamma=-1.0)
    with pytest.raises(ValueError, match="shapes"):
        small_veto()(torch.zeros(2, 3, dtype=torch.long), torch.zeros(3, 12))
