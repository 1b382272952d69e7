"""Reverse speculative decoding: a teacher's reasoning in words that a student finds likely.

The teacher drafts; the student keeps a token unless it finds it improbable, and else takes another
draw of the teacher, or its own token. A student learns from such traces, while plain traces of a
much stronger teacher make it worse.

Source: RSD, arXiv 2509.22230.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from alignops._checks import check
from alignops.speculative.adapter import Sampling
from alignops.speculative.driver import Text, TextHandler, own_prompts, texts_of, write
from alignops.speculative.generate import _batch_size, _ids, as_adapter
from alignops.speculative.prompted import IdMap, PromptedDrafter
from alignops.speculative.session import SpecSession
from alignops.speculative.stats import SpecStats
from alignops.speculative.streaming import Stream, Streamer, TextStreamer

#: Value of `Text.sources` where the student spoke, because no draw of the teacher passed.
STUDENT = 4


@dataclass(frozen=True)
class RsdOutput:
    """Result of `rsd_generate`.

    Attributes:
        texts: one for each prompt, in order.
        stats: of the rounds; a draft of the teacher is accepted if the student keeps it.
    """

    texts: list[Text]
    stats: SpecStats


class _Rsd(TextHandler):
    def __init__(
        self,
        drafter: PromptedDrafter,
        prompts: dict[int, Tensor],
        save: Callable[[Text], None] | None,
    ) -> None:
        self._drafter = drafter
        self._prompts = prompts
        self._save = save

    def begin(self, row: int, text: Text) -> None:
        self._drafter.assign(row, self._prompts[text.sequence], len(text.prompt))

    def after_commit(self, row: int, text: Text, before: int) -> str:
        return "" if text.finished or not self._drafter.full(row) else "length"

    def save(self, text: Text) -> None:
        if self._save is not None:
            self._save(text)


def rsd_generate(
    student: Any,
    teacher: Any,
    input_ids: Tensor | Sequence[Tensor],
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    teacher_input_ids: Tensor | Sequence[Tensor] | None = None,
    teacher_attention_mask: Tensor | None = None,
    id_map: IdMap | None = None,
    num_draft_tokens: int = 5,
    p_th: float = 0.01,
    top_n: int = 20,
    trials: int = 5,
    retry: Literal["resample", "descend", "none"] = "resample",
    student_probs: Literal["raw", "warped"] = "raw",
    temperature: float = 0.7,
    top_p: float = 0.95,
    top_k: int = 20,
    seed: int = 0,
    sequence_ids: Sequence[int] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    batch_size: int | None = None,
    resume: Sequence[Text] = (),
    save: Callable[[Text], None] | None = None,
    streamer: Streamer | TextStreamer | None = None,
    progress: bool = False,
) -> RsdOutput:
    """Texts that the teacher proposes and the student decides.

    The tokens do not depend on `num_draft_tokens`, on the batch, or on interruptions: random words
    are those of (seed + sequence id, position).

    Args:
        student: a causal language model of transformers, or a `ModelAdapter`.
        teacher: another one.
        input_ids: (B, L) or a list of (L,): prompts of the student.
        attention_mask: (B, L), 0 at padding.
        max_new_tokens: most tokens of each text.
        teacher_input_ids: prompts of the teacher; None: those of the student, in its own ids.
        teacher_attention_mask: of them.
        id_map: student id -> the teacher's ids that spell it; see `id_map_of`. Ids that are not in
            it are the same in both vocabularies.
        num_draft_tokens: K, at least 1.
        p_th: a token stands if the student gives it this probability,
        top_n: and it is one of the student's so many most likely ones; 0: whichever it is.
        trials: draws of the teacher for one position, the draft included.
        retry: further draws are independent ones, or the teacher's tokens by falling probability.
        student_probs: whether the test uses the student's probabilities before or after
            temperature and cuts.
        temperature: of the teacher's draws, and of the student's own tokens; above 0.
        top_p: cut of both, as `top_k`. The teacher's is taken among the shared tokens.
        top_k: 0: all.
        seed: of sequence 0.
        sequence_ids: a number for each prompt; None: 0, 1, ...
        eos_token_id: ids that end a text; None: those of the student's configuration.
        batch_size: texts that are written at the same time; None: all, of a list up to 8.
        resume: texts of an earlier call, which go on where they are; others begin.
        save: called with each text after each of its rounds. What it keeps can be resumed.
        streamer: see `Stream`.
        progress: show a bar.

    Returns:
        The texts. `finished` is "eos" or "length", the latter also where the teacher can read no
        more.

    Raises:
        ValueError: an argument is out of range, or prompts and models do not fit.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        >>> config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=99, eos_token_id=None)
        >>> student, teacher = (LlamaForCausalLM(config).eval() for _ in range(2))
        >>> out = rsd_generate(student, teacher, torch.tensor([[5, 6, 7]]), max_new_tokens=9)
        >>> len(out.texts[0].tokens), out.texts[0].finished
        (9, 'length')

    Source: arXiv 2509.22230.
    """
    own, other = as_adapter(student), as_adapter(teacher)
    check(temperature > 0, f"rsd_generate: temperature must be above 0, got {temperature}")
    check(trials >= 1, f"rsd_generate: trials must be at least 1, got {trials}")
    for name, value, choices in (
        ("retry", retry, ("resample", "descend", "none")),
        ("student_probs", student_probs, ("raw", "warped")),
    ):
        check(
            value in choices,
            f"rsd_generate: {name} must be one of {', '.join(choices)}, got {value!r}",
        )
    drafter = PromptedDrafter(other, own.vocab_size, id_map)
    texts = texts_of(input_ids, attention_mask, sequence_ids, max_new_tokens, "rsd_generate")
    teachers = own_prompts(
        other,
        drafter.spell,
        texts,
        teacher_input_ids,
        teacher_attention_mask,
        "rsd_generate: teacher_input_ids",
    )
    _resume(texts, resume)
    session = SpecSession(
        own,
        drafter,
        rows=_batch_size(batch_size, [text.prompt for text in texts], input_ids),
        capacity=max(len(text.prompt) for text in texts) + max_new_tokens,
        num_draft_tokens=num_draft_tokens,
        rule="rsd",
        params={
            "p_th": p_th,
            "top_n": top_n,
            "trials": trials,
            "retry": retry,
            "student_probs": student_probs,
        },
        sampling=Sampling(temperature, top_k, top_p),
        eos_ids=_ids(getattr(own, "eos_ids", ()) if eos_token_id is None else eos_token_id),
    )
    stream = None if streamer is None else Stream(streamer, [text.prompt for text in texts])
    write(session, texts, seed, _Rsd(drafter, teachers, save), stream, progress)
    return RsdOutput(texts, session.stats)


def _resume(texts: Sequence[Text], resume: Sequence[Text]) -> None:
    """Take over what was written of some texts."""
    known = {text.sequence: text for text in texts}
    for old in resume:
        text = known.get(old.sequence)
        if text is None or not torch.equal(text.prompt, old.prompt.to(text.prompt.device)):
            raise ValueError(
                "rsd_generate: resume must hold sequences of input_ids with the same prompts, got "
                f"sequence {old.sequence}"
            )
        text.tokens, text.sources = list(old.tokens), list(old.sources)
        text.finished = old.finished
        text.cut(text.limit)
        if len(text.tokens) == text.limit:
            text.finished = text.finished or "length"


def fallback_share(text: Text) -> float:
    """Share of a text's tokens that the student spoke itself."""
    return text.sources.count(STUDENT) / len(text.sources) if text.sources else 0.0


