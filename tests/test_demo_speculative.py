"""`alignops demo speculative` on a small random model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra [demo]")
pytest.importorskip("rich", reason="needs the extra [demo]")

from transformers import LlamaConfig, LlamaForCausalLM

from alignops.demo import _common, speculative


@pytest.fixture(autouse=True)
def _small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()

    def prompts(tokenizer: Any, count: int) -> list[torch.Tensor]:
        return [torch.randint(1, 97, (3 + 2 * i,)) for i in range(count)]

    monkeypatch.setattr(speculative, "load_smollm2", lambda: (model, None))
    monkeypatch.setattr(speculative, "prompts", prompts)


def test_every_scheduler_and_layout_gives_the_rows_of_plain_decoding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    figures = speculative.run(2, 6, 3, 2, 1, path)
    assert json.loads(path.read_text()) == figures
    assert {(r["scheduler"], r["layout"]) for r in figures["runs"]} >= {
        (s, layout) for s in speculative.SCHEDULERS for layout in speculative.LAYOUTS
    }
    assert {r["drafter"] for r in figures["runs"]} == {"2 layers", "lookup", "none"}
    assert all(r["equal_rows"] == figures["rows"] == 3 for r in figures["runs"])
    plain = figures["runs"][-1]
    assert (plain["drafter"], plain["tokens_per_round"], plain["acceptance"]) == ("none", 1.0, 0.0)
    printed = capsys.readouterr().out
    assert "SmolLM2-135M, float32, greedy" in printed
    assert "…" not in printed  # the table fits into 80 columns


def test_a_row_that_differs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = speculative.one_by_one

    def wrong(*arguments: Any) -> tuple[list[list[int]], float]:
        found, seconds = honest(*arguments)
        found[0][-1] += 1
        return found, seconds

    monkeypatch.setattr(speculative, "one_by_one", wrong)
    with pytest.raises(RuntimeError, match="rows differ from plain decoding in 16 runs"):
        speculative.run(2, 4, 2, 1, 1)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"tokens": 0}, {"drafts": -1}])
def test_arguments_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="batch and tokens must be at least 1"):
        speculative.run(**wrong)


def test_prompts_are_real_and_ragged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    try:
        tokenizer = _common.load_smollm2()[1]
    except RuntimeError as error:
        pytest.skip(str(error))
    rows = speculative.prompts(tokenizer, 12)
    assert len({row.numel() for row in rows}) > 8
    with pytest.raises(ValueError, match="count must be at most 12, got 13"):
        speculative.prompts(tokenizer, 13)
