"""Between text and token ids: fast tokenizers and plain bytes behind one interface.

A tokenizer is known by its fingerprint: the SHA-256 of its serialised form with sorted keys, less
what has no influence on the ids of plain text: truncation, padding, and what is put around it. An
index keeps the fingerprint, so that text is never searched with the ids of another tokenizer.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import tokenizers

__all__ = ["BYTES", "ByteTokenizer", "Encoded", "FastTokenizer", "TextTokenizer", "load_tokenizer"]

#: Name and fingerprint of the byte level.
BYTES = "bytes"

_BYTES_FILE = '{"type": "bytes"}\n'
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4  # bytes, hence tokens, that one character can be spread over


class Encoded(NamedTuple):
    """Tokens of one text and, if asked for, the byte of its UTF-8 form where each begins."""

    ids: npt.NDArray[np.uint32]
    byte_offsets: npt.NDArray[np.uint32] | None


class TextTokenizer(ABC):
    """What the index needs of a tokenizer."""

    #: Number of ids; all are below it.
    vocab_size: int
    #: Equal for equal tokenizers.
    fingerprint: str

    @abstractmethod
    def encode(self, texts: Sequence[str], byte_offsets: bool = False) -> list[Encoded]:
        """Tokens of each text, without special tokens around it."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text; joined, they are the text.

        The bytes of one character can be spread over several tokens: the last of them has it, the
        others have "". A decoder may treat the first token of a text unlike the others, so tokens
        are decoded together with those before them.

        Args:
            ids: n token ids.

        Returns:
            n strings.

        Example:
            >>> ByteTokenizer().pieces([97, 0xC3, 0xA9])
            ['a', '', 'é']
        """
        pieces = [""] * len(ids)
        before, start = 0, 0  # ids[before:start] was emitted last; ids[start:] was not
        for end in range(1, len(ids) + 1):
            known, text = self.decode(ids[before:start]), self.decode(ids[before:end])
            pending = text.endswith(_REPLACEMENT) and end - start < _LONGEST_CHARACTER
            if end == len(ids) or (len(text) > len(known) and not pending):
                pieces[end - 1] = text[len(known) :]
                before, start = start, end
        return pieces

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write a file that `load_tokenizer` reads."""


class ByteTokenizer(TextTokenizer):
    """Bytes of UTF-8 as ids. 255, which UTF-8 never has, is the separator of documents."""

    vocab_size = 255
    fingerprint = BYTES

    def encode(self, texts: Sequence[str], byte_offsets: bool = False) -> list[Encoded]:
        """The bytes of each text."""
        encoded = []
        for text in texts:
            ids = np.frombuffer(text.encode(), np.uint8).astype(np.uint32)
            encoded.append(
                Encoded(ids, np.arange(len(ids), dtype=np.uint32) if byte_offsets else None)
            )
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """The text of bytes; bytes that are no UTF-8 become U+FFFD."""
        return bytes(ids).decode(errors="replace")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """See `TextTokenizer.pieces`."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        last = len(ids) - 1
        return [decoder.decode(bytes([byte]), final=i == last) for i, byte in enumerate(ids)]

    def save(self, path: str | Path) -> None:
        """Write a file that says so."""
        Path(path).write_text(_BYTES_FILE, encoding="utf-8")


class FastTokenizer(TextTokenizer):
    """A tokenizer of the package `tokenizers`; a copy, which later changes do not reach.

    Args:
        tokenizer: a `tokenizers.Tokenizer`, or a tokenizer of transformers that is based on one.

    Raises:
        TypeError: it is neither.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not (hasattr(backend, "to_str") and hasattr(backend, "encode_batch")):
            raise TypeError(
                "FastTokenizer: tokenizer must be a tokenizers.Tokenizer or a fast tokenizer of "
                f"transformers, got {type(tokenizer).__name__}"
            )
        parts = json.loads(backend.to_str())
        parts["truncation"] = parts["padding"] = None
        self._text = json.dumps(parts)
        self._tokenizer: tokenizers.Tokenizer = type(backend).from_str(self._text)
        parts["post_processor"] = None  # transformers adds one where there is none
        canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        self.fingerprint = "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(True).values(), default=-1)

    def encode(self, texts: Sequence[str], byte_offsets: bool = False) -> list[Encoded]:
        """Tokens of each text, in parallel over the texts."""
        texts = list(texts)
        if not byte_offsets:  # several times cheaper
            fast = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [Encoded(np.array(e.ids, np.uint32), None) for e in fast]
        encoded = []
        full = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        for text, e in zip(texts, full, strict=True):
            characters = np.array([start for start, _ in e.offsets], np.int64)
            encoded.append(Encoded(np.array(e.ids, np.uint32), _byte_starts(text)[characters]))
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def save(self, path: str | Path) -> None:
        """Write the `tokenizer.json` of the package `tokenizers`."""
        Path(path).write_text(self._text, encoding="utf-8")


def _byte_starts(text: str) -> npt.NDArray[np.uint32]:
    """First byte in UTF-8 of each character of a text, and of its end."""
    if text.isascii():
        return np.arange(len(text) + 1, dtype=np.uint32)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    size = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate(([0], np.cumsum(size))).astype(np.uint32)


def load_tokenizer(source: Any) -> TextTokenizer:
    """The tokenizer that `source` means.

    Args:
        source: "bytes"; a `tokenizer.json`, or a folder that holds one; the name or folder of a
            model, for transformers; a tokenizer of either package; or a `TextTokenizer`.

    Raises:
        ValueError: a name or file that is no tokenizer, or the package for it is not installed.
        TypeError: an object that is no tokenizer.

    Example:
        >>> load_tokenizer("bytes").vocab_size
        255
    """
    if isinstance(source, TextTokenizer):
        return source
    if not isinstance(source, str | Path):
        return FastTokenizer(source)
    if str(source) == BYTES:
        return ByteTokenizer()
    path = Path(source)
    file = path / "tokenizer.json" if path.is_dir() else path
    load: Callable[[], Any]
    try:
        if file.is_file():
            if file.stat().st_size == len(_BYTES_FILE) and file.read_text() == _BYTES_FILE:
                return ByteTokenizer()
            from tokenizers import Tokenizer

            load = lambda: Tokenizer.from_file(str(file))  # noqa: E731
        else:
            from transformers import AutoTokenizer

            load = lambda: AutoTokenizer.from_pretrained(str(source))  # noqa: E731
    except ModuleNotFoundError as error:
        raise ValueError(
            f"load_tokenizer: {source} needs the package {error.name}: "
            "pip install 'alignops[corpus]', and 'alignops[hf]' for names of models"
        ) from None
    try:
        return FastTokenizer(load())
    except Exception as error:  # tokenizers raises bare Exception
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"load_tokenizer: {source} is no tokenizer: {reason}") from error


def word_starts(pieces: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which tokens begin a word, or are none: `word_start` of `SpanIndex.maximal_spans`.

    Args:
        pieces: of n tokens, from `TextTokenizer.pieces`.

    Returns:
        n booleans, False where a token continues the letters and digits of the one before.

    Example:
        >>> word_starts(["un", "able", " to", "."]).tolist()
        [True, False, True, True]
    """
    starts = [True] if pieces else []
    starts += [not (a[-1:].isalnum() and b[:1].isalnum()) for a, b in pairwise(pieces)]
    return np.array(starts, bool)
