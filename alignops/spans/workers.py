"""Backends that are somewhere else: what they share, and worker processes of this machine."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from alignops.spans.arrays import Ints
from alignops.spans.backends import Bools, LocalBackend, MatcherSpec, Part, RowText, ShardBackend
from alignops.spans.errors import ShardUnavailableError
from alignops.spans.matcher import MatchState, Peek
from alignops.spans.results import Document, Hits, NextDist

__all__ = ["ProcessBackend", "RemoteBackend", "Worker"]


class RemoteBackend(ShardBackend):
    """A `ShardBackend` whose calls a `LocalBackend` elsewhere answers, through `_call`."""

    def _call(self, method: str, *arguments: Any) -> Any:
        """The answer of the other side, or its exception; ShardUnavailableError without one."""
        raise NotImplementedError

    def part(self) -> Part:
        answer: Part = self._call("part")
        return answer

    def find(self, ids: Ints, offsets: Ints) -> Ints:
        answer: Ints = self._call("find", ids, offsets)
        return answer

    def count_batch(self, ids: Ints, offsets: Ints) -> Ints:
        answer: Ints = self._call("count_batch", ids, offsets)
        return answer

    def matching_stats(self, ids: Ints, offsets: Ints, counts: bool) -> tuple[Ints, Ints | None]:
        answer: tuple[Ints, Ints | None] = self._call("matching_stats", ids, offsets, counts)
        return answer

    def locate(self, ids: Ints, offsets: Ints, rows: Ints, numbers: Ints) -> Hits:
        answer: Hits = self._call("locate", ids, offsets, rows, numbers)
        return answer

    def hits(self, shard: int, ranks: Ints) -> Hits:
        answer: Hits = self._call("hits", shard, ranks)
        return answer

    def next_dist(self, ctx: Ints) -> NextDist:
        answer: NextDist = self._call("next_dist", ctx)
        return answer

    def next_tokens(self, ctx: Ints, numbers: Ints) -> Ints:
        answer: Ints = self._call("next_tokens", ctx, numbers)
        return answer

    def eos_count(self, ctx: Ints) -> int:
        answer: int = self._call("eos_count", ctx)
        return answer

    def verify(self, level: str) -> None:
        self._call("verify", level)

    def document(self, d: int) -> Document:
        answer: Document = self._call("document", d)
        return answer

    def restore(
        self, matcher: str, step: int, spec: MatcherSpec, rows: list[RowText], active: Bools
    ) -> MatchState:
        answer: MatchState = self._call("restore", matcher, step, spec, rows, active)
        return answer

    def advance(
        self, matcher: str, step: int, tokens: Ints, parent: Ints | None, active: Bools
    ) -> MatchState:
        answer: MatchState = self._call("advance", matcher, step, tokens, parent, active)
        return answer

    def peek(self, matcher: str, step: int, cand: Ints) -> Bools:
        answer: Bools = self._call("peek", matcher, step, cand)
        return answer

    def peek_exact(self, matcher: str, step: int, cand: Ints) -> Peek:
        answer: Peek = self._call("peek_exact", matcher, step, cand)
        return answer

    def flagged(self, matcher: str, step: int) -> tuple[Ints, Ints]:
        answer: tuple[Ints, Ints] = self._call("flagged", matcher, step)
        return answer

    def drop(self, matcher: str) -> None:
        self._call("drop", matcher)


class Worker(LocalBackend):
    """A `LocalBackend` that has a process to itself, with `threads` threads."""

    def __init__(self, indexes: Sequence[str], idle_seconds: float, threads: int) -> None:
        torch.set_num_threads(threads)
        super().__init__(indexes, idle_seconds=idle_seconds)


def _serve(connection: Connection, arguments: tuple[Any, ...]) -> None:
    """What a process does: answers (number, method, arguments) until the other end is closed."""
    backend: Worker | None = None
    while True:
        try:
            number, method, arguments_of_call = connection.recv()
            try:
                backend = backend or Worker(*arguments)
                answer = (number, True, getattr(backend, method)(*arguments_of_call))
            except Exception as error:
                answer = (number, False, error)
            connection.send(answer)
        except (EOFError, OSError):  # the other end is gone
            return


class ProcessBackend(RemoteBackend):
    """Parts in a process of their own.

    The process is started by `spawn`, so a script that makes one needs the usual
    `if __name__ == "__main__":`. Calls may come from several threads; they take turns.

    Args:
        indexes: folders of indexes.
        timeout: seconds after which a call raises ShardUnavailableError. An answer that comes later
            is thrown away.
        idle_seconds: see `LocalBackend`.
        threads: of the worker.

    Raises:
        What `SpanIndex.open` raises in the worker.
    """

    def __init__(
        self,
        indexes: Sequence[str | os.PathLike[str]],
        *,
        timeout: float = 30.0,
        idle_seconds: float = 600.0,
        threads: int = 1,
    ) -> None:
        self.timeout = timeout
        self._arguments = ([os.fspath(i) for i in indexes], idle_seconds, threads)
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self._arguments), daemon=True)
        self._process.start()
        other.close()
        # Starting Python takes longer than a call may.
        self._part: Part = self._call("part", timeout=max(self.timeout, 120.0))

    @property
    def pid(self) -> int | None:
        """Of the worker."""
        return self._process.pid

    def restart(self) -> None:
        """Start the process anew, for example after it was killed."""
        self.close()
        self._start()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._connection.close()
            self._process.join(1.0)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()

    def part(self) -> Part:
        return self._part

    def _call(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        limit = self.timeout if timeout is None else timeout
        name = f"ProcessBackend {', '.join(self._arguments[0])} (process {self.pid})"
        with self._lock:
            number = next(self._numbers)
            try:
                self._connection.send((number, method, arguments))
                end = time.monotonic() + limit
                answered = -1
                while answered != number:
                    if not self._connection.poll(max(end - time.monotonic(), 0.0)):
                        raise ShardUnavailableError(
                            f"{name}: no answer to {method} within {limit:g} s"
                        )
                    answered, good, value = self._connection.recv()
            except ShardUnavailableError:
                raise
            except (EOFError, OSError) as error:
                raise ShardUnavailableError(f"{name}: the worker is gone") from error
        if not good:
            raise value
        return value
