"""Whole jobs: the text is that of the target alone, whatever else differs."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers import LogitsProcessor

from alignops.integrations.speculative import HFAdapter
from alignops.speculative.drafters import PromptLookup
from alignops.speculative.generate import speculative_generate
from tests.speculative.models import KINDS, VOCAB, generated, model, oracle, plain, prompts, texts

SCHEDULERS = ("static", "refill", "exspec")
PLACES = [(kind, layout) for kind in KINDS for layout in HFAdapter(model(kind)).layouts]


@pytest.mark.parametrize(("kind", "layout"), PLACES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("accuracy", [0.6, 1.0])
def test_greedy(kind: str, layout: str, scheduler: str, accuracy: float) -> None:
    net, count = model(kind), 14
    asked = prompts([1, 11, 4, 7, 5], seed=len(kind))
    unending = texts(net, asked, count)
    eos = (unending[1][9], unending[2][5])
    out = speculative_generate(
        net,
        oracle(asked, unending, accuracy),
        asked,
        max_new_tokens=count,
        num_draft_tokens=3,
        scheduler=scheduler,
        layout=layout,
        batch_size=2,
        window_size=4,
        eos_token_id=eos,
        return_stats=True,
        debug=True,
    )
    assert generated(out, asked) == texts(net, asked, count, eos)
    ended = ["eos" if text[-1] in eos else "length" for text in generated(out, asked)]
    assert out.finish_reason == ended
    assert out.stats.tokens == sum(map(len, generated(out, asked)))
    assert out.stats.prompts == out.stats.finished == len(asked)
    if accuracy == 1:
        assert out.stats.acceptance == 1


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_greedy_equals_generate_column_for_column(data: st.DataObject) -> None:
    kind, layout = data.draw(st.sampled_from(PLACES))
    net = model(kind)
    lengths = data.draw(st.lists(st.integers(1, 17), min_size=1, max_size=6))
    count = data.draw(st.integers(1, 12))
    asked = prompts(lengths, data.draw(st.integers(0, 99)))
    columns = max(lengths)
    ids, mask = torch.zeros(2, len(asked), columns, dtype=torch.int64)
    for row, prompt in enumerate(asked):
        ids[row, columns - len(prompt) :] = prompt
        mask[row, columns - len(prompt) :] = 1
    alone = texts(net, asked, count)
    eos = data.draw(st.sampled_from([token for text in alone for token in text]))
    if kind in ("alibi", "alibi_mask", "mixed"):  # with eager attention, padding changes the text
        alone_until = texts(net, asked, count, (eos,))
        expected = torch.full((len(asked), columns + max(map(len, alone_until))), 3)
        expected[:, :columns] = ids
        for row, text in zip(expected, alone_until, strict=True):
            row[columns : columns + len(text)] = torch.tensor(text)
    else:
        expected = net.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=3,
        )
    if data.draw(st.booleans()):  # padding on the other side
        ids = torch.stack(
            [row.roll(-int((seen == 0).sum())) for row, seen in zip(ids, mask, strict=True)]
        )
        mask = mask.flip(1)
        expected[:, :columns] = ids
    out = speculative_generate(
        net,
        oracle(asked, alone, data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))),
        ids,
        mask,
        max_new_tokens=count,
        num_draft_tokens=data.draw(st.integers(0, 7)),
        scheduler=data.draw(st.sampled_from(SCHEDULERS)),
        layout=layout,
        batch_size=data.draw(st.integers(1, 6)),
        window_size=data.draw(st.integers(1, 6)),
        eos_token_id=eos,
        pad_token_id=3,
        debug=True,
    )
    assert torch.equal(out, expected)


def test_neighbours_batch_and_order_change_nothing() -> None:
    net, count = model(), 10
    asked = prompts([5, 2, 9, 1])
    alone = texts(net, asked, count)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2], [1, 1, 1]):
        for batch_size in (1, 2, 4):
            chosen = [asked[i] for i in order]
            out = speculative_generate(
                net,
                oracle(asked, alone, 0.6, batch_size),
                chosen,
                max_new_tokens=count,
                batch_size=batch_size,
                return_stats=True,
            )
            assert generated(out, chosen) == [alone[i] for i in order]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("kind", "seed", "vocab"), [("rope", None, VOCAB), ("learned", 1, 31)])
def test_a_model_drafts(scheduler: str, kind: str, seed: int | None, vocab: int) -> None:
    """The target itself, and a stranger with more ids."""
    net, asked = model("rope"), prompts([3, 6, 1, 9])
    expected = texts(net, asked, 13)
    for count in (1, 4):
        out = speculative_generate(
            net,
            model(kind, seed, vocab),
            asked,
            max_new_tokens=13,
            num_draft_tokens=count,
            scheduler=scheduler,
            batch_size=2,
            return_stats=True,
            debug=True,
        )
        assert generated(out, asked) == expected
        if kind == "rope":
            assert out.stats.acceptance == 1


# Ends of texts


@pytest.mark.parametrize("place", range(9))
def test_end_of_text_at_every_place_of_a_round(place: int) -> None:
    """K = 3: places 0 to 2 are drafts, 3 is the bonus, and so on."""
    net = model("mixed")
    asked = prompts([4], seed=5)
    (text,) = texts(net, asked, 9)
    eos = text[place]
    expected = text[: text.index(eos) + 1]
    for accuracy in (0.0, 1.0):  # as correction, and as draft
        out = speculative_generate(
            net,
            oracle(asked, [text], accuracy),
            asked,
            max_new_tokens=9,
            num_draft_tokens=3,
            eos_token_id=eos,
            return_stats=True,
        )
        assert generated(out, asked) == [expected]
        assert out.finish_reason == ["eos"]


def test_ids_of_ends_and_padding_inside_prompts_mean_nothing() -> None:
    net = model()
    (text,) = texts(net, prompts([4]), 8)
    eos = text[5]
    asked = [torch.cat([torch.tensor([eos, 0, eos]), prompts([4])[0]]), torch.tensor([eos, eos])]
    expected = texts(net, asked, 8, (eos,))
    out = speculative_generate(
        net,
        oracle(asked, expected, 0.8),
        asked,
        max_new_tokens=8,
        eos_token_id=eos,
        pad_token_id=eos,
        return_stats=True,
    )
    assert generated(out, asked) == expected
    width = out.sequences.shape[1]
    assert all(out.sequences[i, 7 + len(t) : width].eq(eos).all() for i, t in enumerate(expected))


def test_one_token_is_a_round_without_drafts() -> None:
    net, asked = model(), prompts([3, 5])
    out = speculative_generate(net, PromptLookup(2), asked, max_new_tokens=1, return_stats=True)
    assert generated(out, asked) == texts(net, asked, 1)
    assert (out.stats.offered, out.stats.rounds) == (0, 1)


def test_stop_sequences() -> None:
    net, asked = model(), prompts([3, 5])
    alone = texts(net, asked, 12)
    stop = alone[0][4:6]
    for accuracy in (0.0, 0.8, 1.0):
        out = speculative_generate(
            net,
            oracle(asked, alone, accuracy),
            asked,
            max_new_tokens=12,
            stop=[stop, [VOCAB + 1]],
            return_stats=True,
        )
        for text, whole, reason in zip(
            generated(out, asked), alone, out.finish_reason, strict=True
        ):
            at = [i for i in range(2, 13) if whole[i - 2 : i] == stop]
            assert text == whole[: at[0] if at else 12]
            assert reason == ("stop" if at else "length")


# Sampling


def test_coupled_is_the_same_for_any_drafter_and_schedule() -> None:
    net, asked = model(), prompts([3, 6, 1])

    def sample(draft: object, **options: object) -> list[list[int]]:
        out = speculative_generate(
            net,
            draft,
            asked,
            max_new_tokens=10,
            rule="coupled",
            temperature=0.9,
            top_k=12,
            seed=[7, 8, 9],
            return_stats=True,
            **options,
        )
        return generated(out, asked)

    alone = sample(None)
    assert len({tuple(text) for text in alone}) == 3
    for scheduler in SCHEDULERS:
        for accuracy in (0.0, 0.7, 1.0):
            draft = oracle(asked, alone, accuracy)
            assert sample(draft, scheduler=scheduler, batch_size=2) == alone
    assert sample(PromptLookup(2), layout="realign") == alone


@pytest.mark.parametrize("rule", ["lossless", "block", "typical", "relaxed", "threshold"])
def test_sampling_rules_run_and_depend_on_the_seed_only(rule: str) -> None:
    net, asked = model(), prompts([3, 6, 1])

    def sample(seed: int, **options: object) -> list[list[int]]:
        out = speculative_generate(
            net,
            oracle(asked, texts(net, asked, 8), 0.5),
            asked,
            max_new_tokens=8,
            rule=rule,
            seed=seed,
            return_stats=True,
            **options,
        )
        return generated(out, asked)

    assert sample(1) == sample(1)
    if rule not in ("typical", "relaxed"):
        assert sample(1) != sample(2)
        assert sample(1, temperature=0.0) == texts(net, asked, 8)


# Plumbing


class _Ban(LogitsProcessor):
    """Forbids the ids of the last two tokens of the prefix."""

    per_position_safe = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter(1, input_ids[:, -2:], -torch.inf)


def test_logits_processor_sees_the_drafts() -> None:
    net, asked = model("mixed"), prompts([3, 6, 2])
    ids = torch.stack([p[:2] for p in asked])
    expected = net.generate(ids, max_new_tokens=9, do_sample=False, logits_processor=[_Ban()])
    known = [row.tolist() for row in expected[:, 2:]]
    for accuracy in (0.0, 0.7, 1.0):
        draft = oracle(list(ids), known, accuracy)
        out = speculative_generate(net, draft, ids, max_new_tokens=9, logits_processor=_Ban())
        assert torch.equal(out, expected)
    with pytest.raises(ValueError, match="per_position_safe"):
        speculative_generate(
            net, None, ids, max_new_tokens=2, logits_processor=lambda ids, scores: scores
        )


def test_streamer_gets_every_token_once() -> None:
    net, asked = model(), prompts([3, 6, 1, 4])
    got: dict[int, list[int]] = {i: [] for i in range(4)}
    ended = []

    def take(row: int, tokens: list[int], finished: bool) -> None:
        got[row] += tokens
        if finished:
            ended.append(row)

    alone = texts(net, asked, 9)
    eos = alone[2][4]
    speculative_generate(
        net,
        oracle(asked, alone, 0.8),
        asked,
        max_new_tokens=9,
        batch_size=2,
        streamer=take,
        eos_token_id=eos,
    )
    assert list(got.values()) == texts(net, asked, 9, (eos,))
    assert sorted(ended) == [0, 1, 2, 3]


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    asked = prompts([3, 6])
    speculative_generate(model(), PromptLookup(2), asked, max_new_tokens=4, progress=True)
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [1, 3])
def test_automatic_number_of_drafts(rows: int) -> None:
    net, asked = model(), prompts([3, 6, 1, 4])
    alone = texts(net, asked, 40)
    out = speculative_generate(
        net,
        oracle(asked, alone, 0.9),
        asked,
        max_new_tokens=40,
        num_draft_tokens="auto",
        batch_size=rows,
        return_stats=True,
    )
    assert generated(out, asked) == alone


def test_no_prompts() -> None:
    assert speculative_generate(model(), None, [], max_new_tokens=3).shape == (0, 0)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_stable(scheduler: str, batch_size: int) -> None:
    """In float32, too, the text is that of all drafts refused, bit for bit."""
    net = model("rope").float()
    try:
        asked = prompts([3, 6, 1, 18, 4])

        def run(draft: object, rule: str = "greedy", **options: object) -> list[list[int]]:
            out = speculative_generate(
                net,
                draft,
                asked,
                max_new_tokens=20,
                num_draft_tokens=3,
                rule=rule,
                stable=True,
                return_stats=True,
                **options,
            )
            return generated(out, asked)

        plainly = run(PromptLookup(1), "scripted", params={"given": 0}, batch_size=2)
        draft = oracle(asked, plainly, 0.8)
        assert run(draft, scheduler=scheduler, batch_size=batch_size) == plainly
    finally:
        net.double()


# Bad input


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_draft_tokens": -1}, "num_draft_tokens"),
        ({"num_draft_tokens": "some"}, "num_draft_tokens"),
        ({"scheduler": "fifo"}, "scheduler"),
        ({"layout": "paged"}, "layout"),
        ({"layout": "realign", "stable": True}, "layout"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": [1]}, "seed"),
        ({"stop": [[]]}, "stop"),
        ({"max_new_tokens": 200}, r"input_ids\[0\].*max_length"),
        ({"input_ids": [torch.tensor([1]), torch.tensor([], dtype=torch.int64)]}, r"\[1\].*BOS"),
        ({"input_ids": [torch.tensor([1, VOCAB])]}, rf"\[0\].*\[0, {VOCAB}\)"),
        ({"input_ids": [torch.tensor([-1])]}, r"\[0\]"),
        ({"input_ids": [torch.tensor([1.0])]}, r"\[0\].*integers"),
        ({"input_ids": [torch.tensor([[1]])]}, r"\[0\].*shape"),
        ({"input_ids": torch.tensor([1])}, "input_ids"),
        ({"attention_mask": torch.ones(2, 2)}, "attention_mask"),
    ],
)
def test_values_that_are_refused(options: dict[str, object], text: str) -> None:
    arguments = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "max_new_tokens": 4}
    with pytest.raises(ValueError, match=text):
        speculative_generate(model(), PromptLookup(2), **(arguments | options))


def test_types_that_are_refused() -> None:
    ids = torch.tensor([[1]])
    with pytest.raises(TypeError, match="target"):
        speculative_generate(3, None, ids, max_new_tokens=1)
    with pytest.raises(TypeError, match="draft"):
        speculative_generate(model(), 3, ids, max_new_tokens=1)
    with pytest.raises(TypeError, match=r"input_ids\[0\]"):
        speculative_generate(model(), None, [[1]], max_new_tokens=1)


def test_models_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers as tf

    net = model()
    net.train()
    try:
        with pytest.raises(ValueError, match="evaluation mode"):
            speculative_generate(net, None, torch.tensor([[1]]), max_new_tokens=1)
    finally:
        net.eval()
    small = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 9}
    with pytest.raises(NotImplementedError, match="encoder-decoder"):
        HFAdapter(tf.T5ForConditionalGeneration(tf.T5Config(**small)).eval())
    config = tf.MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, state_size=4)
    with pytest.raises(NotImplementedError):
        HFAdapter(tf.MambaForCausalLM(config).eval())
    older = model("learned")
    monkeypatch.setattr(type(older), "_supports_cache_class", False, raising=False)
    with pytest.raises(NotImplementedError, match="no cache objects"):
        HFAdapter(older)
    monkeypatch.setattr(model("mixed").config, "layer_types", None)
    model("mixed").model.layers[0].is_sliding = True
    model("mixed").model.layers[1].is_sliding = False
    with pytest.raises(NotImplementedError, match="with and without a window"):
        HFAdapter(model("mixed"))
    net.generation_config.num_return_sequences = 2
    try:
        with pytest.raises(NotImplementedError, match="num_return_sequences"):
            HFAdapter(net)
    finally:
        net.generation_config.num_return_sequences = None


def test_impossible_logits_name_the_row() -> None:
    net, asked = model(), prompts([3, 4])
    head = net.lm_head.weight

    def broken(tokens: torch.Tensor, lengths: torch.Tensor, k: int) -> torch.Tensor:
        with torch.no_grad():
            head[0] = torch.nan
        return torch.zeros(len(lengths), k, dtype=torch.int64)

    saved = head.detach().clone()
    try:
        with pytest.raises(ValueError, match="row"):
            speculative_generate(net, broken, asked, max_new_tokens=4)
    finally:
        with torch.no_grad():
            head.copy_(saved)


def test_drafter_ids_out_of_the_vocabulary_are_no_drafts() -> None:
    net, asked = model(), prompts([3, 4])

    def wild(tokens: torch.Tensor, lengths: torch.Tensor, k: int) -> torch.Tensor:
        return torch.tensor([[VOCAB, -7, 1, VOCAB + 9]] * len(lengths))[:, :k]

    out = speculative_generate(net, wild, asked, max_new_tokens=6, return_stats=True)
    assert generated(out, asked) == texts(net, asked, 6)
    assert out.stats.offered == 0


def test_plain_is_the_definition() -> None:
    net, asked = model("learned"), prompts([4])
    out = net.generate(asked[0][None], max_new_tokens=8, do_sample=False)
    assert out[0, 4:].tolist() == plain(net, asked[0], 8)
