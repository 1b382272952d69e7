"""The benchmark of verification: contestants decide alike, and ours needs few temporaries."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["greedy", "lossless"])
def test_contestants_decide_alike(rule: str, dtype: torch.dtype) -> None:
    from benchmarks import speculative_cases as cases

    for seed in range(3):
        case = cases.make(rule, 6, 5000, dtype, seed=seed)
        cases.check(case)
        assert case.rows_read == sum(int(n) + 1 for n in case.accept_len)
        assert 6 <= case.rows_read <= 36


def test_all_drafts_stand_if_asked_for() -> None:
    from benchmarks import speculative_cases as cases

    case = cases.make("greedy", 4, 1000, torch.float32, acceptance=1.0)
    assert case.accept_len.eq(cases.DRAFTS).all()
    assert case.bytes_read == 4 * (cases.DRAFTS + 1) * 1000 * 4


def test_temporaries_are_a_few_words_per_tile() -> None:
    from benchmarks import speculative_cases as cases

    case = cases.make("lossless", 8, 49152, torch.float32)
    b, k, v = case.shape
    # 100 KB for the histograms of a workspace, and what the interpreter needs.
    assert cases.temporaries(case) < 64 * b * k * v / 4096 + (1 << 20)
    assert cases.temporaries(case, cases.lossless_eager) > b * k * v * 4
