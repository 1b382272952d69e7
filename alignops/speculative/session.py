"""One batch of sequences, round by round: draft, target forward, verify, commit.

Shape letters: B rows, n first rows that a round works on, K drafts, Q = K + 1, V ids.

Source: arXiv 2211.17192 (rounds), arXiv 2510.22876 (batches of rows that accept differently).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alignops._checks import check
from alignops.speculative.adapter import Batch, Drafter, Drafts, ModelAdapter, Sampling
from alignops.speculative.interrupts import deferred_interrupt
from alignops.speculative.invariants import CheckedAdapter
from alignops.speculative.placement import (
    PLACEMENTS,
    Placement,
    StablePlacement,
    choose_layout,
)
from alignops.speculative.rows import ParkedSequence, Round, Row
from alignops.speculative.stats import SpecStats
from alignops.speculative.verify import VerifyOut, verify

#: Rules that take the drafter's logits into account.
RULES_WITH_PROPOSALS = ("lossless", "block", "rsd")
#: Rules that may emit nothing but drafts: a row without drafts would never end.
RULES_OF_DRAFTS = ("rsd", "nudge")
_FINISHED = ("", "eos", "length", "stop")
_STOP = 3


class SpecSession:
    """Speculative decoding of up to B sequences, under the caller's control.

    Between two calls the session is consistent, also if a model, a drafter or a callback has raised
    an error in between: the round is then simply made again.

    Args:
        target: the model whose text is wanted.
        drafter: guesses; None: plain decoding.
        rows: B.
        capacity: most tokens of a sequence, prompt included.
        num_draft_tokens: K, most drafts per row and round.
        rule: how drafts are judged; see `verify`.
        params: parameters of the rule; "given" may be one number or (B,).
        sampling: temperature and cuts of the distribution; the rule "greedy" has temperature 0.
        eos_ids: up to 8 ids that end a text.
        layout: of keys and values; see `placement`.
        stable: every forward has the same shape, so that rounding cannot change tokens.
        logits_processor: called as `processor(prefix (1, c), scores (1, V))` for each token that
            may be chosen; must have an attribute `per_position_safe` that is true.
        stop: sequences of ids that end a text, kept in it.
        stats: told of everything.
        debug: check the invariants of the layout in every round (slow).

    Raises:
        ValueError: an argument is out of range, or the model does not allow for it.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from alignops.integrations.speculative import HFAdapter
        >>> from alignops.speculative import PromptLookup
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=99))
        >>> session = SpecSession(HFAdapter(model.eval()), PromptLookup(), rows=2, capacity=40)
        >>> rows = session.prefill([torch.tensor([5, 6, 7]), torch.tensor([8])], max_new_tokens=9)
        >>> while session.active:
        ...     done = session.commit(session.verify(session.draft()))
        >>> [len(session.tokens_of(row)) for row in rows]
        [12, 10]
    """

    def __init__(
        self,
        target: ModelAdapter,
        drafter: Drafter | None = None,
        *,
        rows: int,
        capacity: int,
        num_draft_tokens: int = 5,
        rule: str = "greedy",
        params: Mapping[str, Any] | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        eos_ids: Sequence[int] = (),
        layout: str = "auto",
        stable: bool = False,
        logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None,
        stop: Sequence[Sequence[int]] = (),
        stats: SpecStats | None = None,
        debug: bool = False,
    ) -> None:
        check(rows >= 1, f"SpecSession: rows must be at least 1, got {rows}")
        check(num_draft_tokens >= 0, f"SpecSession: num_draft_tokens >= 0, got {num_draft_tokens}")
        self.target: ModelAdapter = CheckedAdapter(target) if debug else target
        self.drafter = drafter
        self.rows = rows
        self.capacity = capacity
        self.num_draft_tokens = num_draft_tokens if drafter is not None else 0
        self.most_drafts = self.num_draft_tokens
        self.rule = rule
        check(
            rule not in RULES_OF_DRAFTS or self.num_draft_tokens > 0,
            f"SpecSession: num_draft_tokens must be at least 1, and drafter given, where rule is "
            f"{rule}, got {self.num_draft_tokens}",
        )
        self.params = dict(params or {})
        self.sampling = replace(
            sampling,
            temperature=0.0 if rule == "greedy" else sampling.temperature,
            race=rule == "coupled",
            vocab_size=target.vocab_size,
        )
        self.eos_ids = tuple(eos_ids)
        self.layout = choose_layout(target, layout, stable)
        check(
            rule != "nudge" or self.layout != "rollback",
            "SpecSession: layout must not be rollback where rule is nudge: no state can be undone",
        )
        self.stable = stable
        if logits_processor is not None:
            check(
                bool(getattr(logits_processor, "per_position_safe", False)),
                "SpecSession: logits_processor must have per_position_safe=True: it is applied to "
                "every position with the drafts in its prefix",
            )
        self.logits_processor = logits_processor
        self.stop = [list(sequence) for sequence in stop]
        check(all(self.stop), "SpecSession: stop must not hold an empty sequence")
        self.stats = SpecStats(target.device) if stats is None else stats
        # A row feeds up to K drafts behind its last token, also those that are cut later.
        slots = capacity + self.num_draft_tokens
        self.placement: Placement = (
            StablePlacement(self.target, rows, slots, self.stats, self.num_draft_tokens + 1)
            if stable
            else PLACEMENTS[self.layout](self.target, rows, slots, self.stats)
        )
        if drafter is not None:
            drafter.start(rows, capacity, self.sampling)
        device = target.device
        self._tokens = torch.zeros(
            rows, capacity + self.num_draft_tokens + 1, dtype=torch.int64, device=device
        )
        self._seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self._state = torch.zeros(rows, dtype=torch.uint8, device=device)
        self._host = [Row() for _ in range(rows)]
        self._drafts: Drafts | None = None

    # Sequences

    @property
    def active(self) -> list[int]:
        """Rows whose sequence goes on."""
        return [i for i, row in enumerate(self._host) if row.active]

    @property
    def free(self) -> list[int]:
        """Rows without a sequence."""
        return [i for i, row in enumerate(self._host) if not row.occupied]

    def tokens_of(self, row: int) -> Tensor:
        """Prompt and generated tokens (c,) int64 of a row."""
        return self._tokens[row, : self._host[row].length].clone()

    def aligned(self, row: int) -> int:
        """Slot behind the last token of a row."""
        return self.placement.aligned(row)

    def prefill(
        self,
        prompts: Sequence[Tensor],
        max_new_tokens: int | Sequence[int],
        seeds: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> list[int]:
        """Begin several sequences at once.

        Args:
            prompts: (c,) integers each.
            max_new_tokens: of each, or of all.
            seeds: of each; default 0, 1 ...
            rows: free rows to use; default: the first ones.

        Returns:
            The rows, in the order of the prompts.

        Raises:
            ValueError: no free row, an empty prompt, an id that is not in the vocabulary, or a text
                longer than the session's capacity or the model's limit.
        """
        rows = self.free[: len(prompts)] if rows is None else list(rows)
        check(
            len(rows) == len(prompts) and set(rows) <= set(self.free),
            f"prefill: rows must be {len(prompts)} free ones of {self.free}, got {rows}",
        )
        limits = (
            [max_new_tokens] * len(rows)
            if isinstance(max_new_tokens, int)
            else list(max_new_tokens)
        )
        seeds = list(range(len(rows))) if seeds is None else seeds
        tokens = [
            self.checked(prompt, limit, f"prompts[{i}]")
            for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
        ]
        try:
            with self.stats.clock.phase("target"):
                self.placement.prefill(rows, tokens)
            if self.drafter is not None:
                with self.stats.clock.phase("draft"):
                    for row, prompt in zip(rows, tokens, strict=True):
                        self.drafter.add(row, prompt)
        except BaseException:
            for row in rows:
                self._forget(row)
            raise
        for row, prompt, limit, seed in zip(rows, tokens, limits, seeds, strict=True):
            self._tokens[row, : len(prompt)] = prompt
            self._seeds[row] = _signed(seed)
            self._state[row] = 0
            self._host[row] = Row(len(prompt), limit, limit > 0, True)
        self.stats.prompts += len(rows)
        return rows

    def add(self, prompt: Tensor, max_new_tokens: int, seed: int = 0) -> int:
        """Begin one sequence in the first free row, which is returned; see `prefill`."""
        return self.prefill([prompt], max_new_tokens, [seed])[0]

    def checked(self, prompt: Tensor, limit: int, name: str) -> Tensor:
        """The prompt (c,) as int64 on the model's device; ValueError where `prefill` raises one."""
        check(prompt.dim() == 1, f"{name} must have shape (c,), got {tuple(prompt.shape)}")
        check(
            not prompt.is_floating_point() and prompt.dtype != torch.bool,
            f"{name} must hold integers, got {prompt.dtype}",
        )
        check(prompt.numel() > 0, f"{name} must not be empty: begin with a BOS token")
        check(limit >= 0, f"max_new_tokens must be at least 0, got {limit}")
        sizes = {"max_length of the model": self.target.max_length, "capacity": self.capacity}
        for size, most in sizes.items():
            check(
                most is None or len(prompt) + limit <= most,
                f"{name} and its new tokens must be at most {most} ({size}), got "
                f"{len(prompt)} + {limit}",
            )
        tokens = prompt.to(self.target.device, torch.int64)
        low, high = torch.stack(torch.aminmax(tokens)).tolist()
        check(
            low >= 0 and high < self.target.vocab_size,
            f"{name} must hold ids in [0, {self.target.vocab_size}), got {low} to {high}",
        )
        return tokens

    def remove(self, row: int) -> None:
        """Free a row."""
        if not self._host[row].occupied:
            return
        self._host[row] = Row()
        self._forget(row)

    def _forget(self, row: int) -> None:
        self.placement.clear(row)
        if self.drafter is not None:
            self.drafter.remove(row)

    def park(self, row: int) -> ParkedSequence:
        """Take a running sequence out of its row."""
        host = self._host[row]
        check(host.active, f"park: row must hold a running sequence, got {row}")
        tokens, state = self.tokens_of(row), self._state[row].clone()
        seed = int(self._seeds[row])
        draft = None if self.drafter is None else self.drafter.park(row)
        cache = self.placement.park(row)
        self._host[row] = Row()
        return ParkedSequence(tokens, host, seed, state, cache, draft)

    def resume(self, row: int, parked: ParkedSequence) -> None:
        """Put a parked sequence into a free row."""
        check(row in self.free, f"resume: row must be one of {self.free}, got {row}")
        self.placement.resume(row, parked.cache)
        if self.drafter is not None:
            self.drafter.resume(row, parked.tokens, parked.draft)
        self._tokens[row, : len(parked.tokens)] = parked.tokens
        self._seeds[row] = parked.seed
        self._state[row] = parked.state
        self._host[row] = parked.row

    def move(self, source: int, destination: int) -> None:
        """Put the sequence of a row into a free row."""
        self.resume(destination, self.park(source))

    # Rounds

    @property
    def _n(self) -> int:
        """Rows of the next round: up to the last active one."""
        return self.rows if self.stable else 1 + max(self.active)

    def batch(self) -> Batch:
        """The rows of the next round, as drafters see them."""
        host = self._host[: self._n]
        device = self.target.device
        lengths = [row.length if row.active else 1 for row in host]
        return Batch(
            self._tokens[: len(host)],
            torch.tensor(lengths, device=device),
            self._seeds[: len(host)],
            torch.tensor([row.active for row in host], device=device),
            lengths,
        )

    def draft(self) -> Drafts:
        """Drafts of all active rows.

        Raises:
            RuntimeError: no row is active.
        """
        if not self.active:
            raise RuntimeError("draft: no row is active")
        batch = self.batch()
        n, device = len(batch.host_lengths), self.target.device
        follows = 0 if self.rule in RULES_OF_DRAFTS else 1
        most = [
            min(self.most_drafts, max(row.remaining - follows, 0)) if row.active else 0
            for row in self._host[:n]
        ]
        width = max(most)
        if self.drafter is None or width == 0:
            return Drafts(torch.empty(n, 0, dtype=torch.int64, device=device))
        with self.stats.clock.phase("draft"):
            k = torch.tensor(most, dtype=torch.int32, device=device)
            drafts = self.drafter.propose(batch, k, width)
        ids = drafts.ids
        check(
            ids.dim() == 2 and ids.shape[0] == n and ids.shape[1] <= width,
            f"draft: a drafter must return ids of shape ({n}, at most {width}), got "
            f"{tuple(ids.shape)}",
        )
        with self.stats.clock.phase("schedule"):
            columns = torch.arange(ids.shape[1], device=device)
            out = (ids < 0) | (ids >= self.target.vocab_size) | (columns >= k[:, None])
            ids = ids.masked_fill(out.cumsum(1) > 0, -1)
        return replace(drafts, ids=ids)

    def verify(self, drafts: Drafts) -> VerifyOut:
        """One forward of the target over the last token and the drafts, and the rule's decision."""
        batch = self.batch()
        n, k = drafts.ids.shape
        if self.stable:
            k = self.num_draft_tokens
        ids = torch.full((n, k), -1, dtype=torch.int64, device=self.target.device)
        ids[:, : drafts.ids.shape[1]] = drafts.ids
        with self.stats.clock.phase("target"):
            last = batch.tokens.gather(1, batch.lengths[:, None] - 1)
            counts = 1 + (ids >= 0).sum(1, dtype=torch.int32)
            inputs = torch.cat([last, ids.clamp(min=0)], dim=1)
            logits = self.placement.forward(inputs, counts)
        if self.logits_processor is not None:
            logits = self._processed(logits, ids)
        if isinstance(self.target, CheckedAdapter):
            self.target.check(batch, inputs, counts)
        self._drafts = Drafts(ids, drafts.logits, drafts.stats)
        with self.stats.clock.phase("verify"):
            return self._decide(batch, ids, logits, drafts)

    def _decide(self, batch: Batch, ids: Tensor, logits: Tensor, drafts: Drafts) -> VerifyOut:
        with_proposals = self.rule in RULES_WITH_PROPOSALS and drafts.logits is not None
        proposals = _widened(drafts.logits, ids.shape[1]) if with_proposals else None
        statistics = _widened(drafts.stats, ids.shape[1]) if with_proposals else None
        remaining = [row.remaining for row in self._host[: len(ids)]]
        return verify(
            logits,
            ids,
            draft=proposals,
            draft_stats=statistics,
            rule=self.rule,
            params=self._params(len(ids)),
            seeds=batch.seeds,
            positions=batch.lengths,
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            min_p=self.sampling.min_p,
            eos_ids=self.eos_ids,
            remaining=torch.tensor(remaining, dtype=torch.int32, device=ids.device),
            state=self._state[: len(ids)],
            active=batch.active,
        )

    def _params(self, n: int) -> dict[str, Any]:
        """Parameters of the rule for the first n rows."""
        params = dict(self.params)
        given = params.get("given")
        if isinstance(given, int):
            given = torch.full((self.rows,), given, dtype=torch.int32, device=self.target.device)
        if given is not None:
            params["given"] = given[:n]
        return params

    def _processed(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Logits as the processor wants them, with the drafts in the prefix of each position."""
        assert self.logits_processor is not None
        out = logits.float() if logits.dtype != torch.float64 else logits.clone()
        for row in self.active:
            length = self._host[row].length
            prefix = torch.cat([self._tokens[row, :length], ids[row]])[None]
            for i in range(1 + int((ids[row] >= 0).sum())):
                out[row, i] = self.logits_processor(prefix[:, : length + i], out[row : row + 1, i])
        return out

    def commit(self, out: VerifyOut) -> Round:
        """Make a round's tokens part of the text, wholly or, if an error is raised, not at all.

        Ctrl-C waits until the round is written; `tokens_of` has its tokens then.

        Raises:
            ValueError: logits of a row held NaN, or nothing was possible; nothing is committed.
            RuntimeError: no row has emitted anything, for want of drafts.
        """
        assert self._drafts is not None
        drafts = self._drafts
        with self.stats.clock.phase("host"):
            offered = (drafts.ids >= 0).sum(1)
            columns = [out.num_emitted, out.accept_len, out.finished, out.row_error, offered]
            report = torch.cat([torch.stack([c.long() for c in columns], 1), out.tokens], 1)
            rows: list[list[int]] = report.tolist()
        if any(row[3] for row in rows):
            out.raise_errors()
        if not any(row[0] or row[2] for row in rows):
            raise RuntimeError(
                f"commit: no row has emitted a token: the rule {self.rule} needs drafts, and there "
                "were none"
            )
        with deferred_interrupt():
            return self._apply(out, drafts, offered, rows)

    def _apply(
        self, out: VerifyOut, drafts: Drafts, offered: Tensor, rows: list[list[int]]
    ) -> Round:
        """Write a round to everything that knows of the text; `rows` is the report of `commit`."""
        clock = self.stats.clock
        n, k = drafts.ids.shape
        with clock.phase("schedule"):
            host = self._host[:n]
            emitted = [row[0] for row in rows]
            finished = [row[2] for row in rows]
            for i, row in enumerate(rows):
                stop = host[i].stop_at(row[5 : 5 + emitted[i]], self.stop)
                if stop is not None:
                    emitted[i], finished[i] = stop, _STOP
            running = [row.active and not end for row, end in zip(host, finished, strict=True)]
            emitted = self.placement.cut(emitted, running)
            accepted = [min(row[1], count) for row, count in zip(rows, emitted, strict=True)]
            new = [row[5 : 5 + count] for row, count in zip(rows, emitted, strict=True)]
        lengths = torch.tensor([row.length for row in host], device=self.target.device)
        active = torch.tensor([row.active for row in host], device=self.target.device)
        with clock.phase("compact"):
            at = lengths[:, None] + torch.arange(k + 1, device=lengths.device)
            # What is behind the committed tokens is undefined, so it may be written right away.
            self._tokens[:n].scatter_(1, at, out.tokens)
            self.placement.commit(emitted)
            for i, end in enumerate(finished):
                if end:
                    self.placement.clear(i)
        with clock.phase("schedule"):
            self._state[:n] = out.state
            self._host[:n] = [
                row.after(tokens, not end, self.stop)
                for row, tokens, end in zip(host, new, finished, strict=True)
            ]
            self._drafts = None
        taken = torch.tensor(accepted, dtype=torch.int32, device=lengths.device)
        if self.drafter is not None:
            with clock.phase("draft"):
                self.drafter.commit(self._after_round(n), taken)
        self._record(out, drafts, offered, emitted, taken, finished, active)
        tested = [
            min(row[4], count) if end else row[4]
            for row, count, end in zip(rows, emitted, finished, strict=True)
        ]
        return Round(new, accepted, tested, [_FINISHED[end] for end in finished])

    def _after_round(self, n: int) -> Batch:
        host, device = self._host[:n], self.target.device
        lengths = [row.length for row in host]
        return Batch(
            self._tokens[:n],
            torch.tensor(lengths, device=device),
            self._seeds[:n],
            torch.tensor([row.active for row in host], device=device),
            lengths,
        )

    def _record(
        self,
        out: VerifyOut,
        drafts: Drafts,
        offered: Tensor,
        emitted: list[int],
        accepted: Tensor,
        finished: list[int],
        active: Tensor,
    ) -> None:
        grouped = self.placement.grouped
        ended = torch.tensor(finished, device=active.device)
        self.stats.record_round(
            offered=offered,
            accept_len=accepted,
            num_emitted=torch.tensor(emitted, device=active.device),
            finished=ended,
            active=active,
            slots=self.rows,
            zero_q=out.zero_q,
            grouping=None if grouped is None else "grouped" if grouped else "fallback",
        )
        self.stats.finished += sum(1 for end in finished if end)


def _widened(values: Tensor | None, width: int) -> Tensor | None:
    """Values (n, K', m) of drafts with more columns behind, for drafts that are none."""
    if values is None or values.shape[1] == width:
        return values
    missing = values.new_zeros(values.shape[0], width - values.shape[1], values.shape[2])
    return torch.cat([values, missing], dim=1)


def _signed(seed: int) -> int:
    """A 64-bit word as int64 holds it."""
    word = seed & 0xFFFFFFFFFFFFFFFF
    return word - (1 << 64) if word >> 63 else word
