"""Generation for whole batches and pools of prompts: the same text, in fewer forwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from alignops._checks import check
from alignops.speculative.adapter import Drafter, ModelAdapter, Sampling
from alignops.speculative.auto import AutoK
from alignops.speculative.drafters import FunctionDrafter
from alignops.speculative.model_drafter import ModelDrafter
from alignops.speculative.pool import Job, Pool
from alignops.speculative.rows import Round
from alignops.speculative.schedule import WINDOW, Exspec, Refill, Scheduler, Static
from alignops.speculative.session import SpecSession
from alignops.speculative.stability import check_row_invariance
from alignops.speculative.stats import SpecStats
from alignops.speculative.streaming import Stream, Streamer, TextStreamer

#: Rows of a batch, where the input is a list and `batch_size` is not given.
BATCH = 8
#: Most drafts per round, where their number is chosen automatically.
MAX_DRAFTS = 8


@dataclass(frozen=True)
class SpecOutput:
    """Result of `speculative_generate`.

    Attributes:
        sequences: (N, L + G) int64: the input's columns, then what was generated, padded behind.
        lengths: (N,) int64: tokens of each sequence, prompt included, padding not.
        finish_reason: of each: "eos", "length" or "stop".
        stats: counts, and where the time went.
    """

    sequences: Tensor
    lengths: Tensor
    finish_reason: list[str]
    stats: SpecStats


def speculative_generate(
    target: Any,
    draft: Any,
    input_ids: Tensor | Sequence[Tensor],
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    num_draft_tokens: int | Literal["auto"] = 5,
    rule: str = "greedy",
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Sequence[int] = 0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    batch_size: int | None = None,
    window_size: int | None = None,
    scheduler: Literal["refill", "static", "exspec"] | Scheduler = "refill",
    layout: Literal["auto", "ragged", "defer", "realign", "rollback"] = "auto",
    streamer: Streamer | TextStreamer | None = None,
    progress: bool = False,
    return_stats: bool = False,
    debug: bool = False,
    stable: bool = False,
    stop: Sequence[Sequence[int]] | None = None,
    logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None,
    params: Mapping[str, Any] | None = None,
) -> SpecOutput | Tensor:
    """Text of the target, which verifies in one forward what a drafter has guessed.

    With `rule="greedy"` the result is that of `target.generate(..., do_sample=False)`, column for
    column; with "coupled" it is that of seeded sampling; with "lossless" and "block" it has the
    target's distribution. Batch, schedule, layout and drafter change no row's text, except through
    rounding, which `stable=True` rules out.

    Args:
        target: a causal language model of transformers, or a `ModelAdapter`.
        draft: guesses tokens: a model, a `Drafter` such as `PromptLookup(n)`, a callable
            `(tokens, lengths, k) -> ids (B, k)`, or `(ids, logits)`, or None for plain decoding.
        input_ids: (N, L) integers, or a list of N tensors (c,).
        attention_mask: (N, L), 0 where `input_ids` is padding, on whichever side; None: nowhere.
        max_new_tokens: at least 1.
        num_draft_tokens: K; "auto": chosen for every round by what was measured, from 0 to 8.
        rule: how drafts are judged; see `alignops.speculative.verify`.
        temperature: of the distribution that is sampled; 0 is greedy.
        top_k: ids that are kept, 0: all.
        top_p: the most likely ids that reach this sum are kept.
        min_p: ids at least this fraction of the largest probability are kept.
        seed: random words of sequence i are those of `seed + i`, or a list.
        eos_token_id: ids that end a text; None: those of the model's generation settings; an empty
            list: none.
        pad_token_id: fills up; None: the model's, else the first end of text, else 0.
        batch_size: rows; default N, for a list at most 8.
        window_size: sequences that `exspec` chooses from; default 32.
        scheduler: who is in the batch; see `schedule`.
        layout: where keys and values lie; see `placement`.
        streamer: called as `streamer(row, tokens, finished)`, or for N = 1 one of transformers.
        progress: show a bar.
        return_stats: return a `SpecOutput`.
        debug: check the invariants in every round (slow).
        stable: same shape in every forward, so that no token depends on rounding.
        stop: sequences of ids that end a text; they are kept.
        logits_processor: see `SpecSession`.
        params: parameters of the rule.

    Returns:
        (N, L + G) int64, or a `SpecOutput`. A list of prompts is padded in front.

    Raises:
        ValueError, TypeError: an argument is not as described; nothing has been computed.
        NotImplementedError: the model is of a kind that is not supported.

    Source: arXiv 2211.17192 (rounds), arXiv 2510.22876 (batches and pools).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from alignops.speculative import PromptLookup
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        >>> config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=99)
        >>> model = LlamaForCausalLM(config).double().eval()
        >>> prompts = torch.tensor([[5, 6, 7], [8, 9, 1]])
        >>> plain = model.generate(prompts, max_new_tokens=9, do_sample=False, pad_token_id=0)
        >>> options = {"max_new_tokens": 9, "pad_token_id": 0}
        >>> torch.equal(speculative_generate(model, PromptLookup(2), prompts, **options), plain)
        True
    """
    adapter = as_adapter(target)
    check(max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {max_new_tokens}")
    prompts = _prompts(input_ids, attention_mask)
    rows = _batch_size(batch_size, prompts, input_ids)
    # To know which rows have drafts costs nothing where they are on the host.
    trims = adapter.device.type == "cpu" and not stable
    auto = AutoK(MAX_DRAFTS, trims) if num_draft_tokens == "auto" else None
    k = MAX_DRAFTS if num_draft_tokens == "auto" else num_draft_tokens
    check(
        isinstance(k, int) and k >= 0,
        f"num_draft_tokens must be 'auto' or at least 0, got {num_draft_tokens!r}",
    )
    eos = _ids(getattr(adapter, "eos_ids", ()) if eos_token_id is None else eos_token_id)
    stats = SpecStats(adapter.device)
    drafter = as_drafter(draft, adapter) if k else None
    order = _scheduler(scheduler, window_size, rows)
    with ExitStack() as stack:
        stack.enter_context(stats.clock.job())
        session = SpecSession(
            adapter,
            drafter,
            rows=rows,
            capacity=max((len(p) for p in prompts), default=1) + max_new_tokens,
            num_draft_tokens=k,
            rule=rule,
            params=params,
            sampling=Sampling(temperature, top_k, top_p, min_p),
            eos_ids=eos,
            layout=layout,
            stable=stable,
            logits_processor=logits_processor,
            stop=stop or (),
            stats=stats,
            debug=debug,
        )
        tokens = [
            session.checked(p, max_new_tokens, f"input_ids[{i}]") for i, p in enumerate(prompts)
        ]
        if stable:
            check_row_invariance(adapter, rows, session.num_draft_tokens + 1)
        jobs = [
            Job(i, prompt, max_new_tokens, s)
            for i, (prompt, s) in enumerate(zip(tokens, _seeds(seed, len(tokens)), strict=True))
        ]
        stream = None if streamer is None else Stream(streamer, prompts)
        show = stack.enter_context(_Bar(len(jobs), stats)) if progress else None
        _run(session, Pool(session, jobs), order, auto, stream, show)
    return _output(jobs, input_ids, prompts, _pad(adapter, pad_token_id, eos), stats, return_stats)


def _run(
    session: SpecSession,
    pool: Pool,
    scheduler: Scheduler,
    auto: AutoK | None,
    stream: Stream | None,
    show: _Bar | None,
) -> None:
    clock = session.stats.clock
    while pool.unfinished:
        with clock.phase("schedule"):
            scheduler.arrange(pool)
        if auto is None:
            done = session.commit(session.verify(session.draft()))
        else:
            done = _measured_round(session, auto)
        with clock.phase("schedule"):
            served = pool.after(done)
        if stream is not None:
            for job, tokens in served:
                stream.emit(job.index, tokens, bool(job.reason))
        if show is not None:
            show.update(sum(1 for job, _ in served if job.reason))


def _measured_round(session: SpecSession, auto: AutoK) -> Round:
    """A round with as many drafts as pay."""
    clock, active = session.stats.clock, session.active
    rows = session.rows if session.stable else 1 + max(active)
    session.most_drafts = auto.choose(rows)
    before = clock.seconds()
    drafts = session.draft()
    guesses: list[list[int]] = []
    kinds = None
    if auto.trims:
        with clock.phase("schedule"):
            guesses = [[i for i in row if i >= 0] for row in drafts.ids[active].tolist()]
            if drafts.kind is not None:
                kinds = drafts.kind[active].tolist()
            drafts = drafts.first(auto.width(rows, [len(row) for row in guesses], kinds))
    done = session.commit(session.verify(drafts))
    offered, accepted = (
        [counts[row] for row in active] for counts in (done.offered, done.accepted)
    )
    for i, guess in enumerate(guesses):
        offered[i], accepted[i] = _foretold(guess, done.tokens[active[i]])
    after = clock.seconds()
    auto.observe(
        rows=rows,
        asked=session.most_drafts,
        width=drafts.ids.shape[1],
        offered=offered,
        accepted=accepted,
        kinds=kinds,
        draft_seconds=after["draft"] - before["draft"],
        target_seconds=after["target"] - before["target"],
    )
    return done


def _foretold(guess: list[int], tokens: list[int]) -> tuple[int, int]:
    """How many drafts a round's tokens tell about, computed or not, and how many were right."""
    told = min(len(guess), len(tokens))
    return told, next((i for i in range(told) if guess[i] != tokens[i]), told)


