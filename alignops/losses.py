"""Losses on log-probabilities of whole responses.

Arithmetic is in float32; float64 stays float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    reduction: str = "mean",
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct Preference Optimization: -ln sigmoid(u), u = beta ((pc - rc) - (pr - rr)).

    Args:
        policy_chosen_logps: (B,) log-probability pc of each preferred response, summed over its
            tokens.
        policy_rejected_logps: (B,) pr, of the other response.
        ref_chosen: (B,) rc, the same under the reference model.
        ref_rejected: (B,) rr.
        beta: how far the policy may leave the reference; larger is closer.
        reduction: "none", "mean" or "sum" over the pairs.
        label_smoothing: eps in [0, 1/2); (1 - eps) of the loss and eps of that of the exchanged
            pair.

    Returns:
        A scalar, or (B,) for "none"; float32, or float64 if an argument is.

    Raises:
        ValueError: the shapes differ, or an argument is out of range.

    Source:
        Rafailov et al., arXiv 2305.18290, eq. 7.

    Example:
        >>> pc, pr, rc, rr = (torch.tensor([v]) for v in (-10.0, -14.0, -11.0, -12.0))
        >>> round(dpo_loss(pc, pr, rc, rr).item(), 6)
        0.554355
    """
    given = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "ref_chosen": ref_chosen,
        "ref_rejected": ref_rejected,
    }
    shape = policy_chosen_logps.shape
    for name, logps in given.items():
        if logps.shape != shape:
            raise ValueError(
                f"dpo_loss: {name} must have shape {tuple(shape)}, as policy_chosen_logps, got "
                f"{tuple(logps.shape)}"
            )
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"dpo_loss: label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    pc, pr, rc, rr = (widen(logps) for logps in given.values())
    u = beta * ((pc - rc) - (pr - rr))
    loss = F.softplus(-u)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * F.softplus(u)
    return reduce(loss, reduction, "dpo_loss")


def widen(values: Tensor) -> Tensor:
    """In the precision of loss arithmetic."""
    return values if values.dtype == torch.float64 else values.float()


def reduce(loss: Tensor, reduction: str, op: str) -> Tensor:
    """Loss per pair to what `reduction` asks for."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()
