"""Keys and values inside the caches of transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from alignops.integrations.speculative import CacheView
from alignops.speculative import kv_gather, kv_shift_
from tests.speculative.models import model, prompts


def _filled(cache: Any) -> Any:
    ids = torch.stack(prompts([6, 6]))
    with torch.no_grad():
        model()(input_ids=ids, cache=cache, use_cache=True)
    return cache


def test_rows_of_a_library_cache_move_and_change_places() -> None:
    cache = _filled(DynamicCache(config=model().config))
    before = [t.clone() for t in CacheView(cache).tensors]
    assert len(before) == 4
    assert before[0].shape == (2, 2, 6, 4)
    one, two = torch.tensor([1, 2]), torch.tensor([0, 0])
    kv_shift_(CacheView(cache).tensors, one, two, torch.tensor([5, 4]))
    for old, new in zip(before, CacheView(cache).tensors, strict=True):
        assert torch.equal(new[0, :, :5], old[0, :, 1:])
        assert torch.equal(new[1, :, :4], old[1, :, 2:])
    view = CacheView(cache)
    moved = [t.clone() for t in view.tensors]
    view.replace(kv_gather(view.tensors, torch.tensor([1])))
    assert cache.get_seq_length() == 6
    assert all(
        torch.equal(t, old[1:]) for t, old in zip(CacheView(cache).tensors, moved, strict=True)
    )
    with pytest.raises(ValueError, match="tensors must be 4, got 1"):
        view.replace(moved[:1])


def test_caches_of_fixed_size_and_of_older_releases() -> None:
    cache = _filled(StaticCache(config=model().config, max_cache_len=16))
    assert CacheView(cache).tensors[0].shape == (2, 2, 16, 4)
    keys, values = ([torch.zeros(1, 1, 2, 1), torch.ones(1, 1, 2, 1)] for _ in range(2))
    older = SimpleNamespace(key_cache=keys, value_cache=values)
    view = CacheView(older)
    assert [t is k for t, k in zip(view.tensors, [keys[0], values[0]], strict=False)] == [True] * 2
    view.replace([t + 1 for t in view.tensors])
    assert older.value_cache[1].sum() == 4


def test_caches_that_are_refused() -> None:
    with pytest.raises(TypeError, match="SimpleNamespace"):
        CacheView(SimpleNamespace())
    cache = DynamicCache(config=model("sliding").config)
    with pytest.raises(NotImplementedError, match="drops slots"):
        CacheView(cache)
