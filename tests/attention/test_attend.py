"""The attention operator against the formula in float64, on every instruction set and dtype."""

import functools
from typing import Any

import numpy as np
import pytest
import torch

from tests.attention import plans, samples

DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
CASES = {
    "plain": (plans.Shape(), {}),
    "one row per worker, many workers": (plans.Shape(group=7), {"workers": 7}),
    "chunks": (plans.Shape(d=64, dv=64, pairs=32), {"length": 900, "longest": 3}),
    "long prompt": (plans.Shape(group=5), {"workers": 1, "longest": 90, "blocks": 1}),
    "heads of 80": (plans.Shape(d=80, dv=80, pairs=16, offset=0), {"longest": 2}),
    "heads of 128, one": (plans.Shape(kv_heads=1, group=1, d=128, dv=128, pairs=64), {}),
    "D != Dv, offset": (
        plans.Shape(d=40, dv=24, pairs=8, offset=24, interleaved=True, group=1),
        {"longest": 9, "raw": False},
    ),
    "odd columns": (plans.Shape(d=7, dv=5, pairs=3, group=2), {"longest": 2}),
    "no rotation": (plans.Shape(rope=False, sinks=True), {"longest": 4}),
    "window": (plans.Shape(window=37, interleaved=True), {"longest": 20, "weights": True}),
    "softcap, weights": (
        plans.Shape(softcap=5.0, sinks=True, group=8),
        {"weights": True, "longest": 5, "workers": 3},
    ),
    "large pages": (plans.Shape(), {"page_size": 128, "length": 300, "workers": 4}),
}


def difference(found: torch.Tensor, expected: np.ndarray) -> float:
    """The largest one; infinities are equal."""
    wanted = torch.from_numpy(expected)
    both = found.double() - wanted
    return float(torch.where(found.double() == wanted, 0.0, both).abs().max())


