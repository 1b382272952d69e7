"""How a search chooses edges and backs values up, and the constants of published systems.

Symbols: N finished visits of an edge, O visits in flight, P prior, Q value, n visits of the node.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

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
    """

    fpu: str = "zero"
    in_flight: str = "wu_uct"
    on_collision: str = "share"
    loss_weight: float = 1.0
    loss: float = -1.0

    def __post_init__(self) -> None:
        _at_least("loss_weight", self.loss_weight, 0)

    def options(self) -> dict[str, Any]:
        """Everything that the native search asks for."""
        rest = {
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

    c1: float = 1.25
    c2: float = 19652.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("c1", self.c1, 0)
        check(self.c2 > 0, f"c2 must be above 0, got {self.c2}")

    def options(self) -> dict[str, Any]:
        return super().options() | {"rule": "puct"}


@dataclass(frozen=True)
class RainPUCT(_Normed):
    """Q + c P sqrt(n) / (1 + N): RAIN (arXiv 2309.07124), Eq. 1."""

    c: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("c", self.c, 0)

    def options(self) -> dict[str, Any]:
        return super().options() | {"rule": "puct_rain"}


@dataclass(frozen=True)
class UCT(Policy):
    """Q + c sqrt(ln n / N); an edge without visits comes first."""

    c: float = 1.0
    total: str = "parent"

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("c", self.c, 0)

    def options(self) -> dict[str, Any]:
        return super().options() | {"rule": "uct"}


@dataclass(frozen=True)
class Boltzmann(Policy):
    """A draw with probability proportional to P exp(rate Q); draws in flight are independent.

    An edge without a value counts as the node itself does.
    """

    fpu: str = "parent"
    in_flight: str = "none"
    rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            0 <= self.rate < math.inf, f"rate must be finite and at least 0, got {self.rate}"
        )

    def options(self) -> dict[str, Any]:
        return super().options() | {"rule": "boltzmann"}


@dataclass(frozen=True)
class Greedy(Policy):
    """The largest Q."""

    fpu: str = "inf"

    def options(self) -> dict[str, Any]:
        return super().options() | {"rule": "greedy"}


@dataclass(frozen=True)
class Mean:
    """The mean of returns g = reward + discount * g."""

    discount: float = 1.0

    def __post_init__(self) -> None:
        check(
            0 <= self.discount <= 1, f"discount must be between 0 and 1, got {self.discount}"
        )

    def options(self) -> dict[str, Any]:
        return {"backup": "mean", "discount": self.discount, "backup_rate": 1.0}


@dataclass(frozen=True)
class Max:
    """The largest of the node's own value and its children's."""

    def options(self) -> dict[str, Any]:
        return {"backup": "max", "discount": 1.0, "backup_rate": 1.0}


@dataclass(frozen=True)
class Soft:
    """(1 / rate) ln(sum w exp(rate v) / sum w) over evaluated children, w the priors.

    rate = inf is the largest value (DTS, arXiv 2506.20701).
    """

    rate: float = 1.0

    def __post_init__(self) -> None:
        check(self.rate > 0, f"rate must be above 0, got {self.rate}")

    def options(self) -> dict[str, Any]:
        return {"backup": "soft", "discount": 1.0, "backup_rate": self.rate}


@dataclass(frozen=True)
class SubtreeMean:
    """The mean of the node's own value and its children's: P-Aligner (arXiv 2508.04626)."""

    def options(self) -> dict[str, Any]:
        return {"backup": "subtree_mean", "discount": 1.0, "backup_rate": 1.0}


Backup = Mean | Max | Soft | SubtreeMean


def muzero() -> PUCT:
    """As mctx: Q between the node's value and its visited siblings'."""
    return PUCT(norm="siblings", fpu="low")


def lightzero() -> PUCT:
    """As LightZero: Q between the tree's bounds, clipped; n without the node's own evaluation."""
    return PUCT(norm="tree", floor=0.01, clip=True, fpu="mean_visited", total="children")


def rain() -> RainPUCT:
    """As RAIN's released code: Q between the tree's bounds, which start at -1 and 1; n the node's."""
    return RainPUCT(norm="tree", range=(-1.0, 1.0), widen=1e-5)


def rain_paper() -> RainPUCT:
    """As RAIN's Eq. 1: Q as it is, n the sum over siblings."""
    return RainPUCT(total="children")


def wu_uct(beta: float = 1.0) -> UCT:
    """WU-UCT: Q + beta sqrt(2 ln(n + O) / (N + O))."""
    return UCT(c=beta * math.sqrt(2))


def p_aligner() -> UCT:
    """As P-Aligner's script: c = 0.1; goes with `SubtreeMean`."""
    return UCT(c=0.1, fpu="inf")
