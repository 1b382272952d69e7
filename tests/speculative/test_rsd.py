"""Reverse speculative decoding against its definition, one token at a time without a cache."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from alignops.integrations.speculative import HFAdapter
from alignops.reference.speculative import Law, Row, law, laws, rules, verify
from alignops.speculative.driver import Text
from alignops.speculative.prompted import PromptedDrafter, id_map_of
from alignops.speculative.rsd import (
    STUDENT,
    RsdOutput,
    fallback_share,
    keeps_trace,
    rsd_generate,
    select_trace,
)
from tests.speculative.models import VOCAB, model, permuted, perturbed

PROMPTS = [torch.tensor(p) for p in ([3, 1, 4, 1, 5], [9], [2, 6, 5])]
SETTINGS: dict[str, Any] = {"p_th": 0.05, "top_n": 6, "top_k": 8, "top_p": 0.9}
NEW = 24
SEED = 0


def last_logits(net: Any, tokens: list[int]) -> Any:
    with torch.no_grad():
        return net(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float().numpy()


def defined(
    student: Any,
    teacher: Any,
    prompt: list[int],
    teacher_prompt: list[int],
    seed: int,
    spelled: dict[int, list[int]] | None = None,
    eos: tuple[int, ...] = (),
    student_probs: str = "raw",
    **how: Any,
) -> tuple[list[int], list[int]]:
    """Tokens and their sources, by one verification of one draft per token."""
    settings = {**SETTINGS, **how}
    warp = {"temperature": 0.7, "top_k": settings.pop("top_k"), "top_p": settings.pop("top_p")}
    spelled = spelled or {}
    tokens: list[int] = []
    sources: list[int] = []
    while len(tokens) < NEW and not (tokens and tokens[-1] in eos):
        own = [i for token in tokens for i in spelled.get(token, [token])]
        logits = last_logits(teacher, teacher_prompt + own)
        if spelled:
            logits = shared(logits, spelled)
        q = law(logits, **warp)
        logits = last_logits(student, prompt + tokens)
        warped = law(logits, **warp)
        p = warped if student_probs == "warped" else law(logits)
        position = len(prompt) + len(tokens)
        draft = laws.sample(q.p, laws.uniform(seed, position, laws.PROPOSE))
        row = Row([p, p], [draft], [q], seed, position)
        students: list[Law] = [warped, warped]
        outcome = verify(row, "rsd", eos, student=students, **settings)
        tokens += outcome.tokens
        sources += outcome.sources
    return tokens, sources


def shared(logits: Any, spelled: dict[int, list[int]]) -> Any:
    """The teacher's logits of ids that spell one token of the student."""
    out = torch.full((VOCAB,), -torch.inf).numpy()
    explicit = {ids[0] for ids in spelled.values() if len(ids) == 1}
    for token in range(VOCAB):
        ids = spelled.get(token, [token])
        if len(ids) == 1 and ids[0] < len(logits) and (token in spelled or token not in explicit):
            out[token] = logits[ids[0]]
    return out


def generate(k: int = 5, **how: Any) -> RsdOutput:
    student, teacher = how.pop("models", (model(), model(seed=1)))
    return rsd_generate(
        student,
        teacher,
        how.pop("prompts", PROMPTS),
        max_new_tokens=NEW,
        num_draft_tokens=k,
        **{**SETTINGS, "seed": 70, **how},
    )


@functools.cache
def plain(i: int) -> tuple[list[int], list[int]]:
    """Tokens and sources of prompt i, by definition."""
    prompt = PROMPTS[i].tolist()
    return defined(model(), model(seed=1), prompt, prompt, 70 + i)


@pytest.mark.parametrize("k", range(1, 10))
def test_tokens_do_not_depend_on_the_number_of_drafts(k: int) -> None:
    seen = set()
    out = generate(k, batch_size=2)
    for i, text in enumerate(out.texts):
        tokens, sources = plain(i)
        assert (text.tokens, text.sources, text.finished) == (tokens, sources, "length")
        seen |= set(sources)
    assert seen == {rules.DRAFT, rules.TEACHER_RETRY, rules.STUDENT}
    assert STUDENT == rules.STUDENT


@pytest.mark.parametrize(
    "how",
    [
        {"retry": "descend"},
        {"retry": "none"},
        {"student_probs": "warped"},
        {"top_n": 0, "p_th": 0.2},
        {"trials": 2},
    ],
)
def test_variants(how: dict[str, Any]) -> None:
    texts = generate(4, prompts=PROMPTS[:1], **how).texts
    prompt = PROMPTS[0].tolist()
    tokens, sources = defined(model(), model(seed=1), prompt, prompt, 70, **how)
    assert (texts[0].tokens, texts[0].sources) == (tokens, sources)


