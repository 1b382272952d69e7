"""The operators on GPUs, interpreted: the bits and the errors of the CPU's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignops import speculative
from alignops.speculative import _triton
from tests.speculative import samples_verify as samples

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda.py compares on a GPU")

verify_module = importlib.import_module("alignops.speculative.verify")

OPS: dict[str, Callable[..., Any]] = {
    "speculative_verify": _triton._verify,
    "speculative_propose": _triton._propose,
    "speculative_verify_tree": _triton._verify_tree,
}
SIZES = (1, 2, 11, 97, 4097)


def both(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> tuple[Any, Any]:
    """(by the CPU's operators, by the GPU's)"""
    expected = call()
    with monkeypatch.context() as patch:
        patch.setattr(verify_module, "_op", SimpleNamespace(**OPS))
        return expected, call()


def assert_equal(expected: Any, found: Any, case: Any) -> None:
    for name, t in vars(expected).items():
        assert torch.equal(getattr(found, name), t), (name, t, getattr(found, name), case)


@pytest.mark.parametrize("rule", verify_module.RULES)
def test_chains(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(6):
        case = samples.make_case(samples.generator(50, seed), rule, SIZES)
        assert_equal(*both(monkeypatch, lambda c=case: speculative.verify(**c)), case)


@pytest.mark.parametrize("rule", verify_module.TREE_RULES)
def test_trees(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(5):
        case = samples.make_tree_case(samples.generator(51, seed), rule, SIZES)
        assert_equal(*both(monkeypatch, lambda c=case: speculative.verify_tree(**c)), case)


@pytest.mark.parametrize("race", [False, True])
def test_draft_steps(race: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(4):
        rng = samples.generator(52, seed)
        size = int(rng.choice(SIZES))
        logits = samples.make_logits(rng, 3, size, dtype=samples.DTYPES[seed % 3])
        case = {"seeds": torch.arange(3), "positions": torch.arange(3), "race": race}
        case |= samples.make_warp(rng, 3, size)
        assert_equal(*both(monkeypatch, lambda x=logits, c=case: speculative.propose(x, **c)), case)


@pytest.mark.parametrize("name", OPS)
def test_samples(name: str) -> None:
    for args in samples.VALID[name]():
        detached = [a.detach() if isinstance(a, Tensor) else a for a in args]
        expected = getattr(torch.ops.alignops, name)(*detached)
        for found, t in zip(OPS[name](*detached), expected, strict=True):
            assert torch.equal(found, t), (name, args)


@pytest.mark.parametrize("name", OPS)
def test_errors(name: str) -> None:
    for sample in samples.INVALID[name]():
        with pytest.raises(ValueError, match=sample.argument):
            OPS[name](*sample.args)
