"""The `alignops` command."""

import subprocess
import sys
from pathlib import Path

import pytest

from alignops import testing

COMMAND = [sys.executable, "-c", "from alignops.__main__ import command; command()"]


def alignops(*arguments: str | Path, ok: bool = True) -> str:
    result = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)
    assert (result.returncode == 0) == ok, result.stderr
    return result.stdout + result.stderr


def test_info_names_the_instruction_set_in_use() -> None:
    assert f"{testing.active_isa()} (available: " in alignops("info")


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ((), "convert"),
        (("demo",), "arenas"),
        (("demo", "ternary"), "SmolLM2"),
        (("demo", "arenas"), "--minutes"),
        (("bench", "ternary"), "--quick"),
        (("demo", "speculative"), "--exit-layer"),
        (("bench", "spans"), "--tokens"),
        (("bench", "speculative"), "--quick"),
        (("demo", "hogwild"), "--forwards"),
        (("bench", "attention"), "--quick"),
    ],
)
def test_help_of_every_command(command: tuple[str, ...], word: str) -> None:
    assert word in alignops(*command, "--help")


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra [hf]")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=8,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    words = tokenizers.models.WordLevel({"a": 0}, unk_token="a")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words))
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_convert_writes_a_model_that_loads(small_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from alignops.integrations import hf  # noqa: F401  (registers the format)
    from alignops.ternary import Int8Linear, TernaryLinear

    report = alignops("convert", small_model, tmp_path / "ternary", "--head", "int8", "--fuse")
    assert "model.layers.*.mlp.down_proj" in report
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ternary")
    assert isinstance(model.model.layers[0].mlp.down_proj, TernaryLinear)
    assert isinstance(model.lm_head, Int8Linear)


def test_wrong_option_is_one_line(small_model: Path, tmp_path: Path) -> None:
    output = alignops("convert", small_model, tmp_path / "out", "--head", "int4", ok=False)
    assert "alignops: convert: head must be" in output
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()