@pytest.mark.parametrize("k", [1, 4])
def test_teacher_with_another_prompt_and_other_ids(k: int) -> None:
    # 3 and 7 are swapped, 11 is spelled by two ids, and 28 by one that spells another token.
    swapped = [{3: 7, 7: 3}.get(i, i) for i in range(VOCAB)]
    spelled = {3: [7], 7: [3], 11: [5, 6], 28: [2]}
    teacher = permuted(perturbed(0.2), swapped)
    prompt, teacher_prompt = PROMPTS[0].tolist(), [1, 4, 1, 5]
    out = generate(
        k,
        models=(model(), teacher),
        prompts=PROMPTS[:1],
        teacher_input_ids=[torch.tensor(teacher_prompt)],
        id_map=spelled,
        seed=SEED,
    )
    tokens, sources = defined(model(), teacher, prompt, teacher_prompt, SEED, spelled)
    assert (out.texts[0].tokens, out.texts[0].sources) == (tokens, sources)
    assert sources.count(rules.DRAFT) >= 10
    assert 11 in tokens  # what the student alone can say, and the teacher has to read
    assert {3, 7} & set(tokens)


def test_prompts_of_the_teacher_are_spelled() -> None:
    spelled = {3: [7, 8], 1: [2]}
    given = [torch.tensor([7, 8, 2, 4, 2, 5])]
    how: dict[str, Any] = {"prompts": PROMPTS[:1], "id_map": spelled}
    assert generate(3, **how).texts == generate(3, teacher_input_ids=given, **how).texts


def test_end_of_text() -> None:
    prompt = PROMPTS[0].tolist()
    eos = plain(0)[0][13]
    out = generate(5, prompts=PROMPTS[:1], eos_token_id=eos)
    tokens, sources = defined(model(), model(seed=1), prompt, prompt, 70, eos=(eos,))
    assert (out.texts[0].tokens, out.texts[0].sources) == (tokens, sources)
    assert out.texts[0].finished == "eos"
    assert out.texts[0].tokens[-1] == eos


@pytest.mark.parametrize("cut", [0, 1, 7, NEW])
def test_texts_go_on_after_an_interruption(cut: int) -> None:
    whole = generate(5).texts
    begun = [
        Text(text.sequence, text.prompt, text.limit, text.tokens[:cut], text.sources[:cut])
        for text in whole[1:]
    ]
    again = generate(3, resume=begun, batch_size=2).texts
    assert again == whole
    assert all(len(text.tokens) == cut for text in begun)


def test_saved_texts_can_be_resumed() -> None:
    class StopError(Exception):
        pass

    saved: dict[int, Text] = {}

    def save(text: Text) -> None:
        saved[text.sequence] = Text(
            text.sequence, text.prompt, text.limit, [*text.tokens], [*text.sources], text.finished
        )
        if len(text.tokens) > 9:
            raise StopError

    with pytest.raises(StopError):
        generate(4, save=save)
    assert 0 < len(saved[0].tokens) < NEW
    assert generate(4, resume=list(saved.values())).texts == generate(4).texts


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    generate(4, prompts=PROMPTS[:2], progress=True)
    assert "2/2" in capsys.readouterr().err


def test_sequence_ids_are_what_counts() -> None:
    texts = generate(4).texts
    some = generate(4, prompts=[PROMPTS[2], PROMPTS[0]], sequence_ids=[2, 0]).texts
    assert [text.tokens for text in some] == [texts[2].tokens, texts[0].tokens]


def test_padded_prompts_and_stream() -> None:
    padded = torch.tensor([[3, 1, 4, 1, 5], [0, 0, 0, 0, 9], [2, 6, 5, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 0, 0]])
    streamed: list[list[int]] = [[], [], []]
    ends: list[int] = []

    def streamer(row: int, tokens: list[int], finished: bool) -> None:
        streamed[row] += tokens
        ends.extend([row] if finished else [])

    out = generate(4, prompts=padded, attention_mask=mask, streamer=streamer)
    assert [text.tokens for text in out.texts] == [text.tokens for text in generate(4).texts]
    assert streamed == [text.tokens for text in out.texts]
    assert sorted(ends) == [0, 1, 2]
    assert out.stats.tokens == 3 * NEW
    assert out.stats.finished == 3


