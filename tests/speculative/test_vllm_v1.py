"""The sampler of vLLM's V1 runner, on tensors as the engine makes them."""

import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from alignops.integrations import _vllm_v1, vllm
from alignops.integrations._engines import Case, self_test_cases
from alignops.reference import speculative as reference
from tests.speculative.engine_signatures import modules, stand_in


def params(**extra: Any) -> Any:
    """Sampling parameters of a request with arguments for alignops."""
    return SimpleNamespace(extra_args={f"alignops_{k}": v for k, v in extra.items()})


@dataclass
class SamplerOutput:
    sampled_token_ids: Tensor
    logprobs_tensors: Any


def top_k_top_p(logits: Tensor, k: Tensor | None, p: Tensor | None) -> Tensor:
    """The engine's filter, as far as the tests need it."""
    assert p is None or bool((p == 1).all())
    if k is None:
        return logits
    best = logits.sort(-1, descending=True).values.gather(1, k.long()[:, None] - 1)
    return logits.masked_fill(logits < best, float("-inf"))


def v1_engine(bias: Tensor | None = None) -> Any:
    """The engine's class with recorded methods: its processors add `bias` to the logits."""
    (module,) = [m for n, m in modules("fake_v1_sampler").items() if n == "fake_v1_sampler"]
    sys.modules["fake_v1_sampler"] = module
    module.__dict__.update(SamplerOutput=SamplerOutput, apply_top_k_top_p=top_k_top_p)

    def processed(logits: Tensor, **_: Any) -> Tensor:
        return logits if bias is None else logits + bias

    place = "vllm.v1.sample.rejection_sampler:RejectionSampler"
    methods = {
        "apply_logits_processors": stand_in(f"{place}.apply_logits_processors", processed),
        "_get_logprobs_tensors": stand_in(f"{place}._get_logprobs_tensors", lambda **kw: kw),
    }
    sampler = type(
        "Sampler",
        (),
        {
            "apply_logits_processors": stand_in(
                "vllm.v1.sample.sampler:Sampler.apply_logits_processors", processed
            )
        },
    )()
    base = type("RejectionSampler", (nn.Module,), methods | {"__module__": "fake_v1_sampler"})
    made = vllm.make_rejection_sampler(base, vllm.Verifier())()
    made.sampler = sampler
    return made


def v1_step(
    sampler: Any, case: Case, draft: bool = False, logprobs: int | None = None, **sampling: Any
) -> Any:
    counts = case.counts
    cu = (counts + 1).cumsum(0)
    rows = torch.arange(int(cu[-1]))
    bonus = cu - 1
    flat = [case.drafts[r, :n] for r, n in enumerate(counts.tolist())]
    probabilities = [case.draft[r, :n].softmax(-1) for r, n in enumerate(counts.tolist())]
    metadata = SimpleNamespace(
        draft_token_ids=torch.cat(flat).int(),
        num_draft_tokens=counts.tolist(),
        max_spec_len=case.drafts.shape[1],
        cu_num_draft_tokens=counts.cumsum(0).int(),
        cu_num_sampled_tokens=cu.int(),
        target_logits_indices=rows[~torch.isin(rows, bonus)].int(),
        bonus_logits_indices=bonus.int(),
        logits_indices=rows.int(),
    )
    given = {
        "temperature": case.temperature,
        "top_k": None,
        "top_p": None,
        "generators": {},
        "max_num_logprobs": logprobs,
    }
    return sampler(
        metadata,
        torch.cat(probabilities) if draft else None,
        case.target,
        SimpleNamespace(**given | sampling),
    )


