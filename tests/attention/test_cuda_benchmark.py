"""The benchmark on GPUs, on the CPU: its peers compute what ours does."""

from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize("pattern", ["1 segment", "headers", "8 segments"])
@pytest.mark.parametrize("workers", [1, 3])
def test_peers_agree(pattern: str, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks import bench_attention_cuda as bench
    from benchmarks.attention_layouts import make
    from benchmarks.shapes import AttentionShape

    shape = AttentionShape("tiny", 1, 6, 2, 32)
    case = bench.Case(shape, make(pattern, 400, workers), 2, "cpu", torch.float32)
    found = bench.contestants(case)
    assert {"ours", "per block", "per pair", "dense"} == set(found)
    expected = [found["ours"](layer).clone() for layer in range(2)]
    for run in found.values():
        for layer in range(2):
            torch.testing.assert_close(run(layer), expected[layer], rtol=1e-4, atol=1e-4)
    bench.check(case, found)
    assert case.bytes == 2 * case.layout.tokens * 2 * 32 * 4
