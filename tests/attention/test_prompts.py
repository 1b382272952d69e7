"""The prompt of a team, and the file that its texts come from."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignops.attention.prompts import Finisher, Texts, build_prompt, prompt_ids, worker_names
from alignops.testing import ByteTokenizer

TEXTS = Texts.load()


class Chat(ByteTokenizer):
    """A chat template as a function."""

    chat_template: Any = "yes"
    system = True
    opening = ""

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        jinja2 = pytest.importorskip("jinja2")
        if messages[0]["role"] == "system" and not self.system:
            raise jinja2.TemplateError("System role not supported")
        text = "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
        return text + "<assistant>\n" + self.opening


def test_the_rules_say_what_workers_must_know() -> None:
    text = build_prompt("What is 2 + 3?", ["Ada", "Ben", "Cleo"], TEXTS, ByteTokenizer())
    assert "3 assistants: Ada, Ben, Cleo" in text
    for title in (TEXTS.history_title, TEXTS.others_title, TEXTS.own_title):
        assert title in text
    assert "\\boxed{answer}" in text
    assert "What is 2 + 3?" in text
    assert text.index("What is 2 + 3?") < text.index("keep track of who does what")
    assert text.endswith(TEXTS.history_title)
    assert 2 <= len(TEXTS.traces) <= 5
    assert any("twice" in trace[0] for trace in TEXTS.traces)
    assert "{" not in text.replace("\\boxed{", "")


def test_system_message_or_first_user_message() -> None:
    tokenizer = Chat()
    with_system = build_prompt("Task?", ["Ada", "Ben"], TEXTS, tokenizer)
    assert with_system.startswith("<system>You take part")
    assert "</><user>## The task" in with_system
    tokenizer.system = False
    without = build_prompt("Task?", ["Ada", "Ben"], TEXTS, tokenizer)
    assert without.startswith("<user>You take part")
    assert without.count("You take part") == 1
    assert without.endswith("<assistant>\n" + TEXTS.history_title)


@pytest.mark.parametrize("opening", ["", "<think>\n", "<think>", "<think><think>\n"])
def test_thinking_begins_exactly_once_at_the_end(opening: str) -> None:
    tokenizer = Chat(["<think>", "</think>"])
    tokenizer.opening = opening
    text = build_prompt("Task?", ["Ada", "Ben"], TEXTS, tokenizer)
    assert text.endswith("<assistant>\n<think>\n" + TEXTS.history_title)
    assert text.count("<think>") == 1


def test_thinking_begins_again_behind_a_closed_one() -> None:
    tokenizer = Chat(["<think>", "</think>"])
    tokenizer.opening = "<think>\n\n</think>\n\n"
    text = build_prompt("Task?", ["Ada", "Ben"], TEXTS, tokenizer)
    assert text.endswith("</think>\n\n<think>\n" + TEXTS.history_title)


def test_no_thinking_where_the_tokenizer_does_not_know_it() -> None:
    assert "<think>" not in build_prompt("Task?", ["Ada"], TEXTS, Chat())


def test_ids_are_taken_as_they_are() -> None:
    assert prompt_ids([1, 2], ["Ada"], TEXTS, None) == [1, 2]
    assert prompt_ids(torch.tensor([3]), ["Ada"], TEXTS, None) == [3]
    with pytest.raises(ValueError, match=r"prompt must have shape \(L,\), got \(1, 2\)"):
        prompt_ids(torch.zeros(1, 2), ["Ada"], TEXTS, None)


def test_texts_of_ones_own(tmp_path: Path) -> None:
    source = Path(str(Texts.load.__globals__["_FOLDER"])) / "en.json"
    found = json.loads(source.read_text())
    assert set(found) == {field.name for field in fields(Texts)}
    found["names"] = ["Uno", "Due"]
    (tmp_path / "it.json").write_text(json.dumps(found))
    assert Texts.load(tmp_path / "it.json").names == ("Uno", "Due")
    del found["check"]
    found["chek"] = ""
    (tmp_path / "it.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="missing or unknown: check, chek"):
        Texts.load(tmp_path / "it.json")
    with pytest.raises(ValueError, match="language must be one of en, got 'xx'"):
        Texts.load("xx")


def test_prompts_without_rules() -> None:
    plain = TEXTS.without_prompts()
    assert build_prompt("2 + 3?", ["Ada", "Ben"], plain, ByteTokenizer()) == "2 + 3?\n\n"
    assert plain.prefix == TEXTS.prefix


def test_braces_that_are_no_names_stay() -> None:
    texts = replace(TEXTS, prefix="{name} {x} \\boxed{y} {}:")
    assert texts.filled(texts.prefix, name="Ada") == "Ada {x} \\boxed{y} {}:"


def test_names() -> None:
    assert worker_names(2, TEXTS) == ("Ada", "Ben")
    assert worker_names(["X", "Y"], TEXTS) == ("X", "Y")
    assert worker_names("Solo", TEXTS) == ("Solo",)
    for wrong in (0, 17):
        with pytest.raises(ValueError, match=rf"workers must be names, or in \[1, 16\].*{wrong}"):
            worker_names(wrong, TEXTS)
    for names in (["A", "A"], [], ["A", ""]):
        with pytest.raises(ValueError, match="workers must be unique names"):
            worker_names(names, TEXTS)


def test_finishers() -> None:
    assert TEXTS.finisher("answer").max_tokens == 16
    assert TEXTS.finisher("expression").max_tokens == 64
    assert TEXTS.finisher("code").max_tokens == 1024
    own = Finisher("So:", max_tokens=3)
    assert TEXTS.finisher(own) is own
    with pytest.raises(ValueError, match="finisher must be one of answer, expression, code"):
        TEXTS.finisher("essay")
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        Finisher("So:", max_tokens=0)
    with pytest.raises(ValueError, match="must not both be empty"):
        Finisher("")