class _Bar:
    """A bar of sequences that have ended, with tokens per second and per round."""

    def __init__(self, total: int, stats: SpecStats) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(total=total, unit="seq")
        self._stats = stats

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def update(self, ended: int) -> None:
        """So many more have ended."""
        if ended:
            stats = self._stats
            figures = (
                f"{stats.tokens_per_second:.1f} tok/s, {stats.tokens_per_round:.2f} tok/round, "
                f"{stats.acceptance:.0%} accepted"
            )
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(ended)


# Arguments


def as_adapter(model: Any) -> ModelAdapter:
    """The model as generation sees it.

    Raises:
        TypeError: it is neither an adapter nor a model of transformers.
    """
    if isinstance(model, ModelAdapter):
        return model
    if hasattr(model, "config") and callable(model):
        from alignops.integrations.speculative import HFAdapter

        adapter: ModelAdapter = HFAdapter(model)
        return adapter
    raise TypeError(
        f"target must be a model of transformers or a ModelAdapter, got {type(model).__name__}"
    )


def as_drafter(draft: Any, target: ModelAdapter) -> Drafter | None:
    """The drafter of a job: a drafter, a callable, a model, or None.

    Raises:
        TypeError: it is none of them.
    """
    if draft is None or hasattr(draft, "propose"):
        drafter: Drafter | None = draft
        return drafter
    if isinstance(draft, ModelAdapter) or hasattr(draft, "config"):
        return ModelDrafter(as_adapter(draft))
    if callable(draft):
        return FunctionDrafter(draft)
    raise TypeError(
        "draft must be a model, a Drafter, a callable (tokens, lengths, k) or None, got "
        f"{type(draft).__name__}"
    )


