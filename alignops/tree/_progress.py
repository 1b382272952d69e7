"""Progress bars, for those who ask for one: tqdm is not needed otherwise."""

from __future__ import annotations

from typing import Any


class Bar:
    """A bar of tqdm, or nothing."""

    def __init__(self, shown: bool, desc: str, unit: str, total: int | None = None) -> None:
        self._bar: Any = None
        if shown:
            from tqdm.auto import tqdm

            self._bar = tqdm(desc=desc, unit=unit, total=total)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def at(self, done: float) -> None:
        """So much is done."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
