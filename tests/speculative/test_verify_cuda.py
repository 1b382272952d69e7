"""Verification on a GPU against the CPU, bit for bit, and what a serving loop asks of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from alignops import speculative
from tests.speculative import samples_verify as samples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

GPU = "cuda:0"
RULES = ("greedy", "lossless", "block", "coupled", "typical", "relaxed", "threshold", "rsd")
RULES += ("nudge", "scripted")


def to_gpu(values: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().to(GPU), values)


def assert_equal(call: Callable[..., Any], case: dict[str, Any]) -> None:
    expected, found = call(**case), call(**to_gpu(case))
    for name, t in vars(expected).items():
        assert torch.equal(getattr(found, name).cpu(), t), (name, case)


@pytest.mark.parametrize("rule", RULES)
def test_chains(rule: str) -> None:
    for seed in range(12):
        assert_equal(speculative.verify, samples.make_case(samples.generator(60, seed), rule))


@pytest.mark.parametrize("rule", ["greedy", "tree_target", "tree_rrs"])
def test_trees(rule: str) -> None:
    for seed in range(10):
        case = samples.make_tree_case(samples.generator(61, seed), rule)
        assert_equal(speculative.verify_tree, case)


@pytest.mark.parametrize("race", [False, True])
def test_draft_steps(race: bool) -> None:
    for seed in range(10):
        rng = samples.generator(62, seed)
        size = int(rng.choice(samples.SIZES))
        case = {
            "logits": samples.make_logits(rng, 3, size, dtype=samples.DTYPES[seed % 3]),
            "seeds": torch.arange(3),
            "positions": torch.arange(3),
            "race": race,
            **samples.make_warp(rng, 3, size),
        }
        assert_equal(speculative.propose, case)


def large_case(b: int = 8, k: int = 5, v: int = 151_936) -> dict[str, Any]:
    target = torch.randn(b, k + 1, v, device=GPU).mul_(3).bfloat16()
    draft = (target[:, :k].float() + torch.randn(b, k, v, device=GPU)).bfloat16()
    return {
        "target": target,
        "draft_ids": draft.argmax(-1),
        "draft": draft,
        "rule": "lossless",
        "seeds": torch.arange(b, device=GPU),
        "positions": torch.arange(b, device=GPU),
    }


@pytest.mark.parametrize("filters", [{}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01}], ids=str)
def test_large_vocabularies(filters: dict[str, Any]) -> None:
    case = large_case() | filters
    found = speculative.verify(**case)
    on_cpu = pytree.tree_map_only(torch.Tensor, Tensor.cpu, case)
    for name, t in vars(speculative.verify(**on_cpu)).items():
        assert torch.equal(getattr(found, name).cpu(), t), name


@pytest.mark.parametrize("rule", ["greedy", "lossless", "coupled"])
def test_graphs_are_captured_and_replayed(rule: str) -> None:
    case = large_case(4, 3, 9001) | {"rule": rule, "eos_ids": [3]}
    speculative.verify(**case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = speculative.verify(**case)
    other = large_case(4, 3, 9001)
    case["target"].copy_(other["target"])
    case["draft_ids"].copy_(other["draft_ids"])
    graph.replay()
    expected = speculative.verify(**case)
    for name, t in vars(expected).items():
        assert torch.equal(getattr(out, name), t), name


def test_the_host_does_not_wait() -> None:
    case = large_case(4, 3, 9001) | {"temperature": torch.ones(4, device=GPU)}
    speculative.verify(**case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        speculative.verify(**case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rows_outside_of_packed_logits_are_not_read() -> None:
    logits = torch.randn(6, 97, device=GPU)
    cu = torch.tensor([-5, 4000, 4003], dtype=torch.int32, device=GPU)
    out = speculative.verify(logits, torch.zeros(2, 3, dtype=torch.int64, device=GPU), cu=cu)
    torch.cuda.synchronize()
    assert out.tokens.lt(97).all()
