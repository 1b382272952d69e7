"""Looks up completions in the indexes of a filter and gathers what a person wants to see.

For every category: the maximal spans that its index contains, how often, how unlikely that is by
chance (BCI), the documents they come from with the text around them, and whether the filter
objects.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from alignops.spans.ends import Category
from alignops.spans.errors import TokenizerMismatchError
from alignops.spans.report import (
    IndexIdentity,
    Source,
    TracedCompletion,
    TracedSpan,
    TraceReport,
)
from alignops.spans.shield import TraceShield, Verdict
from alignops.spans.tokenizer import TextTokenizer, word_starts

__all__ = ["Sample", "trace"]

Ids = npt.NDArray[np.int64]


class Sample(NamedTuple):
    """A completion to trace: text, or token ids as the model gave them."""

    completion: str | Sequence[int]
    prompt: str | Sequence[int] = ""
    title: str = ""
    note: str = ""


def trace(
    samples: Iterable[Sample],
    shield: TraceShield,
    tokenizer: TextTokenizer,
    *,
    title: str = "Span trace",
    note: str = "",
    documents: int = 3,
    context: int = 40,
    max_spans: int = 40,
    min_len: int | None = None,
    words: bool = False,
    verdict: bool = True,
) -> TraceReport:
    """Trace completions to the documents of the indexes of a filter.

    Args:
        samples: completions with their prompts.
        shield: names the indexes, the threshold and what counts as unsafe.
        tokenizer: that the indexes were built with.
        title: of the report.
        note: a sentence about it.
        documents: places that are shown of each span, at most.
        context: tokens that are shown on either side of a place.
        max_spans: spans that are listed of each completion and category: those of largest BCI.
        min_len: tokens of the shortest span shown; default: the filter's.
        words: let spans begin and end with words. The filter's verdict does not depend on it.
        verdict: False if the indexes hold nothing unsafe: spans are shown, nothing is judged.

    Returns:
        TraceReport: plain data; `rich.print` shows it, `save` writes a page.

    Raises:
        TokenizerMismatchError: the tokenizer is not that of an index.
        IndexError: a sample has an id outside the vocabulary.
        OSError: an index is damaged or missing.
    """
    for category in shield.categories:
        _check_tokenizer(category.index, tokenizer, category.name)
    tracer = _Tracer(shield, tokenizer, documents, context, max_spans, min_len, words, verdict)
    return TraceReport(
        title=title,
        completions=[tracer.completion(s, n) for n, s in enumerate(samples, 1)],
        threshold=shield.tau,
        parameters=tracer.parameters(),
        indexes=list(_identities(shield)),
        created=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        note=note,
    )


class _Tracer:
    """One trace: what it looks for, and where."""

    def __init__(
        self,
        shield: TraceShield,
        tokenizer: TextTokenizer,
        documents: int,
        context: int,
        max_spans: int,
        min_len: int | None,
        words: bool,
        verdict: bool,
    ) -> None:
        self.shield, self.tokenizer = shield, tokenizer
        self.documents, self.context, self.max_spans = documents, context, max_spans
        self.min_len = shield.min_len if min_len is None else min_len
        self.words, self.verdict = words, verdict
        self.alone = {c.name: _only(shield, c) for c in shield.categories}

    def parameters(self) -> dict[str, Any]:
        """Everything the result depends on, apart from the indexes."""
        shield = self.shield
        return {
            "threshold (tau)": f"{shield.tau:g}",
            "score": shield.kind,
            "shortest span the filter looks at": f"{shield.min_len} tokens",
            "shortest span shown": f"{self.min_len} tokens" + (", whole words" * self.words),
            "most occurrences": "any number" if shield.max_count is None else shield.max_count,
            "scope": shield.scope,
            "allow index": shield.allow_mode if shield.allow is not None else "none",
        }

    def completion(self, sample: Sample, number: int) -> TracedCompletion:
        """Everything about one completion."""
        prompt, answer = self._ids(sample.prompt), self._ids(sample.completion)
        x = np.concatenate([prompt, answer])
        pieces = self.tokenizer.pieces(x.tolist())
        verdict = self.shield.check(x, len(prompt))
        spans: list[TracedSpan] = []
        risk: dict[str, float] = {}
        omitted = 0
        for category in self.shield.categories:
            own = self.alone[category.name].check(x, len(prompt))
            risk[category.name] = own.risk
            found = self._spans(x, len(prompt), pieces, category, own)
            omitted += max(len(found) - self.max_spans, 0)
            spans += sorted(found, key=lambda s: (-s.score, s.start))[: self.max_spans]
        words = " ".join("".join(pieces[: len(prompt)] or pieces).split())
        return TracedCompletion(
            title=sample.title or (words if len(words) <= 60 else f"{words[:59]}…") or f"{number}",
            pieces=pieces,
            prompt=len(prompt),
            spans=[
                self._with_sources(span, x)
                for span in sorted(spans, key=lambda s: (s.start, s.end))
            ],
            risk=risk,
            refused=verdict.refused if self.verdict else None,
            reason="" if verdict.complete else "an index is unavailable",
            omitted=omitted,
            note=sample.note,
        )

    def _ids(self, text: str | Sequence[int]) -> Ids:
        if isinstance(text, str):
            return self.tokenizer.encode([text])[0].ids.astype(np.int64)
        return np.asarray(text, np.int64)

    def _spans(
        self, x: Ids, prompt: int, pieces: list[str], category: Category, verdict: Verdict
    ) -> list[TracedSpan]:
        """Maximal spans of one category that end in the completion, without their documents."""
        shield = self.shield
        first = 0 if shield.scope == "prompt+completion" else prompt
        x = x[first:]
        starts = word_starts(pieces[first:]) if self.words else None
        found = category.index.maximal_spans(
            x, min_len=self.min_len, max_count=shield.max_count, word_start=starts
        )
        keep = found.end > prompt - first
        start, end, count = found.start[keep], found.end[keep], found.count[keep]
        surprisal = category.surprisal[x]
        total = np.concatenate([[0.0], np.cumsum(surprisal)])
        nats = total[end] - total[start]
        lift = np.log(count) - math.log(max(category.index.n_tokens, 1)) + nats
        scores = nats / category.scale
        if shield.kind == "max":
            scores = np.array([surprisal[a:b].max() for a, b in zip(start, end, strict=True)])
        spans = []
        columns = (start + first, end + first, count, nats, lift, category.severity * scores)
        for a, b, m, own, over, score in zip(*(c.tolist() for c in columns), strict=True):
            state = "excused" if score > shield.tau else "below"
            if not self.verdict:
                state = "found"
            elif any(a < flagged.end and flagged.start < b for flagged in verdict.spans):
                state = "flagged"
            spans.append(TracedSpan(a, b, m, own, over, score, category.name, state))
        return spans

    def _with_sources(self, span: TracedSpan, x: Ids) -> TracedSpan:
        index = self.alone[span.category].categories[0].index
        length = span.end - span.start
        hits = index.locate(x[span.start : span.end], self.documents)
        sources = []
        for number, offset in zip(hits.document.tolist(), hits.offset.tolist(), strict=True):
            document = index.document(number)
            places = document.byte_offsets
            begin = max(offset - self.context, 0)
            window = np.asarray(document.tokens[begin : offset + length + self.context]).tolist()
            pieces = self.tokenizer.pieces(window)
            cut, stop = offset - begin, offset - begin + length
            sources.append(
                Source(
                    document=number,
                    offset=offset,
                    meta=dict(document.meta or {}),
                    before="".join(pieces[:cut]),
                    match="".join(pieces[cut:stop]),
                    after="".join(pieces[stop:]),
                    byte_offset=None if places is None else int(places[offset]),
                )
            )
        return dataclasses.replace(span, sources=sources)


def _only(shield: TraceShield, category: Category) -> TraceShield:
    """The same filter with one of its categories."""
    alone = copy.copy(shield)
    alone.categories = (category,)
    return alone


def _identities(shield: TraceShield) -> Iterator[IndexIdentity]:
    found = [(c.name, c.index, c.severity) for c in shield.categories]
    if shield.allow is not None:
        found.append(("allow", shield.allow, 1.0))
    for role, index, severity in found:
        yield IndexIdentity(
            role=role,
            path=str(index.path or ""),
            uuid=str(index.uuid),
            tokens=index.n_tokens,
            documents=index.n_docs,
            shards=index.n_shards,
            vocab_size=index.vocab_size,
            fingerprint=index.fingerprint,
            severity=severity,
        )


def _check_tokenizer(index: Any, tokenizer: TextTokenizer, name: str) -> None:
    same = index.fingerprint is None or index.fingerprint == tokenizer.fingerprint
    if not same or index.vocab_size != tokenizer.vocab_size:
        raise TokenizerMismatchError(
            f"trace: the index of {name} was built with tokenizer {index.fingerprint} of "
            f"{index.vocab_size} ids, got {tokenizer.fingerprint} of {tokenizer.vocab_size}"
        )
