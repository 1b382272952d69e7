"""`alignops demo trace` on a small random model and a few files."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra [demo]")
pytest.importorskip("rich", reason="needs the extra [demo]")

from rich.console import Console

from alignops.demo import trace
from alignops.demo._procedures import invent

SCALE = trace.Scale(
    tokens=200_000, new_tokens=12, procedures=3, copies=2, chunks=40, beams=2, steps=2
)


@pytest.fixture(scope="module")
def machine() -> list[Path]:
    files = list(itertools.islice(trace.machine_files(), 150))
    assert {trace._role(file) for file in files} == {"index", "carrier", "held out"}
    return files


@pytest.fixture(scope="module")
def tokenizer(machine: list[Path]) -> Any:
    import tokenizers
    import transformers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train([str(file) for file in machine[:20]], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


@pytest.fixture(scope="module")
def model() -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def test_whole_demonstration(
    machine: list[Path],
    tokenizer: Any,
    model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trace, "machine_files", lambda: iter(machine))
    monkeypatch.setattr(trace, "load_smollm2", lambda: (model, tokenizer))
    monkeypatch.setattr(trace, "QUICK", SCALE)
    figures = trace.run(tmp_path, None, True, tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert figures["index"]["tokens"] >= SCALE.tokens
    drift, harmless = figures["drift"], figures["harmless"]
    assert drift["prompts"] == 2 * SCALE.procedures
    assert drift["prov_decode_refused"] == 0
    assert 0 < harmless["chunks"] <= SCALE.chunks
    assert harmless["with_allow"] <= harmless["without_allow"]
    page = (tmp_path / "report.html").read_text()
    assert "The Zen of Python" in page
    assert all(parameter.grad is None for parameter in model.model.embed_tokens.parameters())
    again = trace.run(tmp_path, None, True)
    assert again["index"]["seconds"] == 0


def test_held_out_text_is_in_no_index(machine: list[Path], tokenizer: Any, tmp_path: Path) -> None:
    demo = trace._Demonstration(Console(quiet=True), tmp_path, SCALE, SimpleNamespace(), tokenizer)
    index, _ = demo.machine_index(machine)
    sources = {index.document(d).meta["source"] for d in range(index.n_docs)}
    roles = {trace._role(file) for file in machine if str(file) in sources}
    assert roles == {"index"}


def test_procedures_are_told_only_by_their_own_steps() -> None:
    procedures = invent(12)
    for one in procedures:
        told = [other for other in procedures if other.told_by(one.sentence)]
        assert told == [one]
        assert not one.told_by(one.prompt)
        words = one.sentence.split()
        assert one.told_by(" ".join(words[: int(0.85 * len(words))]))
        assert not one.told_by(" ".join(words[: len(words) // 3]))


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        trace.run(tmp_path, 0)
