"""For tests of code that uses alignops: every CPU instruction set of the machine, small indexes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from alignops import _native

if TYPE_CHECKING:
    from alignops.spans import SpanIndex


def available_isas() -> tuple[str, ...]:
    """Names of the CPU instruction set levels of this machine, slowest first.

    Example:
        >>> available_isas()[0]
        'scalar'
    """
    return _native.library.available_isas()


def active_isa() -> str:
    """Name of the CPU instruction set level in use."""
    return _native.library.active_isa()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the body with another CPU instruction set level, then restore the former one.

    The level is a property of the process: other threads see the change, too. Packed weights are
    laid out again for the new level when they are next used.

    Args:
        name: "scalar", "avx2", "avx512" or "avx512bf16"; see `available_isas`.

    Raises:
        ValueError: the name is unknown or this machine lacks the level; the message lists the
            choices.

    Example:
        >>> with use_isa("scalar"):
        ...     active_isa()
        'scalar'
    """
    before = active_isa()
    _native.library.set_isa(name)
    _native.refresh()
    try:
        yield
    finally:
        _native.library.set_isa(before)
        _native.refresh()


def span_index(docs: Iterable[Any], vocab_size: int, **options: Any) -> SpanIndex:
    """An index in memory. It has no folder, so it cannot be pickled.

    Args:
        docs: documents, see `alignops.spans.build_index`.
        vocab_size: size of the vocabulary.
        options: further ones of `build_index`.

    Example:
        >>> span_index([[1, 2, 1, 2], [2, 1]], vocab_size=4).count([1, 2])
        2
    """
    from alignops.spans import SpanIndex, build_index

    options.setdefault("fingerprint", "testing")
    with tempfile.TemporaryDirectory() as folder:
        build_index(docs, f"{folder}/index", vocab_size=vocab_size, **options)
        return SpanIndex.open(f"{folder}/index", mode="ram")


class ByteTokenizer:
    r"""A tokenizer without files: a token for each byte, for given words, and end of text.

    Args:
        words: further tokens; `encode` prefers the longest one.

    Attributes:
        eos_token_id, pad_token_id: end of text, the last id.

    Example:
        >>> tokenizer = ByteTokenizer(["\n\n"])
        >>> tokenizer.encode("Hi\n\n"), tokenizer.decode([72, 105, 256]), len(tokenizer)
        ([72, 105, 256], 'Hi\n\n', 258)
    """

    chat_template = None
    bos_token_id = None

    def __init__(self, words: Sequence[str] = ()) -> None:
        self._bytes = [bytes([i]) for i in range(256)] + [word.encode() for word in words]
        self._words = sorted(
            ((word.encode(), 256 + i) for i, word in enumerate(words)), key=lambda w: -len(w[0])
        )
        self.eos_token_id = self.pad_token_id = len(self._bytes)

    def __len__(self) -> int:
        return self.eos_token_id + 1

    def get_vocab(self) -> dict[str, int]:
        """Ids of the words and of the end of text."""
        words = {word.decode(): token for word, token in self._words}
        return {**words, "<|end|>": self.eos_token_id}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; there are no special tokens that mark its beginning or end."""
        data, ids, at = text.encode(), [], 0
        while at < len(data):
            word = next(((w, i) for w, i in self._words if data.startswith(w, at)), None)
            ids.append(data[at] if word is None else word[1])
            at += 1 if word is None else len(word[0])
        return ids

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        data = b"".join(
            (b"" if skip_special_tokens else b"<|end|>")
            if i == self.eos_token_id
            else self._bytes[i]
            for i in token_ids
        )
        return data.decode(errors="replace")
