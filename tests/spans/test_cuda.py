"""Every span op on a GPU, equal to the CPU to the last bit, with the samples of the CPU tests."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from alignops import spans
from alignops.spans import ops
from alignops.spans.ops import IndexTensors
from tests.spans.samples import (
    DTYPES,
    INVALID,
    TEXT_DTYPES,
    VALID,
    Corpus,
    make_candidates,
    make_corpus,
    make_logps,
    make_surprisal,
    ragged,
    random_corpus,
    random_rows,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

GPU = "cuda:0"


def to_gpu(args: Any) -> Any:
    return pytree.tree_map_only(
        torch.Tensor, lambda t: t.detach().to(GPU).requires_grad_(t.requires_grad), args
    )


def op(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.alignops, name)


def corpora() -> Iterator[Corpus]:
    for seed in range(40):
        yield random_corpus(seed, TEXT_DTYPES[seed % 3], packed=seed % 2 == 1)


def same(a: Any, b: Any) -> bool:
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in pairs)


def arguments(corpus: Corpus, seed: int, rows: int = 20) -> tuple[Any, ...]:
    lines = random_rows(corpus, seed, rows)
    cand = make_candidates(corpus, lines, seed)
    return corpus.index, *ragged(lines), cand, make_surprisal(corpus)


def search(
    index: IndexTensors, tokens: Tensor, offsets: Tensor, cand: Tensor, surprisal: Tensor
) -> tuple[Tensor, ...]:
    return (
        ops.find(index, tokens, offsets),
        ops.next_counts(index, tokens, offsets, cand),
        *ops.peek(index, tokens, offsets, cand, surprisal, 3.0, 2),
        *ops.peek(index, tokens, offsets, cand, surprisal, 1.0, 1, 2),
    )


# Searches


def test_searches_equal_those_of_the_cpu() -> None:
    for seed, corpus in enumerate(corpora()):
        args = arguments(corpus, seed)
        assert same(search(*to_gpu(args)), search(*args)), seed


def test_many_rows() -> None:
    args = arguments(random_corpus(8), 5, 3000)
    assert same(search(*to_gpu(args)), search(*args))


def test_long_matches() -> None:
    doc = torch.randint(50, (3000,)).tolist()
    corpus = make_corpus([doc], 50)
    rows = [doc[:n] for n in (0, 1, 30, 31, 32, 33, 63, 1000, 1023, 1024, 1025, 2999)]
    cand = torch.tensor([[doc[len(row)], (doc[len(row)] + 1) % 50] for row in rows])
    args = (corpus.index, *ragged(rows), cand, make_surprisal(corpus))
    assert same(search(*to_gpu(args)), search(*args))


def test_an_index_on_the_gpu(tmp_path: Path) -> None:
    """Loaded from files; peek equals that of the matcher with the same rows."""
    docs = [[1, 2, 3, 1, 2] * 30, [], [4, 1, 2]]
    rows = [docs[0][:40], [4, 1]]
    cand = torch.tensor([[1, 2, 3], [1, 2, 3]])
    spans.build_index(docs, tmp_path / "u", vocab_size=9, fingerprint="test")
    with spans.SpanIndex.open(tmp_path / "u") as index:
        tensors = IndexTensors.load(index, device=GPU)
        matcher = spans.SpanMatcher(index, batch=2)
        matcher.extend_prompt(rows)
        wanted = matcher.peek(cand, exact=True)
        surprisal = torch.from_numpy(spans.token_surprisal(range(9), index.unigram))
    peek = ops.peek(tensors, *to_gpu((*ragged(rows), cand, surprisal)))
    for name in ("flag", "length", "count", "bci"):
        assert getattr(peek, name).cpu().tolist() == getattr(wanted, name).tolist()


def test_values_that_do_not_exist() -> None:
    """They occur nowhere or are clamped; nothing outside the tensors is read."""
    corpus = random_corpus(22)
    index, tokens, offsets, cand, surprisal = to_gpu(arguments(corpus, 1))
    cand[:, 0], cand[:, 1], cand[:, 2] = -1, corpus.vocab, 2**62
    counts = ops.next_counts(index, tokens, offsets, cand)
    assert not counts[:, :3].any()
    peek = ops.peek(index, tokens, offsets, cand, surprisal)
    assert not peek.length[:, :3].any()
    ops.find(index, -tokens, offsets)
    ops.find(index, tokens, offsets * 1000 - 5)
    for damaged in (
        IndexTensors(index.text, torch.full_like(index.suf, 2**32 - 1), index.first),
        IndexTensors(index.text, index.suf, index.first * 1000 - 7),
    ):
        search(damaged, tokens, offsets, cand, surprisal)
    torch.cuda.synchronize()


# Penalty


@pytest.mark.parametrize("carrier", ["unlikelihood", "logp"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_penalty(dtype: torch.dtype, carrier: str) -> None:
    logps = make_logps(4, 300).clamp(-30, 0).to(dtype)
    mask, weights = torch.rand(4, 300) > 0.3, torch.rand(4, 300) * (torch.rand(4, 300) > 0.5)
    results = []
    for device in ("cpu", GPU):
        leaf = logps.to(device).requires_grad_()
        out = ops.cbd_penalty(leaf, mask.to(device), weights.to(device), carrier)
        out.sum().backward()
        assert leaf.grad is not None
        results.append((out.detach().cpu(), leaf.grad.cpu()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=max(1e-5, 2 * torch.finfo(a.dtype).eps), atol=1e-5)


def test_penalty_does_not_look_at_values() -> None:
    logps = torch.tensor([[-1.0, 2.0]], device=GPU)
    ones = torch.ones(1, 2, device=GPU)
    assert ops.cbd_penalty(logps, ones > 0, ones).isfinite().all()


# As torch sees them


@pytest.mark.parametrize("name", sorted(VALID))
def test_opcheck(name: str) -> None:
    for args in VALID[name]():
        torch.library.opcheck(op(name).default, to_gpu(args))


@pytest.mark.parametrize("name", sorted(INVALID))
def test_invalid_arguments(name: str) -> None:
    for sample in INVALID[name]():
        with pytest.raises(ValueError, match=f"^{name}: {sample.argument} must "):
            op(name)(*to_gpu(sample.args))


@pytest.mark.parametrize("name", sorted(VALID))
def test_mixed_devices_are_refused(name: str) -> None:
    args = next(iter(VALID[name]()))
    for i, value in enumerate(args):
        if i == 0 or not isinstance(value, Tensor):
            continue
        mixed = [v if j == i else to_gpu(v) for j, v in enumerate(args)]
        with pytest.raises(ValueError, match=f"^{name}: .* must be on "):
            op(name)(*mixed)


def test_cuda_graph() -> None:
    """A captured step answers for what its tensors hold at each replay."""
    corpus = random_corpus(22)
    args = to_gpu(arguments(corpus, 1))
    for _ in range(3):
        search(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = search(*args)
    cand = args[3]
    cand.copy_(torch.randint_like(cand, corpus.vocab))
    graph.replay()
    assert same(results, search(*args))


def test_current_stream() -> None:
    corpus = random_corpus(22)
    index, tokens, offsets, cand, surprisal = to_gpu(arguments(corpus, 1))
    expected = search(index, tokens, offsets, cand, surprisal)
    later = torch.zeros_like(cand)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        later.copy_(cand)
        results = search(index, tokens, offsets, later, surprisal)
        later.zero_()
    torch.cuda.synchronize()
    assert same(results, expected)


def test_compile() -> None:
    args = to_gpu(arguments(random_corpus(22), 1))
    compiled = torch.compile(search, fullgraph=True, backend="aot_eager")
    assert same(compiled(*args), search(*args))
