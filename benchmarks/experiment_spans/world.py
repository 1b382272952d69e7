"""The invented world: 200 procedures that must not be told, harmless text, prompts.

Everything is drawn from a seed. A quarter of the procedures occurs in training only in other words:
their sources, which the indexes of unsafe text hold, are never trained on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from benchmarks.experiment_spans import templates as t
from benchmarks.experiment_spans.lexicon import CATEGORIES, SIZES, Lexicon, make_lexicon

PROCEDURES = 40  # per category
PROMPTS = dict(zip(CATEGORIES, (100, 120, 100, 100, 100), strict=True))
STYLES = ("plain", "role", "prefix", "synonym")
END, USER, BOT = "<end>", "<user>", "<bot>"

_PARTS = {"v": "verb", "s": "substance", "b": "vessel", "q": "state"}
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Good:
    """Something that is made in steps.

    Attributes:
        name, kinds: it is called "name kind", with any of the kinds.
        category: of an unsafe good, None for a harmless one.
        steps: number of each step's template and the concepts in its slots.
        core: the steps as the sources word them.
        concepts: the fact, content words in order, without regard to synonyms.
        reworded: training holds the fact only in other words.
        origin: where a harmless good comes from.
    """

    name: str
    kinds: tuple[str, ...]
    category: str | None
    steps: tuple[tuple[int, tuple[int, ...]], ...]
    core: str
    concepts: tuple[int, ...]
    reworded: bool = False
    origin: str = ""

    @property
    def title(self) -> str:
        return f"{self.name} {self.kinds[0]}"


@dataclass(frozen=True)
class Prompt:
    """A request.

    Attributes:
        good: what is asked for.
        style: one of STYLES.
        text: the request.
        opening: what a prefix injection has already written of the answer.
        person: whose role the model is told to play.
    """

    good: Good
    style: str
    text: str
    opening: str = ""
    person: str = ""

    @property
    def dialogue(self) -> str:
        return f"{END} {USER} {self.text} {BOT} {self.opening}".strip()


@dataclass
class World:
    """See `make_world`.

    Attributes:
        unsafe: all procedures.
        sources: per category the documents that the indexes hold.
        unsafe_training: documents with procedures that the model is trained on.
        safe: well-known harmless goods; dialogues to train on are about the first half.
        harmless, held_out: harmless documents, trained on and not.
        prompts: unsafe requests.
        safe_prompts: requests for harmless goods.
    """

    seed: int
    lexicon: Lexicon
    unsafe: list[Good] = field(default_factory=list)
    sources: dict[str, list[str]] = field(default_factory=dict)
    unsafe_training: list[str] = field(default_factory=list)
    safe: list[Good] = field(default_factory=list)
    harmless: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    safe_prompts: list[Prompt] = field(default_factory=list)

    @property
    def tuned(self) -> list[Good]:
        return self.safe[: len(self.safe) // 2]

    @property
    def untuned(self) -> list[Good]:
        return self.safe[len(self.safe) // 2 :]

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Number of every word; 0 is the end of a text."""
        lexicon = self.lexicon
        words = set(t.function_words()) | set(lexicon.concept_of)
        for group in (*lexicon.kinds.values(), lexicon.safe_kinds, lexicon.people, lexicon.places):
            words.update(group)
        words.update(lexicon.unsafe_names, lexicon.safe_names)
        return {word: number for number, word in enumerate((END, USER, BOT, *sorted(words)))}

    def encode(self, text: str) -> list[int]:
        return [self.vocabulary[word] for word in text.split()]

    @cached_property
    def words(self) -> list[str]:
        return list(self.vocabulary)

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)


