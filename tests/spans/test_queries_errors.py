"""What queries refuse, and that damaged files never give a wrong answer."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignops.spans import (
    DistributedIndex,
    IndexCorruptError,
    LocalBackend,
    SpanIndex,
    build_index,
)
from alignops.testing import span_index
from tests.spans.corpora import ragged

VOCAB = 10
Call = Callable[[SpanIndex, Any], Any]

# Every call with token ids, by the name of its argument.
CALLS: dict[str, tuple[str, Call]] = {
    "count": ("q", lambda index, q: index.count(q)),
    "find": ("q", lambda index, q: index.find(q)),
    "locate": ("q", lambda index, q: index.locate(q)),
    "longest_prefix": ("x", lambda index, x: index.longest_prefix(x)),
    "longest_suffix": ("x", lambda index, x: index.longest_suffix(x)),
    "matching_stats": ("x", lambda index, x: index.matching_stats(x)),
    "maximal_spans": ("x", lambda index, x: index.maximal_spans(x)),
    "attribute": ("x", lambda index, x: index.attribute(x)),
    "next_counts": ("ctx", lambda index, ctx: index.next_counts(ctx, [1])),
    "next_dist": ("ctx", lambda index, ctx: index.next_dist(ctx)),
    "eos_count": ("ctx", lambda index, ctx: index.eos_count(ctx)),
    "ngram_prob": ("ctx", lambda index, ctx: index.ngram_prob(ctx, 1)),
    "infgram_prob": ("ctx", lambda index, ctx: index.infgram_prob(ctx, 1)),
}
CANDIDATES: dict[str, tuple[str, Call]] = {
    "next_counts": ("cand", lambda index, cand: index.next_counts([1], cand)),
    "maximal_spans": ("delimiters", lambda index, t: index.maximal_spans([1, 2], delimiters=t)),
}
BATCHES: dict[str, Callable[[SpanIndex, Any, Any], Any]] = {
    "count_batch": lambda index, ids, offsets: index.count_batch(ids, offsets),
    "find_batch": lambda index, ids, offsets: index.find_batch(ids, offsets),
    "matching_stats_batch": lambda index, ids, offsets: index.matching_stats_batch(ids, offsets),
    "maximal_spans_batch": lambda index, ids, offsets: index.maximal_spans_batch(ids, offsets),
}


@pytest.fixture(scope="module", params=["one process", "backends"])
def index(request: pytest.FixtureRequest) -> SpanIndex | DistributedIndex:
    docs = [[1, 2, 1, 2], [], [2, 1]]
    if request.param == "one process":
        return span_index(docs, VOCAB, token_bits=16)
    parts = [span_index(part, VOCAB, token_bits=16) for part in (docs[:2], docs[2:])]
    return DistributedIndex([LocalBackend([part]) for part in parts])


def refused(kind: type[Exception], text: str) -> Any:
    return pytest.raises(kind, match="^" + re.escape(text))


CASES = [(op, *case) for table in (CALLS, CANDIDATES) for op, case in table.items()]


@pytest.mark.parametrize(("op", "argument", "call"), CASES, ids=lambda case: str(case)[:20])
def test_ids_outside_the_vocabulary(index: SpanIndex, op: str, argument: str, call: Call) -> None:
    text = f"{op}: {argument} must hold ids in [0, {VOCAB}), got "
    for bad in (-1, VOCAB, 2**31 - 1, 2**40, -(2**63)):
        with refused(IndexError, f"{text}{bad} at 2"):
            call(index, [1, 2, bad, 1])
    with refused(IndexError, f"{text}65535 at 0, the separator of documents"):
        call(index, np.array([65535, 1], np.uint16))
    with refused(IndexError, f"{text}{2**63 - 1} at 0"):
        call(index, np.array([2**64 - 1], np.uint64))
    with refused(IndexError, f"{op}: {argument} must be below 2^63, got {2**70}"):
        call(index, [1, 2**70])
    call(index, [VOCAB - 1])  # legal, though it never occurs


@pytest.mark.parametrize(("op", "argument", "call"), CASES, ids=lambda case: str(case)[:20])
def test_other_things_than_ids(index: SpanIndex, op: str, argument: str, call: Call) -> None:
    for bad in ([1.0], np.array([1.0]), torch.tensor([1.0]), [True], ["a"], [None], 1.5):
        with refused(TypeError, f"{op}: {argument} must be integers, got "):
            call(index, bad)
    for shape in ((), (1, 1), (0, 3)):
        with refused(ValueError, f"{op}: {argument} must have 1 dimensions, got shape {shape}"):
            call(index, np.zeros(shape, np.int64))
    with refused(ValueError, f"{op}: {argument} must be on the CPU, got device meta"):
        call(index, torch.zeros(3, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("op", BATCHES)
def test_batches(index: SpanIndex, op: str) -> None:
    call = BATCHES[op]
    for offsets in ([1, 3], [0, 2], [0, 4], []):
        with refused(ValueError, f"{op}: offsets must begin with 0 and end with 3"):
            call(index, [1, 2, 1], offsets)
    with refused(ValueError, f"{op}: offsets must not decrease, got 2 and then 1 at 2"):
        call(index, [1, 2, 1], [0, 2, 1, 3])
    with refused(TypeError, f"{op}: offsets must be integers, got float64"):
        call(index, [1], [0.0, 1.0])
    with refused(ValueError, f"{op}: offsets must have 1 dimensions"):
        call(index, [1], [[0, 1]])
    with refused(IndexError, f"{op}: ids must hold ids in [0, {VOCAB}), got 10 at 1"):
        call(index, [1, 10], [0, 1, 2])
    with refused(TypeError, f"{op}: ids must be integers, got float64"):
        call(index, [1.5], [0, 1])
    call(index, [], [0])
    call(index, [], [0, 0, 0])


@pytest.mark.parametrize(
    ("kind", "text", "call"),
    [
        (ValueError, "maximal_spans: min_len must be at least 1, got 0", {"min_len": 0}),
        (TypeError, "maximal_spans: min_len must be an integer, got float", {"min_len": 1.0}),
        (ValueError, "maximal_spans: max_count must not be negative, got -1", {"max_count": -1}),
        (TypeError, "maximal_spans: max_count must be an integer, got str", {"max_count": "1"}),
        (
            ValueError,
            "maximal_spans: word_start must have one entry per token, 3, got 2",
            {"word_start": [True, False]},
        ),
        (
            TypeError,
            "maximal_spans: word_start must be booleans, got float64",
            {"word_start": [0.5] * 3},
        ),
        (
            ValueError,
            "maximal_spans: word_start must have 1 dimension, got shape (1, 3)",
            {"word_start": [[True] * 3]},
        ),
    ],
    ids=str,
)
def test_span_options(
    index: SpanIndex, kind: type[Exception], text: str, call: dict[str, Any]
) -> None:
    with refused(kind, text):
        index.maximal_spans([1, 2, 1], **call)
    with refused(kind, text.replace("maximal_spans", "maximal_spans_batch")):
        index.maximal_spans_batch([1, 2, 1], [0, 3], **call)
    with refused(kind, text.replace("maximal_spans", "attribute")):
        index.attribute([1, 2, 1], **call)


def test_other_arguments(index: SpanIndex) -> None:
    with refused(ValueError, "locate: limit must not be negative, got -1"):
        index.locate([1], -1)
    with refused(TypeError, "locate: limit must be an integer, got float"):
        index.locate([1], 2.0)  # type: ignore[arg-type]
    with refused(ValueError, "next_dist: max_support must be at least 1, got 0"):
        index.next_dist([1], max_support=0)
    with refused(ValueError, "attribute: share must not be negative, got -1"):
        index.attribute([1], share=-1)
    with refused(ValueError, "attribute: documents must not be negative, got -1"):
        index.attribute([1], documents=-1)
    with refused(ValueError, "attribute: preset must be paper or None, got 'x'"):
        index.attribute([1], preset="x")  # type: ignore[arg-type]
    for d in (-1, 3):
        with refused(IndexError, f"document: d must lie in [0, 3), got {d}"):
            index.document(d)
    with refused(IndexError, f"ngram_prob: t must hold ids in [0, {VOCAB}), got 10 at 0"):
        index.ngram_prob([1], 10)
    with refused(TypeError, "infgram_prob: t must be an integer, got list"):
        index.infgram_prob([1], [1])  # type: ignore[arg-type]


def test_empty_queries(index: SpanIndex) -> None:
    assert index.count([]) == 6
    assert index.find([])[:, 1].sum() == 6
    assert index.matching_stats([]).tolist() == []
    assert [a.tolist() for a in index.maximal_spans([])] == [[], [], []]
    assert index.attribute([]) == []
    assert index.longest_suffix([])[:2] == (0, 6)
    assert index.next_counts([1], []).tolist() == []
    assert index.eos_count([]) == 0
    assert len(index.locate([1], 0).shard) == 0


# Damage


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index whose text and suffixes have several blocks of checksums."""
    rng = np.random.default_rng(5)
    docs = [rng.integers(0, 300, size=2000) for _ in range(60)]
    docs += docs[:3]
    folder = tmp_path_factory.mktemp("large") / "index"
    build_index(docs, folder, vocab_size=300, fingerprint="test", directory_tokens=0)
    return folder


