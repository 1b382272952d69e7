"""The Arenas demonstration on models of a few thousand parameters."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignops.demo import _ablation, arenas
from alignops.demo._text import Corpus, load_corpus
from alignops.ternary import ArenasLinear, TernaryLinear

WORDS = ["<end>", "number", "of", "elements", "the", "Return", "in", "list"]


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def distillation(steps: int = 6) -> arenas.Distillation:
    setting = arenas.Setting(context=16, batch=2, learning_rate=5e-3)
    tokens = torch.randint(64, (4000,), generator=torch.Generator().manual_seed(1))
    return arenas.Distillation(small_llama(), tokens, tokens[:400], steps, setting)


def corpus() -> Corpus:
    texts = [f"Return the number of elements in the list {i % 7} of {i % 5}" for i in range(400)]
    return Corpus(texts[:350], texts[350:])


def test_no_held_out_paragraph_is_trained_on():
    found = load_corpus(["numpy"])
    parts = [{p for t in part for p in t.split("\n\n")} for part in (found.train, found.held_out)]
    assert len(parts[0]) > 1000
    assert len(parts[1]) > 100
    assert not parts[0] & parts[1]
    assert found.digest == load_corpus(["numpy"]).digest
    assert load_corpus(["a_package_that_is_not_there"]) == Corpus([], [])


def test_student_starts_as_the_converted_model_and_learns():
    work = distillation(steps=40)
    assert type(work.student.lm_head) is torch.nn.Linear
    swapped = [m for m in work.student.modules() if isinstance(m, ArenasLinear)]
    assert len(swapped) == 14
    errors = [sum(work.step()) for _ in range(40)]
    assert sum(errors[-5:]) < 0.7 * sum(errors[:5])
    assert work.schedule.value == 0.0


def test_teacher_and_embedding_stay_as_they_are():
    work = distillation()
    original = small_llama()
    work.step()
    assert torch.equal(work.student.model.embed_tokens.weight, original.model.embed_tokens.weight)
    for ours, theirs in zip(work.teacher.parameters(), original.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16())


def test_checkpoint_resumes_bit_for_bit(tmp_path):
    whole = distillation()
    losses = [whole.step() for _ in range(3)]
    whole.save(tmp_path / "a" / "state.pt")
    losses += [whole.step() for _ in range(3)]

    resumed = distillation()
    resumed.load_state_dict(torch.load(tmp_path / "a" / "state.pt", weights_only=True))
    assert resumed.schedule.t == 3
    assert [resumed.step() for _ in range(3)] == losses[3:]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["state.pt"]


def test_checkpoint_of_another_setting_is_refused():
    state = distillation().state_dict()
    state["setting"]["context"] = 8
    with pytest.raises(ValueError, match="setting"):
        distillation().load_state_dict(state)


def test_timing_a_step_leaves_no_trace():
    work, twin = distillation(), distillation()
    assert work.seconds_per_step() > 0
    assert work.step() == twin.step()


def test_run_reports_and_resumes(tmp_path, monkeypatch):
    vocabulary = {word: i for i, word in enumerate([*WORDS, *map(str, range(7))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    monkeypatch.setattr(arenas, "load_smollm2", lambda: (small_llama(), tokenizer))
    monkeypatch.setattr(arenas, "load_corpus", lambda packages: corpus())
    path = tmp_path / "state.pt"
    setting = arenas.Setting(context=16, batch=2)
    lines: list[str] = []
    result = arenas.run(steps=4, checkpoint=path, setting=setting, echo=lines.append)
    assert set(result["perplexity"]) == {"original", "converted", "trained"}
    assert result["steps"] == 4
    assert result["tokens"] == 4 * 16 * 2
    assert len(result["history"]) == 4
    assert json.loads(path.with_suffix(".json").read_text()) == result
    assert "not a usable model" in "".join(lines).replace("\n", " ")

    again = arenas.run(checkpoint=path, resume=True, setting=setting, echo=lines.append)
    assert again["history"] == []
    assert again["perplexity"] == result["perplexity"]
    timed = arenas.run(minutes=1e-9, checkpoint=path, setting=setting, echo=lines.append)
    assert timed["steps"] == 10


def test_ctrl_c_saves_what_there_is(tmp_path, monkeypatch):
    work = distillation()
    steps = iter([None, None, KeyboardInterrupt])
    step = work.step

    def interrupted():
        if next(steps) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(work, "step", interrupted)
    lines: list[str] = []
    arenas._train(work, tmp_path / "state.pt", lines.append)
    assert "Interrupted at step 2" in lines[-1]
    assert torch.load(tmp_path / "state.pt", weights_only=True)["schedule"]["t"] == 2


def test_trained_student_is_ternary_throughout():
    work = distillation(steps=3)
    for _ in range(3):
        work.step()
    tokens = work.held_out_tokens[None, :20]
    with torch.no_grad():
        before = work.student.eval()(tokens).logits
        arenas.finalize(work.student)
        assert sum(isinstance(m, TernaryLinear) for m in work.student.modules()) == 14
        assert torch.equal(work.student(tokens).logits, before)


@pytest.mark.parametrize("configuration", _ablation.CONFIGURATIONS)
def test_every_configuration_of_the_ablation_learns(configuration):
    text = _ablation.Text(corpus(), 300)
    setting = _ablation.Setting(
        vocabulary=300,
        width=32,
        layers=1,
        heads=2,
        hidden=64,
        context=16,
        steps=30,
        warmup=3,
        learning_rate=1e-2,
        evaluate_every=15,
        evaluate_windows=4,
        measure_every=10,
    )
    result = _ablation.train(configuration, 0, text, setting, lambda line: None)
    assert result["loss"][-1] < 0.8 * result["loss"][0]
    assert [step for step, _ in result["held_out"]] == [15, 30]
    assert [step for step, _ in result["rank"]] == [0, 10, 20]
    assert all(1 <= rank <= 32 for _, rank in result["rank"])
    assert sum(result["latent_at_end"]["histogram"]) == pytest.approx(1, abs=1e-3)
    assert result["quantized_parameters"] == 4 * 32 * 32 + 3 * 32 * 64
    assert ("held_out_converted" in result) == (configuration == "dense")
    repeated = _ablation.train(configuration, 0, text, setting, lambda line: None)
    assert repeated["loss"] == result["loss"]


def test_configurations_share_their_start():
    setting = dataclasses.replace(_ablation.Setting(), width=32, hidden=64, vocabulary=64)
    starts = []
    for configuration in _ablation.CONFIGURATIONS:
        torch.manual_seed(3)
        model = _ablation.SmallLM(setting)
        _ablation._prepare(model, configuration, setting)
        starts.append(model.state_dict())
    for state in starts[1:]:
        assert state.keys() == starts[0].keys()
        assert all(torch.equal(state[key], starts[0][key]) for key in state)


def test_ablation_compares_all_configurations(monkeypatch):
    monkeypatch.setattr(arenas, "load_corpus", corpus)
    lines: list[str] = []
    runs = arenas.ablate(steps=2, echo=lines.append)
    assert [run["configuration"] for run in runs] == list(_ablation.CONFIGURATIONS)
    assert all(run["held_out"][-1][0] == 2 for run in runs)
    assert len([line for line in lines if "seed 0: " in line and line.startswith("  ")]) == 5
