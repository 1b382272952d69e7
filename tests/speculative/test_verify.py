"""Acceptance of chains: every decision is the one of the definition, bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from alignops.reference.speculative import laws
from alignops.speculative import VerifyOut, propose, verify
from alignops.speculative.verify import RULES
from tests.speculative.oracle import assert_rows, expected_rows
from tests.speculative.samples_verify import DTYPES, SIZES, SMALL, generator, make_case, packed

WARP = ("temperature", "top_k", "top_p", "min_p")


def call(case: dict[str, Any]) -> Any:
    return verify(case["target"], **{k: v for k, v in case.items() if k != "target"})


def check(case: dict[str, Any], note: object = "") -> None:
    assert_rows(call(case), expected_rows(case), note)


@pytest.mark.parametrize("rule", RULES)
def test_decisions_equal_the_definition(isa: str, rule: str) -> None:
    for seed in range(60):
        check(make_case(generator(seed, RULES[rule][0]), rule, SMALL), seed)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_tiles(isa: str, rule: str, dtype: torch.dtype) -> None:
    for seed, size in enumerate(SIZES[6:]):
        check(make_case(generator(seed, 100 + RULES[rule][0]), rule, (size,), dtype), size)


@pytest.mark.parametrize("rule", RULES)
def test_packed_rows(isa: str, rule: str) -> None:
    for seed in range(15):
        rng = generator(seed, 200 + RULES[rule][0])
        case = make_case(rng, rule, SMALL)
        b, width = case["target"].shape[:2]
        counts = rng.integers(0, width + 1, b).tolist()
        check(packed(case, counts), (seed, counts))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_of_proposals_stand_for_rows_of_the_drafter(
    isa: str, dtype: torch.dtype
) -> None:
    """Drafts are drawn by `propose`; `verify` decides alike with its statistics."""
    for seed in range(30):
        rng = generator(seed, 300)
        case = make_case(rng, str(rng.choice(["lossless", "block"])), (11, 37, 4097), dtype)
        if case["draft"] is None or case["is_probs"] or "uniforms" in case:
            continue
        draft, k = case["draft"], case["draft"].shape[1]
        warp = {n: case[n] for n in ("temperature", "top_k", "top_p", "min_p") if n in case}
        steps = [
            propose(draft[:, i], seeds=case["seeds"], positions=case["positions"] + i, **warp)
            for i in range(k)
        ]
        case["draft_ids"] = torch.stack([s.ids for s in steps], 1)
        for i, step in enumerate(steps):
            step.raise_errors()
            for b in range(len(draft)):
                assert step.ids[b] == proposed(case, b, i)
        expected = expected_rows(case)
        stats = torch.stack([s.stats for s in steps], 1)
        assert_rows(call(case | {"draft_stats": stats}), expected, seed)
        assert_rows(call(case), expected, seed)
        # The rows themselves are not read where a draft stands.
        if case["rule"] == "lossless":
            accepted = torch.tensor([e.accepted for e in expected])
            unread = torch.arange(k) < accepted[:, None]
            case["draft"] = torch.where(unread[..., None], torch.nan, draft)
            assert_rows(call(case | {"draft_stats": stats}), expected, seed)


def proposed(case: dict[str, Any], b: int, i: int) -> int:
    warp = [case.get(n, d) for n, d in zip(WARP, (1.0, 0, 1.0, 0.0), strict=True)]
    temperature, *cuts = [v[b].item() if isinstance(v, torch.Tensor) else v for v in warp]
    row = case["draft"][b, i].float().numpy()
    if temperature == 0:
        return int(row.argmax())
    word = laws.uniform(int(case["seeds"][b]), int(case["positions"][b]) + i, laws.PROPOSE)
    return laws.sample(laws.law(row, temperature, *cuts).p, word)


def test_race_of_a_drafter_is_that_of_the_rule() -> None:
    """A drafter with the target's logits drafts what the rule `coupled` decides."""
    logits = torch.randn(3, 5, 500)
    seeds, positions = torch.tensor([1, 2, -3]), torch.tensor([7, 0, 2**32 - 2])
    warp: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9}
    ids = [
        propose(logits[:, i], seeds=seeds, positions=positions + i, race=True, **warp).ids
        for i in range(5)
    ]
    out = verify(
        logits,
        torch.stack(ids[:4], 1),
        rule="coupled",
        seeds=seeds,
        positions=positions,
        **warp,
    )
    assert torch.equal(out.tokens, torch.stack(ids, 1))
    assert torch.equal(out.accept_len, torch.full((3,), 4, dtype=torch.int32))


