"""The alternatives a user has today, behind one interface: `prepare(...) -> Runner`.

* torch: `F.linear` in bfloat16, and dynamic int8 (`torch.ops.quantized.linear_dynamic`).
* llama.cpp, called through the shared library of the PyPI package `llama-cpp-python`:
  `ggml_mul_mat` on TQ1_0, TQ2_0 and Q4_0 weights, the latter also in its repacked buffer type. All
  copies of a cold ring stand in one graph, so that llama.cpp pays its thread start once per pass,
  as in a real decode step.

Every peer is compared with a float32 product of its own dequantized weights before it is timed.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.timing import Runner, ring_length

GGML_TYPES = {"Q4_0": 2, "TQ1_0": 34, "TQ2_0": 35}
GGML_BYTES_PER_256 = {"Q4_0": 144, "TQ1_0": 54, "TQ2_0": 66}


def torch_bf16(weight: torch.Tensor, m: int, cold: bool) -> Runner:
    """`F.linear` on bfloat16 copies of `weight` (n, k)."""
    base = weight.bfloat16()
    nbytes = base.numel() * 2
    ring = [base.clone() for _ in range(ring_length(nbytes, cold))]
    x = torch.randn(m, weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()

    def run() -> None:
        for w in ring:
            F.linear(x, w)

    return Runner("torch bf16", run, len(ring), nbytes)


def torch_int8(weight: torch.Tensor, m: int, cold: bool) -> Runner:
    """Dynamic int8: weights int8 per row, activations quantized per call."""
    n, k = weight.shape
    nbytes = n * k
    torch.backends.quantized.engine = "x86"
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the quantized dtypes are deprecated, not yet gone
        scale = (weight.abs().amax(1) / 127).double()
        zero = torch.zeros(n, dtype=torch.int64)
        q = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
        ring = [
            torch.ops.quantized.linear_prepack(q, None) for _ in range(ring_length(nbytes, cold))
        ]
    call = torch.ops.quantized.linear_dynamic
    _check("torch int8", call(x, ring[-1], False), x @ weight.T)

    def run() -> None:
        for packed in ring:
            call(x, packed, False)

    return Runner("torch int8 dynamic", run, len(ring), nbytes)


def _check(name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.03) -> None:
    error = ((got.float() - expected).norm() / expected.norm()).item()
    if not error < tolerance:
        raise RuntimeError(f"{name} is off by {error:.3f} (relative) from its own weights")


# --------------------------------------------------------------------------------------------------
# llama.cpp


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class _Ggml:
    """The few functions of ggml that a matrix product needs."""

    def __init__(self, folder: Path) -> None:
        base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        p, i64, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
        declarations = (
            (base, "ggml_log_set", None, (p, p)),
            (base, "ggml_init", p, (_InitParams,)),
            (base, "ggml_free", None, (p,)),
            (base, "ggml_tensor_overhead", size, ()),
            (base, "ggml_graph_overhead_custom", size, (size, ctypes.c_bool)),
            (base, "ggml_new_tensor_2d", p, (p, ctypes.c_int, i64, i64)),
            (base, "ggml_mul_mat", p, (p, p, p)),
            (base, "ggml_new_graph_custom", p, (p, size, ctypes.c_bool)),
            (base, "ggml_build_forward_expand", None, (p, p)),
            (base, "ggml_row_size", size, (ctypes.c_int, i64)),
            (base, "ggml_quantize_chunk", size, (ctypes.c_int, p, p, i64, i64, i64, p)),
            (base, "ggml_backend_alloc_ctx_tensors_from_buft", p, (p, p)),
            (base, "ggml_backend_cpu_buffer_type", p, ()),
            (base, "ggml_backend_buffer_free", None, (p,)),
            (base, "ggml_backend_buffer_set_usage", None, (p, ctypes.c_int)),
            (base, "ggml_backend_buft_name", ctypes.c_char_p, (p,)),
            (base, "ggml_backend_tensor_set", None, (p, p, size, size)),
            (base, "ggml_backend_tensor_get", None, (p, p, size, size)),
            (base, "ggml_backend_graph_compute", ctypes.c_int, (p, p)),
            (base, "ggml_backend_free", None, (p,)),
            (base, "ggml_backend_reg_get_proc_address", p, (p, ctypes.c_char_p)),
            (base, "ggml_backend_reg_dev_get", p, (p, size)),
            (cpu, "ggml_backend_cpu_init", p, ()),
            (cpu, "ggml_backend_cpu_reg", p, ()),
            (cpu, "ggml_backend_cpu_set_n_threads", None, (p, ctypes.c_int)),
        )
        for library, name, result, arguments in declarations:
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self._silence = ctypes.CFUNCTYPE(None, ctypes.c_int, p, p)(lambda *_: None)
        self.log_set(ctypes.cast(self._silence, p), None)

    def extra_buffer_types(self) -> dict[str, int]:
        """Buffer types that re-lay weights when they are set, by name."""
        register = self.backend_cpu_reg()
        address = self.backend_reg_get_proc_address(register, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return {}
        function = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
        found, types = function(self.backend_reg_dev_get(register, 0)), {}
        for i in range(64):
            if not found[i]:
                break
            types[self.backend_buft_name(found[i]).decode()] = found[i]
        return types


@functools.cache
def ggml() -> _Ggml | None:
    """llama.cpp's tensor library, or None where `llama-cpp-python` is not installed."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "lib"
    return _Ggml(folder) if (folder / "libggml-cpu.so").exists() else None


