"""The loop of several workers, with a model that writes what a script says."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from alignops.attention import LayoutError, PoolExhausted
from alignops.attention.layouts import Cells, Layout
from alignops.attention.prompts import Finisher, Texts
from alignops.attention.session import HogwildSession
from alignops.attention.steps import StepRule
from alignops.attention.workers import Piece, Step
from alignops.speculative.adapter import Sampling
from tests.attention.scripted import THINKING, TOKENIZER, ScriptedModel

TEXTS = replace(
    Texts.load(),
    names=("A", "B", "C", "D"),
    history_title="",
    system="",
    advice=(),
    traces=(),
    task="{problem}",
    step_header="<others>",
    pivot="<pivot>",
    own_header="<own>",
    worker_title="<of {name}>",
    prefix="{name}{number}:",
    openings=(" plan", " hi"),
    check=" check?",
    finishers={"answer": Finisher(" So", " [", "]", 4)},
    answer_pattern=r"\[(\d+)\]",
)


def session(model: ScriptedModel, workers: Any = 2, **options: Any) -> HogwildSession:
    options.setdefault("texts", TEXTS)
    return HogwildSession(model, model.tokenizer, "Q", workers=workers, **options)


def run(s: HogwildSession, forwards: int) -> None:
    for _ in range(forwards):
        s.step()


def views(s: HogwildSession) -> dict[str, list[str]]:
    """Names of the blocks that each active worker sees."""
    board = s._board
    return {w.name: [b.name for b in board.ws.view(w.id)] for w in board.workers if w.active}


def text_of(block: Any) -> str:
    return TOKENIZER.decode(list(block.tokens))


def block(s: HogwildSession, worker: str) -> Any:
    return next(w.own for w in s._board.workers if w.name == worker)


# Layouts


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_views_of_the_layouts(workers: int) -> None:
    names = TEXTS.names[:workers]
    combined = views(session(ScriptedModel(), workers))
    contiguous = views(session(ScriptedModel(), workers, layout="contiguous"))
    interleaved = views(session(ScriptedModel(), workers, layout="interleaved"))
    for name in names:
        others = [other for other in names if other != name]
        assert interleaved[name] == ["common", name]
        shown = [b for b in contiguous[name] if not b.startswith("pivot")]
        assert shown == ["common", *others, name]
        assert [b.startswith("pivot") for b in contiguous[name]] == [
            False,
            *([False, True] * len(others)),
            False,
        ]
        if workers == 1:
            assert combined[name] == ["common", name]
            continue
        kinds = ["pivot" if b.startswith("pivot") else b for b in combined[name]]
        middle = [x for other in others for x in ("pivot", other)][1:]
        assert kinds == ["common", "step_header", *middle, "own_header", name]


def test_worker_2_of_4_sees_1_3_4_then_itself() -> None:
    view = views(session(ScriptedModel(), 4))["B"]
    assert [name for name in view if name in "ABCD"] == ["A", "C", "D", "B"]


@pytest.mark.parametrize("encode", ["in_context", "isolated"])
def test_headers_are_encoded_once(encode: Any) -> None:
    model = ScriptedModel()
    s = session(model, 4, encode=encode)
    encoded = [(name, TOKENIZER.decode(ids), view) for name, ids, view in model.prefills]
    pivot = ["common", "step_header", "B", "pivot 1"]
    own = ["common", "step_header", "B", "pivot 1", "C", "pivot 2", "D", "own_header"]
    contexts = [["common", "step_header"], pivot, own]
    names = ["step_header", "pivot 1", "own_header"]
    texts = ["<others>", "<pivot>", "<pivot><own>"]
    assert encoded[0][1:] == ("Q\n\n", ["common"])
    for (name, text, view), wanted in zip(
        encoded[1:], zip(names, texts, contexts, strict=True), strict=True
    ):
        assert (name, text) == wanted[:2]
        assert view == (wanted[2] if encode == "in_context" else [name])
    # The second pivot shares what the first one has.
    assert text_of(s._board._extra["pivot 2"]) == "<pivot>"


def test_a_layout_of_ones_own() -> None:
    class Pairs(Layout):
        def blocks(self, names: Any, texts: Texts) -> Any:
            return {"secret": "<secret>", "notes": ""}

        def view(self, worker: int, cells: Cells) -> Any:
            if worker == 0:
                return [cells.common, cells.extra["secret"], cells.extra["notes"], cells.own[0]]
            return [cells.common, cells.own[0], cells.own[1]]

        def history(self, worker: int, cells: Cells) -> Any:
            return cells.extra["notes"] if worker == 0 else None

    model = ScriptedModel({"A": "ok.\n\n", "B": "ok.\n\n"})
    s = session(model, layout=Pairs())
    assert views(s) == {"A": ["common", "secret", "notes", "A"], "B": ["common", "A", "B"]}
    run(s, 3)
    assert text_of(s._board._extra["notes"]) == "\n\nA1: planok"
    assert text_of(s._board.common) == "Q\n\n"
    # The punctuation and the blank line are one token, which has closed the step unfed.
    s.step()
    assert text_of(block(s, "B")) == "\n\nB1: hiok.\n\nB2:"
    assert s.history == "A1: planok.\n\nB1: hiok."


def test_a_function_is_a_layout_too() -> None:
    s = session(ScriptedModel(), layout=lambda w, cells: [cells.own[1 - w], cells.own[w]])
    assert views(s) == {"A": ["B", "A"], "B": ["A", "B"]}


def test_layouts_that_are_refused() -> None:
    with pytest.raises(LayoutError, match="contiguous, interleaved, combined, got 'stack'"):
        session(ScriptedModel(), layout="stack")
    with pytest.raises(LayoutError, match="view of worker 'A' must end with its own block"):
        session(ScriptedModel(), layout=lambda w, cells: [cells.own[w], cells.common])
    with pytest.raises(LayoutError):
        session(ScriptedModel(), layout=lambda w, cells: [cells.common] * 2 + [cells.own[w]])
    with pytest.raises(TypeError, match=r"a Layout or a function .* got int"):
        session(ScriptedModel(), layout=3)
    with pytest.raises(ValueError, match="encode must be in_context or isolated, got 'both'"):
        session(ScriptedModel(), encode="both")


# Steps


def test_first_inputs_are_openings_and_the_first_worker_plans() -> None:
    model = ScriptedModel()
    s = session(model)
    s.step()
    names, inputs, visibility = model.forwards[0]
    assert (names, visibility) == (["A", "B"], "inclusive")
    assert [TOKENIZER.decode(ids) for ids in inputs] == ["\n\nA1: plan", "\n\nB1: hi"]
    assert s.step() == {"A": ord("z"), "B": ord("z")}
    assert model.forwards[1][1] == [[ord("z")], [ord("z")]]


def test_a_finished_step_moves_and_the_separator_opens_the_next_one() -> None:
    model = ScriptedModel({"A": "ab.\n\ncd.\n\n", "B": "Some more.\n\n"})
    s = session(model)
    run(s, 3)
    # The token ".\n\n" was sampled, and not fed.
    assert text_of(s._board.common) == "Q\n\n\n\nA1: planab"
    assert (text_of(block(s, "A")), s.unfinished["A"]) == ("", "A2:")
    s.step()
    assert TOKENIZER.decode(model.forwards[-1][1][0]) == ".\n\nA2:"
    assert model.forwards[-1][1][1] == TOKENIZER.encode("m")
    assert text_of(block(s, "B")) == "\n\nB1: hiSom"
    while len(s.steps) < 3:
        s.step()
    assert [(step.worker, step.number) for step in s.steps] == [("A", 1), ("A", 2), ("B", 1)]
    assert s.history == "A1: planab.\n\nA2:cd.\n\nB1: hiSome more."
    assert text_of(s._board.common) == "Q\n\n\n\nA1: planab.\n\nA2:cd\n\nB1: hiSome more"
    assert list(s._board.common.tokens) == [
        *s.prompt_ids,
        *(token for step in s.steps for token in step.tokens),
    ]
    assert [step.forwards for step in s.steps] == [3, 6, 10]


def test_moves_of_one_forward_apply_in_worker_order() -> None:
    s = session(ScriptedModel(dict.fromkeys("ABC", "x.\n\n")), 3)
    s.step()
    s.step()
    assert [step.worker for step in s.steps] == ["A", "B", "C"]
    assert text_of(s._board.common) == "Q\n\n\n\nA1: planx\n\nB1: hix\n\nC1: hix"


def test_contiguous_texts_stay_and_begin_with_a_title() -> None:
    s = session(ScriptedModel({"A": "x.\n\n", "B": "yy"}), layout="contiguous")
    run(s, 3)
    assert text_of(s._board.common) == "Q\n\n"
    assert text_of(block(s, "A")) == "<of A>\n\nA1: planx.\n\nA2:"
    assert text_of(block(s, "B")) == "<of B>\n\nB1: hiyy"


def test_the_length_of_a_step_is_limited() -> None:
    s = session(ScriptedModel(), step_rule=StepRule(max_step_tokens=3))
    run(s, 4)
    assert [(step.text, step.forced) for step in s.steps] == [
        ("A1: planzz", True),
        ("B1: hizz", True),
    ]
    assert text_of(block(s, "A")) == "\n\nA2:"
    assert s.stats.workers["A"].forced == 1


def test_steps_never_end_without_a_rule() -> None:
    s = session(ScriptedModel({"A": "x.\n\ny.\n\n"}), 1, step_rule=None)
    run(s, 6)
    assert s.steps == []
    assert s.unfinished["A"].startswith("A1: planx.\n\ny.\n\n")


def test_the_question_goes_to_the_next_one_to_start_a_step() -> None:
    model = ScriptedModel({"A": "aaaa.\n\na.\n\n", "B": "bbbbbbbbb.\n\n"})
    s = session(model, check_every=6)
    run(s, 12)
    fed = {"A": "", "B": ""}
    for names, inputs, _ in model.forwards:
        for name, ids in zip(names, inputs, strict=True):
            fed[name] += TOKENIZER.decode(ids)
    # A ends its step after 2 * 5 tokens of both and is asked; its next step comes too early.
    assert ".\n\nA2: check?" in fed["A"]
    assert ".\n\nA3:z" in fed["A"]
    # 10 + 10 tokens later it is B's turn.
    assert ".\n\nB2: check?" in fed["B"]
    assert [s.stats.workers[name].checks for name in "AB"] == [1, 1]
    assert "check?" not in session_texts(check_every=0)


def session_texts(**options: Any) -> str:
    s = session(ScriptedModel({"A": "a.\n\n" * 5, "B": "b.\n\n" * 5}), **options)
    run(s, 10)
    return s.history + "".join(s.unfinished.values())


# Ends


def test_an_answer_in_a_finished_step_ends_it() -> None:
    s = session(ScriptedModel({"A": "It is [42]. And\n\n", "B": "Is it [41]?\n\n"}))
    while not s.done:
        s.step()
    assert (s.answer, s.answered_by) == ("41", "B")
    s = session(ScriptedModel({"A": "It is [42]. And"}))
    run(s, 20)
    assert not s.done  # the step is not finished


def test_what_may_not_be_written() -> None:
    model = ScriptedModel({"A": "<think>###</think>"}, tokenizer=THINKING)
    eos = THINKING.eos_token_id
    model.scripts["A"] += [eos]
    s = session(model, 1)
    run(s, 6)
    written = THINKING.decode(s.tokens("A"))
    assert "##" in written
    assert "###" not in written
    assert "</think>" not in written
    assert eos not in s.tokens("A")
    assert s.active == ["A"]
    assert THINKING.decode(s.prompt_ids) == "Q\n\n<think>\n"


def test_the_end_of_text_finishes_a_worker_where_it_is_allowed() -> None:
    model = ScriptedModel({"A": "done"})
    model.scripts["A"] += [TOKENIZER.eos_token_id]
    s = session(model, forbid=())
    run(s, 5)
    assert s.active == ["B"]
    assert s.steps[0].text == "A1: plandone"
    assert s.tokens("A")[-1] == TOKENIZER.eos_token_id
    assert text_of(s._board.common) == "Q\n\n\n\nA1: plandone"
    assert views(s) == {"B": ["common", "B"]}
    assert s.step() == {"B": ord("z")}
    with pytest.raises(ValueError, match="worker 'A' must be active, it has finished"):
        s.step(["A"])


def test_a_stop_text_finishes_a_worker() -> None:
    s = session(ScriptedModel({"A": "so STOP it", "B": "no stop"}), stop=["STOP"])
    run(s, 8)
    assert s.active == ["B"]
    assert s.steps[0].text == "A1: planso STOP"
    # The opening holds "plan" already, which nobody has written.
    s = session(ScriptedModel({"A": "nplan"}), stop=["plan"])
    s.step()
    assert s.active == ["A", "B"]
    with pytest.raises(ValueError, match="stop must not hold an empty text"):
        session(ScriptedModel(), stop=[""])


@pytest.mark.parametrize("keep", ["history", "frozen", "drop"])
@pytest.mark.parametrize("layout", ["combined", "contiguous"])
def test_a_worker_leaves(keep: Any, layout: str) -> None:
    s = session(ScriptedModel({"A": "abcdef"}), 3, layout=layout)
    s.step()
    s.step()
    s.finish_worker("A", keep)
    assert s.active == ["B", "C"]
    own = "\n\nA1: planab" if layout == "combined" else "<of A>\n\nA1: planab"
    frozen = keep == "frozen" or (keep == "history" and layout == "contiguous")
    assert ("A" in views(s)["B"]) == frozen
    if frozen:
        assert text_of(block(s, "A")) == own  # also the token that was not fed
    moved = keep == "history" and layout == "combined"
    assert text_of(s._board.common) == "Q\n\n" + (own if moved else "")
    assert len(s.steps) == (keep == "history")
    assert set(s.step()) == {"B", "C"}
    s.finish_worker("B")
    s.finish_worker("C")
    assert s.done
    assert s.step() == {}


def test_leaving_is_checked() -> None:
    s = session(ScriptedModel())
    with pytest.raises(ValueError, match="keep must be history, frozen or drop, got 'all'"):
        s.finish_worker("A", "all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="worker must be one of A, B, got 'X'"):
        s.finish_worker("X")


def test_a_worker_joins() -> None:
    model = ScriptedModel({"C": "!"})
    s = session(model)
    s.step()
    prefills = len(model.prefills)
    s.add_worker("C", at_index=1)
    assert s.workers == ["A", "C", "B"]
    # The pivot is new: two workers have none.
    assert views(s)["B"] == ["common", "step_header", "A", "pivot 1", "C", "own_header", "B"]
    assert [name for name, *_ in model.prefills[prefills:]] == ["pivot 1"]
    assert s.step()["C"] == ord("!")
    s.add_worker("D")
    assert [name for name, *_ in model.prefills[prefills:]] == ["pivot 1"]
    assert [s._worker(name).seed for name in "ABCD"] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="name must be new, got 'A'"):
        s.add_worker("A")
    with pytest.raises(ValueError, match=r"at_index must be in \[0, 4\], got 9"):
        s.add_worker("E", at_index=9)


def test_alone_then_together() -> None:
    s = session(ScriptedModel(), 1)
    assert views(s) == {"A": ["common", "A"]}
    s.add_worker("B")
    assert views(s)["A"] == ["common", "step_header", "B", "own_header", "A"]
    assert text_of(s._board._extra["own_header"]) == "<pivot><own>"


# Control


def test_remarks() -> None:
    model = ScriptedModel({"A": "ab"})
    s = session(model)
    s.step()
    s.inject("Tool says 7.")
    s.inject(" (aside)", to="A")
    assert text_of(s._board.common) == "Q\n\n\n\nTool says 7."
    assert (s.steps[0].worker, s.history) == ("", "Tool says 7.")
    s.step()
    assert TOKENIZER.decode(model.forwards[-1][1][0]) == "a (aside)"
    assert s.unfinished["A"] == "A1: plana (aside)b"
    assert s.answer is None
    with pytest.raises(ValueError, match="got 'X'"):
        s.inject("x", to="X")


def test_only_some_workers_step() -> None:
    model = ScriptedModel()
    s = session(model, 3)
    assert set(s.step(["B"])) == {"B"}
    assert set(s.step(["C", "A"], visibility="lagged")) == {"A", "C"}
    assert model.forwards[-1][2] == "lagged"
    assert [len(s.tokens(name)) for name in "ABC"] == [10, 8, 8]
    with pytest.raises(ValueError, match="workers must be unique"):
        s.step(["A", "A"])


def test_what_a_worker_sees_and_how_much() -> None:
    s = session(ScriptedModel({"A": "ab"}))
    s.step()
    assert s.view("B") == [
        ("common", "Q\n\n"),
        ("step_header", "<others>"),
        ("A", "\n\nA1: plan"),
        ("own_header", "<pivot><own>"),
        ("B", "\n\nB1: hi"),
    ]
    s.set_weight("B", "A", bias=-1.5, gain=0.5)
    with pytest.raises(ValueError, match="block must be one of common, step_header, A"):
        s.set_weight("B", "X")


def test_a_fork_goes_its_own_way() -> None:
    model = ScriptedModel({"A": "ab.\n\n", "B": "xy"})
    s = session(model)
    s.step()
    twin = s.fork()
    before = (text_of(s._board.common), s.unfinished, s.tokens("A"), s.stats.to_dict()["workers"])
    for _ in range(3):
        twin.step()
    assert len(twin.steps) == 1
    twin.inject("no")
    twin.add_worker("C")
    assert (text_of(s._board.common), s.unfinished, s.tokens("A")) == before[:3]
    assert s.stats.to_dict()["workers"] == before[3]
    assert s.steps == []
    assert s.workers == ["A", "B"]
    s.step()


def test_the_finisher_asks_behind_everything() -> None:
    model = ScriptedModel({"A": "ab", "B": "xyz", "aside": "12]3"})
    s = session(model)
    s.step()
    s.step()
    assert s.conclude() == "12"
    assert (s.answer, s.answered_by) == ("12", "")
    asked = [ids for names, (ids, *_), _ in model.forwards if names == ["aside"]]
    assert TOKENIZER.decode(asked[0]) == " So ["
    assert asked[1:] == [[ord("1")], [ord("2")]]
    # What was pending has been fed before, and the workers go on from there.
    assert text_of(block(s, "A")) == "\n\nA1: planab"
    assert s.stats.forwards == 2
    assert s.step() == {"A": ord("z"), "B": ord("z")}
    assert text_of(block(s, "A")) == "\n\nA1: planab"
    model.scripts["aside"] = TOKENIZER.encode("no number")
    assert s.conclude(Finisher("Now", max_tokens=5)) == "no nu"
    model.scripts["aside"] = [ord("7"), TOKENIZER.eos_token_id]
    assert s.conclude() == "7"


# Events


def test_streams_say_who_writes_what() -> None:
    pieces: list[Piece] = []
    steps: list[Step] = []
    model = ScriptedModel({"A": "\u00e9.\n\n", "B": "xx"})
    s = session(model, stream=pieces.append, on_step=steps.append)
    run(s, 4)
    for name in "AB":
        mine = [piece for piece in pieces if piece.worker == name]
        assert [t for piece in mine for t in piece.tokens] == s.tokens(name)
        assert "".join(piece.text for piece in mine) == TOKENIZER.decode(s.tokens(name))
    mine = [piece for piece in pieces if piece.worker == "A"]
    assert [(p.number, p.text, p.given) for p in mine] == [
        (0, "\n\n", True),
        (1, "A1: plan", True),
        (1, "", False),
        (1, "\u00e9", False),
        (1, ".\n\n", False),
        (2, "A2:", True),
        (2, "z", False),
    ]
    assert [step.text for step in steps] == ["A1: plan\u00e9."]


def test_statistics() -> None:
    s = session(ScriptedModel({"A": "x.\n\n"}), mass_every=2)
    run(s, 4)
    figures = s.stats.to_dict()
    assert (figures["forwards"], figures["sampled"]) == (4, 8)
    assert figures["workers"]["A"] == {
        "sampled": 4,
        "given": 12,
        "steps": 1,
        "forced": 0,
        "checks": 0,
    }
    table = figures["mass"]
    assert set(table["A"]) == {"common", "step_header", "own_header", "A", "B"}
    assert sum(table["A"].values()) == pytest.approx(1)
    assert all(seconds >= 0 for seconds in figures["seconds"].values())
    assert s.stats.tokens_per_second > 0
    assert session(ScriptedModel(), mass_every=0).stats.mass.table() == {}


# Failures


def test_a_failed_forward_changes_nothing() -> None:
    model = ScriptedModel({"A": "ab", "B": "xy"})
    s = session(model)
    s.step()
    before = (s.unfinished, s.tokens("A"))
    model.fail = RuntimeError("out of power")
    with pytest.raises(RuntimeError, match="out of power"):
        s.step()
    assert (s.unfinished, s.tokens("A")) == before
    assert s.step() == {"A": ord("b"), "B": ord("y")}


def test_a_failed_choice_is_made_again_without_a_forward() -> None:
    calls = 0

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("no")
        return scores

    model = ScriptedModel({"A": "ab", "B": "xy"})
    s = session(model, logits_processor=processor)
    s.step()
    with pytest.raises(RuntimeError, match="no"):
        s.step()
    assert len(model.forwards) == 2
    assert s.step() == {"A": ord("b"), "B": ord("y")}
    assert len(model.forwards) == 2


def test_a_move_that_failed_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    s = session(ScriptedModel({"A": "x.\n\n"}))
    s.step()
    ws = s._board.ws
    move, failed = ws.move, []

    def stubborn(*arguments: Any, **options: Any) -> Any:
        if not failed:
            failed.append(1)
            raise PoolExhausted("full")
        return move(*arguments, **options)

    monkeypatch.setattr(ws, "move", stubborn)
    with pytest.raises(PoolExhausted):
        s.step()
    assert len(s.steps) == 1
    assert text_of(s._board.common) == "Q\n\n"
    s.step()
    assert text_of(s._board.common) == "Q\n\n\n\nA1: planx"
    assert text_of(block(s, "A")) == ".\n\nA2:"
    assert len(s.steps) == 1


def test_a_callback_that_fails_is_not_called_twice_for_the_same() -> None:
    seen: list[Piece] = []

    def stream(piece: Piece) -> None:
        seen.append(piece)
        if len(seen) == 3:
            raise RuntimeError("broken pipe")

    s = session(ScriptedModel(), stream=stream)
    with pytest.raises(RuntimeError, match="broken pipe"):
        s.step()
    s.step()
    assert [t for p in seen if p.worker == "A" for t in p.tokens] == s.tokens("A")


def test_a_full_pool_leaves_the_session_as_it_was() -> None:
    model = ScriptedModel(pages=6)
    s = session(model)
    with pytest.raises(PoolExhausted):
        run(s, 200)
    before = (s.unfinished, s.stats.sampled)
    with pytest.raises(PoolExhausted):
        s.step()
    assert (s.unfinished, s.stats.sampled) == before


def test_nan_logits_and_nothing_allowed() -> None:
    def nan(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, torch.nan)

    with pytest.raises(ValueError, match="NaN"):
        session(ScriptedModel(), logits_processor=nan).step()
    with pytest.raises(ValueError, match="no token is possible"):
        session(ScriptedModel(), forbid=list(range(len(TOKENIZER)))).step()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"check_every": -1}, "check_every must be at least 0, got -1"),
        ({"mass_every": -1}, "mass_every must be at least 0, got -1"),
        ({"visibility": "late"}, "visibility must be inclusive or lagged, got 'late'"),
        ({"seed": [1, 2, 3]}, "seed must be one for each of 2 workers, got 3"),
        ({"workers": ["A", "A"]}, "workers must be unique names"),
        ({"workers": 5}, r"workers must be names, or in \[1, 4\]"),
        ({"texts": "xx"}, "language must be one of"),
    ],
)
def test_arguments(options: dict[str, Any], text: str) -> None:
    model = ScriptedModel()
    with pytest.raises(ValueError, match=text):
        session(model, **options)
    assert model.prefills == []


def test_ids_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"prompt must hold ids in \[0, 260\), got \[999\]"):
        HogwildSession(ScriptedModel(), TOKENIZER, [999])


def test_sampling_is_reproducible_and_of_each_worker() -> None:
    def sampled(seed: Any, workers: Any = ("A", "B"), order: int = 1) -> list[list[int]]:
        flat = ScriptedModel({})
        options: Any = {"sampling": Sampling(30.0, top_k=90), "seed": seed, "workers": workers}
        options["texts"] = replace(TEXTS, openings=(" hi", " hi"))
        s = session(flat, step_rule=None, forbid=[], eos_ids=(), **options)
        for _ in range(20):
            for name in list(workers)[::order]:
                s.step([name])
        return [s.tokens(name)[-20:] for name in workers]

    first = sampled(5)
    assert first == sampled(5) == sampled([5, 6]) == sampled(5, order=-1)
    assert first[0] != first[1]
    assert sampled(6)[0] == first[1]
    assert sampled([7, 5])[1] == first[0]
