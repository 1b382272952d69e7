"""Properties that hold whatever is asked for: the text is the target's, the state that of the text.

Properties of the operators alone are tested beside them: decisions in `test_verify` and `test_isa`,
moves in `test_kv`, independence of K of the two-model rules in `test_rsd` and `test_nudge`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from alignops.integrations.early_exit import early_exit
from alignops.integrations.speculative import HFAdapter
from alignops.reference.speculative import law, laws
from alignops.speculative import session as session_module
from alignops.speculative.caches import RaggedCache
from alignops.speculative.drafters import FunctionDrafter, PromptLookup
from alignops.speculative.generate import speculative_generate
from alignops.speculative.model_drafter import ModelDrafter
from alignops.speculative.placement import Defer, Placement
from alignops.speculative.session import SpecSession
from tests.speculative.models import (
    VOCAB,
    generated,
    model,
    oracle,
    perturbed,
    prompts,
    texts,
)
from tests.speculative.test_generate import PLACES, SCHEDULERS
from tests.speculative.test_reference import assert_law

GREEDY: dict[str, Any] = {"rule": "greedy"}
WARPS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 6},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 2.0, "min_p": 0.1},
]


def seeded(
    net: Any, prompt: Tensor, count: int, seed: int, warp: dict[str, Any], eos: Sequence[int]
) -> list[int]:
    """Seeded sampling of one prompt without any cache, by the reference: the definition."""
    tokens = prompt.tolist()
    for _ in range(count):
        with torch.no_grad():
            logits = net(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        noise = laws.race_noise(seed, len(tokens), len(logits))
        tokens.append(int(laws.race_winner(law(logits.float().numpy(), **warp), noise)))
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :]


def drafter_of(name: str, kind: str) -> Any:
    """A drafter for `model(kind)`."""
    own = kind if kind != "alibi_mask" else "rope"  # a drafter wants the layout "ragged"
    if name == "lookup":
        return PromptLookup(2)
    if name == "layers":
        return early_exit(model(own), 1)
    if name == "perturbed":
        return perturbed(0.2, own)
    sizes = {"stranger": VOCAB, "larger": VOCAB + 3, "smaller": VOCAB - 9}
    return model(own) if name == "target" else model("learned", 7, sizes[name])


DRAFTERS = ("lookup", "layers", "perturbed", "target", "stranger", "larger", "smaller")


# P1, P5: the text


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_text_for_any_drafter_place_and_schedule(data: st.DataObject) -> None:
    """Greedy text, and seeded text of the rule `coupled`, are those of each row alone."""
    kind, layout = data.draw(st.sampled_from(PLACES))
    net = model(kind)
    asked = prompts(
        data.draw(st.lists(st.integers(1, 17), min_size=1, max_size=5)),
        data.draw(st.integers(0, 99)),
    )
    count = data.draw(st.integers(1, 9))
    warp = data.draw(st.sampled_from([None, *WARPS]))

    def alone(eos: Sequence[int]) -> list[list[int]]:
        if warp is None:
            return texts(net, asked, count, eos)
        return [seeded(net, p, count, 50 + i, warp, eos) for i, p in enumerate(asked)]

    said = sorted({token for text in alone(()) for token in text})
    eos = data.draw(st.lists(st.sampled_from(said), max_size=2, unique=True))
    out = speculative_generate(
        net,
        drafter_of(data.draw(st.sampled_from(DRAFTERS)), kind),
        asked,
        max_new_tokens=count,
        num_draft_tokens=data.draw(st.integers(0, 7)),
        scheduler=data.draw(st.sampled_from(SCHEDULERS)),
        layout=layout,
        batch_size=data.draw(st.integers(1, 6)),
        window_size=data.draw(st.integers(1, 6)),
        eos_token_id=eos,
        seed=50,
        return_stats=True,
        debug=True,
        **(GREEDY if warp is None else {"rule": "coupled", **warp}),
    )
    assert generated(out, asked) == alone(eos)


@pytest.mark.parametrize(
    ("rule", "size"),
    [("lossless", 5), ("lossless", 4), ("block", 8), ("coupled", 8)],
)
def test_law_of_generated_text(rule: str, size: int) -> None:
    """Two tokens of 4000 texts: temperature and cuts reach both models, of any vocabularies."""
    ids, draws = 5, 4000
    net, draft = model("learned", 21, ids), model("learned", 22, size)
    warp = {"temperature": 1.6, "top_k": 4}
    prompt = torch.tensor([1, 4, 2])

    def law_after(*tokens: int) -> np.ndarray:
        with torch.no_grad():
            logits = net(input_ids=torch.tensor([[*prompt.tolist(), *tokens]])).logits[0, -1]
        p: np.ndarray = law(logits.float().numpy(), **warp).p.astype(np.float64)
        return p

    out = speculative_generate(
        net,
        draft,
        prompt.expand(draws, 3),
        max_new_tokens=3,  # so that two drafts may be offered
        num_draft_tokens=2,
        rule=rule,
        seed=10_000,
        return_stats=True,
        **warp,
    )
    first, second = out.sequences[:, 3], out.sequences[:, 4]
    counts = torch.bincount(first * ids + second, minlength=ids * ids).reshape(ids, ids).numpy()
    expected = law_after()[:, None] * np.stack([law_after(t) for t in range(ids)])
    assert_law(counts, expected)
    assert 0.1 < out.stats.acceptance < 0.95


# P2, P3, I4: the state


def _contents(placement: Placement, row: int) -> list[Tensor]:
    """Keys and values of the committed tokens of a row in order, each (H, c - 1, D)."""
    length = placement.lengths[row] - 1
    if isinstance(placement, Defer):
        positions = placement._positions[row, : placement.column]
        kept = torch.nonzero(positions >= 0)[:, 0]
        assert positions[kept].tolist() == list(range(length))
        return [t[row][:, kept] for t in placement.cache.tensors]
    begin = placement._begin(row)
    return [t[row, :, begin : begin + length] for t in placement.cache.tensors]


def _scratch(net: Any, tokens: Tensor) -> list[Tensor]:
    """Keys and values of a text that is read once, in one piece."""
    if len(tokens) == 0:
        return []
    adapter = HFAdapter(net)
    cache: RaggedCache = adapter.new_cache(1, len(tokens))
    cache.begin(torch.zeros(1, dtype=torch.int32), len(tokens), slice(0, 1))
    size = len(tokens)
    visible = torch.ones(size, size, dtype=torch.bool).tril()
    mask = torch.zeros(size, size, dtype=adapter.dtype).masked_fill(
        ~visible, torch.finfo(adapter.dtype).min
    )
    adapter.forward(tokens[None], torch.arange(size)[None], [mask[None, None]], cache, 1)
    return [t[0, :, :size] for t in cache.tensors]


def _same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) >= len(expected)
    for a, b in zip(found, expected, strict=False):
        assert a.shape == b.shape
        assert (a - b).abs().max() < 1e-9


LAYOUTS = ("ragged", "defer", "realign", "rollback")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_caches_are_those_recomputed_from_scratch(layout: str) -> None:
    """Of the target and of the drafter, in float64 throughout, after every round."""
    net, small = model("learned"), early_exit(model("learned"), 1)
    asked = prompts([6, 1, 11, 3, 8], seed=2)
    drafter = ModelDrafter(HFAdapter(small))
    session = SpecSession(
        HFAdapter(net), drafter, rows=3, capacity=40, num_draft_tokens=3, layout=layout
    )
    session.prefill(asked[:3], [9, 14, 20])
    waiting, lengths = asked[3:], set()
    while session.active:
        done = session.commit(session.verify(session.draft()))
        lengths |= set(map(len, done.tokens))
        for row in session.active:
            tokens = session.tokens_of(row)
            _same(_contents(session.placement, row), _scratch(net, tokens[:-1]))
            read = int(drafter._read[row])
            assert len(tokens) - 2 <= read <= len(tokens) - 1 or layout == "rollback"
            own = [t[row, :, :read] for t in drafter._cache.tensors]
            _same(own, _scratch(small, tokens[:read]))
        for row in range(session.rows):
            if row not in session.active and row not in session.free:
                session.remove(row)
                if waiting:
                    session.add(waiting.pop(), 12)
    assert not waiting
    assert len(lengths) > 2  # rows have drifted apart


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scripted_rounds_leave_the_caches_of_plain_feeding(layout: str) -> None:
    """All vectors of accepted drafts of two rows with three drafts, two rounds of each."""
    net, asked = model("learned"), prompts([5, 3])
    drafts = torch.randint(VOCAB, (2, 3), generator=torch.Generator().manual_seed(1))
    for accepted in itertools.product(range(4), repeat=2):
        session = SpecSession(
            HFAdapter(net),
            FunctionDrafter(lambda tokens, lengths, k: drafts[:, :k]),
            rows=2,
            capacity=32,
            num_draft_tokens=3,
            rule="scripted",
            params={"given": torch.tensor(accepted, dtype=torch.int32)},
            layout=layout,
        )
        session.prefill(asked, 20)
        for turn in (1, 2):
            session.commit(session.verify(session.draft()))
            counts = [min(accepted)] * 2 if layout == "rollback" else accepted
            for row in range(2):
                tokens = session.tokens_of(row)
                assert len(tokens) == len(asked[row]) + turn * (counts[row] + 1)
                _same(_contents(session.placement, row), _scratch(net, tokens[:-1]))


# P8: neighbours


def _likely(tokens: Tensor, lengths: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Drafts, and the law they were drawn from, that depend on the last token of a row alone."""
    last = tokens.gather(1, lengths[:, None] - 1)
    ids = (last + 1 + torch.arange(k)) % VOCAB
    logits = torch.zeros(len(ids), k, VOCAB).scatter(2, ids[..., None], 2.0)
    return ids, logits


