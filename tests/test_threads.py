"""Results do not depend on the number of threads, and torch.set_num_threads is obeyed."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import alignops
from alignops import ternary

OPS = torch.ops.alignops
COUNTS = (1, 2, 3, 5)


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same(results: list[tuple[torch.Tensor, ...]]) -> bool:
    return all(
        torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)
    )


def test_quantize_is_independent_of_threads(isa: str) -> None:
    w = torch.randn(700, 576)
    results = []
    for count in COUNTS:
        torch.set_num_threads(count)
        results.append((*OPS.ternary_quantize(w, 64, 1), *OPS.ternary_int8_quantize(w)))
    assert same(results)


@pytest.mark.parametrize("act", ["none", "a8", "a8g", "a16"])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_linear_is_independent_of_threads(isa: str, act: str, tokens: int) -> None:
    weight = ternary.quantize(torch.randn(700, 576))
    x = torch.randn(tokens, 576)
    results = []
    for count in COUNTS:
        torch.set_num_threads(count)
        results.append((alignops.ternary_linear(x, weight, act=act),))
    assert same(results)


# In a process that has run nothing else, each further thread of the pool belongs to our call.
POOL = """
import re, sys, numpy, torch, alignops
def threads():
    return int(re.search(r"Threads:\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.set_num_threads(int(sys.argv[1]))
w = torch.from_numpy(numpy.ones((4096, 1024), numpy.float32))  # filled without torch's threads
before = threads()
torch.ops.alignops.ternary_quantize(w, 1024, 1)
print(threads() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads through /proc")
@pytest.mark.parametrize("count", [1, 2, 4])
def test_set_num_threads_is_obeyed(count: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    output = subprocess.check_output(
        [sys.executable, "-c", POOL, str(count)], text=True, env=environment
    )
    assert int(output) == count - 1
