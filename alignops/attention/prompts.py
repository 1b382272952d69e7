"""What workers are told: system text, headers, step prefixes, questions, finishers.

All texts of a language are one JSON file in `alignops/attention/texts`; `Texts.load` reads it, or
one of your own. Names in braces are filled in, any other braces stay as they are.

| name | meaning |
|---|---|
| `{count}`, `{names}`, `{first}`, `{second}` | how many workers, all their names, the first two |
| `{name}`, `{number}` | of the worker and its step |
| `{problem}` | the task |
| `{history_title}`, `{others_title}`, `{own_title}` | the texts of these names |

Source: what the texts must say: arXiv 2504.06261, section 3.3; their wording is our own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from alignops._checks import check

_FOLDER = Path(__file__).parent / "texts"


@dataclass(frozen=True)
class Finisher:
    """How an answer is asked for when there is no time left.

    Attributes:
        text: appended to everything that has been written.
        opening: of the answer, appended to that.
        until: the answer ends in front of this text; "": at the end of text.
        max_tokens: most tokens of the answer.

    Raises:
        ValueError: nothing is appended, or `max_tokens` is below 1.
    """

    text: str
    opening: str = ""
    until: str = ""
    max_tokens: int = 16

    def __post_init__(self) -> None:
        check(bool(self.text + self.opening), "Finisher: text and opening must not both be empty")
        check(
            self.max_tokens >= 1, f"Finisher: max_tokens must be at least 1, got {self.max_tokens}"
        )


@dataclass(frozen=True)
class Texts:
    """The texts of one language; `dataclasses.replace` makes another set.

    Attributes:
        language: its code.
        names: of workers, where none are given.
        heading: mark of titles, which workers may not write.
        history_title: stands before the finished steps, at the end of the prompt.
        others_title, own_title: of unfinished steps.
        step_header, pivot, own_header: what the blocks of layouts say; see `layouts`.
        worker_title: of a worker's text in the layout "contiguous".
        prefix: of each step.
        openings: what the first worker begins with behind the prefix, and all others.
        system: the rules of working together.
        advice_title, advice: what helps; an empty list leaves it out.
        traces_title, traces: worked examples, each a list of paragraphs.
        task: the end of the prompt.
        check: the question whether work is done twice.
        finishers: by name.
        answer_pattern: a regular expression whose first group is a final answer.
        thinking: pairs of tokens that begin and end the thinking of reasoning models.
    """

    language: str
    names: tuple[str, ...]
    heading: str
    history_title: str
    others_title: str
    own_title: str
    step_header: str
    pivot: str
    own_header: str
    worker_title: str
    prefix: str
    openings: tuple[str, str]
    system: str
    advice_title: str
    advice: tuple[str, ...]
    traces_title: str
    traces: tuple[tuple[str, ...], ...]
    task: str
    check: str
    finishers: Mapping[str, Finisher]
    answer_pattern: str
    thinking: tuple[tuple[str, str], ...]

    @staticmethod
    def load(source: str | Path = "en") -> Texts:
        """The texts of a language, or of a file.

        Args:
            source: code of a language that the package has, or a JSON file.

        Raises:
            ValueError: there is no such language, or the file does not hold all texts, or others.

        Example:
            >>> texts = Texts.load("en")
            >>> texts.filled(texts.prefix, name="Ada", number=2)
            '**Ada [2]:**'
        """
        path = Path(source)
        if not path.suffix:
            path = _FOLDER / f"{source}.json"
            known = sorted(p.stem for p in _FOLDER.glob("*.json"))
            check(
                path.stem in known,
                f"Texts.load: language must be one of {', '.join(known)}, got {source!r}",
            )
        found = json.loads(path.read_text(encoding="utf-8"))
        names = {field.name for field in fields(Texts)}
        check(
            isinstance(found, dict) and set(found) == names,
            f"Texts.load: {path.name} must hold {', '.join(sorted(names))}; "
            f"missing or unknown: {', '.join(sorted(set(found) ^ names))}",
        )
        return Texts(**{name: _read(name, value) for name, value in found.items()})

    def filled(self, text: str, **values: Any) -> str:
        """A text in which names in braces have got their values.

        Args:
            text: may name titles and `values`.
            values: what else may be named.
        """
        known = {
            "history_title": self.history_title,
            "others_title": self.others_title,
            "own_title": self.own_title,
            **values,
        }
        return re.sub(r"\{(\w+)\}", lambda m: str(known.get(m[1], m[0])), text)

    def without_prompts(self) -> Texts:
        """The same without system text, advice, traces and titles: for prompts of your own.

        What is left are the task itself, headers, prefixes, questions and finishers.
        """
        return replace(self, system="", advice=(), traces=(), task="{problem}", history_title="")

    def instructions(self, names: Sequence[str]) -> str:
        """System text, advice and traces for workers with these names."""
        values = {
            "count": len(names),
            "names": ", ".join(names),
            "first": names[0],
            "second": [*names[1:], *(n for n in self.names if n != names[0])][0],
        }
        parts = [self.system]
        if self.advice:
            parts += [self.advice_title, "\n".join(f"* {line}" for line in self.advice)]
        if self.traces:
            parts += [self.traces_title, *("\n\n".join(trace) for trace in self.traces)]
        return self.filled("\n\n".join(part for part in parts if part), **values)

    def finisher(self, finisher: str | Finisher) -> Finisher:
        """A finisher by its name, or one as it is.

        Raises:
            ValueError: there is no such finisher.
        """
        if isinstance(finisher, Finisher):
            return finisher
        known = self.finishers
        check(finisher in known, f"finisher must be one of {', '.join(known)}, got {finisher!r}")
        return known[finisher]

    def opening(self, name: str, index: int) -> str:
        """What worker `index` says first, behind the prefix of its step."""
        return self.filled(self.openings[min(index, 1)], name=name)


def worker_names(workers: int | Sequence[str], texts: Texts) -> tuple[str, ...]:
    """Names of workers: as given, or the first ones of the texts.

    Raises:
        ValueError: there are fewer names than workers, none, an empty one, or one that comes twice.
    """
    if isinstance(workers, int):
        known = texts.names
        check(
            1 <= workers <= len(known),
            f"workers must be names, or in [1, {len(known)}], the number of names that the texts "
            f"have, got {workers}",
        )
        return known[:workers]
    names = (workers,) if isinstance(workers, str) else tuple(workers)
    check(
        len(names) >= 1 and all(names) and len(set(names)) == len(names),
        f"workers must be unique names, got {', '.join(map(repr, names)) or 'none'}",
    )
    return names


def build_prompt(problem: str, names: Sequence[str], texts: Texts, tokenizer: Any) -> str:
    """The whole prompt of a team, up to where the finished steps begin.

    The rules are the system message, or the beginning of the first user message for chat templates
    that refuse one; without a chat template both are plain text. Of models that think in tokens of
    their own, the beginning of thinking stands at the end exactly once.

    Args:
        problem: the task.
        names: of the workers.
        texts: what they are told.
        tokenizer: whose chat template is used.

    Returns:
        The text, with special tokens spelled out.
    """
    rules = texts.instructions(names)
    task = texts.filled(texts.task, problem=problem)
    prompt = _thinking(_chat(rules, task, tokenizer), texts, tokenizer)
    return prompt + texts.history_title


def prompt_ids(
    prompt: str | Sequence[int] | Tensor, names: Sequence[str], texts: Texts, tokenizer: Any
) -> list[int]:
    """Token ids of a team's prompt: of a task, see `build_prompt`, or ids (L,) as they are."""
    if isinstance(prompt, Tensor):
        check(prompt.dim() == 1, f"prompt must have shape (L,), got {tuple(prompt.shape)}")
        return [int(i) for i in prompt.tolist()]
    if not isinstance(prompt, str):
        return [int(i) for i in prompt]
    # A chat template has spelled out what marks the beginning.
    plain = not getattr(tokenizer, "chat_template", None)
    text = build_prompt(prompt, names, texts, tokenizer)
    return list(tokenizer.encode(text, add_special_tokens=plain))


