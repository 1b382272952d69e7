"""What workers write: steps that begin and end, questions, answers, and the events of all that."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

from alignops.attention.board import Board
from alignops.attention.prompts import Texts
from alignops.attention.stats import HogwildStats
from alignops.attention.steps import StepEnds, StepRule
from alignops.attention.tokens import Vocabulary
from alignops.attention.workers import Keep, Piece, Step, Worker


@dataclass(frozen=True)
class Rules:
    """When steps, workers and the work end.

    Attributes:
        texts: of prefixes, openings and questions.
        ends: of steps.
        eos: ids that finish a worker.
        stop: texts that do.
        answer: a final answer.
        check_every: tokens of all workers between two questions; 0: no questions.
        tail: characters of a worker's text that are kept at hand.
    """

    texts: Texts
    ends: StepEnds
    eos: frozenset[int]
    stop: tuple[str, ...]
    answer: re.Pattern[str]
    check_every: int
    tail: int

    @property
    def separator(self) -> str:
        """What stands between two steps."""
        return StepRule.separator if self.ends.rule is None else self.ends.rule.separator

    def answer_in(self, text: str) -> str | None:
        """The final answer in a text."""
        match = self.answer.search(text)
        if match is None:
            return None
        return (match[1] if self.answer.groups else match[0]).strip()


class Writing:
    """The texts of a session's workers. One thread at a time may change them.

    Args:
        rules: when something ends.
        board: blocks and workers.
        vocabulary: that tokens are from.
        stats: told of everything.

    Attributes:
        steps: finished ones, in the order in which they were finished.
        answer, answered_by: the first final answer in one of them, and its writer.
        events: what callbacks have not been told yet.

    Source: arXiv 2504.06261, section 3.3.
    """

    def __init__(
        self, rules: Rules, board: Board, vocabulary: Vocabulary, stats: HogwildStats
    ) -> None:
        self.rules = rules
        self.steps: list[Step] = []
        self.answer: str | None = None
        self.answered_by = ""
        self.events: deque[Piece | Step] = deque()
        self._board = board
        self._vocabulary = vocabulary
        self._stats = stats
        self._since_check = 0
        self._began = time.perf_counter()

    def fork(self, board: Board, stats: HogwildStats) -> Writing:
        """The same texts on another board, without events."""
        twin = copy(self)
        twin.steps, twin.events = list(self.steps), deque()
        twin._board, twin._stats = board, stats
        return twin

    def open(self, worker: Worker) -> None:
        """A worker's first tokens: title, separator, prefix and greeting."""
        title = self._board.layout.title(worker.name, self.rules.texts)
        lead = self._vocabulary.encode(title) + self.rules.ends.separator_ids
        self.give(worker, lead)
        index = self._board.workers.index(worker)
        self._begin(worker, lead, self.rules.texts.opening(worker.name, index))

    def give(self, worker: Worker, ids: list[int]) -> None:
        """Tokens that a worker has not chosen, as its next input."""
        worker.pending += ids
        self._stats.workers[worker.name].given += len(ids)
        self._say(worker, ids, given=True)

    def remark(self, text: str, ids: Sequence[int]) -> None:
        """What the caller has put into the history is a step of nobody."""
        self._add(Step("", 0, text, tuple(ids), self._seconds(), self._stats.forwards))

    def accept(self, worker: Worker, token: int) -> None:
        """A sampled token becomes part of a worker's text."""
        worker.logits = None
        self._stats.workers[worker.name].sampled += 1
        worker.chosen += 1
        self._since_check += 1
        if token in self.rules.eos:
            worker.tokens.append(token)
            self.events.append(Piece(worker.name, worker.number, "", (token,), False))
            worker.leaving = "history"
            return
        ends = self.rules.ends
        ended, new, forced = ends.ended(worker.step, token), [token], False
        limit = None if ends.rule is None else ends.rule.max_step_tokens
        if not ended and limit is not None and worker.chosen >= limit:
            ended, new, forced = True, ends.separator_ids, True
        before = worker.tail
        text = self._say(worker, new, given=False)
        if ended:
            self._close(worker, new, forced)
            worker.closing = new
        else:
            worker.pending = new
        # A stop text that was complete before does not count.
        if any(s in before[max(0, len(before) - len(s) + 1) :] + text for s in self.rules.stop):
            worker.leaving = "history"

    def settle(self, worker: Worker) -> None:
        """Carry out a move or a farewell that is due; also one that an error has interrupted."""
        if worker.closing is not None:
            self._board.file(worker)
            lead, worker.closing = worker.closing, None
            worker.step = []
            if worker.leaving is None:
                self._begin(worker, lead)
        if worker.leaving is not None:
            self._leave(worker, worker.leaving)

    def _begin(self, worker: Worker, lead: list[int], greeting: str = "") -> None:
        """A step: `lead` is what closed the one before; it has been said, and is not fed."""
        texts, every = self.rules.texts, self.rules.check_every
        worker.number += 1
        worker.step, worker.pending, worker.lead, worker.chosen = [], list(lead), len(lead), 0
        prefix = texts.filled(texts.prefix, name=worker.name, number=worker.number)
        if every and self._since_check >= every:
            self._since_check = 0
            self._stats.workers[worker.name].checks += 1
            greeting += texts.check
        self.give(worker, self._vocabulary.encode(prefix + greeting))

    def _close(self, worker: Worker, ending: list[int], forced: bool = False) -> None:
        """The step of a worker is finished."""
        counts = self._stats.workers[worker.name]
        counts.steps += 1
        counts.forced += forced
        text = self._vocabulary.decode([*worker.written, *ending]).rstrip()
        tokens, forwards = tuple(worker.step), self._stats.forwards
        self._add(Step(worker.name, worker.number, text, tokens, self._seconds(), forwards, forced))

    def _add(self, step: Step) -> None:
        self.steps.append(step)
        self.events.append(step)
        found = self.rules.answer_in(step.text) if step.worker else None
        if found is not None and self.answer is None:
            self.answer, self.answered_by = found, step.worker

    def _leave(self, worker: Worker, keep: Keep) -> None:
        if keep != "drop" and worker.pending:
            self._board.extend(worker.own, worker.pending, self._board.ws.view(worker.id))
            worker.step += worker.pending
            worker.pending = []
        if keep == "history" and len(worker.step) > worker.lead:
            self._board.file(worker)
            self._close(worker, [])
            worker.step = []
        self._board.leave(worker, keep)
        worker.leaving = None

    def _say(self, worker: Worker, ids: list[int], given: bool) -> str:
        """Tokens belong to the worker's text; returns their own."""
        worker.tokens += ids
        text = worker.detokenizer.push(ids)
        worker.tail = (worker.tail + text)[-self.rules.tail :] if self.rules.tail else ""
        if ids:
            self.events.append(Piece(worker.name, worker.number, text, tuple(ids), given))
        return text

    def _seconds(self) -> float:
        return time.perf_counter() - self._began
