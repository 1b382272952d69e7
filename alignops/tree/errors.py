"""What goes wrong with a search tree, where the caller must be able to tell cases apart."""

from collections.abc import Iterable
from typing import Any

__all__ = [
    "CallbackError",
    "CapacityError",
    "InvalidPriorError",
    "InvalidValueError",
    "NodeIndexError",
    "StateError",
    "TreeFormatError",
]


class CallbackError(RuntimeError):
    """A callback of a search raised or answered wrongly; the trees are as before the iteration.

    Attributes:
        nodes: ids of the nodes it was asked about.
    """

    def __init__(self, text: str, nodes: Iterable[Any]) -> None:
        super().__init__(text)
        self.nodes = tuple(int(node) for node in nodes)


class CapacityError(RuntimeError):
    """A tree has no room for what was asked; the text has its index and sizes, nothing changed."""


class StateError(RuntimeError):
    """A call does not fit the state: expanded twice, ticket not open, used by another thread."""


class InvalidValueError(ValueError):
    """A value or reward is NaN or infinite; nothing was written."""


class InvalidPriorError(ValueError):
    """Priors are negative, not finite, or sum to 0; nothing was written."""


class NodeIndexError(IndexError):
    """A tree or node id is out of range."""


class TreeFormatError(ValueError):
    """A file or state is not what a store wrote: foreign, cut off, damaged, newer; names where."""
