"""Several Python threads on one weight or model, release of the GIL, fork after use."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import alignops
from alignops import ternary
from tests.ternary.test_convert import TOKENS, Model

THREADS = 8


@pytest.fixture(autouse=True)
def _switch_often() -> Any:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(call: Callable[[int], Any]) -> list[Any]:
    """`call(i)` from THREADS threads that start together."""
    barrier = threading.Barrier(THREADS)

    def run(i: int) -> Any:
        barrier.wait()
        return call(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def test_first_use_packs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = ternary.quantize(torch.randn(300, 640))
    x = torch.randn(2, 640)
    expected = alignops.ternary_linear(x, source)
    packs = []
    real = ternary.ops.ternary_prepack
    monkeypatch.setattr(
        ternary.ops, "ternary_prepack", lambda *args: packs.append(1) or real(*args)
    )
    for _ in range(10):
        weight = ternary.TernaryWeight.zeros((300, 640), device="meta")
        for name in ("idx", "sign", "scale"):
            setattr(weight, name, getattr(source, name))
        packs.clear()
        results = at_once(lambda _, w=weight: alignops.ternary_linear(x, w))
        assert all(torch.equal(y, expected) for y in results)
        assert len(packs) == 1


def test_release_while_others_compute() -> None:
    weight = ternary.quantize(torch.randn(100, 320))
    x = torch.randn(1, 320)
    expected, dense = alignops.ternary_linear(x, weight), weight.dequantize()

    def call(i: int) -> bool:
        for _ in range(30):
            if i == 0:
                weight.prepack(release=True)
            elif i == 1:
                if not torch.equal(weight.dequantize(), dense):
                    return False
            elif not torch.equal(alignops.ternary_linear(x, weight), expected):
                return False
        return True

    assert all(at_once(call))


@pytest.mark.parametrize("shared_input", [False, True])
def test_siblings(shared_input: bool) -> None:
    """A fused model called from several threads gives every caller its own result."""
    model = Model()
    ternary.convert(model, fuse=True, progress=False)
    block = model.layers[0]
    inputs = [torch.randn(3, 64) for _ in range(1 if shared_input else THREADS)]
    with torch.no_grad():
        expected = [block(x) for x in inputs]

    def call(i: int) -> bool:
        with torch.no_grad():
            i %= len(inputs)
            return all(torch.equal(block(inputs[i]), expected[i]) for _ in range(50))

    assert all(at_once(call))


def test_models_in_threads() -> None:
    model = Model().bfloat16()
    ternary.convert(model, head="int8", progress=False)
    run = torch.no_grad()(model)  # the mode belongs to the thread
    expected = run(TOKENS)
    results = at_once(lambda _: run(TOKENS))
    assert all(torch.equal(y, expected) for y in results)


def test_the_interpreter_is_free_during_a_call() -> None:
    """Python runs in another thread while one long product is computed."""
    weight = ternary.quantize(torch.randn(2048, 2048))
    x = torch.randn(256, 2048)
    ticks = 0
    running = threading.Event()
    done = threading.Event()

    def tick() -> None:
        nonlocal ticks
        running.set()
        while not done.wait(0.0005):
            ticks += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    running.wait()
    before = ticks
    for _ in range(20):
        alignops.ternary_linear(x, weight, act="none")
        if ticks - before > 3:
            break
    during = ticks - before
    done.set()
    ticker.join()
    assert during > 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_use() -> None:
    code = """
import os, torch, alignops
from alignops import ternary
torch.manual_seed(0)
weight = ternary.quantize(torch.randn(2048, 1024))
x = torch.randn(4, 1024)
torch.set_num_threads(1)
y = alignops.ternary_linear(x, weight)
child = os.fork()
if child == 0:
    w = ternary.quantize(torch.randn(64, 64))
    alignops.ternary_linear(torch.randn(1, 64), w)
    os._exit(0 if torch.equal(alignops.ternary_linear(x, weight), y) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