def _prompts(input_ids: Tensor | Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    if not isinstance(input_ids, Tensor):
        for i, prompt in enumerate(input_ids):
            if not isinstance(prompt, Tensor):
                raise TypeError(f"input_ids[{i}] must be a Tensor, got {type(prompt).__name__}")
        check(mask is None, "attention_mask must be None where input_ids is a list")
        return list(input_ids)
    check(input_ids.dim() == 2, f"input_ids must have shape (N, L), got {tuple(input_ids.shape)}")
    if mask is None:
        return list(input_ids)
    check(
        mask.shape == input_ids.shape,
        f"attention_mask must have shape {tuple(input_ids.shape)}, got {tuple(mask.shape)}",
    )
    kept = mask.to(input_ids.device, torch.bool)
    return [row[seen] for row, seen in zip(input_ids, kept, strict=True)]


def _batch_size(
    batch_size: int | None, prompts: list[Tensor], input_ids: Tensor | Sequence[Tensor]
) -> int:
    most = max(1, len(prompts))
    if batch_size is None:
        return most if isinstance(input_ids, Tensor) else min(BATCH, most)
    check(batch_size >= 1, f"batch_size must be at least 1, got {batch_size}")
    return min(batch_size, most)


def _scheduler(scheduler: str | Scheduler, window: int | None, rows: int) -> Scheduler:
    if not isinstance(scheduler, str):
        return scheduler
    check(
        scheduler in ("static", "refill", "exspec"),
        f"scheduler must be static, refill or exspec, got {scheduler!r}",
    )
    if scheduler == "exspec":
        return Exspec(max(WINDOW, rows) if window is None else window)
    return Static() if scheduler == "static" else Refill()


def _ids(ids: int | Sequence[int]) -> tuple[int, ...]:
    return (ids,) if isinstance(ids, int) else tuple(int(i) for i in ids)


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    if isinstance(seed, int):
        return [seed + i for i in range(count)]
    check(len(seed) == count, f"seed must be one for each of {count} sequences, got {len(seed)}")
    return list(seed)


def _pad(adapter: ModelAdapter, pad: int | None, eos: tuple[int, ...]) -> int:
    if pad is None:
        pad = getattr(adapter, "pad_id", None)
    if pad is not None:
        return pad
    return eos[0] if eos else 0


# Result


def _output(
    jobs: list[Job],
    input_ids: Tensor | Sequence[Tensor],
    prompts: list[Tensor],
    pad: int,
    stats: SpecStats,
    return_stats: bool,
) -> SpecOutput | Tensor:
    texts = [job.tokens for job in jobs if job.tokens is not None]
    generated = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    if isinstance(input_ids, Tensor):
        device, columns = input_ids.device, input_ids.shape[1]
    else:
        device = prompts[0].device if prompts else torch.device("cpu")
        columns = max((len(p) for p in prompts), default=0)
    width = max((len(g) for g in generated), default=0)
    sequences = torch.full((len(jobs), columns + width), pad, dtype=torch.int64, device=device)
    if isinstance(input_ids, Tensor):
        sequences[:, :columns] = input_ids
    for i, (prompt, new) in enumerate(zip(prompts, generated, strict=True)):
        if not isinstance(input_ids, Tensor):
            sequences[i, columns - len(prompt) : columns] = prompt
        sequences[i, columns : columns + len(new)] = new
    if not return_stats:
        return sequences
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64, device=device)
    return SpecOutput(sequences, lengths, [job.reason for job in jobs], stats)
