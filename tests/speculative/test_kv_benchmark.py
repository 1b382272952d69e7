"""The benchmark of cache moves: contestants do what they claim, and a shift allocates nothing."""

from pathlib import Path

import pytest
import torch

from alignops.speculative import kv
from alignops.speculative.layout import build_mask

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def test_a_shift_allocates_nothing() -> None:
    from benchmarks import speculative_kv_cases as cases
    from benchmarks.shapes import CACHES

    cache = cases.make_cache(CACHES["Qwen3-0.6B"], 64)
    assert cache.layers == 28
    assert cache.bytes_per_token == CACHES["Qwen3-0.6B"].bytes_per_token == 114688
    assert cases.allocated(cache) == 0
    # 59 MB are moved; what the interpreter needs in between is less than a tensor of the cache.
    assert cases.resident_growth(cache) < cache.tensors[0].nbytes


def test_there_and_back_again() -> None:
    from benchmarks import speculative_kv_cases as cases
    from benchmarks.shapes import CACHES

    cache = cases.make_cache(CACHES["Qwen3-0.6B"], 32, limit=0)
    assert cache.layers == 1
    before = [t.clone() for t in cache.tensors]
    there, back = cases.realignment(cache)
    assert cases.moved_bytes(cache, there) <= 2 * cache.nbytes
    kv.kv_shift_(cache.tensors, *there)
    for row in range(cases.ROWS):
        src, dst, length = (int(p[row]) for p in there)
        assert src != dst
        for old, new in zip(before, cache.tensors, strict=True):
            assert torch.equal(new[row, :, dst : dst + length], old[row, :, src : src + length])
    cases.shift(cache).run()
    cases.loop_of_copies(cache).run()
    cases.plain_copy(cache).run()
    assert all(torch.equal(*cache.tensors[i : i + 2]) for i in range(0, len(cache.tensors), 2))
    kv.kv_shift_(cache.tensors, *back)


def test_appends_agree() -> None:
    from benchmarks import speculative_kv_cases as cases
    from benchmarks.shapes import CACHES

    cache = cases.make_cache(CACHES["LLaMA-3-8B"], 32, limit=0)
    new, lens = cases.new_columns(cache), cases.lengths(32)
    before, found = [t.clone() for t in cache.tensors], []
    for runner in cases.appends(cache, new, lens)[:3]:
        for t, old in zip(cache.tensors, before, strict=True):
            t.copy_(old)
        runner.run()
        found.append([t.clone() for t in cache.tensors])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert not torch.equal(found[0][0], before[0])


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_agree(dtype: torch.dtype, window: int) -> None:
    from benchmarks import speculative_kv_cases as cases

    c = cases.lengths(64)
    (ours,) = build_mask(c, cases.DRAFTS + 1, 64, kind="additive", dtype=dtype, windows=(window,))
    assert torch.equal(ours, cases.mask_expression(c, 64, dtype, window))
