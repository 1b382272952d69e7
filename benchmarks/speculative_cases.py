"""Inputs of the verification benchmarks, and what is timed on them, as contestants.

The contestants in PyTorch are what a user would write in batched operations. Greedy: `argmax` of
the logits ("eager"), or of their float32 copy ("eager, float32"), which is faster on CPUs. Sampled:
the formulas with all probabilities ("eager"), or the same decisions from `logsumexp` with
probabilities of the one row that is drawn from ("eager, one softmax").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from alignops import speculative
from benchmarks import memory
from benchmarks.timing import Runner

VOCABULARIES = {"SmolLM2-135M": 49152, "Qwen3-0.6B": 151936}
DRAFTS = 5
BATCHES = (1, 8, 32)
ACCEPTANCE = 0.8  # chance of a draft to stand


@dataclasses.dataclass(frozen=True)
class Case:
    """B rows of K drafts over V ids: logits as those of two models that mostly agree.

    `accept_len` drafts stand with the words `uniforms`, by the rule that the case is made for.
    """

    rule: str
    target: Tensor  # (B, K + 1, V)
    draft: Tensor  # (B, K, V)
    ids: Tensor  # (B, K)
    uniforms: Tensor  # (B, K + 1, 2) uint32
    accept_len: Tensor  # (B,)

    @property
    def shape(self) -> tuple[int, int, int]:
        b, k1, v = self.target.shape
        return b, k1 - 1, v

    def __str__(self) -> str:
        b, k, v = self.shape
        dtype = str(self.target.dtype).removeprefix("torch.")
        return f"{self.rule}, B={b}, K={k}, V={v}, {dtype}"

    @property
    def rows_read(self) -> int:
        """Rows of the target that decide something: up to the first draft that does not stand."""
        return int(self.accept_len.sum()) + len(self.accept_len)

    @property
    def bytes_read(self) -> int:
        """Least traffic: those rows, rows of the drafter that are tested, and both once more
        where a token is drawn from what the target has beyond the drafter."""
        b, k, v = self.shape
        rows = self.rows_read
        if self.rule == "lossless":
            tested = int((self.accept_len + 1).clamp(max=k).sum())
            rejected = int((self.accept_len < k).sum())
            rows += tested + 2 * rejected + (b - rejected)
        return rows * v * self.target.element_size()


def make(
    rule: str,
    batch: int,
    vocabulary: int,
    dtype: torch.dtype,
    drafts: int = DRAFTS,
    acceptance: float = ACCEPTANCE,
    seed: int = 0,
) -> Case:
    """A case for the rule "greedy" or "lossless", drafts standing with the given chance each.

    Logits are long-tailed like those of a language model: a few ids far above a broad rest.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    target = 2.0 * normal(batch, drafts + 1, vocabulary)
    peaks = torch.randint(vocabulary, (batch, drafts + 1, 16), generator=generator)
    target.scatter_add_(-1, peaks, 9.0 + 3.0 * normal(batch, drafts + 1, 16))
    draft = target[:, :-1] + 0.3 * normal(batch, drafts, vocabulary)
    target, draft = target.to(dtype), draft.to(dtype)
    stands = random(batch, drafts) < acceptance
    if rule == "greedy":
        ids = target[:, :-1].float().argmax(-1)
        ids = torch.where(stands, ids, (ids + 1) % vocabulary)
        words = torch.zeros(batch, drafts + 1, 2)
    else:
        q = torch.softmax(draft.float(), -1)
        p = torch.softmax(target[:, :-1].float(), -1)
        ids = torch.multinomial(q.flatten(0, 1), 1, generator=generator).view(batch, drafts)
        # Words on the wanted side of the ratio, at any distance; where it is 1 or more, every draft
        # stands. 1 % is left out, because PyTorch rounds probabilities otherwise.
        ratio = (p / q).gather(-1, ids[..., None])[..., 0].clamp(max=1)
        share = random(batch, drafts)
        u = torch.where(stands, 0.99 * share * ratio, 1.01 * ratio + share * (1 - ratio))
        u = u.clamp(max=1 - 2**-20)
        words = torch.cat([u, torch.zeros(batch, 1)], 1)[..., None]
        words = torch.cat([words, random(batch, drafts + 1, 1)], -1)
    uniforms = (words.double() * 2**32).long().to(torch.uint32)
    case = Case(rule, target, draft, ids, uniforms, torch.empty(0))
    accepted = (greedy_eager if rule == "greedy" else lossless_eager)(case)[0]
    return dataclasses.replace(case, accept_len=accepted)


