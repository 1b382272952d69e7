"""Compiles the Triton kernels for GPUs that need not be there; run as a program.

Kernels are found by calling the launchers with CPU tensors; instead of being launched they are
compiled, once per signature. Prints what a test looks at, as JSON.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import KernelInterface

from alignops.triton_kernels import (
    speculative,
    speculative_chains,
    speculative_decide,
    speculative_draw,
    speculative_rows,
    speculative_rsd,
    speculative_stats,
    speculative_trees,
)
from alignops.triton_kernels.speculative_launch import DESCEND, Drafts, Rule, Warp, Words
from tests.speculative.triton_batches import outputs

MODULES = [
    speculative_chains,
    speculative_decide,
    speculative_draw,
    speculative_rows,
    speculative_rsd,
    speculative_stats,
    speculative_trees,
]
TYPICAL = speculative_chains.RULES.index("typical")
TARGETS = [80, 90]
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint32: "*u32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


class Recorder:
    """Stands for a kernel: a launch compiles it."""

    def __init__(self, kernel: KernelInterface[Any], found: list[dict[str, Any]]):
        self.kernel, self.found = kernel, found
        self.seen: set[str] = set()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        assert options["enable_fp_fusion"] is False
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        for i, parameter in enumerate(self.kernel.params):
            value = args[i] if i < len(args) else kwargs[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name] = "constexpr"
                constants[(i,)] = value
            else:
                signature[parameter.name] = type_of(value)
                if isinstance(value, torch.Tensor):
                    attributes[(i,)] = [["tt.divisibility", 16]]
        key = str((signature, constants))
        names = [parameter.name for parameter in self.kernel.params]
        if key in self.seen:
            return
        self.seen.add(key)
        for target in TARGETS:
            source = ASTSource(self.kernel, signature, constants, attributes)
            compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
            ptx = compiled.asm["ptx"]
            rule = {**dict(zip(names, args, strict=False)), **kwargs}.get("RULE")
            self.found.append(
                {
                    "kernel": self.kernel.__name__,
                    "target": target,
                    "typical": rule == TYPICAL or self.kernel.__name__ == "entropy_kernel",
                    "fused32": len(re.findall(r"\bfma\.\S*f32", ptx)),
                    "fused64": len(re.findall(r"\bfma\.\S*f64", ptx)),
                    "products": len(re.findall(r"\bmul\.(?:rn\.)?f32", ptx)),
                    "loose": len(
                        re.findall(r"\b(?:div|rcp|ex2|lg2)\.(?:full|approx)|\.ftz\b", ptx)
                    ),
                    "stack": stack_bytes(compiled.asm["cubin"]),
                    "cubin": len(compiled.asm["cubin"]),
                }
            )


def stack_bytes(cubin: bytes) -> int:
    """Bytes of local memory of a thread: spilled registers, arrays that are indexed."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


def kernels_of(module: ModuleType) -> dict[str, KernelInterface[Any]]:
    """Kernels that a module defines."""
    return {
        name: kernel
        for name, kernel in vars(module).items()
        if name.endswith("_kernel") and isinstance(kernel, KernelInterface)
    }


def names() -> list[str]:
    """All kernels."""
    return [name for module in MODULES for name in kernels_of(module)]


@contextmanager
def recorded() -> Iterator[list[dict[str, Any]]]:
    """Within, launches compile."""
    found: list[dict[str, Any]] = []
    kernels = {(module, name): k for module in MODULES for name, k in kernels_of(module).items()}
    for (module, name), kernel in kernels.items():
        setattr(module, name, Recorder(kernel, found))
    try:
        yield found
    finally:
        for (module, name), kernel in kernels.items():
            setattr(module, name, kernel)


def launch_all() -> None:
    """Every launcher, with what changes the code of its kernels."""
    b, k, v = 4, 3, 9000
    numbers, reals = torch.zeros(b, dtype=torch.int32), torch.ones(b)
    ids, tokens = (torch.zeros(b, n, dtype=torch.int64) for n in (k, k + 1))
    seeds = torch.zeros(b, dtype=torch.int64)
    words = Words(seeds, seeds)
    given = Words(seeds, seeds, torch.zeros(b, k + 1, 2, dtype=torch.uint32))
    plain, cut = Warp(reals), Warp(reals, numbers, reals, reals)
    logits = torch.zeros(b, k + 1, v, dtype=torch.bfloat16)
    drafter = logits[:, :k]
    live = torch.ones(b, dtype=torch.bool)
    state = torch.zeros(b, dtype=torch.uint8)
    starts = torch.ones(v, dtype=torch.bool)
    out = outputs(b, k + 1)
    chain, whole = Drafts(ids, (b, k), numbers, None, live), Drafts(ids, (b, k))
    packed = Drafts(ids, (b, k), None, numbers.new_zeros(b + 1))
    rows, probabilities = torch.rand(2 * b, v), torch.rand(b, k, v)
    more: dict[str, Any] = {"eos_ids": (3, 7), "remaining": numbers, "state": state}
    for name in speculative_chains.RULES:
        rule = Rule(name, given=numbers, word_start=starts)
        warp = cut if name == "lossless" else plain
        speculative.verify(logits, chain, rule, warp, words, out, draft=drafter, **more)
    descend = Rule("rsd", retry=DESCEND, warped=True)
    speculative.verify(rows, packed, descend, plain, given, out, draft=probabilities, is_probs=True)
    stats = torch.zeros(b, k, 6, dtype=torch.int64)
    lossless = Rule("lossless")
    speculative.verify(logits, whole, lossless, plain, words, out, draft=drafter, draft_stats=stats)
    for race in (False, True):
        speculative.propose(logits[:, 0], words, cut, seeds, stats[:, 0], state, race=race)
    path = torch.zeros(b, k + 1, dtype=torch.int32)
    for tree in range(3):
        speculative.verify_tree(
            *(logits, tokens, tokens, tree, plain, words, path, out),
            draft=logits if tree == 2 else None,
            eos_ids=(3,),
            active=live,
        )


if __name__ == "__main__":
    with recorded() as found:
        launch_all()
    json.dump(found, sys.stdout)
