"""Inputs of the operators of verification: random batches, and valid and invalid samples.

A valid sample is a tuple of arguments of `torch.ops.alignops.<op>`; an invalid one also names the
argument that the error message must name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignops.speculative.verify import RULES, TREE_RULES
from tests.spans.samples import Invalid

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Whole tiles, parts of tiles, several tiles, and less than a vector.
SIZES = (1, 2, 5, 11, 37, 97, 4095, 4096, 4097, 9001, 12289)
SMALL = SIZES[:6]


def generator(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def make_logits(rng: np.random.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Rows of several spreads, with equal values and impossible ids."""
    spread = rng.choice([0.5, 2.0, 8.0])
    values = rng.standard_normal(shape) * spread
    if rng.random() < 0.4:
        values = np.rint(values)  # ties
    values[rng.random(shape) < rng.choice([0.0, 0.3])] = -np.inf
    values[..., rng.integers(shape[-1])] = 1.0
    if rng.random() < 0.1:
        values = values * 500  # beyond the largest exponent, and what is cut off
    return torch.from_numpy(values).to(dtype)


def make_probabilities(rng: np.random.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    return make_logits(rng, *shape, dtype=torch.float32).softmax(-1).to(dtype)


def strided(rng: np.random.Generator, t: Tensor) -> Tensor:
    """The same values, in memory with other outer strides and an odd start."""
    if rng.random() < 0.5:
        return t
    big = torch.full((t.shape[1], t.shape[0] + 1, t.shape[2] + 3), 7.0, dtype=t.dtype)
    view = big.transpose(0, 1)[1:, :, 1 : 1 + t.shape[2]]
    view.copy_(t)
    return view


def make_warp(rng: np.random.Generator, b: int, size: int, probs: bool = False) -> dict[str, Any]:
    """Temperature and cuts of each row; some rows are greedy. Probabilities have no others."""
    out: dict[str, Any] = {}
    if probs:
        greedy = rng.random(b) < 0.3
        return {"temperature": torch.from_numpy(np.where(greedy, 0.0, 1.0).astype(np.float32))}
    if rng.random() < 0.7:
        out["temperature"] = torch.from_numpy(
            rng.choice([0.0, 0.1, 0.7, 1.0, 1.3, 30.0], b).astype(np.float32)
        )
    if rng.random() < 0.3:
        out["top_k"] = torch.from_numpy(rng.choice([0, 1, 2, 5, size, size + 3], b)).int()
    if rng.random() < 0.3:
        out["top_p"] = torch.from_numpy(
            rng.choice([1.0, 0.999, 0.9, 0.5, 0.01], b).astype(np.float32)
        )
    if rng.random() < 0.3:
        out["min_p"] = torch.from_numpy(rng.choice([0.0, 0.05, 0.5, 1.0], b).astype(np.float32))
    return out


def make_params(rng: np.random.Generator, rule: str, b: int, size: int) -> dict[str, Any]:
    if rule == "typical":
        return {"eps": float(rng.choice([0.09, 0.5])), "delta": float(rng.choice([0.3, 0.8]))}
    if rule == "relaxed":
        delta = rng.choice([None, 0.1, 1.0])
        return {"m": int(rng.integers(1, 5)), "r": float(rng.choice([0.0, 0.5])), "delta": delta}
    if rule == "threshold":
        return {
            "t_single": float(rng.choice([0.0, 0.4, 1.0])),
            "t_acc": float(rng.choice([0.5, 1])),
        }
    if rule == "rsd":
        return {
            "p_th": float(rng.choice([0.0, 0.01, 0.2])),
            "top_n": int(rng.choice([0, 2, 20])),
            "trials": int(rng.choice([1, 3, 5])),
            "retry": str(rng.choice(["resample", "descend", "none"])),
            "student_probs": str(rng.choice(["raw", "warped"])),
        }
    if rule == "nudge":
        word_start = torch.from_numpy(rng.random(size) < 0.5)
        return {
            "gamma": float(rng.choice([0.1, 0.4])),
            "eos_lookahead": int(rng.choice([0, 1, 3, 16])),
            "word_start": word_start,
        }
    if rule == "scripted":
        return {"given": torch.from_numpy(rng.integers(-1, 9, b)).int()}
    return {}


def make_drafts(rng: np.random.Generator, target: Tensor, draft: Tensor | None, k: int) -> Tensor:
    """Draws of the drafter, what the target likes best, random ids; some rows have fewer."""
    b, size = len(target), target.shape[-1]
    ids = rng.integers(0, size, (b, k))
    best = target[:, :k].float().argmax(-1).numpy() if k else ids
    ids = np.where(rng.random((b, k)) < rng.choice([0.2, 0.6, 0.95]), best, ids)
    if draft is not None and k:
        law = draft.float().softmax(-1)
        drawn = torch.multinomial(law.reshape(b * k, -1).nan_to_num(1.0), 1).reshape(b, k).numpy()
        ids = np.where(rng.random((b, k)) < 0.5, drawn, ids)
    ids[rng.random((b, k)) < rng.choice([0.0, 0.1])] = -1
    return torch.from_numpy(ids.astype(np.int64))


def make_case(
    rng: np.random.Generator,
    rule: str,
    sizes: tuple[int, ...] = SIZES,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Keyword arguments of `verify`."""
    size, b, k = int(rng.choice(sizes)), int(rng.integers(1, 5)), int(rng.integers(0, 6))
    if dtype is None:
        dtype = DTYPES[rng.integers(3)]
    probs = rng.random() < 0.15
    make = make_probabilities if probs else make_logits
    target = make(rng, b, k + 1, size, dtype=dtype)
    draft = None
    if rng.random() < 0.7:
        own = size if rng.random() < 0.7 else int(rng.integers(1, size + 1))
        draft = make(rng, b, k, own, dtype=dtype)
        if own == size and rng.random() < 0.3:
            draft = target[:, :k].clone()  # p = q
    case: dict[str, Any] = {
        "target": strided(rng, target),
        "draft_ids": make_drafts(rng, target, draft, k),
        "draft": None if draft is None or k == 0 else strided(rng, draft),
        "rule": rule,
        "params": make_params(rng, rule, b, size),
        "seeds": torch.from_numpy(rng.integers(-(2**63), 2**63, b)),
        "positions": torch.from_numpy(rng.integers(0, 2**33, b)),
        "is_probs": probs,
    }
    case |= make_warp(rng, b, size, probs)
    if rng.random() < 0.3:
        words = rng.choice([0, 1, 2**31, 2**32 - 1, int(rng.integers(2**32))], (b, k + 1, 2))
        case["uniforms"] = torch.from_numpy(words.astype(np.uint32))
    if rng.random() < 0.4:
        case["eos_ids"] = rng.integers(0, size, rng.integers(1, 4)).tolist()
    if rng.random() < 0.3:
        case["remaining"] = torch.from_numpy(rng.integers(-1, k + 3, b)).int()
    if rng.random() < 0.3:
        case["draft_lens"] = torch.from_numpy(rng.integers(-1, k + 2, b)).int()
    if rng.random() < 0.3:
        case["active"] = torch.from_numpy(rng.random(b) < 0.7)
    if rule == "nudge" or rng.random() < 0.1:
        case["state"] = torch.from_numpy(rng.integers(0, 2, b)).to(torch.uint8)
    return case


def packed(case: dict[str, Any], counts: list[int]) -> dict[str, Any]:
    """The same with the first `counts` rows of each sequence, in one (rows, V)."""
    rows = [t[:n] for t, n in zip(case["target"], counts, strict=True)]
    cu = torch.from_numpy(np.cumsum([0, *counts])).int()
    return case | {"target": torch.cat(rows), "cu": cu}


def make_parents(rng: np.random.Generator, b: int, n: int) -> Tensor:
    parent = np.full((b, n), -1)
    for i in range(1, n):
        parent[:, i] = rng.integers(max(0, i - rng.integers(1, 5)), i, b)
    return torch.from_numpy(parent)


def make_tree_case(
    rng: np.random.Generator, rule: str, sizes: tuple[int, ...] = SIZES
) -> dict[str, Any]:
    """Keyword arguments of `verify_tree`."""
    size, b, n = int(rng.choice(sizes)), int(rng.integers(1, 4)), int(rng.choice([1, 2, 6, 12]))
    dtype = DTYPES[rng.integers(3)]
    probs = rng.random() < 0.15
    make = make_probabilities if probs else make_logits
    target, parent = make(rng, b, n, size, dtype=dtype), make_parents(rng, b, n)
    tokens = torch.from_numpy(rng.integers(0, size, (b, n)))
    likely = target.float().topk(min(3, size), -1).indices
    for row in range(b):
        for i in range(1, n):
            if rng.random() < 0.7:
                tokens[row, i] = likely[row, parent[row, i], rng.integers(likely.shape[-1])]
    if n > 2 and rng.random() < 0.3:
        last = n - 1
        tokens[0, last] = -1
    case: dict[str, Any] = {
        "target": strided(rng, target),
        "tokens": tokens,
        "parent": parent,
        "rule": rule,
        "seeds": torch.from_numpy(rng.integers(-(2**63), 2**63, b)),
        "positions": torch.from_numpy(rng.integers(0, 2**33, b)),
        "is_probs": probs,
    }
    if rule == "tree_rrs":
        own = size if rng.random() < 0.7 else int(rng.integers(1, size + 1))
        case["draft"] = strided(rng, make(rng, b, n, own, dtype=dtype))
        case["replacement"] = bool(rng.random() < 0.5)
    case |= make_warp(rng, b, size, probs)
    if rng.random() < 0.4:
        case["eos_ids"] = rng.integers(0, size, rng.integers(1, 4)).tolist()
    if rng.random() < 0.3:
        case["remaining"] = torch.from_numpy(rng.integers(0, n + 2, b)).int()
    if rng.random() < 0.3:
        case["active"] = torch.from_numpy(rng.random(b) < 0.7)
    return case


# Arguments of the operators. The order is that of the schema.

VERIFY_ARGUMENTS = (
    *("target", "draft_ids", "draft", "draft_stats", "draft_lens", "cu", "rule", "params"),
    *("word_start", "given", "seeds", "positions", "uniforms"),
    *("temperature", "top_k", "top_p", "min_p"),
    *("eos_ids", "remaining", "state", "active", "is_probs"),
)
TREE_ARGUMENTS = (
    *("target", "tokens", "parent", "rule", "draft", "replacement", "seeds", "positions"),
    *("temperature", "top_k", "top_p", "min_p"),
    *("eos_ids", "remaining", "active", "is_probs"),
)
PROPOSE_ARGUMENTS = (
    *("logits", "seeds", "positions", "temperature", "top_k", "top_p", "min_p", "race"),
)
NUMBERS = {
    "typical": [0.09, 0.3],
    "relaxed": [3.0, 0.5, -1.0],
    "threshold": [1.0, 1.0],
    "rsd": [0.01, 20.0, 5.0, 0.0, 0.0],
    "nudge": [0.4, 16.0],
}


def verify_args(rule: str = "greedy", **changes: Any) -> tuple[Any, ...]:
    """Of `speculative_verify`: 2 rows, 3 drafts, 7 ids."""
    seeded = {"seeds": torch.tensor([1, -2]), "positions": torch.tensor([5, 6])}
    values: dict[str, Any] = dict.fromkeys(VERIFY_ARGUMENTS)
    values |= {
        "target": torch.randn(2, 4, 7),
        "draft_ids": torch.tensor([[1, 2, 3], [4, -1, 0]]),
        "rule": RULES[rule][0],
        "params": NUMBERS.get(rule, []),
        "word_start": torch.arange(7) % 2 == 0 if rule == "nudge" else None,
        "given": torch.tensor([1, 2]).int() if rule == "scripted" else None,
        "eos_ids": [],
        "is_probs": False,
        **(seeded if rule not in ("greedy", "scripted") else {}),
        **changes,
    }
    return tuple(values[name] for name in VERIFY_ARGUMENTS)


def tree_args(rule: str = "greedy", **changes: Any) -> tuple[Any, ...]:
    """Of `speculative_verify_tree`: 2 rows, 4 nodes, 7 ids."""
    values: dict[str, Any] = dict.fromkeys(TREE_ARGUMENTS)
    values |= {
        "target": torch.randn(2, 4, 7),
        "tokens": torch.tensor([[0, 1, 2, 3], [9, 5, 6, -1]]),
        "parent": torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 0]]),
        "rule": TREE_RULES[rule],
        "draft": torch.randn(2, 4, 7) if rule == "tree_rrs" else None,
        "replacement": False,
        "seeds": torch.tensor([1, -2]),
        "positions": torch.tensor([5, 6]),
        "eos_ids": [],
        "is_probs": False,
        **changes,
    }
    return tuple(values[name] for name in TREE_ARGUMENTS)


def propose_args(**changes: Any) -> tuple[Any, ...]:
    """Of `speculative_propose`: 2 rows, 7 ids."""
    values: dict[str, Any] = dict.fromkeys(PROPOSE_ARGUMENTS)
    values |= {
        "logits": torch.randn(2, 7),
        "seeds": torch.tensor([1, -2]),
        "positions": torch.tensor([5, 6]),
        "race": False,
        **changes,
    }
    return tuple(values[name] for name in PROPOSE_ARGUMENTS)


def _rows(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


_EVERY_WARP: dict[str, Any] = {
    "temperature": _rows(0.7, 0.0),
    "top_k": _rows(3, 0, dtype=torch.int32),
    "top_p": _rows(0.9, 1.0),
    "min_p": _rows(0.0, 0.1),
}


def _verify() -> Iterator[tuple[Any, ...]]:
    for rule in RULES:
        yield verify_args(rule)
    draft = torch.randn(2, 3, 6)
    for dtype in DTYPES:
        yield verify_args(
            "lossless",
            target=torch.randn(2, 4, 7, requires_grad=True).to(dtype),
            draft=draft.to(dtype),
            draft_lens=_rows(3, 2, dtype=torch.int32),
            eos_ids=[2, 3],
            remaining=_rows(2, 9, dtype=torch.int32),
            state=_rows(0, 1, dtype=torch.uint8),
            active=torch.tensor([True, False]),
            **_EVERY_WARP,
        )
    yield verify_args("block", target=torch.randn(4, 2, 7).transpose(0, 1)[..., 1:])
    cu = _rows(0, 4, 6, dtype=torch.int32)
    words = torch.zeros(2, 4, 2, dtype=torch.uint32)
    yield verify_args(
        "lossless", target=torch.randn(6, 7), cu=cu, uniforms=words, seeds=None, positions=None
    )
    yield verify_args(draft_ids=torch.zeros(2, 0).long(), target=torch.randn(2, 1, 7))
    yield verify_args(draft_ids=torch.zeros(0, 3).long(), target=torch.randn(0, 4, 7))
    probs = torch.full((2, 4, 7), 1 / 7)
    yield verify_args("lossless", target=probs, draft=probs[:, :3], is_probs=True)


def _trees() -> Iterator[tuple[Any, ...]]:
    for rule in TREE_RULES:
        for dtype in DTYPES:
            changes: dict[str, Any] = {"target": torch.randn(2, 4, 7).to(dtype)}
            if rule == "tree_rrs":
                changes["draft"] = torch.randn(2, 4, 5).to(dtype)
            yield tree_args(rule, **changes)
    yield tree_args(
        "tree_target", eos_ids=[1], remaining=_rows(2, 9, dtype=torch.int32), **_EVERY_WARP
    )
    yield tree_args(seeds=None, positions=None, active=torch.tensor([True, False]))


def _proposals() -> Iterator[tuple[Any, ...]]:
    for dtype in DTYPES:
        for race in (False, True):
            yield propose_args(logits=torch.randn(2, 7).to(dtype), race=race, **_EVERY_WARP)
    yield propose_args(
        logits=torch.randn(0, 7), seeds=torch.zeros(0).long(), positions=torch.zeros(0).long()
    )


def _bad_common(make: Callable[..., tuple[Any, ...]], rows: str = "target") -> Iterator[Invalid]:
    """Faults of the arguments that all operators have."""
    base = torch.randn(2, 4, 7) if rows == "target" else torch.randn(2, 7)
    yield Invalid("integers", make(**{rows: base.long()}), rows)
    yield Invalid("other dimensions", make(**{rows: base[None]}), rows)
    yield Invalid("strides", make(**{rows: base.repeat_interleave(2, -1)[..., ::2]}), rows)
    yield Invalid("no ids", make(**{rows: base[..., :0]}), rows)
    yield Invalid("seeds of int32", make(seeds=_rows(1, 2, dtype=torch.int32)), "seeds")
    yield Invalid("one seed", make(seeds=torch.tensor([1])), "seeds")
    yield Invalid("short positions", make(positions=torch.tensor([1])), "positions")
    yield Invalid("temperature of float64", make(temperature=_rows(1, 1).double()), "temperature")
    yield Invalid("one temperature", make(temperature=_rows(1)), "temperature")
    yield Invalid("top_k of int64", make(top_k=torch.tensor([1, 2])), "top_k")
    yield Invalid("top_p as matrix", make(top_p=_rows(1, 1)[None]), "top_p")
    yield Invalid("min_p with strides", make(min_p=torch.zeros(4)[::2]), "min_p")


def _bad_verify() -> Iterator[Invalid]:
    def drawing(**changes: Any) -> tuple[Any, ...]:
        return verify_args("lossless", **changes)

    yield from _bad_common(drawing)
    yield Invalid("draft_ids as vector", verify_args(draft_ids=torch.zeros(2).long()), "draft_ids")
    yield Invalid("draft_ids of int32", verify_args(draft_ids=torch.zeros(2, 3).int()), "draft_ids")
    yield Invalid("too few rows of logits", verify_args(target=torch.randn(2, 3, 7)), "target")
    yield Invalid("other batch", verify_args(target=torch.randn(3, 4, 7)), "target")
    yield Invalid("unknown rule", verify_args(rule="greedy", params=[1.0]), "params")
    codes = list(verify_args())
    codes[VERIFY_ARGUMENTS.index("rule")] = 10
    yield Invalid("rule 10", tuple(codes), "rule")
    for rule, numbers in (
        ("typical", [1.5, 0.3]),
        ("relaxed", [0.0, 0.5, -1.0]),
        ("threshold", [-1.0, 1.0]),
        ("rsd", [0.01, 20.0, 65.0, 0.0, 0.0]),
        ("nudge", [0.4]),
    ):
        yield Invalid(f"numbers of {rule}", verify_args(rule, params=numbers), "params")
    yield Invalid("no seeds", drawing(seeds=None, positions=None), "seeds")
    yield Invalid("no positions", drawing(positions=None), "positions")
    words = torch.zeros(2, 4, 2, dtype=torch.uint32)
    yield Invalid("race without seeds", verify_args("coupled", seeds=None, positions=None), "seeds")
    yield Invalid("uniforms of int64", drawing(uniforms=words.long()), "uniforms")
    yield Invalid("uniforms of other rows", drawing(uniforms=words[:, :3]), "uniforms")
    draft = torch.randn(2, 3, 7)
    yield Invalid("draft of other rows", drawing(draft=draft[:, :2]), "draft")
    yield Invalid("draft with more ids", drawing(draft=torch.randn(2, 3, 8)), "draft")
    yield Invalid("draft of int64", drawing(draft=draft.long()), "draft")
    stats = torch.zeros(2, 3, 6).long()
    yield Invalid("stats without draft", drawing(draft_stats=stats), "draft_stats")
    yield Invalid("short stats", drawing(draft=draft, draft_stats=stats[..., :5]), "draft_stats")
    lens = _rows(1, 2, dtype=torch.int32)
    yield Invalid("lens of int64", drawing(draft_lens=lens.long()), "draft_lens")
    cu = _rows(0, 4, 8, dtype=torch.int32)
    flat = torch.randn(8, 7)
    yield Invalid("cu of int64", drawing(target=flat, cu=cu.long()), "cu")
    yield Invalid("short cu", drawing(target=flat, cu=cu[:2]), "cu")
    yield Invalid("cu of a batch", drawing(cu=cu), "target")
    yield Invalid("no word_start", verify_args("nudge", word_start=None), "word_start")
    short = torch.zeros(6, dtype=torch.bool)
    yield Invalid("short word_start", verify_args("nudge", word_start=short), "word_start")
    yield Invalid("no given", verify_args("scripted", given=None), "given")
    yield Invalid("given of int64", verify_args("scripted", given=lens.long()), "given")
    yield Invalid("nine ends", verify_args(eos_ids=list(range(9))), "eos_ids")
    yield Invalid("remaining of int64", verify_args(remaining=lens.long()), "remaining")
    yield Invalid("state of int32", verify_args(state=lens), "state")
    yield Invalid("active of uint8", verify_args(active=lens.to(torch.uint8)), "active")
    yield Invalid("cut probabilities", drawing(top_k=lens, is_probs=True), "top_k")


def _bad_trees() -> Iterator[Invalid]:
    yield from _bad_common(lambda **changes: tree_args("tree_target", **changes))
    yield Invalid("tokens of int32", tree_args(tokens=torch.zeros(2, 4).int()), "tokens")
    yield Invalid("no nodes", tree_args(tokens=torch.zeros(2, 0).long()), "tokens")
    yield Invalid("65 nodes", tree_args(tokens=torch.zeros(2, 65).long()), "tokens")
    yield Invalid("other parents", tree_args(parent=torch.zeros(2, 3).long()), "parent")
    yield Invalid("parent of int32", tree_args(parent=torch.zeros(2, 4).int()), "parent")
    yield Invalid("no draft", tree_args("tree_rrs", draft=None), "draft")
    yield Invalid("draft of greedy", tree_args(draft=torch.randn(2, 4, 7)), "draft")
    wide = torch.randn(2, 4, 8)
    yield Invalid("draft with more ids", tree_args("tree_rrs", draft=wide), "draft")
    yield Invalid("no seeds", tree_args("tree_target", seeds=None, positions=None), "seeds")
    codes = list(tree_args())
    codes[TREE_ARGUMENTS.index("rule")] = 3
    yield Invalid("rule 3", tuple(codes), "rule")
    yield Invalid("nine ends", tree_args(eos_ids=list(range(9))), "eos_ids")
    yield Invalid("remaining of int64", tree_args(remaining=torch.tensor([1, 2])), "remaining")
    yield Invalid("active of int64", tree_args(active=torch.tensor([1, 2])), "active")


def _bad_proposals() -> Iterator[Invalid]:
    yield from _bad_common(propose_args, "logits")


VALID: dict[str, Callable[[], Iterator[tuple[Any, ...]]]] = {
    "speculative_verify": _verify,
    "speculative_verify_tree": _trees,
    "speculative_propose": _proposals,
}

INVALID: dict[str, Callable[[], Iterator[Invalid]]] = {
    "speculative_verify": _bad_verify,
    "speculative_verify_tree": _bad_trees,
    "speculative_propose": _bad_proposals,
}
