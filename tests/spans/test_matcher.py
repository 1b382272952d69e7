"""The incremental matcher against the definition, which starts anew at every token."""

from __future__ import annotations

import math
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignops import spans
from alignops.reference.spans import NaiveIndex
from alignops.spans import MatchRule, SpanIndex, SpanMatcher

Rows = list[list[int]]
VOCAB = 12


def random_docs(rng: np.random.Generator, count: int, source: Rows | None = None) -> Rows:
    """Random documents, made of pieces of earlier ones or of `source`."""
    docs: Rows = []
    for _ in range(count):
        doc: list[int] = []
        for _ in range(rng.integers(0, 5)):
            pool = (source or []) + docs
            other = pool[rng.integers(len(pool))] if pool else []
            start = rng.integers(0, len(other) + 1)
            doc += other[start : start + rng.integers(0, 30)]
            doc += rng.integers(0, VOCAB, rng.integers(0, 8)).tolist()
        docs.append(doc)
    return docs


def open_index(folder: Path, name: str, docs: Rows, shards: int = 1) -> SpanIndex:
    longest = max((len(d) for d in docs), default=0) + 1
    total = sum(len(d) + 1 for d in docs)
    spans.build_index(
        docs,
        folder / name,
        vocab_size=VOCAB,
        fingerprint="test",
        allow_empty=True,
        shard_tokens=max(longest, -(-total // shards)),
    )
    return SpanIndex.open(folder / name, fingerprint="test")


def expected(
    row: list[int], unsafe: NaiveIndex, allow: NaiveIndex | None, rule: MatchRule
) -> tuple[int, int, float, float, bool]:
    """Length, count, BCI, risk and flag of the longest suffix, from the definitions."""
    length, count, _ = unsafe.longest_suffix(row)
    weight = -np.log(np.maximum(unsafe.unigram, 1e-9))[row] if row else np.empty(0)
    if allow is not None and rule.allow_mode == "cover":
        for end in range(8, len(row) + 1):
            if allow.count(row[end - 8 : end]):
                weight[end - 8 : end] = 0
    tail = weight[len(row) - length :]
    bci = float(tail.sum())
    excused = (
        allow is not None
        and rule.allow_mode == "exact"
        and bool(allow.count(row[len(row) - length :]))
    )
    rare = rule.max_count is None or count <= rule.max_count
    if length < rule.min_len or not rare or excused:
        return length, count, bci, 0.0, False
    score = {"bci": bci, "norm": bci / math.log(unsafe.n_tokens), "max": tail.max(initial=0)}
    risk = rule.severity * float(score[rule.kind])
    return length, count, bci, risk, risk > rule.tau


def check_state(state: Any, wanted: list[tuple[int, int, float, float, bool]]) -> None:
    length, count, bci, risk, flag = zip(*wanted, strict=True)
    assert state.length.ravel().tolist() == list(length)
    assert state.count.ravel().tolist() == list(count)
    np.testing.assert_allclose(state.bci.ravel(), bci, atol=1e-9)
    np.testing.assert_allclose(state.risk.ravel(), risk, atol=1e-9)
    assert state.flag.ravel().tolist() == list(flag)


def next_tokens(rng: np.random.Generator, rows: Rows, docs: Rows) -> list[int]:
    """Mostly what follows somewhere."""
    tokens = []
    for row in rows:
        doc = docs[rng.integers(len(docs))]
        places = [i for i, t in enumerate(doc[:-1]) if row and t == row[-1]]
        if places and rng.random() < 0.8:
            tokens.append(doc[places[rng.integers(len(places))] + 1])
        else:
            tokens.append(int(rng.integers(VOCAB)))
    return tokens


@pytest.mark.parametrize("allow_mode", [None, "exact", "cover"])
@pytest.mark.parametrize("kind", ["bci", "norm", "max"])
@pytest.mark.parametrize("shards", [1, 2, 7])
def test_stream_equals_definition(
    tmp_path: Path, shards: int, kind: str, allow_mode: str | None
) -> None:
    rng = np.random.default_rng(shards)
    docs = random_docs(rng, 12)
    harmless = random_docs(rng, 6, docs)
    rule = MatchRule(
        kind=kind,
        tau={"bci": 9.0, "norm": 1.5, "max": 2.4}[kind],
        min_len=3,
        max_count=None if shards == 2 else 3,
        severity=1.25,
        allow_mode=allow_mode or "exact",
    )
    naive, naive_allow = NaiveIndex(docs, VOCAB), NaiveIndex(harmless, VOCAB)
    with (
        open_index(tmp_path, "unsafe", docs, shards) as index,
        open_index(tmp_path, "allow", harmless, 2) as other,
    ):
        assert index.n_shards >= min(shards, 2)
        allow, oracle = (other, naive_allow) if allow_mode else (None, None)
        matcher = SpanMatcher(index, allow, batch=3, rule=rule)
        rows: Rows = [[], [], []]
        flags = 0
        for step in range(60):
            tokens = next_tokens(rng, rows, docs + harmless)
            if step % 3 == 2:
                parent = rng.integers(0, len(rows), rng.integers(1, 5))
                tokens = next_tokens(rng, [rows[p] for p in parent], docs + harmless)
                rows = [[*rows[p], t] for p, t in zip(parent, tokens, strict=True)]
                matcher.advance(tokens, parent)
            else:
                rows = [[*row, t] for row, t in zip(rows, tokens, strict=True)]
                matcher.advance(tokens)
            assert matcher.batch == len(rows)
            check_state(matcher.state(), [expected(r, naive, oracle, rule) for r in rows])
            cand = np.stack([next_tokens(rng, rows, docs) for _ in range(3)], 1)
            wanted = [
                expected([*row, int(c)], naive, oracle, rule)
                for row, cs in zip(rows, cand, strict=True)
                for c in cs
            ]
            peek = matcher.peek(cand, exact=True)
            assert peek.flag.shape == cand.shape
            check_state(peek, wanted)
            assert (matcher.peek(cand) == peek.flag).all()
            flags += int(peek.flag.sum())
        assert flags > 0


@pytest.mark.parametrize("allow_mode", [None, "exact", "cover"])
def test_peek_equals_advance_on_a_copy(tmp_path: Path, allow_mode: str | None) -> None:
    """To the last bit, with decisions at the threshold."""
    rng = np.random.default_rng(3)
    docs = random_docs(rng, 10)
    with (
        open_index(tmp_path, "unsafe", docs, 2) as index,
        open_index(tmp_path, "allow", random_docs(rng, 4, docs)) as other,
    ):
        allow = other if allow_mode else None
        matcher = SpanMatcher(
            index, allow, batch=4, rule=MatchRule(min_len=2, allow_mode=allow_mode or "exact")
        )
        rows: Rows = [[], [], [], []]
        for _ in range(50):
            tokens = next_tokens(rng, rows, docs)
            cand = np.asarray(tokens)[:, None]
            peek = matcher.peek(cand, exact=True)
            before = matcher.save()
            after = matcher.copy()
            after.advance(tokens)
            state = after.state()
            for name in ("length", "count", "bci", "risk", "flag"):
                assert (getattr(peek, name)[:, 0] == getattr(state, name)).all(), name
            for name, array in matcher.save().items():
                assert (array == before[name]).all()
            rule = MatchRule(
                tau=float(state.risk.max()), min_len=2, allow_mode=allow_mode or "exact"
            )
            strict = SpanMatcher(index, allow, batch=4, rule=rule)
            strict.restore(before)
            assert not strict.peek(cand).any()  # strictly larger than tau
            matcher, rows = after, [[*r, t] for r, t in zip(rows, tokens, strict=True)]


def test_flagged_lists_what_peek_flags(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    docs = random_docs(rng, 10)
    with open_index(tmp_path, "unsafe", docs, 3) as index:
        for rule in (MatchRule(tau=8, min_len=3), MatchRule(kind="max", tau=2.4, min_len=1)):
            matcher = SpanMatcher(index, batch=3, rule=rule)
            rows: Rows = [[], [], []]
            total = 0
            for _ in range(40):
                tokens = next_tokens(rng, rows, docs)
                rows = [[*r, t] for r, t in zip(rows, tokens, strict=True)]
                matcher.advance(tokens)
                found = matcher.flagged()
                wanted = np.nonzero(matcher.peek(np.tile(np.arange(VOCAB), (3, 1))))
                assert [a.tolist() for a in found] == [a.tolist() for a in wanted]
                total += len(found[0])
            assert total > 0


def test_excuses_exactly(tmp_path: Path) -> None:
    """A match is excused only if it occurs as a whole in the allow index."""
    run = list(range(10))
    with (
        open_index(tmp_path, "unsafe", [run]) as index,
        open_index(tmp_path, "short", [run[:9]]) as short,
        open_index(tmp_path, "whole", [[11, *run]]) as whole,
    ):
        rule = MatchRule(tau=10, min_len=4)
        for allow, flags in ((None, "000011111"), (short, "000000001"), (whole, "000000000")):
            matcher = SpanMatcher(index, allow, rule=rule)
            seen = ""
            matcher.advance([0])
            for token in run[1:]:
                peek = bool(matcher.peek([[token]])[0, 0])
                matcher.advance([token])
                assert peek == bool(matcher.state().flag[0])
                seen += str(int(peek))
            # ln 10 per token: five tokens reach 11.5
            assert seen == flags.replace("000011111", "000111111"), allow


def test_covers_tokens(tmp_path: Path) -> None:
    """Eight tokens of harmless text lose their surprisal, from their end on."""
    run = list(range(11))
    with (
        open_index(tmp_path, "unsafe", [run]) as index,
        open_index(tmp_path, "allow", [[11, *run[1:9]]]) as allow,
    ):
        matcher = SpanMatcher(index, allow, rule=MatchRule(tau=10, min_len=4, allow_mode="cover"))
        one = math.log(11)
        for n, token in enumerate(run, 1):
            matcher.advance([token])
            covered = 8 if n >= 9 else 0
            assert matcher.state().bci[0] == pytest.approx((n - covered) * one)
            assert matcher.state().length[0] == n


def test_prompt(tmp_path: Path) -> None:
    """Matches may begin in the prompt, and none is flagged before a token follows."""
    docs = [list(range(12))]
    with open_index(tmp_path, "unsafe", docs) as index:
        rule = MatchRule(tau=5, min_len=3)
        matcher = SpanMatcher(index, batch=2, rule=rule)
        matcher.extend_prompt(docs[0][:5])
        assert matcher.state().length.tolist() == [5, 5]
        assert not matcher.state().flag.any()
        assert not matcher.state().risk.any()
        assert matcher.peek([[5], [3]]).tolist() == [[True], [False]]
        matcher.advance([5, 3])
        assert matcher.state().flag.tolist() == [True, False]
        matcher.extend_prompt([[], np.array([4, 5])])
        assert matcher.state().length.tolist() == [6, 3]
        assert matcher.state().flag.tolist() == [True, False]
        matcher.extend_prompt(torch.tensor([[6], [6]]))
        assert matcher.state().length.tolist() == [7, 4]
        matcher.extend_prompt([])
        matcher.reset([1])
        assert matcher.state().length.tolist() == [7, 0]
        assert matcher.state().count.tolist() == [1, 12]
        matcher.reset()
        assert matcher.state().length.tolist() == [0, 0]


@pytest.mark.parametrize("mode", ["exact", "cover"])
def test_prompt_equals_tokens(tmp_path: Path, mode: str) -> None:
    rng = np.random.default_rng(5)
    docs = random_docs(rng, 8)
    with (
        open_index(tmp_path, "unsafe", docs, 2) as index,
        open_index(tmp_path, "allow", random_docs(rng, 3, docs)) as allow,
    ):
        rule = MatchRule(min_len=2, tau=4, allow_mode=mode)
        for max_match in (8, 4096):
            a, b = (
                SpanMatcher(index, allow, max_match=max_match, rule=rule, batch=2) for _ in range(2)
            )
            for _ in range(6):
                prompts = [[t for d in random_docs(rng, 2, docs) for t in d] for _ in range(2)]
                a.extend_prompt(prompts)
                for r, prompt in enumerate(prompts):
                    b.active = [r == 0, r == 1]
                    for token in prompt:
                        b.advance([token, token])
                b.active = [True, True]
                for token in (int(rng.integers(VOCAB)), 3):
                    a.advance([token, token])
                    b.advance([token, token])
                    for x, y in zip(a.state(), b.state(), strict=True):
                        assert (x == y).all()


def test_active_rows(tmp_path: Path) -> None:
    with open_index(tmp_path, "unsafe", [list(range(12))]) as index:
        matcher = SpanMatcher(index, batch=3, rule=MatchRule(tau=1, min_len=2))
        matcher.advance([1, 1, 1])
        matcher.active = [True, False, True]
        matcher.advance([2, -100, 3])
        assert matcher.state().length.tolist() == [2, 1, 1]
        peek = matcher.peek([[3], [2], [4]], exact=True)
        assert peek.flag.tolist() == [[True], [False], [True]]
        assert peek.length.tolist() == [[3], [0], [2]]
        assert set(matcher.flagged()[0].tolist()) == {0, 2}
        matcher.advance([0, 3, 3, 4], parent=[1, 0, 0, 2])
        assert matcher.active.tolist() == [False, True, True, True]
        assert matcher.state().length.tolist() == [1, 3, 3, 2]
        with pytest.raises(ValueError, match="read-only"):
            matcher.active[0] = True


def test_states_move_between_matchers(tmp_path: Path) -> None:
    """Saved states are independent of shards, and of the matcher that saved them."""
    rng = np.random.default_rng(6)
    docs = random_docs(rng, 20)
    with (
        open_index(tmp_path, "one", docs, 1) as one,
        open_index(tmp_path, "many", docs, 5) as many,
        open_index(tmp_path, "allow", random_docs(rng, 5, docs)) as allow,
    ):
        rule = MatchRule(min_len=2, tau=5, allow_mode="cover")
        matchers = [SpanMatcher(index, allow, batch=2, rule=rule) for index in (one, many)]
        rows: Rows = [[], []]
        for step in range(40):
            tokens = next_tokens(rng, rows, docs)
            rows = [[*r, t] for r, t in zip(rows, tokens, strict=True)]
            for matcher in matchers:
                matcher.advance(tokens)
            if step % 5 == 0:
                states = [pickle.loads(pickle.dumps(m.save())) for m in matchers]
                matchers = [SpanMatcher(index, allow, batch=0, rule=rule) for index in (many, one)]
                for matcher, state in zip(matchers, states, strict=True):
                    matcher.restore(state)
            for x, y in zip(matchers[0].state(), matchers[1].state(), strict=True):
                assert (x == y).all()
            assert matchers[0].state().length.tolist() == [one.longest_suffix(r)[0] for r in rows]


def test_surprisal_of_another_corpus(tmp_path: Path) -> None:
    with open_index(tmp_path, "unsafe", [[1, 2, 3]]) as index:
        surprisal = np.arange(VOCAB, dtype=np.float64)
        matcher = SpanMatcher(index, rule=MatchRule(surprisal=surprisal))
        for token in (1, 2, 3):
            matcher.advance([token])
        assert matcher.state().bci[0] == 6
        unseen = SpanMatcher(index)
        unseen.advance([7])
        assert unseen.state() == spans.MatchState([0], [3], [0], [0], [False])


def test_an_index_without_tokens(tmp_path: Path) -> None:
    with open_index(tmp_path, "unsafe", [[], []]) as index:
        matcher = SpanMatcher(index, rule=MatchRule(kind="norm", min_len=1, tau=0))
        matcher.advance([3])
        assert matcher.state().length.tolist() == [0]
        assert matcher.state().count.tolist() == [0]
        assert not matcher.peek([[1, 2]]).any()
        assert matcher.flagged()[0].tolist() == []


def test_arguments(tmp_path: Path) -> None:
    with open_index(tmp_path, "unsafe", [list(range(12))]) as index:
        matcher = SpanMatcher(index, batch=2)
        matcher.advance([0, 1])
        cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
            (lambda: matcher.advance([0, 12]), IndexError, r"\[0, 12\), got 12 in row 1"),
            (lambda: matcher.advance([-1, 0]), IndexError, "got -1"),
            (lambda: matcher.advance([255, 0]), IndexError, "no match crosses the end of a doc"),
            (lambda: matcher.advance([0, 1], [0, 2]), IndexError, "parent"),
            (lambda: matcher.advance([0]), ValueError, "tokens must have 2 elements"),
            (lambda: matcher.advance([0.5, 1.0]), TypeError, "integers"),
            (lambda: matcher.advance([[0, 1]]), ValueError, "tokens must have 1 dim"),
            (lambda: matcher.peek([0, 1]), ValueError, "cand must have 2 dim"),
            (lambda: matcher.peek([[0]]), ValueError, r"batch 2, got \(1, 1\)"),
            (lambda: matcher.peek([[0], [12]]), IndexError, "candidates"),
            (lambda: matcher.peek([[0], [12]], exact=True), IndexError, "candidates"),
            (lambda: matcher.extend_prompt([[0], [1], [2]]), ValueError, "2 rows, got 3"),
            (lambda: matcher.extend_prompt([3, 12]), IndexError, "got 12"),
            (lambda: matcher.reset([2]), IndexError, "rows"),
            (lambda: setattr(matcher, "active", [True]), ValueError, "active must have 2"),
            (lambda: matcher.restore({}), ValueError, "state must hold tokens"),
            (
                lambda: matcher.restore({**matcher.save(), "offsets": np.array([0, 9, 2])}),
                ValueError,
                "offsets",
            ),
            (
                lambda: matcher.restore({**matcher.save(), "tokens": np.array([0, 99])}),
                IndexError,
                "got 99",
            ),
            (lambda: SpanMatcher(index, rule=MatchRule(kind="kl")), ValueError, "kind"),
            (lambda: SpanMatcher(index, rule=MatchRule(allow_mode="x")), ValueError, "allow_mode"),
            (lambda: SpanMatcher(index, rule=MatchRule(tau=math.inf)), ValueError, "tau"),
            (lambda: SpanMatcher(index, rule=MatchRule(severity=0)), ValueError, "severity"),
            (lambda: SpanMatcher(index, rule=MatchRule(min_len=0)), ValueError, "min_len"),
            (lambda: SpanMatcher(index, rule=MatchRule(max_count=0)), ValueError, "max_count"),
            (lambda: SpanMatcher(index, rule=MatchRule(surprisal=[1.0])), ValueError, "12 elem"),
            (
                lambda: SpanMatcher(index, rule=MatchRule(surprisal=[-1.0] * 12)),
                ValueError,
                "surprisal must be finite",
            ),
            (lambda: SpanMatcher(index, batch=-1), ValueError, "batch"),
            (lambda: SpanMatcher(index, max_match=0), ValueError, "max_match"),
        ]
        before = matcher.save()
        for call, error, text in cases:
            with pytest.raises(error, match=text):
                call()
            for name, array in matcher.save().items():
                assert (array == before[name]).all()


def test_indexes_must_have_the_same_tokens(tmp_path: Path) -> None:
    spans.build_index([[1]], tmp_path / "other", vocab_size=VOCAB, fingerprint="other")
    spans.build_index([[1]], tmp_path / "larger", vocab_size=VOCAB + 1, fingerprint="test")
    with (
        open_index(tmp_path, "unsafe", [[1, 2]]) as index,
        SpanIndex.open(tmp_path / "other") as other,
        SpanIndex.open(tmp_path / "larger") as larger,
    ):
        with pytest.raises(spans.TokenizerMismatchError, match="fingerprint"):
            SpanMatcher(index, other)
        with pytest.raises(spans.TokenizerMismatchError, match="vocab_size"):
            SpanMatcher(index, larger)


def test_a_file_that_shrinks(tmp_path: Path) -> None:
    """An error, no state, and the same answers once the file is whole again."""
    with open_index(tmp_path, "unsafe", [list(range(12)) * 500]) as index:
        matcher = SpanMatcher(index)
        matcher.advance([4])
        file = tmp_path / "unsafe" / "suf.0"
        content = file.read_bytes()
        with file.open("r+b") as f:
            f.truncate(len(content) - 4096)
        for call in (
            lambda: matcher.advance([5]),
            lambda: matcher.peek([[5]]),
            lambda: matcher.extend_prompt([5]),
            matcher.flagged,
        ):
            with pytest.raises(spans.IndexCorruptError, match=r"suf\.0"):
                call()
        assert matcher.state().length.tolist() == [1]
        with file.open("r+b") as f:
            f.seek(0)
            f.write(content)
        matcher.advance([5])
        assert matcher.state().length.tolist() == [2]


def test_outlives_the_index_object(tmp_path: Path) -> None:
    index = open_index(tmp_path, "unsafe", [list(range(12))])
    matcher = SpanMatcher(index)
    index.close()
    matcher.advance([3])
    matcher.advance([4])
    assert matcher.state().length.tolist() == [2]


def test_another_thread_is_refused_or_waits_its_turn(tmp_path: Path) -> None:
    """Two threads never change one matcher at once; copies are independent."""
    with open_index(tmp_path, "unsafe", [list(range(12)) * 50]) as index:
        shared = SpanMatcher(index, batch=64)
        steps = [0, 0]
        refusals: set[str] = set()

        def work(i: int) -> None:
            for _ in range(300):
                try:
                    shared.advance([1] * 64)
                    steps[i] += 1
                except RuntimeError as error:
                    refusals.add(str(error))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(steps) >= 300
        assert all("another thread" in text for text in refusals)
        assert shared.state().length.tolist() == [1] * 64
