"""The operators on GPUs, interpreted: the results and the errors of the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from alignops.attention import _triton
from alignops.attention import ops as attention_ops
from tests.attention import samples, workspace_runs

kernels = pytest.importorskip("alignops.triton_kernels.attention", reason="needs triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda.py compares on a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

OPS: dict[str, Callable[..., Any]] = {
    "attention_concurrent_": _triton._attend,
    "attention_append_": _triton._append,
    "attention_rewrite_": _triton._rewrite,
}


def copied(args: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.clone, args)


@pytest.mark.parametrize("name", OPS)
def test_samples(name: str) -> None:
    """What is left in the arguments; scratch memory of the CPU is enough for these."""
    for args in samples.VALID[name]():
        expected, found = copied(args), copied(args)
        getattr(torch.ops.alignops, name)(*expected)
        OPS[name](*found)
        tensors = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
        exact = all(t.dtype not in (torch.float16, torch.bfloat16) for t in tensors)
        for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
            if isinstance(a, Tensor) and a.dtype.is_floating_point:
                tolerance = 2e-5 if exact else 2e-3 if a.dtype == torch.float32 else 1e-2
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OPS)
def test_errors(name: str) -> None:
    for sample in samples.INVALID[name]():
        with pytest.raises(ValueError, match=f"^{name}: {sample.argument} must "):
            OPS[name](*sample.args)


@pytest.mark.parametrize(("rope_mode", "visibility"), [("raw", "inclusive"), ("local", "lagged")])
def test_workspaces(rope_mode: str, visibility: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans as they are made, appended keys, moved pages."""
    run = workspace_runs.run
    expected = list(run("cpu", torch.float32, rope_mode, visibility))
    with monkeypatch.context() as patch:
        patch.setattr(attention_ops, "_op", SimpleNamespace(**OPS))
        found = list(run("cpu", torch.float32, rope_mode, visibility))
    for results, wanted in zip(found, expected, strict=True):
        for a, b in zip(results, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", OPS)
def test_fake_tensors_on_a_gpu(name: str) -> None:
    """torch.compile traces the operators for tensors that are on no device here."""
    op = getattr(torch.ops.alignops, name)
    valid, invalid = list(samples.VALID[name]()), list(samples.INVALID[name]())
    mode = FakeTensorMode()

    def to_gpu(t: Tensor) -> Tensor:
        with torch.device("meta"):
            meta = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
        return mode.fake_tensor_converter.from_meta_and_device(mode, meta, torch.device("cuda"))

    for args in valid:
        with mode:
            op(*pytree.tree_map_only(Tensor, to_gpu, args))
    for sample in invalid:
        with mode, pytest.raises(ValueError, match=f"^{name}: {sample.argument} must "):
            op(*pytree.tree_map_only(Tensor, to_gpu, sample.args))


def test_scratch() -> None:
    """Enough for one part of a short plan, for all parts of a long one."""
    short, long = (samples.step(longest=3).words.clone() for _ in range(2))
    long[9] = 100_000
    rows, blocks = int(short[3]), int(short[5])
    device = torch.device("cpu")
    for mass in (False, True):
        arguments = (128, 40, 8, 96, mass)
        small, large = (_triton.scratch_bytes(p, device, *arguments) for p in (short, long))
        for size in (2, 4):
            shape = kernels.Shape(rows, 40, 8, 128, 96, size, blocks if mass else 0)
            assert small >= shape.scratch_bytes(1)
            assert large >= shape.scratch_bytes(shape.most_parts(8))
        assert large <= 4 * shape.scratch_bytes(shape.most_parts(8))
    assert _triton.scratch_bytes(short, device, 128, 40, 8, 96, False) <= 1 << 20
