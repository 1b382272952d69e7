"""Extreme values of arguments, and texts that begin, end or go wrong at unusual places."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from alignops.integrations.speculative import HFAdapter
from alignops.speculative import propose, verify
from alignops.speculative.drafters import FunctionDrafter, PromptLookup
from alignops.speculative.generate import speculative_generate
from alignops.speculative.model_drafter import ModelDrafter
from alignops.speculative.session import SpecSession
from alignops.speculative.verify import RULES
from tests.speculative.models import VOCAB, generated, model, oracle, perturbed, prompts, texts
from tests.speculative.samples_verify import SMALL, generator, make_case
from tests.speculative.test_generate import SCHEDULERS
from tests.speculative.test_verify import check

LAYOUTS = ("ragged", "defer", "realign", "rollback")
LEAST, MOST = 0, 2**32 - 1

# Decisions


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 1e3, 1e4])
def test_extreme_temperatures(isa: str, rule: str, temperature: float) -> None:
    for seed in range(4):
        case = make_case(generator(seed, 900 + RULES[rule][0]), rule, SMALL)
        if case["is_probs"]:
            continue
        case["temperature"] = torch.full((len(case["draft_ids"]),), temperature)
        check(case, (seed, temperature))


def _decide(target: Tensor, ids: list[int], draft: Tensor | None, rule: str, word: int) -> Any:
    """One row whose random words are all the same."""
    return verify(
        target[None],
        torch.tensor([ids]),
        draft=None if draft is None else draft[None],
        rule=rule,
        uniforms=torch.full((1, len(ids) + 1, 2), word, dtype=torch.int64).to(torch.uint32),
    )


@pytest.mark.parametrize("word", [LEAST, MOST])
@pytest.mark.parametrize("rule", ["lossless", "block"])
def test_equal_laws_accept_everything(isa: str, rule: str, word: int) -> None:
    target = torch.randn(4, 37)
    out = _decide(target, [3, 0, 36], target[:3].clone(), rule, word)
    assert out.accept_len.tolist() == [3]
    assert out.num_emitted.tolist() == [4]


@pytest.mark.parametrize("rule", ["lossless", "block"])
def test_the_first_drafts_of_a_proposal_may_be_verified_alone(rule: str) -> None:
    """With logits and statistics that are views of wider tensors."""
    session = SpecSession(
        HFAdapter(model()),
        ModelDrafter(HFAdapter(perturbed(0.2))),
        rows=2,
        capacity=32,
        num_draft_tokens=4,
        rule=rule,
    )
    session.prefill(prompts([4, 9]), 9)
    drafts = session.draft()
    whole = session.verify(drafts)
    some = session.verify(drafts.first(2))
    assert some.accept_len.shape == (2,)
    if rule == "lossless":
        assert torch.equal(some.accept_len, whole.accept_len.clamp(max=2))
    session.commit(some)


def _certain(token: int, size: int = 9) -> Tensor:
    row = torch.full((size,), -torch.inf)
    row[token] = 1.5
    return row


@pytest.mark.parametrize("word", [LEAST, MOST])
@pytest.mark.parametrize("rule", ["lossless", "block", "threshold"])
@pytest.mark.parametrize("proposed", [False, True])
def test_a_law_of_one_token_says_it(isa: str, rule: str, proposed: bool, word: int) -> None:
    """What is possible is accepted at every word, what is not at none, not even at 0."""
    target = torch.stack([_certain(4), _certain(2), _certain(7)])
    flat = torch.zeros(2, 9) if proposed and rule != "threshold" else None
    out = _decide(target, [4, 2], flat, rule, word)
    assert out.tokens.tolist() == [[4, 2, 7]]
    out = _decide(target, [4, 3], flat, rule, word)
    assert out.tokens.tolist() == [[4, 2, -1]]
    assert out.accept_len.tolist() == [1]
    out = _decide(target, [5, 2], flat, rule, word)
    assert out.tokens.tolist() == [[4, -1, -1]]


@pytest.mark.parametrize("word", [LEAST, MOST])
@pytest.mark.parametrize("rule", ["lossless", "block"])
def test_a_draft_that_its_law_excludes_is_accepted_and_counted(
    isa: str, rule: str, word: int
) -> None:
    out = _decide(torch.zeros(2, 9), [3], _certain(5)[None], rule, word)
    assert out.accept_len.tolist() == [1]
    assert out.zero_q.tolist() == [1]


def test_logits_of_more_than_2_to_the_31_elements() -> None:
    """Offsets are of 64 bits: rows 2.2 G elements apart; pages between them are never touched."""
    apart, size = 1_100_000_000, 4100
    memory = torch.empty(3 * apart + size, dtype=torch.bfloat16)
    target = memory.as_strided((2, 2, size), (apart * 2, apart, 1))
    near = torch.randn(2, 2, size).bfloat16()
    target.copy_(near)
    rows: dict[str, Any] = {"seeds": torch.tensor([1, 2]), "positions": torch.tensor([3, 4])}
    ids = near[:, :1].float().argmax(-1)
    for rule in ("greedy", "lossless", "coupled"):
        far, expected = (verify(t, ids, rule=rule, **rows) for t in (target, near))
        assert torch.equal(far.tokens, expected.tokens)
        assert expected.row_error.tolist() == [0, 0]
    assert verify(target, ids).accept_len.tolist() == [1, 1]
    far, expected = (propose(t[:, 1], temperature=0.7, **rows) for t in (target, near))
    assert torch.equal(far.ids, expected.ids)


def test_drafters_that_race_are_accepted_as_often_as_the_bound_says() -> None:
    """At least (1 - d) / (1 + d), at most 1 - d, where d is the total variation."""
    draws, ids = 100_000, 7
    p, q = torch.randn(2, ids)
    d = float((p.softmax(0) - q.softmax(0)).abs().sum() / 2)
    assert 0.2 < d < 0.8
    rows = {"seeds": torch.arange(draws), "positions": torch.full((draws,), 9)}
    drafts = propose(q.expand(draws, ids), race=True, **rows).ids[:, None]
    out = verify(p.expand(draws, 2, ids), drafts, rule="coupled", **rows)
    share = float(out.accept_len.double().mean())
    margin = 4 * math.sqrt(0.25 / draws)
    assert (1 - d) / (1 + d) - margin < share < 1 - d + margin
    strangers = propose(q.expand(draws, ids), **rows).ids[:, None]
    out = verify(p.expand(draws, 2, ids), strangers, rule="coupled", **rows)
    assert float(out.accept_len.double().mean()) < share - margin


# Texts


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [1, 4])
def test_nothing_is_ever_accepted(layout: str, k: int) -> None:
    net, asked = model(), prompts([4, 1, 7])
    alone = texts(net, asked, 8)
    out = speculative_generate(
        net,
        oracle(asked, alone, 0.0),
        asked,
        max_new_tokens=8,
        num_draft_tokens=k,
        layout=layout,
        return_stats=True,
        debug=True,
    )
    assert generated(out, asked) == alone
    assert (out.stats.acceptance, out.stats.rounds) == (0, 8)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_all_rows_end_in_one_round(scheduler: str, accuracy: float) -> None:
    """And others are still waiting."""
    net, (prompt,) = model(), prompts([5])
    (text,) = texts(net, [prompt], 8)
    asked = [prompt] * 5
    cut = text[: text.index(text[5]) + 1]
    out = speculative_generate(
        net,
        oracle(asked, [text] * 5, accuracy),
        asked,
        max_new_tokens=8,
        num_draft_tokens=3,
        scheduler=scheduler,
        batch_size=2,
        eos_token_id=text[5],
        return_stats=True,
        debug=True,
    )
    assert generated(out, asked) == [cut] * 5
    assert out.finish_reason == ["eos"] * 5


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("accuracy", [0.0, 1.0])
@pytest.mark.parametrize("k", [0, 3])
def test_a_text_that_ends_with_its_first_token(scheduler: str, accuracy: float, k: int) -> None:
    net, asked = model(), prompts([4, 9, 2, 6], seed=1)
    alone = texts(net, asked, 10)
    eos = alone[1][0]
    expected = texts(net, asked, 10, (eos,))
    assert expected[1] == [eos]
    assert max(map(len, expected)) == 10
    streamed: list[tuple[int, list[int], bool]] = []
    out = speculative_generate(
        net,
        oracle(asked, alone, accuracy),
        asked,
        max_new_tokens=10,
        num_draft_tokens=k,
        scheduler=scheduler,
        batch_size=3,
        eos_token_id=eos,
        streamer=lambda row, tokens, ended: streamed.append((row, list(tokens), ended)),
        return_stats=True,
        debug=True,
    )
    assert generated(out, asked) == expected
    assert [event for event in streamed if event[0] == 1] == [(1, [eos], True)]


@pytest.mark.parametrize("rule", ["greedy", "lossless", "block", "coupled", "typical"])
def test_a_vocabulary_of_one_id(rule: str) -> None:
    out = speculative_generate(
        model("learned", 3, 1),
        PromptLookup(2),
        [torch.zeros(3).long(), torch.zeros(1).long()],
        max_new_tokens=9,
        rule=rule,
        return_stats=True,
    )
    assert out.sequences.eq(0).all()
    assert out.lengths.tolist() == [12, 10]


# Faults


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rule", ["greedy", "coupled"])
def test_a_round_of_bad_logits_is_refused_and_can_be_made_again(
    rule: str, value: float, layout: str
) -> None:
    asked = prompts([4, 9, 2])
    alone = texts(model(), asked, 9)

    def run(broken: int | None) -> list[list[int]]:
        session = SpecSession(
            HFAdapter(model()),
            FunctionDrafter(oracle(asked, alone, 0.7)),
            rows=3,
            capacity=32,
            num_draft_tokens=2,
            rule=rule,
            layout=layout,
        )
        session.prefill(asked, 9)
        forward, rounds = session.placement.forward, 0

        def poisoned(ids: Tensor, counts: Tensor) -> Tensor:
            nonlocal rounds
            rounds += 1
            logits = forward(ids, counts)
            if rounds == broken:
                logits[1, 0] = value
            return logits

        session.placement.forward = poisoned  # type: ignore[method-assign]
        while session.active:
            before = [session.tokens_of(row) for row in range(3)]
            out = session.verify(session.draft())
            if rounds != broken:
                session.commit(out)
                continue
            with pytest.raises(ValueError, match="row 1"):
                session.commit(out)
            after = [session.tokens_of(row) for row in range(3)]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert broken is None or rounds > broken
        return [session.tokens_of(row).tolist() for row in range(3)]

    once = run(None)
    assert run(2) == once
    if rule == "greedy":
        assert once == [p.tolist() + t for p, t in zip(asked, alone, strict=True)]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_drafter_of_bad_logits_does_not_spoil_the_text(value: float) -> None:
    """Its ids are no drafts, or the round is an error; another text is never generated."""
    net, asked = model(), prompts([4, 9])
    draft = copy.deepcopy(perturbed(0.2))

    def spoil(module: Any, inputs: Any, out: Any) -> None:
        out.logits.fill_(value)

    draft.register_forward_hook(spoil)
    try:
        out = speculative_generate(net, draft, asked, max_new_tokens=5, return_stats=True)
    except ValueError as error:
        assert "row" in str(error)  # noqa: PT017
    else:
        assert generated(out, asked) == texts(net, asked, 5)


# Arguments


def test_options_of_generation_settings_that_are_refused() -> None:
    net = model()
    net.generation_config.num_beams = 3
    try:
        with pytest.raises(NotImplementedError, match="num_beams must be 1, got 3"):
            speculative_generate(net, None, torch.tensor([[1]]), max_new_tokens=1)
    finally:
        net.generation_config.num_beams = 1


def test_more_ends_than_rows_of_verification_hold() -> None:
    with pytest.raises(ValueError, match="eos"):
        speculative_generate(
            model(), None, torch.tensor([[1]]), max_new_tokens=1, eos_token_id=range(9)
        )


def test_a_model_that_is_trained_meanwhile() -> None:
    net = model()
    adapter = HFAdapter(net)
    net.train()
    try:
        with pytest.raises(ValueError, match="evaluation mode"):
            speculative_generate(adapter, None, torch.tensor([[1]]), max_new_tokens=1)
    finally:
        net.eval()


def test_a_row_of_padding_alone_is_named() -> None:
    mask = torch.tensor([[1, 1], [0, 0]])
    with pytest.raises(ValueError, match=r"input_ids\[1\].*BOS"):
        speculative_generate(
            model(), None, torch.tensor([[1, 2], [0, VOCAB - 1]]), mask, max_new_tokens=1
        )
