"""Several workers solve one task: the loop around a session, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from alignops._checks import ceil_div, check
from alignops.attention.adapter import ConcurrentModel
from alignops.attention.choose import Processor, end_of_text
from alignops.attention.errors import PoolExhausted
from alignops.attention.layouts import Cells, Layout
from alignops.attention.prompts import Finisher, Texts, prompt_ids, worker_names
from alignops.attention.session import HogwildSession, Stream
from alignops.attention.stats import HogwildStats
from alignops.attention.steps import StepRule
from alignops.attention.workers import Step
from alignops.speculative.adapter import Sampling

if TYPE_CHECKING:
    from alignops.attention.workspace import Block

#: Tokens of a page; and pages per worker for headers, openings and page ends of short blocks.
PAGE = 32
SPARE_PAGES = 32

Reason = Literal["answer", "finished", "budget", "pool", "interrupted"]


@dataclass(frozen=True)
class HogwildResult:
    """What the workers have written.

    Attributes:
        workers: their names.
        tokens: of each worker by name: all, given and sampled ones.
        steps: finished ones, in the order in which they were finished.
        history: their texts.
        unfinished: name to text of the steps that were being written.
        answer: the final answer; None: there is none.
        answered_by: whose it is; "" where the finisher asked for it.
        reason: why it ended: "answer" in a finished step, all "finished", "budget" used up, "pool"
            full, or "interrupted" from the keyboard.
        prompt_ids: what all workers have read first.
        stats: counts and times, and who attended to whom.
    """

    workers: list[str]
    tokens: dict[str, list[int]]
    steps: list[Step]
    history: str
    unfinished: dict[str, str]
    answer: str | None
    answered_by: str
    reason: Reason
    prompt_ids: list[int]
    stats: HogwildStats

    @staticmethod
    def of(session: HogwildSession, reason: Reason) -> HogwildResult:
        """What a session has come to so far."""
        return HogwildResult(
            session.workers,
            {name: session.tokens(name) for name in session.workers},
            list(session.steps),
            session.history,
            session.unfinished,
            session.answer,
            session.answered_by,
            reason,
            session.prompt_ids,
            session.stats,
        )


def hogwild_generate(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[int] | Tensor,
    *,
    workers: int | Sequence[str] = 2,
    layout: str | Layout | Callable[[int, Cells], Sequence[Block]] = "combined",
    max_steps: int,
    budget_tokens: int | None = None,
    texts: str | Path | Texts = "en",
    step_rule: StepRule | None = StepRule(),  # noqa: B008 - frozen
    check_every: int = 1024,
    check_text: str | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | Sequence[int] = 0,
    forbid: Sequence[str | int] | None = None,
    stop: Sequence[str] = (),
    answer_pattern: str | None = None,
    finisher: str | Finisher | None = "answer",
    logits_processor: Processor | None = None,
    encode: Literal["in_context", "isolated"] = "in_context",
    visibility: Literal["inclusive", "lagged"] = "inclusive",
    rope_mode: Literal["raw", "local"] = "raw",
    mass_every: int = 16,
    stream: Stream | None = None,
    on_step: Callable[[Step], None] | None = None,
    progress: bool = False,
) -> HogwildResult:
    """Several workers of one model solve a task together, each reading what the others write.

    Ends with the first final answer in a finished step, when all workers have finished, or with the
    budget; then the finisher asks for the answer. An interruption from the keyboard returns what
    there is.

    Args:
        model: a causal language model of transformers, or a `ConcurrentModel`; settings of sampling
            are its `generation_config`, if it has one.
        tokenizer: of the model.
        prompt: the task, or token ids; see `HogwildSession`.
        workers: how many, or their names.
        layout: what the workers see; see `layouts`.
        max_steps: most forwards; each gives every active worker a token.
        budget_tokens: most sampled tokens of all workers together; None: any number.
        texts: a language, a JSON file, or a set of texts.
        step_rule: when a step ends.
        check_every: tokens of all workers between two questions whether work is redundant; 0:
            never.
        check_text: this question; None: that of the texts.
        temperature: of the distribution that is sampled; 0 is greedy. None, as in the next three:
            as the model's generation settings say, greedy if they do not.
        top_k: ids that are kept, 0: all.
        top_p: the most likely ids that reach this sum are kept.
        min_p: ids at least this fraction of the largest probability are kept.
        seed: random words of worker i are those of `seed + i`, or a list.
        forbid: texts and ids that no worker may write.
        stop: texts behind which a worker is finished.
        answer_pattern: regular expression of a final answer.
        finisher: how the answer is asked for if there is none: the name of one of the texts
            ("answer", "expression", "code"), your own, or None: not at all.
        logits_processor: called as `processor(ids (1, c), scores (1, V))` for each token; penalties
            of the model's generation settings come before it.
        encode: of headers: "in_context" or "isolated".
        visibility: of tokens of the same forward: "inclusive" or "lagged".
        rope_mode: of a model of transformers; see `concurrent_model`.
        mass_every: measure who attends to whom in each so-many-th forward; 0: never.
        stream: called with each new `Piece` of text, which says who writes it.
        on_step: called with each finished `Step`.
        progress: show a bar of sampled tokens.

    Returns:
        What the workers have written, and statistics.

    Raises:
        ValueError: an argument is not as described; nothing has been computed.
        UnsupportedModel: the model's attention cannot run over shared blocks.
        PoolExhausted: the prompt does not fit into the pool of a `ConcurrentModel`.

    Source: arXiv 2504.06261.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from alignops.testing import ByteTokenizer
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        >>> sizes |= {"vocab_size": 257, "max_position_embeddings": 8192}
        >>> config = LlamaConfig(**sizes, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(config).eval()
        >>> result = hogwild_generate(model, ByteTokenizer(), "Add 2 and 3.", max_steps=8)
        >>> result.workers, result.reason, result.stats.forwards, result.stats.sampled
        (['Ada', 'Ben'], 'budget', 8, 16)
    """
    check(max_steps >= 0, f"max_steps must be at least 0, got {max_steps}")
    check(
        budget_tokens is None or budget_tokens >= 0,
        f"budget_tokens must be at least 0, got {budget_tokens}",
    )
    sets = texts if isinstance(texts, Texts) else Texts.load(texts)
    if check_text is not None:
        sets = replace(sets, check=check_text)
    ask = None if finisher is None else sets.finisher(finisher)
    names = worker_names(workers, sets)
    ids = prompt_ids(prompt, names, sets, tokenizer)
    most = len(names) * max_steps
    most = most if budget_tokens is None else min(most, budget_tokens)
    concurrent = _concurrent(model, rope_mode, len(ids) + 2 * most, len(names))
    settings = getattr(model, "generation_config", None)
    session = HogwildSession(
        concurrent,
        tokenizer,
        ids,
        workers=names,
        layout=layout,
        texts=sets,
        step_rule=step_rule,
        check_every=check_every,
        sampling=_sampling(settings, temperature, top_k, top_p, min_p),
        seed=seed,
        forbid=forbid,
        stop=stop,
        eos_ids=_end_ids(settings, tokenizer),
        answer_pattern=answer_pattern,
        logits_processor=_processor(settings, logits_processor, concurrent.device),
        encode=encode,
        visibility=visibility,
        mass_every=mass_every,
        stream=stream,
        on_step=on_step,
    )
    reason: Reason = "interrupted"
    with suppress(KeyboardInterrupt):
        reason = _run(session, max_steps, budget_tokens, most if progress else None)
        if ask is not None and session.answer is None and reason in ("finished", "budget"):
            session.conclude(ask)
    return HogwildResult.of(session, reason)


def _run(session: HogwildSession, max_steps: int, budget: int | None, total: int | None) -> Reason:
    with _bar(total) as update:
        try:
            while not session.done:
                left = None if budget is None else budget - session.stats.sampled
                if session.stats.forwards >= max_steps or left == 0:
                    return "budget"
                update(len(session.step(session.active[:left])))
        except PoolExhausted:
            return "pool"
    return "finished" if session.answer is None else "answer"


@contextmanager
def _bar(total: int | None) -> Iterator[Callable[[int], object]]:
    """What is told of so many more tokens."""
    if total is None:
        yield lambda count: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="tok") as bar:
        yield bar.update


def _concurrent(
    model: Any, rope_mode: Literal["raw", "local"], tokens: int, workers: int
) -> ConcurrentModel:
    """The model as sessions see it, with a pool for so many tokens.

    Raises:
        TypeError: it is neither a model of transformers nor a `ConcurrentModel`.
    """
    if isinstance(model, ConcurrentModel):
        return model
    if hasattr(model, "config") and callable(model):
        from alignops.integrations.attention import concurrent_model

        pages = ceil_div(tokens, PAGE) + SPARE_PAGES * workers
        found: ConcurrentModel = concurrent_model(
            model, rope_mode=rope_mode, num_pages=pages, page_size=PAGE
        )
        return found
    raise TypeError(
        f"model must be a model of transformers or a ConcurrentModel, got {type(model).__name__}"
    )


def _sampling(
    settings: Any,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> Sampling:
    """What the model's settings say, as far as nothing else is said."""
    base = Sampling(temperature=0.0)
    if settings is not None:
        from alignops.integrations.generation import sampling_of

        base = sampling_of(settings)
    return Sampling(
        base.temperature if temperature is None else temperature,
        base.top_k if top_k is None else top_k,
        base.top_p if top_p is None else top_p,
        base.min_p if min_p is None else min_p,
    )


def _end_ids(settings: Any, tokenizer: Any) -> list[int]:
    """Ends of texts that the model's settings know, and the tokenizer."""
    found = set(end_of_text(tokenizer))
    if settings is not None:
        from alignops.integrations.generation import end_ids

        found |= set(end_ids(settings))
    return sorted(found)


def _processor(settings: Any, own: Processor | None, device: Any) -> Processor | None:
    """Penalties of the model's settings, then the caller's processor."""
    if settings is None:
        return own
    from alignops.integrations.generation import processors_of

    processors: Any = processors_of(settings, device)
    if own is not None:
        processors.append(own)
    found: Processor | None = processors if processors else None
    return found
