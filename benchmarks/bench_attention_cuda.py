"""Times concurrent attention on a GPU: against torch, and as shares of what the memory allows.

    python -m benchmarks.bench_attention_cuda [--out FOLDER] [--seconds N]

One new token per worker, layouts of `attention_layouts`, bfloat16. Layers rotate: their keys and
values are up to 512 MiB in total, more than any L2 cache; one pass over the layers is one CUDA
graph, `eager` the same pass launched from Python. The floor is bytes / bandwidth, every distinct
key and value once. Peers, with the flash operator of torch and a merge by logsumexp:

dense      copies of all keys and values for each worker, rotated before; query heads that share a
           head of keys are folded into the query axis
per pair   a call per (worker, segment): every worker reads what it sees
per block  a call per segment, queries of all workers that see it folded into the query axis

Peers find their queries rotated; ours rotates them itself. Writes
<out>/attention-<device>-<date>.json and prints a table. Does nothing without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alignops.attention import RopeSpec
from alignops.attention.plan import Plan
from alignops.attention.pool import KVPool
from alignops.attention.workspace import Workspace
from benchmarks.attention_layouts import Layout
from benchmarks.attention_layouts import make as make_layout
from benchmarks.bench_ternary_cuda import RING_BYTES, environment, limits, per_call
from benchmarks.shapes import ATTENTION, AttentionShape

SHAPES = ("QwQ-32B", "LLaMA-3-8B", "Qwen2.5-0.5B")
TOKENS = (16384, 4096, 1024, 65536)
WORKERS = (1, 2, 4, 8)
PATTERNS = ("headers", "1 segment", "64 segments")
PAGE_SIZE = 32
MOST_LAYERS, MOST_CALLS = 32, 128  # what a graph can hold in reasonable time
_op = torch.ops.alignops


class Case:
    """A step over a layout, in `layers` copies."""

    def __init__(
        self,
        shape: AttentionShape,
        layout: Layout,
        layers: int,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.shape, self.layout, self.layers = shape, layout, layers
        self.spec = RopeSpec.default(shape.head_size, 1e6)
        pages = sum(-(-n // PAGE_SIZE) + 1 for block in layout.blocks for n in block)
        self.pool = KVPool(
            *(layers, shape.kv_heads, shape.head_size),
            **{"dtype": dtype, "device": device, "page_size": PAGE_SIZE, "num_pages": pages},
            rope=self.spec,
        )
        for t in (*self.pool.k, *self.pool.v):
            t.normal_()
        self.plan = self._plan()
        self.tables = self.plan.decode()
        size = (layout.workers, shape.heads, shape.head_size)
        self.q = torch.randn(size, device=device).to(dtype)
        self.out = torch.empty_like(self.q)
        self.scratch = self.plan.scratch(shape.heads, shape.kv_heads, shape.head_size, False)
        self.bytes = 2 * layout.tokens * shape.kv_heads * shape.head_size * dtype.itemsize

    def _plan(self) -> Plan:
        """Blocks are filled without the last token of each worker, which the step writes."""
        ws = Workspace(self.pool)
        own = {view[-1] for view in self.layout.views}
        blocks = []
        for b, pieces in enumerate(self.layout.blocks):
            block = ws.new_block()
            for n in pieces:
                part = ws.new_block()
                ws.commit(ws.plan([n - (b in own)], views=[[part]]))
                ws.move(part, block, mode="splice", max_segments=1 << 20)
            blocks.append(block)
        views = [[blocks[b] for b in view] for view in self.layout.views]
        return ws.plan([1] * self.layout.workers, views=views)

    def ours(self, layer: int) -> Tensor:
        """(W, Hq, D)"""
        _op.attention_concurrent_(
            *(self.q, self.pool.k[layer], self.pool.v[layer], self.plan.data, None, 0, 0, False),
            *(self.shape.head_size**-0.5, 0.0, 0, self.out, None, None, self.scratch),
        )
        return self.out

    # What peers read

    def readers(self, segment: int) -> list[int]:
        """Workers that see a segment."""
        return [w for w, pair in enumerate(self.tables["pair"][segment]) if pair["state"] > 0]

    def keys(self, layer: int, segment: int) -> tuple[Tensor, Tensor]:
        """Stored keys and values of a segment: (1, Hkv, n, D)."""
        entry = self.tables["segment"][segment]
        place = torch.arange(int(entry["n"])) + int(entry["first"])
        page = torch.from_numpy(self.tables["page"])[int(entry["page"]) + place // PAGE_SIZE]
        sides = (self.pool.k[layer], self.pool.v[layer])
        device = self.q.device
        page, place = page.to(device), (place % PAGE_SIZE).to(device)
        return tuple(t[page, :, place].transpose(0, 1).contiguous()[None] for t in sides)  # type: ignore[return-value]

    def turned(self, x: Tensor, positions: int) -> Tensor:
        """(..., D) rotated, in its dtype."""
        at = torch.tensor(positions, device=x.device)
        return self.spec.rotate(x.float(), at).to(x.dtype)

    def query(self, worker: int, segment: int) -> Tensor:
        """As the keys of a segment meet it: (1, Hkv, g, D)."""
        delta = int(self.tables["pair"][segment][worker]["delta0"])
        return self.turned(self.q[worker], delta).unflatten(0, (self.shape.kv_heads, -1))[None]

    @cached_property
    def segments(self) -> range:
        return range(self.tables["segments"])


def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Result and logsumexp of the operator of torch for the device."""
    if q.is_cuda:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, lse


