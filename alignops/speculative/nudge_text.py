"""Nudging between models of different tokenizers: what they exchange are strings.

Source: Nudging, arXiv 2410.09300.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignops.speculative.adapter import ModelAdapter
from alignops.speculative.caches import run_model
from alignops.speculative.driver import Text
from alignops.speculative.nudges import BASE, NUDGE, Nudges, word_starts
from alignops.speculative.stats import SpecStats
from alignops.speculative.streaming import Stream


class Speaker:
    """A model with its tokenizer, which continues a prompt of its own.

    Args:
        adapter: the model; its layouts must include "ragged".
        tokenizer: of transformers; a string must be encoded alone as it is inside of a text, as
            byte-level ones do.
        prompt: (L,) int64.
        eos_ids: that end a text.
        starts: (V,) bool, ids that begin a word.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        tokenizer: Any,
        prompt: Tensor,
        eos_ids: Collection[int],
        starts: Tensor,
    ) -> None:
        self.adapter = adapter
        self.prompt: list[int] = prompt.tolist()
        self.eos_ids = set(eos_ids)
        self.starts = starts
        self._tokenizer = tokenizer
        self._cache = adapter.new_cache(1, len(self.prompt) + 64)
        self._read: list[int] = []

    def encode(self, string: str) -> list[int]:
        """Ids of a string, without special tokens."""
        return list(self._tokenizer.encode(string, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """The string of ids."""
        text: str = self._tokenizer.decode(list(tokens))
        return text

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits (V,) behind the prompt and these tokens; the part read before stays."""
        ids = [*self.prompt, *tokens]
        common = 0
        while common < min(len(self._read), len(ids) - 1) and self._read[common] == ids[common]:
            common += 1
        device = self.adapter.device
        new = torch.tensor([ids[common:]], device=device)
        at = torch.tensor([common], dtype=torch.int32, device=device)
        out = run_model(self.adapter, self._cache, new, at, rows=slice(0, 1), upto=len(ids), last=1)
        self._read = ids
        return out[0, 0]

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The next tokens, up to the end of the text."""
        said: list[int] = []
        while len(said) < count and not (said and said[-1] in self.eos_ids):
            if self._is_full(len(tokens) + len(said)):
                break
            said.append(int(self.logits([*tokens, *said]).argmax()))
        return said

    def _is_full(self, tokens: int) -> bool:
        limit = self.adapter.max_length
        return limit is not None and len(self.prompt) + tokens >= limit


class Dialogue:
    """One text, written token by token by two speakers.

    Args:
        text: is written.
        base: whose ids the text has.
        nudger: the aligned model.
        gamma: the base is sure if its largest probability is at least this.
        lookahead: tokens of the nudger that are searched for the end of the text.
    """

    def __init__(
        self, text: Text, base: Speaker, nudger: Speaker, gamma: float, lookahead: int
    ) -> None:
        self._text = text
        self._base = base
        self._nudger = nudger
        self._gamma = torch.tensor(gamma, dtype=torch.float32)
        self._lookahead = lookahead
        self._own: list[int] = []  # the text in ids of the nudger
        # Where the nudge began, in ids of the base and of the nudger; None: the base speaks.
        self._nudge: tuple[int, int] | None = None

    def step(self) -> tuple[str, bool]:
        """One more token: its string, and whether it is of a nudge; sets `text.finished`."""
        if self._nudge is None:
            best, sure = self._ask_base()
            if sure:
                return self._base_says(best), False
            self._nudge = (len(self._text.tokens), len(self._own))
            if self._ends_soon(self._nudge):
                return "", True
        said = self._nudger.greedy(self._own, 1)
        if not said:
            self._text.finished = "length"
            return "", True
        token = said[0]
        begins = len(self._own) > self._nudge[1] and bool(self._nudger.starts[token])
        if begins:
            best, sure = self._ask_base()
            agrees = self._base.decode([best]) == self._nudger.decode([token])
            if sure or (agrees and best not in self._base.eos_ids):
                self._nudge = None
                return self._base_says(best), False
        self._nudger_says(self._nudge, [token])
        return self._nudger.decode([token]), True

    def _ask_base(self) -> tuple[int, bool]:
        """The likeliest token of the base, and whether it is sure."""
        logits = self._base.logits(self._text.tokens)
        best = int(logits.argmax())
        top = torch.softmax(logits.float(), -1)[best]
        return best, bool(top >= self._gamma) and best not in self._base.eos_ids

    def _base_says(self, token: int) -> str:
        before = self._base.decode(self._text.tokens)
        self._text.tokens.append(token)
        self._text.sources.append(BASE)
        new = self._base.decode(self._text.tokens)[len(before) :]
        self._own += self._nudger.encode(new)
        return new

    def _nudger_says(self, begin: tuple[int, int], tokens: Sequence[int]) -> None:
        """The nudge goes on: its string is written anew in ids of the base."""
        at, own = begin
        self._own += tokens
        ends = tokens[-1] in self._nudger.eos_ids
        words = self._own[own:-1] if ends else self._own[own:]
        before = self._nudger.decode(self._own[:own])
        string = self._nudger.decode([*self._own[:own], *words])[len(before) :]
        self._text.cut(at)
        self._text.tokens += self._base.encode(string)
        if ends:
            self._text.tokens += sorted(self._base.eos_ids)[:1]
            self._text.finished = "eos"
        self._text.sources += [NUDGE] * (len(self._text.tokens) - at)

    def _ends_soon(self, begin: tuple[int, int]) -> bool:
        """Whether the nudger would end the text in a moment; then it does."""
        said = self._nudger.greedy(self._own, self._lookahead)
        if not said or said[-1] not in self._nudger.eos_ids:
            return False
        self._nudger_says(begin, said)
        return True


class Bridge:
    """A base model and a nudger that share no ids.

    Args:
        base: whose ids the texts have.
        nudger: the aligned model.
        tokenizers: of both.
        eos_ids: of the base; those of the nudger are the ones of its tokenizer and configuration.
    """

    def __init__(
        self,
        base: ModelAdapter,
        nudger: ModelAdapter,
        tokenizers: tuple[Any, Any],
        eos_ids: Sequence[int],
    ) -> None:
        self._models = (base, nudger)
        self._tokenizers = tokenizers
        end = getattr(tokenizers[1], "eos_token_id", None)
        own = {*getattr(nudger, "eos_ids", ()), *([] if end is None else [end])}
        self._eos_ids = (set(eos_ids), own)
        self._starts = [
            word_starts(tokenizer, model.vocab_size)
            for tokenizer, model in zip(tokenizers, self._models, strict=True)
        ]

    def spell(self, ids: Sequence[int]) -> list[int]:
        """Ids of the base in ids of the nudger."""
        base, nudger = self._tokenizers
        return list(nudger.encode(base.decode(list(ids)), add_special_tokens=False))

    def write(
        self,
        texts: Sequence[Text],
        prompts: Mapping[int, Tensor],
        counter: Callable[[], Nudges],
        *,
        gamma: float,
        lookahead: int,
        stats: SpecStats,
        stream: Stream | None = None,
    ) -> None:
        """Write texts, one after another, in place.

        Args:
            texts: that have not begun.
            prompts: of the nudger, by sequence.
            counter: makes what counts the nudges of a text.
            gamma: the base is sure if its largest probability is at least this.
            lookahead: tokens of the nudger that are searched for the end of the text.
            stats: told of texts and of the time.
            stream: told of texts that are complete: the nudges in them may be spelled anew until
                then.
        """
        for at, text in enumerate(texts):
            stats.prompts += 1
            both = (text.prompt, prompts[text.sequence])
            base, nudger = (
                Speaker(model, tokenizer, prompt, eos_ids, starts)
                for model, tokenizer, prompt, eos_ids, starts in zip(
                    self._models, self._tokenizers, both, self._eos_ids, self._starts, strict=True
                )
            )
            with stats.clock.job(), stats.clock.phase("target"):
                _converse(Dialogue(text, base, nudger, gamma, lookahead), text, counter())
            stats.finished += 1
            if stream is not None:
                stream.emit(at, text.tokens, finished=True)


def _converse(dialogue: Dialogue, text: Text, nudges: Nudges) -> None:
    while not text.finished:
        said, nudged = dialogue.step()
        if ended := nudges.see(said, nudged):
            text.cut(len(text.tokens) - 1)
            text.finished = ended
        elif len(text.tokens) > text.limit or (
            len(text.tokens) == text.limit and not text.finished
        ):
            text.cut(text.limit)
            text.finished = "length"
