"""Long native work: a thread does it, the main thread reports progress and heeds Ctrl-C."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from alignops._native import library

#: progress(phase, done, total): phase is "read", "sort" or "write", total 0 if it is not known.
Callback = Callable[[str, int, int], None]

_POLL_SECONDS = 0.05
_REPORT_SECONDS = 0.2


class Reporter:
    """Passes progress on, at most five times a second and at each change of phase."""

    def __init__(self, progress: bool | Callback | None) -> None:
        self._bar: Any = None
        self._callback: Callback | None = None
        self._phase = ""
        self._last = 0.0
        if progress is True:
            from tqdm import tqdm

            self._bar = tqdm(unit="tok", unit_scale=True, dynamic_ncols=True)
            self._callback = self._show
        elif callable(progress):
            self._callback = progress
        elif progress not in (None, False):
            raise TypeError(
                f"build_index: progress must be a bool or a callable, got {type(progress).__name__}"
            )

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._callback is None or (phase == self._phase and now - self._last < _REPORT_SECONDS):
            return
        self._phase, self._last = phase, now
        self._callback(phase, done, total)

    def close(self) -> None:
        """Leave the bar of tqdm as it is."""
        if self._bar is not None:
            self._bar.close()

    def _show(self, phase: str, done: int, total: int) -> None:
        if self._bar.desc != f"{phase}: ":
            self._bar.reset()
            self._bar.set_description(phase)
        self._bar.total = total or None
        self._bar.n = done
        self._bar.refresh()


def run(work: Callable[[library.SpanProgress], None], report: Reporter) -> None:
    """Do `work` in a thread, which must release the GIL and end soon when it is cancelled.

    An exception in this thread, such as KeyboardInterrupt, cancels the work. What cannot be
    cancelled, a sync of the disk, is not waited for.
    """
    progress = library.SpanProgress()
    ended = threading.Event()
    failures: list[BaseException] = []

    def body() -> None:
        try:
            work(progress)
        except BaseException as error:
            failures.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=body, name="alignops-spans-build")
    thread.start()
    try:
        while not ended.wait(_POLL_SECONDS):
            if progress.total > 0:
                phase = "write" if progress.writing else "sort"
                report(phase, min(progress.done, progress.total), progress.total)
    except BaseException:
        progress.cancel()
        ended.wait(_POLL_SECONDS)
        raise
    thread.join()
    if failures:
        # No cycle of exception and list may keep the files of the work open.
        raise failures.pop()
