"""Acceptance rules of speculative decoding, one sequence at a time.

A row drafts tokens d_0 .. d_{k-1}; p_i is the target's distribution for the token after d_{i-1},
for i = 0 .. k, and q_i the one that d_i was drawn from. A rule decides how many drafts stand, and
which token follows them, if any. `verify` then cuts at the end of the text and at the limit.

Shape letters: k drafts of the row, V ids, n nodes of a tree.

Source: arXiv 2211.17192 (lossless), 2403.10444 (block), 2401.10774 (typical), 2305.09781 (trees),
2408.07978 (coupled), 2509.22230 (rsd), 2410.09300 (nudge).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from alignops.reference.speculative import laws
from alignops.reference.speculative.laws import Float32, Law

# Where an emitted token comes from.
DRAFT, CORRECTION, BONUS, TEACHER_RETRY, STUDENT, NUDGE, BASE = range(7)
# Why a row is finished.
RUNNING, END_OF_TEXT, LENGTH = range(3)
# States of the rule `nudge`.
STATE_BASE, STATE_NUDGE = range(2)


@dataclass(frozen=True)
class Row:
    """What a rule sees of one sequence.

    Attributes:
        target: p_0 .. p_k.
        drafts: d_0 .. d_{k-1}.
        proposals: q_0 .. q_{k-1}; None: the drafts are certain, q is 1 at d_i.
        seed, position: of the sequence, and of the token that p_0 decides.
        words: random words (k + 1, 2) instead of the generator's: accept, sample.
        state: of the rule `nudge`.
    """

    target: Sequence[Law]
    drafts: Sequence[int]
    proposals: Sequence[Law] | None = None
    seed: int = 0
    position: int = 0
    words: npt.NDArray[np.uint32] | None = None
    state: int = STATE_BASE

    def accept_word(self, i: int, stream: int = laws.ACCEPT) -> int:
        """The random word of the test of draft i."""
        if self.words is not None:
            return int(self.words[i, 0])
        return laws.uniform(self.seed, self.position + i, stream)

    def sample_word(self, i: int) -> int:
        """The random word of the token that is drawn at place i."""
        if self.words is not None:
            return int(self.words[i, 1])
        return laws.uniform(self.seed, self.position + i, laws.SAMPLE)

    def draw(self, i: int, r: Float32 | None = None) -> int:
        """A token of p_i, or in proportion to r."""
        p = self.target[i].p
        return laws.sample(p if r is None else r, self.sample_word(i), p)

    def q(self, i: int) -> Float32:
        """Probabilities that draft i was drawn from."""
        if self.proposals is not None:
            return self.proposals[i].p
        return one_hot(self.target[i].logits.size, self.drafts[i])


@dataclass(frozen=True)
class Outcome:
    """Emitted tokens and where they come from; the first `accepted` are drafts."""

    accepted: int
    tokens: list[int]
    sources: list[int]
    finished: int = RUNNING
    state: int = STATE_BASE


def one_hot(size: int, token: int) -> Float32:
    """Probability 1 at `token`."""
    out = np.zeros(size, np.float32)
    out[token] = 1
    return out


def without(p: Float32, tokens: Sequence[int]) -> Float32:
    """Probabilities p (V,) with those of some tokens set to 0."""
    out: Float32 = p.copy()
    out[list(tokens)] = 0
    return out


def _outcome(row: Row, accepted: int, following: int) -> Outcome:
    source = BONUS if accepted == len(row.drafts) else CORRECTION
    return Outcome(
        accepted,
        [*row.drafts[:accepted], following],
        [DRAFT] * accepted + [source],
    )


def _scan(row: Row, accept: Callable[[int], bool], following: Callable[[int], int]) -> Outcome:
    """Drafts in order, up to the first that is not accepted, and the token that follows."""
    accepted = 0
    while accepted < len(row.drafts) and accept(accepted):
        accepted += 1
    return _outcome(row, accepted, following(accepted))


# Rules on chains


def greedy(row: Row) -> Outcome:
    """Drafts that the target would have chosen: token for token its greedy decoding."""
    return _scan(
        row, lambda i: row.drafts[i] == row.target[i].argmax, lambda i: row.target[i].argmax
    )


def lossless(row: Row) -> Outcome:
    """Accept d_i with probability min(1, p/q), else draw from the residual: the target's law."""

    def accept(i: int) -> bool:
        d = row.drafts[i]
        return laws.accepts(row.accept_word(i), row.q(i)[d], row.target[i].p[d])

    def following(i: int) -> int:
        if i == len(row.drafts):
            return row.draw(i)
        return row.draw(i, laws.residual(row.target[i].p, row.q(i)))

    return _scan(row, accept, following)


