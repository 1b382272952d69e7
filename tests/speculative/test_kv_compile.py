"""torch.compile(fullgraph=True) of every function on caches and layouts, and numbers of threads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils import _pytree as pytree

from alignops.speculative import kv, layout
from tests.speculative.samples_kv import TREE, cache, ints, packed_cache

PATH = (ints(1, 0), ints([0, 2, 3], [0, 1, 5]), ints(3, 3))
SHIFT = (ints(0, 2), ints(1, 0), ints(4, 3))


def shift_and_read(caches: list[Tensor], *plan: Tensor) -> Tensor:
    """A later reader in the graph sees the moved slots."""
    kv.kv_shift_(caches, *plan)
    return caches[0].sum((1, 3))


FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "plan_realign": (kv.plan_realign, (ints(5, 3), ints(0, 2), ints(1, 3))),
    "kv_shift_": (kv.kv_shift_, (cache(), *SHIFT)),
    "kv_shift_ and a reader": (shift_and_read, (cache(), *SHIFT)),
    "kv_gather": (kv.kv_gather, (cache(), ints(1, 1, 0))),
    "kv_tree_": (kv.kv_tree_, (cache(), *PATH)),
    "kv_paged_tree_": (kv.kv_paged_tree_, (cache(1, 4, 3), ints([1, 2], [0, 3]), *PATH)),
    "kv_packed": (kv.kv_packed, (packed_cache(9), ints(0, 4, 9), ints(0, 4, 9))),
    "ragged_append_": (kv.ragged_append_, (cache(), cache(2, 2, 2), ints(1, 4), ints(2, 1))),
    "build_positions": (layout.build_positions, (ints(5, 1), 3)),
    "build_mask": (layout.build_mask, (ints(5, 1), 3, 9)),
    "build_tree": (layout.build_tree, (torch.tensor([TREE[0], TREE[0]]),)),
    "select_tree": (layout.select_tree, (torch.tensor([[-1.0, -2.0]]), ints([-1, 0]), 2)),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_in_one_graph(name: str) -> None:
    function, args = FUNCTIONS[name]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    eager_args = copy.deepcopy(args)
    expected = function(*eager_args)
    for _ in range(2):
        own_args = copy.deepcopy(args)
        got = compiled(*own_args)
        pairs = zip(
            pytree.tree_leaves((got, own_args)),
            pytree.tree_leaves((expected, eager_args)),
            strict=True,
        )
        for a, b in pairs:
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert counter.frame_count == 1


def test_growing_masks_compile_once_more() -> None:
    """The number of slots is dynamic: a cache that grows does not mean a graph per length."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layout.build_mask, fullgraph=True, backend=counter)
    for slots in range(9, 20):
        (mask,) = compiled(ints(5, 1), 3, slots)
        assert torch.equal(mask, layout.build_mask(ints(5, 1), 3, slots)[0])
    assert counter.frame_count == 2


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_results_do_not_depend_on_threads() -> None:
    """Caches of a few MiB, so that strips are spread over threads."""
    found = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        caches = [
            (torch.arange(4 * 3 * 500 * 64) % 9973).float().view(4, 3, 500, 64) for _ in range(6)
        ]
        plan = [torch.tensor(t) for t in ([0, 9, 100, 3], [7, 0, 90, 3], [490, 491, 400, 490])]
        kv.kv_shift_(caches, *plan)
        new = [t[:, :, :40] * 2 for t in caches]
        kv.ragged_append_(caches, new, torch.tensor([0, 460, 17, 300]))
        rows = torch.tensor([3, 0, 0, 2, 1])
        gathered = kv.kv_gather(caches, rows)
        masks = layout.build_mask(torch.tensor([900, 1, 800, 0]), 64, 1000, windows=(0, 300))
        found.append((*caches, *gathered, *masks))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
