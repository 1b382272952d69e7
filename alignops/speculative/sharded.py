"""Acceptance where the vocabulary is divided among ranks, as tensor parallel models leave logits.

Every rank holds the logits of some consecutive ids. What travels is a few words per tile of 4096
ids, never logits, and only through sums and maxima of integers: so every rank takes the decision
that `verify` would take of whole rows, bit for bit, wherever the vocabulary is divided, and no
decision has to be broadcast.

Shape letters: B rows, K drafts, Q = K + 1, V ids, Vs ids of a rank, T = ceil(V / 4096) tiles.

Source: arXiv 2211.17192 and 2302.01318 (lossless), 2408.07978 (coupled).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from alignops._checks import check
from alignops.speculative import laws
from alignops.speculative.verify import VerifyOut, _as, _check_tensors, _logits, _warp

#: Combines int64 tensors of all ranks, elementwise, and gives the result to each of them.
Reduce = Callable[[Tensor, Literal["max", "sum"]], Tensor]

RULES_OF_SHARDS = ("greedy", "lossless", "coupled")
_BAD_VALUE, _IMPOSSIBLE, _BAD_ID, _BAD_ARGUMENT = 1, 2, 3, 4
_END_OF_TEXT, _LENGTH = 1, 2
_CORRECTION, _BONUS = 1, 2
# Ids of a tile are searched in blocks of this many.
_BLOCK = 64
_LEAST = int(laws.ordered(torch.tensor([-torch.inf])))
_LOW = 0xFFFFFFFF


def all_reduce(group: object | None = None) -> Reduce:
    """The reduction over the ranks of a process group of `torch.distributed`; None: of all."""
    import torch.distributed as dist

    ops = {"max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}

    def reduce(t: Tensor, op: Literal["max", "sum"]) -> Tensor:
        dist.all_reduce(t, ops[op], group=group)
        return t

    return reduce


def verify_sharded(
    target: Tensor,
    draft_ids: Tensor,
    *,
    offset: int,
    vocab_size: int,
    reduce: Reduce,
    draft: Tensor | None = None,
    draft_lens: Tensor | None = None,
    rule: str = "greedy",
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    eos_ids: Sequence[int] = (),
    remaining: Tensor | None = None,
    active: Tensor | None = None,
) -> VerifyOut:
    """What `verify` decides of whole rows, on every rank, from the columns that each of them holds.

    All ranks call it with the same arguments but `target`, `draft` and `offset`; together they hold
    every id once. A greedy batch takes one reduction of four words per row of logits; where tokens
    are drawn, T more per row travel twice, and three reductions of one row per sequence follow.
    Weights are computed in PyTorch operations, a row at a time, on the device of the logits.

    Args:
        target: (B, K + 1, Vs) logits of the ids from `offset` on; dtypes and strides as `verify`.
        draft_ids: (B, K) int64 or int32, ids of the whole vocabulary; -1: no draft from here on.
        offset: first id of this rank.
        vocab_size: V.
        reduce: combines tensors of all ranks, such as `all_reduce(group)`.
        draft: (B, K, Vs) logits of the same ids that the drafts were drawn from, with this
            temperature; None: drafts are certain. -inf stands for ids that the drafter lacks.
        draft_lens: (B,) drafts of each row; None: all.
        rule: "greedy", "lossless" or "coupled".
        seeds: (B,) int64, needed by rules that draw, as `positions` are.
        positions: (B,) int64, of the token that the first row of logits decides.
        temperature: one number or (B,); rows with 0 follow the rule "greedy".
        eos_ids: at most 8 ids that end a text.
        remaining: (B,) tokens that each row may still emit.
        active: (B,) bool; other rows emit nothing.

    Returns:
        As `verify`, equal on all ranks.

    Raises:
        TypeError: an argument is of a wrong Python type.
        ValueError: shapes or dtypes do not fit, or a number is out of range.

    Example:
        >>> logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
        >>> found = verify_sharded(
        ...     logits, torch.tensor([[7, 8], [9, 1]]), offset=0, vocab_size=50,
        ...     reduce=lambda t, op: t,  # one rank
        ... )
        >>> torch.equal(found.next_token, logits[:, 0].argmax(-1))
        True
    """
    op = "verify_sharded"
    _check_tensors(op, target=target, draft_ids=draft_ids)
    check(
        rule in RULES_OF_SHARDS,
        f"{op}: rule must be one of {', '.join(RULES_OF_SHARDS)}, got {rule!r}",
    )
    check(
        draft_ids.dim() == 2 and not draft_ids.is_floating_point(),
        f"{op}: draft_ids must be integers (b, k), got {draft_ids.dtype} {tuple(draft_ids.shape)}",
    )
    b, k = draft_ids.shape
    check(
        target.dim() == 3 and target.shape[:2] == (b, k + 1) and target.is_floating_point(),
        f"{op}: target must be logits ({b}, {k + 1}, ids), got {target.dtype} "
        f"{tuple(target.shape)}",
    )
    size = target.shape[2]
    check(
        offset >= 0 and size >= 1 and offset + size <= vocab_size < 1 << 31,
        f"{op}: offset must be such that ids {offset} to {offset + size - 1} are below vocab_size, "
        f"got {vocab_size}",
    )
    check(
        draft is None or (draft.shape == (b, k, size) and draft.is_floating_point()),
        f"{op}: draft must be logits ({b}, {k}, {size}), got "
        f"{None if draft is None else tuple(draft.shape)}",
    )
    check(len(eos_ids) <= 8, f"{op}: eos_ids must be at most 8, got {len(eos_ids)}")
    for name, value in {
        "draft_lens": draft_lens, "seeds": seeds, "positions": positions,
        "temperature": temperature, "remaining": remaining, "active": active,
    }.items():  # fmt: skip
        check(
            not isinstance(value, Tensor) or value.shape == (b,),
            f"{op}: {name} must have shape ({b},), got {tuple(getattr(value, 'shape', ()))}",
        )
    check(
        rule == "greedy" or (seeds is not None and positions is not None),
        f"{op}: seeds and positions must be given where rule is {rule}",
    )
    warp = _warp(temperature, 0, 1.0, 0.0, b, target, False, op)[0]
    shard = _Shard(offset, size, vocab_size, reduce)
    rows = [
        _Row(i, drafts, *numbers)
        for i, (drafts, *numbers) in enumerate(
            zip(
                _drafts(draft_ids, draft_lens),
                _list(_as(seeds, torch.int64), b, 0),
                _list(_as(positions, torch.int64), b, 0),
                _list(warp, b, 1.0),
                _list(active, b, True),
                strict=True,
            )
        )
    ]
    for row in rows:
        row.error = row.fault(vocab_size)
    running = [row for row in rows if row.active and not row.error]
    _decide(running, shard, rule, _logits(target), None if draft is None else _logits(draft))
    for row, left in zip(rows, _list(remaining, b, None), strict=True):
        if row.active and not row.error:
            row.cut(eos_ids, left)
    return _result(rows, k + 1, target.device)


@dataclass
class _Row:
    """A row of the batch on the host: its arguments, and what it emits."""

    index: int
    drafts: list[int]
    seed: int
    position: int
    temperature: float
    active: bool
    tokens: list[int] = field(default_factory=list)
    accepted: int = 0
    error: int = 0
    finished: int = 0
    zero_q: int = 0

    def fault(self, size: int) -> int:
        """Code of what is wrong with the arguments of an active row; 0: nothing."""
        if not self.active:
            return 0
        t = self.temperature
        if t != 0 and not laws.MIN_TEMPERATURE <= t <= laws.MAX_TEMPERATURE:
            return _BAD_ARGUMENT
        return 0 if all(0 <= d < size for d in self.drafts) else _BAD_ID

    def cut(self, eos_ids: Sequence[int], remaining: int | None) -> None:
        """Cut behind the first end of text, then to the tokens that remain."""
        end = next((i for i, token in enumerate(self.tokens) if token in eos_ids), None)
        if end is not None:
            del self.tokens[end + 1 :]
            self.finished = _END_OF_TEXT
        left = len(self.tokens) + 1 if remaining is None else max(remaining, 0)
        if len(self.tokens) >= left:
            if len(self.tokens) > left or not self.finished:
                self.finished = _LENGTH
            del self.tokens[left:]
        self.accepted = min(self.accepted, len(self.tokens))


@dataclass
class _Line:
    """A row of logits, of which this rank has some columns, and what all ranks know of it."""

    logits: Tensor
    temperature: float
    id: int  # whose weight is wanted; -1: none
    argmax: int = -1
    error: int = 0
    mantissa: int = 0
    exponent: int = laws.NOWHERE
    top: int = laws.NOWHERE
    total: int = 0
    winner: int = -1

    def weights(self) -> tuple[Tensor, Tensor]:
        usable = torch.nan_to_num(self.logits.float(), nan=0.0, posinf=0.0, neginf=-torch.inf)
        return laws.weights(usable, self.temperature)

    def p(self) -> Tensor:
        """Probabilities of this rank's ids."""
        return laws.probabilities(*self.weights(), self.top, self.total)

    def p_of_id(self) -> float:
        mantissa, exponent = torch.tensor([self.mantissa]), torch.tensor([self.exponent])
        return float(laws.probabilities(mantissa, exponent, self.top, self.total))


