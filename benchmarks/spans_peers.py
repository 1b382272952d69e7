"""Other indexes of token corpora behind one interface: infini-gram and tokengrams.

Both are called as directly as their packages allow, without the checks of arguments that
infini-gram's Python layer adds. infini-gram runs without its prefetching, which starts a thread per
query and costs more than it saves once the index is in memory; with it, it is a contestant of its
own where queries are counted.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Protocol

from benchmarks import corpus

Span = tuple[int, int, int]  # start, end, occurrences


class Peer(Protocol):
    """An opened index."""

    name: str

    def count(self, query: list[int]) -> int: ...

    def next_counts(self, context: list[int]) -> dict[int, int]:
        """Occurrences of each token behind `context`."""


class InfiniGram:
    """An index that `infini_gram.indexing` built in `folder`."""

    package = "infini-gram"

    def __init__(self, folder: Path, *, prefetch: bool = False, unigrams: bool = False) -> None:
        from infini_gram.engine import InfiniGramEngine

        self.name = "infini-gram, prefetching" if prefetch else "infini-gram"
        depths = ("ds_prefetch_depth", "sa_prefetch_depth", "od_prefetch_depth")
        self._engine = InfiniGramEngine(
            index_dir=str(folder),
            eos_token_id=0,
            vocab_size=corpus.VOCABULARY,
            token_dtype="u16",
            precompute_unigram_logprobs=unigrams,  # a search per token of the vocabulary
            **({} if prefetch else dict.fromkeys(depths, 0)),
        ).engine

    def count(self, query: list[int]) -> int:
        return self._engine.count(input_ids=query).count

    def next_counts(self, context: list[int]) -> dict[int, int]:
        # Its default: counts of a sample where the context is frequent.
        found = self._engine.ntd(prompt_ids=context, max_support=1000)
        return {token: entry.cont_cnt for token, entry in found.result_by_token_id.items()}

    def attribute(self, completion: list[int], max_count: int) -> list[Span]:
        """Maximal spans that occur at most `max_count` times, with pointers to their documents."""
        found = self._engine.attribute(
            input_ids=completion, delim_ids=[], min_len=1, max_cnt=max_count, enforce_bow=False
        )
        return [(span.l, span.r, span.count) for span in found.spans]


class Tokengrams:
    """The index of `text` that tokengrams built in `folder`."""

    name = package = "tokengrams"

    def __init__(self, folder: Path, text: Path) -> None:
        from tokengrams import MemmapIndex

        self._index = MemmapIndex(str(text), str(folder / "index"), vocab=1 << 16)

    def count(self, query: list[int]) -> int:
        return self._index.count(query)

    def next_counts(self, context: list[int]) -> dict[int, int]:
        return {t: n for t, n in enumerate(self._index.count_next(context)) if n}


def installed(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def check_counts(name: str, ours: list[int], theirs: list[int], queries: list[list[int]]) -> None:
    """Equal answers, or there is nothing to compare.

    Raises:
        RuntimeError: names the first query with different counts.
    """
    for a, b, query in zip(ours, theirs, queries, strict=True):
        if a != b:
            raise RuntimeError(f"{name} counts {b} occurrences of {query}, alignops {a}")
