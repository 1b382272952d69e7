"""What the definition says of a batch: the reference, row by row, as results of the operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignops.reference.speculative import Law, Row, Tree, given, law, rules
from alignops.reference.speculative.rules import Outcome

# Codes of row errors.
BAD_VALUE, IMPOSSIBLE, BAD_ID, BAD_ARGUMENT = 1, 2, 3, 4


class RowFaultError(Exception):
    """A row has no law."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Laws(Sequence[Law]):
    """The laws of some rows, made when they are asked for."""

    def __init__(
        self, rows: Tensor, make: Callable[[np.ndarray], Law], width: int | None = None
    ) -> None:
        self.rows, self.make, self.width = rows, make, width
        self.made: dict[int, Law] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        if i not in self.made:
            row = self.rows[i].float().numpy()
            if np.isnan(row).any() or (row == np.inf).any():
                raise RowFaultError(BAD_VALUE)
            try:
                one = self.make(row)
            except ValueError as error:
                raise RowFaultError(IMPOSSIBLE) from error
            self.made[i] = one if self.width is None else wider(one, self.width)
        return self.made[i]


def wider(one: Law, size: int) -> Law:
    """A law of the first ids as one of `size` ids."""
    more = size - one.logits.size
    return type(one)(
        np.pad(one.logits, (0, more), constant_values=-np.inf if type(one) is Law else 0),
        np.pad(one.mantissa, (0, more)),
        np.pad(one.exponent, (0, more), constant_values=-(1 << 20)),
    )


@dataclass
class Expected:
    """Of one row."""

    tokens: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    accepted: int = 0
    finished: int = 0
    error: int = 0
    state: int = 0
    zero_q: int = 0
    path: list[int] = field(default_factory=list)


def _per_row(value: Any, b: int) -> Any:
    return value[b].item() if isinstance(value, Tensor) else value


def _maker(case: dict[str, Any], b: int, temperature: float) -> Callable[[np.ndarray], Law]:
    if case.get("is_probs"):
        return given
    cuts = [_per_row(case.get(n, d), b) for n, d in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))]
    if temperature == 0:
        return law
    return lambda row: law(row, temperature, *cuts)


def expected_rows(case: dict[str, Any]) -> list[Expected]:
    """`case`: keyword arguments of `verify`."""
    return [_expected_row(case, b) for b in range(len(case["draft_ids"]))]


def _drafts(case: dict[str, Any], b: int, count: int) -> list[int]:
    if case.get("draft_lens") is not None:
        count = min(max(int(case["draft_lens"][b]), 0), count)
    drafts: list[int] = case["draft_ids"][b].tolist()[:count]
    return drafts[: drafts.index(-1)] if -1 in drafts else drafts


def _expected_row(case: dict[str, Any], b: int) -> Expected:
    state = int(case["state"][b]) if case.get("state") is not None else 0
    idle = Expected(state=state)
    if case.get("active") is not None and not case["active"][b]:
        return idle
    cu, count = case.get("cu"), case["draft_ids"].shape[1]
    rows = case["target"][b] if cu is None else case["target"][int(cu[b]) : int(cu[b + 1])]
    if len(rows) == 0:
        return idle
    size = rows.shape[1]
    drafts = _drafts(case, b, min(count, len(rows) - 1))
    temperature = _per_row(case.get("temperature", 1.0), b)
    if temperature and not np.float32(1e-5) <= np.float32(temperature) <= 1e4:
        return Expected(error=BAD_ARGUMENT, state=state)
    if any(not 0 <= d < size for d in drafts):
        return Expected(error=BAD_ID, state=state)
    rule, parameters = case["rule"], dict(case.get("params") or {})
    warped = _maker(case, b, temperature)
    raw = rule == "rsd" and parameters.pop("student_probs", "raw") == "raw" and temperature > 0
    target = Laws(rows, law if raw and not case.get("is_probs") else warped)
    draft = case.get("draft")
    row = Row(
        target,
        drafts,
        None if draft is None else Laws(draft[b], warped, size),
        int(case["seeds"][b]) if case.get("seeds") is not None else 0,
        int(case["positions"][b]) if case.get("positions") is not None else 0,
        None if case.get("uniforms") is None else case["uniforms"][b].numpy(),
        state,
    )
    if "given" in parameters:
        parameters["given"] = int(parameters["given"][b])
    if temperature == 0 and rule != "scripted":
        rule, parameters = "greedy", {}
    if rule == "rsd":
        parameters["student"] = Laws(rows, warped)
    remaining = None if case.get("remaining") is None else int(case["remaining"][b])
    try:
        outcome = rules.verify(row, rule, case.get("eos_ids", ()), remaining, **parameters)
        zero_q = _zero_q(row, rule, parameters)
    except RowFaultError as fault:
        return Expected(error=fault.code, state=state)
    state = outcome.state if rule == "nudge" else state
    return _from(outcome, state, zero_q)


