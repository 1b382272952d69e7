"""Workers that step at their own pace, each in a thread of its own.

Source: arXiv 2504.06261 runs workers in lockstep; without it a reader sees of each other block what
was complete when its own forward began.
"""

from __future__ import annotations

import threading

from alignops._checks import check
from alignops.attention.session import HogwildSession


def run_async(session: HogwildSession, *, max_steps: int, budget_tokens: int | None = None) -> None:
    """Let every active worker of a session run in its own thread.

    What a worker reads of the others depends on how fast they are, so texts cannot be reproduced.
    Meanwhile other threads may read the session, and `inject`; callbacks, which one worker at a
    time calls, may do everything else.

    Args:
        session: with two or more workers, to be worthwhile.
        max_steps: most forwards of each worker.
        budget_tokens: of all workers together; overshot by at most one token per worker.

    Raises:
        ValueError: an argument is out of range.
        BaseException: what a worker's thread, or the keyboard, has raised; all others have stopped
            between two of their forwards, and the session can go on.
    """
    check(max_steps >= 0, f"run_async: max_steps must be at least 0, got {max_steps}")
    check(
        budget_tokens is None or budget_tokens >= 0,
        f"run_async: budget_tokens must be at least 0, got {budget_tokens}",
    )
    stop = threading.Event()
    errors: list[BaseException] = []

    def drive(name: str) -> None:
        try:
            for _ in range(max_steps):
                used_up = budget_tokens is not None and session.stats.sampled >= budget_tokens
                if stop.is_set() or used_up or session.answer is not None:
                    return
                if name not in session.active:
                    return
                session.step([name], visibility="lagged")
        except BaseException as error:  # of whatever kind: it is raised below
            errors.append(error)
            stop.set()

    threads = [
        threading.Thread(target=drive, args=(name,), name=f"worker {name}")
        for name in session.active
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if errors:
        raise errors[0]