@pytest.mark.parametrize("rule", ["greedy", "lossless", "block", "coupled", "threshold"])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_other_rows_change_nothing(rule: str, data: st.DataObject) -> None:
    """Order, neighbours, size of the batch and window; with the same seeds, sampled text too."""
    net, count = model(), 7
    asked = prompts([4, 1, 9, 6, 2], seed=3)

    def run(order: Sequence[int], **options: Any) -> dict[int, list[int]]:
        chosen = [asked[i] for i in order]
        out = speculative_generate(
            net,
            _likely,
            chosen,
            max_new_tokens=count,
            num_draft_tokens=3,
            rule=rule,
            seed=[70 + i for i in order],
            return_stats=True,
            **options,
        )
        return dict(zip(order, generated(out, chosen), strict=True))

    alone: dict[int, list[int]] = {}
    for i in range(5):
        alone |= run([i])
    order = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True))
    together = run(
        order,
        batch_size=data.draw(st.integers(1, 5)),
        window_size=data.draw(st.integers(1, 5)),
        scheduler=data.draw(st.sampled_from(SCHEDULERS)),
        layout=data.draw(st.sampled_from(["ragged", "defer", "realign"])),
    )
    assert together == {i: alone[i] for i in order}


# P9: reads from the device

_READS = (
    *("item", "tolist", "numpy", "nonzero", "cpu"),
    *("__bool__", "__int__", "__float__", "__index__"),
)


