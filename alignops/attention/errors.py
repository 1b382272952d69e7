"""What goes wrong with shared caches, where the caller must be able to tell cases apart."""

__all__ = [
    "BlockBusy",
    "LayoutError",
    "PoolExhausted",
    "PositionError",
    "StalePlan",
    "StepError",
    "UnsupportedModel",
]


class LayoutError(ValueError):
    """A view breaks a rule: its last block is not the written one, or a block comes twice."""


class PositionError(ValueError):
    """A token's position is beyond what the model was trained for, and that was forbidden."""


class UnsupportedModel(ValueError):
    """A model's attention cannot run over shared blocks; the text names the layer and why."""


class BlockBusy(RuntimeError):
    """Somebody else writes the block."""


class StalePlan(RuntimeError):
    """What a plan describes has changed since: lengths, or the layout of a block."""


class StepError(RuntimeError):
    """A layer was called twice in a step, or out of order."""


class PoolExhausted(RuntimeError):
    """Too few pages are free. Nothing has been written or reserved."""
