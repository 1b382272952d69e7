"""The operators on tensors against the definitions, and as torch sees them."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignops import spans
from alignops.reference import spans as reference
from alignops.spans import ops
from alignops.spans.ops import IndexTensors
from tests.spans.samples import (
    DTYPES,
    TEXT_DTYPES,
    Corpus,
    make_candidates,
    make_logps,
    make_surprisal,
    ragged,
    random_corpus,
    random_rows,
)

CARRIERS = ("unlikelihood", "logp")


def corpora() -> Iterator[Corpus]:
    for seed in range(30):
        yield random_corpus(seed, TEXT_DTYPES[seed % 3], packed=seed % 2 == 1)


# Searches


def test_find(isa: str) -> None:
    for seed, corpus in enumerate(corpora()):
        rows = random_rows(corpus, seed)
        found = ops.find(corpus.index, *ragged(rows))
        assert found.tolist() == [corpus.naive.find(row)[0].tolist() for row in rows]


def test_next_counts(isa: str) -> None:
    for seed, corpus in enumerate(corpora()):
        rows = random_rows(corpus, seed)
        cand = make_candidates(corpus, rows, seed)
        counts = ops.next_counts(corpus.index, *ragged(rows), cand)
        wanted = [corpus.naive.next_counts(r, c) for r, c in zip(rows, cand.tolist(), strict=True)]
        assert (counts.numpy() == np.stack(wanted)).all()


@pytest.mark.parametrize("max_count", [None, 2])
def test_peek(isa: str, max_count: int | None) -> None:
    flags = 0
    for seed, corpus in enumerate(corpora()):
        rows = random_rows(corpus, seed)
        cand, surprisal = make_candidates(corpus, rows, seed), make_surprisal(corpus)
        tau, min_len = 3.0 + seed % 3, 1 + seed % 4
        peek = ops.peek(corpus.index, *ragged(rows), cand, surprisal, tau, min_len, max_count)
        for r, row in enumerate(rows):
            for k, token in enumerate(cand[r].tolist()):
                longer = [*row, token]
                length, count, _ = corpus.naive.longest_suffix(longer)
                bci = sum(surprisal[longer[len(longer) - length :]].tolist())
                assert peek.length[r, k] == length
                assert peek.count[r, k] == count
                assert peek.bci[r, k].item() == pytest.approx(bci, abs=1e-9)
                rare = max_count is None or count <= max_count
                flag = length >= min_len and rare and peek.bci[r, k].item() > tau
                assert peek.flag[r, k].item() == flag
                flags += flag
    assert flags > 0


def test_empty_arguments() -> None:
    corpus = random_corpus(3)
    assert ops.find(corpus.index, *ragged([])).shape == (0, 2)
    assert ops.find(corpus.index, *ragged([[]])).tolist() == [[0, corpus.naive.n_tokens]]
    none = torch.empty(2, 0, dtype=torch.int64)
    assert ops.next_counts(corpus.index, *ragged([[], [0]]), none).shape == (2, 0)
    peek = ops.peek(corpus.index, *ragged([[], [0]]), none, make_surprisal(corpus))
    assert peek.flag.shape == (2, 0)
    text = torch.tensor([255], dtype=torch.uint8)
    empty = IndexTensors(text, torch.empty(0, dtype=torch.uint32), torch.zeros(4).long())
    rows, cand = ragged([[], [1, 2]]), torch.tensor([[0], [2]])
    assert ops.find(empty, *rows).tolist() == [[0, 0], [0, 0]]
    assert ops.next_counts(empty, *rows, cand).tolist() == [[0], [0]]
    peek = ops.peek(empty, *rows, cand, torch.ones(3).double())
    assert [t.tolist() for t in peek] == [[[False], [False]], *[[[0], [0]]] * 3]


def test_views_at_an_offset() -> None:
    """Slices of larger tensors, down to the last element of their memory."""
    corpus = random_corpus(8)
    rows = random_rows(corpus, 8)
    tokens, offsets = ragged(rows)
    moved = IndexTensors(
        *(
            torch.cat([t.new_zeros(1), t])[1:] if t.dtype != torch.uint16 else t
            for t in corpus.index
        )
    )
    assert torch.equal(
        ops.find(moved, torch.cat([tokens[:0], tokens]), offsets),
        ops.find(corpus.index, tokens, offsets),
    )


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_independent_of_threads(threads: int) -> None:
    corpus = random_corpus(22)
    rows = random_rows(corpus, 5, 200)
    args = (corpus.index, *ragged(rows), make_candidates(corpus, rows, 5))
    rule = (make_surprisal(corpus), 2.0, 2)
    one = [ops.find(*args[:3]), ops.next_counts(*args), *ops.peek(*args, *rule)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        many = [ops.find(*args[:3]), ops.next_counts(*args), *ops.peek(*args, *rule)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


# Penalty


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(5, 64), (33,), (2, 3, 16)], ids=str)
def test_penalty(shape: tuple[int, ...], dtype: torch.dtype, carrier: str) -> None:
    logps = make_logps(*shape).to(dtype)
    mask, weights = torch.rand(shape) > 0.3, torch.rand(shape) * (torch.rand(shape) > 0.5)
    penalty = ops.cbd_penalty(logps, mask, weights, carrier)
    assert penalty.shape == shape[:-1]
    assert penalty.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    values = logps.double().clamp(min=-1e9)
    wanted = reference.cbd_penalty(values, mask, weights.double(), carrier)
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(penalty.double(), wanted, rtol=rtol, atol=1e-12)
    other = ops.penalty_on_gpu(logps, mask, weights, CARRIERS.index(carrier))
    assert other.dtype == penalty.dtype
    # 1 - p of a token near certainty has few bits in float32.
    torch.testing.assert_close(other, penalty, rtol=max(rtol, 1e-5), atol=1e-5)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_penalty_gradient(carrier: str) -> None:
    # Away from the two bounds, where the gradient is not that of differences.
    logps = (-torch.rand(3, 20, dtype=torch.float64) * 15 - 1e-3).requires_grad_()
    mask, weights = torch.rand(3, 20) > 0.3, torch.rand(3, 20) * (torch.rand(3, 20) > 0.5)
    assert torch.autograd.gradcheck(
        lambda x: ops.cbd_penalty(x, mask, weights, carrier), (logps,), fast_mode=False
    )
    (grad,) = torch.autograd.grad(ops.cbd_penalty(logps, mask, weights, carrier).sum(), logps)
    used = mask & (weights > 0)
    assert (grad[used] > 0).all()
    assert (grad[~used] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_equals_the_reference(dtype: torch.dtype) -> None:
    logps = make_logps(4, 64).clamp(-30, 0).to(dtype)
    mask, weights = torch.rand(4, 64) > 0.3, torch.rand(4, 64)
    scale = torch.randn(4)
    results = []
    for call, x in (
        (ops.cbd_penalty, logps.clone()),
        (reference.cbd_penalty, logps.double()),
    ):
        x.requires_grad_()
        call(x, mask, weights).to(torch.float64).mul(scale.double()).sum().backward()
        assert x.grad is not None
        results.append(x.grad.double())
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(
        results[0], results[1].to(dtype).double(), rtol=2 * max(unit, 1e-6), atol=1e-6
    )


def test_gradient_on_logits() -> None:
    """p_y for the token itself, -p_y p_j / (1 - p_y) for others: bounded, and of sum 0."""
    logits = torch.randn(6, 30, dtype=torch.float64).mul(3).requires_grad_()
    target = torch.randint(30, (6, 1))
    logps = logits.log_softmax(-1).gather(-1, target)[:, 0]
    ops.cbd_penalty(logps, torch.ones(6) > 0, torch.ones(6)).backward()
    p = logits.detach().softmax(-1)
    own = p.gather(-1, target)
    wanted = (-own * p / (1 - own)).scatter(-1, target, own)
    torch.testing.assert_close(logits.grad, wanted)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.sum(-1), torch.zeros(6, dtype=torch.float64))


def test_a_certain_token_keeps_a_gradient() -> None:
    logits = torch.tensor([[12.0, 0.0]], requires_grad=True)
    logps = logits.log_softmax(-1)[:, :1]
    ops.cbd_penalty(logps, torch.ones(1, 1) > 0, torch.ones(1, 1)).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] > 0.9


def test_padding_may_hold_anything() -> None:
    logps = torch.tensor([[-0.5, math.nan, math.inf, 3.0]], requires_grad=True)
    mask = torch.tensor([[True, False, False, False]])
    weights = torch.tensor([[1.0, math.nan, -1.0, 1.0]])
    penalty = ops.cbd_penalty(logps, mask, weights)
    penalty.sum().backward()
    assert penalty.item() == pytest.approx(-math.log(1 - math.exp(-0.5)))
    assert logps.grad is not None
    assert logps.grad[0, 1:].tolist() == [0, 0, 0]


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, 2e-4])
def test_bad_log_probabilities_name_the_row(value: float, carrier: str) -> None:
    logps = -torch.rand(5, 7)
    logps[3, 2] = logps[4, 1] = value
    ones = torch.ones(5, 7)
    with pytest.raises(ValueError, match=r"logps must be at most 0 .* in row 3 at 2"):
        ops.cbd_penalty(logps, ones > 0, ones * 0, carrier)
    logps[3:] = 5e-5
    ops.cbd_penalty(logps, ones > 0, ones, carrier)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_bad_weights_name_the_row(value: float) -> None:
    weights = torch.ones(5, 7)
    weights[2, 6] = value
    with pytest.raises(ValueError, match=r"weights must be finite .* in row 2 at 6"):
        ops.cbd_penalty(-torch.rand(5, 7), torch.ones(5, 7) > 0, weights)


# As torch sees them


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, backend="aot_eager")


def test_compile_searches() -> None:
    corpus = random_corpus(8)
    surprisal = make_surprisal(corpus)

    def search(tokens: Tensor, offsets: Tensor, cand: Tensor) -> tuple[Tensor, ...]:
        return (
            ops.find(corpus.index, tokens, offsets),
            ops.next_counts(corpus.index, tokens, offsets, cand),
            *ops.peek(corpus.index, tokens, offsets, cand, surprisal, 2.0, 2),
        )

    call = compiled(search)
    for seed, count in ((1, 4), (2, 9), (3, 20)):
        rows = random_rows(corpus, seed, count)
        args = (*ragged(rows), make_candidates(corpus, rows, seed))
        assert all(torch.equal(a, b) for a, b in zip(call(*args), search(*args), strict=True))


@pytest.mark.parametrize("carrier", CARRIERS)
def test_compile_penalty(carrier: str) -> None:
    mask, weights = torch.rand(3, 40) > 0.3, torch.rand(3, 40)

    def loss(logps: Tensor) -> Tensor:
        return ops.cbd_penalty(logps.log_softmax(-1), mask, weights, carrier).mean()

    grads = []
    for call in (loss, compiled(loss)):
        x = torch.linspace(-3, 3, 120).view(3, 40).requires_grad_()
        call(x).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_index_tensors_of_an_index(tmp_path: Any) -> None:
    docs = [[1, 2, 3, 1, 2], [], [4, 1, 2]]
    spans.build_index(docs, tmp_path / "u", vocab_size=9, fingerprint="test")
    naive = reference.NaiveIndex(docs, 9)
    with spans.SpanIndex.open(tmp_path / "u") as index:
        tensors = IndexTensors.load(index)
        with pytest.raises(IndexError, match="shard"):
            IndexTensors.load(index, 1)
    assert tensors.suf.tolist() == naive.suffixes.tolist()
    assert tensors.text.tolist() == [1, 2, 3, 1, 2, 255, 255, 4, 1, 2, 255]
    rows = [[1], [1, 2], [9 - 1], [2, 3], []]
    assert ops.find(tensors, *ragged(rows)).tolist() == [naive.find(r)[0].tolist() for r in rows]
