"""Sessions on small random models of transformers, from prompt to answer."""

import inspect
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra [hf]")

from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from alignops.attention.asynchronous import run_async
from alignops.attention.generate import hogwild_generate
from alignops.attention.session import HogwildSession
from alignops.attention.steps import StepRule
from alignops.integrations.attention import concurrent_model
from alignops.speculative.adapter import Sampling
from alignops.testing import ByteTokenizer
from tests.attention.test_session import TEXTS

TOKENIZER = ByteTokenizer(["\n\n", ".\n\n"])
SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,
    "max_position_embeddings": 4096,
}
RULE = StepRule(max_step_tokens=17)
LAYOUTS = ["combined", "interleaved", "contiguous"]
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "yarn": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
            }
        },
    ),
}


def make(name: str = "llama") -> Any:
    model, config, more = MODELS[name]
    return model(config(**SIZES, **more)).eval()


def session(model: Any, workers: int = 2, **options: Any) -> HogwildSession:
    options = {"texts": TEXTS, "step_rule": RULE, "forbid": (), "eos_ids": (), **options}
    return HogwildSession(model, TOKENIZER, "A question?", workers=workers, **options)


class Ending:
    """Shakes the scores, by the number of tokens so far, and ends a step now and then."""

    def __init__(self, every: int = 19) -> None:
        self._noise = 4 * torch.randn(
            97, len(TOKENIZER), generator=torch.Generator().manual_seed(1)
        )
        self._every = every

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        count = ids.shape[1]
        scores = scores + self._noise[count % 97]
        if count % self._every == 0:
            scores[:, TOKENIZER.encode(".\n\n")] += 1e4
        return scores