def _accept_words(case: Case) -> Tensor:
    return case.uniforms[:, :-1, 0].to(torch.int64) * 2.0**-32


# Ours


def verify(case: Case) -> speculative.VerifyOut:
    """One call of `verify`; words instead of seeds, so that contestants accept the same drafts."""
    if case.rule == "greedy":
        return speculative.verify(case.target, case.ids, rule="greedy")
    return speculative.verify(
        case.target, case.ids, draft=case.draft, rule="lossless", uniforms=case.uniforms
    )


# PyTorch


def greedy_eager(case: Case) -> tuple[Tensor, Tensor]:
    """Accepted drafts (B,) and the token behind them (B,)."""
    return _greedy(case, case.target)


def greedy_float32(case: Case) -> tuple[Tensor, Tensor]:
    return _greedy(case, case.target.float())


def _greedy(case: Case, logits: Tensor) -> tuple[Tensor, Tensor]:
    best = logits.argmax(-1)
    accepted = (best[:, :-1] == case.ids).cumprod(-1).sum(-1)
    return accepted, best.gather(-1, accepted[:, None])[:, 0]


def lossless_eager(case: Case) -> tuple[Tensor, Tensor]:
    """All probabilities of target and drafter, ratio test, residual, multinomial draw."""
    rows, k, _ = case.shape
    p = torch.softmax(case.target, -1, dtype=torch.float32)
    q = torch.softmax(case.draft, -1, dtype=torch.float32)
    index = case.ids[..., None]
    p_draft = p[:, :-1].gather(-1, index)[..., 0]
    q_draft = q.gather(-1, index)[..., 0]
    accepted = (_accept_words(case) * q_draft < p_draft).cumprod(-1).sum(-1)
    every = torch.arange(rows)
    rest = p[every, accepted]
    rejected = accepted < k
    rest[rejected] -= q[every, accepted.clamp(max=k - 1)][rejected]
    return accepted, torch.multinomial(rest.clamp_(min=0), 1)[:, 0]


def lossless_one_softmax(case: Case) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the drafts alone, probabilities of the row that is drawn from."""
    rows, k, _ = case.shape
    index = case.ids[..., None]
    log_p = case.target[:, :-1].gather(-1, index)[..., 0].float()
    log_p -= case.target[:, :-1].float().logsumexp(-1)
    log_q = case.draft.gather(-1, index)[..., 0].float() - case.draft.float().logsumexp(-1)
    accepted = (_accept_words(case) < (log_p - log_q).exp()).cumprod(-1).sum(-1)
    every = torch.arange(rows)
    rest = torch.softmax(case.target[every, accepted], -1, dtype=torch.float32)
    rejected = accepted < k
    beyond = case.draft[every, accepted.clamp(max=k - 1)][rejected]
    rest[rejected] -= torch.softmax(beyond, -1, dtype=torch.float32)
    return accepted, torch.multinomial(rest.clamp_(min=0), 1)[:, 0]


EAGER: dict[str, dict[str, Callable[[Case], tuple[Tensor, Tensor]]]] = {
    "greedy": {"eager": greedy_eager, "eager, float32": greedy_float32},
    "lossless": {"eager": lossless_eager, "eager, one softmax": lossless_one_softmax},
}


def check(case: Case) -> None:
    """Raises unless all contestants accept the same drafts, and, if greedy, emit the same token.

    Probabilities of PyTorch are rounded otherwise, which the words of a case leave room for.
    """
    ours = verify(case)
    ours.raise_errors()
    for name, contestant in EAGER[case.rule].items():
        accepted, following = contestant(case)
        same = torch.equal(accepted, ours.accept_len.long())
        if case.rule == "greedy":
            same = same and torch.equal(following, ours.next_token)
        if not same:
            raise AssertionError(f"{case}: {name} and alignops decide differently")


def runners(case: Case) -> list[Runner]:
    """Ours first, then those of PyTorch."""
    found = [Runner("alignops", lambda: verify(case), 1, case.bytes_read)]
    for name, contestant in EAGER[case.rule].items():
        found.append(Runner(name, lambda contestant=contestant: contestant(case), 1))
    return found


# Memory


def temporaries(case: Case, run: Callable[[Case], object] = verify) -> int:
    """Bytes that a call needs at its highest point, results included."""
    run(case)
    return memory.peak_growth(lambda: run(case))
