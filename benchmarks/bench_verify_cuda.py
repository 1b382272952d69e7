"""Times verification on a GPU: against torch, and as shares of what the memory allows.

    python -m benchmarks.bench_verify_cuda [--out FOLDER] [--seconds N]

Logits rotate through copies of 512 MiB in total; one pass over them is one CUDA graph, `eager` the
same pass launched from Python. The floor is bytes / bandwidth: all rows of the target once, and one
more row of target and drafter for each sequence that draws. `torch` is what users write for the
rule lossless: softmax of both, gather, compare, residual, multinomial.

Writes <out>/verify-<device>-<date>.json and prints a table. Does nothing without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignops import speculative
from benchmarks.bench_ternary_cuda import RING_BYTES, environment, limits, per_call

# Sequences, drafts, ids: large batch of the 128k vocabulary, small one of Qwen3's.
SHAPES = ((1, 5, 151_936), (8, 5, 151_936), (32, 8, 128_256))
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"rule": "greedy"},
    "lossless": {"rule": "lossless"},
    "lossless, T = 0.7, top-p 0.95": {"rule": "lossless", "temperature": 0.7, "top_p": 0.95},
    "lossless, top-k 50": {"rule": "lossless", "top_k": 50},
    "block": {"rule": "block"},
    "coupled": {"rule": "coupled"},
    "typical": {"rule": "typical"},
    "relaxed": {"rule": "relaxed"},
}


def make_round(b: int, k: int, v: int) -> dict[str, Tensor]:
    """Logits whose drafts are accepted about as often as a good drafter's."""
    target = torch.randn(b, k + 1, v, device="cuda").mul_(4).bfloat16()
    draft = (target[:, :k].float() + torch.randn(b, k, v, device="cuda")).bfloat16()
    return {
        "target": target,
        "draft_ids": draft.argmax(-1),
        "draft": draft,
        "seeds": torch.arange(b, device="cuda"),
        "positions": torch.arange(b, device="cuda"),
    }


def with_torch(target: Tensor, draft_ids: Tensor, draft: Tensor) -> tuple[Tensor, Tensor]:
    """The rule lossless as it is written with torch: accepted drafts, the token behind them."""
    b, k = draft_ids.shape
    p, q = target.float().softmax(-1), draft.float().softmax(-1)
    at = draft_ids.unsqueeze(-1)
    passed = torch.rand(b, k, 1, device=p.device) * q.gather(-1, at) < p[:, :k].gather(-1, at)
    accepted = passed.squeeze(-1).long().cumprod(-1).sum(-1)
    rows = torch.arange(b, device=p.device)
    rest = p[rows, accepted].clone()
    other = q[rows, accepted.clamp(max=k - 1)] * (accepted < k).unsqueeze(-1)
    return accepted, torch.multinomial((rest - other).clamp(min=0), 1)


def bench(report: list[dict[str, Any]], bandwidth: float, shape: tuple[int, int, int]) -> None:
    """All cases of one shape."""
    b, k, v = shape
    copies = max(2, RING_BYTES // (b * (2 * k + 1) * v * 2))
    ring = [make_round(b, k, v) for _ in range(copies)]

    def verify(round_: dict[str, Tensor], **options: Any) -> object:
        draft = round_["draft"] if options["rule"] in ("lossless", "block") else None
        return speculative.verify(**{**round_, "draft": draft}, **options)

    runs: dict[str, list[Callable[[], object]]] = {
        name: [partial(verify, r, **options) for r in ring] for name, options in CASES.items()
    }
    names = ("target", "draft_ids", "draft")
    runs["torch"] = [partial(with_torch, *(r[name] for name in names)) for r in ring]
    for name, calls in runs.items():
        seconds, eager = per_call(calls)
        rows = b * (k + 1)
        if name.startswith(("lossless", "torch")):
            rows += 2 * b
        floor = rows * v * 2 / bandwidth
        report.append(
            {
                "what": name,
                "shape": {"b": b, "k": k, "v": v},
                "seconds": seconds,
                "eager_seconds": eager,
                "floor_seconds": floor,
                "ratio": floor / seconds,
            }
        )
        print(
            f"B={b:<3} K={k} V={v:<7} {name:<30} {seconds * 1e6:9.1f} us  eager "
            f"{eager * 1e6:9.1f} us  floor {floor * 1e6:7.1f} us  {floor / seconds:6.1%}"
        )


def main() -> None:
    """Run every shape that the time allows."""
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
    for shape in SHAPES:
        if time.perf_counter() - begin < options.seconds:
            bench(report, rates.bandwidth, shape)
            torch.cuda.empty_cache()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    device = torch.cuda.get_device_name().lower().replace(" ", "-")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"verify-{device}-{today}.json"
    result = {"date": today, **environment(), "results": report}
    result["bandwidth_bytes_per_second"] = rates.bandwidth
    path.write_text(json.dumps(result, indent=1))
    print(path)


if __name__ == "__main__":
    main()