# Rows without a law


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fault", ["nan", "inf", "impossible"])
def test_rows_without_a_law_emit_nothing(isa: str, rule: str, fault: str) -> None:
    """An error counts if and only if the rule reads the row of logits, in order."""
    for seed in range(12):
        rng = generator(seed, 400 + RULES[rule][0])
        case = make_case(rng, rule, (5, 37, 4099), torch.float32)
        case["is_probs"] = False
        for name in ("target", "draft"):
            t = case[name]
            if t is None or rng.random() < 0.4:
                continue
            t = t.nan_to_num(neginf=-3.0)
            hit = torch.from_numpy(rng.random(t.shape[:2]) < 0.3)
            if fault == "impossible":
                t[hit] = -torch.inf
            else:
                t[..., rng.integers(t.shape[-1])][hit] = float(fault)
            case[name] = t
        check(case, seed)


@pytest.mark.parametrize("rule", RULES)
def test_ids_out_of_range_are_row_errors(rule: str) -> None:
    case = make_case(generator(5, 500), rule, (11,), torch.float32)
    size = 11
    target, ids = torch.randn(6, 4, size), torch.randint(0, size, (6, 3))
    for b, bad in enumerate([size, -2, 2**62, -(2**63), 2**32 + 1]):
        ids[b, b % 3] = bad
    ids[4] = torch.tensor([-1, size, 0])  # behind the end of the drafts
    case |= {"target": target, "draft_ids": ids, "draft": None, "is_probs": False}
    for name in ("uniforms", "remaining", "draft_lens", "active", "state", *WARP):
        case.pop(name, None)
    case |= {"seeds": torch.arange(6), "positions": torch.arange(6), "eos_ids": ()}
    if rule == "scripted":
        case["params"] = {"given": torch.ones(6).int()}
    out = call(case)
    assert out.row_error.tolist() == [3, 3, 3, 3, 0, 0]
    check(case)
    with pytest.raises(ValueError, match=r"verify: row 0: a draft is not an id .*; row 1: "):
        out.raise_errors()


def test_arguments_of_rows_out_of_range_are_row_errors() -> None:
    target, ids = torch.randn(8, 1, 5), torch.zeros(8, 0, dtype=torch.int64)
    temperature = torch.tensor([1.0, -1.0, 1e-6, 2e4, torch.nan, 1e-5, 1e4, 0.0])
    out = verify(target, ids, temperature=temperature)
    assert out.row_error.tolist() == [0, 4, 4, 4, 4, 0, 0, 0]
    for name, value in (("top_p", 0.0), ("top_p", 1.5), ("min_p", -0.1), ("min_p", 1.1)):
        bad: dict[str, Any] = {name: torch.full((8,), value)}
        assert verify(target, ids, **bad).row_error.tolist() == [4] * 8
    assert verify(target, ids, top_k=torch.full((8,), -1)).row_error.tolist() == [4] * 8
    state = torch.full((8,), 2, dtype=torch.uint8)
    out = verify(target, ids, state=state)
    assert out.row_error.tolist() == [4] * 8
    assert torch.equal(out.state, state)


def test_statistics_that_cannot_be_are_row_errors() -> None:
    target, draft = torch.randn(1, 2, 9), torch.randn(1, 1, 9)
    one = propose(draft[:, 0], seeds=torch.tensor([1]), positions=torch.tensor([1]))
    for place, value in ((1, 0), (0, 2**40), (2, 1 << 24), (3, 2**31), (3, 2**20)):
        stats = one.stats[:, None].clone()
        stats[0, 0, place] = value
        out = verify(
            target,
            one.ids[:, None],
            draft=draft,
            draft_stats=stats,
            rule="lossless",
            seeds=torch.tensor([1]),
            positions=torch.tensor([1]),
        )
        assert out.row_error.tolist() == [4]


def test_probabilities_outside_0_1_are_row_errors() -> None:
    p = torch.full((4, 1, 6), 1 / 6)
    p[0, 0, 3], p[1, 0, 2], p[2, 0, 1] = 1.5, -0.1, torch.nan
    out = verify(
        p,
        torch.zeros(4, 0).long(),
        rule="lossless",
        seeds=torch.arange(4),
        positions=torch.arange(4),
        is_probs=True,
    )
    assert out.row_error.tolist() == [1, 1, 1, 0]


# Threads, other rows, the Python layer


@pytest.mark.parametrize("rule", RULES)
def test_threads_and_other_rows_change_nothing(rule: str) -> None:
    before = torch.get_num_threads()
    try:
        for seed in range(4):
            case = make_case(generator(seed, 600 + RULES[rule][0]), rule, (37, 12289, 40_000))
            torch.set_num_threads(1)
            one = call(case)
            for threads in (2, 3, 16):  # with 16, threads share the tiles of a row
                torch.set_num_threads(threads)
                again = call(case)
                for field in dataclasses.fields(one):
                    assert torch.equal(getattr(one, field.name), getattr(again, field.name))
            order = list(range(len(case["draft_ids"])))[::-1]
            turned = {k: v[order] if isinstance(v, torch.Tensor) else v for k, v in case.items()}
            turned["params"] = {
                k: v[order] if k == "given" else v for k, v in case["params"].items()
            }
            assert torch.equal(call(turned).tokens, one.tokens[order])
    finally:
        torch.set_num_threads(before)


