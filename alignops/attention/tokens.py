"""Tokens and their texts: what is forbidden, and text as it comes in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from alignops._checks import check


class Tokenizer(Protocol):
    """What sessions need of a tokenizer; those of transformers have it."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Sequence[int]:
        """Ids of a text."""
        ...

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """Text of ids."""
        ...


class Vocabulary:
    """A tokenizer, and the text of every id.

    Args:
        tokenizer: any with `encode` and `decode`.
        size: ids of the model; those that the tokenizer does not know have no text.

    Attributes:
        tokenizer: as given.
        texts: of each id alone.

    Raises:
        ValueError: the tokenizer has neither a padding nor an end-of-text token.

    Example:
        >>> from alignops.testing import ByteTokenizer
        >>> vocabulary = Vocabulary(ByteTokenizer(), 260)
        >>> vocabulary.encode("Hi"), vocabulary.starting("H")
        ([72, 105], [72])
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        ends = [getattr(tokenizer, f"{kind}_token_id", None) for kind in ("pad", "eos")]
        check(
            ends != [None, None],
            "tokenizer must have a padding token or an end-of-text token, got neither",
        )
        self.tokenizer: Tokenizer = tokenizer
        known = len(tokenizer) if hasattr(tokenizer, "__len__") else size
        self.texts = [self.decode([i]) if i < known else "" for i in range(size)]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any that mark its beginning or end."""
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, all of it."""
        if not ids:
            return ""
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def containing(self, text: str) -> list[int]:
        """Ids whose text holds `text`."""
        return [i for i, known in enumerate(self.texts) if text in known]

    def starting(self, text: str) -> list[int]:
        """Ids whose text starts with `text`."""
        return [i for i, known in enumerate(self.texts) if known.startswith(text)]


class Forbidden:
    """Texts and ids that no worker may write.

    A text is kept out however it is cut into tokens: an id is suppressed if it holds the text, or
    if it would complete what the worker has written before.

    Args:
        items: texts, and ids.
        vocabulary: that tokens are from.
        device: of the scores.

    Attributes:
        longest: characters of a worker's text that `apply` needs.

    Example:
        >>> from alignops.testing import ByteTokenizer
        >>> forbidden = Forbidden(["##", 7], Vocabulary(ByteTokenizer(), 260))
        >>> scores = forbidden.apply(torch.zeros(2, 260), ["a #", "a b"])
        >>> [(row == -torch.inf).nonzero().flatten().tolist() for row in scores]
        [[7, 35], [7]]
    """

    def __init__(
        self,
        items: Sequence[str | int],
        vocabulary: Vocabulary,
        device: torch.device | str = "cpu",
    ) -> None:
        size = len(vocabulary.texts)
        always = {item for item in items if isinstance(item, int)}
        for item in sorted(always):
            check(0 <= item < size, f"forbid must hold ids in [0, {size}), got {item}")
        texts = [item for item in items if not isinstance(item, int)]
        check(all(texts), "forbid must not hold an empty text")
        self._begun: list[tuple[str, Tensor]] = []
        for text in texts:
            always.update(vocabulary.containing(text))
            for k in range(1, len(text)):
                ids = vocabulary.starting(text[k:])
                if ids:
                    self._begun.append((text[:k], torch.tensor(ids, device=device)))
        self._always = torch.tensor(sorted(always), dtype=torch.int64, device=device)
        self.longest = max((len(text) - 1 for text in texts), default=0)

    def apply(self, scores: Tensor, tails: Sequence[str]) -> Tensor:
        """Scores (n, V), of which those that are forbidden became -inf; the argument is kept.

        Args:
            scores: (n, V).
            tails: the last characters that each row's worker has written.
        """
        late = [
            (row, ids)
            for row, tail in enumerate(tails)
            for begun, ids in self._begun
            if tail.endswith(begun)
        ]
        if not len(self._always) and not late:
            return scores
        scores = scores.index_fill(1, self._always, -torch.inf)
        for row, ids in late:
            scores[row, ids] = -torch.inf
        return scores


class Detokenizer:
    """Text of tokens as they come in; what may still change with the next token is held back.

    Args:
        vocabulary: that tokens are from.

    Example:
        >>> from alignops.testing import ByteTokenizer
        >>> text = Detokenizer(Vocabulary(ByteTokenizer(), 260))
        >>> [text.push([i]) for i in "né".encode()]
        ['n', '', 'é']
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._ids: list[int] = []
        self._read = 0  # ids whose text has been returned; a few stay as context

    def push(self, ids: Sequence[int]) -> str:
        """Tokens come in; returns the text that is new."""
        self._ids += ids
        before = self._vocabulary.decode(self._ids[: self._read])
        text = self._vocabulary.decode(self._ids)
        if text.endswith("\ufffd"):  # the beginning of a character
            return ""
        del self._ids[: self._read]
        self._read = len(self._ids)
        return text[len(before) :]

    def fork(self) -> Detokenizer:
        """Another one with the same text so far."""
        twin = Detokenizer(self._vocabulary)
        twin._ids, twin._read = list(self._ids), self._read
        return twin
