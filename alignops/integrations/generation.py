"""Generation settings of models of transformers, for loops of our own."""

from __future__ import annotations

from typing import Any

from transformers.generation.logits_process import (
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from alignops.speculative.adapter import Sampling


def sampling_of(settings: Any) -> Sampling:
    """How tokens are chosen; greedy, unless the settings say `do_sample`.

    Args:
        settings: a `GenerationConfig`.

    Example:
        >>> from transformers import GenerationConfig
        >>> sampling_of(GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95)).top_p
        0.95
    """
    if not getattr(settings, "do_sample", False):
        return Sampling(temperature=0.0)

    def value(name: str, neutral: float) -> Any:
        found = getattr(settings, name, None)
        return neutral if found is None else found

    return Sampling(
        value("temperature", 1.0), value("top_k", 0), value("top_p", 1.0), value("min_p", 0.0)
    )


def processors_of(settings: Any, device: Any = "cpu") -> LogitsProcessorList:
    """Penalties and bans, called as `processors(ids (1, c), scores (1, V))`.

    Args:
        settings: a `GenerationConfig`.
        device: of the scores.

    Example:
        >>> from transformers import GenerationConfig
        >>> [type(p).__name__ for p in processors_of(GenerationConfig(repetition_penalty=1.1))]
        ['RepetitionPenaltyLogitsProcessor']
    """
    processors = LogitsProcessorList()
    penalty = getattr(settings, "repetition_penalty", None)
    if penalty is not None and penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    if getattr(settings, "no_repeat_ngram_size", None):
        processors.append(NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size))
    if getattr(settings, "bad_words_ids", None):
        processors.append(NoBadWordsLogitsProcessor(settings.bad_words_ids))
    if getattr(settings, "sequence_bias", None):
        processors.append(SequenceBiasLogitsProcessor(settings.sequence_bias))
    if getattr(settings, "suppress_tokens", None):
        processors.append(SuppressTokensLogitsProcessor(settings.suppress_tokens, device=device))
    return processors


def end_ids(settings: Any) -> tuple[int, ...]:
    """Ids that end a text.

    Args:
        settings: a `GenerationConfig`.
    """
    ids = getattr(settings, "eos_token_id", None)
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
