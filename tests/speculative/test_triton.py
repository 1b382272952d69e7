"""The Triton kernels against the definition: interpreted, or compiled where there is a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from alignops.reference.speculative import rules

pytest.importorskip("triton", reason="triton is not installed")
from alignops.triton_kernels.speculative_chains import RULES
from tests.speculative.triton_batches import EOS, Batch

PARAMETERS: list[tuple[str, dict[str, Any]]] = [
    ("greedy", {}),
    ("lossless", {}),
    ("block", {}),
    ("coupled", {}),
    ("typical", {"eps": 0.2, "delta": 0.5}),
    ("relaxed", {"m": 2}),
    ("relaxed", {"m": 5, "delta": 0.2}),
    ("threshold", {"t_single": 0.3, "t_acc": 0.5}),
    ("rsd", {"p_th": 0.3, "trials": 3}),
    ("rsd", {"p_th": 0.05, "top_n": 3, "trials": 4, "retry": "descend"}),
    ("rsd", {"p_th": 0.2, "retry": "none", "warped": True}),
    ("nudge", {"gamma": 0.5, "eos_lookahead": 2}),
    ("scripted", {}),
]
CASES = [
    pytest.param(rule, params, id=f"{rule}-{i}") for i, (rule, params) in enumerate(PARAMETERS)
]


def test_every_rule_is_tested() -> None:
    assert {rule for rule, _ in PARAMETERS} == set(RULES)
    assert list(rules.RULES) == list(RULES)


@pytest.mark.parametrize(("rule", "params"), CASES)
def test_rules(rule: str, params: dict[str, Any]) -> None:
    Batch(rule, b=5, vd=290, params=params, seed=1).check()
    Batch(rule, b=4, k=4, v=37, dtype=torch.bfloat16, params=params, seed=2, limited=True).check()
    for seed in (31, 32):  # laws with few likely ids: more drafts are accepted
        Batch(rule, b=6, k=4, v=37, spread=4, params=params, seed=seed).check()
    Batch(rule, b=3, k=0, v=37, params=params, seed=3).check()
    Batch(rule, b=3, k=1, v=1, params=params, seed=4).check()


@pytest.mark.parametrize(("rule", "params"), CASES)
def test_several_tiles(rule: str, params: dict[str, Any]) -> None:
    Batch(rule, b=2, k=2, v=9001, vd=8999, dtype=torch.float16, params=params, seed=5).check()


FILTERS = [
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.1},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"top_k": 1000, "top_p": 0.9999},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters(filters: dict[str, float]) -> None:
    for rule, seed in (("lossless", 6), ("coupled", 7), ("relaxed", 8)):
        # Half precision: many ids have equal weights, which the id decides.
        Batch(rule, b=3, k=2, dtype=torch.bfloat16, filters=filters, seed=seed).check()


def test_filters_over_several_tiles() -> None:
    filters = {"top_k": 500, "top_p": 0.95, "min_p": 0.001}
    Batch("lossless", b=1, k=1, v=4500, dtype=torch.bfloat16, filters=filters, seed=9).check()
    Batch("lossless", b=1, k=1, v=4500, spread=0, filters={"top_p": 0.95}, seed=9).check()


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 0.7, 30.0, 1e4])
def test_temperatures(temperature: float) -> None:
    for rule in ("lossless", "coupled"):
        Batch(rule, k=2, temperature=temperature, spread=9, seed=10).check()


@pytest.mark.parametrize("rule", ["lossless", "block", "threshold", "rsd"])
def test_given_words_and_certain_drafts(rule: str) -> None:
    batch = Batch(rule, b=5, seed=11, certain=True, uniforms=True)
    assert batch.words is not None
    batch.words[0] = 0
    batch.words[1] = torch.tensor(2**32 - 1, dtype=torch.uint32)
    batch.target[..., :7] = batch.target[..., -7:] = -torch.inf
    batch.check()


@pytest.mark.parametrize("rule", ["greedy", "lossless", "block", "rsd", "nudge"])
def test_packed_rows(rule: str) -> None:
    Batch(rule, b=5, packed=True, seed=12).check()


@pytest.mark.parametrize("block", [512, 2048])
def test_any_block_size_gives_the_same_bits(block: int) -> None:
    """A tile may be read in any number of pieces."""
    for rule in ("block", "coupled", "rsd"):
        Batch(rule, b=2, k=2, v=5000, spread=1, seed=13, block=block, dtype=torch.float16).check()


DESCENT = {"p_th": 0.0, "top_n": 1, "trials": 40, "retry": "descend"}


@pytest.mark.parametrize(
    ("rule", "params", "v"),
    [
        *(("greedy", {}, v) for v in (40, 4300)),
        *(("relaxed", {"m": 3, "r": 0.1}, v) for v in (40, 4300)),
        ("rsd", DESCENT, 40),
    ],
)
def test_equal_logits_go_by_their_ids(rule: str, params: dict[str, Any], v: int) -> None:
    block = 512 if v > 4096 else 4096
    batch = Batch(rule, b=4, k=2, v=v, spread=1, params=params, seed=17, block=block)
    batch.target = batch.target.round()
    if batch.draft is not None:  # the one token that passes is among equals of the teacher
        batch.draft = (batch.draft / 3).round().roll(1, -1)
    batch.check()


def test_rows_do_not_depend_on_their_batch() -> None:
    batch = Batch("lossless", b=6, seed=14, greedy_rows=False)
    out = batch.run()
    for i in (1, 4):
        alone = copy.copy(batch)
        alone.b = 1
        for name, t in vars(batch).items():
            if isinstance(t, Tensor) and t.shape[0] == batch.b and name != "word_start":
                setattr(alone, name, t[i : i + 1])
        one = alone.run()
        assert torch.equal(one.tokens[0], out.tokens[i])
        assert torch.equal(one.source[0], out.source[i])


def test_strides_of_logits() -> None:
    batch = Batch("lossless", seed=15)
    expected = batch.run()
    spare = torch.zeros(batch.b, batch.k + 3, batch.v + 5)
    spare[:, 1 : batch.k + 2, 1 : batch.v + 1] = batch.target
    batch.target = spare[:, 1 : batch.k + 2, 1 : batch.v + 1]
    assert torch.equal(batch.run().tokens, expected.tokens)


# Rows that cannot be decided


def test_row_errors() -> None:
    batch = Batch("lossless", b=8, k=2, greedy_rows=False, seed=16)
    batch.lens[:] = 2
    batch.uniforms, batch.words = True, torch.zeros((8, 3, 2), dtype=torch.uint32)  # accepts all
    assert batch.draft is not None
    fine = batch.run()
    batch.target[0, 1, 7] = torch.nan
    batch.target[1, 2, 290] = torch.inf
    batch.target[2, 0] = -torch.inf
    batch.draft[3, 1, 5] = torch.nan
    batch.ids[4, 1] = batch.v
    batch.ids[5, 0] = -5
    batch.temperatures[6] = 2e4
    out = batch.run()
    assert out.row_error.tolist() == [1, 1, 2, 1, 3, 3, 4, 0]
    for i in range(7):
        assert out.tokens[i].eq(-1).all()
        assert out.num_emitted[i] == out.accept_len[i] == out.finished[i] == out.zero_q[i] == 0
        assert out.next_token[i] == -1
        assert out.state[i] == batch.state[i]
    assert torch.equal(out.tokens[7], fine.tokens[7])


def test_rows_behind_the_last_accepted_draft_are_not_judged() -> None:
    batch = Batch("greedy", b=1, k=2)
    batch.ids[0, 0] = (batch.target[0, 0].argmax() + 1) % batch.v
    batch.target[0, 1:] = torch.nan
    batch.lens[0] = 2
    out = batch.run()
    assert out.row_error[0] == 0
    assert out.tokens[0, 0] == batch.target[0, 0].argmax()


def test_drafts_end_at_the_first_that_is_missing() -> None:
    batch = Batch("greedy", b=2, k=3)
    batch.ids = batch.target[:, :3].argmax(-1)
    batch.ids[0, 1] = -1
    batch.lens[:] = 3
    assert batch.run().accept_len.tolist() == [1, 3] or set(EOS) & set(batch.ids.flatten().tolist())


def test_impossible_drafts_are_counted() -> None:
    batch = Batch("lossless", b=1, k=1, v=64, vd=32, greedy_rows=False)
    batch.ids[0, 0], batch.lens[0] = 40, 1
    out = batch.run()
    assert out.zero_q.tolist() == [1]
    assert out.tokens[0, 0] == 40
