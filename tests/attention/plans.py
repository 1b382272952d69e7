"""Plans of random steps, built here word by word from csrc/attention/plan.h, with their pools.

This is a second implementation of what the planner writes: the operators can be tried without a
workspace, with plans that no workspace would make, and with damaged ones. `expected` computes a
step from the tables in float64.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAGIC = 0x314E414C50474C41
HEADER, SEGMENT, PAIR, ROW = 24, 8, 4, 4
HIDDEN, VISIBLE, RISING = 0, 1, 2


@dataclass(frozen=True)
class Shape:
    """Heads, columns, rotary pairs of a layer, and its options."""

    kv_heads: int = 2
    group: int = 3
    d: int = 32
    dv: int = 32
    pairs: int = 16
    offset: int = 0
    interleaved: bool = False
    rope: bool = True
    softcap: float = 0.0
    window: int = 0
    sinks: bool = False

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


@dataclass
class Run:
    """A segment of a block: n keys from slot `first` of the first page on."""

    n: int
    s0: int
    r0: int
    first: int
    pages: list[int] = field(default_factory=list)


@dataclass
class Step:
    """A plan's words and tables, and the sizes of the pool it is for."""

    words: Tensor
    pages: int
    page_size: int
    tables: dict[str, Any]

    @property
    def rows(self) -> int:
        return len(self.tables["rows"])


