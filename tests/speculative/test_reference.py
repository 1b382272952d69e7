"""The definition itself: random words, accuracy, and that the rules have the laws they claim."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from alignops.reference.speculative import Law, Row, Tree, given, law, laws, philox, rules, verify

V = 6


def random_law(rng: np.random.Generator, size: int = V, spread: float = 1.5) -> Law:
    return law((rng.standard_normal(size) * spread).astype(np.float32))


# Random words


def test_philox_known_answers() -> None:
    # Random123's table: counters and keys of zeros, and the lanes 0, 1, 2 of one key.
    assert [hex(word) for word in philox(0, 0, 0)] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]
    lanes = philox(77, 5, 4, np.arange(3))
    assert all((lanes[i] == philox(77, 5, 4, i)).all() for i in range(3))
    assert (philox(77 + (1 << 32), 5, 4) != philox(77, 5, 4)).any()


def test_race_noise_is_exponential() -> None:
    noise = laws.race_noise(3, 9, 100_000) * math.log(2)
    assert abs(noise.mean() - 1) < 0.02
    assert abs((noise > 2).mean() - math.exp(-2)) < 0.005
    assert noise.min() > 0


# Distributions


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.0])
def test_probabilities_are_those_of_softmax(temperature: float) -> None:
    logits = (np.random.default_rng(0).standard_normal(50_000) * 4).astype(np.float32)
    z = logits.astype(np.float64) / temperature
    exact = np.exp(z - z.max())
    exact /= exact.sum()
    p = law(logits, temperature).p
    likely = exact > 1e-20
    assert (np.abs(p - exact)[likely] / exact[likely]).max() < 2e-6
    assert np.abs(p - exact).sum() / 2 < 1e-7


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 1e3, 1e4])
def test_extreme_temperatures(temperature: float) -> None:
    p = law(np.array([1.0, 3.0, -np.inf, 2.0], np.float32), temperature).p
    assert abs(p.sum() - 1) < 1e-6
    assert p[2] == 0
    assert p.argmax() == 1


def test_sums_do_not_depend_on_tiles_order(monkeypatch: pytest.MonkeyPatch) -> None:
    one = law(np.random.default_rng(1).standard_normal(20_000).astype(np.float32))
    tops, sums = laws.tile_sums(one)
    assert len(tops) == 5
    order = [3, 1, 4, 0, 2]
    again = laws.total_of_tiles([tops[i] for i in order], [sums[i] for i in order])
    assert again == one.total


def test_impossible_ids_come_last() -> None:
    logits = np.array([-np.inf, 1.0, 3.0, -np.inf, 2.0], np.float32)
    assert law(logits).order().tolist() == [2, 4, 1, 0, 3]
    assert (law(logits, top_k=2).p > 0).tolist() == [False, False, True, False, True]
    assert law(logits, top_k=2).order().tolist() == [2, 4, 0, 1, 3]


def test_cuts() -> None:
    logits = np.log(np.array([0.4, 0.1, 0.3, 0.2], np.float32))
    assert np.allclose(law(logits, top_k=2).p, [4 / 7, 0, 3 / 7, 0])
    assert np.allclose(law(logits, top_p=0.65).p, [4 / 7, 0, 3 / 7, 0])
    assert np.allclose(law(logits, top_p=0.75).p, [4 / 9, 0, 3 / 9, 2 / 9])
    assert np.allclose(law(logits, min_p=0.6).p, [4 / 7, 0, 3 / 7, 0])
    equal = law(np.zeros(4, np.float32), top_k=2)
    assert np.allclose(equal.p, [0.5, 0.5, 0, 0])


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_rows_without_a_distribution_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="logits must be finite"):
        law(bad)


def test_impossible_drafts_are_rejected_at_every_word() -> None:
    assert not laws.accepts(0, np.float32(0.5), np.float32(0))
    assert laws.accepts(2**32 - 1, np.float32(0.5), np.float32(0.5))
    assert laws.accepts(7, np.float32(0), np.float32(0.1))


def test_extreme_words_sample_possible_tokens() -> None:
    r = np.array([0, 0.25, 0, 0.75, 0], np.float32)
    assert laws.sample(r, 0) == 1
    assert laws.sample(r, 2**32 - 1) == 3
    assert laws.sample(np.zeros(5, np.float32), 5, r) == 1


# Rules


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """Statistic and degrees of freedom, cells below 5 joined."""
    small = expected < 5
    if small.any():
        counts = np.append(counts[~small], counts[small].sum())
        expected = np.append(expected[~small], expected[small].sum())
    if expected[-1] == 0:
        assert counts[-1] == 0
        counts, expected = counts[:-1], expected[:-1]
    return float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1


def assert_law(counts: np.ndarray, p: np.ndarray) -> None:
    """Chi-square at about alpha = 1e-4 (Wilson-Hilferty)."""
    statistic, freedom = chi_square(counts.ravel(), p.ravel() * counts.sum())
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < bound


def first_two(step: Callable[[int], list[int]], draws: int) -> np.ndarray:
    counts = np.zeros((V, V))
    for seed in range(draws):
        counts[tuple(step(seed)[:2])] += 1
    return counts


# The rule threshold knows no drafter: it is lossless for certain drafts only.
@pytest.mark.parametrize(
    ("rule", "certain"),
    [
        *(("lossless", False), ("block", False), ("coupled", False)),
        *(("lossless", True), ("block", True), ("coupled", True), ("threshold", True)),
    ],
)
def test_text_has_the_law_of_the_target(rule: str, certain: bool) -> None:
    rng = np.random.default_rng(11)
    start, after = random_law(rng), [random_law(rng) for _ in range(V)]
    q_start, q_after = random_law(rng), [random_law(rng) for _ in range(V)]

    def step(seed: int) -> list[int]:
        if certain:
            drafts = [2, 4]
        else:
            first = laws.sample(q_start.p, laws.uniform(seed, 0, laws.PROPOSE))
            drafts = [first, laws.sample(q_after[first].p, laws.uniform(seed, 1, laws.PROPOSE))]
        target = [start, after[drafts[0]], after[drafts[1]]]
        given = None if certain else [q_start, q_after[drafts[0]]]
        tokens = verify(Row(target, drafts, given, seed), rule).tokens
        if len(tokens) < 2:  # what the next round would give first
            again = Row([after[tokens[0]]], [], None, seed, 1)
            tokens += verify(again, rule).tokens
        return tokens

    counts = first_two(step, 3000)
    assert_law(counts, start.p[:, None] * np.stack([law.p for law in after]))


def test_coupled_equals_plain_sampling_for_any_draft() -> None:
    rng = np.random.default_rng(5)
    chain = [random_law(rng) for _ in range(5)]
    plain = [laws.race_winner(p, laws.race_noise(9, 100 + i, V)) for i, p in enumerate(chain)]
    for _ in range(50):
        drafts = [int(t) if rng.random() < 0.7 else int(rng.integers(V)) for t in plain[:4]]
        tokens = verify(Row(chain, drafts, None, 9, 100), "coupled").tokens
        assert tokens == plain[: len(tokens)]


def test_block_accepts_at_least_as_many_on_average() -> None:
    rng = np.random.default_rng(2)
    p, q = [random_law(rng) for _ in range(4)], [random_law(rng) for _ in range(3)]
    accepted = {"lossless": 0, "block": 0}
    for seed in range(3000):
        drafts = [laws.sample(q[i].p, laws.uniform(seed, i, laws.PROPOSE)) for i in range(3)]
        for rule in accepted:
            accepted[rule] += verify(Row(p, drafts, q, seed), rule).accepted
    assert accepted["block"] > accepted["lossless"] > 0


def test_marginal_acceptance_is_the_overlap() -> None:
    rng = np.random.default_rng(8)
    p, q = random_law(rng), random_law(rng)
    overlap = float(np.minimum(p.p, q.p).sum())
    draws = 4000
    accepted = sum(
        verify(
            Row([p, p], [laws.sample(q.p, laws.uniform(seed, 0, laws.PROPOSE))], [q], seed),
            "lossless",
        ).accepted
        for seed in range(draws)
    )
    assert abs(accepted / draws - overlap) < 4 * math.sqrt(overlap * (1 - overlap) / draws)


def test_greedy_rejects_at_the_first_difference() -> None:
    p = [law(np.eye(V, dtype=np.float32)[t]) for t in (3, 1, 4, 1)]
    assert verify(Row(p, [3, 1, 4]), "greedy").tokens == [3, 1, 4, 1]
    outcome = verify(Row(p, [3, 2, 4]), "greedy")
    assert (outcome.accepted, outcome.tokens) == (1, [3, 1])
    tie = law(np.array([0, 1, 1], np.float32))
    assert verify(Row([tie], []), "greedy").tokens == [1]


def test_cut_at_the_end_of_text_and_at_the_limit() -> None:
    p = [law(np.eye(V, dtype=np.float32)[t]) for t in (3, 1, 4, 1)]
    row = Row(p, [3, 1, 4])
    ended = verify(row, "greedy", eos_ids=[1])
    assert (ended.tokens, ended.accepted, ended.finished) == ([3, 1], 2, rules.END_OF_TEXT)
    limited = verify(row, "greedy", remaining=3)
    assert (limited.tokens, limited.accepted, limited.finished) == ([3, 1, 4], 3, rules.LENGTH)
    both = verify(row, "greedy", eos_ids=[1], remaining=2)
    assert both.finished == rules.END_OF_TEXT
    assert verify(row, "greedy", remaining=5).finished == rules.RUNNING


@pytest.mark.parametrize("retry", ["resample", "descend", "none"])
def test_rsd_does_not_depend_on_the_number_of_drafts(retry: str) -> None:
    rng = np.random.default_rng(21)
    student = {i: random_law(rng, 12, 3) for i in range(40)}
    teacher = {i: random_law(rng, 12, 3) for i in range(40)}

    def text(k: int) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < 30:
            at = len(tokens)
            drafts = [
                laws.sample(teacher[at + i].p, laws.uniform(4, at + i, laws.PROPOSE))
                for i in range(k)
            ]
            row = Row(
                [student[at + i] for i in range(k + 1)],
                drafts,
                [teacher[at + i] for i in range(k)],
                4,
                at,
            )
            tokens += verify(row, "rsd", p_th=0.1, top_n=3, retry=retry).tokens
        return tokens[:30]

    assert len({tuple(text(k)) for k in range(1, 8)}) == 1


def test_nudge_does_not_depend_on_the_number_of_drafts() -> None:
    rng = np.random.default_rng(31)
    base = {i: random_law(rng, 12, 2) for i in range(40)}
    drafter = {i: int(rng.integers(12)) for i in range(40)}
    word_start = [bool(i % 3 == 0) for i in range(12)]

    def text(k: int) -> list[int]:
        tokens: list[int] = []
        state = rules.STATE_BASE
        while len(tokens) < 30:
            at = len(tokens)
            row = Row(
                [base[at + i] for i in range(k + 1)],
                [drafter[at + i] for i in range(k)],
                position=at,
                state=state,
            )
            outcome = verify(row, "nudge", gamma=0.45, word_start=word_start)
            tokens += outcome.tokens
            state = outcome.state
        return tokens[:30]

    texts = {tuple(text(k)) for k in range(1, 8)}
    assert len(texts) == 1


# Trees


def path_law(step: Callable[[int], list[int]], expected: np.ndarray, draws: int = 2000) -> None:
    counts = np.zeros(V)
    for seed in range(draws):
        counts[step(seed)[0]] += 1
    assert_law(counts, expected)


@pytest.mark.parametrize("rule", ["target", "rrs", "rrs with replacement"])
def test_first_token_of_a_tree_has_the_law_of_the_target(rule: str) -> None:
    rng = np.random.default_rng(3)
    p, q = random_law(rng), random_law(rng)

    def step(seed: int) -> list[int]:
        if rule == "target":
            tokens = [0, 1, 4, 4, 2]
        else:
            tokens, left = [0], q.p
            for rank in range(3):
                word = laws.uniform(seed, 0, laws.PROPOSE, rank)
                tokens.append(laws.sample(left, word))
                if rule == "rrs":
                    left = rules.normalized(rules.without(left, tokens[-1:]))
        n = len(tokens)
        tree = Tree([0] * n, tokens, [p] * n, [q] * n, seed)
        if rule == "target":
            path = rules.tree_target(tree)
        else:
            path = rules.tree_rrs(tree, replacement=rule != "rrs")
        return [tokens[path.nodes[1]] if len(path.nodes) > 1 else path.following]

    path_law(step, p.p)


def test_greedy_tree_follows_the_target() -> None:
    peak = [law(np.eye(V, dtype=np.float32)[t]) for t in (2, 5, 1, 0)]
    tree = Tree([0, 0, 0, 1], [9, 4, 2, 5], peak)
    assert rules.tree_greedy(tree) == rules.Path([0, 2], 1)
    with pytest.raises(ValueError, match=r"parent\[1\] must be in \[0, 1\)"):
        Tree([0, 1], [0, 0], peak[:2])


@pytest.mark.parametrize(
    ("rule", "parameters"),
    [
        ("relaxed", {"m": 6, "r": 0.0}),
        ("relaxed", {"m": 6, "delta": 1.0}),
        ("threshold", {"t_single": 0.0}),
        ("rsd", {"p_th": 0.0, "top_n": 0, "retry": "none"}),
        *(("lossless", {}), ("block", {}), ("typical", {"eps": 0.0})),
    ],
)
def test_impossible_drafts_never_stand(rule: str, parameters: dict[str, object]) -> None:
    """Whatever the drafter says of them, and whatever follows."""
    p = law(np.array([0.0, -np.inf, 1.0, 0.5, -np.inf, 0.1], np.float32))
    certain, even = law(np.eye(V, dtype=np.float32)[1] * 500), law(np.zeros(V, np.float32))
    impossible = law(np.array([0.0, -np.inf, 0.0, 0.0, 0.0, 0.0], np.float32))
    for q in (certain, even, impossible):
        for seed in range(20):
            row = Row([p] * 4, [1, 2, 3], [q, even, even], seed)
            assert verify(row, rule, **parameters).accepted == 0


def test_nothing_is_left_to_emit() -> None:
    row = Row([law(np.zeros(V, np.float32))] * 2, [0])
    for remaining in (0, -1):
        out = verify(row, "greedy", remaining=remaining)
        assert (out.accepted, out.tokens, out.finished) == (0, [], rules.LENGTH)


def test_given_probabilities_stay_as_they_are() -> None:
    p = np.array([0.25, 0.0, 0.3, 0.3, 1e-39, 0.1], np.float32)
    one = given(p)
    assert (one.p == p).all()
    assert one.argmax == 2
    assert one.order().tolist() == [2, 3, 0, 5, 4, 1]
    for bad in ([0.5, np.nan], [-0.1, 0.5], [1.5, 0.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match=r"given: probabilities must be in \[0, 1\]"):
            given(bad)


def test_nodes_that_are_left_out_of_a_tree() -> None:
    p = law(np.array([0.0, 3.0, 1.0, 0.5, 0.2, 0.1], np.float32))
    tree = Tree([-1, 0, 0, 2], [9, -1, 1, 1], [p] * 4)
    path, out = rules.verify_tree(tree, "greedy", eos_ids=[1])
    assert (path, out.tokens, out.finished) == ([0, 2], [1], rules.END_OF_TEXT)
    with pytest.raises(ValueError, match=r"parent\[3\] must be in"):
        Tree([-1, 0, 0, 1], [9, -1, 1, 1], [p] * 4)