@pytest.fixture
def known_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of a step that tell the row."""
    monkeypatch.setattr(
        _vllm_v1, "_keys", lambda metadata, number, device: torch.arange(number) + 5
    )


def v1_expected(
    case: Case, row: int, rule: str, q: Any = None, temperature: float = 1.0, **warp: Any
) -> list[int]:
    begin, count = int((case.counts[:row] + 1).sum()), int(case.counts[row])
    target = case.target[begin : begin + count + 1].numpy()
    laws = [reference.law(r, temperature, **warp) for r in target]
    drafts = case.drafts[row, :count].tolist()
    proposals = None if q is None else [reference.law(r) for r in q[row, :count].numpy()]
    return reference.verify(reference.Row(laws, drafts, proposals, row + 5, 0), rule).tokens


def v1_rows(output: SamplerOutput) -> list[list[int]]:
    assert output.sampled_token_ids.dtype == torch.int32
    return [[t for t in row if t != -1] for row in output.sampled_token_ids.tolist()]


@pytest.mark.usefixtures("known_seeds")
def test_v1_with_certain_drafts() -> None:
    sampler = v1_engine()
    for case in self_test_cases("lossless", 40):
        output = v1_step(sampler, case)
        assert output.sampled_token_ids.shape == (len(case.counts), case.drafts.shape[1] + 1)
        assert output.logprobs_tensors is None
        for r, row in enumerate(v1_rows(output)):
            rule = "lossless" if case.temperature[r] else "greedy"
            assert row == v1_expected(case, r, rule)


@pytest.mark.usefixtures("known_seeds")
def test_v1_with_temperature_and_filters() -> None:
    sampler = v1_engine()
    for case in self_test_cases("lossless", 20):
        rows = len(case.counts)
        size = case.target.shape[1]
        k = torch.full((rows,), min(3, size), dtype=torch.int32)
        output = v1_step(
            sampler,
            case,
            temperature=torch.full((rows,), 0.7),
            top_k=k,
            top_p=torch.full((rows,), 0.9),
        )
        for r, row in enumerate(v1_rows(output)):
            warp = {"top_k": min(3, size), "top_p": float(np.float32(0.9))}
            assert row == v1_expected(case, r, "lossless", temperature=0.7, **warp)


@pytest.mark.usefixtures("known_seeds")
def test_v1_with_a_drafters_probabilities() -> None:
    """They are of the unfiltered law, so the filter must not touch them."""
    sampler = v1_engine()
    for case in self_test_cases("lossless", 40):
        rows, size = len(case.counts), case.target.shape[1]
        k = torch.full((rows,), min(3, size), dtype=torch.int32)
        output = v1_step(sampler, case, draft=True, top_k=k, top_p=torch.ones(rows))
        q = case.draft.softmax(-1).log()
        for r, row in enumerate(v1_rows(output)):
            rule = "lossless" if case.temperature[r] else "greedy"
            assert row == v1_expected(case, r, rule, q, top_k=min(3, size))


@pytest.mark.usefixtures("known_seeds")
def test_v1_uses_the_engines_processors() -> None:
    for case in self_test_cases("lossless", 10):
        bias = torch.randn(case.target.shape[1]) * 3
        output = v1_step(v1_engine(bias), case, logprobs=2)
        shifted = Case(**vars(case) | {"target": case.target + bias})
        for r, row in enumerate(v1_rows(output)):
            rule = "lossless" if case.temperature[r] else "greedy"
            assert row == v1_expected(shifted, r, rule)
        asked = output.logprobs_tensors
        assert asked["max_num_logprobs"] == 2
        assert torch.equal(asked["sampled_token_ids"], output.sampled_token_ids)
        assert len(asked["target_logits"]) == int(case.counts.sum())
        assert len(asked["bonus_logits"]) == len(case.counts)


@pytest.mark.usefixtures("known_seeds")
def test_v1_rules_of_requests() -> None:
    case = next(
        c for c in self_test_cases("lossless") if len(c.counts) >= 3 and bool((c.counts > 0).all())
    )
    case.temperature.fill_(1)
    sampler = v1_engine()
    rules = ["typical", "lossless", "block", "relaxed"][: len(case.counts)]
    sampler.requests = lambda: [params(rule=rule) for rule in rules]
    got = v1_rows(v1_step(sampler, case))
    assert got == [v1_expected(case, r, rule) for r, rule in enumerate(rules)]
    for rule in ("coupled", "nudge"):
        sampler.requests = lambda rule=rule: [params(rule=rule)] * len(case.counts)
        with pytest.raises(ValueError, match=f"alignops_rule must not be '{rule}' with the V1"):
            v1_step(sampler, case)


def test_v1_seeded_requests_repeat() -> None:
    case = next(c for c in self_test_cases("lossless") if len(c.counts) >= 2)
    case.temperature.fill_(1)
    case.target.zero_()
    sampler = v1_engine()

    def run(seed: int) -> list[list[int]]:
        return v1_rows(v1_step(sampler, case, generators={1: torch.Generator().manual_seed(seed)}))

    assert run(3)[1] == run(3)[1]
    assert len({tuple(run(seed)[1]) for seed in range(12)}) > 1
    assert len({tuple(run(3)[0]) for _ in range(12)}) > 1


def test_v1_has_no_positions_for_coupled() -> None:
    with pytest.raises(ValueError, match="rule must be 'lossless' or 'block' with the V1 runner"):
        vllm.make_rejection_sampler(nn.Module, vllm.Verifier(vllm.Options("coupled")))