def _chat(rules: str, task: str, tokenizer: Any) -> str:
    joined = "\n\n".join(part for part in (rules, task) if part)
    if not getattr(tokenizer, "chat_template", None):
        return joined + "\n\n"
    user = [{"role": "user", "content": joined}]
    whole = [{"role": "system", "content": rules}, {"role": "user", "content": task}]
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    if rules:
        from jinja2 import TemplateError

        try:
            text = tokenizer.apply_chat_template(whole, **options)
        except TemplateError:
            pass  # the template's way to say that there is no such role
        else:
            # Some leave it out without a word.
            if rules.strip() in text:
                return str(text)
    return str(tokenizer.apply_chat_template(user, **options))


def thinking_markers(texts: Texts, tokenizer: Any) -> tuple[str, str] | None:
    """Tokens around the thinking of a reasoning model, if the tokenizer has them."""
    known = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    return next((pair for pair in texts.thinking if set(pair) <= set(known)), None)


def _thinking(prompt: str, texts: Texts, tokenizer: Any) -> str:
    markers = thinking_markers(texts, tokenizer)
    if markers is None:
        return prompt
    begin, _ = markers
    head = prompt.rstrip()
    if not head.endswith(begin):
        return f"{prompt}{begin}\n"
    while head[: -len(begin)].rstrip().endswith(begin):
        head = head[: -len(begin)].rstrip()
    return f"{head}\n"


def _read(name: str, value: Any) -> Any:
    """A value of the file, as the field wants it."""
    if name == "finishers":
        return {key: Finisher(**entry) for key, entry in value.items()}
    if name in ("names", "advice"):
        return tuple(value)
    if name in ("openings", "traces", "thinking"):
        return tuple(entry if isinstance(entry, str) else tuple(entry) for entry in value)
    return "\n".join(value) if isinstance(value, list) else value
