"""Tokens as they come: a callable for any number of rows, or a streamer of transformers for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from alignops._checks import check


class Streamer(Protocol):
    """Receives the tokens of a sequence, once per round in which it emitted some or ended."""

    def __call__(self, row: int, tokens: list[int], finished: bool) -> None:
        """New tokens of sequence `row`, counted as in the input; the last call says `finished`."""
        ...


@runtime_checkable
class TextStreamer(Protocol):
    """What `transformers.generation.BaseStreamer` looks like."""

    def put(self, value: Tensor) -> None:
        """Takes tokens (n,): first the prompt, then what is generated."""
        ...

    def end(self) -> None:
        """The text has ended."""
        ...


class Stream:
    """Hands tokens to a streamer: each row in order, nothing after its end.

    Args:
        streamer: a callable (row, tokens, finished), or for one sequence a streamer of transformers
            such as `TextStreamer`, which gets the prompt first, as from `model.generate`.
        prompts: one (L,) for each sequence.

    Raises:
        TypeError: it is neither.
        ValueError: a streamer of transformers for more than one sequence.

    Example:
        >>> stream = Stream(lambda *new: print(*new), [torch.tensor([1, 2, 3])])
        >>> stream.emit(0, [4, 5])
        0 [4, 5] False
        >>> stream.emit(0, [2], finished=True)
        0 [2] True
        >>> stream.emit(0, [7])
    """

    def __init__(self, streamer: Streamer | TextStreamer, prompts: Sequence[Tensor]) -> None:
        self._ended = [False] * len(prompts)
        self._call: Streamer
        if isinstance(streamer, TextStreamer):
            check(
                len(prompts) == 1,
                f"Stream: streamer must be a callable (row, tokens, finished) for {len(prompts)} "
                f"sequences, got {type(streamer).__name__}, which takes one",
            )
            streamer.put(prompts[0].cpu())
            self._call = _Adapted(streamer)
        elif callable(streamer):
            self._call = streamer
        else:
            raise TypeError(
                "Stream: streamer must be a callable (row, tokens, finished) or have put and end, "
                f"got {type(streamer).__name__}"
            )

    def emit(self, row: int, tokens: list[int], finished: bool = False) -> None:
        """New tokens of a row; calls without any, or after the end, go nowhere."""
        if self._ended[row] or not (tokens or finished):
            return
        self._ended[row] = finished
        self._call(row, tokens, finished)


class _Adapted:
    """A streamer of transformers as a callable."""

    def __init__(self, streamer: TextStreamer) -> None:
        self._streamer = streamer

    def __call__(self, row: int, tokens: list[int], finished: bool) -> None:
        if tokens:
            self._streamer.put(torch.tensor(tokens))
        if finished:
            self._streamer.end()