class _Shard:
    """The ids of this rank in the tiles of the whole vocabulary."""

    def __init__(self, offset: int, size: int, vocab_size: int, reduce: Reduce) -> None:
        self.offset, self.size, self.reduce = offset, size, reduce
        self.tiles = -(-vocab_size // laws.TILE)

    def ids(self, device: torch.device) -> Tensor:
        return torch.arange(self.offset, self.offset + self.size, device=device)

    def tiled(self, values: Tensor, fill: int) -> Tensor:
        """Values of this rank's ids as (T, 4096)."""
        behind = self.tiles * laws.TILE - self.offset - self.size
        whole = torch.nn.functional.pad(values, (self.offset, behind), value=fill)
        return whole.view(self.tiles, laws.TILE)

    def largest(self, lines: list[_Line]) -> None:
        """Largest logits, faults, and weights of one id; one reduction."""
        words = []
        for line in lines:
            x = line.logits.float()
            bad = (x.isnan() | (x == torch.inf)).any().long()
            key = (laws.ordered(x) << 32) + (_LOW - self.ids(x.device))
            mantissa, exponent = bad * 0, bad * 0 + laws.NOWHERE
            at = line.id - self.offset
            if line.temperature and 0 <= at < self.size:
                own = _Line(line.logits[at : at + 1], line.temperature, -1)
                mantissa, exponent = (t[0] for t in own.weights())
            words.append(torch.stack([key.max(), bad, mantissa, exponent]))
        known = self.reduce(torch.stack(words), "max").tolist()
        for line, (key, bad, mantissa, exponent) in zip(lines, known, strict=True):
            line.argmax = _LOW - (key & _LOW)
            line.error = _BAD_VALUE if bad else _IMPOSSIBLE if key >> 32 <= _LEAST else 0
            line.mantissa, line.exponent = mantissa, exponent

    def sums(self, lines: list[_Line]) -> None:
        """Largest exponents and sums of weights; two reductions."""
        exponents = [self.tiled(line.weights()[1], laws.NOWHERE).amax(1) for line in lines]
        tops = self.reduce(torch.stack(exponents), "max")
        sums = []
        for line, top in zip(lines, tops, strict=True):
            mantissa, exponent = line.weights()
            exponent = self.tiled(exponent, laws.NOWHERE)
            sums.append(laws.units(self.tiled(mantissa, 0), exponent, top[:, None]).sum(1))
        totals = self.reduce(torch.stack(sums), "sum").tolist()
        for line, tiles, parts in zip(lines, tops.tolist(), totals, strict=True):
            line.top = max(tiles)
            line.total = sum(a >> min(line.top - n, 63) for n, a in zip(tiles, parts, strict=True))

    def race(self, lines: list[_Line], seeds: list[tuple[int, int]]) -> None:
        """Winners under the noise of (seed, position); one reduction."""
        keys = []
        for line, (seed, position) in zip(lines, seeds, strict=True):
            ids = self.ids(line.logits.device)
            noise = laws.race_noise(seed, position, ids)
            times = laws.race_times(*line.weights(), line.top, noise)
            keys.append(-((laws.ordered(times) << 32) + ids).min())
        for line, key in zip(lines, self.reduce(torch.stack(keys), "max").tolist(), strict=True):
            line.winner = -key & _LOW

    def draw(self, densities: list[Tensor], words: list[int]) -> list[int]:
        """Ids drawn in proportion to `fixed` (2, Vs); the second row counts if the first is 0."""
        tiled = torch.stack([torch.stack([self.tiled(r, 0) for r in d]) for d in densities])
        sums = self.reduce(tiled.sum(-1), "sum").tolist()
        chosen = [int(sum(first) == 0) for first, _ in sums]
        bounds = [
            laws.threshold(word, sum(s[c])) for word, s, c in zip(words, sums, chosen, strict=True)
        ]
        places = [
            _passed(s[c], bounds, i) for i, (s, c) in enumerate(zip(sums, chosen, strict=True))
        ]
        left = torch.stack(
            [tiled[i, c, place] for i, (c, place) in enumerate(zip(chosen, places, strict=True))]
        )
        for width in (_BLOCK, 1):
            left = left.view(len(words), -1, width)
            for i, parts in enumerate(self.reduce(left.sum(-1), "sum").tolist()):
                at = _passed(parts, bounds, i)
                places[i] = places[i] * left.shape[1] + at
            left = left[torch.arange(len(words)), [place % left.shape[1] for place in places]]
        return places


def _passed(parts: list[int], bounds: list[int], i: int) -> int:
    """The part in which bound i is passed; it becomes that within the part."""
    for place, part in enumerate(parts):
        if bounds[i] < part:
            return place
        bounds[i] -= part
    raise AssertionError("the bound is below the sum")


def _decide(
    rows: list[_Row], shard: _Shard, rule: str, target: Tensor, draft: Tensor | None
) -> None:
    """What rows emit before it is cut."""
    if not rows:
        return
    targets: dict[int, list[_Line]] = {}
    drafters: dict[int, list[_Line]] = {}
    drawing = [row for row in rows if rule != "greedy" and row.temperature != 0]
    for row in rows:
        t = row.temperature if row in drawing else 0.0
        ids = [*row.drafts, -1]
        targets[row.index] = [_Line(target[row.index, i], t, d) for i, d in enumerate(ids)]
        drafters[row.index] = []
        if draft is not None and rule == "lossless" and row in drawing:
            drafters[row.index] = [
                _Line(draft[row.index, i], t, d) for i, d in enumerate(row.drafts)
            ]
    shard.largest(
        [line for lines in (targets, drafters) for row in rows for line in lines[row.index]]
    )
    usable = [
        line
        for lines in (targets, drafters)
        for row in drawing
        for line in lines[row.index]
        if not line.error
    ]
    if usable:
        shard.sums(usable)
    if rule == "coupled":
        pairs = [
            (line, (row.seed, row.position + i))
            for row in drawing
            for i, line in enumerate(targets[row.index])
            if not line.error
        ]
        if pairs:
            shard.race([line for line, _ in pairs], [seed for _, seed in pairs])
    sampled = []
    for row in rows:
        lines = targets[row.index]
        if row in drawing and rule == "lossless":
            _accept(row, lines, drafters[row.index])
            if not row.error:
                sampled.append(row)
            continue
        for i, line in enumerate(lines):
            row.error = line.error
            choice = line.winner if row in drawing else line.argmax
            if row.error or i == len(row.drafts) or row.drafts[i] != choice:
                row.tokens = [] if row.error else [*row.drafts[:i], choice]
                row.accepted = 0 if row.error else i
                break
    if not sampled:
        return
    densities, words = [], []
    for row in sampled:
        at, lines = row.accepted, drafters[row.index]
        p = targets[row.index][at].p()
        rest = p.clone()
        if at < len(row.drafts) and lines:
            rest = (p - lines[at].p()).clamp(min=0)
        elif at < len(row.drafts) and 0 <= row.drafts[at] - shard.offset < shard.size:
            rest[row.drafts[at] - shard.offset] = 0
        densities.append(laws.fixed(torch.stack([rest, p])))
        words.append(laws.word(row.seed, row.position + at, laws.SAMPLE))
    for row, token in zip(sampled, shard.draw(densities, words), strict=True):
        row.tokens = [*row.drafts[: row.accepted], token]


def _accept(row: _Row, targets: list[_Line], drafters: list[_Line]) -> None:
    """How many drafts stand under the rule lossless."""
    zero_q = 0
    for i in range(len(row.drafts) + 1):
        row.accepted = i
        row.error = targets[i].error or (drafters[i].error if i < len(drafters) else 0)
        if row.error:
            row.accepted = 0
            return
        row.zero_q = zero_q
        if i == len(row.drafts):
            return
        p, q = targets[i].p_of_id(), drafters[i].p_of_id() if drafters else 1.0
        zero_q += q == 0 and p > 0
        row.zero_q = zero_q
        word = laws.word(row.seed, row.position + i, laws.ACCEPT)
        if not float(word) * 2.0**-32 * q < p:
            return


# Arguments and results


def _drafts(ids: Tensor, lens: Tensor | None) -> list[list[int]]:
    """Drafts of each row, up to the first that is none."""
    rows: list[list[int]] = ids.tolist()
    counts = _list(lens, len(rows), ids.shape[1])
    rows = [row[: max(count, 0)] for row, count in zip(rows, counts, strict=True)]
    return [row[: row.index(-1)] if -1 in row else row for row in rows]


def _list(t: Tensor | None, rows: int, default: Any) -> list[Any]:
    return [default] * rows if t is None else t.tolist()


def _result(rows: list[_Row], width: int, device: torch.device) -> VerifyOut:
    counts = [len(row.tokens) for row in rows]
    flat = [token for row in rows for token in row.tokens]
    follows = [_BONUS if row.accepted == len(row.drafts) else _CORRECTION for row in rows]
    tokens = [row.tokens + [-1] * (width - len(row.tokens)) for row in rows]
    sources = [
        [source if i == row.accepted and i < len(row.tokens) else 0 for i in range(width)]
        for row, source in zip(rows, follows, strict=True)
    ]
    sums = [0]
    for count in counts:
        sums.append(sums[-1] + count)

    def ints(values: Any, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device).reshape(shape)

    b = len(rows)
    return VerifyOut(
        accept_len=ints([row.accepted for row in rows], torch.int32, b),
        next_token=ints(
            [row.tokens[row.accepted] if len(row.tokens) > row.accepted else -1 for row in rows],
            torch.int64,
            b,
        ),
        num_emitted=ints(counts, torch.int32, b),
        tokens=ints(tokens, torch.int64, b, width),
        cu_emitted=ints(sums, torch.int32, b + 1),
        flat=ints(flat + [-1] * (b * width - len(flat)), torch.int64, b * width),
        source=ints(sources, torch.uint8, b, width),
        finished=ints([row.finished for row in rows], torch.uint8, b),
        row_error=ints([row.error for row in rows], torch.uint8, b),
        state=torch.zeros(b, dtype=torch.uint8, device=device),
        zero_q=ints([row.zero_q for row in rows], torch.int32, b),
    )
