"""`alignops demo hogwild` on a small random model."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra [demo]")
pytest.importorskip("rich", reason="needs the extra [demo]")

from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from alignops.attention.workers import Piece, Step
from alignops.demo import hogwild
from alignops.demo._hogwild_view import View
from alignops.testing import ByteTokenizer


@pytest.fixture(autouse=True)
def _small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ByteTokenizer(["\n\n", ".\n\n"])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16384,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    monkeypatch.setattr(hogwild, "load_smollm2", lambda: (model, tokenizer))


def test_it_shows_proves_and_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    figures = hogwild.run([1, 2], 12, 1, threads=1, json_path=path)
    assert json.loads(path.read_text()) == figures
    assert figures["proof"]["sampled"] == 12
    assert figures["proof"]["different"] == 0
    assert [speed["workers"] for speed in figures["speed"]] == [1, 2]
    assert all(speed["against_one"] > 0 for speed in figures["speed"])
    mass = figures["mass"]["2"]
    assert set(mass) == {"Ada", "Ben"}
    assert {"common", "Ada", "Ben"} <= set(mass["Ada"])
    printed = capsys.readouterr().out
    assert "does not collaborate" in printed
    assert "Ben is writing" in printed
    assert "\u2026 \u2502" not in printed  # tables fit into 80 columns


def test_a_token_that_differs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = hogwild.Plain.feed

    def wrong(self: Any, ids: Any) -> int:
        self.next = honest(self, ids) ^ 1
        return self.next

    monkeypatch.setattr(hogwild.Plain, "feed", wrong)
    with pytest.raises(RuntimeError, match="one worker differs from plain decoding"):
        hogwild.run([1], 4, 1)


@pytest.mark.parametrize(
    "wrong", [{"workers": []}, {"workers": [0]}, {"forwards": 0}, {"rounds": 0}]
)
def test_arguments_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="workers, forwards and rounds must be at least 1"):
        hogwild.run(**wrong)
    with pytest.raises(ValueError, match="layout must be one of contiguous, interleaved, combined"):
        hogwild.run(layout="stack")


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_terminal_gets_a_box_for_each_worker(workers: int) -> None:
    names = ["Ada", "Ben", "Cleo", "Dev"][:workers]
    console = Console(file=io.StringIO(), width=80, force_terminal=True, record=True)
    view = View(console, names)
    with view:
        for name in names:
            view.stream(Piece(name, 1, f"I am {name} and write " + "words " * 60, (1,), False))
        view.on_step(Step(names[-1], 1, "It is\nfinished. " + "x" * 90, (1,), 0.5, 3))
        view.stream(Piece(names[-1], 2, "Next.", (1,), False))
    lines = console.export_text().splitlines()[-(10 * ((workers + 1) // 2) + 3) :]
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "finished steps: 1" in text
    assert f"{names[-1]} 1  It is finished. xxx" in text
    assert f"{names[-1]}, step 2" in text
    assert "Next." in text
    assert f"I am {names[-1]}" not in text
    if workers > 1:
        assert lines[0].count("\u256d") == 2  # two columns


def test_no_terminal_gets_lines() -> None:
    console = Console(file=io.StringIO(), width=40, force_terminal=False)
    view = View(console, ["Ada", "Ben"])
    with view:
        view.stream(Piece("Ada", 1, "a", (1,), False))
        view.on_step(Step("Ada", 1, "A long line " * 9, (1,), 0.5, 3))
    assert console.file.getvalue().count("\n") == 1  # type: ignore[attr-defined]