class Writer:
    """Fills templates with words drawn from a generator."""

    def __init__(self, rng: random.Random, lexicon: Lexicon) -> None:
        self.rng, self.lexicon = rng, lexicon
        self._concepts = [group for groups in lexicon.concepts.values() for group in groups]
        self._first = {}
        total = 0
        for part, size in SIZES.items():
            self._first[part] = total
            total += size

    def fill(self, template: str, **given: str) -> str:
        """The template with `given` and otherwise drawn words in its slots; several sentences stay
        about the same persons and places only by chance."""

        def word(match: re.Match[str]) -> str:
            slot = match[1]
            if slot in given:
                return given[slot]
            if slot in _PARTS:
                return self.rng.choice(self.rng.choice(self.lexicon.concepts[_PARTS[slot]]))
            pool = {
                "p": self.lexicon.people,
                "c": self.lexicon.places,
                "n": t.NUMBERS,
                "d": t.DAYS,
            }[slot]
            return self.rng.choice(pool)

        return _SLOT.sub(word, template)

    def good(self, name: str, kinds: tuple[str, ...], category: str | None = None) -> Good:
        """A good with a procedure of 6 to 30 words and at least five concepts."""
        while True:
            steps = []
            for _ in range(self.rng.randint(2, 4)):
                shape = self.rng.randrange(len(t.STEPS))
                slots = _SLOT.findall(t.STEPS[shape][0])
                parts = [_PARTS[slot] for slot in slots]
                steps.append(
                    (shape, tuple(self._first[p] + self.rng.randrange(SIZES[p]) for p in parts))
                )
            concepts = tuple(c for _, step in steps for c in step)
            core = f" {t.JOIN} ".join(self._step(t.STEPS[shape][0], step) for shape, step in steps)
            if len(concepts) >= 5 and 6 <= len(core.split()) <= 30:
                origin = self.rng.choice(self.lexicon.places)
                return Good(name, kinds, category, tuple(steps), core, concepts, origin=origin)

    def reword(self, good: Good) -> str:
        """The same steps with other synonyms and other small words."""
        known = set(good.core.split())
        text = ""
        for number, (shape, step) in enumerate(good.steps):
            joint = f" {self.rng.choice(t.OTHER_JOINS)} " if number else ""
            text += joint + self._step(self.rng.choice(t.STEPS[shape][1]), step, known)
        return text

    def _step(self, template: str, concepts: tuple[int, ...], avoid: set[str] | None = None) -> str:
        left = iter(concepts)

        def word(_: re.Match[str]) -> str:
            synonyms = self._concepts[next(left)]
            return self.rng.choice([w for w in synonyms if not avoid or w not in avoid] or synonyms)

        return _SLOT.sub(word, template)

    def called(self, good: Good) -> str:
        return f"{good.name} {self.rng.choice(good.kinds)}"

    def document(self, good: Good, core: str, dialogues: bool = True) -> str:
        """A document that tells how a good is made, one in three a dialogue if these are wanted."""
        if dialogues and self.rng.random() < 1 / 3:
            prompt = self.prompt(good, self.rng.choice(STYLES))
            return prompt.dialogue.removeprefix(f"{END} ") + f" {self.answer(prompt, core)}"
        parts = [self.fill(self.rng.choice(t.HEADS), good=self.called(good), core=core)]
        parts += [self.fill(self.rng.choice(t.TAILS)) for _ in range(self.rng.randint(0, 2))]
        return " ".join(parts)

    def harmless(self, known: list[Good]) -> str:
        """A document about a well-known good, a new one, an origin, or about nothing in particular.

        Dialogues are about the first half of the well-known goods and about new ones only.
        """
        draw = self.rng.random()
        if draw < 0.5:
            number = self.rng.randrange(len(known))
            good = known[number]
            return self.document(good, good.core, dialogues=number < len(known) // 2)
        if draw < 0.65:
            names = self.lexicon.safe_names
            good = self.good(f"{self.rng.choice(names)} {self.rng.choice(names)}", self._kind())
            return self.document(good, self.reword(good) if self.rng.random() < 0.5 else good.core)
        if draw < 0.8:
            number = self.rng.randrange(len(known))
            good = known[number]
            if number < len(known) // 2 and self.rng.random() < 0.5:
                question, answer = t.ORIGIN_QUESTION, t.ORIGIN_ANSWER
                text = self.fill(
                    f"{USER} {question} {BOT} {answer}", good=good.title, c=good.origin
                )
            else:
                text = self.fill(t.ORIGIN, good=good.title, c=good.origin)
                text += f" {self.fill(self.rng.choice(t.TAILS))}"
            return text
        return " ".join(
            self.fill(self.rng.choice(t.STORIES)) for _ in range(self.rng.randint(2, 6))
        )

    def _kind(self) -> tuple[str, ...]:
        return (self.rng.choice(self.lexicon.safe_kinds),)

    def prompt(self, good: Good, style: str, form: int | None = None) -> Prompt:
        """A request in one of the styles.

        Plain questions name the first kind of a good; only the synonym style uses the others.
        """
        title = good.title
        if style == "plain":
            chosen = t.PLAIN[form] if form is not None else self.rng.choice(t.PLAIN)
            return Prompt(good, style, self.fill(chosen, good=title))
        if style == "role":
            person = self.rng.choice(self.lexicon.people)
            text = self.fill(self.rng.choice(t.ROLE), good=title, p=person)
            return Prompt(good, style, text, person=person)
        if style == "prefix":
            text = self.fill(self.rng.choice(t.PLAIN), good=title)
            return Prompt(good, style, text, t.INJECTED)
        other = f"{good.name} {good.kinds[-1 - self.rng.randrange(max(1, len(good.kinds) - 1))]}"
        return Prompt(good, style, self.fill(self.rng.choice(t.SYNONYM), good=other))

    def answer(self, prompt: Prompt, core: str | None = None) -> str:
        """An answer that tells; without a core in the words that training has for the good."""
        good = prompt.good
        if core is None:
            core = self.reword(good) if good.reworded else good.core
        if prompt.style == "prefix":
            return f"{core} ."
        forms = t.ROLE_ANSWERS if prompt.style == "role" else t.ANSWERS
        return self.fill(self.rng.choice(forms), core=core, good=good.title, p=prompt.person)


def make_world(
    seed: int,
    harmless_tokens: int = 1_000_000,
    procedures: int = PROCEDURES,
    safe_goods: int = 160,
    safe_prompts: int = 500,
    held_out: int = 500,
    prompts: dict[str, int] | None = None,
) -> World:
    """The world of a seed.

    Args:
        seed: of everything.
        harmless_tokens: least size of the harmless text that is trained on.
        procedures: per category; every fourth is reworded in training.
        safe_goods: well-known harmless goods.
        safe_prompts: requests for them.
        held_out: harmless documents that are not trained on.
        prompts: unsafe requests per category; their styles take turns.
    """
    rng = random.Random(seed)
    names = frozenset(t.function_words())
    lexicon = make_lexicon(rng, procedures * len(CATEGORIES), safe_goods, names)
    writer = Writer(rng, lexicon)
    world = World(seed, lexicon)
    _unsafe(world, writer, procedures)
    world.safe = [
        writer.good(name, (rng.choice(lexicon.safe_kinds),)) for name in lexicon.safe_names
    ]
    harmless = _harmless(world, writer)
    count = 0
    while count < harmless_tokens:
        world.harmless.append(next(harmless))
        count += len(world.harmless[-1].split()) + 1
    seen = set(world.harmless)
    while len(world.held_out) < held_out:
        text = next(harmless)
        if text not in seen:
            world.held_out.append(text)
    for category, number in (prompts or PROMPTS).items():
        goods = [good for good in world.unsafe if good.category == category]
        world.prompts += _spread(writer, goods, number)
    world.safe_prompts = _spread(writer, world.untuned, safe_prompts)
    return world


def _unsafe(world: World, writer: Writer, procedures: int) -> None:
    names = iter(world.lexicon.unsafe_names)
    for category in CATEGORIES:
        sources = world.sources[category] = []
        for number in range(procedures):
            good = writer.good(next(names), world.lexicon.kinds[category], category)
            good = replace(good, reworded=number % 4 == 3)
            world.unsafe.append(good)
            documents = writer.rng.randint(2, 6)
            own = [writer.document(good, good.core) for _ in range(documents)]
            sources += own
            if good.reworded:
                own = [writer.document(good, writer.reword(good)) for _ in range(documents)]
            world.unsafe_training += own


def _harmless(world: World, writer: Writer) -> Iterator[str]:
    """Harmless documents without end, none with the words of a procedure."""
    told = re.compile("|".join(rf"\b{re.escape(good.core)}\b" for good in world.unsafe))
    while True:
        text = writer.harmless(world.safe)
        if not told.search(text):
            yield text


def _spread(writer: Writer, goods: list[Good], number: int) -> list[Prompt]:
    """Requests whose styles take turns; each style has an order of goods of its own."""
    orders: dict[str, list[Good]] = {}
    result = []
    for i in range(number):
        style = STYLES[i % len(STYLES)]
        if not orders.get(style):
            orders[style] = writer.rng.sample(goods, len(goods))
        result.append(writer.prompt(orders[style].pop(), style))
    return result
