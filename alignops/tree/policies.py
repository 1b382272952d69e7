"""How a search chooses edges and backs values up, and the constants of published systems.

Symbols: N finished visits of an edge, O visits in flight, P prior, Q value, n visits of the node.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from alignops._checks import check


def _at_least(name: str, value: float, bound: float) -> None:
    check(value >= bound, f"{name} must be at least {bound:g}, got {value}")


@dataclass(frozen=True)
class Policy:
    """What every policy says of edges without a value and of visits in flight.

    Attributes:
        fpu: value of an edge without one: "zero", "low" (the lower end of the norm), "parent",
            "mean_visited" (mean of the node's value and its visited edges'), "inf".
        in_flight: "wu_uct" counts O as visits; "virtual_loss" pretends that each of O had returned
            `loss` `loss_weight` times (only with `Mean`); "none" ignores O.
        on_collision: a second selection of a leaf in flight is given out too ("share") or not
            ("skip").
        width, growth: progressive widening, if `width` is above 0: a node with fewer draws than
            ceil(width * n^growth) is a leaf that grows a child.
        first_visits: visits that every node counts from its beginning.
    """

    rule: ClassVar[str]

    fpu: str = "zero"
    in_flight: str = "wu_uct"
    on_collision: str = "share"
    loss_weight: float = 1.0
    loss: float = -1.0
    width: float = 0.0
    growth: float = 0.0
    first_visits: float = 0.0

    def __post_init__(self) -> None:
        _at_least("loss_weight", self.loss_weight, 0)
        _at_least("width", self.width, 0)
        _at_least("first_visits", self.first_visits, 0)
        check(
            self.width == 0 or 0 < self.growth < 1,
            f"growth must be between 0 and 1, got {self.growth}",
        )

    def options(self) -> dict[str, Any]:
        """Everything that the native search asks for."""
        rest = {
            "rule": self.rule,
            "norm": "none",
            "total": "parent",
            "c": 1.0,
            "c1": 1.25,
            "c2": 19652.0,
            "rate": 1.0,
            "low": 0.0,
            "high": 1.0,
            "floor": 0.0,
            "widen": 0.0,
            "clip": False,
        }
        return {**rest, **{k: v for k, v in asdict(self).items() if v is not None}}


@dataclass(frozen=True)
class _Normed(Policy):
    """PUCT and its variants.

    Attributes:
        norm: Q is put between "none", "tree" (smallest and largest value the tree has seen),
            "siblings" (of the node and its visited edges), "fixed" (`low`, `high`).
        floor, widen: the width of the norm is at least `floor`, plus `widen`.
        clip: normalized Q to [0, 1].
        total: n is that of the "parent", its own evaluation included, or the sum over "children".
        range: smallest and largest value that a tree starts with.
    """

    norm: str = "none"
    low: float = 0.0
    high: float = 1.0
    floor: float = 0.0
    widen: float = 0.0
    clip: bool = False
    total: str = "parent"
    range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("floor", self.floor, 0)
        _at_least("widen", self.widen, 0)
        check(self.low <= self.high, f"low must not exceed high, got {self.low} and {self.high}")


@dataclass(frozen=True)
class PUCT(_Normed):
    """Q + P sqrt(n) / (1 + N) (c1 + ln((n + c2 + 1) / c2)): AlphaZero, MuZero."""

    rule: ClassVar[str] = "puct"
    c1: float = 1.25
    c2: float = 19652.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("c1", self.c1, 0)
        check(self.c2 > 0, f"c2 must be above 0, got {self.c2}")


@dataclass(frozen=True)
class RainPUCT(_Normed):
    """Q + c P sqrt(n) / (1 + N): RAIN (arXiv 2309.07124), Eq. 1."""

    rule: ClassVar[str] = "puct_rain"
    c: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("c", self.c, 0)


@dataclass(frozen=True)
class UCT(Policy):
    """Q + c sqrt(ln n / N); an edge without visits comes first."""

    rule: ClassVar[str] = "uct"
    c: float = 1.0
    total: str = "parent"

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("c", self.c, 0)


@dataclass(frozen=True)
class Boltzmann(Policy):
    """A draw with probability proportional to P exp(rate Q); draws in flight are independent.

    An edge without a value counts as the node itself does.
    """

    rule: ClassVar[str] = "boltzmann"
    fpu: str = "parent"
    in_flight: str = "none"
    rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.rate < math.inf, f"rate must be finite and at least 0, got {self.rate}")


@dataclass(frozen=True)
class Greedy(Policy):
    """The largest Q."""

    rule: ClassVar[str] = "greedy"
    fpu: str = "inf"


@dataclass(frozen=True)
class Backup:
    """How values go up."""

    rule: ClassVar[str]

    def options(self) -> dict[str, Any]:
        """Everything that the native search asks for."""
        given = asdict(self)
        return {
            "backup": self.rule,
            "discount": given.get("discount", 1.0),
            "backup_rate": given.get("rate", 1.0),
        }


@dataclass(frozen=True)
class Mean(Backup):
    """The mean of returns g = reward + discount * g."""

    rule: ClassVar[str] = "mean"
    discount: float = 1.0

    def __post_init__(self) -> None:
        check(0 <= self.discount <= 1, f"discount must be between 0 and 1, got {self.discount}")


@dataclass(frozen=True)
class Max(Backup):
    """The largest of the node's own value and its children's."""

    rule: ClassVar[str] = "max"


@dataclass(frozen=True)
class Soft(Backup):
    """(1 / rate) ln(sum w exp(rate v) / sum w) over evaluated children, w the priors.

    rate = inf is the largest value (DTS, arXiv 2506.20701).
    """

    rule: ClassVar[str] = "soft"
    rate: float = 1.0

    def __post_init__(self) -> None:
        check(self.rate > 0, f"rate must be above 0, got {self.rate}")


@dataclass(frozen=True)
class SubtreeMean(Backup):
    """The mean of the node's own value and its children's: P-Aligner (arXiv 2508.04626)."""

    rule: ClassVar[str] = "subtree_mean"


def muzero() -> PUCT:
    """As mctx: Q between the node's value and its visited siblings'."""
    return PUCT(norm="siblings", fpu="low")


def lightzero() -> PUCT:
    """As LightZero: Q between the tree's bounds, clipped; n without the node's own evaluation."""
    return PUCT(norm="tree", floor=0.01, clip=True, fpu="mean_visited", total="children")


def rain() -> RainPUCT:
    """As RAIN's code: Q between the tree's bounds, which start at -1 and 1; n is the node's."""
    return RainPUCT(norm="tree", range=(-1.0, 1.0), widen=1e-5)


def rain_paper() -> RainPUCT:
    """As RAIN's Eq. 1: Q as it is, n the sum over siblings."""
    return RainPUCT(total="children")


def wu_uct(beta: float = 1.0) -> UCT:
    """WU-UCT: Q + beta sqrt(2 ln(n + O) / (N + O))."""
    return UCT(c=beta * math.sqrt(2))


def dts(rate: float = 1.0, width: float = 2.0, growth: float = 0.8) -> Boltzmann:
    """DTS (arXiv 2506.20701): Boltzmann draws, widening; goes with `Soft(rate)`."""
    return Boltzmann(rate=rate, width=width, growth=growth, first_visits=1.0)


def dts_star(c: float = 1.0, width: float = 2.0, growth: float = 0.8) -> UCT:
    """DTS*: UCT, widening; goes with `Soft`. The paper does not give its c."""
    return UCT(c=c, width=width, growth=growth, first_visits=1.0)


def p_aligner(c: float = 0.1) -> UCT:
    """As P-Aligner's script: c = 0.1 (the code's default is 1.0); goes with `SubtreeMean`."""
    return UCT(c=c, fpu="inf")
