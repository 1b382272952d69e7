"""llama.cpp as a whole decoder, through the shared library of `llama-cpp-python`.

Only `llama_decode` and an argmax over the logits stand in the timed loop, so Python costs llama.cpp
next to nothing.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from types import ModuleType

import numpy as np

FILE_TYPES = {"Q4_0": 2, "TQ1_0": 36, "TQ2_0": 37, "Q8_0": 7}


def _library() -> ModuleType:
    import llama_cpp

    global _silence
    _silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(_silence, ctypes.c_void_p(None))
    return llama_cpp


def requantize(source: Path, target: Path, kind: str, threads: int) -> Path:
    """Writes `source` as a GGUF of file type `kind`, unless `target` exists already.

    Tensors whose rows do not fit the blocks of `kind` (256 columns for TQ1_0 and TQ2_0) get
    llama.cpp's own fallback.
    """
    if target.exists():
        return target
    lib = _library()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".part")
    parameters = lib.llama_model_quantize_default_params()
    parameters.nthread, parameters.ftype = threads, FILE_TYPES[kind]
    parameters.allow_requantize = True
    status = lib.llama_model_quantize(
        str(source).encode(), str(temporary).encode(), ctypes.byref(parameters)
    )
    if status != 0:
        raise RuntimeError(f"llama.cpp did not quantize {source.name} to {kind}: status {status}")
    temporary.replace(target)
    return target


class LlamaDecoder:
    """Greedy decoding of one sequence with a GGUF model."""

    def __init__(self, path: Path, threads: int, context: int = 512) -> None:
        self._lib = lib = _library()
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(
            str(path).encode(), lib.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = context
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = lib.llama_init_from_model(self._model, parameters)
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def _next(self, tokens: list[int]) -> int:
        array = (self._lib.llama_token * len(tokens))(*tokens)
        batch = self._lib.llama_batch_get_one(array, len(tokens))
        if self._lib.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())

    def generate(self, prompt: list[int], new_tokens: int) -> tuple[list[int], float]:
        """Returns the tokens after `prompt`, and seconds per token of all but the first."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        tokens = [self._next(prompt)]
        start = time.perf_counter()
        while len(tokens) < new_tokens:
            tokens.append(self._next(tokens[-1:]))
        return tokens, (time.perf_counter() - start) / (new_tokens - 1)

    def close(self) -> None:
        """Frees the model and its context."""
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)
