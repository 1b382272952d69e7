"""For tests of code that uses alignops: every CPU instruction set of the machine, small indexes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from alignops import _native

if TYPE_CHECKING:
    from alignops.spans import SpanIndex


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


def span_index(docs: Iterable[Any], vocab_size: int, **options: Any) -> SpanIndex:
    """An index in memory. It has no folder, so it cannot be pickled.

    Args:
        docs: documents, see `alignops.spans.build_index`.
        vocab_size: size of the vocabulary.
        options: further ones of `build_index`.

    Example:
        >>> span_index([[1, 2, 1, 2], [2, 1]], vocab_size=4).count([1, 2])
        2
    """
    from alignops.spans import SpanIndex, build_index

    options.setdefault("fingerprint", "testing")
    with tempfile.TemporaryDirectory() as folder:
        build_index(docs, f"{folder}/index", vocab_size=vocab_size, **options)
        return SpanIndex.open(f"{folder}/index", mode="ram")
