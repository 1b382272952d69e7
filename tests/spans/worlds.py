"""Small random worlds for tests of the filter, the loss and decoding: indexes, texts, settings."""

import itertools
import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from alignops.reference import spans as reference
from alignops.spans import SpanIndex, TraceShield, build_index
from tests.spans.corpora import shard_size

_FOLDER = tempfile.TemporaryDirectory()
_NUMBERS = itertools.count()


def make_index(docs: list[list[int]], vocab_size: int, shards: int = 1) -> SpanIndex:
    """An index in a folder that lives as long as the process; the same for the same documents."""
    return _make_index(tuple(map(tuple, docs)), vocab_size, shards)


@lru_cache(maxsize=32)
def _make_index(docs: tuple[tuple[int, ...], ...], vocab_size: int, shards: int) -> SpanIndex:
    out = Path(_FOLDER.name, str(next(_NUMBERS)))
    size = shard_size([list(doc) for doc in docs], shards)
    build_index(docs, out, vocab_size=vocab_size, shard_tokens=size, fingerprint="test")
    return SpanIndex.open(out, fingerprint="test")


@dataclass
class World:
    """Unsafe and harmless documents, a text, and the settings of a filter."""

    vocab: int
    unsafe: list[tuple[list[list[int]], float]]
    harmless: list[list[int]] | None
    text: list[int]
    prompt: int
    settings: dict[str, Any] = field(default_factory=dict)
    shards: int = 1

    def shield(self, plain: bool = False) -> TraceShield:
        """The filter, or one over brute-force indexes."""

        def index(docs: list[list[int]]) -> Any:
            if plain:
                return reference.NaiveIndex(docs, self.vocab)
            return make_index(docs, self.vocab, self.shards)

        return TraceShield(
            {
                f"category {i}": (index(docs), severity)
                for i, (docs, severity) in enumerate(self.unsafe)
            },
            allow=None if self.harmless is None else index(self.harmless),
            **self.settings,
        )

    def categories(self) -> list[reference.Category]:
        s = self.settings
        allow = None if self.harmless is None else reference.NaiveIndex(self.harmless, self.vocab)
        return [
            reference.Category(
                reference.NaiveIndex(docs, self.vocab),
                reference.Rule(
                    s["kind"], s["tau"], s["min_len"], s["max_count"], severity, s["allow_mode"]
                ),
                allow,
            )
            for docs, severity in self.unsafe
        ]

    def seen(self, text: list[int] | None = None) -> tuple[list[int], int]:
        """What the scope lets the filter see of a text, and where spans may end from."""
        text = self.text if text is None else text
        if self.settings["scope"] == "completion":
            return text[self.prompt :], 0
        return text, self.prompt


def random_world(seed: int, covered: bool = False) -> World:
    """Texts are put together from unsafe documents and noise, harmless ones partly from texts.

    `covered`: some of what matches is likely to be covered by harmless text, some not.
    """
    rng = np.random.default_rng(seed)

    def below(n: int) -> int:
        return int(rng.integers(n))

    def chosen(*choices: Any) -> Any:
        return choices[below(len(choices))]

    def piece(source: list[int], least: int, most: int) -> list[int]:
        start = below(max(len(source) - least, 0) + 1)
        return source[start : start + least + below(most - least + 1)]

    vocab = 1 + below(6)

    def noise(most: int) -> list[int]:
        return rng.integers(vocab, size=below(most + 1)).tolist()

    def documents(most: int) -> list[list[int]]:
        return [[0, vocab - 1], *(noise(30) for _ in range(most))]

    unsafe = [(documents(below(4)), chosen(1.0, 1.0, 0.5, 2.0)) for _ in range(1 + below(2))]
    sources = [doc for docs, _ in unsafe for doc in docs]
    text: list[int] = []
    for _ in range(3 if covered else below(5)):
        text += piece(chosen(*sources), 6, 25) if covered or below(2) else noise(8)
    harmless = None
    if covered or below(4):
        pieces = 1 + below(2) if covered else below(3)
        harmless = [*documents(below(2)), *(piece(text, 8, 14) for _ in range(pieces))]
    min_len = 1 + below(6)
    allow_mode = "cover" if covered else chosen("exact", "cover")
    shortest = max(min_len, 8) if allow_mode == "cover" else min_len
    settings = {
        "kind": chosen("bci", "bci", "norm", "max"),
        "tau": chosen(0.0, 0.5, 1.3, 2.0, 4.0, 8.0, 15.0),
        "min_len": min_len,
        "max_count": None if covered else chosen(None, None, 1 + below(4)),
        "allow_mode": allow_mode,
        "scope": chosen("completion", "prompt+completion"),
        "max_match": chosen(4096, 4096, shortest, shortest + 2),
    }
    prompt = chosen(0, below(len(text) + 1))
    return World(vocab, unsafe, harmless, text, prompt, settings, shards=1 + below(3))


def worlds(covered: bool = False) -> st.SearchStrategy[World]:
    """Worlds by seed: drawn part by part, most would be too small to match anything."""
    return st.integers(0, 2**32).map(lambda seed: random_world(seed, covered))