def block(row: Row) -> Outcome:
    """The longest prefix that passes a joint test: the law of the target, never fewer accepted."""
    k = len(row.drafts)
    ratio = [1.0]
    for i, d in enumerate(row.drafts):
        reached, q = ratio[-1] * float(row.target[i].p[d]), float(row.q(i)[d])
        ratio.append(min(1.0, reached / q) if q > 0 else float(reached > 0))

    def rest(i: int) -> Float32:
        return laws.residual(np.float32(ratio[i]) * row.target[i].p, row.q(i))

    accepted = 0
    for i in range(1, k + 1):
        if i < k:
            z = laws.total_of(rest(i)) * 2.0**-40
            passed = z + 1.0 - ratio[i]
            h = z / passed if passed > 0 else 1.0
        else:
            h = ratio[k]
        if float(row.accept_word(i - 1, laws.BLOCK)) * 2.0**-32 < h:
            accepted = i
    return _outcome(row, accepted, row.draw(accepted, None if accepted == k else rest(accepted)))


def coupled(row: Row) -> Outcome:
    """Drafts that plain sampling with the same noise would have drawn: token for token the same."""

    def winner(i: int) -> int:
        p = row.target[i]
        return laws.race_winner(p, laws.race_noise(row.seed, row.position + i, p.logits.size))

    return _scan(row, lambda i: row.drafts[i] == winner(i), winner)


def typical(row: Row, eps: float = 0.09, delta: float = 0.3) -> Outcome:
    """Drafts whose probability is above min(eps, delta exp(-entropy)). Not lossless."""

    def accept(i: int) -> bool:
        p = row.target[i].p.astype(np.float64)
        entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
        return bool(p[row.drafts[i]] > min(eps, delta * np.exp(-entropy)))

    return _scan(row, accept, lambda i: row.target[i].argmax)


def relaxed(row: Row, m: int = 3, r: float = 0.5, delta: float | None = None) -> Outcome:
    """Drafts among the m best that are not much worse than the best. Not lossless."""

    def accept(i: int) -> bool:
        law, d = row.target[i], row.drafts[i]
        p, best = law.p, law.p.max()
        bound = np.float32(r) * best if delta is None else best - np.float32(delta)
        return d in law.order()[:m] and bool(p[d] > 0) and bool(p[d] >= bound)

    return _scan(row, accept, lambda i: row.target[i].argmax)


def threshold(row: Row, t_single: float = 1.0, t_acc: float = 1.0) -> Outcome:
    """Drafts of probability t_single or more, or with chance p / t_acc. Lossless only at 1, 1."""

    def accept(i: int) -> bool:
        p = row.target[i].p[row.drafts[i]]
        if p > 0 and p >= np.float32(t_single):
            return True
        return laws.accepts(row.accept_word(i), np.float32(t_acc), p)

    def following(i: int) -> int:
        if i == len(row.drafts):
            return row.draw(i)
        return row.draw(i, without(row.target[i].p, [row.drafts[i]]))

    return _scan(row, accept, following)


def scripted(row: Row, given: int = 0) -> Outcome:
    """The first `given` drafts, for tests."""
    return _scan(row, lambda i: i < given, lambda i: row.target[i].argmax)


def rsd(
    row: Row,
    p_th: float = 0.01,
    top_n: int = 20,
    trials: int = 5,
    retry: str = "resample",
    student: Sequence[Law] | None = None,
) -> Outcome:
    """The teacher proposes, the student decides: text that the student finds likely.

    `target` is the student, `proposals` the teacher, whose q rows the retries are drawn from. If no
    trial passes, the student's own `student` law (warped; default: its raw one) is sampled.
    """
    size = row.target[0].logits.size

    def passes(i: int, token: int) -> bool:
        law = row.target[i]
        listed = top_n == 0 or token in law.order()[: min(top_n, size)]
        p = law.p[token]
        return bool(p > 0) and bool(p >= np.float32(p_th)) and listed

    def candidates(i: int) -> list[int]:
        if row.proposals is None or retry == "none":
            return []
        q = row.proposals[i]
        if retry == "descend":
            order = [int(v) for v in q.order()[:trials] if q.p[v] > 0]
            return [v for v in order if v != row.drafts[i]][: trials - 1]
        position = row.position + i
        return [
            laws.sample(q.p, laws.uniform(row.seed, position, laws.RETRY, lane))
            for lane in range(trials - 1)
        ]

    accepted = 0
    while accepted < len(row.drafts) and passes(accepted, row.drafts[accepted]):
        accepted += 1
    tokens, sources = list(row.drafts[:accepted]), [DRAFT] * accepted
    if accepted < len(row.drafts):
        found = [v for v in candidates(accepted) if passes(accepted, v)]
        if found:
            tokens.append(found[0])
            sources.append(TEACHER_RETRY)
        else:
            own = row.target[accepted] if student is None else student[accepted]
            tokens.append(laws.sample(own.p, row.sample_word(accepted)))
            sources.append(STUDENT)
    return Outcome(accepted, tokens, sources)


