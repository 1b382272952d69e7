"""The GPU code where there is no GPU: the CUDA library loads and checks, the kernels compile.

What the C++ kernels compute is tested by tests/cpp/*_cuda_test.cpp, which run them on the CPU, and
what the Triton kernels compute by tests/ternary/test_triton.py, interpreted.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import alignops

LIBRARY = Path(alignops.__file__).with_name("_cuda.so")

pytestmark = pytest.mark.slow

built = pytest.mark.skipif(not LIBRARY.exists(), reason="built without the CUDA library")


def run(code: str) -> str:
    """Output of a fresh process, in which Triton kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, text=True, capture_output=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


LOAD = f"""
import torch, alignops
from alignops import _native
if not _native.cuda_loaded:
    torch.ops.load_library({str(LIBRARY)!r})
"""


# What a step needs of the host: a plan's own words, and angles in float64.
ON_THE_HOST = {"alignops::attention_rotations", "alignops::attention_scratch"}


@built
def test_library_loads_and_registers() -> None:
    """Also beside a torch without CUDA, whose libtorch_cuda.so is not there."""
    output = run(
        LOAD
        + """
registered = torch._C._dispatch_has_kernel_for_dispatch_key
for name in torch._C._dispatch_get_all_op_names():
    if name.startswith("alignops::") and not registered(name, "CUDA"):
        print(name)
"""
    )
    assert set(output.split()) == ON_THE_HOST


@built
def test_library_checks_before_it_asks_for_a_gpu() -> None:
    output = run(
        LOAD
        + """
keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
weight = alignops.ternary.quantize(torch.randn(32, 128))
packed = torch.zeros(640, dtype=torch.uint8)
text = torch.zeros(3, dtype=torch.uint16)
calls = {
    "ternary_prepack": (weight.idx, weight.sign, 128, 3),
    "ternary_unpack": (packed, 32, 128, 2),
    "ternary_linear": (torch.randn(2, 64), packed, torch.zeros(1, 64), None, 32, 128, 48, 1, 0, 3),
    "spans_find": (text, text, packed, packed, packed),
    "speculative_kv_shift_": ([torch.zeros(2, 1, 3, 4)], packed, packed, packed, 2),
    "speculative_mask": (packed, 2, 5, 0, torch.float32, [0], *[None] * 6),
}
for name, args in calls.items():
    try:
        getattr(torch.ops.alignops, name).default.redispatch(keys, *args)
    except ValueError as error:
        print(error)
"""
    )
    lines = output.splitlines()
    assert lines[0] == "ternary_prepack: idx must be on a GPU, got another device"
    assert lines[1].startswith("ternary_unpack: layout must be 3 (CUDA)")
    assert lines[2].startswith("ternary_linear: group must be")
    assert lines[3:] == [
        "spans_find: text must be on a GPU, got another device",
        "speculative_kv_shift_: caches must be on a GPU, got another device",
        "speculative_mask: c must be on a GPU, got another device",
    ]


@built
def test_library_brings_its_own_cuda_runtime() -> None:
    symbols = subprocess.check_output(["nm", "-D", "--undefined-only", LIBRARY], text=True)
    assert not re.search(r"\b_?_?cuda", symbols)


TRITON = """
import re, sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton import language as tl
from alignops.triton_kernels import ternary, _tuning

def build(kernel, arch, types, constants, warps=4, stages=3):
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = [name for name in types if types[name].startswith("*") or name in ("ldx", "k")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constants, attributes)
    options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=False)
    ptx = compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]
    print(arch, kernel.fn.__name__, "tensor" if re.search("mma", ptx) else "scalar")

def linear(arch, x, act_groups, grouped, ternary_weight, config):
    weight = "*i32" if ternary_weight else "*i8"
    types = dict(x="*" + x, weight=weight, weight_scale="*fp32", y="*bf16")
    numbers = ("m", "n", "k", "ldx", "ld_scale", "group", "groups", "act_groups", "column_tiles")
    types |= {name: "i32" for name in numbers}
    constants = dict(bias=None, HAS_BIAS=False, TERNARY=ternary_weight, GROUPED=grouped)
    constants |= dict(INT8=act_groups > 0, DOT=tl.bfloat16)
    if act_groups:
        types["act_scale"] = "*fp32"
    else:
        constants["act_scale"] = None
    constants |= {key: config[key] for key in ("BM", "BN", "BK")}
    build(ternary.linear_kernel, arch, types, constants, config["num_warps"], config["num_stages"])

for arch in (80, 90):
    linear(arch, "bf16", 0, False, True, _tuning.rule(12, 2))
    linear(arch, "bf16", 0, True, True, _tuning.rule(512, 2))
    linear(arch, "i8", 1, False, True, _tuning.rule(512, 1))
    linear(arch, "fp32", 0, False, True, _tuning.rule(512, 4))
    linear(arch, "bf16", 0, False, False, _tuning.rule(512, 2))
    build(ternary.stage_kernel, arch,
          dict(x="*bf16", q="*i8", scale="*fp32", k="i32", ldx="i32", group="i32"),
          dict(STRIDE=16, BLOCK=1024))
    build(ternary.fake_quant_kernel, arch,
          dict(w="*bf16", lam="*fp32", out="*bf16", n="i32", k="i32", ld="i32", group="i32"),
          dict(STRIDE=1, ROWS=8))
"""


def test_triton_kernels_compile() -> None:
    """For sm_80 and sm_90, with tensor-core products; Triton's own assembler needs no GPU."""
    pytest.importorskip("triton", reason="triton is not installed")
    lines = run(TRITON).split("\n")
    for arch in ("80", "90"):
        assert lines.count(f"{arch} linear_kernel tensor") == 5
        assert f"{arch} stage_kernel scalar" in lines
        assert f"{arch} fake_quant_kernel scalar" in lines