class Plain:
    """The stock model with the library's cache, and all tokens that it has read."""

    def __init__(self, model: Any) -> None:
        names = inspect.signature(model.forward).parameters
        self._model = model
        self._cache = {"cache" if "cache" in names else "past_key_values": DynamicCache()}
        self.ids: list[int] = []

    @torch.no_grad()
    def feed(self, ids: Any) -> None:
        self.ids += ids
        self.scores = self._model(torch.tensor([list(ids)]), **self._cache).logits[:, -1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", list(MODELS))
def test_one_worker_writes_what_plain_decoding_writes(name: str, layout: str) -> None:
    model, pieces, ending = make(name), [], Ending()
    s = session(
        concurrent_model(model, num_pages=80),
        1,
        layout=layout,
        stream=pieces.append,
        step_rule=StepRule(),
        logits_processor=ending,
        check_every=40,
    )
    for _ in range(210):
        s.step()
    plain, sampled = Plain(model), 0
    plain.feed(s.prompt_ids)
    for piece in pieces:
        if not piece.given:
            scores = ending(torch.tensor([plain.ids]), plain.scores)
            assert piece.tokens == (int(scores.argmax()),)
            sampled += 1
        plain.feed(piece.tokens)
    assert sampled == 210
    assert len(set(s.tokens("A"))) > 50
    assert len(s.steps) >= 8
    assert s.stats.workers["A"].checks >= 4
    assert (s._board.common.length > len(s.prompt_ids)) == (layout != "contiguous")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("workers", [2, 3, 4])
def test_both_rotation_modes_write_the_same(workers: int, layout: str) -> None:
    model = make()
    found = []
    for mode in ("raw", "local"):
        shared = concurrent_model(model, num_pages=120, rope_mode=mode)
        s = session(shared, workers, layout=layout, mass_every=3)
        for _ in range(48):
            s.step()
        found.append([s.tokens(name) for name in s.workers])
        assert len(s.steps) == 2 * workers
        for name, shares in s.stats.mass.table().items():
            assert sum(shares.values()) == pytest.approx(1, abs=1e-4), name
    assert found[0] == found[1]


def test_workers_read_each_other() -> None:
    shared = concurrent_model(make(), num_pages=120)

    def tokens_of_a(words: str, layout: str) -> list[int]:
        s = session(shared, layout=layout)
        s.inject(words, to="B")
        for _ in range(12):
            s.step()
        return s.tokens("A")

    assert tokens_of_a(" yes", "combined") != tokens_of_a(" 17 + 4", "combined")
    # Nothing is finished, so nothing is seen.
    assert tokens_of_a(" yes", "interleaved") == tokens_of_a(" 17 + 4", "interleaved")


def test_a_fork_writes_the_same_if_nothing_is_changed() -> None:
    s = session(concurrent_model(make(), num_pages=200), 3)
    for _ in range(20):
        s.step()
    twin = s.fork()
    other = s.fork()
    other.inject("Something else.")
    for each in (s, other, twin):
        for _ in range(30):
            each.step()
    assert [s.tokens(name) for name in "ABC"] == [twin.tokens(name) for name in "ABC"]
    assert [s.tokens(name) for name in "ABC"] != [other.tokens(name) for name in "ABC"]


def test_asking_for_the_answer_changes_nothing() -> None:
    shared = concurrent_model(make(), num_pages=200)
    plain, asked = session(shared), session(shared)
    for i in range(30):
        plain.step()
        asked.step()
        if i % 7 == 3:
            asked.conclude()
    assert [plain.tokens(name) for name in "AB"] == [asked.tokens(name) for name in "AB"]


def test_one_worker_in_a_thread_writes_as_in_lockstep() -> None:
    shared = concurrent_model(make(), num_pages=120)
    lockstep, threaded = session(shared, 1), session(shared, 1)
    for _ in range(40):
        lockstep.step()
    run_async(threaded, max_steps=40)
    assert lockstep.tokens("A") == threaded.tokens("A")


def test_workers_in_threads() -> None:
    shared = concurrent_model(make(), num_pages=300)
    s = session(shared, 4)
    run_async(s, max_steps=60)
    assert s.stats.sampled == 240
    assert list(s._board.common.tokens) == [
        *s.prompt_ids,
        *(token for step in s.steps for token in step.tokens),
    ]
    assert set(s.step()) == set("ABCD")


def test_pages_come_back() -> None:
    shared = concurrent_model(make(), num_pages=100)
    for _ in range(6):
        s = session(shared, 3)
        for _ in range(40):
            s.step()
        s.fork().step()
        s.finish_worker("B")
        s.conclude()
    # A pool with room for little more than one session has served six.


def test_from_task_to_answer() -> None:
    model = make()
    model.generation_config.update(do_sample=True, temperature=0.9, repetition_penalty=1.2)
    options: Any = {
        "workers": 3,
        "max_steps": 25,
        "step_rule": RULE,
        "seed": 3,
        "budget_tokens": 70,
    }
    first = hogwild_generate(model, TOKENIZER, "What is 2 + 3?", **options)
    again = hogwild_generate(model, TOKENIZER, "What is 2 + 3?", **options)
    other = hogwild_generate(model, TOKENIZER, "What is 2 + 3?", **{**options, "seed": 4})
    assert first.tokens == again.tokens
    assert first.answer == again.answer
    assert first.tokens != other.tokens
    assert first.stats.sampled == 70
    assert (first.reason, first.answered_by) == ("budget", "")
    assert {step.worker for step in first.steps} == {"Ada", "Ben", "Cleo"}
    assert TOKENIZER.eos_token_id not in {t for ids in first.tokens.values() for t in ids}


def test_sampling_is_of_the_models_settings_or_the_callers() -> None:
    model = make()
    options: Any = {"max_steps": 10, "finisher": None, "texts": TEXTS}
    greedy = hogwild_generate(model, TOKENIZER, "Q", **options)
    model.generation_config.update(do_sample=True, temperature=5.0)
    hot = hogwild_generate(model, TOKENIZER, "Q", **options)
    cold = hogwild_generate(model, TOKENIZER, "Q", temperature=0, **options)
    top = hogwild_generate(model, TOKENIZER, "Q", top_k=1, **options)
    assert greedy.tokens == cold.tokens == top.tokens
    shared = concurrent_model(model, num_pages=100)
    assert hogwild_generate(shared, TOKENIZER, "Q", **options).tokens == hot.tokens
    assert hot.tokens != greedy.tokens


def test_seeds_of_workers_hold_under_another_model_order() -> None:
    shared = concurrent_model(make(), num_pages=120)
    options: Any = {"sampling": Sampling(0.8, top_p=0.9), "layout": "interleaved"}
    first = session(shared, seed=[5, 9], **options)
    second = session(shared, seed=[5, 9], **options)
    for _ in range(15):
        first.step()
        second.step(["B"])
        second.step(["A"])
    # Nobody sees unfinished steps, so it does not matter who was first.
    assert [first.tokens(name) for name in "AB"] == [second.tokens(name) for name in "AB"]