def keeps_trace(
    text: Text,
    *,
    end_of_think: int,
    end_of_turn: Sequence[int],
    correct: Callable[[Text], bool],
    most_fallback: float = 0.5,
) -> bool:
    """Whether a trace is good enough to train on, by the published filter.

    It has thought exactly once, has ended, is mostly the teacher's, and its answer is right.

    Args:
        text: the trace.
        end_of_think: id that ends the reasoning.
        end_of_turn: ids, one of which must occur.
        correct: judges the answer; asked last.
        most_fallback: largest share of tokens that the student spoke itself.

    Source: arXiv 2509.22230.
    """
    return (
        text.tokens.count(end_of_think) == 1
        and any(token in end_of_turn for token in text.tokens)
        and fallback_share(text) <= most_fallback
        and correct(text)
    )


def select_trace(
    texts: Sequence[Text], *, tries: int = 16, keep: Callable[[Text], bool]
) -> Text | None:
    """The shortest of the first `tries` traces of a problem that are kept; None: there is none.

    Args:
        texts: of one problem.
        tries: how many are looked at.
        keep: such as `keeps_trace` with its arguments.

    Example:
        >>> prompt = torch.tensor([1])
        >>> texts = [Text(i, prompt, 9, tokens=[5] * (4 - i) + [7, 8]) for i in range(3)]
        >>> keep = lambda text: keeps_trace(
        ...     text, end_of_think=7, end_of_turn=[8], correct=lambda text: True
        ... )
        >>> select_trace(texts, keep=keep).sequence
        2

    Source: arXiv 2509.22230.
    """
    return min(
        (text for text in texts[:tries] if keep(text)),
        key=lambda text: len(text.tokens),
        default=None,
    )