def nudge(
    row: Row,
    gamma: float = 0.4,
    word_start: Sequence[bool] = (),
    eos_ids: Sequence[int] = (),
    eos_lookahead: int = 16,
) -> Outcome:
    """A base model, both greedy, that a small aligned model helps where the base is unsure.

    In the state BASE the base speaks while it is sure (max p >= gamma); else the drafter speaks, at
    least to the end of its word. `word_start` tells for each id whether it begins one.
    """
    state, k = row.state, len(row.drafts)
    tokens: list[int] = []
    sources: list[int] = []
    accepted = 0

    def sure(i: int) -> bool:
        law = row.target[i]
        return bool(law.p[law.argmax] >= np.float32(gamma)) and law.argmax not in eos_ids

    for i, d in enumerate(row.drafts):
        best = row.target[i].argmax
        if state == STATE_BASE and not sure(i):
            state = STATE_NUDGE
            window = list(row.drafts[i : i + eos_lookahead])
            ends = [j for j, token in enumerate(window) if token in eos_ids]
            if ends:
                upto = window[: ends[0] + 1]
                tokens += upto
                sources += [NUDGE] * len(upto)
                return Outcome(accepted + len(upto), tokens, sources, END_OF_TEXT, state)
            emitted = d
        elif state == STATE_NUDGE:
            back = word_start[d] and (sure(i) or (best == d and best not in eos_ids))
            state = STATE_BASE if back else STATE_NUDGE
            emitted = best if back else d
        else:
            emitted = best
        tokens.append(emitted)
        sources.append(NUDGE if state == STATE_NUDGE else BASE)
        if emitted != d:
            return Outcome(accepted, tokens, sources, RUNNING, state)
        accepted += 1
    if state == STATE_BASE and sure(k):
        tokens.append(row.target[k].argmax)
        sources.append(BASE)
    return Outcome(accepted, tokens, sources, RUNNING, state)


# Trees


@dataclass(frozen=True)
class Tree:
    """Drafts as a tree: node 0 is the last committed token, parents come before children.

    `laws[n]` is the target's distribution after node n, `proposals[n]` the drafter's. A token of -1
    stands for no node.
    """

    parent: Sequence[int]
    tokens: Sequence[int]
    laws: Sequence[Law]
    proposals: Sequence[Law] | None = None
    seed: int = 0
    position: int = 0
    depth: list[int] = field(init=False)

    def __post_init__(self) -> None:
        depth = [0]
        for n in range(1, len(self.parent)):
            if self.tokens[n] == -1:
                depth.append(-1)
                continue
            if not 0 <= self.parent[n] < n or depth[self.parent[n]] < 0:
                raise ValueError(f"Tree: parent[{n}] must be in [0, {n}), got {self.parent[n]}")
            depth.append(depth[self.parent[n]] + 1)
        object.__setattr__(self, "depth", depth)

    def children(self, node: int) -> list[int]:
        """Children of a node, ascending."""
        nodes = range(1, len(self.parent))
        return [n for n in nodes if self.tokens[n] != -1 and self.parent[n] == node]


@dataclass(frozen=True)
class Path:
    """Accepted nodes, the root first, and the token that follows them."""

    nodes: list[int]
    following: int


def tree_greedy(tree: Tree) -> Path:
    """From the root to the child that the target would have chosen."""
    path = [0]
    while True:
        best = tree.laws[path[-1]].argmax
        child = next((c for c in tree.children(path[-1]) if tree.tokens[c] == best), None)
        if child is None:
            return Path(path, best)
        path.append(child)


