"""For tests of code that uses alignops: run it on every CPU instruction set of the machine."""

from collections.abc import Iterator
from contextlib import contextmanager

from alignops import _native


def available_isas() -> tuple[str, ...]:
    """Names of the CPU instruction set levels of this machine, slowest first.

    Example:
        >>> available_isas()[0]
        'scalar'
    """
    return _native.library.available_isas()


def active_isa() -> str:
    """Name of the CPU instruction set level in use."""
    return _native.library.active_isa()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the body with another CPU instruction set level, then restore the former one.

    The level is a property of the process: other threads see the change, too. Packed weights are
    laid out again for the new level when they are next used.

    Args:
        name: "scalar", "avx2" or "avx512"; see `available_isas`.

    Raises:
        ValueError: the name is unknown or this machine lacks the level; the message lists the
            choices.

    Example:
        >>> with use_isa("scalar"):
        ...     active_isa()
        'scalar'
    """
    before = active_isa()
    _native.library.set_isa(name)
    _native.refresh()
    try:
        yield
    finally:
        _native.library.set_isa(before)
        _native.refresh()
