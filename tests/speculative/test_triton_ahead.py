"""Kernels compiled for GPUs that need not be there: decisions rest on roundings, one by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if sys.platform != "linux":
    pytest.skip("ptxas comes with triton on Linux only", allow_module_level=True)


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """In a process of its own: here kernels are interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.speculative.triton_ahead"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


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
