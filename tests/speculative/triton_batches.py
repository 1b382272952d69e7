"""Random input of the Triton kernels, and what the definition says of it, row by row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignops.reference.speculative import Law, Row, laws, rules
from alignops.triton_kernels import speculative as kernels
from alignops.triton_kernels.speculative_launch import Drafts, Outputs, Rule, Warp, Words

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EOS = (3, 7)
RETRIES = ("resample", "descend", "none")
WITH_DRAFT = ("lossless", "block", "rsd")


def outputs(b: int, width: int) -> Outputs:
    """Of `width` tokens at most, filled with what no kernel writes."""
    i32, i64, u8 = torch.int32, torch.int64, torch.uint8
    rows = {"accept_len": i32, "next_token": i64, "num_emitted": i32, "finished": u8}
    rows |= {"row_error": u8, "state": u8, "zero_q": i32}
    shapes = {name: ((b,), dtype) for name, dtype in rows.items()}
    shapes |= {"tokens": ((b, width), i64), "source": ((b, width), u8)}
    shapes |= {"cu_emitted": ((b + 1,), i32), "flat": ((b * width,), i64)}
    return Outputs(
        **{
            name: torch.full(shape, 113, dtype=dtype, device=DEVICE)
            for name, (shape, dtype) in shapes.items()
        }
    )


def to_device(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(DEVICE)


def wide(row: Tensor, size: int) -> np.ndarray:
    """A row of logits over `size` ids: those that are not in it are impossible."""
    out = np.full(size, -np.inf, np.float32)
    out[: row.numel()] = row.float().cpu().numpy()
    return out


@dataclass
class Batch:
    """Random input of `verify`, and what the definition says of it, row by row."""

    rule: str
    b: int = 4
    k: int = 3
    v: int = 300
    vd: int | None = None
    dtype: torch.dtype = torch.float32
    temperature: float = 1.0
    filters: dict[str, float] = field(default_factory=dict)
    spread: float = 2.0
    seed: int = 0
    certain: bool = False
    uniforms: bool = False
    packed: bool = False
    limited: bool = False
    greedy_rows: bool = True
    params: dict[str, Any] = field(default_factory=dict)
    block: int = 4096
    stats: Tensor | None = None  # of the draft steps

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        b, k, v = self.b, self.k, self.v
        vd = self.vd or v

        def normal(*shape: int) -> Tensor:
            return torch.from_numpy((rng.standard_normal(shape) * self.spread).astype(np.float32))

        self.target = normal(b, k + 1, v).to(self.dtype)
        near = self.target[:, :k, :vd].float() + 0.3 * normal(b, k, vd)
        self.draft = None if self.certain or self.rule not in WITH_DRAFT else near.to(self.dtype)
        ids = near.argmax(-1)
        drawn = (near + torch.from_numpy(rng.gumbel(size=near.shape))).argmax(-1)
        self.ids = torch.where(torch.from_numpy(rng.random((b, k)) < 0.5), ids, drawn)
        self.lens = torch.from_numpy(rng.integers(0, k + 1, b).astype(np.int32))
        self.lens[0] = k
        self.temperatures = torch.full((b,), self.temperature)
        if self.greedy_rows and b > 2:
            self.temperatures[2] = 0
        self.seeds = torch.from_numpy(rng.integers(-(2**62), 2**62, b))
        self.positions = torch.from_numpy(rng.integers(0, 2**31, b))
        words = rng.integers(0, 2**32, (b, k + 1, 2), dtype=np.uint64).astype(np.uint32)
        self.words = torch.from_numpy(words) if self.uniforms else None
        self.remaining = None
        if self.limited:
            self.remaining = torch.from_numpy(rng.integers(0, k + 3, b).astype(np.int32))
        self.state = torch.from_numpy(rng.integers(0, 2, b).astype(np.uint8))
        self.given = torch.from_numpy(rng.integers(0, k + 1, b).astype(np.int32))
        self.word_start = torch.from_numpy(rng.random(v) < 0.5)
        self.cu = None
        if self.packed:
            self.cu = torch.zeros(b + 1, dtype=torch.int32)
            self.cu[1:] = (self.lens + 1).cumsum(0)

    def warp(self) -> Warp:
        types = {"top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32}
        filters = {
            name: torch.full((self.b,), value, dtype=types[name], device=DEVICE)
            for name, value in self.filters.items()
        }
        return Warp(self.temperatures.to(DEVICE), **filters)

    def run(self) -> Any:
        """The kernels' outputs."""
        target = self.target
        if self.packed:
            rows = [self.target[i, : int(n) + 1] for i, n in enumerate(self.lens)]
            target = torch.cat(rows)
        params = dict(self.params)
        if "retry" in params:
            params["retry"] = RETRIES.index(params["retry"])
        if self.rule == "relaxed" and "delta" in params:
            params["below_best"] = params.pop("delta")
        out = outputs(self.b, self.k + 1)
        kernels.verify(
            target.to(DEVICE),
            Drafts(
                self.ids.to(DEVICE), tuple(self.ids.shape), to_device(self.lens), to_device(self.cu)
            ),
            Rule(
                self.rule,
                given=to_device(self.given),
                word_start=to_device(self.word_start),
                **params,
            ),
            self.warp(),
            Words(to_device(self.seeds), to_device(self.positions), to_device(self.words)),
            out,
            draft=to_device(self.draft),
            draft_stats=self.stats,
            eos_ids=EOS,
            remaining=to_device(self.remaining),
            state=to_device(self.state),
            block=self.block,
        )
        return type(out)(**{name: t.cpu() for name, t in vars(out).items()})

    def law(self, row: Tensor, temperature: float, filters: dict[str, float]) -> Law:
        exact = {name: float(np.float32(value)) for name, value in filters.items()}
        if "top_k" in exact:
            exact["top_k"] = int(exact["top_k"])
        return laws.law(wide(row, self.v), temperature, **exact)

    def expected(self, i: int) -> tuple[Any, ...]:
        """(accepted, tokens, sources, finished, state) of row i."""
        k, rule, params = int(self.lens[i]), self.rule, dict(self.params)
        temperature, filters = self.temperature, self.filters
        if self.temperatures[i] == 0:
            rule, params, temperature, filters = "greedy", {}, 1.0, {}
        if self.rule == "scripted":
            rule, params = "scripted", {"given": int(self.given[i])}
        if rule == "nudge":
            params["word_start"] = self.word_start.numpy()
        warped = [self.law(row, temperature, filters) for row in self.target[i, : k + 1]]
        target = warped
        if rule == "rsd" and not params.pop("warped", False):
            target = [self.law(row, 1.0, {}) for row in self.target[i, : k + 1]]
            params["student"] = warped
        proposals = None
        if self.draft is not None and rule in WITH_DRAFT:
            proposals = [self.law(row, temperature, filters) for row in self.draft[i, :k]]
        row = Row(
            target,
            self.ids[i, :k].tolist(),
            proposals,
            int(self.seeds[i]),
            int(self.positions[i]),
            None if self.words is None else self.words[i].numpy(),
            int(self.state[i]),
        )
        limit = None if self.remaining is None else int(self.remaining[i])
        out = rules.verify(row, rule, EOS, limit, **params)
        state = out.state if rule == "nudge" else int(self.state[i])
        return (out.accepted, [int(t) for t in out.tokens], out.sources, out.finished, state)

    def check(self) -> None:
        out = self.run()
        assert not out.row_error.any()
        flat: list[int] = []
        for i in range(self.b):
            n = int(out.num_emitted[i])
            tokens = out.tokens[i].tolist()
            found = (
                *(int(out.accept_len[i]), tokens[:n], out.source[i, :n].tolist()),
                *(int(out.finished[i]), int(out.state[i])),
            )
            accepted, *_ = expected = self.expected(i)
            assert found == expected, (i, self)
            assert tokens[n:] == [-1] * (self.k + 1 - n)
            assert not out.source[i, n:].any()
            assert int(out.next_token[i]) == (tokens[accepted] if n > accepted else -1)
            flat += tokens[:n]
            assert int(out.cu_emitted[i + 1]) == len(flat)
        assert out.cu_emitted[0] == 0
        assert out.flat.tolist() == flat + [-1] * (out.flat.numel() - len(flat))