class GgmlLinear:
    """A ring of equal quantized weights and the graph that multiplies each with one input."""

    def __init__(
        self,
        weight: torch.Tensor,
        kind: str,
        m: int,
        threads: int,
        cold: bool,
        repack: bool = False,
    ) -> None:
        g = ggml()
        if g is None:
            raise RuntimeError("llama-cpp-python is not installed: pip install 'alignops[peers]'")
        self._g, self.n, self.k, self.m = g, *weight.shape, m
        number = GGML_TYPES[kind]
        row = g.row_size(number, self.k)
        self.weight_bytes = self.n * row
        self.calls = ring_length(self.weight_bytes, cold)
        self.name = f"llama.cpp {kind}" + (" repacked" if repack else "")
        buffer_type = g.backend_cpu_buffer_type()
        if repack:
            buffer_type = g.extra_buffer_types()["CPU_REPACK"]

        self.quantized = np.empty(self.weight_bytes, np.uint8)
        source = np.ascontiguousarray(weight.float().numpy())
        g.quantize_chunk(
            number, source.ctypes.data, self.quantized.ctypes.data, 0, self.n, self.k, None
        )

        def context(tensors: int, extra: int = 0) -> int:
            return g.init(_InitParams(g.tensor_overhead() * tensors + extra, None, True))

        self._weights_context = context(self.calls)
        weights = [
            g.new_tensor_2d(self._weights_context, number, self.k, self.n)
            for _ in range(self.calls)
        ]
        self._weights_buffer = g.backend_alloc_ctx_tensors_from_buft(
            self._weights_context, buffer_type
        )
        g.backend_buffer_set_usage(self._weights_buffer, 1)
        for tensor in weights:
            g.backend_tensor_set(tensor, self.quantized.ctypes.data, 0, self.weight_bytes)

        nodes = self.calls + 8
        self._context = context(nodes, g.graph_overhead_custom(nodes, False))
        self._x = g.new_tensor_2d(self._context, 0, self.k, m)
        outputs = [g.mul_mat(self._context, tensor, self._x) for tensor in weights]
        self._graph = g.new_graph_custom(self._context, nodes, False)
        for tensor in outputs:
            g.build_forward_expand(self._graph, tensor)
        self._y = outputs[-1]
        self._buffer = g.backend_alloc_ctx_tensors_from_buft(
            self._context, g.backend_cpu_buffer_type()
        )
        self._backend = g.backend_cpu_init()
        g.backend_cpu_set_n_threads(self._backend, threads)

    def run(self) -> None:
        """One pass over the ring."""
        if self._g.backend_graph_compute(self._backend, self._graph) != 0:
            raise RuntimeError(f"{self.name}: graph failed")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (m, k) float32 -> the last ring member's product, (m, n) float32."""
        source = np.ascontiguousarray(x.float().numpy())
        result = np.empty((self.m, self.n), np.float32)
        self._g.backend_tensor_set(self._x, source.ctypes.data, 0, source.nbytes)
        self.run()
        self._g.backend_tensor_get(self._y, result.ctypes.data, 0, result.nbytes)
        return torch.from_numpy(result)

    def runner(self) -> Runner:
        return Runner(self.name, self.run, self.calls, self.weight_bytes)

    def close(self) -> None:
        """Frees all that this object holds outside Python."""
        g = self._g
        g.backend_free(self._backend)
        for buffer in (self._buffer, self._weights_buffer):
            g.backend_buffer_free(buffer)
        for memory in (self._context, self._weights_context):
            g.free(memory)


def llama_cpp(
    weight: torch.Tensor, kind: str, m: int, threads: int, cold: bool, repack: bool = False
) -> GgmlLinear:
    """llama.cpp's product in format `kind`, checked against its own dequantized weights."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    linear = GgmlLinear(weight, kind, m, threads, cold, repack)
    own = dequantize(linear.quantized.reshape(linear.n, -1), GGMLQuantizationType(GGML_TYPES[kind]))
    x = torch.randn(m, linear.k, generator=torch.Generator().manual_seed(0))
    _check(linear.name, linear(x), x @ torch.from_numpy(own).T)
    return linear
