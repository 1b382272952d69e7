"""`hogwild_generate` and asynchronous workers, with a model that writes what a script says."""

import threading
from typing import Any

import pytest

from alignops.attention.asynchronous import run_async
from alignops.attention.generate import hogwild_generate
from alignops.attention.session import HogwildSession
from alignops.attention.workers import Piece
from tests.attention.scripted import TOKENIZER, ScriptedModel
from tests.attention.test_session import TEXTS, session, text_of


def generate(model: ScriptedModel, **options: Any) -> Any:
    options = {"texts": TEXTS, "max_steps": 20, **options}
    return hogwild_generate(model, TOKENIZER, "Q", **options)


def test_it_ends_with_an_answer() -> None:
    result = generate(ScriptedModel({"B": "[42].\n\n"}))
    assert (result.answer, result.answered_by, result.reason) == ("42", "B", "answer")
    assert result.history == "B1: hi[42]."
    assert set(result.unfinished) == {"A", "B"}
    assert result.workers == ["A", "B"]
    assert TOKENIZER.decode(result.tokens["B"]) == "\n\nB1: hi[42].\n\nB2:"
    assert TOKENIZER.decode(result.prompt_ids) == "Q\n\n"
    assert [step.worker for step in result.steps] == ["B"]


@pytest.mark.parametrize(
    ("options", "forwards", "sampled"),
    [
        ({"max_steps": 6}, 6, 12),
        ({"max_steps": 6, "workers": 4}, 6, 24),
        ({"budget_tokens": 7}, 4, 7),
        ({"budget_tokens": 8}, 4, 8),
        ({"budget_tokens": 0}, 0, 0),
        ({"max_steps": 0}, 0, 0),
    ],
)
def test_budgets(options: dict[str, Any], forwards: int, sampled: int) -> None:
    result = generate(ScriptedModel({"aside": "7]"}), **options)
    assert (result.stats.forwards, result.stats.sampled) == (forwards, sampled)
    # The finisher is not counted.
    assert (result.reason, result.answer, result.answered_by) == ("budget", "7", "")


def test_without_finisher() -> None:
    model = ScriptedModel()
    result = generate(model, finisher=None)
    assert (result.reason, result.answer) == ("budget", None)
    assert all("aside" not in names for names, *_ in model.forwards)


def test_it_ends_when_all_have_finished() -> None:
    model = ScriptedModel({"A": "bye", "B": "see you, bye", "aside": "1]"})
    result = generate(model, stop=["bye"])
    assert (result.reason, result.answer) == ("finished", "1")
    assert result.history == "A1: planbye\n\nB1: hisee you, bye"
    assert result.unfinished == {}


def test_an_interruption_returns_what_there_is() -> None:
    pieces: list[Piece] = []

    def stream(piece: Piece) -> None:
        pieces.append(piece)
        if len(pieces) == 9:
            raise KeyboardInterrupt

    result = generate(ScriptedModel({"A": "abc"}), stream=stream)
    assert (result.reason, result.answer) == ("interrupted", None)
    assert result.unfinished["A"] == "A1: planabc"
    model = ScriptedModel()
    model.fail = KeyboardInterrupt()
    assert generate(model).reason == "interrupted"


def test_a_full_pool_returns_what_there_is() -> None:
    result = generate(ScriptedModel(pages=6), max_steps=200)
    assert (result.reason, result.answer) == ("pool", None)
    assert result.stats.sampled > 10


def test_the_question_may_be_ones_own() -> None:
    result = generate(ScriptedModel({"A": "abc.\n\n"}), check_every=4, check_text=" Really?")
    assert result.unfinished["A"].startswith("A2: Really?z")


def test_a_bar_counts_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    generate(ScriptedModel(), max_steps=3, progress=True)
    assert "6/6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_steps": -1}, "max_steps must be at least 0, got -1"),
        ({"budget_tokens": -1}, "budget_tokens must be at least 0, got -1"),
        ({"finisher": "essay"}, "finisher must be one of answer, got 'essay'"),
        ({"workers": 0}, "workers must be names"),
    ],
)
def test_arguments(options: dict[str, Any], text: str) -> None:
    model = ScriptedModel()
    with pytest.raises(ValueError, match=text):
        generate(model, **options)
    assert model.prefills == []


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"a model of transformers or a ConcurrentModel, got int"):
        hogwild_generate(3, TOKENIZER, "Q", max_steps=1)


# Workers at their own pace


def test_workers_in_threads_write_their_scripts() -> None:
    lines = {name: f"{name} says so.\n\n" * 5 for name in "ABCD"}
    model = ScriptedModel(lines)
    s = session(model, 4)
    run_async(s, max_steps=40)
    assert s.stats.forwards == s.stats.sampled == 160
    assert {visibility for *_, visibility in model.forwards} == {"lagged"}
    assert all(len(names) == 1 for names, *_ in model.forwards)
    for name in "ABCD":
        mine = [step.text for step in s.steps if step.worker == name]
        assert mine[1:] == [f"{name}{i}:{name} says so." for i in range(2, len(mine) + 1)]
        assert len(mine) >= 3
    # All finished steps lie in the history, in the order in which they were finished.
    assert list(s._board.common.tokens) == [
        *s.prompt_ids,
        *(token for step in s.steps for token in step.tokens),
    ]
    # The session goes on in lockstep.
    assert set(s.step()) == set("ABCD")


def test_an_answer_stops_all_threads() -> None:
    s = session(ScriptedModel({"A": "It is [5].\n\n"}), 3)
    run_async(s, max_steps=5000)
    assert (s.answer, s.answered_by) == ("5", "A")
    assert s.stats.sampled < 15000


def test_a_budget_stops_all_threads() -> None:
    s = session(ScriptedModel(), 3)
    run_async(s, max_steps=5000, budget_tokens=30)
    assert 30 <= s.stats.sampled < 33


def test_an_error_in_a_thread_stops_all_and_is_raised() -> None:
    model = ScriptedModel()
    s = session(model, 3)
    run_async(s, max_steps=2)
    model.fail = RuntimeError("out of power")
    with pytest.raises(RuntimeError, match="out of power"):
        run_async(s, max_steps=5000)
    assert s.stats.sampled < 15000
    assert set(s.step()) == set("ABC")


def test_other_threads_read_and_inject() -> None:
    s = session(ScriptedModel(dict.fromkeys("AB", "x y z.\n\n" * 60)))
    done, seen = threading.Event(), 0

    def look() -> None:
        nonlocal seen
        while seen < 3 or (seen < 40 and not done.is_set()):  # the pool holds no more
            s.inject("Remark.")
            seen += len(s.history + str(s.unfinished) + str(s.stats.to_dict())) > 0

    thread = threading.Thread(target=look)
    thread.start()
    run_async(s, max_steps=100)
    done.set()
    thread.join()
    assert text_of(s._board.common).count("Remark.") == seen


def test_arguments_of_asynchronous_runs() -> None:
    s: HogwildSession = session(ScriptedModel())
    with pytest.raises(ValueError, match="max_steps must be at least 0, got -1"):
        run_async(s, max_steps=-1)
    with pytest.raises(ValueError, match="budget_tokens must be at least 0, got -1"):
        run_async(s, max_steps=1, budget_tokens=-1)
