"""Keys and values lie where they should: compared with those of the model's own cache."""

from __future__ import annotations

import pytest
import torch

from alignops.integrations.speculative import HFAdapter
from alignops.speculative.invariants import CheckedAdapter
from alignops.speculative.placement import PLACEMENTS, Placement, StablePlacement, choose_layout
from alignops.speculative.stability import check_row_invariance
from alignops.speculative.stats import SpecStats
from tests.speculative.models import KINDS, VOCAB, model, prompts

PLACES = [(kind, layout) for kind in KINDS for layout in HFAdapter(model(kind)).layouts]


def _place(kind: str, layout: str, rows: int, capacity: int = 64) -> Placement:
    adapter = CheckedAdapter(HFAdapter(model(kind)))
    return PLACEMENTS[layout](adapter, rows, capacity, SpecStats())


def _own_cache(kind: str, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values that the library computes for a text, each (H, c, D)."""
    net = model(kind)
    adapter = HFAdapter(net)
    cache = adapter.new_cache(1, len(tokens))
    cache.begin(torch.zeros(1, dtype=torch.int32), len(tokens), slice(0, 1))
    arguments = {"attention_mask": None, "use_cache": True, adapter._cache_name: cache}
    with torch.no_grad():
        net(input_ids=tokens[None], **arguments)
    return [t[0, :, : len(tokens)] for t in cache.tensors]


def _check(kind: str, placement: Placement, row: int, tokens: torch.Tensor) -> None:
    """All but the last token of a row have keys and values, and they are right."""
    parked = placement.park(row)
    placement.resume(row, parked)
    own = _own_cache(kind, tokens[:-1])
    for found, expected in zip(parked.tensors[:-2], own, strict=True):
        # The norms and rotary angles of transformers are float32, whatever the model is.
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    ids, positions = (t[0, :, 0].tolist() for t in parked.tensors[-2:])
    assert sorted(zip(positions, ids, strict=True)) == list(enumerate(tokens[:-1].tolist()))


@pytest.mark.parametrize(("kind", "layout"), PLACES)
def test_contents_after_rounds_of_any_lengths(kind: str, layout: str) -> None:
    generator = torch.Generator().manual_seed(3)
    placement = _place(kind, layout, rows=3)
    texts = prompts([4, 1, 9])
    placement.prefill([0, 1, 2], texts)
    for turn in range(12):
        if turn == 6:  # one sequence ends, another begins
            placement.clear(1)
            texts[1] = prompts([13], seed=8)[0]
            placement.prefill([1], [texts[1]])
        if turn == 9:  # one waits elsewhere, and comes back
            parked = placement.park(0)
            placement.resume(0, parked)
        drafts = torch.randint(VOCAB, (3, 3), generator=generator)
        counts = torch.randint(1, 5, (3,), generator=generator, dtype=torch.int32)
        if layout == "rollback":
            counts[:] = counts.min()
        ids = torch.cat([torch.stack([t[-1:] for t in texts]), drafts], 1)
        placement.forward(ids, counts)
        # As many as were fed: drafts that stand, and a token that follows, without keys and values.
        taken = [int(torch.randint(0, int(c), (), generator=generator)) for c in counts]
        if layout == "rollback":
            taken = [min(taken)] * 3
        following = torch.randint(VOCAB, (3, 1), generator=generator)
        texts = [
            torch.cat([text, drafts[row, : taken[row]], following[row]])
            for row, text in enumerate(texts)
        ]
        placement.commit([count + 1 for count in taken])
        for row, text in enumerate(texts):
            assert placement.lengths[row] == len(text)
            if layout in ("ragged", "defer") or turn % 3 == 2:  # parking may move what follows
                _check(kind, placement, row, text)


def test_bytes_moved_are_those_appended() -> None:
    placement = _place("rope", "ragged", rows=2)
    placement.prefill([0, 1], prompts([5, 7]))
    before = placement.stats.bytes_moved
    placement.forward(torch.zeros(2, 4, dtype=torch.int64), torch.tensor([4, 4]))
    placement.commit([1, 3])
    per_token = 2 * 2 * 2 * 4 * 8  # layers, keys and values, heads, head size, float64
    assert placement.cache.bytes_per_token == per_token
    assert placement.stats.bytes_moved - before == 2 * per_token * 2 * 4
    assert placement.stats.bytes_floor == placement.stats.bytes_moved


def test_rows_of_equal_steps_are_not_shifted() -> None:
    placement = _place("rope", "realign", rows=2)
    placement.prefill([0, 1], prompts([5, 7]))
    ids, counts = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([4, 4], dtype=torch.int32)
    grouped = []
    for steps in ([2, 2], [3, 1], [4, 4], [1, 1]):
        placement.forward(ids, counts)
        grouped.append(placement.grouped)
        placement.commit(steps)
    assert grouped == [True, True, False, True]


def test_cache_grows_and_keeps_its_contents() -> None:
    placement = _place("rope", "ragged", rows=2, capacity=8)
    texts = prompts([60, 3])
    placement.prefill([1, 0], [texts[1], texts[0]])
    before = placement.cache.capacity
    for _ in range(10):
        ids = torch.zeros(2, 8, dtype=torch.int64)
        ids[:, 0] = torch.stack([text[-1] for text in texts])
        placement.forward(ids, torch.tensor([8, 8], dtype=torch.int32))
        placement.commit([8, 8])
        texts = [torch.cat([t, t.new_zeros(8)]) for t in texts]
        if max(placement.lengths) > 110:
            break
    assert placement.cache.capacity > before
    _check("rope", placement, 0, texts[0])
    _check("rope", placement, 1, texts[1])


def test_fixed_capacity_is_an_error_before_the_forward() -> None:
    adapter = HFAdapter(model())
    placement = StablePlacement(adapter, 1, 8, SpecStats(), columns=4)
    placement.prefill([0], prompts([5]))
    placement.forward(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([4], dtype=torch.int32))
    placement.commit([4])
    with pytest.raises(ValueError, match="12 slots are needed"):
        placement.forward(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([4]))


def test_layouts_that_do_not_fit() -> None:
    bloom = HFAdapter(model("alibi_mask"))
    assert choose_layout(bloom, "auto", False) == "defer"
    for layout, stable in (("ragged", False), ("auto", True), ("paged", False)):
        with pytest.raises(ValueError, match="layout must be"):
            choose_layout(bloom, layout, stable)
    with pytest.raises(ValueError, match="layouts must be among"):
        HFAdapter(model("alibi"), layouts=["defer"])


def test_row_invariance_names_the_layer() -> None:
    adapter = HFAdapter(model("rope"))
    for rows, columns in ((1, 1), (3, 4)):
        check_row_invariance(adapter, rows, columns)
    second = model("rope").model.layers[1].self_attn.v_proj
    hook = second.register_forward_hook(
        lambda module, inputs, out: out + 1e-3 * torch.arange(len(out)).view(-1, 1, 1)
    )
    try:
        with pytest.raises(RuntimeError, match="layer 1"):
            check_row_invariance(adapter, 3, 4)
    finally:
        hook.remove()
    with pytest.raises(ValueError, match="Q must be"):
        check_row_invariance(adapter, 2, 0)
