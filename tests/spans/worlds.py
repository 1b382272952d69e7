"""Small random worlds for tests of the filter, the loss and decoding: indexes, texts, settings."""

import itertools
import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

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

    def shield(self) -> TraceShield:
        def index(docs: list[list[int]]) -> SpanIndex:
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


def documents(vocab: int, most: int = 4, length: int = 30) -> st.SearchStrategy[list[list[int]]]:
    document = st.lists(st.integers(0, vocab - 1), max_size=length)
    return st.lists(document, min_size=1, max_size=most).filter(
        lambda docs: sum(map(len, docs)) >= 2
    )


@st.composite
def worlds(draw: st.DrawFn, prompts: bool = True) -> World:
    """Texts are put together from unsafe documents and noise, harmless ones partly from texts."""
    vocab = draw(st.integers(1, 6))
    unsafe = [
        (draw(documents(vocab)), draw(st.sampled_from([1.0, 1.0, 0.5, 2.0])))
        for _ in range(draw(st.integers(1, 2)))
    ]
    text: list[int] = []
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            source = draw(st.sampled_from([d for docs, _ in unsafe for d in docs]))
            a = draw(st.integers(0, len(source)))
            text += source[a : a + draw(st.integers(0, 25))]
        else:
            text += draw(st.lists(st.integers(0, vocab - 1), max_size=8))
    harmless = draw(st.none() | documents(vocab, 3, 40))
    if harmless is not None:
        for _ in range(draw(st.integers(0, 2))):
            a = draw(st.integers(0, len(text)))
            harmless.append(text[a : a + draw(st.integers(6, 14))])
    min_len = draw(st.integers(1, 6))
    allow_mode = draw(st.sampled_from(["exact", "cover"]))
    shortest = max(min_len, 8) if allow_mode == "cover" else min_len
    settings = {
        "kind": draw(st.sampled_from(["bci", "bci", "norm", "max"])),
        "tau": draw(st.sampled_from([0.0, 0.5, 1.3, 2.0, 4.0, 8.0, 15.0])),
        "min_len": min_len,
        "max_count": draw(st.none() | st.integers(1, 4)),
        "allow_mode": allow_mode,
        "scope": draw(st.sampled_from(["completion", "prompt+completion"])),
        "max_match": draw(st.sampled_from([4096, 4096, shortest, shortest + 2])),
    }
    prompt = draw(st.integers(0, len(text))) if prompts else 0
    return World(vocab, unsafe, harmless, text, prompt, settings, draw(st.integers(1, 3)))
