"""Contrastive Belief Deconfliction (CBD): a term of preference tuning against unlikely copies.

Symbols: x a preferred response, p_t the model's probability of its token t, s a span of x that
`TraceShield` flags, tau its threshold. Source: TraceAlign, arXiv 2508.02063. What the term is
multiplied with is ours: belief conflict does not depend on the model, so a weight per token carries
it to the log-probabilities.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignops._files import replacing
from alignops.losses import dpo_loss, widen
from alignops.spans._progress import Callback, Reporter
from alignops.spans.arrays import Floats, Ints, as_ragged
from alignops.spans.ends import passing_ends, ranges, visible
from alignops.spans.ops import cbd_penalty
from alignops.spans.shield import TraceShield

#: Largest excess of a span over tau that weighs.
CAP = 100.0
SIDES = ("chosen", "rejected")
_CACHE_VERSION = 1


def cbd_weights(
    shield: TraceShield,
    ids: Any,
    offsets: Any = None,
    *,
    prompt_lengths: Any = None,
    cache: str | os.PathLike[str] | None = None,
    batch_tokens: int = 1 << 20,
    progress: bool | Callback | None = None,
) -> Tensor:
    """How much each token of a data set belongs to flagged spans; once per data set.

    a_t = max h(s) / length(s) over the maximal flagged spans s that contain token t, with h(s) =
    min(max(0, severity * score(s) - tau), 100), else 0. The weights depend on data and indexes
    only, not on the model.

    Args:
        shield: gives indexes, filters and threshold.
        ids: tokens of all responses, one after the other; or a list of responses without offsets.
        offsets: (rows + 1,) where each response begins, and the end; or None.
        prompt_lengths: (rows,) prompt tokens at the start of each row, which weigh nothing; None:
            none.
        cache: file that keeps the weights, with the UUIDs of the indexes, the settings of the
            shield and a digest of the data. If it exists and fits, nothing is computed.
        batch_tokens: about how many tokens are looked at together.
        progress: True shows a bar of tqdm; a callable gets a phase ("weigh",
            then "done"), tokens done and tokens in all.

    Returns:
        float32 (tokens,) on the CPU; `weights.split(lengths)` gives those of each row.

    Raises:
        ValueError: the cache was made for another index, other settings or other data, or is not a
            cache; or the arguments are unfit.
        OSError: an index cannot be read.

    Example:
        >>> import tempfile
        >>> from alignops.spans import SpanIndex, TraceShield, build_index, cbd_weights
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = build_index([range(10)], f"{folder}/u", vocab_size=32, fingerprint="demo")
        ...     with SpanIndex.open(f"{folder}/u", fingerprint="demo") as index:
        ...         shield = TraceShield(index, tau=4.0, min_len=3)
        ...         cbd_weights(shield, [[30, 5, 6, 7, 30], [1, 2]])
        tensor([0.0000, 0.9693, 0.9693, 0.9693, 0.0000, 0.0000, 0.0000])
    """
    flat, bounds = as_ragged(ids, offsets, "cbd_weights")
    if cache is None:
        return torch.from_numpy(
            _weights(shield, flat, bounds, prompt_lengths, batch_tokens, progress)
        )
    path = Path(cache)
    key = {
        "version": _CACHE_VERSION,
        **shield.parameters(),
        "data": _digest(flat, bounds, prompt_lengths),
    }
    if path.exists():
        return torch.from_numpy(_load(path, key))
    weights = _weights(shield, flat, bounds, prompt_lengths, batch_tokens, progress)
    _save(path, key, weights)
    return torch.from_numpy(weights)


def _weights(
    shield: TraceShield,
    flat: Ints,
    bounds: Ints,
    prompt_lengths: Any,
    batch_tokens: int,
    progress: bool | Callback | None,
) -> Any:
    weights = np.zeros(len(flat), dtype=np.float32)
    rows, begin = len(bounds) - 1, 0
    report = Reporter(progress)
    try:
        while begin < rows:
            report("weigh", int(bounds[begin]), len(flat))
            end = int(np.searchsorted(bounds, bounds[begin] + batch_tokens, side="right")) - 1
            end = min(max(end, begin + 1), rows)
            part = slice(int(bounds[begin]), int(bounds[end]))
            prompts = None if prompt_lengths is None else prompt_lengths[begin:end]
            own = bounds[begin : end + 1] - bounds[begin]
            weights[part] = _of_rows(shield, flat[part], own, prompts)
            begin = end
        report("done", len(flat), len(flat))
    finally:
        report.close()
    return weights


def _of_rows(shield: TraceShield, flat: Ints, bounds: Ints, prompt_lengths: Any) -> Floats:
    batch, cut = visible(flat, bounds, prompt_lengths, shield.scope, "cbd_weights")
    seen = np.zeros(len(batch.ids))
    for category in shield.categories:
        spans = passing_ends(category, shield.filters, batch).outermost()
        length = spans.end - spans.start
        excess = np.clip(category.severity * spans.score - shield.tau, 0.0, CAP) / length
        np.maximum.at(seen, ranges(spans.start, length), np.repeat(excess, length))
    # Prompt tokens that the scope shows.
    first = batch.first - batch.bounds[:-1]
    seen[ranges(batch.bounds[:-1], first)] = 0.0
    weights = np.zeros(len(flat))
    weights[ranges(bounds[:-1] + cut, np.diff(bounds) - cut)] = seen
    return weights


def cbd_dpo_loss(
    pi_w: Tensor,
    pi_l: Tensor,
    ref_w: Tensor,
    ref_l: Tensor,
    mask: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[Tensor],
    beta: float = 0.1,
    lam: float = 0.01,
    *,
    on: Sequence[str] = ("chosen",),
    pair: str | None = None,
    conflict: Sequence[Any] | None = None,
    margin: float = 0.0,
    carrier: str = "unlikelihood",
) -> Tensor:
    """DPO plus lam times the mean over pairs of `cbd_penalty`.

    Args:
        pi_w: (B, T) log-probability of each token of the preferred responses.
        pi_l: (B, T') of the others.
        ref_w: (B, T) the same under the reference model.
        ref_l: (B, T') likewise.
        mask: bool (B, T) and (B, T') of the tokens that belong to the responses; one tensor if they
            are the same.
        weights: (B, T) of the preferred responses, see `cbd_weights`; or a pair of tensors, for the
            others as well.
        beta: see `alignops.losses.dpo_loss`.
        lam: weight of the penalty; 0 gives exactly `dpo_loss`.
        on: which responses are penalised: "chosen", "rejected" or both.
        pair: what happens to pairs whose preferred response conflicts more than the other by more
            than `margin`: None: nothing; "drop": they do not count; "swap": the responses change
            places.
        conflict: (B,) and (B,) risks of the preferred and the other responses
            (`TraceShield.risks`), for `pair`.
        margin: in nats.
        carrier: see `cbd_penalty`.

    Returns:
        A scalar; 0 if all pairs are dropped.

    Raises:
        ValueError: shapes differ, a choice is unknown, weights or conflict are missing where they
            are needed, or values are bad as in `cbd_penalty`.

    Example:
        >>> logps = torch.full((1, 3), -0.7)
        >>> mask = torch.ones(1, 3, dtype=torch.bool)
        >>> weights = torch.tensor([[0.0, 2.0, 2.0]])
        >>> cbd_dpo_loss(logps, logps, logps, logps, mask, weights, lam=0.1)
        tensor(0.9677)
    """
    op = "cbd_dpo_loss"
    if pair not in (None, "drop", "swap"):
        raise ValueError(f"{op}: pair must be None, 'drop' or 'swap', got {pair!r}")
    if not on or not set(on) <= set(SIDES):
        raise ValueError(f"{op}: on must name some of {SIDES}, got {on!r}")
    mask_w, mask_l = (mask, mask) if isinstance(mask, Tensor) else mask
    weights_w, weights_l = (weights, None) if isinstance(weights, Tensor) else weights
    pc, rc = (_sum(logps, mask_w, op) for logps in (pi_w, ref_w))
    pr, rr = (_sum(logps, mask_l, op) for logps in (pi_l, ref_l))
    penalties = []
    for side, logps, own, weight in zip(
        SIDES, (pi_w, pi_l), (mask_w, mask_l), (weights_w, weights_l), strict=True
    ):
        if lam == 0 or not (side in on or pair == "swap"):
            penalties.append(torch.zeros_like(pc))
        elif weight is None:
            raise ValueError(f"{op}: weights must be a pair, with those of {side} responses")
        else:
            penalties.append(cbd_penalty(logps, own, weight, carrier))
    kept = torch.ones_like(pc, dtype=torch.bool)
    if pair is not None:
        more = _conflicts_more(conflict, margin, pc, op)
        if pair == "drop":
            kept = ~more
        else:
            pc, pr = _swap(pc, pr, more)
            rc, rr = _swap(rc, rr, more)
            penalties = list(_swap(penalties[0], penalties[1], more))
    if lam == 0 and pair != "drop":
        return dpo_loss(pc, pr, rc, rr, beta)
    loss = dpo_loss(pc, pr, rc, rr, beta, "none")
    if lam != 0:
        for side, penalty in zip(SIDES, penalties, strict=True):
            loss = loss + lam * penalty if side in on else loss
    return torch.where(kept, loss, 0.0).sum() / kept.sum().clamp(min=1)


def _sum(logps: Tensor, mask: Tensor, op: str) -> Tensor:
    if logps.shape != mask.shape or logps.dim() != 2:
        raise ValueError(
            f"{op}: log-probabilities and their mask must have one shape (B, T), got "
            f"{tuple(logps.shape)} and {tuple(mask.shape)}"
        )
    return torch.where(mask.bool(), widen(logps), 0.0).sum(-1)


def _conflicts_more(conflict: Any, margin: float, like: Tensor, op: str) -> Tensor:
    if conflict is None:
        raise ValueError(f"{op}: conflict must be given for pair='drop' and 'swap', got None")
    chosen, rejected = (torch.as_tensor(c, device=like.device) for c in conflict)
    if chosen.shape != like.shape or rejected.shape != like.shape:
        raise ValueError(
            f"{op}: conflict must hold two tensors of shape {tuple(like.shape)}, got "
            f"{tuple(chosen.shape)} and {tuple(rejected.shape)}"
        )
    return chosen - rejected > margin


def _swap(a: Tensor, b: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(where, b, a), torch.where(where, a, b)


# The cache


def _digest(flat: Ints, bounds: Ints, prompt_lengths: Any) -> str:
    prompts = np.zeros(0) if prompt_lengths is None else np.asarray(prompt_lengths)
    parts = (flat, bounds, np.ascontiguousarray(prompts, dtype=np.int64))
    return hashlib.sha256(b"|".join(p.tobytes() for p in parts)).hexdigest()


def _load(path: Path, key: dict[str, Any]) -> Any:
    try:
        with np.load(path, allow_pickle=False) as data:
            found, weights = json.loads(str(data["key"])), data["weights"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"cbd_weights: cache {path} is not a file of weights: {error}") from error
    wanted = json.loads(json.dumps(key))
    if found != wanted:
        other = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        raise ValueError(
            f"cbd_weights: cache {path} is stale, made with other {', '.join(other)}: delete it or "
            "name another file"
        )
    return weights


def _save(path: Path, key: dict[str, Any], weights: Any) -> None:
    with replacing(path) as file:
        np.savez(file, key=np.array(json.dumps(key)), weights=weights)
