"""Texts of many sequences out of one session, for rules that do not speak for the target alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignops._checks import check
from alignops.speculative.adapter import Drafts, ModelAdapter
from alignops.speculative.generate import _prompts
from alignops.speculative.session import SpecSession
from alignops.speculative.streaming import Stream
from alignops.speculative.verify import VerifyOut


@dataclass
class Text:
    """One sequence, as far as it has been written.

    Attributes:
        sequence: its number, which with `position` tells all random words.
        prompt: (L,) int64.
        limit: most tokens.
        tokens: generated so far.
        sources: where each comes from: see `VerifyOut.source`.
        finished: why it ended: "eos", "length", or what else the caller says; "": it has not.
    """

    sequence: int
    prompt: Tensor = field(compare=False)
    limit: int
    tokens: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    finished: str = ""

    @property
    def position(self) -> int:
        """Of the next token: all before it are decided."""
        return len(self.prompt) + len(self.tokens)

    def cut(self, length: int) -> None:
        """Forget all but the first tokens."""
        del self.tokens[length:], self.sources[length:]


class TextHandler:
    """What a driver may do at the points of a round; by default nothing."""

    def begin(self, row: int, text: Text) -> None:
        """A text is about to begin in a row of the session, or to go on there."""

    def before_commit(self, rows: dict[int, Text], drafts: Drafts, out: VerifyOut) -> None:
        """A round was decided, and is not yet part of the texts."""

    def after_commit(self, row: int, text: Text, before: int) -> str:
        """Tokens [before, ...) of a text are new: cut it, and say why it ends, or ""."""
        return ""

    def save(self, text: Text) -> None:
        """The round of a text is complete."""


def write(
    session: SpecSession,
    texts: Sequence[Text],
    seed: int,
    handler: TextHandler,
    stream: Stream | None = None,
    progress: bool = False,
) -> None:
    """Write all texts, as many at a time as the session has rows; they are changed in place.

    The random words of a text are those of the seed `seed + sequence` and of absolute positions,
    so neither the order, nor the rows, nor an interruption changes what is written.
    """
    waiting = [text for text in texts if not text.finished][::-1]
    places = {text.sequence: i for i, text in enumerate(texts)}
    rows: dict[int, Text] = {}
    with _bar(progress, len(texts)) as ended, torch.no_grad(), session.stats.clock.job():
        ended(len(texts) - len(waiting))
        while waiting or rows:
            _fill(session, waiting, rows, seed, handler)
            drafts = session.draft()
            out = session.verify(drafts)
            handler.before_commit(rows, drafts, out)
            done = session.commit(out)
            sources: list[list[int]] = out.source.tolist()
            for row, text in list(rows.items()):
                before, new = len(text.tokens), done.tokens[row]
                text.tokens += new
                text.sources += sources[row][: len(new)]
                text.finished = done.finished[row]
                text.finished = handler.after_commit(row, text, before) or text.finished
                handler.save(text)
                if stream is not None:
                    new = text.tokens[before:]
                    stream.emit(places[text.sequence], new, finished=bool(text.finished))
                if text.finished:
                    session.remove(row)
                    del rows[row]
                    ended(1)


@contextmanager
def _bar(progress: bool, total: int) -> Iterator[Callable[[int], object]]:
    """What is told that so many more texts have ended."""
    if not progress:
        yield lambda count: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="text") as bar:
        yield bar.update


def _fill(
    session: SpecSession,
    waiting: list[Text],
    rows: dict[int, Text],
    seed: int,
    handler: TextHandler,
) -> None:
    """Begin as many texts as there are free rows."""
    free = session.free[: len(waiting)]
    new = [waiting.pop() for _ in free]
    for row, text in zip(free, new, strict=True):
        handler.begin(row, text)
        rows[row] = text
    if new:
        contents = [torch.cat([text.prompt, text.prompt.new_tensor(text.tokens)]) for text in new]
        session.prefill(
            contents,
            [text.limit - len(text.tokens) for text in new],
            [seed + text.sequence for text in new],
            free,
        )


def texts_of(
    input_ids: Tensor | Sequence[Tensor],
    attention_mask: Tensor | None,
    sequence_ids: Sequence[int] | None,
    limit: int,
    op: str,
) -> list[Text]:
    """Texts that have not begun.

    Raises:
        ValueError: no prompt, an empty one, a number that occurs twice, or no new tokens.
    """
    check(limit >= 1, f"{op}: max_new_tokens must be at least 1, got {limit}")
    prompts = _prompts(input_ids, attention_mask)
    check(len(prompts) > 0, f"{op}: input_ids must hold at least one sequence, got none")
    numbers = list(range(len(prompts))) if sequence_ids is None else list(sequence_ids)
    check(
        len(numbers) == len(prompts) == len(set(numbers)),
        f"{op}: sequence_ids must be {len(prompts)} different numbers, got {numbers}",
    )
    return [Text(i, prompt.long(), limit) for i, prompt in zip(numbers, prompts, strict=True)]


def own_prompts(
    adapter: ModelAdapter,
    spell: Callable[[list[int]], list[int]],
    texts: Sequence[Text],
    input_ids: Tensor | Sequence[Tensor] | None,
    attention_mask: Tensor | None,
    name: str,
) -> dict[int, Tensor]:
    """Prompts of another model by sequence; where none are given, those of the texts, spelled.

    Raises:
        ValueError: there is not one for each text, it is empty, has ids that the model does not
            have, or is too long for it.
    """
    if input_ids is None:
        prompts = [torch.tensor(spell(text.prompt.tolist()), dtype=torch.int64) for text in texts]
    else:
        prompts = [prompt.long() for prompt in _prompts(input_ids, attention_mask)]
    check(len(prompts) == len(texts), f"{name} must hold {len(texts)} prompts, got {len(prompts)}")
    size, most = adapter.vocab_size, adapter.max_length
    for i, prompt in enumerate(prompts):
        check(prompt.dim() == 1 and prompt.numel() > 0, f"{name}[{i}] must be (L,) with L >= 1")
        check(
            bool(((prompt >= 0) & (prompt < size)).all()),
            f"{name}[{i}] must hold ids in [0, {size}), got {prompt.tolist()}",
        )
        check(
            most is None or len(prompt) < most,
            f"{name}[{i}] must be shorter than the model's {most} tokens, got {len(prompt)}",
        )
    return {text.sequence: prompt for text, prompt in zip(texts, prompts, strict=True)}