def tree_target(tree: Tree) -> Path:
    """Children that were not drawn: each is reached with the target's probability of its token."""
    path = [0]
    while True:
        node = path[-1]
        position = tree.position + tree.depth[node]
        p, tried = tree.laws[node].p, list[int]()
        word, reached, child = laws.uniform(tree.seed, position, laws.CHILD), 0.0, None
        for c in tree.children(node):
            if tree.tokens[c] in tried:
                continue
            tried.append(tree.tokens[c])
            reached += float(p[tree.tokens[c]])
            if float(word) * 2.0**-32 < reached:
                child = c
                break
        if child is None:
            rest = without(p, tried)
            word = laws.uniform(tree.seed, position, laws.SAMPLE)
            return Path(path, laws.sample(rest, word, p))
        path.append(child)


def tree_rrs(tree: Tree, replacement: bool = False) -> Path:
    """Children drawn from the drafter, tried in turn, each against what is left of the target."""
    if tree.proposals is None:
        raise ValueError("tree_rrs: proposals must be given")
    path = [0]
    while True:
        node = path[-1]
        position = tree.position + tree.depth[node]
        p, q, child = tree.laws[node].p, tree.proposals[node].p, None
        for rank, c in enumerate(tree.children(node)):
            token = tree.tokens[c]
            word = laws.uniform(tree.seed, position, laws.CHILD, rank)
            if laws.accepts(word, q[token], p[token]):
                child = c
                break
            rest = laws.residual(p, q)
            p = normalized(rest) if laws.total_of(rest) > 0 else p
            if not replacement:
                rest = without(q, [token])
                q = normalized(rest) if laws.total_of(rest) > 0 else q
        if child is None:
            return Path(path, laws.sample(p, laws.uniform(tree.seed, position, laws.SAMPLE)))
        path.append(child)


def normalized(r: Float32) -> Float32:
    """The quotient r / sum(r): values in units of 2**-40 over their sum, rounded to float32."""
    fixed = np.trunc(r.astype(np.float64) * 2.0**40)
    return (fixed / float(laws.total_of(r))).astype(np.float32)


# A whole row

RULES: dict[str, Callable[..., Outcome]] = {
    "greedy": greedy,
    "lossless": lossless,
    "block": block,
    "coupled": coupled,
    "typical": typical,
    "relaxed": relaxed,
    "threshold": threshold,
    "rsd": rsd,
    "nudge": nudge,
    "scripted": scripted,
}
TREE_RULES: dict[str, Callable[..., Path]] = {
    "greedy": tree_greedy,
    "tree_target": tree_target,
    "tree_rrs": tree_rrs,
}


def verify(
    row: Row,
    rule: str,
    eos_ids: Sequence[int] = (),
    remaining: int | None = None,
    **parameters: object,
) -> Outcome:
    """The rule, then the cut behind the first end of text, then the limit of `remaining` tokens.

    Drafts that are cut do not count as accepted.
    """
    if rule == "nudge":
        parameters["eos_ids"] = eos_ids
    return _cut(RULES[rule](row, **parameters), eos_ids, remaining)


def verify_tree(
    tree: Tree,
    rule: str,
    eos_ids: Sequence[int] = (),
    remaining: int | None = None,
    **parameters: object,
) -> tuple[list[int], Outcome]:
    """The rule and the cuts of `verify`: accepted nodes, the root first, and what is emitted."""
    path = TREE_RULES[rule](tree, **parameters)
    accepted = len(path.nodes) - 1
    leaf = not tree.children(path.nodes[-1])
    outcome = Outcome(
        accepted,
        [*(tree.tokens[n] for n in path.nodes[1:]), path.following],
        [DRAFT] * accepted + [BONUS if leaf else CORRECTION],
    )
    outcome = _cut(outcome, eos_ids, remaining)
    return path.nodes[: outcome.accepted + 1], outcome


def _cut(outcome: Outcome, eos_ids: Sequence[int], remaining: int | None) -> Outcome:
    length, finished = len(outcome.tokens), outcome.finished
    ends = [i for i, token in enumerate(outcome.tokens) if token in eos_ids]
    if ends:
        length, finished = ends[0] + 1, END_OF_TEXT
    if remaining is not None and length >= max(remaining, 0):
        finished = finished if length == remaining and finished else LENGTH
        length = max(remaining, 0)
    return Outcome(
        min(outcome.accepted, length),
        outcome.tokens[:length],
        outcome.sources[:length],
        finished,
        outcome.state,
    )
