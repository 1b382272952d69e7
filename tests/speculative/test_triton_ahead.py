"""Kernels compiled for GPUs that need not be there: decisions rest on roundings, one by one."""

from __future__ import annotations

import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if sys.platform != "linux":
    pytest.skip("ptxas comes with triton on Linux only", allow_module_level=True)


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    from tests import triton_ahead

    return triton_ahead.run("tests.speculative.triton_ahead")


def test_all_kernels_compile(compiled: list[dict[str, Any]]) -> None:
    from tests.speculative import triton_ahead

    assert {entry["kernel"] for entry in compiled} == set(triton_ahead.names())
    for entry in compiled:
        assert entry["cubin"] > 0, entry


def test_products_and_sums_are_rounded_one_by_one(compiled: list[dict[str, Any]]) -> None:
    assert sum(entry["products"] for entry in compiled) > 100
    for entry in compiled:
        assert entry["fused32"] == 0, entry
        # exp and log of float64 are sequences of fused operations: `typical` is not to the bit.
        if not entry["typical"]:
            assert entry["fused64"] == entry["loose"] == 0, entry


def test_nothing_is_spilled(compiled: list[dict[str, Any]]) -> None:
    for entry in compiled:
        assert entry["stack"] == 0, entry