@contextmanager
def _counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of calls by which values of tensors reach the host."""
    calls: list[str] = []
    with monkeypatch.context() as patch:
        for name in _READS:
            original = getattr(Tensor, name)

            def read(self: Tensor, *args: Any, _name: str = name, _of: Any = original) -> Any:
                calls.append(_name)
                return _of(self, *args)

            patch.setattr(Tensor, name, read)
        yield calls


@pytest.mark.parametrize("layout", ["ragged", "defer", "realign", "rollback"])
@pytest.mark.parametrize("drafter", ["function", "model"])
def test_a_round_reads_once_from_the_device(
    layout: str, drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One list of what was emitted. A model that drafts on the host also looks how far it is."""
    said = torch.randint(VOCAB, (3, 3), generator=torch.Generator().manual_seed(1))
    session = SpecSession(
        HFAdapter(model()),
        ModelDrafter(HFAdapter(perturbed(0.2)))
        if drafter == "model"
        else FunctionDrafter(lambda tokens, lengths, k: said[: len(tokens), :k]),
        rows=3,
        capacity=40,
        num_draft_tokens=3,
        layout=layout,
    )
    session.prefill(prompts([4, 9, 2]), 16)
    reads: list[tuple[str, ...]] = []
    while session.active:
        with _counted(monkeypatch) as calls:
            session.commit(session.verify(session.draft()))
        reads.append(tuple(sorted(calls)))
    assert len(reads) > 3
    # A round without room for drafts does not ask the drafter.
    assert set(reads) == {("tolist",)} | ({("__int__", "tolist")} if drafter == "model" else set())