def test_text_ends_where_the_teacher_can_read_no_more() -> None:
    prompt = torch.arange(110) % VOCAB  # of at most 128 tokens
    for k in (1, 5):
        text = generate(k, prompts=PROMPTS[:1], teacher_input_ids=[prompt]).texts[0]
        assert len(text.tokens) == 18
        assert text.finished == "length"


# The filter of traces


def trace(tokens: list[int], student: int = 0) -> Text:
    sources = [STUDENT] * student + [0] * (len(tokens) - student)
    return Text(0, torch.tensor([1]), 99, tokens, sources)


def test_filter_of_traces() -> None:
    def kept(text: Text, right: bool = True) -> bool:
        return keeps_trace(text, end_of_think=7, end_of_turn=(8, 9), correct=lambda text: right)

    assert kept(trace([1, 7, 2, 9]))
    assert not kept(trace([1, 7, 2, 9]), right=False)
    assert not kept(trace([1, 2, 9]))  # has not stopped to think
    assert not kept(trace([7, 1, 7, 9]))  # twice
    assert not kept(trace([1, 7, 2, 2]))  # has not ended
    assert kept(trace([1, 7, 2, 9], student=2))
    assert not kept(trace([1, 7, 2, 9], student=3))
    assert fallback_share(trace([1, 7, 2, 9], student=3)) == 0.75


def test_shortest_of_the_first_tries_is_taken() -> None:
    texts = [trace([1] * n) for n in (9, 5, 2, 7)]
    assert select_trace(texts, keep=lambda text: len(text.tokens) > 3) is texts[1]
    assert select_trace(texts, tries=1, keep=lambda text: True) is texts[0]
    assert select_trace(texts, keep=lambda text: False) is None


# Other ids


class Words:
    """A tokenizer of whole words."""

    def __init__(self, words: list[str]) -> None:
        self._words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self._words)}

    def decode(self, ids: list[int]) -> str:
        return "".join(self._words[i] for i in ids)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [self._words.index(letter) for letter in text]


def test_id_map_of_tokenizers() -> None:
    spelled = id_map_of(Words(["a", "b", "<t>"]), Words(["b", "<", ">", "t", "a"]))
    assert spelled == {0: [4], 1: [0], 2: [1, 3, 2]}


def test_only_tokens_of_both_models_are_drafted() -> None:
    adapter = HFAdapter(model())
    drafter = PromptedDrafter(adapter, VOCAB + 2, {0: [4], 1: [4], 2: [1, 3], 30: [0], 5: []})
    logits = torch.randn(2, VOCAB)
    law = drafter.law(logits)
    assert law.shape == (2, VOCAB + 2)
    impossible = (law[0] == -torch.inf).nonzero().flatten().tolist()
    # 1: the id spells 0 already; 2: two ids; 4: its id spells 0; 5: nothing; 29: beyond the model.
    assert impossible == [1, 2, 4, 5, 29]
    assert torch.equal(law[:, 30], logits[:, 0])
    assert torch.equal(law[:, [0, 3]], logits[:, [4, 3]])
    assert drafter.spell([2, 29, 5, 6]) == [1, 3, 6]


# Bad input


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"k": 0}, "num_draft_tokens must be at least 1, and drafter given, where rule is rsd"),
        ({"retry": "often"}, "retry must be one of resample, descend, none, got 'often'"),
        ({"student_probs": "cold"}, "student_probs must be one of raw, warped, got 'cold'"),
        ({"sequence_ids": [1, 1, 2]}, "sequence_ids must be 3 different numbers"),
        ({"prompts": []}, "input_ids must hold at least one sequence, got none"),
        ({"teacher_input_ids": PROMPTS[:2]}, "teacher_input_ids must hold 3 prompts, got 2"),
        (
            {"teacher_input_ids": [torch.tensor([VOCAB])] * 3},
            r"teacher_input_ids\[0\] must hold ids in \[0, 29\)",
        ),
        ({"resume": [Text(9, PROMPTS[0], NEW)]}, "resume must hold sequences of input_ids"),
        ({"resume": [Text(1, PROMPTS[0], NEW)]}, "resume must hold sequences of input_ids"),
    ],
)
def test_bad_arguments(how: dict[str, Any], text: str) -> None:
    op = "SpecSession" if "k" in how else "rsd_generate"
    with pytest.raises(ValueError, match=f"{op}: {text}"):
        generate(**{"k": 4, **how})


def test_bad_id_map() -> None:
    with pytest.raises(ValueError, match=r"PromptedDrafter: id_map must map ids below V=29.*3: "):
        generate(4, id_map={3: [VOCAB]})