@functools.cache
def sample(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> list[tuple[Any, ...]]:
    """Steps with arguments and what is expected of them; what no segment has is NaN."""
    shape, options = CASES[name]
    rng, generator = np.random.default_rng(len(name)), torch.Generator().manual_seed(len(name))
    found = []
    for _ in range(2):
        step = plans.make(rng, pairs=shape.pairs, **options)
        q = plans.queries(step, shape, dtypes[0], generator)
        k, v = plans.pool(step, shape, dtypes[1], generator, float("nan"))
        sinks = torch.randn(shape.heads, generator=generator) if shape.sinks else None
        wanted = plans.expected(step, shape, q, k, v, shape.d**-0.5, sinks)
        found.append((step, q, k, v, sinks, wanted))
    return found


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_formula(
    isa: str, name: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    shape = CASES[name][0]
    exact = dtypes[0] == torch.float32
    for step, q, k, v, sinks, wanted in sample(name, dtypes):
        out, lse, mass = plans.attend(step, shape, q, k, v, scale=shape.d**-0.5, sinks=sinks)
        assert difference(out, wanted[0]) <= (2e-5 if exact else 2e-2)
        assert difference(lse, wanted[1]) <= (1e-5 if exact else 2e-3)
        assert difference(mass, wanted[2]) <= (1e-5 if exact else 2e-3)
        if sinks is None:
            total = mass.double().sum(-1)
            assert ((total - 1).abs() <= 1e-5).logical_or(lse == -torch.inf).all()


def test_results_do_not_depend_on_threads() -> None:
    shape = CASES["chunks"][0]
    step, q, k, v, *_ = sample("chunks", DTYPES[0])[0]
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(plans.attend(step, shape, q, k, v, scale=0.1))
    torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
def test_nan_of_a_row_stays_in_it(isa: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """In a query: its row. In a key or a value: the rows that see it."""
    shape = plans.Shape(d=64, dv=64, pairs=32)
    rng, generator = np.random.default_rng(4), torch.Generator().manual_seed(4)
    step = plans.make(rng, workers=3, longest=5, pairs=32, length=100)
    q = plans.queries(step, shape, dtypes[0], generator)
    k, v = plans.pool(step, shape, dtypes[1], generator)
    clean = plans.attend(step, shape, q, k, v, scale=0.1)
    for bad in (torch.nan, torch.inf):
        spoilt = q.clone()
        spoilt[1, 2, 3] = bad
        found = plans.attend(step, shape, spoilt, k, v, scale=0.1)
        assert found[0][1, 2].isnan().all()
        for a, b in zip(found, clean, strict=True):
            a[1, 2] = b[1, 2]
            assert torch.equal(a, b)
    # The newest key of each worker is seen by the rows from there on.
    for row, (w, t, slot, _) in enumerate(step.tables["rows"]):
        for cache in (k, v):
            other = cache.clone()
            other[slot // step.page_size, 0, slot % step.page_size, 5] = torch.nan
            pair = (other, v) if cache is k else (k, other)
            found = plans.attend(step, shape, q, *pair, scale=0.1)[0]
            assert found[row, 0].isnan().any()
            for u, (worker, at, _, _) in enumerate(step.tables["rows"]):
                if worker == w and at < t:
                    assert torch.equal(found[u], clean[0][u])


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_huge_scores(isa: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    shape = plans.Shape(d=64, dv=64, pairs=32)
    rng, generator = np.random.default_rng(6), torch.Generator().manual_seed(6)
    step = plans.make(rng, workers=2, longest=3, pairs=32, length=300)
    q = plans.queries(step, shape, dtypes[0], generator)
    k, v = plans.pool(step, shape, dtypes[1], generator)
    for scale in (1e3, -1e3, 0.0):
        out, lse, mass = plans.attend(step, shape, q, k, v, scale=scale)
        assert out.isfinite().all()
        assert lse.isfinite().all()
        assert ((mass.double().sum(-1) - 1).abs() <= 1e-5).all()


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing(isa: str, sinks: bool) -> None:
    rng, generator = np.random.default_rng(8), torch.Generator().manual_seed(8)
    shape = plans.Shape(pairs=16)
    step = plans.make(rng, workers=2, longest=2, weights=True)
    step.tables["bias"][:, 0] = -np.inf  # of the first worker all blocks are hidden
    step = plans.encode(step.tables, step.page_size, step.pages)
    rows = [i for i, row in enumerate(step.tables["rows"]) if row[0] == 0]
    assert rows
    q = plans.queries(step, shape, torch.float32, generator)
    k, v = plans.pool(step, shape, torch.float32, generator, float("nan"))
    sink = torch.randn(shape.heads) if sinks else None
    out, lse, mass = plans.attend(step, shape, q, k, v, scale=1.0, sinks=sink)
    assert (out[rows] == 0).all()
    assert (mass[rows] == 0).all()
    assert torch.allclose(
        lse[rows], torch.full((shape.heads,), -torch.inf) if sink is None else sink
    )


def test_no_rows_and_no_segments(isa: str) -> None:
    shape = plans.Shape(rope=False)
    tables = {
        "segments": [],
        "pairs": [],
        "bias": np.zeros((0, 2)),
        "gain": np.ones((0, 2)),
        "blocks": 1,
        "raw": True,
        "omega": np.ones(4),
    }
    k = torch.full((1, 2, 16, 32), torch.nan)
    for rows in ([], [(1, 0, 3, 3)]):
        row_ptr = [0, 0, len(rows)]
        step = plans.encode({**tables, "rows": rows, "row_ptr": row_ptr}, 16, 1)
        q = torch.randn(len(rows), shape.heads, 32)
        out, lse, mass = plans.attend(step, shape, q, k, k, scale=1.0)
        assert (out == 0).all()
        assert (mass == 0).all()
        assert (lse == -torch.inf).all()


@pytest.mark.parametrize("what", ["pages", "rows", "magic", "mass", "scratch", "page_size", "rope"])
def test_plans_that_do_not_fit_are_refused(what: str) -> None:
    """With the word at fault; fake kernels cannot see it."""
    args = list(next(samples.VALID["attention_concurrent_"]()))
    words = args[3].clone()
    argument = "plan"
    if what == "pages":
        args[1], args[2] = args[1][:-8], args[2][:-8]
    elif what == "rows":
        args[0], args[11], args[12], args[13] = (args[i][1:] for i in (0, 11, 12, 13))
        argument = "q"
    elif what == "magic":
        words[0] += 1
    elif what == "mass":
        args[13] = args[13][..., 1:].contiguous()
        argument = "mass"
    elif what == "scratch":
        args[14] = args[14][:1000]
        argument = "scratch"
    elif what == "page_size":
        args[1], args[2] = (t[:, :, :8].contiguous() for t in args[1:3])
        argument = "k"
    else:
        args[5] = 1
        argument = "rope"
    args[3] = words
    with pytest.raises(ValueError, match=f"^attention_concurrent_: {argument} must "):
        torch.ops.alignops.attention_concurrent_(*args)


def test_compiles_as_one_graph() -> None:
    args = next(samples.VALID["attention_concurrent_"]())

    def step(q: torch.Tensor, k_new: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        v_new, k, v, plan, scratch = rest
        torch.ops.alignops.attention_append_(k_new, v_new, plan, 0, 2, False, k, v)
        out = q.new_empty(*q.shape[:2], v.shape[3])
        torch.ops.alignops.attention_concurrent_(
            q, k, v, plan, None, 0, 2, False, 0.3, 0.0, 0, out, None, None, scratch
        )
        return out

    q, k, v, plan, scratch = args[0], args[1], args[2], args[3], args[14]
    new = torch.randn(len(q), 2, 20), torch.randn(len(q), 2, 24)
    caches = k.clone(), v.clone()
    expected = step(q, *new, k, v, plan, scratch)
    found = torch.compile(step, fullgraph=True)(q, *new, *caches, plan, scratch)
    assert torch.equal(found, expected)
    assert torch.equal(caches[0], k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_lose_little_more_than_dense_attention_does(isa: str, dtype: torch.dtype) -> None:
    """Errors against float64 are at most 1.5 times those of SDPA in the same dtype, plus 1e-5."""
    shape = plans.Shape(kv_heads=2, group=5, d=128, dv=128, pairs=64, rope=False)
    generator = torch.Generator().manual_seed(9)
    n, page_size = 700, 16
    pages = -(-n // page_size)
    tables = {
        "segments": [(0, n, 0, 0, 0, list(range(pages)))],
        "pairs": [[{"state": plans.VISIBLE, "limit0": n, "distance0": n, "delta0": n}]],
        "bias": np.zeros((1, 1)),
        "gain": np.ones((1, 1)),
        "rows": [(0, t, t, t) for t in range(4)],
        "row_ptr": [0, 4],
        "blocks": 1,
        "raw": True,
        "omega": np.ones(64),
    }
    step = plans.encode(tables, page_size, pages)
    q = plans.queries(step, shape, dtype, generator)
    k, v = plans.pool(step, shape, dtype, generator)
    scale = shape.d**-0.5
    out, _, _ = plans.attend(step, shape, q, k, v, scale=scale)
    wanted, _, _ = plans.expected(step, shape, q, k, v, scale, None)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1),
        *(t.transpose(0, 1).flatten(1, 2)[:, :n].repeat_interleave(5, 0) for t in (k, v)),
    ).transpose(0, 1)
    assert difference(out, wanted) <= 1.5 * difference(dense, wanted) + 1e-5