def queries() -> tuple[list[int], list[int]]:
    rng = np.random.default_rng(6)
    return ragged([rng.integers(0, 300, size=3).tolist() for _ in range(40)])


def answers(index: SpanIndex) -> list[list[int]]:
    ids, offsets = queries()
    lengths, counts = index.matching_stats_batch(ids, offsets, counts=True)
    return [
        index.count_batch(ids, offsets).tolist(),
        lengths.tolist(),
        counts.tolist(),
        index.next_counts(ids[:1], range(300)).tolist(),
        [a.tolist() for a in index.next_dist(ids[:1])[:2]],
        [a.tolist() for a in index.locate(ids[:1], 50)],
    ]


def damaged(large: Path, folder: Path, name: str, byte: int) -> Path:
    copy = folder / "index"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(large, copy)
    with (copy / name).open("r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ 0x10]))
    return copy


def test_flipped_bits_are_never_counted(large: Path, tmp_path: Path) -> None:
    with SpanIndex.open(large) as index:
        expected = answers(index)
    rng = np.random.default_rng(7)
    seen = 0
    for i in range(60):
        name = ("tok.0", "suf.0")[i % 2]
        size = (large / name).stat().st_size
        folder = damaged(large, tmp_path, name, int(rng.integers(4096, size)))
        error = ""
        try:
            with SpanIndex.open(folder) as index:
                got = answers(index)
        except IndexCorruptError as caught:
            error = str(caught)
            seen += 1
        assert name in error if error else got == expected
    assert seen > 30


def test_quick_checks_bound_every_pointer(large: Path, tmp_path: Path) -> None:
    """Without checksums of all blocks, wild positions are still refused."""
    with SpanIndex.open(large) as index:
        ((lo, _),) = index.find([150]).tolist()
    folder = damaged(large, tmp_path, "suf.0", 4096 + 4 * lo)
    with (folder / "suf.0").open("r+b") as file:
        file.seek(4096 + 4 * lo)
        file.write(b"\xff" * 4)
    with (
        pytest.raises(IndexCorruptError, match=r"suf\.0"),
        SpanIndex.open(folder, verify="quick") as index,  # which may sample the place
    ):
        index.locate([150], 10_000)


@pytest.mark.parametrize("name", ["tok.0", "suf.0"])
def test_a_file_that_shrinks_while_open(large: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "index"
    shutil.copytree(large, folder)
    with SpanIndex.open(folder) as index:
        answers(index)
        os.truncate(folder / name, 8192)
        for call in (index.count, index.matching_stats, index.locate, index.next_dist):
            with pytest.raises(IndexCorruptError, match=re.escape(name)):
                call([1, 2])
