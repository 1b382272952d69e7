"""The veto of Prov-Decode for any sampler: scores of the next token, without flagged ones.

Symbols: B rows, L tokens of each so far, V size of the vocabulary.
Source: TraceAlign, arXiv 2508.02063.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignops.spans.arrays import Ints
from alignops.spans.decode import MODES, end_tokens
from alignops.spans.shield import TraceShield
from alignops.spans.stream import ShieldMatcher


class SpanVeto:
    """Takes the tokens that would complete a flagged span out of the scores of the next token.

    Exact over the whole vocabulary at the cost of a lookup in the index: only tokens that follow a
    matched suffix can be flagged, so these are enumerated. In hard mode nothing that is written can
    be refused by `TraceShield.check` with the same shield.

    One object follows one generation. The first call shows the prompts; later ones their growing
    rows, in any order: rows are recognised by their tokens, also after a beam search has reordered,
    repeated or dropped them. Rows that did not grow by one token are read again from their prompt.
    Rows that begin with no known prompt start a new generation, as `reset` does.

    Args:
        shield: gives indexes, filters, threshold and scope.
        mode: "hard" sets the scores of flagged tokens to -inf; "soft" subtracts `gamma`.
        gamma: in nats.
        eos: id or ids of the end of text, which are never vetoed. Without them, all tokens of a row
            may end at -inf.
        pad: id of padding to the left of the prompts, which no span may hold; None: no padding.
        renormalize: return log-probabilities, which sum to 1 after the veto.

    Raises:
        ValueError: an argument is out of range.

    Source:
        arXiv 2508.02063; its published code subtracts 1.0 from flagged logits.

    Example:
        >>> import tempfile
        >>> from alignops.spans import SpanIndex, SpanVeto, TraceShield, build_index
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = build_index([range(10)], f"{folder}/u", vocab_size=16, fingerprint="demo")
        ...     with SpanIndex.open(f"{folder}/u", fingerprint="demo") as index:
        ...         veto = SpanVeto(TraceShield(index, tau=6.0, min_len=3))
        ...         rows = torch.tensor([[15]])
        ...         for token in (2, 3):
        ...             scores = veto(rows, torch.zeros(1, 16))
        ...             rows = torch.cat((rows, torch.tensor([[token]])), 1)
        ...         veto(rows, torch.zeros(1, 16)).isinf().nonzero().tolist()
        [[0, 4]]
    """

    def __init__(
        self,
        shield: TraceShield,
        mode: str = "hard",
        gamma: float = 1.0,
        *,
        eos: int | Sequence[int] | None = None,
        pad: int | None = None,
        renormalize: bool = False,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"SpanVeto: mode must be one of {MODES}, got {mode!r}")
        if not gamma >= 0:
            raise ValueError(f"SpanVeto: gamma must not be negative, got {gamma}")
        self.shield, self.mode, self.gamma = shield, mode, gamma
        self.pad, self.renormalize = pad, renormalize
        self._end = end_tokens(eos)
        self._matcher: ShieldMatcher
        self._prompts: Ints | None = None
        self._rows: Ints

    def reset(self) -> None:
        """Forget the generation; the next call shows new prompts."""
        self._prompts = None

    @torch.no_grad()
    def __call__(self, ids: Tensor, scores: Tensor, parent: Any = None) -> Tensor:
        """The scores of the next tokens after the veto.

        Args:
            ids: (B, L) integer: prompt and what was generated so far.
            scores: (B, V') logits or log-probabilities of the next token; V' >= V is a padded
                vocabulary, whose further tokens match nothing.
            parent: (B,) which row of the last call each row extends; None: it is found out.

        Returns:
            (B, V'), a new tensor; `scores` itself if nothing was flagged.

        Raises:
            ValueError: the shapes do not fit.
            OSError: an index cannot be read and the shield does not fail open.
        """
        if ids.dim() != 2 or scores.dim() != 2 or len(ids) != len(scores):
            raise ValueError(
                f"SpanVeto: ids and scores must have shapes (B, L) and (B, V), got "
                f"{tuple(ids.shape)} and {tuple(scores.shape)}"
            )
        try:
            self._follow(ids.cpu().numpy().astype(np.int64, copy=False), parent)
            rows, tokens = self._matcher.flagged()
        except OSError:
            if not self.shield.fail_open:
                raise
            self.reset()
            return self._normal(scores)
        keep = tokens < scores.shape[1]
        if len(self._end):
            keep &= ~np.isin(tokens, self._end)
        if not keep.any():
            return self._normal(scores)
        at = tuple(torch.from_numpy(a[keep]).to(scores.device) for a in (rows, tokens))
        result = scores.clone()
        result[at] = -torch.inf if self.mode == "hard" else result[at] - self.gamma
        return self._normal(result)

    def _normal(self, scores: Tensor) -> Tensor:
        return scores.log_softmax(-1) if self.renormalize else scores

    # Rows

    def _follow(self, ids: Ints, parent: Any) -> None:
        """Bring the matcher to the end of these rows."""
        if self._prompts is not None and ids.shape[1] == self._rows.shape[1] + 1:
            parents = self._parents(ids) if parent is None else np.asarray(parent)
            if parents is not None:
                identity = np.array_equal(parents, np.arange(len(self._rows)))
                self._matcher.advance(ids[:, -1], None if identity else parents)
                self._rows = ids.copy()
                return
        prompts = self._prompts
        if prompts is None or _find(ids[:, : prompts.shape[1]], prompts) is None:
            prompts = ids.copy()
        length = prompts.shape[1]
        matcher = self.shield.matcher(len(ids))
        if self.shield.scope == "prompt+completion":
            matcher.extend_prompts([self._unpad(row) for row in ids[:, :length]])
        for column in ids[:, length:].T:
            matcher.advance(np.ascontiguousarray(column))
        self._matcher, self._prompts, self._rows = matcher, prompts, ids.copy()

    def _parents(self, ids: Ints) -> Ints | None:
        """The row of the last call that each row extends, or None if one extends no row."""
        before = ids[:, :-1]
        if before.shape == self._rows.shape and np.array_equal(before, self._rows):
            return np.arange(len(ids))
        return _find(before, self._rows)

    def _unpad(self, row: Ints) -> Ints:
        if self.pad is None:
            return row
        return row[int(np.argmax(np.append(row, self.pad + 1) != self.pad)) :]


def _find(rows: Ints, known: Ints) -> Ints | None:
    """For each row the first equal one among the known, or None if one is not known."""
    if rows.shape[1] != known.shape[1]:
        return None
    equal = (rows[:, None] == known[None]).all(-1)
    return equal.argmax(1) if equal.any(1).all() else None
