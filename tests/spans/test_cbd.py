"""The CBD term: weights against the definition, gradients, the cache, the loss of pairs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alignops.losses import dpo_loss
from alignops.reference import spans as reference
from alignops.spans import TraceShield, cbd_dpo_loss, cbd_penalty, cbd_weights
from tests.spans.worlds import World, make_index, worlds

UNSAFE = [[11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [1, 2, 3] * 40]
TEXTS = [[30, *UNSAFE[0], 31], [1, 2, 3], [], [12, 13, 14, 15, 16, 17, 18, 19, 5]]


@pytest.fixture
def shield() -> TraceShield:
    return TraceShield(make_index(UNSAFE, 32))


# Weights


@given(worlds())
def test_weights_equal_definition(world: World) -> None:
    world.settings["max_match"] = 4096  # the definition takes maximal spans of any length
    text, first = world.seen()
    expected = reference.cbd_weights(text, world.categories(), first)
    found = cbd_weights(world.shield(), [world.text], prompt_lengths=[world.prompt])
    shift = len(world.text) - len(text)
    assert found.dtype == torch.float32
    assert not found[:shift].any()
    np.testing.assert_allclose(found[shift:], expected, rtol=1e-6, atol=1e-9)


@given(worlds(), st.integers(1, 30))
def test_weights_do_not_depend_on_the_batching(world: World, batch_tokens: int) -> None:
    shield = world.shield()
    rows = [world.text, [], world.text[::-1], world.text[: world.prompt]]
    prompts = [world.prompt, 0, 0, world.prompt]
    one = cbd_weights(shield, rows, prompt_lengths=prompts)
    seen: list[tuple[str, int, int]] = []
    parts = cbd_weights(
        shield,
        np.concatenate([np.array(r, np.int64) for r in rows]),
        np.cumsum([0, *map(len, rows)]),
        prompt_lengths=prompts,
        batch_tokens=batch_tokens,
        progress=lambda *report: seen.append(report),
    )
    assert torch.equal(one, parts)
    total = sum(map(len, rows))
    assert (seen[0], seen[-1]) == (("weigh", 0, total), ("done", total, total))


def test_weights_are_capped() -> None:
    docs = [list(range(40)), list(range(40, 2000))]
    shield = TraceShield(make_index(docs, 2000))
    a = cbd_weights(shield, [list(range(40))])
    assert torch.allclose(a, torch.full((40,), 100 / 40))


def test_cache(shield: TraceShield, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.npz"
    first = cbd_weights(shield, TEXTS, cache=path)
    assert first.any()
    assert [p.name for p in tmp_path.iterdir()] == ["weights.npz"]
    with monkeypatch.context() as patch:
        patch.setattr("alignops.spans.loss.passing_ends", None)  # nothing is computed
        assert torch.equal(cbd_weights(shield, TEXTS, cache=path), first)
    index = shield.categories[0].index
    for other, texts, prompts, changed in (
        (TraceShield(make_index(UNSAFE, 32), tau=19.0), TEXTS, None, "tau"),
        (TraceShield(make_index(UNSAFE[:1], 32)), TEXTS, None, "categories"),
        (TraceShield(index, allow=make_index([[1]], 32)), TEXTS, None, "allow"),
        (TraceShield(index, probs=[0.1] * 32), TEXTS, None, "surprisal"),
        (shield, TEXTS[:-1], None, "data"),
        (shield, [TEXTS[0][:4], TEXTS[0][4:], *TEXTS[1:]], None, "data"),
        (shield, TEXTS, [1, 0, 0, 0], "data"),
    ):
        with pytest.raises(ValueError, match=rf"stale, made with other .*{changed}"):
            cbd_weights(other, texts, prompt_lengths=prompts, cache=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a file of weights"):
        cbd_weights(shield, TEXTS, cache=path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a file of weights"):
        cbd_weights(shield, TEXTS, cache=path)


# The penalty


def make_logps(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.logsigmoid(3 * torch.randn(shape, dtype=dtype))


@pytest.mark.parametrize("carrier", ["unlikelihood", "logp"])
def test_penalty_equals_definition(carrier: str) -> None:
    logps = make_logps(5, 40)
    logps[0, :6] = torch.tensor([0.0, 1e-5, -1e-8, -0.6931, -0.6932, -300.0])
    mask, weights = torch.rand(5, 40) < 0.8, torch.rand(5, 40) * (torch.rand(5, 40) < 0.5)
    expected = reference.cbd_penalty(logps, mask, weights, carrier)
    found = cbd_penalty(logps, mask, weights, carrier=carrier)
    torch.testing.assert_close(found, expected)
    single = cbd_penalty(logps.float(), mask, weights, carrier=carrier)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, expected.float())
    half = cbd_penalty(logps.bfloat16().clamp(max=0), mask, weights, carrier=carrier)
    assert half.dtype == torch.float32


def test_penalty_gradcheck() -> None:
    logps = make_logps(3, 7).requires_grad_()
    mask, weights = torch.rand(3, 7) < 0.8, torch.rand(3, 7)
    assert torch.autograd.gradcheck(lambda x: cbd_penalty(x, mask, weights), logps)
    assert torch.autograd.gradcheck(lambda x: cbd_penalty(x, mask, weights, carrier="logp"), logps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_zero_off_the_flagged_tokens_only(dtype: torch.dtype) -> None:
    logits = (8 * torch.randn(4, 30, 11, dtype=dtype)).requires_grad_()
    target = torch.randint(0, 11, (4, 30))
    with torch.no_grad():
        logits[0, :9].scatter_(-1, target[0, :9, None], 90.0)  # certain, where l is clamped
        logits[0, 20:25].scatter_(-1, target[0, 20:25, None], -90.0)  # impossible
    logps = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
    logps.retain_grad()
    mask = torch.rand(4, 30) < 0.8
    weights = torch.rand(4, 30) * (torch.rand(4, 30) < 0.4)
    cbd_penalty(logps, mask, weights).sum().backward()
    flagged = mask & (weights != 0)
    assert logps.grad is not None
    assert not logps.grad[~flagged].any()
    possible = flagged & (logps.detach() > -80)
    assert (logps.grad[possible] > 0).all()
    # Bounded on the logits, and without a total.
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad.abs() <= weights[..., None] + 1e-6).all()
    assert logits.grad.sum(-1).abs().max() < (1e-4 if dtype == torch.float32 else 1e-9)


def test_gradient_on_the_logits() -> None:
    logits = torch.randn(1, 1, 5, dtype=torch.float64, requires_grad=True)
    logps = logits.log_softmax(-1)[..., 2]
    cbd_penalty(logps, torch.ones(1, 1), torch.ones(1, 1)).sum().backward()
    p = logits.detach().softmax(-1).flatten()
    expected = -p[2] * p / (1 - p[2])
    expected[2] = p[2]
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.flatten(), expected)


def test_padding_may_hold_anything() -> None:
    logps = torch.tensor([[-1.0, torch.nan, torch.inf, 5.0]], requires_grad=True)
    mask = torch.tensor([[True, False, False, False]])
    penalty = cbd_penalty(logps, mask, torch.full((1, 4), 2.0))
    penalty.sum().backward()
    assert penalty.isfinite().all()
    assert logps.grad is not None
    assert not logps.grad[0, 1:].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 2e-4])
def test_bad_log_probabilities_name_the_row(bad: float) -> None:
    logps = torch.full((3, 4), -1.0)
    logps[2, 1] = bad
    with pytest.raises(ValueError, match="row 2"):
        cbd_penalty(logps, torch.ones(3, 4, dtype=torch.bool), torch.ones(3, 4))


# The loss


def make_pairs(b: int = 6, t: int = 9, u: int = 7) -> tuple[Any, ...]:
    logps = [make_logps(b, n).requires_grad_() for n in (t, u)]
    refs = [make_logps(b, n) for n in (t, u)]
    masks = [torch.rand(b, n) < 0.8 for n in (t, u)]
    weights = [torch.rand(b, n) * (torch.rand(b, n) < 0.5) for n in (t, u)]
    return (*logps, *refs, masks, weights)


def sums(pairs: tuple[Any, ...]) -> list[Tensor]:
    masks = [*pairs[4], *pairs[4]]
    return [torch.where(m, x, 0.0).sum(-1) for x, m in zip(pairs[:4], masks, strict=True)]


def test_without_penalty_it_is_dpo_exactly() -> None:
    pairs = make_pairs()
    loss = cbd_dpo_loss(*pairs, beta=0.3, lam=0.0)
    expected = dpo_loss(*sums(pairs), beta=0.3)
    assert torch.equal(loss, expected)
    grads = [torch.autograd.grad(x, pairs[:2]) for x in (loss, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("on", [("chosen",), ("rejected",), ("chosen", "rejected")])
def test_loss_is_the_sum_of_its_parts(on: tuple[str, ...]) -> None:
    pairs = make_pairs()
    parts = dict(zip(("chosen", "rejected"), range(2), strict=True))
    penalty = sum(
        reference.cbd_penalty(pairs[i], pairs[4][i], pairs[5][i])
        for s, i in parts.items()
        if s in on
    )
    expected = dpo_loss(*sums(pairs), reduction="none") + 0.25 * penalty
    loss = cbd_dpo_loss(*pairs, lam=0.25, on=on)
    torch.testing.assert_close(loss, expected.mean())
    if on == ("chosen",):
        alone = cbd_dpo_loss(*pairs[:5], pairs[5][0], lam=0.25)
        assert torch.equal(alone, loss)


def test_pairs_that_conflict_more_are_dropped_or_exchanged() -> None:
    pairs = make_pairs(b=4)
    conflict = (np.array([30.0, 0, 25, 0]), torch.tensor([0.0, 30, 20, 0]))
    more = torch.tensor([True, False, False, False])  # 25 - 20 is within the margin
    options = {"lam": 0.5, "conflict": conflict, "margin": 6.0}
    kept = tuple([x[~more] for x in p] if isinstance(p, list) else p[~more] for p in pairs)
    dropped = cbd_dpo_loss(*pairs, pair="drop", **options)
    torch.testing.assert_close(dropped, cbd_dpo_loss(*kept, lam=0.5))
    pairs = make_pairs(b=4, t=7)
    exchanged: list[Any] = [p if isinstance(p, list) else p.detach().clone() for p in pairs]
    for a, b in ((0, 1), (2, 3)):
        exchanged[a][0], exchanged[b][0] = pairs[b][0].detach(), pairs[a][0].detach()
    for k in (4, 5):
        first, second = (x.clone() for x in pairs[k])
        first[0], second[0] = pairs[k][1][0], pairs[k][0][0]
        exchanged[k] = [first, second]
    swapped = cbd_dpo_loss(*pairs, pair="swap", **options)
    torch.testing.assert_close(swapped, cbd_dpo_loss(*exchanged, lam=0.5))
    nothing = cbd_dpo_loss(*pairs, pair="drop", conflict=(torch.ones(4), torch.zeros(4)))
    assert nothing == 0
    assert not any(g.any() for g in torch.autograd.grad(nothing, pairs[:2]))


def test_dpo_values() -> None:
    values = [torch.tensor([v]) for v in (-10.0, -14.0, -11.0, -12.0)]
    assert dpo_loss(*values).item() == pytest.approx(0.554355, abs=5e-7)
    smooth = dpo_loss(*values, label_smoothing=0.1).item()
    assert smooth == pytest.approx(0.9 * 0.554355 + 0.1 * 0.854355, abs=1e-6)
    many = [torch.randn(5, dtype=torch.bfloat16) for _ in range(4)]
    each = dpo_loss(*many, reduction="none")
    assert each.dtype == torch.float32
    assert torch.equal(each.sum(), dpo_loss(*many, reduction="sum"))
    assert torch.equal(each.mean(), dpo_loss(*many))
    far = dpo_loss(*(torch.tensor([v]) for v in (-1e6, 0.0, 0.0, 0.0)))
    assert far.item() == pytest.approx(1e5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"pair": "both"}, "pair"),
        ({"on": ()}, "on must"),
        ({"on": ("all",)}, "on must"),
        ({"on": ("rejected",), "weights": torch.ones(6, 9)}, "with those of rejected"),
        ({"pair": "swap"}, "conflict must be given"),
        ({"pair": "drop", "conflict": (torch.ones(5), torch.ones(6))}, "conflict must hold"),
        ({"carrier": "p"}, "carrier"),
        ({"mask": torch.ones(6, 9)}, "one shape"),
        ({"weights": torch.ones(6, 8)}, "weights must have shape"),
    ],
)
def test_bad_arguments(change: dict[str, Any], text: str) -> None:
    names = ("pi_w", "pi_l", "ref_w", "ref_l", "mask", "weights")
    arguments = dict(zip(names, make_pairs(), strict=True)) | change
    with pytest.raises(ValueError, match=text):
        cbd_dpo_loss(**arguments)


def test_bad_arguments_of_dpo() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="ref_rejected must have shape"):
        dpo_loss(x, x, x, x[:2])
    with pytest.raises(ValueError, match="reduction"):
        dpo_loss(x, x, x, x, reduction="median")
    with pytest.raises(ValueError, match="label_smoothing"):
        dpo_loss(x, x, x, x, label_smoothing=0.5)
