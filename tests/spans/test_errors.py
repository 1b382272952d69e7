"""Invalid arguments: native code and fake kernels raise the same about the same argument."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from alignops.spans import ops
from alignops.spans.ops import IndexTensors
from tests.spans.samples import INVALID, Invalid, make_surprisal, ragged, random_corpus

LABELS = [(name, i) for name, make in INVALID.items() for i, _ in enumerate(make())]


def one(name: str, index: int) -> Invalid:
    return list(INVALID[name]())[index]


@pytest.mark.parametrize(("name", "index"), LABELS, ids=str)
def test_native_and_fake_refuse_alike(name: str, index: int) -> None:
    sample = one(name, index)
    op = getattr(torch.ops.alignops, name)
    pattern = f"^{name}: {sample.argument} must "
    with pytest.raises(ValueError, match=pattern):
        op(*sample.args)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        args = pytree.tree_map_only(torch.Tensor, mode.from_tensor, sample.args)
        with pytest.raises(ValueError, match=pattern):
            op(*args)


@pytest.mark.parametrize("token", [-1, 300, 2**40])
def test_ids_outside_the_vocabulary(token: int) -> None:
    corpus = random_corpus(2)
    surprisal, zero = make_surprisal(corpus), torch.zeros(1, 1).long()
    bad, good = ragged([[0, token]]), ragged([[0, 0]])
    cand = torch.tensor([[token]])
    for call in (
        lambda: ops.find(corpus.index, *bad),
        lambda: ops.next_counts(corpus.index, *bad, zero),
        lambda: ops.peek(corpus.index, *bad, zero, surprisal),
    ):
        with pytest.raises(IndexError, match=rf"tokens must lie in \[0, .*, got {token} at 1"):
            call()
    for call in (
        lambda: ops.next_counts(corpus.index, *good, cand),
        lambda: ops.peek(corpus.index, *good, cand, surprisal),
    ):
        with pytest.raises(IndexError, match=rf"cand must lie in .*, got {token} at 0"):
            call()


def test_the_separator_is_no_token() -> None:
    corpus = random_corpus(2)
    with pytest.raises(IndexError, match="no match crosses the end of a document"):
        ops.find(corpus.index, *ragged([[65535]]))


@pytest.mark.parametrize("offsets", [[1, 2], [0, 1], [0, 3, 2], [0, -1, 2]])
def test_offsets_that_do_not_fit(offsets: list[int]) -> None:
    corpus = random_corpus(2)
    with pytest.raises(ValueError, match="spans_find: offsets must"):
        ops.find(corpus.index, torch.zeros(2).long(), torch.tensor(offsets))


def test_damaged_arrays() -> None:
    """Positions outside the text, in any order, and ranks outside SUF: an error or an answer."""
    corpus = random_corpus(22)
    text, suf, first = corpus.index
    rows = [d[i : i + 6] for d in corpus.docs for i in range(0, len(d) - 6, 3)]
    assert rows
    cand = torch.zeros(len(rows), 3).long()
    bad_suf = torch.full((len(suf),), 2**32 - 1).to(torch.uint32)
    for damaged in (
        IndexTensors(text, bad_suf, first),
        IndexTensors(text, suf, first + 1),
        IndexTensors(text, suf, first * 0 + 2**62),
        IndexTensors(text, suf, -first),
    ):
        for call in (
            lambda d: ops.find(d, *ragged(rows)),
            lambda d: ops.next_counts(d, *ragged(rows), cand),
            lambda d: ops.peek(d, *ragged(rows), cand, make_surprisal(corpus)),
        ):
            with pytest.raises(ValueError, match=r"(suf|first) must"):
                call(damaged)
    shuffled = suf.to(torch.int64)[torch.randperm(len(suf))].to(torch.uint32)
    with contextlib.suppress(ValueError):
        ops.find(IndexTensors(text, shuffled, first), *ragged(rows))


def test_surprisals_must_be_finite() -> None:
    corpus = random_corpus(2)
    surprisal = make_surprisal(corpus)
    surprisal[0] = float("nan")
    with pytest.raises(ValueError, match=r"spans_peek: surprisal must be finite .* for token 0"):
        ops.peek(corpus.index, *ragged([[0]]), torch.zeros(1, 1).long(), surprisal)


def test_arguments_of_the_penalty() -> None:
    x, ones = -torch.rand(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match="carrier must be one of unlikelihood, logp, got 'p'"):
        ops.cbd_penalty(x, ones > 0, ones, "p")
    with pytest.raises(ValueError, match="weights must not require a gradient"):
        ops.cbd_penalty(x, ones > 0, ones.requires_grad_())