def per_segment(case: Case, folded: bool) -> Callable[[int], Tensor]:
    """Calls for segments, for all workers at once or for each; results by layer, (W, Hq, D)."""
    layers = [[case.keys(layer, s) for s in case.segments] for layer in range(case.layers)]
    workers, kv_heads = case.layout.workers, case.shape.kv_heads
    calls = []
    for s in case.segments:
        readers = case.readers(s)
        for group in [readers] if folded else [[w] for w in readers]:
            queries = torch.cat([case.query(w, s) for w in group], 2)
            calls.append((s, torch.tensor(group, device=case.q.device), queries))
    size = (len(calls), kv_heads, workers, case.shape.group)
    results = torch.zeros(*size, case.shape.head_size, dtype=case.q.dtype, device=case.q.device)
    sums = torch.full(size, -torch.inf, device=case.q.device)

    def run(layer: int) -> Tensor:
        for i, (s, group, queries) in enumerate(calls):
            out, lse = flash(queries, *layers[layer][s])
            results[i].index_copy_(1, group, out[0].unflatten(1, (len(group), -1)))
            sums[i].index_copy_(1, group, lse[0].unflatten(1, (len(group), -1)))
        weights = torch.softmax(sums, 0).to(results.dtype)
        merged = (weights[..., None] * results).sum(0)
        return merged.transpose(0, 1).flatten(1, 2)

    return run


def dense(case: Case) -> Callable[[int], Tensor]:
    """A call for all workers over copies at their positions."""
    positions = case.plan.first_positions
    workers = range(case.layout.workers)

    def copy(layer: int, worker: int) -> tuple[Tensor, Tensor]:
        keys, values = [], []
        for s in case.segments:
            if worker in case.readers(s):
                k, v = case.keys(layer, s)
                delta = int(case.tables["pair"][s][worker]["delta0"])
                keys.append(case.turned(k, positions[worker] - delta))
                values.append(v)
        return torch.cat(keys, 2), torch.cat(values, 2)

    layers = [
        [torch.cat(side) for side in zip(*(copy(layer, w) for w in workers), strict=True)]
        for layer in range(case.layers)
    ]
    turned = [case.turned(case.q[w], positions[w]) for w in workers]
    queries = torch.stack(turned).unflatten(1, (case.shape.kv_heads, -1))

    def run(layer: int) -> Tensor:
        return F.scaled_dot_product_attention(queries, *layers[layer]).flatten(1, 2)

    return run


def contestants(case: Case) -> dict[str, Callable[[int], Tensor]]:
    """Ours first. Dense copies are a batch: views must be equally long."""
    found = {"ours": case.ours, "per block": per_segment(case, True)}
    if sum(len(case.readers(s)) for s in case.segments) <= MOST_CALLS:
        found["per pair"] = per_segment(case, False)
    lengths = {sum(sum(case.layout.blocks[b]) for b in view) for view in case.layout.views}
    if len(lengths) == 1:
        found["dense"] = dense(case)
    return found


def check(case: Case, found: dict[str, Callable[[int], Tensor]]) -> None:
    """Raises unless all compute the same."""
    expected = found["ours"](0).float().clone()
    for name, run in found.items():
        difference = float((run(0).float() - expected).norm() / expected.norm())
        if not difference <= 2e-2:
            raise AssertionError(f"{case.layout.name}: {name} differs by {difference:.1e}")


def bench(report: list[dict[str, Any]], bandwidth: float, case: Case) -> None:
    """All contestants of one case."""
    runs = contestants(case)
    check(case, runs)
    for name, run in runs.items():
        calls = [partial(run, layer) for layer in range(case.layers)]
        seconds, eager = per_call(calls)
        floor = case.bytes / bandwidth
        row = {
            "what": name,
            "shape": case.shape.name,
            "layout": case.layout.name,
            "tokens": case.layout.tokens,
            "workers": case.layout.workers,
            "seconds": seconds,
            "eager_seconds": eager,
            "floor_seconds": floor,
            "ratio": floor / seconds,
        }
        report.append(row)
        print(
            f"{case.shape.name:<13} S={case.layout.tokens:<6} {case.layout.name:<12} "
            f"W={case.layout.workers} {name:<10} {seconds * 1e6:9.1f} us  eager "
            f"{eager * 1e6:9.1f} us  floor {floor * 1e6:7.1f} us  {floor / seconds:6.1%}"
        )


def main() -> None:
    """Run every case that the time allows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seconds", type=float, default=60, help="stop after about this long")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing to measure")
        return
    torch.manual_seed(0)
    begin = time.perf_counter()
    rates = limits()
    report: list[dict[str, Any]] = []
    for tokens, pattern, name, workers in itertools.product(TOKENS, PATTERNS, SHAPES, WORKERS):
        if time.perf_counter() - begin > options.seconds:
            break
        shape, layout = ATTENTION[name], make_layout(pattern, tokens, workers)
        layer_bytes = 4 * layout.tokens * shape.kv_heads * shape.head_size
        layers = min(max(2, RING_BYTES // layer_bytes), MOST_LAYERS)
        bench(report, rates.bandwidth, Case(shape, layout, layers))
        torch.cuda.empty_cache()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    device = torch.cuda.get_device_name().lower().replace(" ", "-")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"attention-{device}-{today}.json"
    result = {"date": today, **environment(), "results": report}
    result["bandwidth_bytes_per_second"] = rates.bandwidth
    path.write_text(json.dumps(result, indent=1))
    print(path)


if __name__ == "__main__":
    main()
