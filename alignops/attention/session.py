"""Several workers of one model over one cache, forward by forward, under the caller's control.

Between two calls a session is consistent, also if a model or a callback has raised an error in
between: what was fed stays fed, and the next call goes on from there.

Source: arXiv 2504.06261, section 3.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from alignops._checks import check
from alignops.attention.adapter import ConcurrentModel
from alignops.attention.board import Board
from alignops.attention.choose import Chooser, Processor, default_forbidden, end_of_text
from alignops.attention.layouts import Cells, Layout
from alignops.attention.prompts import Finisher, Texts, prompt_ids, worker_names
from alignops.attention.stats import HogwildStats, WorkerStats
from alignops.attention.steps import StepEnds, StepRule
from alignops.attention.tokens import Detokenizer, Forbidden, Vocabulary
from alignops.attention.workers import Keep, Piece, Step, Worker
from alignops.attention.writing import Rules, Writing
from alignops.speculative.adapter import Sampling

if TYPE_CHECKING:
    from alignops.attention.workspace import Block

Stream = Callable[[Piece], None]


class HogwildSession:
    """Workers that solve one task together, each reading what the others write.

    Every forward feeds all active workers. A step that ends is moved into the history, and its
    writer goes on with the next one. Tokens of a worker depend on its seed and their number only,
    not on how often it was interrupted.

    Args:
        model: whose pool has room for everything; see `concurrent_model`.
        tokenizer: of the model; `encode` and `decode` are enough.
        prompt: the task, around which `texts` put the rules of working together, or token ids
            (L,), which are taken as they are.
        workers: how many, or their names.
        layout: "combined", "interleaved", "contiguous", or your own; see `layouts`.
        texts: a language, a JSON file, or a set of texts.
        step_rule: when a step ends; None: never.
        check_every: after that many tokens of all workers, the next one to start a step is asked
            whether its work is redundant; 0: never.
        sampling: temperature and cuts; temperature 0 is greedy.
        seed: of worker i the random words are those of `seed + i`, or a list.
        forbid: texts and ids that no worker may write; None: the mark of titles, the end of
            thinking, and the beginning and the end of text.
        stop: texts behind which a worker is finished.
        eos_ids: ids that finish a worker, where they are not forbidden; None: the tokenizer's.
        answer_pattern: regular expression whose first group, or match, is a final answer; None:
            that of the texts.
        logits_processor: called as `processor(ids (1, c), scores (1, V))` for each token of each
            worker with the prompt and the worker's own ids.
        encode: of headers: "in_context" with the blocks before them, or "isolated".
        visibility: "inclusive": workers see each other's tokens of the same forward; "lagged": of
            earlier ones.
        mass_every: measure in each so-many-th forward who attends to whom; 0: never.
        stream: called with each `Piece` of text.
        on_step: called with each finished `Step`.

    Attributes:
        texts: of the session.
        prompt_ids: of the prompt.
        stats: counts, times, who attended to whom.

    Raises:
        ValueError: names are not unique or fewer than workers, the tokenizer has no tokens for the
            separator or no padding, an argument is out of range.
        LayoutError: the layout is unknown, or makes a view that is not allowed.
        PoolExhausted: the prompt does not fit.

    Example:
        See docs/attention.md.
    """

    def __init__(
        self,
        model: ConcurrentModel,
        tokenizer: Any,
        prompt: str | Sequence[int] | Tensor,
        *,
        workers: int | Sequence[str] = 2,
        layout: str | Layout | Callable[[int, Cells], Sequence[Block]] = "combined",
        texts: str | Path | Texts = "en",
        step_rule: StepRule | None = StepRule(),  # noqa: B008 - frozen
        check_every: int = 1024,
        sampling: Sampling = Sampling(temperature=0.0),  # noqa: B008 - frozen
        seed: int | Sequence[int] = 0,
        forbid: Sequence[str | int] | None = None,
        stop: Sequence[str] = (),
        eos_ids: Sequence[int] | None = None,
        answer_pattern: str | None = None,
        logits_processor: Processor | None = None,
        encode: Literal["in_context", "isolated"] = "in_context",
        visibility: Literal["inclusive", "lagged"] = "inclusive",
        mass_every: int = 16,
        stream: Stream | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> None:
        check(check_every >= 0, f"check_every must be at least 0, got {check_every}")
        check(mass_every >= 0, f"mass_every must be at least 0, got {mass_every}")
        check(
            visibility in ("inclusive", "lagged"),
            f"visibility must be inclusive or lagged, got {visibility!r}",
        )
        check(all(stop), "stop must not hold an empty text")
        self.texts = texts if isinstance(texts, Texts) else Texts.load(texts)
        names = worker_names(workers, self.texts)
        self._model = model
        self._vocabulary = Vocabulary(tokenizer, model.vocab_size)
        eos = frozenset(end_of_text(tokenizer) if eos_ids is None else eos_ids)
        if forbid is None:
            forbid = default_forbidden(tokenizer, self.texts, eos)
        forbidden = Forbidden(forbid, self._vocabulary, model.device)
        self._chooser = Chooser(sampling, forbidden, logits_processor)
        rules = Rules(
            self.texts,
            StepEnds(step_rule, self._vocabulary),
            eos,
            tuple(stop),
            re.compile(answer_pattern or self.texts.answer_pattern),
            check_every,
            max([forbidden.longest, *map(len, stop)]),
        )
        self._seeds = [seed] if isinstance(seed, int) else list(seed)
        check(
            isinstance(seed, int) or len(self._seeds) == len(names),
            f"seed must be one for each of {len(names)} workers, got {len(self._seeds)}",
        )
        self.visibility = visibility
        self._mass_every = mass_every
        self._stream, self._on_step = stream, on_step
        self._lock = threading.RLock()
        self.stats = HogwildStats(model.device)
        self.prompt_ids = prompt_ids(prompt, names, self.texts, tokenizer)
        check(
            all(0 <= i < model.vocab_size for i in self.prompt_ids),
            f"prompt must hold ids in [0, {model.vocab_size}), got {self.prompt_ids[:8]}",
        )
        self._board = Board(model, self.texts, layout, encode, self._vocabulary)
        self._writing = Writing(rules, self._board, self._vocabulary, self.stats)
        with self.stats.phase("prefill"):
            self._board.extend(self._board.common, self.prompt_ids)
            self._board.join([self._new_worker(name, i) for i, name in enumerate(names)])
        for worker in self._board.workers:
            self._writing.open(worker)

    # What can be read at any time

    @property
    def workers(self) -> list[str]:
        """Names of all workers, in order of their index, also of those that have finished."""
        return [worker.name for worker in self._board.workers]

    @property
    def active(self) -> list[str]:
        """Names of the workers that go on."""
        return [worker.name for worker in self._board.workers if worker.active]

    @property
    def steps(self) -> list[Step]:
        """Finished steps, in the order in which they were finished."""
        return list(self._writing.steps)

    @property
    def answer(self) -> str | None:
        """The final answer: of a finished step, or what `conclude` has asked for last."""
        return self._writing.answer

    @property
    def answered_by(self) -> str:
        """The name of the worker whose answer it is; "" if it was asked for."""
        return self._writing.answered_by

    @property
    def done(self) -> bool:
        """Whether there is a final answer, or no worker is left."""
        return self.answer is not None or not self.active

    @property
    def history(self) -> str:
        """The finished steps of all workers, as one text."""
        return self._writing.rules.separator.join(step.text for step in self.steps)

    @property
    def unfinished(self) -> dict[str, str]:
        """Name to text of the steps that are being written."""
        with self._lock:
            return {
                worker.name: self._vocabulary.decode(worker.written)
                for worker in self._board.workers
                if worker.visible and worker.written
            }

    def tokens(self, name: str) -> list[int]:
        """All tokens of a worker, given and sampled ones, also the one that is not fed yet."""
        return list(self._worker(name).tokens)

    def view(self, name: str) -> list[tuple[str, str]]:
        """What an active worker sees, in order: (block, text); what is not fed yet is not there.

        Blocks are "common", names of headers, and names of workers.
        """
        worker = self._worker(name, active=True)
        with self._lock:
            labels = self._board.labels
            return [
                (labels[block.id], self._vocabulary.decode(list(block.tokens)))
                for block in self._board.ws.view(worker.id)
            ]

    # Steps

    @torch.no_grad()
    def step(
        self,
        workers: Sequence[str] | None = None,
        visibility: Literal["inclusive", "lagged"] | None = None,
    ) -> dict[str, int]:
        """One forward, and one more token for each worker.

        Args:
            workers: names of those that take part; None: all active ones.
            visibility: of the tokens of this forward; None: that of the session.

        Returns:
            Name to the token that was sampled; empty if nobody is active.

        Raises:
            ValueError: a name is unknown or its worker has finished, or no token is possible.
            PoolExhausted: the pool is full; nothing was fed.
        """
        names = self.active if workers is None else workers
        group = [self._worker(name, active=True) for name in names]
        check(len(set(names)) == len(names), f"step: workers must be unique, got {names}")
        self._settle(group)
        group = [worker for worker in group if worker.active]
        self._feed(group, visibility or self.visibility)
        with self.stats.phase("sample"):
            chosen = self._chooser.choose(group, self.prompt_ids)
        with self._lock:
            for worker, token in zip(group, chosen, strict=True):
                self._writing.accept(worker, token)
            # Before another thread's step is finished: the history has the order of `steps`.
            self._settle(group)
        self._report()
        return {worker.name: token for worker, token in zip(group, chosen, strict=True)}

    def inject(self, text: str, to: str | None = None) -> None:
        """Put a text in front of the workers: a result of a tool, a remark.

        Args:
            text: any.
            to: name of a worker, who reads it as the continuation of its own step; None: everybody,
                as a finished step of its own.

        Raises:
            ValueError: the name is unknown, or its worker has finished.
        """
        if to is not None:
            worker = self._worker(to, active=True)
            worker.remarks.append(self._vocabulary.encode(text))
            return
        with self._lock, self.stats.phase("prefill"):
            ids = self._vocabulary.encode(self._writing.rules.separator + text)
            self._board.extend(self._board.common, ids)
            self._writing.remark(text, ids)
        self._report()

    def add_worker(self, name: str, at_index: int | None = None) -> None:
        """One more worker, who sees what the layout shows, and begins with an opening.

        Args:
            name: that nobody has.
            at_index: its place among the workers; None: the last one.

        Raises:
            ValueError: somebody has the name, or the place is out of range.
        """
        check(name not in self.workers, f"add_worker: name must be new, got {name!r}")
        places = len(self._board.workers)
        at = places if at_index is None else at_index
        check(0 <= at <= places, f"add_worker: at_index must be in [0, {places}], got {at}")
        with self._lock:
            worker = self._new_worker(name, places)
            with self.stats.phase("prefill"):
                self._board.join([worker], at)
            self._writing.open(worker)

    def set_weight(self, reader: str, block: str, *, bias: float = 0.0, gain: float = 1.0) -> None:
        """How much a worker attends to a block: scores become gain * score + bias.

        Args:
            reader: name of an active worker.
            block: "common", a header, or a worker's name: one of those in `view(reader)`.
            bias: 0 is neutral, -inf hides the block.
            gain: 1 is neutral.

        Raises:
            ValueError: a name is unknown.
        """
        worker = self._worker(reader, active=True)
        with self._lock:
            labels = self._board.labels
            found = {labels[b.id]: b for b in self._board.ws.view(worker.id)}
            check(block in found, f"block must be one of {', '.join(found)}, got {block!r}")
            self._board.ws.set_weight(worker.id, found[block], bias=bias, gain=gain)

    def finish_worker(self, name: str, keep: Keep = "history") -> None:
        """A worker stops. Its unfinished step joins the history, stays as it is, or is dropped.

        Args:
            name: of an active worker.
            keep: "history", "frozen" or "drop"; in layouts without a history the first is the
                second.

        Raises:
            ValueError: the name is unknown, its worker has finished, or `keep` is something else.
        """
        check(
            keep in ("history", "frozen", "drop"),
            f"finish_worker: keep must be history, frozen or drop, got {keep!r}",
        )
        worker = self._worker(name, active=True)
        worker.leaving = keep
        self._settle([worker])
        self._report()

    @torch.no_grad()
    def conclude(self, finisher: str | Finisher = "answer") -> str:
        """Ask for the answer now, greedily, behind everything that has been written.

        The workers can go on afterwards: nothing of it stays in the cache.

        Args:
            finisher: the name of one of the texts, or your own.

        Returns:
            The answer, which becomes `answer`: what the answer pattern finds in the finisher's
            opening and its continuation, else the continuation.

        Raises:
            ValueError: there is no such finisher.
        """
        finisher = self.texts.finisher(finisher)
        self._settle(self._board.workers)
        self._feed([w for w in self._board.workers if w.active], self.visibility, counted=False)
        vocabulary, rules, found = self._vocabulary, self._writing.rules, ""
        new = vocabulary.encode(finisher.text + finisher.opening)
        written: list[int] = []
        with self._lock, self.stats.phase("forward"), self._board.aside() as ask:
            while len(written) < finisher.max_tokens:
                token = int(ask(new).argmax())
                if token in rules.eos:
                    break
                new = [token]
                written += new
                found = vocabulary.decode(written)
                if finisher.until and finisher.until in found:
                    break
        answer = rules.answer_in(finisher.opening + found)
        if answer is None:
            answer = (found.split(finisher.until)[0] if finisher.until else found).strip()
        self._writing.answer, self._writing.answered_by = answer, ""
        return answer

    def fork(self) -> HogwildSession:
        """A copy that goes its own way from here on; pages are shared until one is written.

        Callbacks stay with this session.
        """
        with self._lock:
            self._settle(self._board.workers)
            twin = object.__new__(HogwildSession)
            twin.__dict__.update(self.__dict__)
            twin._lock = threading.RLock()
            twin._stream = twin._on_step = None
            twin._board = self._board.fork()
            twin.stats = self.stats.fork()
            twin._writing = self._writing.fork(twin._board, twin.stats)
        return twin

    # Tokens

    def _feed(self, group: Sequence[Worker], visibility: str, counted: bool = True) -> None:
        """Pending tokens go through the model; workers that have logits already are left out."""
        group = [worker for worker in group if worker.logits is None]
        if not group:
            return
        with self._lock:
            every = self._mass_every
            measured = counted and every > 0 and self.stats.forwards % every == 0
            self.stats.forwards += counted
            for worker in group:
                while worker.remarks:
                    self._writing.give(worker, worker.remarks.pop(0))
        with self.stats.phase("forward"):
            out = self._model.forward(
                self._board.ws,
                [worker.pending for worker in group],
                workers=[worker.id for worker in group],
                visibility=visibility,
                mass=measured,
            )
        for worker, logits in zip(group, out.logits, strict=True):
            worker.step += worker.pending
            worker.pending = []
            worker.logits = logits
        if out.mass is not None:
            with self._lock:
                labels = self._board.labels
                sources = [labels[block.id] for block in out.blocks]
                for worker, shares in zip(group, out.mass, strict=True):
                    self.stats.mass.add(worker.name, sources, shares)

    def _settle(self, group: Sequence[Worker]) -> None:
        """Carry out moves and farewells that are due."""
        for worker in group:
            if worker.closing is not None or worker.leaving is not None:
                with self._lock, self.stats.phase("move"):
                    self._writing.settle(worker)

    def _report(self) -> None:
        """Tell callbacks what is new, each thing once, also if they raise."""
        with self._lock:
            events = self._writing.events
            while events:
                event = events.popleft()
                callback: Any = self._on_step if isinstance(event, Step) else self._stream
                if callback is not None:
                    callback(event)

    # Workers

    def _new_worker(self, name: str, number: int) -> Worker:
        self.stats.workers[name] = WorkerStats()
        seeds = self._seeds
        seed = seeds[number] if number < len(seeds) else seeds[-1] + number - len(seeds) + 1
        return Worker(name, -1, self._board.ws.new_block(name), seed, Detokenizer(self._vocabulary))

    def _worker(self, name: str, active: bool = False) -> Worker:
        for worker in self._board.workers:
            if worker.name == name:
                check(
                    worker.active or not active, f"worker {name!r} must be active, it has finished"
                )
                return worker
        raise ValueError(f"worker must be one of {', '.join(self.workers)}, got {name!r}")
