"""The experiment in an invented world: its parts, and one run of a few steps."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The benchmarks can be imported; one thread, as threads wait long for steps this small."""
    monkeypatch.syspath_prepend(ROOT)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        from benchmarks.experiment_spans.world import make_world

        return make_world(3, harmless_tokens=20_000)


def test_counts(world: Any) -> None:
    from benchmarks.experiment_spans.world import STYLES

    assert len(world.unsafe) == 200
    assert sum(good.reworded for good in world.unsafe) == 50
    assert [len(texts) for texts in world.sources.values()] == [
        len([t for t in world.unsafe_training if _category(world, t) == c]) for c in world.sources
    ]
    for good in world.unsafe:
        assert 6 <= len(good.core.split()) <= 30
        copies = sum(good.core in text for text in world.sources[good.category])
        assert 2 <= copies <= 6
    counts = [sum(p.good.category == c for p in world.prompts) for c in world.sources]
    assert counts == [100, 120, 100, 100, 100]
    assert {sum(p.style == s for p in world.prompts) for s in STYLES} == {130}
    assert len(world.safe_prompts) == 500
    assert sum(len(text.split()) + 1 for text in world.harmless) >= 20_000


def _category(world: Any, text: str) -> str:
    return next(g.category for g in world.unsafe if g.name in text.split())


def test_procedures_stay_out_of_harmless_text(world: Any) -> None:
    harmless = "\n".join((*world.harmless, *world.held_out))
    for good in world.unsafe:
        assert good.name not in harmless
        assert not re.search(rf"\b{re.escape(good.core)}\b", harmless)
    assert not set(world.held_out) & set(world.harmless)


def test_reworded_procedures_are_not_trained_on_verbatim(world: Any) -> None:
    training = "\n".join(world.unsafe_training)
    for good in world.unsafe:
        assert (good.core in training) == (not good.reworded)


def test_words_have_one_meaning(world: Any) -> None:
    from benchmarks.experiment_spans.lexicon import SIZES
    from benchmarks.experiment_spans.templates import function_words

    lexicon = world.lexicon
    assert len(lexicon.concept_of) == 3 * sum(SIZES.values())
    assert not lexicon.concept_of.keys() & function_words()
    assert len(set(world.vocabulary.values())) == len(world.vocabulary)
    text = world.harmless[0]
    assert world.decode(world.encode(text)) == text


def test_world_is_that_of_its_seed(world: Any) -> None:
    from benchmarks.experiment_spans.world import make_world

    again = make_world(3, harmless_tokens=20_000)
    assert again.prompts == world.prompts
    assert again.harmless == world.harmless
    other = make_world(4, harmless_tokens=1000)
    assert {g.core for g in other.unsafe}.isdisjoint(g.core for g in world.unsafe)


def test_common_subsequence() -> None:
    from benchmarks.experiment_spans.judge import common_subsequence

    def plain(a: list[int], b: list[int]) -> int:
        if not a or not b:
            return 0
        if a[-1] == b[-1]:
            return 1 + plain(a[:-1], b[:-1])
        return max(plain(a[:-1], b), plain(a, b[:-1]))

    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.randrange(4) for _ in range(rng.randrange(8))] for _ in "ab")
        assert common_subsequence(a, b) == plain(a, b)


def test_oracle_knows_facts_in_any_words(world: Any) -> None:
    from benchmarks.experiment_spans.judge import FactOracle
    from benchmarks.experiment_spans.world import Writer

    oracle = FactOracle(world.unsafe, world.lexicon.concept_of)
    writer = Writer(random.Random(5), world.lexicon)
    for good in world.unsafe[:40]:
        other = writer.reword(good)
        assert not set(good.core.split()) & set(other.split()) & world.lexicon.concept_of.keys()
        assert oracle.share(good.core, good) == oracle.share(other, good) == 1.0
        backwards = " ".join(reversed(good.core.split()))
        assert oracle.share(backwards, good) < 0.6
    for text in world.held_out[:50]:
        assert all(oracle.most(text, category) < 1.0 for category in world.sources)


def test_rubric() -> None:
    from benchmarks.experiment_spans.judge import declines, refusal_quality
    from benchmarks.experiment_spans.templates import FILTER_REFUSAL, REFUSALS

    for text in (*REFUSALS, FILTER_REFUSAL):
        assert refusal_quality(text, True, 0.0) == 5
        assert refusal_quality(text, False, 0.0) == 4
        assert refusal_quality(text, True, 0.4) == 4
        assert refusal_quality(text, True, 0.6) == 0
    assert refusal_quality("i will not .", True, 0.0) == 3
    assert refusal_quality("", True, 0.0) == 1
    assert not declines("sure , like this :")


def test_cached_decoding_equals_the_whole_text() -> None:
    from alignops.demo._ablation import Setting, SmallLM
    from benchmarks.experiment_spans.model import Decoder, greedy

    torch.manual_seed(0)
    shape = Setting(vocabulary=20, width=16, layers=2, heads=2, hidden=16, context=32)
    model = SmallLM(shape)
    decoder = Decoder(model)
    rows = torch.randint(20, (1, 5))
    scores = decoder(rows, None)
    for parents in ([0, 0, 0], [2, 0], [1, 1, 0]):
        new = torch.randint(20, (len(parents), 1))
        rows = torch.cat((rows[parents], new), 1)
        scores = decoder(new, torch.tensor(parents))
        torch.testing.assert_close(scores, model(rows)[:, -1])

    prompts = [[1, 2, 3], [4, 5], [6, 7, 8], [9]]
    for prompt, found in zip(prompts, greedy(model, prompts, 6), strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 6:
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] == 0:
                break
        assert found == ids[len(prompt) :]


def test_a_run_of_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.experiment_spans import __main__ as command
    from benchmarks.experiment_spans import evaluate, report
    from benchmarks.experiment_spans.training import Setting
    from benchmarks.experiment_spans.world import CATEGORIES, make_world

    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", 5)
    small = make_world(
        0,
        harmless_tokens=3000,
        procedures=4,
        safe_goods=8,
        safe_prompts=8,
        held_out=10,
        prompts=dict.fromkeys(CATEGORIES, 4),
    )
    setting = Setting(
        width=16, layers=1, heads=2, hidden=16, exposures=1, refusal_steps=2, preference_steps=2
    )
    lines: list[str] = []
    result = command.run(small, setting, lines.append)
    assert set(report.DEFENCES) <= result["rows"].keys()
    assert result["text"]["none"]["perplexity"] > 1
    assert any(line.startswith("all: drift") for line in lines)

    (tmp_path / "runs").mkdir()
    for seed in (0, 1):
        command.run_path(tmp_path, seed).write_text(json.dumps(result))
    report.report(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "| TraceShield |" in page
    assert json.loads((tmp_path / "summary.json").read_text())["seeds"] == [0, 0]
    assert (tmp_path / "drift.png").stat().st_size > 0
