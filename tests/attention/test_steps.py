"""Where steps end, and what may not be written (spec: one step is about one paragraph)."""

import pytest
import torch

from alignops.attention.steps import StepEnds, StepRule
from alignops.attention.tokens import Detokenizer, Forbidden, Vocabulary
from alignops.testing import ByteTokenizer

RULE = StepRule()
WORDS = ["\n\n", ".\n\n", "\n\n\n", "##"]


def ends(text: str, words: list[str] = WORDS, rule: StepRule | None = RULE) -> list[int]:
    """Lengths of the prefixes of the text, in tokens, whose last token ends a step."""
    tokenizer = ByteTokenizer(words)
    known = StepEnds(rule, Vocabulary(tokenizer, len(tokenizer)))
    tokens = tokenizer.encode(text)
    return [i + 1 for i in range(len(tokens)) if known.ended(tokens[:i], tokens[i])]


@pytest.mark.parametrize(
    "sentence",
    [
        *("So x = 4.", "Done!", "Is it?", "And so on\u2026", 'She said "no."', "**It is 4.**"),
        *("(Yes.)", "\u56e0\u6b64x\u662f4\u3002", "\u597d\uff01", "\u0939\u093e\u0964"),
        *("\u0646\u0639\u0645\u061f", "```\ncode\n```\nThat is all."),
    ],
)
@pytest.mark.parametrize("words", [WORDS, ["\n\n"], []], ids=["long", "whole", "split"])
def test_a_finished_sentence_and_a_blank_line_end_a_step(sentence: str, words: list[str]) -> None:
    text = sentence + "\n\n"
    assert ends(text, words) == [len(ByteTokenizer(words).encode(text))]


@pytest.mark.parametrize(
    "text",
    [
        *("Two cases:\n\n", "First,\n\n", "a;\n\n", "x = 4\n\n", "So.\n", "So. ", "\n\n"),
        *("\n\n**A [2]:**\n\n", "```python\nprint(1).\n\n", "~~~\nDone.\n\n"),
        *("````\n```\nDone.\n\n", "**Cases:**\n\n"),
    ],
)
@pytest.mark.parametrize("words", [WORDS, []], ids=["whole", "split"])
def test_what_does_not_end_a_step(text: str, words: list[str]) -> None:
    assert ends(text, words) == []


def test_a_blank_line_ends_one_step_only() -> None:
    assert ends("One.\n\nTwo:\n\nThree.\n\n", ["\n\n"]) == [5, 17]
    # A token before decides nothing: only the one that completes the separator does.
    assert ends("One.\n\n x", []) == [6]


def test_rules_of_ones_own() -> None:
    assert ends("a;;b.;;", ["\n\n"], StepRule(separator=";;")) == [7]
    assert ends("a|\n\nb.\n\n", ["\n\n"], StepRule(enders="|")) == [3]
    assert ends("All.\n\n", rule=None) == []
    with pytest.raises(ValueError, match="separator must not be empty"):
        StepRule(separator="")
    with pytest.raises(ValueError, match="max_step_tokens must be at least 1, got 0"):
        StepRule(max_step_tokens=0)


def test_a_tokenizer_without_separator_or_padding_is_refused() -> None:
    class Blind(ByteTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [i for i in super().encode(text) if i != 10]

    class Endless(ByteTokenizer):
        def __init__(self) -> None:
            super().__init__()
            self.eos_token_id = self.pad_token_id = None

    with pytest.raises(ValueError, match=r"tokens for the separator '\\n\\n', got \[\]"):
        StepEnds(StepRule(), Vocabulary(Blind(), 257))
    with pytest.raises(ValueError, match="padding token or an end-of-text token, got neither"):
        Vocabulary(Endless(), 256)


def test_a_forbidden_text_is_kept_out_however_it_is_cut() -> None:
    tokenizer = ByteTokenizer(["##", "#\n", "a###b"])
    vocabulary = Vocabulary(tokenizer, len(tokenizer))
    forbidden = Forbidden(["###"], vocabulary)
    torch.manual_seed(0)
    written = ""
    choice = [ord("#"), 256, 257, 258, ord("x")]
    for _ in range(300):
        scores = torch.full((1, len(tokenizer)), -torch.inf)
        scores[0, choice] = torch.rand(5)
        allowed = forbidden.apply(scores, [written[-forbidden.longest :]])
        written += tokenizer.decode([int(allowed.argmax())])
    assert "###" not in written
    assert "##" in written
    with pytest.raises(ValueError, match=r"forbid must hold ids in \[0, 260\), got 999"):
        Forbidden([999], vocabulary)
    with pytest.raises(ValueError, match="must not hold an empty text"):
        Forbidden([""], vocabulary)


def test_scores_without_anything_forbidden_are_returned_as_they_are() -> None:
    vocabulary = Vocabulary(ByteTokenizer(), 257)
    scores = torch.randn(2, 257)
    before = scores.clone()
    assert Forbidden([], vocabulary).apply(scores, ["", ""]) is scores
    Forbidden(["a", 3], vocabulary).apply(scores, ["", ""])
    assert torch.equal(scores, before)


def test_streamed_text_is_the_text() -> None:
    tokenizer = ByteTokenizer(["\n\n"])
    text = "na\u00efve \u4e2d\u6587 \U0001f600\n\nend"
    stream = Detokenizer(Vocabulary(tokenizer, len(tokenizer)))
    pieces = [stream.push([i]) for i in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    twin = stream.fork()
    assert (stream.push([65]), twin.push([66])) == ("A", "B")
