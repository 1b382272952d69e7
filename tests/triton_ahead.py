"""Compiles Triton kernels for GPUs that need not be there.

Kernels are found by calling their launchers with CPU tensors; instead of being launched they are
compiled, once per signature. This works in a process where kernels are not interpreted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import KernelInterface

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
ALIGNED = [["tt.divisibility", 16]]
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")

# What is noted of a compiled kernel: its arguments by name, and the result of triton.compile.
Look = Callable[[dict[str, Any], Any], dict[str, Any]]


def type_of(value: Any) -> str:
    """Of a parameter, as Triton writes it."""
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, bytes of its stack (spills, arrays that are indexed)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "registers": max(int(n) for n in re.findall(r"REG:(\d+)", usage)),
        "stack": sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
    }


class Recorder:
    """Stands for a kernel: a launch compiles it."""

    def __init__(self, kernel: KernelInterface[Any], look: Look, found: list[dict[str, Any]]):
        self.kernel, self.look, self.found = kernel, look, found
        self.seen: set[str] = set()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        signature: dict[str, Any] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        named: dict[str, Any] = {}
        for i, parameter in enumerate(self.kernel.params):
            value = args[i] if i < len(args) else kwargs[parameter.name]
            named[parameter.name] = value
            if parameter.is_constexpr or value is None:
                signature[parameter.name] = "constexpr"
                constants[(i,)] = value
                continue
            if isinstance(value, tuple):
                signature[parameter.name] = tuple(type_of(part) for part in value)
                for j in range(len(value)):
                    attributes[(i, j)] = ALIGNED
                continue
            signature[parameter.name] = type_of(value)
            aligned = isinstance(value, torch.Tensor)
            if isinstance(value, int) and not parameter.do_not_specialize:
                aligned = value % 16 == 0
            if aligned:
                attributes[(i,)] = ALIGNED
        key = str((signature, constants, attributes, options))
        if key in self.seen:
            return
        self.seen.add(key)
        for target in TARGETS:
            source = ASTSource(self.kernel, signature, constants, attributes)
            compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
            self.found.append(
                {
                    "kernel": self.kernel.__name__,
                    "target": target,
                    "cubin": len(compiled.asm["cubin"]),
                    **resources(compiled.asm["cubin"]),
                    **self.look(named | options, compiled),
                }
            )


def kernels_of(module: ModuleType) -> dict[str, KernelInterface[Any]]:
    """Kernels that a module defines."""
    return {
        name: kernel
        for name, kernel in vars(module).items()
        if name.endswith("_kernel") and isinstance(kernel, KernelInterface)
    }


@contextmanager
def recorded(modules: Sequence[ModuleType], look: Look) -> Iterator[list[dict[str, Any]]]:
    """Within, launches of kernels that are names in `modules` compile."""
    found: list[dict[str, Any]] = []
    kernels = {(module, name): k for module in modules for name, k in kernels_of(module).items()}
    for (module, name), kernel in kernels.items():
        setattr(module, name, Recorder(kernel, look, found))
    try:
        yield found
    finally:
        for (module, name), kernel in kernels.items():
            setattr(module, name, kernel)


def run(program: str) -> list[dict[str, Any]]:
    """What a module prints as JSON, in a process where kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    entries: list[dict[str, Any]] = json.loads(done.stdout)
    return entries
