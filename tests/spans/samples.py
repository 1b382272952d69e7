"""Valid and invalid inputs of every span op: for parity, opcheck and errors.

A valid sample is a tuple of arguments of `torch.ops.alignops.<op>`; an invalid one also names the
argument that the error message must name.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignops.reference.spans import NaiveIndex
from alignops.spans.ops import NO_LIMIT, IndexTensors

TEXT_DTYPES = (torch.uint8, torch.uint16, torch.uint32)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Invalid:
    """Arguments that must be refused with a ValueError about `argument`."""

    label: str
    args: tuple[Any, ...]
    argument: str


@dataclass
class Corpus:
    """Documents, the naive index over them, and the same as tensors."""

    docs: list[list[int]]
    naive: NaiveIndex
    index: IndexTensors

    @property
    def vocab(self) -> int:
        return self.naive.vocab_size


def make_corpus(
    docs: list[list[int]], vocab: int, dtype: torch.dtype = torch.uint16, packed: bool = False
) -> Corpus:
    naive = NaiveIndex(docs, vocab)
    separator = torch.iinfo(dtype).max
    text = [t for doc in docs for t in [*doc, separator]]
    suf = torch.tensor(naive.suffixes.tolist(), dtype=torch.int64)
    pointers = (
        torch.stack([(suf >> (8 * i)) & 255 for i in range(5)], 1).to(torch.uint8)
        if packed
        else suf.to(torch.uint32)
    )
    first = torch.from_numpy(np.concatenate(([0], np.cumsum(naive.counts))))
    index = IndexTensors(torch.tensor(text, dtype=torch.int64).to(dtype), pointers, first)
    return Corpus(docs, naive, index)


def random_corpus(seed: int, dtype: torch.dtype = torch.uint16, packed: bool = False) -> Corpus:
    """Random documents and repeats of their pieces, over 1 to 300 ids."""
    rng = np.random.default_rng(seed)
    vocab = int(rng.choice([1, 2, 5, 60, 300 if dtype != torch.uint8 else 255]))
    docs: list[list[int]] = []
    for _ in range(rng.integers(0, 10)):
        doc: list[int] = []
        for _ in range(rng.integers(0, 4)):
            other = docs[rng.integers(len(docs))] if docs else []
            start = int(rng.integers(0, len(other) + 1))
            doc += other[start : start + int(rng.integers(0, 40))]
            doc += rng.integers(0, vocab, rng.integers(0, 20)).tolist()
        docs.append(doc)
    return make_corpus([*docs, [0]], vocab, dtype, packed)


def random_rows(corpus: Corpus, seed: int, count: int = 20) -> list[list[int]]:
    """Pieces of documents, joined and changed; some empty."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        row: list[int] = []
        for _ in range(rng.integers(0, 3)):
            doc = corpus.docs[rng.integers(len(corpus.docs))]
            start = int(rng.integers(0, len(doc) + 1))
            row += doc[start : start + int(rng.integers(0, 40))]
            row += rng.integers(0, corpus.vocab, rng.integers(0, 2)).tolist()
        rows.append(row)
    return rows


