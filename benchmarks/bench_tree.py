"""Tree core: searches whose model is a table."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks import timing, tree_cases
from benchmarks.tree_cases import Case, Model


@pytest.mark.parametrize("shape", tree_cases.SHAPES[:2], ids=str)
def test_bookkeeping(benchmark: Callable[..., object], shape: tuple[int, int, int]) -> None:
    case = Case(*shape)
    model = Model(case)
    runner = timing.Runner("alignops", lambda: tree_cases.bookkeeping(model), case.total)
    store = benchmark(runner.run)
    assert int(store.column("fn")[:, 0].sum()) == case.total + case.trees  # type: ignore[attr-defined]
