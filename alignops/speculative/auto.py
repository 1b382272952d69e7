"""How many tokens to draft: the number that yields most tokens per second, by what was measured.

Shape letters: B rows of a forward, K drafts, Q = K + 1 columns of the target's forward.

Source: arXiv 2211.17192 section 3.3 (expected tokens of a round).
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from alignops._checks import check

# Evidence of a round counts this much less with every round that follows.
_DECAY = 0.9
# Before anything was drafted: this acceptance, with the weight of one draft. What is known of all
# kinds of drafts weighs as much for each as so many drafts of its own.
_PRIOR, _COMMON = 0.6, 2.0
# Before two widths were measured: cost of one more column, in costs of the first.
_SLOPE = 0.15
# Times that are older than this many rounds, or more than this many, say nothing.
_KEEP_ROUNDS, _KEEP = 256, 7
# Measured costs are rough: drafting has to promise so many times the speed of not drafting.
_MARGIN = 1.03
# Drafts that cost less than this share of a plain forward are free.
_FREE = 0.02
# While nothing is drafted, one draft is tried after this many rounds, then after twice as many.
_FIRST_PROBE, _LAST_PROBE = 16, 128
# Where the text tells about drafts that were not computed, so many recent probes are enough.
_PROBES = 2


def expected_tokens(alpha: float, drafts: float) -> float:
    """Tokens that a row emits per round if each draft is accepted with chance alpha.

    Example:
        >>> expected_tokens(0.5, 2), expected_tokens(1.0, 4)
        (1.75, 5)
    """
    if alpha >= 1:
        return 1 + drafts
    return float((1 - alpha ** (drafts + 1)) / (1 - alpha))


class AutoK:
    """Chooses K for each round: E(alpha, K) / (c_d K + c_v(B, K + 1)) is to be largest.

    alpha is the acceptance of recent rounds, c_d the time of one draft step, c_v that of a forward
    of the target; both times are medians of recent rounds, and widths that were not measured lie on
    lines between those that were. No forward is more than twice as wide as the widest one that was
    measured: a wrong guess would cost several plain rounds. Where drafting does not pay, K is 0;
    then a single draft is tried now and then, so that a text that becomes easy is noticed.

    Drafts that cost next to nothing, such as those of a lookup, are always asked for. Which rows
    have some is known then, and of which kind; `width` decides how many columns of them the target
    is to compute, with an alpha for each kind. Drafts that were not computed are compared with the
    text that came, so that alpha is known without paying for it.

    Args:
        max_drafts: the largest K.
        trims: the caller asks `width` after it has the drafts.

    Raises:
        ValueError: max_drafts is below 1.

    Example:
        >>> auto = AutoK(max_drafts=8)
        >>> for _ in range(30):
        ...     k = auto.choose(rows=4)
        ...     cost = 1.0 + 0.1 * k  # seconds
        ...     auto.observe(rows=4, asked=k, width=k, offered=[k] * 4, accepted=[k] * 4,
        ...                  draft_seconds=0.01 * k, target_seconds=cost)
        >>> auto.choose(rows=4)  # everything is accepted
        8
    """

    def __init__(self, max_drafts: int = 8, trims: bool = False) -> None:
        check(max_drafts >= 1, f"AutoK: max_drafts must be at least 1, got {max_drafts}")
        self.max_drafts = max_drafts
        self.trims = trims
        self._round = self._last_asked = 0
        self._all = _Evidence()
        self._kinds: dict[int, _Evidence] = {}
        # Rows that were asked for drafts, that had some; columns asked for, and computed.
        self._asked = self._offering = 0.0
        self._columns_asked = self._columns = 0.0
        self._draft = _Times()
        self._target: dict[int, dict[int, _Times]] = {}
        self._warm: set[int] = set()
        self._idle, self._probe = 0, _FIRST_PROBE

    @property
    def acceptance(self) -> float:
        """Alpha: recent drafts that were accepted, of those whose predecessors were."""
        return (self._all.accepted + _PRIOR) / (self._all.tested + 1)

    def choose(self, rows: int) -> int:
        """The K of the next round, 0 to max_drafts.

        Args:
            rows: B, rows of the target's next forward.
        """
        points = self._points(rows)
        cost = self._draft.value() * self.max_drafts
        if self.trims and cost == 0:
            return 1  # to see what it costs
        if self.trims and cost < _FREE * _forward(points, 1):
            return self.max_drafts
        most = min(self.max_drafts, _widest(points))
        return self._best([self._rate(points, k) for k in range(most + 1)])

    def acceptance_of(self, kind: int) -> float:
        """Alpha of one kind of drafts."""
        evidence = self._kinds.get(kind, _Evidence())
        return (evidence.accepted + _COMMON * self.acceptance) / (evidence.tested + _COMMON)

    def width(self, rows: int, offered: Sequence[int], kinds: Sequence[int] | None = None) -> int:
        """How many columns of drafts are worth computing.

        Args:
            rows: B, rows of the target's forward.
            offered: drafts of each active row.
            kinds: of the drafts of each row, see `Drafts`; None: they are alike.
        """
        points = self._points(rows)
        alphas = [self.acceptance_of(kind) for kind in _each(kinds, offered)]
        most = min(max(offered, default=0), _widest(points))

        def tokens(width: int) -> float:
            pairs = zip(alphas, offered, strict=True)
            return sum(expected_tokens(alpha, min(k, width)) for alpha, k in pairs)

        rates = [tokens(w) / _forward(points, 1 + w) for w in range(most + 1)]
        # Nothing but the cost is unknown, and that is soon measured.
        times = self._target.get(rows, {}).get(2, _Times()).recent(self._round - _KEEP_ROUNDS)
        hopeful = tokens(1) > (1 + _SLOPE) * tokens(0)
        return self._best(rates, probe=hopeful and len(times) < _PROBES)

    def _best(self, rates: list[float], probe: bool = True) -> int:
        """The number of the best rate; where that is 0, now and then 1."""
        best = max(range(len(rates)), key=rates.__getitem__)
        if rates[best] > _MARGIN * rates[0]:
            self._idle, self._probe = 0, _FIRST_PROBE
            return best
        self._idle += probe and len(rates) > 1
        if self._idle <= self._probe:
            return 0
        self._idle, self._probe = 0, min(2 * self._probe, _LAST_PROBE)
        return 1

    def observe(
        self,
        *,
        rows: int,
        asked: int,
        width: int,
        offered: Sequence[int],
        accepted: Sequence[int],
        draft_seconds: float,
        target_seconds: float,
        kinds: Sequence[int] | None = None,
    ) -> None:
        """What a round did.

        Args:
            rows: B, rows of the target's forward.
            asked: the K of this round.
            width: columns of the target's forward, less one: at most `asked`.
            offered: drafts of each active row whose fate is known, whether computed or not.
            accepted: of them accepted, or equal to the text.
            draft_seconds: time of the drafter.
            target_seconds: time of the target's forward.
            kinds: as for `width`.
        """
        self._round += 1
        if asked:
            self._draft.add(self._round, draft_seconds / asked)
        if any(offered) or width or (asked and not self.trims):
            self._forget(_DECAY ** (self._round - self._last_asked))
            self._last_asked = self._round
            pairs = list(zip(offered, accepted, strict=True))
            tested = sum(min(k, a + 1) for k, a in pairs)
            self._all.add(self._round, tested, sum(a for _, a in pairs))
            self._asked += len(pairs)
            self._offering += sum(k > 0 for k, _ in pairs)
            if width or not self.trims:
                self._columns_asked += asked
                self._columns += width
            for kind, (k, a) in zip(_each(kinds, offered), pairs, strict=True):
                if k:
                    evidence = self._kinds.setdefault(kind, _Evidence(self._round))
                    evidence.add(self._round, min(k, a + 1), a)
        if rows not in self._warm:  # the first forward of a shape does what is done once
            self._warm.add(rows)
            return
        self._target.setdefault(rows, {}).setdefault(width + 1, _Times()).add(
            self._round, target_seconds
        )

    def _forget(self, share: float) -> None:
        for name in ("_asked", "_offering", "_columns_asked", "_columns"):
            setattr(self, name, getattr(self, name) * share)

    def _rate(self, points: list[tuple[int, float]], k: int) -> float:
        """Tokens of a row per unit of time."""
        offering = (self._offering + 1) / (self._asked + 1)
        share = (self._columns + 1) / (self._columns_asked + 1)
        tokens = 1 + offering * (expected_tokens(self.acceptance, k) - 1)
        return tokens / (self._draft.value() * k + _forward(points, 1 + share * k))

    def _points(self, rows: int) -> list[tuple[int, float]]:
        """(Q, seconds) of this number of rows, or of the nearest one that was measured."""
        since = self._round - _KEEP_ROUNDS
        for b in sorted(self._target, key=lambda b: abs(b - rows)):
            points = [(q, times.value(since)) for q, times in sorted(self._target[b].items())]
            if recent := [point for point in points if point[1] > 0]:
                return recent
        return []


def _widest(points: list[tuple[int, float]]) -> int:
    """The largest K that may be tried: nothing before a plain forward was measured."""
    return 2 * points[-1][0] - 1 if points else 0


def _forward(points: list[tuple[int, float]], columns: float) -> float:
    """c_v: time of a forward, on the lines through what was measured."""
    if len(points) < 2:
        at, seconds = points[0] if points else (1, 1.0)
        return seconds * (1 + _SLOPE * (columns - 1)) / (1 + _SLOPE * (at - 1))
    right = next((i for i, (at, _) in enumerate(points) if at >= columns), len(points))
    if 0 < right < len(points):
        (x0, y0), (x1, y1) = points[right - 1], points[right]
        return y0 + (y1 - y0) * (columns - x0) / (x1 - x0)
    (x0, y0), (x1, y1) = points[0], points[-1]
    x, y = points[0] if right == 0 else points[-1]
    return max(y + max(y1 - y0, 0) / (x1 - x0) * (columns - x), 0.1 * y)


def _each(kinds: Sequence[int] | None, offered: Sequence[int]) -> Sequence[int]:
    return [0] * len(offered) if kinds is None else kinds


@dataclass
class _Evidence:
    """Drafts that were tested and accepted, recent ones more than older ones."""

    round: int = 0
    tested: float = 0.0
    accepted: float = 0.0

    def add(self, now: int, tested: int, accepted: int) -> None:
        share = _DECAY ** (now - self.round)
        self.tested = self.tested * share + tested
        self.accepted = self.accepted * share + accepted
        self.round = now


class _Times:
    """Durations of recent rounds."""

    def __init__(self) -> None:
        self._entries: deque[tuple[int, float]] = deque(maxlen=_KEEP)

    def add(self, round_: int, seconds: float) -> None:
        self._entries.append((round_, seconds))

    def recent(self, since: int) -> list[float]:
        return [seconds for then, seconds in self._entries if then >= since]

    def value(self, since: int = 0) -> float:
        recent = self.recent(since)
        return statistics.median_low(recent) if recent else 0.0