def test_out_receives_the_results() -> None:
    case = make_case(generator(1, 700), "lossless", (11,))
    one = call(case)
    out = VerifyOut(*(torch.zeros_like(getattr(one, f.name)) for f in dataclasses.fields(one)))
    assert call(case | {"out": out}) is out
    for field in dataclasses.fields(one):
        assert torch.equal(getattr(one, field.name), getattr(out, field.name))


def test_integers_of_other_types_and_float64() -> None:
    target = torch.randn(2, 3, 9, dtype=torch.float64)
    ids = torch.tensor([[1, 2], [3, -1]])
    rows: dict[str, Any] = {"rule": "coupled", "seeds": torch.tensor([1, 2])}
    one = verify(target.float(), ids, positions=torch.tensor([4, 4]), **rows)
    two = verify(target, ids.int(), positions=torch.tensor([4, 4]).int(), **rows)
    assert torch.equal(one.tokens, two.tokens)
    turned = target.float().transpose(1, 2).contiguous().transpose(1, 2)
    three = verify(turned, ids, positions=torch.tensor([4, 4]), **rows)
    assert torch.equal(one.tokens, three.tokens)


@pytest.mark.parametrize("rule", ["greedy", "lossless", "coupled"])
def test_compiles_as_one_graph(rule: str) -> None:
    case = make_case(generator(3, 800), rule, (37,), torch.float32)
    case |= {"seeds": torch.arange(len(case["draft_ids"])), "temperature": 0.7}
    rest = {k: v for k, v in case.items() if k != "target"}

    def step(target: torch.Tensor) -> VerifyOut:
        return verify(target * 2, **rest)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(case["target"])
    for field in dataclasses.fields(compiled):
        plain = step(case["target"])
        assert torch.equal(getattr(compiled, field.name), getattr(plain, field.name))


def test_wrong_arguments() -> None:
    target, ids = torch.randn(1, 2, 5), torch.zeros(1, 1).long()
    draw: dict[str, Any] = {"seeds": torch.tensor([1]), "positions": torch.tensor([1])}
    with pytest.raises(TypeError, match="verify: draft_ids must be a Tensor, got list"):
        verify(target, [[1]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rule must be one of greedy, .*, got 'exact'"):
        verify(target, ids, rule="exact")
    with pytest.raises(ValueError, match="params of the rule typical are eps, delta, got 'gamma'"):
        verify(target, ids, rule="typical", params={"gamma": 1})
    with pytest.raises(ValueError, match="params of the rule greedy are none, got 'm'"):
        verify(target, ids, params={"m": 1})
    with pytest.raises(ValueError, match="params must hold word_start for the rule nudge"):
        verify(target, ids, rule="nudge")
    with pytest.raises(TypeError, match="given must be a Tensor, got int"):
        verify(target, ids, rule="scripted", params={"given": 1})
    with pytest.raises(ValueError, match="retry must be one of resample, descend, none, got 'x'"):
        verify(target, ids, rule="rsd", params={"retry": "x"}, **draw)
    with pytest.raises(TypeError, match="eps must be a number, got '1'"):
        verify(target, ids, rule="typical", params={"eps": "1"})
    with pytest.raises(ValueError, match="delta must not be negative, got -1"):
        verify(target, ids, rule="relaxed", params={"delta": -1})
    for bad in (-1, 1e-6, 1e5, float("nan")):
        with pytest.raises(ValueError, match="temperature must be 0 or in"):
            verify(target, ids, temperature=bad)
    with pytest.raises(ValueError, match=r"of probabilities 0 or 1, got 0.5"):
        verify(target.softmax(-1), ids, temperature=0.5, is_probs=True)
    with pytest.raises(ValueError, match="top_k must be at least 0, got -1"):
        verify(target, ids, top_k=-1)
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\], got 0"):
        verify(target, ids, top_p=0)
    with pytest.raises(ValueError, match=r"min_p must be in \[0, 1\], got 2"):
        verify(target, ids, min_p=2)
    with pytest.raises(ValueError, match="cu must go from 0 to the 3 rows of target, got 0 to 2"):
        verify(torch.randn(3, 5), ids, cu=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="cu must rise from 0, got 2 before 1"):
        verify(torch.randn(3, 5), ids.expand(2, 1).contiguous(), cu=torch.tensor([0, 2, 1]))
    with pytest.raises(ValueError, match="seeds must be given where temperature is not 0"):
        propose(torch.randn(1, 5))
    with pytest.raises(ValueError, match="positions must be given with seeds"):
        propose(torch.randn(1, 5), seeds=torch.tensor([1]))


# Many cases


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_ten_thousand_rows_of_each_rule_equal_the_definition(rule: str) -> None:
    rows, seed = 0, 0
    while rows < 10_000:
        case = make_case(generator(seed, 1000 + RULES[rule][0]), rule, SMALL)
        check(case, seed)
        rows += len(case["draft_ids"])
        seed += 1