def _from(outcome: Outcome, state: int = 0, zero_q: int = 0) -> Expected:
    return Expected(
        [int(t) for t in outcome.tokens],
        outcome.sources,
        outcome.accepted,
        outcome.finished,
        0,
        state,
        zero_q,
    )


def _zero_q(row: Row, rule: str, parameters: dict[str, Any]) -> int:
    """Tested drafts with q = 0 and p > 0."""
    if rule not in ("lossless", "block") or row.proposals is None:
        return 0
    tested = len(row.drafts)
    if rule == "lossless":
        tested = min(rules.RULES[rule](row, **parameters).accepted + 1, tested)
    return sum(
        bool(row.q(i)[d] == 0 and row.target[i].p[d] > 0) for i, d in enumerate(row.drafts[:tested])
    )


def expected_trees(case: dict[str, Any]) -> list[Expected]:
    """`case`: keyword arguments of `verify_tree`."""
    return [_expected_tree(case, b) for b in range(len(case["tokens"]))]


def _expected_tree(case: dict[str, Any], b: int) -> Expected:
    if case.get("active") is not None and not case["active"][b]:
        return Expected()
    rows, tokens = case["target"][b], case["tokens"][b].tolist()
    size = rows.shape[1]
    temperature = _per_row(case.get("temperature", 1.0), b)
    if temperature and not np.float32(1e-5) <= np.float32(temperature) <= 1e4:
        return Expected(error=BAD_ARGUMENT)
    warped = _maker(case, b, temperature)
    draft = case.get("draft")
    if any(not -1 <= t < size for t in tokens[1:]):
        return Expected(error=BAD_ID)
    try:
        tree = Tree(
            case["parent"][b].tolist(),
            tokens,
            Laws(rows, warped),
            None if draft is None else Laws(draft[b], warped, size),
            int(case["seeds"][b]) if case.get("seeds") is not None else 0,
            int(case["positions"][b]) if case.get("positions") is not None else 0,
        )
    except ValueError:
        return Expected(error=BAD_ID)
    rule = "greedy" if temperature == 0 else case["rule"]
    parameters = {"replacement": case.get("replacement", False)} if rule == "tree_rrs" else {}
    remaining = None if case.get("remaining") is None else int(case["remaining"][b])
    try:
        path, outcome = rules.verify_tree(
            tree, rule, case.get("eos_ids", ()), remaining, **parameters
        )
    except RowFaultError as fault:
        return Expected(error=fault.code)
    out = _from(outcome)
    out.path = path
    return out


def assert_rows(out: Any, expected: list[Expected], note: object = "") -> None:
    """All fields of `out` are what the definition says."""
    width = out.tokens.shape[1]
    pads = [width - len(e.tokens) for e in expected]
    fields: dict[str, Tensor] = {
        "row_error": torch.tensor([e.error for e in expected], dtype=torch.uint8),
        "tokens": torch.tensor(
            [e.tokens + [-1] * pad for e, pad in zip(expected, pads, strict=True)],
            dtype=torch.int64,
        ).reshape(-1, width),
        "accept_len": torch.tensor([e.accepted for e in expected], dtype=torch.int32),
        "num_emitted": torch.tensor([len(e.tokens) for e in expected], dtype=torch.int32),
        "next_token": torch.tensor(
            [e.tokens[e.accepted] if len(e.tokens) > e.accepted else -1 for e in expected],
            dtype=torch.int64,
        ),
        "source": torch.tensor(
            [e.sources + [0] * pad for e, pad in zip(expected, pads, strict=True)],
            dtype=torch.uint8,
        ).reshape(-1, width),
        "finished": torch.tensor([e.finished for e in expected], dtype=torch.uint8),
        "cu_emitted": torch.tensor(
            np.cumsum([0, *(len(e.tokens) for e in expected)]), dtype=torch.int32
        ),
        "flat": torch.tensor(
            [t for e in expected for t in e.tokens] + [-1] * sum(pads), dtype=torch.int64
        ),
    }
    if hasattr(out, "path"):
        fields["path"] = torch.tensor(
            [e.path + [-1] * (width - len(e.path)) for e in expected], dtype=torch.int32
        ).reshape(-1, width)
    else:
        fields["state"] = torch.tensor([e.state for e in expected], dtype=torch.uint8)
        fields["zero_q"] = torch.tensor([e.zero_q for e in expected], dtype=torch.int32)
    for name, value in fields.items():
        got = getattr(out, name)
        assert got.dtype == value.dtype, name
        assert torch.equal(got, value), f"{name}: {got} is not {value}; {note}"
