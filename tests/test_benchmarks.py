"""The measuring instruments: baselines compute what they claim, reports say what was measured."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import alignops
from alignops import ternary, testing

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


@pytest.mark.skipif("avx2" not in testing.available_isas(), reason="the baseline is AVX2 code")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("row_tiles", [1, 2])
def test_classic_lookup_equals_ours(row_tiles: int) -> None:
    from benchmarks.classic import ClassicLookup

    w = ternary.quantize(torch.randn(128, 512))
    x = torch.randn(512)
    y = torch.from_numpy(ClassicLookup(w.idx, w.sign, w.scale)(x.numpy(), row_tiles))
    ours = alignops.ternary_linear(x, w, act="a8g")
    # The same integers; scales are multiplied in another order.
    torch.testing.assert_close(y, ours, rtol=1e-5, atol=1e-5)


def test_topk_reference_equals_ours() -> None:
    from benchmarks.contestants import topk_fake_quant

    w = torch.randn(32, 64, requires_grad=True)
    lam, g = torch.tensor(0.25), torch.randn(32, 64)
    theirs = topk_fake_quant(w, lam)
    ours = ternary.ops.ternary_fake_quant(w, lam, 64, 1, torch.float32)
    torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(
        torch.autograd.grad(theirs, w, g)[0], torch.autograd.grad(ours, w, g)[0]
    )


def test_decode_step_counts_its_bytes() -> None:
    from benchmarks import contestants, shapes

    model = shapes.Model(
        "tiny",
        2,
        (
            ("q", 64, 64),
            ("k", 32, 64),
            ("v", 32, 64),
            ("o", 64, 64),
            ("gate", 128, 64),
            ("up", 128, 64),
            ("down", 64, 128),
        ),
        (96, 64),
    )
    step = contestants.decode_step(model)
    step.run()
    scales = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    assert step.weight_bytes == model.linear_weights * 5 // 32 + 4 * scales + 96 * 64 + 4 * 96


def test_alternate_takes_medians() -> None:
    from benchmarks import timing

    calls: list[str] = []
    runners = [timing.Runner(n, lambda n=n: calls.append(n), 1) for n in "ab"]
    assert set(timing.alternate(runners, rounds=3, seconds_per_turn=0)) == {"a", "b"}
    assert calls[:4] == ["a", "a", "b", "b"]  # a pass that is not timed, one to estimate
    assert calls[4:] == ["a", "a", "b", "b", "b", "b", "a", "a", "a", "a", "b", "b"]


def test_report_says_hit_and_missed() -> None:
    from benchmarks import render

    def bar(value: float, limit: float | None) -> dict[str, object]:
        hit = limit is None or value >= limit
        entry = {"what": "speed", "case": "c", "value": value, "bar": limit}
        return {**entry, "unit": "x", "note": "", "hit": hit}

    document = {"bars": [bar(3.0, 2.0), bar(1.0, 2.0), bar(9.0, None)]}
    assert "| speed | 2 | 1 - 3 x | **missed in part**, 1 of 2 |" in render.summary(document)
    assert "| speed | c | 1 x | 2 | **missed** |" in render.bars(document)
    assert "| speed | c | 9 x |  |  |" in render.bars(document)


def test_report_of_what_should_be_small() -> None:
    from benchmarks import render, report

    low, high = (report.Bar("time", "c", v, 2.0, "ms", at_most=True) for v in (1.5, 2.5))
    assert (low.hit, high.hit) == (True, False)
    document = {"bars": [{**dataclasses.asdict(b), "hit": b.hit} for b in (low, high)]}
    assert "| time | <= 2 | 1.5 - 2.5 ms | **missed in part**, 1 of 2 |" in render.summary(document)


def test_figures_go_between_their_marks() -> None:
    from benchmarks import render, ternary_figures

    environment = {"cores": 2, "cpu": "a CPU", "date": "2026-01-01T00:00:00"}
    case = f"{ternary_figures.README_CASE}, 2 threads"
    measured = [
        {"case": case, "name": "alignops a8g", "seconds": 1e-4},
        {"case": case, "name": "torch bf16", "seconds": 2e-3},
    ]
    document = {"environment": environment, "measurements": measured}
    page = "top\n<!-- figures: old -->\nwrong\n<!-- end of figures -->\nbottom\n"
    figures = ternary_figures.readme(document, "new")
    assert render.with_figures(page, "spans", "new", figures) == page
    new = render.with_figures(page, "ternary", "new", figures)
    assert new.startswith("top\n<!-- figures: new -->")
    assert new.endswith("-->\nbottom\n")
    assert "| torch bf16 | 2000 | 20.0 x |" in new
    assert "wrong" not in new


def test_page_picture_and_figures_of_spans(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra [bench]")
    from benchmarks import render, report

    kind = report.report_of("spans")
    reads = {"20000000": {"1": 120.0, "32": 7.0}}
    search = {"case": "20 M tokens, count of 8 tokens", "name": "alignops, batch", "threads": 1}
    search |= {"seconds": 5e-7, "floor_s": 1e-7, "ratio": 0.2, "tokens": 20_000_000, "reads": 30.0}
    bar = {"what": "matcher extend", "case": "20 M tokens", "value": 3.0, "bar": 10.0, "unit": "us"}
    environment = {
        **{"cores": 2, "cpu": "a CPU", "date": "2026-01-01T00:00:00", "isa": "avx2"},
        **{"alignops": "0", "torch": "0", "python": "0", "minutes": 1, "quick": False},
        **{"load_before": 0.0, "niceness": 0, "absent": [], "note": "Text: none."},
        "limits": {"1": {"read_GBps": 30.0, "random_read_ns": reads}},
    }
    document = {
        "environment": environment,
        "measurements": [search],
        "bars": [{**bar, "note": "", "at_most": True, "hit": True}],
    }
    page = render.markdown(document, "picture.png", kind)
    assert "index of 20 M tokens: 120.0 (1), 7.0 (32)" in page
    assert "| matcher extend | <= 10 | 3 us | hit, 1 of 1 |" in page
    assert "| alignops, batch | 500 ns | 0.20 |" in page
    kind.plot(document, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    assert "| matcher extend | 20 M tokens | 3 us |" in kind.readme(document, "name")


def test_page_picture_and_figures_of_speculative(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra [bench]")
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    from benchmarks import render, report

    kind = report.report_of("speculative")
    environment = {
        **{"cores": 2, "cpu": "a CPU", "date": "2026-01-01T00:00:00", "isa": "avx2"},
        **{"alignops": "0", "torch": "0", "python": "0", "minutes": 1, "quick": False},
        **{"load_before": 0.0, "niceness": 0, "absent": []},
        "limits": {"1": {"read_GBps": 30.0}},
    }
    case = "SmolLM2-135M on code, B=8, 2 threads"
    entry = {"case": "verify", "name": "alignops", "seconds": 1e-3, "bytes": 10**7, "ratio": 0.5}
    curve = [
        {**entry, "case": case, "name": f"alignops K={k}", "seconds": 0.1 / (1 + k), "ratio": None}
        for k in (0, 3)
    ]
    what = "prompt lookup against plain batched decoding"
    bars = [
        {"what": what, "case": case, "value": value, "bar": 1.2, "unit": "x", "note": "",
         "at_most": False, "hit": value >= 1.2}
        for value in (1.3, 1.1)
    ]  # fmt: skip
    document = {"environment": environment, "measurements": [entry, *curve], "bars": bars}
    page = render.markdown(document, "picture.png", kind)
    assert f"| {what} | 1.2 | 1.1 - 1.3 x | **missed in part**, 1 of 2 |" in page
    assert "| alignops K=3 | 40.0 tokens/s |" in page
    kind.plot(document, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    assert f"| {what} | 1.1 - 1.3 x |" in kind.readme(document, "name")


def test_corpus_is_repeated_and_spliced() -> None:
    from benchmarks import corpus

    rng = np.random.default_rng(0)
    documents = [np.append(rng.integers(0, 50, 20), corpus.SEPARATOR) for _ in range(300)]
    tokens = np.concatenate(documents).astype(np.uint16)
    repeated = corpus.repeat(tokens).reshape(300, 21)
    assert 150 < len(np.unique(repeated, axis=0)) < 250
    assert (repeated[:, -1] == corpus.SEPARATOR).all()
    assert len(corpus.splice(tokens, 5000)) == 5000
