"""A model as a drafter against the same model without a cache, over random histories of rows."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from alignops.integrations.speculative import HFAdapter
from alignops.reference.speculative import law, laws
from alignops.speculative import speculative_generate
from alignops.speculative.adapter import Batch, Sampling
from alignops.speculative.model_drafter import ModelDrafter
from tests.speculative.models import KINDS, VOCAB, model, perturbed

ROWS, CAPACITY = 3, 60
GREEDY = Sampling(temperature=0.0, vocab_size=VOCAB)


def logits_of(net: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return net(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]


def greedy(net: Any, tokens: list[int], count: int, vocab: int = VOCAB) -> list[int]:
    text = list(tokens)
    for _ in range(count):
        text.append(int(logits_of(net, text)[:vocab].argmax()))
    return text[len(tokens) :]


class Desk:
    """Rows as a session would hand them to a drafter."""

    def __init__(self, drafter: ModelDrafter, sampling: Sampling = GREEDY) -> None:
        self.drafter = drafter
        self.texts: list[list[int] | None] = [None] * ROWS
        self.offered: list[list[int]] = []
        drafter.start(ROWS, CAPACITY, sampling)

    def add(self, row: int, tokens: list[int]) -> None:
        self.texts[row] = list(tokens)
        self.drafter.add(row, torch.tensor(tokens))

    def batch(self) -> Batch:
        used = 1 + max(row for row, text in enumerate(self.texts) if text)
        lengths = [len(text) if text else 1 for text in self.texts[:used]]
        tokens = torch.full((used, CAPACITY), -1)
        for row, text in enumerate(self.texts[:used]):
            tokens[row, : len(text or [])] = torch.tensor(text or [], dtype=torch.long)
        active = torch.tensor([bool(text) for text in self.texts[:used]])
        return Batch(tokens, torch.tensor(lengths), torch.arange(used) + 40, active, lengths)

    def propose(self, k: list[int]) -> Any:
        batch = self.batch()
        count = torch.tensor(k[: len(batch.lengths)], dtype=torch.int32)
        drafts = self.drafter.propose(batch, count, max(1, int(count.max())))
        self.offered = [[i for i in row if i >= 0] for row in drafts.ids.tolist()]
        return drafts

    def commit(self, accepted: list[int], following: list[list[int]]) -> None:
        for row, text in enumerate(self.texts):
            if text:
                drafts = self.offered[row] if self.offered else []
                text += drafts[: accepted[row]] + following[row]
        batch = self.batch()
        taken = torch.tensor(accepted[: len(batch.lengths)], dtype=torch.int32)
        self.drafter.commit(batch, taken * batch.active)
        self.offered = []


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(sorted(KINDS)))
def test_drafts_are_what_the_model_would_say(seed: int, kind: str) -> None:
    rng, net = random.Random(seed), model(kind)
    adapter = HFAdapter(net)
    if "ragged" not in adapter.layouts:
        with pytest.raises(ValueError, match="layouts of the adapter must include ragged"):
            ModelDrafter(adapter)
        return
    desk = Desk(ModelDrafter(adapter))
    parked: list[tuple[list[int], Any]] = []

    def some(count: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(count)]

    for _ in range(9):
        row = rng.randrange(ROWS)
        text = desk.texts[row]
        if text is None and parked and rng.random() < 0.5:
            desk.texts[row], kept = parked.pop()
            desk.drafter.resume(row, torch.tensor(desk.texts[row]), kept)
        elif text is None:
            desk.add(row, some(rng.randrange(1, 6)))
        elif rng.random() < 0.2:
            parked.append((text, desk.drafter.park(row)))
            desk.texts[row] = None
        elif rng.random() < 0.1 or len(text) > CAPACITY - 8:
            desk.drafter.remove(row)
            desk.texts[row] = None
        if not any(desk.texts):
            continue
        k = [rng.randrange(5) for _ in range(ROWS)]
        for _ in range(rng.choice([0, 1, 1, 1, 2])):  # twice: the round was interrupted
            desk.propose(k)
            for drafts, said, count in zip(desk.offered, desk.texts, k, strict=False):
                assert drafts == (greedy(net, said, count) if said else [])
        accepted = [
            rng.choice([len(drafts), rng.randrange(len(drafts) + 1)])
            for drafts in desk.offered + [[]] * (ROWS - len(desk.offered))
        ]
        # For a drafter that spells the target's tokens in its own, more than one may follow.
        desk.commit(accepted, [some(rng.choice([1, 1, 3])) for _ in range(ROWS)])


@pytest.mark.parametrize("accepted", [0, 2, 4])
def test_a_round_begins_with_one_or_two_tokens(
    accepted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = model()
    adapter = HFAdapter(net)
    desk = Desk(ModelDrafter(adapter))
    desk.add(0, [1, 2, 3, 4])
    desk.propose([4])
    desk.commit([accepted, 0, 0], [[5], [], []])
    columns: list[int] = []
    forward = adapter.forward

    def counted(input_ids: torch.Tensor, *args: Any) -> torch.Tensor:
        columns.append(input_ids.shape[1])
        return forward(input_ids, *args)

    monkeypatch.setattr(adapter, "forward", counted)
    desk.propose([4])
    assert columns == [2 if accepted == 4 else 1, 1, 1, 1]


@pytest.mark.parametrize("race", [False, True])
def test_drafts_are_drawn_by_the_documented_words(race: bool) -> None:
    net = model("learned")
    sampling = Sampling(0.8, top_k=9, race=race, vocab_size=VOCAB)
    desk = Desk(ModelDrafter(HFAdapter(net)), sampling)
    desk.add(0, [3, 1, 4])
    desk.add(1, [1])
    for _ in range(3):
        drafts = desk.propose([3, 3])
        assert (drafts.logits is None) == race
        for row in range(2):
            text = list(desk.texts[row] or [])
            for i, token in enumerate(desk.offered[row]):
                exact = logits_of(net, text)
                if not race:
                    assert torch.allclose(drafts.logits[row, i], exact, atol=1e-9)
                q, position = law(exact.float().numpy(), 0.8, top_k=9), len(text)
                if race:
                    noise = laws.race_noise(40 + row, position, VOCAB)
                    assert token == laws.race_winner(q, noise)
                else:
                    word = laws.uniform(40 + row, position, laws.PROPOSE)
                    assert token == laws.sample(q.p, word)
                text.append(token)
        desk.commit([3, 1, 0], [[7], [8], []])


@pytest.mark.parametrize("target_size", [VOCAB - 9, VOCAB, VOCAB + 9])
def test_vocabularies_of_other_sizes(target_size: int) -> None:
    net = model()
    desk = Desk(ModelDrafter(HFAdapter(net)), Sampling(1.0, vocab_size=target_size))
    desk.add(0, [3, 1, 4])
    drafts = desk.propose([5])
    assert drafts.logits.shape == (1, 5, min(target_size, VOCAB))
    assert max(desk.offered[0]) < target_size


def test_drafts_end_where_the_model_ends() -> None:
    net = model("learned")  # positions up to 128
    adapter = HFAdapter(net)
    assert adapter.max_length == 128
    drafter = ModelDrafter(adapter)
    drafter.start(2, 140, GREEDY)
    texts = [[i * 7 % VOCAB for i in range(length)] for length in (125, 20)]
    for row, text in enumerate(texts):
        drafter.add(row, torch.tensor(text))
    for expected in (3, 1, 0, 0):
        lengths = [len(text) for text in texts]
        tokens = torch.zeros(2, 140, dtype=torch.long)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = torch.tensor(text)
        on = torch.tensor([True, True])
        batch = Batch(tokens, torch.tensor(lengths), on.long(), on, lengths)
        ids = drafter.propose(batch, torch.tensor([4, 4], dtype=torch.int32), 4).ids.tolist()
        assert [i for i in ids[0] if i >= 0] == greedy(net, texts[0], expected)
        assert ids[1] == greedy(net, texts[1], 4)
        texts = [texts[0] + [1, 2], [*texts[1], 3]]
        lengths = [len(text) for text in texts]
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = torch.tensor(text)
        after = Batch(tokens, torch.tensor(lengths), on.long(), on, lengths)
        drafter.commit(after, torch.tensor([0, 0], dtype=torch.int32))


@pytest.mark.parametrize("rule", ["coupled", "lossless"])
def test_number_of_drafts_is_chosen_while_sampling(rule: str) -> None:
    prompts = [torch.tensor(p) for p in ([3, 1, 4], [1, 5], [9, 2, 6, 5])]
    options: dict[str, Any] = {
        "max_new_tokens": 30,
        "temperature": 0.8,
        "top_k": 9,
        "seed": 5,
        "eos_token_id": [],
        "return_stats": True,
    }
    out = speculative_generate(
        model(), perturbed(0.1), prompts, rule=rule, num_draft_tokens="auto", **options
    )
    assert out.stats.offered > 0  # the first round drafts before costs are known
    assert out.stats.zero_q == 0
    if rule == "coupled":
        plain = speculative_generate(model(), None, prompts, rule=rule, **options)
        assert torch.equal(out.sequences, plain.sequences)
