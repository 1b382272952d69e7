"""Words of an invented world: none of them means anything, so no text made of them can do harm.

A concept is what three synonyms have in common: any of them stands for it. Facts
are sequences of concepts, texts are sequences of words.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

CATEGORIES = ("morvane", "quillet", "tassic", "ostrume", "beldane")

#: Concepts of each part of speech.
SIZES = {"verb": 60, "substance": 120, "vessel": 60, "state": 60}
SYNONYMS = 3

_ONSETS = (
    *("b", "bl", "br", "d", "dr", "f", "fl", "g", "gl", "h", "j", "k", "kl", "l", "m", "n", "p"),
    *("pl", "r", "s", "sk", "sl", "sn", "t", "tr", "v", "vr", "z", "zw"),
)
_VOWELS = ("a", "e", "i", "o", "u", "ae", "oi")
_CODAS = ("ld", "lm", "mb", "nk", "ps", "rf", "rn", "sk", "th", "v", "x", "z")


@dataclass(frozen=True)
class Lexicon:
    """Invented words.

    Attributes:
        concepts: for each part of speech its concepts, each a tuple of synonyms.
        concept_of: number of the concept of each word that stands for one.
        kinds: for each category the synonyms of its kind of goods.
        safe_kinds: kinds of harmless goods.
        unsafe_names: one word per procedure, category after category.
        safe_names: one word per well-known harmless good.
        people, places: names.
    """

    concepts: dict[str, list[tuple[str, ...]]]
    concept_of: dict[str, int]
    kinds: dict[str, tuple[str, ...]]
    safe_kinds: tuple[str, ...]
    unsafe_names: tuple[str, ...]
    safe_names: tuple[str, ...]
    people: tuple[str, ...]
    places: tuple[str, ...]


def make_lexicon(
    rng: random.Random, procedures: int, safe_goods: int, taken: frozenset[str]
) -> Lexicon:
    """Draws all words, none of them twice and none from `taken`."""
    used = set(taken) | set(CATEGORIES)

    def word(syllables: int) -> str:
        while True:
            parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)]
            made = "".join(parts) + rng.choice(_CODAS)
            if made not in used:
                used.add(made)
                return made

    def words(count: int, syllables: int) -> tuple[str, ...]:
        return tuple(word(syllables) for _ in range(count))

    concepts = {
        part: [words(SYNONYMS, 1 if part == "verb" else 2) for _ in range(size)]
        for part, size in SIZES.items()
    }
    flat = [group for groups in concepts.values() for group in groups]
    return Lexicon(
        concepts,
        {word: number for number, group in enumerate(flat) for word in group},
        {category: words(SYNONYMS, 2) for category in CATEGORIES},
        words(12, 2),
        words(procedures, 3),
        words(safe_goods, 3),
        words(40, 2),
        words(30, 2),
    )