def ragged(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens and offsets."""
    flat = torch.tensor([t for row in rows for t in row], dtype=torch.int64)
    return flat, torch.tensor(np.cumsum([0, *map(len, rows)]), dtype=torch.int64)


def make_candidates(corpus: Corpus, rows: list[list[int]], seed: int, width: int = 5) -> Tensor:
    """Random ids, and what follows the last token of the row somewhere."""
    rng = np.random.default_rng(seed)
    cand = rng.integers(0, corpus.vocab, (len(rows), width))
    for r, row in enumerate(rows):
        for doc in corpus.docs:
            after = [b for a, b in itertools.pairwise(doc) if row and a == row[-1]]
            if after and width:
                cand[r, rng.integers(width)] = after[rng.integers(len(after))]
    return torch.from_numpy(cand)


def make_surprisal(corpus: Corpus) -> Tensor:
    return -torch.from_numpy(corpus.naive.unigram).clamp(min=1e-9).log()


def _indexes() -> Iterator[Corpus]:
    for seed, dtype in enumerate(TEXT_DTYPES):
        yield random_corpus(seed, dtype, packed=seed == 1)


def _find() -> Iterator[tuple[Any, ...]]:
    for corpus in _indexes():
        yield (*corpus.index, *ragged(random_rows(corpus, 1)))
    yield (*corpus.index, *ragged([]))


def _next_counts() -> Iterator[tuple[Any, ...]]:
    for corpus in _indexes():
        rows = random_rows(corpus, 2)
        yield (*corpus.index, *ragged(rows), make_candidates(corpus, rows, 3))
    yield (*corpus.index, *ragged(rows), make_candidates(corpus, rows, 3, 0))


def _peek() -> Iterator[tuple[Any, ...]]:
    for args, corpus in zip(_next_counts(), _indexes(), strict=False):
        yield (*args, make_surprisal(corpus), 4.0, 2, NO_LIMIT)
        yield (*args, make_surprisal(corpus), 1.0, 1, 2)


def _bad_index(op_args: tuple[Any, ...]) -> Iterator[Invalid]:
    """`op_args` are valid arguments; the text is uint16, suf uint32."""
    text, suf, first, *rest = op_args
    signed, packed = text.to(torch.int32), torch.zeros(len(suf), 4, dtype=torch.uint8)
    yield Invalid("text of int32", (signed, suf, first, *rest), "text")
    yield Invalid("text as matrix", (text[None], suf, first, *rest), "text")
    yield Invalid("text with strides", (text[::2], suf, first, *rest), "text")
    yield Invalid("suf of int64", (text, suf.to(torch.int64), first, *rest), "suf")
    yield Invalid("suf as matrix", (text, suf[:, None], first, *rest), "suf")
    yield Invalid("suf of 4 bytes", (text, packed, first, *rest), "suf")
    yield Invalid("suf longer than text", (text[: len(suf) - 1], suf, first, *rest), "suf")
    yield Invalid("first of int32", (text, suf, first.to(torch.int32), *rest), "first")
    yield Invalid("first as matrix", (text, suf, first[None], *rest), "first")
    yield Invalid("first without elements", (text, suf, first[:0], *rest), "first")
    many = torch.zeros(2**16 + 1, dtype=torch.int64)
    yield Invalid("too many ids", (text, suf, many, *rest), "first")


def _bad_rows(op_args: tuple[Any, ...]) -> Iterator[Invalid]:
    index, (tokens, offsets, *rest) = op_args[:3], op_args[3:]
    yield Invalid("tokens of int32", (*index, tokens.to(torch.int32), offsets, *rest), "tokens")
    yield Invalid("tokens as matrix", (*index, tokens[None], offsets, *rest), "tokens")
    wide = tokens.repeat_interleave(2)[::2]
    yield Invalid("tokens with strides", (*index, wide, offsets, *rest), "tokens")
    yield Invalid("offsets of int32", (*index, tokens, offsets.to(torch.int32), *rest), "offsets")
    yield Invalid("no offsets", (*index, tokens, offsets[:0], *rest), "offsets")


def _one(samples: Callable[[], Iterator[tuple[Any, ...]]]) -> tuple[Any, ...]:
    """The arguments with a text of uint16, and a suf of uint32."""
    args = next(a for a in samples() if a[0].dtype == torch.uint16)
    suf = args[1].to(torch.int64)
    places = sum(suf[:, i] << (8 * i) for i in range(5))
    return (args[0], torch.as_tensor(places).to(torch.uint32), *args[2:])


def _bad_find() -> Iterator[Invalid]:
    yield from _bad_index(_one(_find))
    yield from _bad_rows(_one(_find))


def _bad_candidates(op_args: tuple[Any, ...]) -> Iterator[Invalid]:
    head, (cand, *rest) = op_args[:5], op_args[5:]
    yield Invalid("cand of int32", (*head, cand.to(torch.int32), *rest), "cand")
    yield Invalid("cand as vector", (*head, cand[:, 0].contiguous(), *rest), "cand")
    yield Invalid("cand of fewer rows", (*head, cand[1:], *rest), "cand")
    yield Invalid("cand with strides", (*head, cand[:, ::2], *rest), "cand")


def _bad_next_counts() -> Iterator[Invalid]:
    for make in (_bad_index, _bad_rows, _bad_candidates):
        yield from make(_one(_next_counts))


def _bad_peek() -> Iterator[Invalid]:
    args = _one(_peek)
    for make in (_bad_index, _bad_rows, _bad_candidates):
        yield from (i for i in make(args) if i.label != "too many ids")
    head, (surprisal, tau, min_len, limit) = args[:6], args[6:]
    single = surprisal.float()
    yield Invalid("surprisal of float32", (*head, single, tau, min_len, limit), "surprisal")
    yield Invalid("short surprisal", (*head, surprisal[1:], tau, min_len, limit), "surprisal")
    yield Invalid("infinite tau", (*head, surprisal, float("inf"), min_len, limit), "tau")
    yield Invalid("tau of NaN", (*head, surprisal, float("nan"), min_len, limit), "tau")
    yield Invalid("min_len of 0", (*head, surprisal, tau, 0, limit), "min_len")
    yield Invalid("max_count of 0", (*head, surprisal, tau, min_len, 0), "max_count")


def make_logps(*shape: int) -> Tensor:
    """From almost certain to impossible."""
    p = torch.rand(*shape) ** 3
    logps = (1 - p).log()
    flat = logps.view(-1)
    for i, value in enumerate((0.0, -1e-7, -1e-6, -0.6931, -19.0, -25.0, -float("inf"), 5e-5)):
        flat[i::16] = value
    return logps


def _penalty() -> Iterator[tuple[Any, ...]]:
    for i, shape in enumerate(((3, 40), (33,), (2, 3, 17), (4, 0), (0, 7))):
        for dtype in (*DTYPES, torch.float64):
            logps = make_logps(*shape).to(dtype).clamp(max=0).requires_grad_()
            weights = torch.rand(shape) * (torch.rand(shape) > 0.6)
            yield logps, torch.rand(shape) > 0.3, weights, i % 2
    strided = make_logps(8, 5).clamp(max=0).t()
    yield strided, torch.rand(5, 8) > 0.3, torch.rand(5, 8), 0


def _bad_penalty() -> Iterator[Invalid]:
    logps, mask, weights = -torch.rand(3, 4), torch.ones(3, 4, dtype=torch.bool), torch.ones(3, 4)
    yield Invalid("integers", (logps.long(), mask, weights, 0), "logps")
    yield Invalid("scalar", (logps[0, 0], mask[0, 0], weights[0, 0], 0), "logps")
    yield Invalid("mask of int64", (logps, mask.long(), weights, 0), "mask")
    yield Invalid("mask of other rows", (logps, mask[1:], weights, 0), "mask")
    yield Invalid("weights of float64", (logps, mask, weights.double(), 0), "weights")
    yield Invalid("weights with strides", (logps, mask, weights.t().contiguous().t(), 0), "weights")
    yield Invalid("weights as vector", (logps, mask, weights[0], 0), "weights")
    yield Invalid("carrier of 2", (logps, mask, weights, 2), "carrier")


VALID: dict[str, Callable[[], Iterator[tuple[Any, ...]]]] = {
    "spans_find": _find,
    "spans_next_counts": _next_counts,
    "spans_peek": _peek,
    "spans_cbd_penalty": _penalty,
}

INVALID: dict[str, Callable[[], Iterator[Invalid]]] = {
    "spans_find": _bad_find,
    "spans_next_counts": _bad_next_counts,
    "spans_peek": _bad_peek,
    "spans_cbd_penalty": _bad_penalty,
}
