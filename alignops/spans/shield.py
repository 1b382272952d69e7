"""TraceShield: refuses completions that repeat unlikely spans of unsafe text.

Symbols: U index of unsafe text, A index of harmless text, M(s) occurrences of the span s in U, N
tokens of U, tau the threshold in nats. Source: TraceAlign, arXiv 2508.02063.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from alignops.spans import scores
from alignops.spans.arrays import Floats, Ints, as_ids, as_ragged, check_same_tokenizer
from alignops.spans.backends import LocalBackend
from alignops.spans.bounds import tau_null
from alignops.spans.distributed import DistributedIndex
from alignops.spans.distributed_matcher import DistributedMatcher
from alignops.spans.ends import (
    COVER_LENGTH,
    Batch,
    Category,
    Ends,
    Filters,
    count_spans,
    passing_ends,
    visible,
)
from alignops.spans.errors import TokenizerMismatchError
from alignops.spans.index import SpanIndex
from alignops.spans.matcher import MatchRule, SpanMatcher
from alignops.spans.stream import ShieldMatcher, ShieldStream

#: Scores that grow with the span, without which looking at one span per end would not be enough.
KINDS = ("bci", "norm", "max")
SCOPES = ("completion", "prompt+completion")
ALLOW_MODES = ("exact", "cover")

_DEFAULTS = {"tau": 20.0, "min_len": 8, "max_match": 4096, "documents": 10}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": _DEFAULTS,
    # Windows of 8 tokens that match as a whole: the longest match, cut to 8 tokens.
    "reference": {"tau": 10.0, "min_len": 8, "max_match": 8, "documents": 5},
}


class FlaggedSpan(NamedTuple):
    """A span ids[start:end] above the threshold.

    score: before severity. count: M. documents: numbers of documents that hold it, ascending, from
    at most `TraceShield.documents` of its occurrences.
    """

    start: int
    end: int
    score: float
    count: int  # type: ignore[assignment]
    category: str
    documents: tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    """What the filter says about a text.

    Attributes:
        refused: the completion must not be shown.
        risk: the largest severity * score of a span that passes the filters; 0 without one.
        spans: what is above the threshold, without spans inside others of the same category.
        reason: "matched-span", "index-unavailable", or None if nothing was found.
        complete: every index answered.
    """

    refused: bool
    risk: float
    spans: tuple[FlaggedSpan, ...]
    reason: str | None
    complete: bool


class TraceShield:
    """Refuses a text iff a span of it occurs in unsafe text and is too unlikely by chance.

    A span counts if it has at least `min_len` tokens, occurs in U (at most `max_count` times), is
    not excused by A, and severity * score > tau. The filter is exact: it says what a look at all
    spans would. It sees token ids only, so it knows copies, not paraphrases.

    Args:
        index_or_categories: U; or {name: (U, severity)}, one index per category of unsafe text,
            where the riskiest category decides.
        tau: a number of nats (default 20); "corpus": ln N - 1, so that chance explains a span about
            e times; "null": the threshold at which random text of `length` tokens is refused with
            probability `alpha` at most (`tau_null`). N counts all categories. See also `calibrate`.
        min_len: fewest tokens of a span (default 8).
        max_count: most occurrences; None: any. A limit lets text pass that was copied often.
        allow: A, or None.
        allow_mode: "exact" excuses a span that occurs in A as well; "cover" lets those tokens count
            0 that lie in a match of 8 or more tokens with A which ends by the end of the span.
        scope: "completion": spans lie in the completion; "prompt+completion": they may begin in the
            prompt and must end in the completion.
        fail_open: what happens if an index cannot be read (OSError): False refuses, True goes on
            without it.
        preset: "paper" (tau 20, min_len 8) or "reference" (tau 10, windows of 8 tokens, 5
            occurrences looked up); other arguments go before.
        kind: score of a span: "bci", "norm" (bci / ln N, tau in that unit) or "max". Others do not
            grow with the span.
        probs: (V,) token probabilities of a larger text; None: those of each index.
        max_match: longest span (default 4096); longer matches count as their last tokens.
        documents: most occurrences looked up for a flagged span (default 10).
        length: n of tau="null".
        alpha: alpha of tau="null".

    Raises:
        ValueError: an argument is out of range, or a kind does not grow with the span.
        TokenizerMismatchError: indexes differ in vocabulary size or tokenizer, or probs in size.

    Source:
        arXiv 2508.02063: refuse iff the largest BCI of a matched span is above tau = 20. The rest
        is ours: categories, A, scope, min_len and the longest match per end.

    Example:
        >>> import tempfile
        >>> from alignops.spans import SpanIndex, TraceShield, build_index
        >>> unsafe = [[11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [1, 2, 3] * 50]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = build_index(unsafe, f"{folder}/unsafe", vocab_size=32, fingerprint="demo")
        ...     with SpanIndex.open(f"{folder}/unsafe", fingerprint="demo") as index:
        ...         shield = TraceShield(index)
        ...         copied = shield.check([5, 11, 12, 13, 14, 15, 16, 17, 18, 6])
        ...         common = shield.check([1, 2, 3, 1, 2, 3, 1, 2])
        >>> copied.refused, copied.spans[0].start, copied.spans[0].end, copied.spans[0].documents
        (True, 1, 9, (0,))
        >>> common.refused, round(common.risk, 2)
        (False, 9.31)
    """

    def __init__(
        self,
        index_or_categories: Any,
        tau: float | str | None = None,
        min_len: int | None = None,
        max_count: int | None = None,
        allow: Any = None,
        allow_mode: str = "exact",
        scope: str = "completion",
        fail_open: bool = False,
        preset: str | None = None,
        *,
        kind: str = "bci",
        probs: Any = None,
        max_match: int | None = None,
        documents: int | None = None,
        length: int = 1024,
        alpha: float = 0.05,
    ) -> None:
        _choose("kind", kind, KINDS, "which grow with the span; the others are for reports")
        _choose("scope", scope, SCOPES)
        _choose("allow_mode", allow_mode, ALLOW_MODES)
        if preset is not None:
            _choose("preset", preset, tuple(PRESETS))
        base = PRESETS[preset or "paper"]
        self.min_len: int = base["min_len"] if min_len is None else min_len
        self.max_match: int = base["max_match"] if max_match is None else max_match
        self.documents: int = base["documents"] if documents is None else documents
        self.max_count, self.allow, self.allow_mode = max_count, allow, allow_mode
        self.scope, self.fail_open, self.kind = scope, fail_open, kind
        for name in ("min_len", "max_match", "documents", "max_count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"TraceShield: {name} must be at least 1, got {value}")
        if self.min_len > self.max_match:
            raise ValueError(
                f"TraceShield: min_len must not exceed max_match={self.max_match}, got "
                f"{self.min_len}"
            )
        if allow_mode == "cover" and self.max_match < COVER_LENGTH:
            raise ValueError(
                f"TraceShield: max_match must be at least {COVER_LENGTH} for allow_mode 'cover', "
                f"got {self.max_match}"
            )
        self.categories = self._make_categories(index_or_categories, probs)
        self.vocab_size: int = self.categories[0].index.vocab_size
        self.tau = self._resolve_tau(base["tau"] if tau is None else tau, length, alpha)
        self.filters = Filters(kind, self.min_len, max_count, self.max_match, allow, allow_mode)

    def _make_categories(self, given: Any, probs: Any) -> tuple[Category, ...]:
        named = given if isinstance(given, Mapping) else {"unsafe": (given, 1.0)}
        if not named:
            raise ValueError("TraceShield: index_or_categories must name a category, got none")
        first_name, (first, _) = next(iter(named.items()))
        for name, index in [*((n, i) for n, (i, _) in named.items()), ("allow", self.allow)]:
            if index is not None:
                check_same_tokenizer("TraceShield", repr(first_name), first, repr(name), index)
        result = []
        for name, (index, severity) in named.items():
            if not (severity > 0 and math.isfinite(severity)):
                raise ValueError(
                    f"TraceShield: severity of {name!r} must be positive, got {severity}"
                )
            p = index.unigram if probs is None else probs
            table = scores.surprisal_table(p, scores.FLOOR, "TraceShield")
            if len(table) != index.vocab_size:
                raise TokenizerMismatchError(
                    f"TraceShield: probs must have vocab_size={index.vocab_size} entries, got "
                    f"{len(table)}"
                )
            if self.kind == "norm" and index.n_tokens < 2:
                raise ValueError(
                    f"TraceShield: kind 'norm' needs 2 tokens in the index of {name!r}, got "
                    f"{index.n_tokens}"
                )
            scale = math.log(index.n_tokens) if self.kind == "norm" else 1.0
            result.append(Category(name, index, float(severity), table, scale))
        return tuple(result)

    def _resolve_tau(self, tau: float | str, length: int, alpha: float) -> float:
        if isinstance(tau, str):
            _choose("tau", tau, ("corpus", "null"), "or a number")
            if self.kind != "bci":
                raise ValueError(f"TraceShield: tau={tau!r} is for kind 'bci', got {self.kind!r}")
            total = max(sum(c.index.n_tokens for c in self.categories), 1)
            if tau == "null":
                return tau_null(length, total, alpha)
            return max(math.log(total) - 1, 0.0)
        if not tau >= 0:
            raise ValueError(f"TraceShield: tau must not be negative, got {tau}")
        return float(tau)

    # Checks

    def check(self, ids: Any, prompt_length: int = 0) -> Verdict:
        """The verdict on one text.

        Args:
            ids: (n,) its tokens: a completion, or a prompt and a completion.
            prompt_length: how many tokens at the start are the prompt. Only the scope says whether
                they are looked at; they are never refused on their own.

        Returns:
            The verdict; places of its spans count from ids[0].

        Raises:
            TypeError: ids are not integers.
            IndexError: an id is outside the vocabulary.
            ValueError: prompt_length is out of range.

        Example: see the class.
        """
        flat = as_ids(ids, "TraceShield.check")
        return self._verdicts(flat, np.array([0, len(flat)]), [prompt_length], "check")[0]

    def check_batch(
        self, ids: Any, offsets: Any = None, prompt_lengths: Any = None
    ) -> list[Verdict]:
        """The verdicts on many texts, in one pass over each index.

        Args:
            ids: tokens of all texts, one after the other; or a list of texts without offsets.
            offsets: (rows + 1,) where each text begins, and the end; or None.
            prompt_lengths: (rows,) prompt tokens at the start of each text; None: none.

        Returns:
            One verdict per text, as `check` gives.

        Raises:
            TypeError, IndexError, ValueError: as `check`, or the offsets are unfit.
        """
        flat, bounds = as_ragged(ids, offsets, "TraceShield.check_batch")
        return self._verdicts(flat, bounds, prompt_lengths, "check_batch")

    def risks(self, ids: Any, offsets: Any = None, prompt_lengths: Any = None) -> Floats:
        """Only the risk of each text of a batch, float64 (rows,); arguments as `check_batch`.

        Raises:
            OSError: an index cannot be read; there is no refusal to fall back to.
        """
        flat, bounds = as_ragged(ids, offsets, "TraceShield.risks")
        batch, _ = visible(flat, bounds, prompt_lengths, self.scope, "TraceShield.risks")
        result = np.zeros(len(bounds) - 1)
        for category in self.categories:
            ends = passing_ends(category, self.filters, batch)
            np.maximum.at(result, ends.row, category.severity * ends.score)
        return result

    def _verdicts(self, flat: Ints, bounds: Ints, prompt_lengths: Any, op: str) -> list[Verdict]:
        batch, cut = visible(flat, bounds, prompt_lengths, self.scope, f"TraceShield.{op}")
        rows = len(cut)
        risk, complete = np.zeros(rows), True
        spans: list[list[FlaggedSpan]] = [[] for _ in range(rows)]
        for category in self.categories:
            try:
                ends = passing_ends(category, self.filters, batch)
                weighted = category.severity * ends.score
                np.maximum.at(risk, ends.row, weighted)
                flagged = ends.pick(weighted > self.tau).outermost()
                self._describe(category, batch, cut, flagged, spans)
            except OSError:
                complete = False
        return [
            self._verdict(float(r), tuple(s), complete) for r, s in zip(risk, spans, strict=True)
        ]

    def _verdict(self, risk: float, spans: tuple[FlaggedSpan, ...], complete: bool) -> Verdict:
        refused = risk > self.tau
        reason = "matched-span" if refused else None if complete else "index-unavailable"
        return Verdict(refused or not (complete or self.fail_open), risk, spans, reason, complete)

    def _describe(
        self,
        category: Category,
        batch: Batch,
        cut: Ints,
        ends: Ends,
        spans: list[list[FlaggedSpan]],
    ) -> None:
        """Append the spans to those of their rows, with counts and documents."""
        if not len(ends.row):
            return
        counts = ends.count
        if counts is None:
            counts = count_spans(category.index, batch.ids, ends.start, ends.end - ends.start)
        shift = cut[ends.row] - batch.bounds[ends.row]
        for row, start, end, score, count, moved in zip(
            *(a.tolist() for a in (ends.row, ends.start, ends.end, ends.score, counts, shift)),
            strict=True,
        ):
            hits = category.index.locate(batch.ids[start:end], self.documents)
            held = tuple(np.unique(hits.document).tolist())
            spans[row].append(
                FlaggedSpan(start + moved, end + moved, score, count, category.name, held)
            )

    # Thresholds

    def calibrate(
        self,
        benign: Any,
        harmful: Any = None,
        *,
        fpr: float = 0.021,
        method: str = "conformal",
        prompt_lengths: Any = None,
    ) -> float:
        """Set `tau` from texts of known kind, and return it.

        "conformal" takes the ceil((m + 1)(1 - fpr))-th smallest risk of m harmless texts: a new
        one, exchangeable with them, is refused with probability fpr at most. "youden" takes the
        threshold of largest true minus false positive rate (ties: the largest) and promises
        nothing.

        Args:
            benign: harmless texts: a list of token sequences, or (ids, offsets).
            harmful: texts that should be refused, likewise; for "youden".
            fpr: accepted rate of false refusals, in (0, 1); for "conformal". The default is the
                paper's.
            method: "conformal" or "youden".
            prompt_lengths: of the harmless texts, see `check_batch`; for "conformal".

        Returns:
            The new tau.

        Raises:
            ValueError: too few texts (the message says how many are needed), or arguments that the
                method does not take.
            OSError: an index cannot be read.

        Example:
            >>> import tempfile
            >>> from alignops.spans import SpanIndex, TraceShield, build_index
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = build_index([range(20)], f"{folder}/u", vocab_size=32, fingerprint="demo")
            ...     with SpanIndex.open(f"{folder}/u", fingerprint="demo") as index:
            ...         shield = TraceShield(index, min_len=2)
            ...         texts = [[i, i + 1, 31] for i in range(18)] + [[0, 1, 2, 3, 4]]
            ...         shield.calibrate(texts, fpr=0.1) < 10 < shield.calibrate(texts, fpr=0.05)
            True
        """
        _choose("method", method, ("conformal", "youden"))
        op = "TraceShield.calibrate"
        if method == "conformal":
            if harmful is not None:
                raise ValueError(f"{op}: harmful must be None for method 'conformal'")
            if not 0 < fpr < 1:
                raise ValueError(f"{op}: fpr must lie in (0, 1), got {fpr}")
            risks = np.sort(self.risks(*_texts(benign), prompt_lengths))
            m = len(risks)
            # A product such as 1000 * 0.9 must not be rounded up because it is not exact.
            rank = math.ceil(round((m + 1) * (1 - fpr), 9))
            if rank > m:
                need = math.ceil(round((1 - fpr) / fpr, 9))
                raise ValueError(
                    f"{op}: benign must hold at least {need} texts for fpr={fpr:g}, got {m}"
                )
            self.tau = float(risks[rank - 1])
            return self.tau
        if harmful is None or prompt_lengths is not None:
            raise ValueError(f"{op}: method 'youden' takes benign and harmful texts, no more")
        low, high = (np.sort(self.risks(*_texts(texts))) for texts in (benign, harmful))
        if not len(low) or not len(high):
            raise ValueError(
                f"{op}: benign and harmful must not be empty, got {len(low)} and {len(high)} texts"
            )
        taus = np.unique(np.concatenate((low, high)))
        above = [1 - np.searchsorted(r, taus, side="right") / len(r) for r in (low, high)]
        gain = above[1] - above[0]
        self.tau = float(taus[np.flatnonzero(gain >= gain.max() - 1e-12)[-1]])
        return self.tau

    def parameters(self) -> dict[str, Any]:
        """All that decides a verdict, as plain data: indexes by UUID, filters, threshold."""
        return {
            "categories": [[c.name, c.index.uuid, c.severity] for c in self.categories],
            "surprisal": [_digest(c.surprisal) for c in self.categories],
            "allow": None if self.allow is None else self.allow.uuid,
            "tau": self.tau,
            "min_len": self.min_len,
            "max_count": self.max_count,
            "max_match": self.max_match,
            "allow_mode": self.allow_mode,
            "scope": self.scope,
            "kind": self.kind,
        }

    # Incremental forms

    def stream(self, prompt: Sequence[int] = ()) -> ShieldStream:
        """The filter for a text that is still being written.

        Args:
            prompt: tokens before the completion.

        Example:
            >>> import tempfile
            >>> from alignops.spans import SpanIndex, TraceShield, build_index
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = build_index([range(20)], f"{folder}/u", vocab_size=32, fingerprint="demo")
            ...     with SpanIndex.open(f"{folder}/u", fingerprint="demo") as index:
            ...         stream = TraceShield(index).stream()
            ...         [stream.push(token) for token in range(3, 12)]
            [False, False, False, False, False, False, False, True, True]
        """
        return ShieldStream(self, prompt)

    def matcher(self, batch: int = 1) -> ShieldMatcher:
        """The incremental matcher behind `stream`, `prov_decode` and `SpanVeto`, with B rows."""
        matchers = (
            _follow(
                c.index,
                self.allow,
                batch=batch,
                max_match=self.max_match,
                rule=MatchRule(
                    kind=self.kind,
                    tau=self.tau,
                    min_len=self.min_len,
                    max_count=self.max_count,
                    severity=c.severity,
                    allow_mode=self.allow_mode,
                    surprisal=c.surprisal,
                ),
            )
            for c in self.categories
        )
        return ShieldMatcher(matchers, self.vocab_size)


def _follow(index: Any, allow: Any, **options: Any) -> SpanMatcher | DistributedMatcher:
    if isinstance(allow, DistributedIndex) and isinstance(index, SpanIndex):
        index = DistributedIndex([LocalBackend([index])])
    if isinstance(index, DistributedIndex):
        return index.matcher(allow, **options)
    return SpanMatcher(index, allow, **options)


def _choose(argument: str, value: Any, choices: tuple[str, ...], note: str = "") -> None:
    if value not in choices:
        raise ValueError(
            f"TraceShield: {argument} must be one of {', '.join(choices)}"
            f"{', ' * bool(note)}{note}, got {value!r}"
        )


def _texts(texts: Any) -> tuple[Any, Any]:
    """(ids, offsets) of a list of texts or of such a pair."""
    if isinstance(texts, tuple) and len(texts) == 2 and np.ndim(texts[0]) == 1:
        return texts
    return texts, None


def _digest(values: Floats) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()
