"""What can be proved about span matches: chance, calibrated drift, binomial limits.

Symbols: n tokens of a completion, N tokens of the index, tau a threshold in nats, m calibration
prompts. The bound that the paper announces (arXiv 2508.02063) is not specified there;
`fit_drift_bound` is one of the announced shape, f(count, risk), that holds by construction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from alignops.spans.arrays import Floats, as_floats

RISK_BINS = 8
RARE_COUNT = 3  # matches up to this count get bins of their own
MIN_PART = 50  # prompts that both parts of a split bin keep


def chance_bound(n: int, N: int, tau: float) -> float:
    """Bound on the probability that random text holds a matched span with BCI > tau.

    If a completion of n tokens is drawn token by token from P, independently of the N tokens of the
    index, then Pr <= n N e^-tau: every violating match holds the shortest window above tau that
    starts at its place in the index, of probability below e^-tau, and there are n N pairs of
    places. Real text repeats itself far more often: this is a floor for tau, not a calibration.

    Args:
        n: tokens of the completion.
        N: tokens of the index.
        tau: threshold in nats.

    Returns:
        min(1, n N e^-tau).

    Raises:
        ValueError: n or N is negative.

    Example:
        >>> f"{chance_bound(128, 20_000_000, 30.0):.1e}"
        '2.4e-04'
    """
    _check_sizes("chance_bound", n, N, 0)
    if n == 0 or N == 0:
        return 0.0
    exponent = math.log(n) + math.log(N) - tau
    return 1.0 if exponent >= 0 else math.exp(exponent)


def tau_null(n: int, N: int, alpha: float = 0.05) -> float:
    """The threshold ln(n N / alpha) at which `chance_bound` is alpha.

    Args:
        n: tokens of the completion.
        N: tokens of the index.
        alpha: in (0, 1].

    Raises:
        ValueError: n or N is not positive, or alpha is out of range.

    Example:
        >>> round(tau_null(128, 20_000_000, alpha=2.4e-4), 1)
        30.0
    """
    _check_sizes("tau_null", n, N, 1)
    if not 0 < alpha <= 1:
        raise ValueError(f"tau_null: alpha must lie in (0, 1], got {alpha}")
    return math.log(n) + math.log(N) - math.log(alpha)


def clopper_pearson(k: int, m: int, delta: float = 0.05) -> float:
    """One-sided upper limit of a rate: k events in m draws, wrong with probability <= delta.

    It is BetaInv(1 - delta; k + 1, m - k), found as the rate p with Pr[Binomial(m, p) <= k] =
    delta; 1 if k = m.

    Args:
        k: events, 0 to m.
        m: independent draws.
        delta: in (0, 1).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> round(clopper_pearson(0, 59, 0.05), 4), round(clopper_pearson(3, 20, 0.025), 4)
        (0.0495, 0.3789)
    """
    if not 0 <= k <= m or m < 1:
        raise ValueError(f"clopper_pearson: k must lie in [0, m] and m be positive, got {k} of {m}")
    if not 0 < delta < 1:
        raise ValueError(f"clopper_pearson: delta must lie in (0, 1), got {delta}")
    if k == m:
        return 1.0
    i = np.arange(1, k + 1)
    # ln C(m, i), i = 0..k; a term of the tail is exp(this + i ln p + (m - i) ln(1 - p)).
    log_choose = np.concatenate(([0.0], np.cumsum(np.log((m - i + 1) / i))))
    i = np.arange(k + 1)
    target = math.log(delta)
    low, high = k / m, 1.0
    while True:
        p = (low + high) / 2
        if not low < p < high:
            return high
        terms = log_choose + i * math.log(p) + (m - i) * math.log1p(-p)
        peak = terms.max()
        if peak + math.log(np.exp(terms - peak).sum()) > target:
            low = p
        else:
            high = p


@dataclass(frozen=True)
class DriftBound:
    """A function f(risk, count) above the drift rate of every calibration bin; call it.

    Attributes:
        edges: (bins - 1,) risks that separate the bins; a bin holds its lower edge.
        split: (bins,) whether the bin is split at count <= 3.
        limits: (bins, 2) f for count <= 3 and for larger ones; non-decreasing along the bins.
        delta: the probability that some bin's rate is above f.
        prompts: how many calibrated it.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> risk = rng.uniform(0, 60, 4000)
        >>> drift = rng.uniform(size=4000) < risk / 100
        >>> bound = fit_drift_bound(risk, np.ones(4000), drift)
        >>> bool(bound(5.0, 1) < bound(55.0, 1) < 0.7)
        True
    """

    edges: Floats
    split: npt.NDArray[np.bool_]
    limits: Floats
    delta: float
    prompts: int

    def __call__(self, risk: Any, count: Any) -> Any:
        """F of each risk and count: a float for two numbers, else float64 of their shape."""
        bins = np.searchsorted(self.edges, risk, side="right")
        value = self.limits[bins, (np.asarray(count) > RARE_COUNT).astype(int)]
        return float(value) if np.ndim(value) == 0 else value


def fit_drift_bound(risk: Any, count: Any, drift: Any, delta: float = 0.05) -> DriftBound:
    """Calibrated bound on the rate of drift by risk and match count.

    Prompts are binned by risk quantile (8 bins), and a bin is split at count <= 3 where both parts
    keep 50 prompts. Each of the G bins gets its Clopper-Pearson limit at level delta / G; f is the
    running maximum of the limits in order of risk. With probability >= 1 - delta over the labels,
    every bin's rate of drift is at most f, and f does not fall with risk.

    Args:
        risk: (m,) risk of each calibration prompt's completion, see `TraceShield.check`.
        count: (m,) occurrences of its riskiest span; 0 where nothing matched.
        drift: (m,) whether the completion drifted, judged independently of the index.
        delta: in (0, 1).

    Returns:
        The bound; calling it with a risk and a count gives f.

    Raises:
        ValueError: no prompts, unequal lengths, NaN, a label other than 0 and 1, or delta out of
            range.
    """
    op = "fit_drift_bound"
    r, c, d = (
        as_floats(values, op, name)
        for values, name in ((risk, "risk"), (count, "count"), (drift, "drift"))
    )
    if not len(r) or not len(r) == len(c) == len(d):
        raise ValueError(
            f"{op}: risk, count and drift must have one value per prompt, got {len(r)}, {len(c)} "
            f"and {len(d)}"
        )
    if not np.isin(d, (0, 1)).all():
        raise ValueError(f"{op}: drift must hold 0 and 1, got {d[~np.isin(d, (0, 1))][0]:g}")
    if not 0 < delta < 1:
        raise ValueError(f"{op}: delta must lie in (0, 1), got {delta}")
    edges = np.unique(np.quantile(r, np.arange(1, RISK_BINS) / RISK_BINS, method="higher"))
    edges = edges[edges > r.min()]  # a bin holds its lower edge, so none is empty
    bins = np.searchsorted(edges, r, side="right")
    n_bins = len(edges) + 1
    rare = c <= RARE_COUNT
    sizes = np.stack([np.bincount(bins[part], minlength=n_bins) for part in (rare, ~rare)], 1)
    events = np.stack(
        [np.bincount(bins[part], d[part], minlength=n_bins) for part in (rare, ~rare)], 1
    ).astype(int)
    split = sizes.min(axis=1) >= MIN_PART
    each = delta / (n_bins + int(split.sum()))
    limits = np.empty((n_bins, 2))
    before = 0.0
    for b in range(n_bins):
        if split[b]:
            own = [clopper_pearson(int(events[b, i]), int(sizes[b, i]), each) for i in (0, 1)]
        else:
            own = [clopper_pearson(int(events[b].sum()), int(sizes[b].sum()), each)] * 2
        limits[b] = np.maximum(own, before)
        before = limits[b].max()
    return DriftBound(edges, split, limits, delta, len(r))


def residual_bound(drift: Any, refused: Any, delta: float = 0.05) -> float:
    """Upper limit of the rate of drift that a filter lets through.

    The Clopper-Pearson limit for "drifted and not refused", wrong with probability <= delta.

    Args:
        drift: (m,) whether each completion drifted.
        refused: (m,) whether the filter refused it.
        delta: in (0, 1).

    Raises:
        ValueError: no prompts, or unequal lengths.

    Example:
        >>> round(residual_bound([1, 1] + [0] * 98, [1, 0] + [0] * 98), 3)
        0.047
    """
    op = "residual_bound"
    d, r = as_floats(drift, op, "drift"), as_floats(refused, op, "refused")
    if not len(d) or len(d) != len(r):
        raise ValueError(
            f"{op}: drift and refused must have one value per prompt, got {len(d)} and {len(r)}"
        )
    return clopper_pearson(int(((d != 0) & (r == 0)).sum()), len(d), delta)


def _check_sizes(op: str, n: int, N: int, least: int) -> None:
    if n < least or least > N:
        raise ValueError(f"{op}: n and N must be at least {least}, got {n} and {N}")
