"""Small random corpora and queries for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Docs = list[list[int]]


class Corpus(NamedTuple):
    """Documents over ids below `vocab_size`, of which `alphabet` are in use."""

    docs: Docs
    vocab_size: int
    alphabet: list[int]


def random_corpus(rng: np.random.Generator, longest: int = 300) -> Corpus:
    """Few or many ids; empty documents, copies of documents and of runs, runs of one id."""
    size = int(rng.choice([1, 2, 3, 5, 8, 50_000]))
    vocab_size = int(rng.choice([size, 255 if size < 255 else size, 65_535, 100_000]))
    vocab_size = max(vocab_size, size)
    used = min(size, 400)
    alphabet = np.sort(rng.choice(vocab_size, used, replace=False)).tolist()
    docs: Docs = []
    left = int(rng.integers(0, longest + 1))
    while left > 0 or not docs:
        length = int(rng.integers(0, left + 1)) if rng.random() < 0.9 else 0
        kind = rng.random()
        if kind < 0.2 and docs:
            doc = list(docs[rng.integers(len(docs))])
        elif kind < 0.3:
            doc = [alphabet[rng.integers(used)]] * length
        elif kind < 0.5 and length > 3:
            period = rng.integers(used, size=rng.integers(1, 4))
            doc = [alphabet[int(period[i % len(period)])] for i in range(length)]
        else:
            doc = [alphabet[i] for i in rng.integers(used, size=length)]
        docs.append(doc)
        left -= len(doc) + 1
    return Corpus(docs, vocab_size, alphabet)


def random_query(rng: np.random.Generator, corpus: Corpus, longest: int = 24) -> list[int]:
    """Pieces of documents, joined, sometimes with one id changed or an id that never occurs."""
    query: list[int] = []
    for _ in range(int(rng.integers(0, 4))):
        doc = corpus.docs[rng.integers(len(corpus.docs))]
        start = int(rng.integers(len(doc) + 1))
        query += doc[start : start + int(rng.integers(0, longest))]
    if query and rng.random() < 0.5:
        query[rng.integers(len(query))] = int(rng.choice(corpus.alphabet))
    if rng.random() < 0.2:
        query.append(int(rng.integers(corpus.vocab_size)))
    return query


def ragged(rows: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Flat ids and offsets."""
    offsets = np.cumsum([0, *(len(row) for row in rows)]).tolist()
    return [t for row in rows for t in row], offsets


def shard_size(docs: Docs, shards: int) -> int:
    """A `shard_tokens` that gives at most about this many shards."""
    text = sum(len(doc) + 1 for doc in docs)
    return max(-(-text // shards), max(len(doc) + 1 for doc in docs), 2)