# P10: rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_stable_logits_are_those_of_plain_decoding(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits behind every committed token, bit for bit, for all schedulers."""
    net = copy.deepcopy(model()).to(dtype)
    asked = prompts([3, 6, 1, 18, 4])
    logits: dict[tuple[int, int], Tensor] = {}
    verify = session_module.verify

    def recorded(target: Tensor, ids: Tensor, **options: Any) -> Any:
        out = verify(target, ids, **options)
        seeds, places = options["seeds"].tolist(), options["positions"].tolist()
        for row, count in enumerate(out.num_emitted.tolist()):
            for i in range(count):
                logits[seeds[row], places[row] + i] = target[row, i].clone()
        return out

    monkeypatch.setattr(session_module, "verify", recorded)

    def run(draft: Any, rule: str = "greedy", **options: Any) -> tuple[list[list[int]], Any, Any]:
        logits.clear()
        out = speculative_generate(
            net,
            draft,
            asked,
            max_new_tokens=12,
            num_draft_tokens=3,
            rule=rule,
            seed=90,
            stable=True,
            return_stats=True,
            **options,
        )
        return generated(out, asked), dict(logits), out.stats

    refused = {"rule": "scripted", "params": {"given": 0}, "batch_size": 2}
    plainly, expected, _ = run(PromptLookup(1), **refused)
    assert len(expected) == 12 * len(asked)
    for scheduler, size in zip(SCHEDULERS, (3, 2, 1), strict=True):
        draft = oracle(asked, plainly, 0.8)
        text, found, stats = run(draft, scheduler=scheduler, batch_size=size)
        assert text == plainly
        assert stats.tokens_per_round > 1.5
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


# Real input


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, list[Tensor]]:
    from alignops.demo._common import load_smollm2

    try:
        net, tokenizer = load_smollm2()
    except RuntimeError as error:
        pytest.skip(str(error))
    asked = [
        "The capital of France is",
        "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return",
        "One, two, three, one, two, three, one, two,",
        "Water boils at",
    ]
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in asked]
    assert len({len(i) for i in ids}) > 2
    return net, ids


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lookup", "layers"])
def test_real_model_equals_generate(smollm2: tuple[Any, list[Tensor]], name: str) -> None:
    """SmolLM2-135M in float32: every row of a ragged batch is what `generate` says alone."""
    net, asked = smollm2
    expected = [
        net.generate(p[None], max_new_tokens=12, do_sample=False, pad_token_id=0)[0, len(p) :]
        for p in asked
    ]
    out = speculative_generate(
        net,
        PromptLookup(3) if name == "lookup" else early_exit(net, 6),
        asked,
        max_new_tokens=12,
        num_draft_tokens=4,
        batch_size=3,
        return_stats=True,
    )
    assert generated(out, asked) == [text.tolist() for text in expected]


@pytest.mark.slow
def test_real_model_is_stable_in_bfloat16(smollm2: tuple[Any, list[Tensor]]) -> None:
    net, asked = copy.deepcopy(smollm2[0]).bfloat16(), smollm2[1]
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "num_draft_tokens": 3,
        "stable": True,
        "return_stats": True,
    }
    plainly = speculative_generate(
        net, PromptLookup(1), asked, rule="scripted", params={"given": 0}, **options
    )
    text = generated(plainly, asked)
    out = speculative_generate(net, oracle(asked, text, 0.8), asked, **options)
    assert generated(out, asked) == text
    assert out.stats.rounds < plainly.stats.rounds
