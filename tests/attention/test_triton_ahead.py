"""Attention kernels compiled for GPUs that need not be there: they fit, and use what is there."""

from __future__ import annotations

import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if sys.platform != "linux":
    pytest.skip("ptxas comes with triton on Linux only", allow_module_level=True)

# What a program may have on GPUs with the least, those of compute capability 8.6 and 8.9.
SHARED_BYTES = 99 * 1024


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    from tests import triton_ahead

    return triton_ahead.run("tests.attention.triton_ahead")


def test_all_kernels_compile(compiled: list[dict[str, Any]]) -> None:
    from alignops.triton_kernels import attention
    from tests import triton_ahead

    assert {entry["kernel"] for entry in compiled} == set(triton_ahead.kernels_of(attention))
    for entry in compiled:
        assert entry["cubin"] > 0, entry


def test_shared_memory(compiled: list[dict[str, Any]]) -> None:
    for entry in compiled:
        assert entry["shared"] <= SHARED_BYTES, entry


def test_products_of_16_bits_use_tensor_cores_and_tiles_are_copied_ahead(
    compiled: list[dict[str, Any]],
) -> None:
    attend = [entry for entry in compiled if entry["kernel"] == "attend_kernel"]
    for entry in attend:
        assert (entry["tensor_cores"] > 0) == (entry["q"] != "torch.float32"), entry
        assert (entry["async_copies"] > 0) == (entry["q"] != "torch.float32"), entry


def test_spills(compiled: list[dict[str, Any]]) -> None:
    """Rotations at borders of segments may spill; writes and the merge do not."""
    for entry in compiled:
        limit = 600 if entry["kernel"] == "attend_kernel" else 0
        assert entry["stack"] <= limit, entry