def make(
    rng: np.random.Generator,
    *,
    workers: int = 2,
    blocks: int = 4,
    longest: int = 1,
    length: int = 70,
    page_size: int = 16,
    raw: bool = True,
    pairs: int = 16,
    theta: float = 1e4,
    weights: bool = False,
    spread: int = 3,
) -> Step:
    """Every worker writes a block of its own and sees the others in an order of its own."""
    counts = rng.integers(0, longest + 1, workers)
    if counts.sum() == 0:
        counts[0] = longest
    total = blocks + workers
    runs: list[list[Run]] = []
    lengths, before = np.zeros(total, int), np.zeros(total, int)
    for b in range(total):
        runs.append([])
        position = 0
        own = b - blocks
        for _ in range(rng.integers(1, spread + 1)):
            n = int(rng.integers(0, length + 1))
            if n:
                turned = position if rng.random() < 0.5 else int(rng.integers(0, 50))
                runs[b].append(Run(n, position, turned, int(rng.integers(0, page_size))))
                position += n + (int(rng.integers(0, 4)) if rng.random() < 0.3 else 0)
        before[b] = position
        new = int(counts[own]) if own >= 0 else 0
        if new:
            last = runs[b][-1] if runs[b] else None
            if last and last.s0 == last.r0 and last.s0 + last.n == position and rng.random() < 0.7:
                last.n += new
            else:
                runs[b].append(Run(new, position, position, int(rng.integers(0, page_size))))
        lengths[b] = position + new
    ceil = lambda n: -(-n // page_size)  # noqa: E731
    used = sum(ceil(r.first + r.n) for block in runs for r in block)
    free = list(rng.permutation(used + 3))
    for block in runs:
        for r in block:
            r.pages = [int(free.pop()) for _ in range(ceil(r.first + r.n))]
    segments = [(b, r) for b, block in enumerate(runs) for r in block]

    table: list[list[dict[str, int]]] = []
    views = []
    for w in range(workers):
        seen = [b for b in range(total) if b != blocks + w and rng.random() < 0.8]
        views.append([*rng.permutation(seen).tolist(), blocks + w])
    bias = np.zeros((len(segments), workers), np.float32)
    gain = np.ones((len(segments), workers), np.float32)
    for b, r in segments:
        line = []
        for w in range(workers):
            if b not in views[w] or not counts[w]:
                line.append({"state": HIDDEN, "limit0": 0, "distance0": 0, "delta0": 0})
                continue
            where = views[w].index(b)
            origin = int(sum(lengths[c] for c in views[w][:where]))
            own = blocks + w
            home = int(sum(lengths[c] for c in views[w][:-1]))
            p = home + int(before[own])
            mine = b == own and r.s0 + r.n > before[own]
            line.append(
                {
                    "state": RISING if mine else VISIBLE,
                    "limit0": int(before[own]) + 1 - r.s0 if mine else r.n,
                    "distance0": p - origin - r.s0,
                    "delta0": (p if raw else home) - origin - r.s0 + r.r0,
                }
            )
        table.append(line)
    if weights:
        bias = rng.normal(size=bias.shape).astype(np.float32)
        gain = rng.uniform(0.5, 1.5, gain.shape).astype(np.float32)
        bias[rng.random(bias.shape) < 0.1] = -np.inf

    rows, row_ptr = [], [0]
    for w in range(workers):
        own = blocks + w
        for t in range(counts[w]):
            index = int(before[own]) + t
            r = next(r for r in runs[own] if r.s0 <= index < r.s0 + r.n)
            place = r.first + index - r.s0
            slot = r.pages[place // page_size] * page_size + place % page_size
            rows.append((w, t, slot, index))
        row_ptr.append(len(rows))
    tables = {
        "segments": [(b, r.n, r.first, r.s0, r.r0, r.pages) for b, r in segments],
        "pairs": table,
        "bias": bias,
        "gain": gain,
        "rows": rows,
        "row_ptr": row_ptr,
        "blocks": total,
        "raw": raw,
        "omega": theta ** (-np.arange(pairs) / max(pairs, 1)),
    }
    return encode(tables, page_size, used + 3)


def encode(tables: dict[str, Any], page_size: int, pages: int) -> Step:
    """The words of a plan."""
    segments, rows, row_ptr = tables["segments"], tables["rows"], tables["row_ptr"]
    workers = len(row_ptr) - 1
    longest = max((b - a for a, b in itertools.pairwise(row_ptr)), default=0)
    omega = tables["omega"]
    deltas = [pair["delta0"] for line in tables["pairs"] for pair in line]
    positions = np.array([*deltas, *range(longest), *(row[3] for row in rows)], np.float64)
    angles = positions[:, None] * omega[None, :]
    turns = np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
    page_list: list[int] = []
    lines: list[int] = []
    token = 0
    for b, n, first, s0, r0, own_pages in segments:
        lines += [b, n, len(page_list), first, s0, r0, token, 0]
        page_list += own_pages
        token += n
    cells = [
        pair[name]
        for line in tables["pairs"]
        for pair in line
        for name in ("state", "limit0", "distance0", "delta0")
    ]
    floats = np.stack([tables["bias"], tables["gain"]], -1).reshape(-1, 2)
    weight = floats.astype(np.float32).view(np.int64).reshape(-1).tolist()
    parts = {
        "row_ptr": list(row_ptr),
        "segment": lines,
        "pair": cells,
        "weight": weight,
        "page": page_list,
        "row": [number for row in rows for number in row],
        "rope": [len(omega), 0],
        "table": turns.reshape(-1, 2).view(np.int64).reshape(-1).tolist(),
    }
    offset, offsets = HEADER, {}
    for name, part in parts.items():
        offsets[name] = offset
        offset += len(part)
    parts["rope"][1] = offsets["table"]
    header = [
        MAGIC,
        offset,
        workers,
        len(rows),
        len(segments),
        tables["blocks"],
        page_size,
        len(page_list),
        longest,
        token,
        int(tables["raw"]),
        1,
        *(offsets[n] for n in ("row_ptr", "segment", "pair", "weight", "page", "row", "rope")),
        *([0] * 5),
    ]
    words = header + [number for part in parts.values() for number in part]
    raw = struct.pack(f"<{len(words)}q", *words)
    return Step(torch.frombuffer(bytearray(raw), dtype=torch.int64), pages, page_size, tables)


def rotate(x: np.ndarray, angle: np.ndarray, shape: Shape) -> np.ndarray:
    """x (..., D) by angles (..., F)."""
    if not shape.rope:
        return x
    out = x.copy()
    f, n = shape.offset, shape.pairs
    first = slice(f, f + 2 * n, 2) if shape.interleaved else slice(f, f + n)
    second = slice(f + 1, f + 2 * n, 2) if shape.interleaved else slice(f + n, f + 2 * n)
    cos, sin = np.cos(angle), np.sin(angle)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def expected(
    step: Step,
    shape: Shape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    sinks: Tensor | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """out, lse, mass in float64."""
    tables = step.tables
    q, k, v = (t.double().numpy() for t in (q, k, v))
    out = np.zeros((step.rows, shape.heads, shape.dv))
    lse = np.full((step.rows, shape.heads), -np.inf)
    mass = np.zeros((step.rows, shape.heads, tables["blocks"]))
    for row, (w, t, _, _) in enumerate(tables["rows"]):
        scores, values, owner = [], [], []
        for s, (b, n, first, _, _, pages) in enumerate(tables["segments"]):
            pair = tables["pairs"][s][w]
            bias, gain = float(tables["bias"][s][w]), float(tables["gain"][s][w])
            if pair["state"] == HIDDEN or bias == -np.inf:
                continue
            end = min(n, pair["limit0"] + (t if pair["state"] == RISING else 0))
            begin = max(0, pair["distance0"] + t - shape.window + 1) if shape.window else 0
            if begin >= end:
                continue
            place = first + np.arange(begin, end)
            page = np.array(pages)[place // step.page_size]
            keys = k[page, :, place % step.page_size]  # (n, Hkv, D)
            delta = pair["delta0"] + (t if tables["raw"] else 0)
            query = rotate(q[row], delta * tables["omega"], shape)
            query = query.reshape(shape.kv_heads, shape.group, shape.d)
            z = gain * scale * np.einsum("hgd,nhd->hgn", query, keys).reshape(shape.heads, -1)
            if shape.softcap:
                z = shape.softcap * np.tanh(z / shape.softcap)
            scores.append(z + bias)
            values.append(v[page, :, place % step.page_size])
            owner.append(np.full(end - begin, b))
        if not scores and sinks is None:
            continue
        z = np.concatenate(scores, -1) if scores else np.zeros((shape.heads, 0))
        extra = np.zeros((shape.heads, 0)) if sinks is None else sinks.double().numpy()[:, None]
        both = np.concatenate([z, extra], -1)
        top = both.max(-1, keepdims=True)
        total = np.exp(both - top).sum(-1, keepdims=True)
        lse[row] = (top + np.log(total))[:, 0]
        if not scores:
            continue
        p = np.exp(z - top) / total
        value = np.repeat(np.concatenate(values), shape.group, 1)
        out[row] = np.einsum("hn,nhd->hd", p, value)
        np.add.at(mass[row].T, np.concatenate(owner), p.T)
    return out, lse, mass


def pool(
    step: Step, shape: Shape, dtype: torch.dtype, generator: torch.Generator, fill: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Keys and values; what no segment has is `fill`."""
    k = torch.full((step.pages, shape.kv_heads, step.page_size, shape.d), fill, dtype=dtype)
    v = torch.full((step.pages, shape.kv_heads, step.page_size, shape.dv), fill, dtype=dtype)
    for _, n, first, _, _, pages in step.tables["segments"]:
        place = first + torch.arange(n)
        page, slot = torch.tensor(pages)[place // step.page_size], place % step.page_size
        for t in (k, v):
            new = torch.randn(n, shape.kv_heads, t.shape[-1], generator=generator)
            t[page, :, slot] = new.to(dtype)
    return k, v


def queries(step: Step, shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(step.rows, shape.heads, shape.d, generator=generator).to(dtype)


def attend(
    step: Step,
    shape: Shape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse, mass of the operator; memory that it must write begins as NaN."""
    op = torch.ops.alignops
    out = torch.full((step.rows, shape.heads, shape.dv), float("nan"), dtype=q.dtype)
    lse = torch.full((step.rows, shape.heads), float("nan"))
    mass = torch.full((step.rows, shape.heads, step.tables["blocks"]), float("nan"))
    size = op.attention_scratch(step.words, shape.heads, shape.kv_heads, shape.dv, True)
    scratch = torch.full((size,), 255, dtype=torch.uint8)
    rope = 0 if shape.rope else -1
    op.attention_concurrent_(
        q, k, v, step.words, sinks, rope, shape.offset, shape.interleaved, scale, shape.softcap,
        shape.window, out, lse, mass, scratch,
    )  # fmt: skip
    return out, lse, mass
