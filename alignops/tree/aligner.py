"""P-Aligner's search (arXiv 2508.04626): which principles, in which order, improve an instruction.

A node is a wording of the instruction; an edge rewrites it by one principle that the path has not
used. A wording is worth the mean reward of answers to it, judged against the original instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignops._checks import check
from alignops.tree._progress import Bar
from alignops.tree.errors import CallbackError
from alignops.tree.policies import SubtreeMean, p_aligner
from alignops.tree.store import Leaves, TreeStore

PRINCIPLES: Mapping[str, tuple[str, ...]] = {
    "harmlessness": ("safe-intent declaration", "boundary enforcement"),
    "helpfulness": ("clarification request", "information augmentation", "tone improvement"),
    "honesty": ("factuality enhancement",),
    "coding": ("error simulation", "debugging guidance"),
    "math": ("hint addition", "solution verification"),
}


def principles_for(*labels: str) -> list[str]:
    """The principles of these task labels; those of helpfulness are always among them.

    Raises:
        ValueError: there is no such label.
    """
    for label in labels:
        check(
            label in PRINCIPLES,
            f"principles_for: label must be one of {', '.join(PRINCIPLES)}, got {label!r}",
        )
    chosen = dict.fromkeys([*labels, "helpfulness"])
    return [principle for label in chosen for principle in PRINCIPLES[label]]


@dataclass(frozen=True)
class Wording:
    """A rewritten instruction.

    Attributes:
        text: of it.
        score: mean reward of the answers to it.
        principles: that led to it, in order.
        texts: of the wordings on the way, the original first, this one last.
    """

    text: str
    score: float
    principles: tuple[str, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class InstructResult:
    """What was found for one instruction.

    Attributes:
        wordings: all, the best first; the original is among them.
        improving: (before, principle, after) of the edges whose end scores more than their start:
            the pairs that a rewriter is trained on.
    """

    wordings: list[Wording]
    improving: list[tuple[str, str, str]]

    @property
    def best(self) -> Wording:
        """The wording of the largest score."""
        return self.wordings[0]


def instruct_search(
    instructions: Sequence[str],
    rewrite: Callable[[list[tuple[str, str]]], Sequence[str]],
    respond: Callable[[list[str], int], Sequence[Sequence[str]]],
    score: Callable[[list[tuple[str, str]]], Tensor],
    *,
    principles: Sequence[str] | Sequence[Sequence[str]],
    iters: int = 20,
    w: float = 0.1,
    responses: int = 3,
    seed: int = 0,
    progress: bool = False,
) -> tuple[list[InstructResult], TreeStore]:
    """Search wordings of instructions, all trees together.

    Args:
        instructions: the originals.
        rewrite: [(text, principle), ...] -> new texts.
        respond: texts, n -> n answers to each.
        score: [(original, answer), ...] -> (M,) rewards.
        principles: names, the same for all or one list per instruction.
        iters: wordings tried per instruction.
        w: exploration: mean + w sqrt(ln n / n of the child); 0.1 in the released script.
        responses: answers per wording.
        seed: of the order in which unused principles are tried.
        progress: show a bar.

    Returns:
        A result per instruction, and the trees.

    Raises:
        ValueError: an argument is out of range.
        CallbackError: a callback answered with a wrong length.
    """
    op = "instruct_search"
    check(iters >= 0, f"{op}: iters must be at least 0, got {iters}")
    check(responses >= 1, f"{op}: responses must be at least 1, got {responses}")
    check(w >= 0, f"{op}: w must be at least 0, got {w}")
    each = _per_instruction(principles, len(instructions))
    policy = p_aligner(w)
    store = TreeStore(len(instructions), policy, SubtreeMean(), capacity=iters + 2)
    run = _Run(store, instructions, each, rewrite, respond, score, responses, seed)
    with Bar(progress, "instructions", "wording", iters) as bar:
        for i in range(iters):
            run.step()
            bar.at(i + 1)
    return run.results(), store


def _per_instruction(
    principles: Sequence[str] | Sequence[Sequence[str]], count: int
) -> list[list[str]]:
    names = list(principles)
    out: list[list[str]] = []
    if all(isinstance(name, str) for name in names):
        out = [[str(name) for name in names] for _ in range(count)]
    else:
        check(
            len(names) == count,
            f"instruct_search: principles must have {count} lists, got {len(names)}",
        )
        out = [list(row) for row in names]
    for row in out:
        check(
            len(set(row)) == len(row) > 0,
            f"instruct_search: principles must be distinct and at least one, got {row}",
        )
    return out


class _Run:
    def __init__(
        self,
        store: TreeStore,
        instructions: Sequence[str],
        principles: list[list[str]],
        rewrite: Callable[[list[tuple[str, str]]], Sequence[str]],
        respond: Callable[[list[str], int], Sequence[Sequence[str]]],
        score: Callable[[list[tuple[str, str]]], Tensor],
        responses: int,
        seed: int,
    ) -> None:
        self.store, self.instructions, self.principles = store, instructions, principles
        self.rewrite, self.respond, self.score = rewrite, respond, score
        self.responses = responses
        self.generator = torch.Generator().manual_seed(seed)
        self.texts: list[dict[int, str]] = [{0: text} for text in instructions]
        self.local: list[dict[int, float]] = [{} for _ in instructions]
        roots = store.select()
        self._open(roots)
        store.cancel(roots.ticket)  # the original is judged when all is done

    def step(self) -> None:
        """One more wording of every instruction that has principles left to try."""
        leaves = self.store.select()
        try:
            known = self.store.gather("value", leaves.tree, leaves.node)
            values = torch.where(leaves.evaluated, known, torch.nan)
            new = (~leaves.evaluated).nonzero()[:, 0].tolist()
            pairs = []
            for i in new:
                t, parent, slot = (int(x[i]) for x in (leaves.tree, leaves.parent, leaves.slot))
                action = int(self.store.edges(t, parent).action[slot])
                pairs.append((self.texts[t][parent], self.principles[t][action]))
            texts = list(self.rewrite(pairs)) if pairs else []
            self._check("rewrite", len(texts), len(pairs))
            trees = [int(leaves.tree[i]) for i in new]
            scores = self._judge(trees, texts)
            for i, t, text, value in zip(new, trees, texts, scores, strict=True):
                node = int(leaves.node[i])
                self.texts[t][node], self.local[t][node] = text, value
                values[i] = value
            self._open(Leaves(*(column[new] for column in leaves)))
            self.store.backup(leaves.ticket, values)
        except BaseException:
            self.store.cancel(leaves.ticket)
            raise

    def _judge(self, trees: list[int], texts: list[str]) -> list[float]:
        """Mean rewards of answers to the texts, against the original instructions."""
        if not texts:
            return []
        answers = self.respond(texts, self.responses)
        self._check("respond", len(answers), len(texts))
        pairs = []
        for t, row in zip(trees, answers, strict=True):
            self._check("respond", len(row), self.responses)
            pairs += [(self.instructions[t], answer) for answer in row]
        rewards = self.score(pairs)
        self._check("score", len(rewards), len(pairs))
        means: list[float] = rewards.detach().float().reshape(-1, self.responses).mean(1).tolist()
        return means

    def _check(self, name: str, got: int, expected: int) -> None:
        if got != expected:
            raise CallbackError(
                f"instruct_search: {name} must return {expected} results, got {got}", []
            )

    def _open(self, leaves: Leaves) -> None:
        """The principles that the paths have not used, in random order; none left is an end."""
        paths = self.store.paths(leaves.tree, leaves.node)
        for i, (t, node) in enumerate(zip(leaves.tree.tolist(), leaves.node.tolist(), strict=True)):
            used = set(paths.action[paths.ptr[i] : paths.ptr[i + 1]].tolist())
            left = [a for a in range(len(self.principles[t])) if a not in used]
            order = torch.randperm(len(left), generator=self.generator).tolist()
            actions = torch.tensor([[left[j] for j in order]], dtype=torch.int64)
            row = torch.tensor([t]), torch.tensor([node])
            if left:
                self.store.expand(*row, actions, torch.ones(1, len(left)))
            else:
                self.store.end(*row)

    def results(self) -> list[InstructResult]:
        """Everything that was tried; originals are judged here."""
        originals = self._judge(list(range(len(self.instructions))), list(self.instructions))
        for local, value in zip(self.local, originals, strict=True):
            local[0] = value
        return [self._result(t) for t in range(len(self.instructions))]

    def _result(self, t: int) -> InstructResult:
        ids = torch.tensor(sorted(self.local[t]))
        trees = torch.full_like(ids, t)
        paths = self.store.paths(trees, ids)
        texts, names = self.texts[t], self.principles[t]
        wordings, improving = [], []
        for i, node in enumerate(ids.tolist()):
            span = slice(int(paths.ptr[i]), int(paths.ptr[i + 1]))
            above = [0, *paths.node[span].tolist()]
            used = [names[action] for action in paths.action[span].tolist()]
            way = tuple(texts[x] for x in above)
            wordings.append(Wording(texts[node], self.local[t][node], tuple(used), way))
            if len(above) > 1 and self.local[t][node] > self.local[t][above[-2]]:
                improving.append((way[-2], used[-1], way[-1]))
        wordings.sort(key=lambda wording: -wording.score)
        return InstructResult(wordings, improving)
