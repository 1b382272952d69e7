"""The benchmark of concurrent attention: layouts and contestants are what they claim."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
MODEL = "Qwen2.5-0.5B"
PATTERNS = ("1 segment", "headers", "8 segments", "64 segments")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(ROOT)
    with torch.no_grad():
        yield


def _case(pattern: str, workers: int, dtype: torch.dtype, tokens: int = 400) -> Any:
    from benchmarks import attention_cases, attention_layouts, shapes

    layout = attention_layouts.make(pattern, tokens, workers)
    return attention_cases.make(shapes.ATTENTION[MODEL], layout, dtype)


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_layouts(pattern: str, workers: int) -> None:
    from benchmarks import attention_layouts

    assert pattern in attention_layouts.PATTERNS
    layout = attention_layouts.make(pattern, 16384, workers)
    assert layout.tokens == 16384
    headers = 0 if pattern == "1 segment" else 2 + max(workers - 2, 0)
    history = int(pattern.split()[0]) if pattern != "headers" else 1
    assert layout.segments == history + headers + workers
    own = {view[-1] for view in layout.views}
    assert len(own) == workers
    for worker, view in enumerate(layout.views):
        assert len(set(view)) == len(view)
        seen = own if pattern != "1 segment" else {view[-1]}
        assert set(view) >= seen
        assert not set(view) & (own - seen)
        assert layout.position(worker) == sum(sum(layout.blocks[b]) for b in view) - 1
        assert layout.origins(worker)[view[1]] == sum(layout.blocks[view[0]])


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_contestants_compute_the_same(
    pattern: str, dtype: torch.dtype, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import attention_cases as cases

    monkeypatch.setattr(cases.Case, "layers", 2)
    case = _case(pattern, workers, dtype)
    expected = cases.oracle(case)
    contestants = {name: build(case) for name, build in cases.PEERS.items()}
    cases.check(case, contestants)
    for contestant in contestants.values():
        out = contestant(1)
        assert out.shape == case.q.shape
        assert out.dtype == dtype
        assert cases.difference(out, expected) < cases.TOLERANCE[dtype] / 2


def test_a_missing_segment_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import attention_cases as cases

    monkeypatch.setattr(cases.Case, "layers", 1)
    case = _case("headers", 2, torch.float32)
    segments, _ = cases.Case.segments, case.stored_keys
    monkeypatch.setattr(cases.Case, "segments", lambda c: [*segments(c)[:1], *segments(c)[2:]])
    less = cases.per_segment(case)
    monkeypatch.setattr(cases.Case, "segments", segments)
    with pytest.raises(AssertionError, match="less differs from B2"):
        cases.check(case, {"B2": cases.per_segment(case), "less": less})


def test_b2_computes_what_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import attention_cases as cases

    rows = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        rows.append((q.shape[2] // case.shape.group, k.shape[2]))
        return torch.zeros_like(q), torch.zeros(q.shape[:3])

    monkeypatch.setattr(cases.Case, "layers", 1)
    case = _case("1 segment", 4, torch.float32)
    cases.per_segment(case, attend)(0)
    assert rows == [(4, 400 - 4 * 12), (1, 12), (1, 12), (1, 12), (1, 12)]


def test_copies_do_not_fit_into_caches() -> None:
    case = _case("1 segment", 1, torch.bfloat16)
    assert case.bytes == 2 * 2 * 400 * 2 * 64
    assert case.layers * case.bytes > 256 << 20


def test_page_picture_and_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra [bench]")
    from benchmarks import render, report

    kind = report.report_of("attention")
    environment = {
        **{"cores": 2, "cpu": "a CPU", "date": "2026-01-01T00:00:00", "isa": "avx2"},
        **{"alignops": "0", "torch": "0", "python": "0", "minutes": 1, "quick": False},
        **{"load_before": 0.0, "niceness": 0, "absent": []},
        "limits": {"1": {"read_GBps": 20.0}, "2": {"read_GBps": 30.0}},
    }
    entry = {"threads": 2, "bytes": 10**8, "least_s": 4e-3, "ratio": 0.5}
    measured = [
        {**entry, "case": f"M, S=16k, headers, float32, W={w}, 2 threads", "name": name,
         "seconds": (1 + (name == "B2")) * 4e-3}
        for w in (1, 2, 4)
        for name in ("alignops", "B2", "read")
    ]  # fmt: skip
    what = "against B2, headers"
    bars = [
        {"what": what, "case": "c", "value": value, "bar": 1.0, "unit": "x", "note": "",
         "at_most": False, "hit": value >= 1.0}
        for value in (2.0, 0.9)
    ]  # fmt: skip
    document = {"environment": environment, "measurements": measured, "bars": bars}
    page = render.markdown(document, "picture.png", kind)
    assert f"| {what} | 1 | 0.9 - 2 x | **missed in part**, 1 of 2 |" in page
    assert "| B2 | 8000.0 us | 0.50 |" in page
    assert "| 2 | 30.0 |" in page
    kind.plot(document, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    assert f"| {what} | 0.9 - 2 x |" in kind.readme(document, "name")


def test_bars_are_those_of_the_cases() -> None:
    from benchmarks import attention_report as report

    rows = report.rows(quick=False)
    for dtype in (torch.float32, torch.bfloat16):
        for pattern in report.B2_BARS:
            row = next(
                r
                for r in rows
                if (r.model, r.tokens, r.pattern, r.dtype) == (report.MODEL, 16384, pattern, dtype)
            )
            assert row.all_threads
            assert {1, 2, 4} <= set(row.workers)
            assert "B2" in row.peers
    assert {r.tokens for r in rows} == {300, 1024, 4096, 16384, 65536}
    assert {w for r in rows for w in r.workers} == {1, 2, 4, 8}
    assert all("B2" in r.peers for r in (*rows, *report.rows(quick=True)))
