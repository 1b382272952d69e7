"""Nudging: a base model whose text a small aligned model helps on where the base is unsure.

Both models are greedy. While the base is sure it speaks; else the aligned model does, word by word,
until the base is sure again, or would say the same.

Source: Nudging, arXiv 2410.09300.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignops._checks import check, dtype_name
from alignops.speculative.adapter import Drafts, Sampling
from alignops.speculative.driver import Text, TextHandler, own_prompts, texts_of, write
from alignops.speculative.generate import _batch_size, _ids, as_adapter
from alignops.speculative.nudge_text import Bridge
from alignops.speculative.nudges import BASE, NUDGE, Nudges
from alignops.speculative.prompted import PromptedDrafter
from alignops.speculative.session import SpecSession
from alignops.speculative.stats import SpecStats
from alignops.speculative.streaming import Stream, Streamer, TextStreamer
from alignops.speculative.verify import VerifyOut


@dataclass(frozen=True)
class NudgeOutput:
    """Result of `nudge_generate`.

    Attributes:
        texts: one for each prompt, in order; `finished` is "eos", "length", "nudges" (there were
            `max_nudges`) or "repeat" (three nudges running were the same).
        stats: of the rounds.
    """

    texts: list[Text]
    stats: SpecStats


class _Nudging(TextHandler):
    """Looks for the end of the text beyond the drafts of a round, and ends texts."""

    def __init__(
        self,
        session: SpecSession,
        drafter: PromptedDrafter,
        prompts: dict[int, Tensor],
        eos_ids: Sequence[int],
        lookahead: int,
        max_nudges: int,
    ) -> None:
        self._session = session
        self._drafter = drafter
        self._prompts = prompts
        self._eos_ids = eos_ids
        self._lookahead = lookahead
        self._max_nudges = max_nudges
        self._nudges: dict[int, Nudges] = {}
        self._nudging: dict[int, bool] = {}  # rows in the state NUDGE
        self._ends: dict[int, tuple[int, list[int]]] = {}

    def begin(self, row: int, text: Text) -> None:
        self._drafter.assign(row, self._prompts[text.sequence], len(text.prompt))
        self._nudges[text.sequence] = Nudges(self._max_nudges)
        self._nudging[row] = False

    def before_commit(self, rows: dict[int, Text], drafts: Drafts, out: VerifyOut) -> None:
        """Where a nudge began, its next tokens are drafted up to the look-ahead."""
        sources, emitted = out.source.tolist(), out.num_emitted.tolist()
        offered = (drafts.ids >= 0).sum(1).tolist()
        self._ends = {}
        begun: dict[int, list[int]] = {}
        for row in rows:
            before = [NUDGE if self._nudging[row] else BASE, *sources[row]]
            begun[row] = [
                i
                for i in range(emitted[row])
                if (before[i], before[i + 1]) == (BASE, NUDGE)
                and i + self._lookahead > offered[row]
            ]
        wanted = [max(begun.get(r, [])[-1:], default=-1) for r in range(len(offered))]
        width = max(wanted) + self._lookahead
        if max(wanted) >= 0:
            k = [i + self._lookahead if i >= 0 else 0 for i in wanted]
            batch = self._session.batch()
            device = batch.lengths.device
            with self._session.stats.clock.phase("draft"):
                further = self._drafter.propose(
                    batch, torch.tensor(k, dtype=torch.int32, device=device), width
                )
            ids = further.ids.tolist()
            for row, starts in begun.items():
                self._look(row, starts, ids[row])
        states = out.state.tolist()
        self._nudging.update({row: bool(states[row]) for row in rows})

    def _look(self, row: int, starts: Sequence[int], ids: Sequence[int]) -> None:
        for i in starts:
            window = ids[i : i + self._lookahead]
            ends = [j for j, token in enumerate(window) if token in self._eos_ids]
            if ends:
                self._ends[row] = (i, list(window[: ends[0] + 1]))
                return

    def after_commit(self, row: int, text: Text, before: int) -> str:
        reason = ""
        if row in self._ends:
            i, tokens = self._ends[row]
            text.cut(before + i)
            text.tokens += tokens
            text.sources += [NUDGE] * len(tokens)
            reason = "eos" if len(text.tokens) <= text.limit else "length"
            text.cut(text.limit)
        nudges = self._nudges[text.sequence]
        for at in range(before, len(text.tokens)):
            if ended := nudges.see(text.tokens[at], text.sources[at] == NUDGE):
                text.cut(at)
                return ended
        return reason or ("length" if not text.finished and self._drafter.full(row) else "")


def nudge_generate(
    base: Any,
    drafter: Any,
    input_ids: Tensor | Sequence[Tensor],
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    word_start: Tensor | None = None,
    drafter_input_ids: Tensor | Sequence[Tensor] | None = None,
    drafter_attention_mask: Tensor | None = None,
    gamma: float = 0.4,
    num_draft_tokens: int = 5,
    max_nudges: int = 150,
    eos_lookahead: int = 16,
    eos_token_id: int | Sequence[int] | None = None,
    batch_size: int | None = None,
    text_bridge: bool = False,
    tokenizers: tuple[Any, Any] | None = None,
    streamer: Streamer | TextStreamer | None = None,
    progress: bool = False,
) -> NudgeOutput:
    """Texts of a base model, nudged by an aligned one.

    The tokens depend neither on `num_draft_tokens` nor on the batch. Models of different tokenizers
    need `text_bridge=True`, which writes one token of one text at a time.

    Args:
        base: a causal language model of transformers, or a `ModelAdapter`.
        drafter: the small aligned one.
        input_ids: (B, L) or a list of (L,): prompts of the base.
        attention_mask: (B, L), 0 at padding.
        max_new_tokens: most tokens of each text.
        word_start: (V,) bool, ids that begin a word; see `word_starts`. The bridge finds them.
        drafter_input_ids: prompts of the drafter, such as those of its chat template; None: the
            same.
        drafter_attention_mask: of them.
        gamma: the base is sure if its largest probability is at least this.
        num_draft_tokens: K, at least 1.
        max_nudges: a text ends after so many nudges.
        eos_lookahead: when a nudge begins, and the drafter would end the text within so many
            tokens, it does; 0: it is not asked.
        eos_token_id: ids that end a text; None: those of the base's configuration. The base never
            ends a text itself.
        batch_size: texts that are written at the same time; None: all, of a list up to 8.
        text_bridge: the models exchange strings instead of ids. Nothing is drafted; the text is in
            ids of the base.
        tokenizers: of base and drafter, for the bridge: transformers' byte-level ones, or others
            that encode a string alone as inside of a text.
        streamer: see `Stream`.
        progress: show a bar.

    Returns:
        The texts.

    Raises:
        TypeError: word_start is not a bool tensor, or the bridge has no tokenizers.
        ValueError: an argument is out of range, or prompts and models do not fit.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        >>> config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=99, eos_token_id=None)
        >>> base, small = (LlamaForCausalLM(config).eval() for _ in range(2))
        >>> starts = torch.arange(99) % 3 == 0
        >>> out = nudge_generate(
        ...     base, small, torch.tensor([[5, 6, 7]]), max_new_tokens=9, word_start=starts
        ... )
        >>> len(out.texts[0].tokens)
        9

    Source: arXiv 2410.09300.
    """
    own, other = as_adapter(base), as_adapter(drafter)
    check(max_nudges >= 1, f"nudge_generate: max_nudges must be at least 1, got {max_nudges}")
    check(eos_lookahead >= 0, f"nudge_generate: eos_lookahead must be >= 0, got {eos_lookahead}")
    texts = texts_of(input_ids, attention_mask, None, max_new_tokens, "nudge_generate")
    eos_ids = _ids(getattr(own, "eos_ids", ()) if eos_token_id is None else eos_token_id)
    stream = None if streamer is None else Stream(streamer, [text.prompt for text in texts])
    name = "nudge_generate: drafter_input_ids"
    given = (drafter_input_ids, drafter_attention_mask)
    if text_bridge:
        bridge = Bridge(own, other, _checked_tokenizers(tokenizers), eos_ids)
        stats = SpecStats(own.device)
        bridge.write(
            texts,
            own_prompts(other, bridge.spell, texts, *given, name),
            lambda: Nudges(max_nudges),
            gamma=gamma,
            lookahead=eos_lookahead,
            stats=stats,
            stream=stream,
        )
        return NudgeOutput(texts, stats)
    starts = _checked_word_start(word_start, own.vocab_size)
    nudger = PromptedDrafter(other, own.vocab_size, greedy=True)
    prompts = own_prompts(other, nudger.spell, texts, *given, name)
    session = SpecSession(
        own,
        nudger,
        rows=_batch_size(batch_size, [text.prompt for text in texts], input_ids),
        capacity=max(len(text.prompt) for text in texts) + max_new_tokens,
        num_draft_tokens=num_draft_tokens,
        rule="nudge",
        params={
            "gamma": gamma,
            "word_start": starts.to(own.device),
            "eos_lookahead": eos_lookahead,
        },
        sampling=Sampling(temperature=1.0),
        eos_ids=eos_ids,
    )
    handler = _Nudging(session, nudger, prompts, eos_ids, eos_lookahead, max_nudges)
    write(session, texts, 0, handler, stream, progress)
    return NudgeOutput(texts, session.stats)


def _checked_word_start(word_start: Tensor | None, vocab_size: int) -> Tensor:
    if not isinstance(word_start, Tensor) or word_start.dtype != torch.bool:
        got = type(word_start).__name__
        got = dtype_name(word_start.dtype) if isinstance(word_start, Tensor) else got
        raise TypeError(f"nudge_generate: word_start must be a bool tensor, got {got}")
    check(
        word_start.shape == (vocab_size,),
        f"nudge_generate: word_start must have shape ({vocab_size},) (V of base), got "
        f"{tuple(word_start.shape)}",
    )
    return word_start


def _checked_tokenizers(tokenizers: tuple[Any, Any] | None) -> tuple[Any, Any]:
    if tokenizers is None:
        raise TypeError("nudge_generate: tokenizers must be given for text_bridge, got None")
    return tokenizers
