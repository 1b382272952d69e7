"""Nudging against its definition, one token at a time without a cache, and between tokenizers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from alignops.integrations.speculative import HFAdapter
from alignops.speculative.nudge import NudgeOutput, nudge_generate
from alignops.speculative.nudges import BASE, NUDGE, Nudges, word_starts
from tests.speculative.models import VOCAB, model, permuted, perturbed

PROMPTS = [torch.tensor(p) for p in ([3, 1, 4, 1, 5], [9], [2, 6, 5])]
STARTS = torch.arange(VOCAB) % 3 != 0
GAMMA, NEW = 0.45, 40


def base() -> Any:
    return model()


def small() -> Any:
    """A model that often agrees with the base."""
    return perturbed(0.25)


def law_of(net: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = net(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
    return torch.softmax(logits, -1)


def defined(
    prompt: list[int],
    small_prompt: list[int],
    eos: tuple[int, ...] = (),
    lookahead: int = 16,
    max_nudges: int = 150,
    limit: int = NEW,
    small_net: Any = None,
) -> tuple[list[int], list[int], str]:
    """Tokens, who spoke, and why the text ended, by the words of the specification."""
    small_net = small_net or small()
    text: list[int] = []
    who: list[int] = []
    nudging, words, nudges = False, list[int](), list[list[int]]()

    def drafts(count: int) -> list[int]:
        said: list[int] = []
        for _ in range(count):
            said.append(int(law_of(small_net, small_prompt + text + said).argmax()))
        return said

    while len(text) < limit:
        p = law_of(base(), prompt + text)
        best = int(p.argmax())
        sure = float(p.max()) >= GAMMA and best not in eos
        said = drafts(1)[0]
        if not nudging and sure:
            speaker, token = BASE, best
        elif not nudging:
            nudging = True
            ahead = drafts(lookahead)
            ends = [j for j, t in enumerate(ahead) if t in eos]
            if ends:
                text += ahead[: ends[0] + 1]
                who += [NUDGE] * (ends[0] + 1)
                over = len(text) > limit
                return text[:limit], who[:limit], "length" if over else "eos"
            speaker, token = NUDGE, said
        elif STARTS[said] and (sure or (best == said and best not in eos)):
            nudging = False
            speaker, token = BASE, best
        else:
            speaker, token = NUDGE, said
        if speaker == NUDGE:
            words.append(token)
        elif words:
            nudges.append(words)
            words = []
            if len(nudges) >= max_nudges:
                return text, who, "nudges"
            if len(nudges) >= 3 and nudges[-1] == nudges[-2] == nudges[-3]:
                return text, who, "repeat"
        text.append(token)
        who.append(speaker)
        if token in eos:
            return text, who, "eos"
    return text, who, "length"


def generate(k: int = 5, prompts: Any = PROMPTS, small_net: Any = None, **how: Any) -> NudgeOutput:
    return nudge_generate(
        base(),
        small_net or small(),
        prompts,
        num_draft_tokens=k,
        **{"max_new_tokens": NEW, "word_start": STARTS, "gamma": GAMMA, **how},
    )


@functools.cache
def plain(i: int, **how: Any) -> tuple[list[int], list[int], str]:
    prompt = PROMPTS[i].tolist()
    return defined(prompt, prompt, **how)


def results(out: NudgeOutput) -> list[tuple[list[int], list[int], str]]:
    return [(text.tokens, text.sources, text.finished) for text in out.texts]


@pytest.mark.parametrize("k", range(1, 10))
def test_tokens_do_not_depend_on_the_number_of_drafts(k: int) -> None:
    expected = [plain(i) for i in range(3)]
    assert results(generate(k, batch_size=2)) == expected
    speakers = [speaker for _, who, _ in expected for speaker in who]
    assert min(speakers.count(NUDGE), speakers.count(BASE)) > 10


def end_of_text() -> int:
    """An id that the small model says within a nudge, or soon after it has begun."""
    text, who, _ = plain(0)
    return next(t for t, speaker in zip(text[8:], who[8:], strict=True) if speaker == NUDGE)


@pytest.mark.parametrize(
    ("k", "lookahead"),
    [*((k, 16) for k in range(1, 10)), *((k, n) for k in (1, 4, 9) for n in (0, 3))],
)
def test_end_of_text_is_looked_for_beyond_the_drafts(k: int, lookahead: int) -> None:
    eos = (end_of_text(),)
    expected = [plain(i, eos=eos, lookahead=lookahead) for i in range(3)]
    out = generate(k, eos_token_id=eos[0], eos_lookahead=lookahead)
    assert results(out) == expected


def test_look_ahead_ends_texts_early() -> None:
    eos = (end_of_text(),)
    ends = [plain(0, eos=eos, lookahead=n) for n in (0, 16)]
    assert ends[1][2] == "eos"
    assert ends[0] != ends[1]


@pytest.mark.parametrize("limit", [1, 2, 5, 9])
@pytest.mark.parametrize("k", [1, 4, 9])
def test_look_ahead_is_cut_at_the_limit(limit: int, k: int) -> None:
    eos = (end_of_text(),)
    expected = [plain(i, eos=eos, limit=limit) for i in range(3)]
    assert results(generate(k, eos_token_id=eos[0], max_new_tokens=limit)) == expected


@pytest.mark.parametrize("k", [1, 5, 9])
@pytest.mark.parametrize("most", [1, 2, 4])
def test_text_ends_after_so_many_nudges(k: int, most: int) -> None:
    expected = [plain(i, max_nudges=most) for i in range(3)]
    assert "nudges" in [reason for _, _, reason in expected]
    assert results(generate(k, max_nudges=most)) == expected


def test_three_equal_nudges_are_the_last() -> None:
    nudges = Nudges(limit=99)
    said = [("a", True), ("b", True), ("x", False), ("a", True), ("b", True), ("y", False)]
    assert [nudges.see(*s) for s in said] == [""] * 6
    assert [nudges.see(*s) for s in said[:2]] == ["", ""]
    assert nudges.see("x", False) == "repeat"
    # Another nudge in between begins the count anew.
    nudges = Nudges(limit=99)
    for word in "aabaa":
        assert nudges.see(word, True) == nudges.see("x", False) == ""


@pytest.mark.parametrize("k", [1, 6])
def test_nudger_with_a_prompt_of_its_own(k: int) -> None:
    own = [[8, 7, 8], [1, 1], [20]]
    out = generate(k, drafter_input_ids=[torch.tensor(p) for p in own])
    assert results(out) == [
        defined(prompt.tolist(), p) for prompt, p in zip(PROMPTS, own, strict=True)
    ]


def test_stream_is_what_is_returned() -> None:
    eos = end_of_text()
    streamed: list[list[int]] = [[], [], []]

    def streamer(row: int, tokens: list[int], finished: bool) -> None:
        streamed[row] += tokens

    out = generate(4, eos_token_id=eos, max_nudges=4, streamer=streamer)
    assert streamed == [text.tokens for text in out.texts]


# Between tokenizers


class Letters:
    """A tokenizer of one character per id; a capital begins a word."""

    def __init__(self, order: list[int]) -> None:
        letters = [chr(ord("a") + i) for i in range(VOCAB)]
        self._letters = ["▁" + c if STARTS[i] else c for i, c in enumerate(letters)]
        self._order = order  # own id of each letter
        self._letter = {own: self._letters[i] for i, own in enumerate(order)}

    def get_vocab(self) -> dict[str, int]:
        return {piece: own for own, piece in self._letter.items()}

    def decode(self, ids: list[int]) -> str:
        return "".join(self._letter[i].replace("▁", " ") for i in ids)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        letters = [c for c in text if c != " "]
        return [self._order[ord(c) - ord("a")] for c in letters]


@pytest.mark.parametrize(("eos", "most"), [(None, 150), (True, 150), (None, 3)])
def test_models_of_other_ids_exchange_strings(eos: bool | None, most: int) -> None:
    order = [(i * 5 + 3) % VOCAB for i in range(VOCAB)]
    other = permuted(small(), order)
    ids = (end_of_text(),) if eos else ()
    other.generation_config.eos_token_id = [order[i] for i in ids] or None
    out = generate(
        5,
        small_net=other,
        text_bridge=True,
        tokenizers=(Letters(list(range(VOCAB))), Letters(order)),
        word_start=None,
        eos_token_id=list(ids),
        max_nudges=most,
    )
    assert results(out) == [plain(i, eos=ids, max_nudges=most) for i in range(3)]


def test_word_starts() -> None:
    starts = word_starts(Letters(list(range(VOCAB))), VOCAB + 2)
    assert torch.equal(starts[:VOCAB], STARTS)
    assert not starts[VOCAB:].any()


# Bad input


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ({"word_start": None}, TypeError, "word_start must be a bool tensor, got NoneType"),
        ({"word_start": STARTS.int()}, TypeError, "word_start must be a bool tensor, got int32"),
        ({"word_start": STARTS[1:]}, ValueError, r"word_start must have shape \(29,\)"),
        ({"max_nudges": 0}, ValueError, "max_nudges must be at least 1, got 0"),
        ({"eos_lookahead": -1}, ValueError, "eos_lookahead must be >= 0, got -1"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"text_bridge": True}, TypeError, "tokenizers must be given for text_bridge, got None"),
        (
            {"drafter_input_ids": PROMPTS[:1]},
            ValueError,
            "drafter_input_ids must hold 3 prompts, got 1",
        ),
    ],
)
def test_bad_arguments(how: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"nudge_generate: {text}"):
        generate(4, **how)


def test_adapters_are_taken() -> None:
    out = nudge_generate(
        HFAdapter(base()),
        HFAdapter(small()),
        PROMPTS[1][None],
        max_new_tokens=NEW,
        word_start=STARTS,
        gamma=GAMMA,
    )
    assert results(out) == [plain(1)]
