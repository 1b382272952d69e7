"""The brute force that other tests compare with agrees with the stock model itself."""

import pytest
import torch

from tests.attention.models import MODELS, VOCAB, model
from tests.attention.slow_model import SlowModel


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_one_worker_is_the_stock_model(name: str) -> None:
    net = model(name)
    slow, ids = SlowModel(name, net), torch.randint(VOCAB, (60,)).tolist()
    common, finished, own = (slow.block() for _ in range(3))
    slow.prefill(common, ids[:20], [common])
    slow.prefill(finished, ids[20:35], [common, finished])
    slow.move(finished, common)
    slow.prefill(own, ids[35:50], [common, finished, own])
    rows = [slow.step([[common, own]], [[token]])[0] for token in ids[50:]]
    expected = net(input_ids=torch.tensor([ids])).logits[0, 50:]
    assert (torch.stack([row for row in rows if row is not None]) - expected).abs().max() <= 5e-6


@torch.no_grad()
def test_workers_see_each_other() -> None:
    net = model("llama")
    seen = {}
    for visibility in ("inclusive", "lagged"):
        for other in (5, 6):
            slow = SlowModel("llama", net)
            a, b = slow.block(), slow.block()
            views = [[b, a], [a, b]]
            seen[visibility, other] = slow.step(views, [[1], [other]], visibility)[0]
    assert torch.equal(seen["lagged", 5], seen["lagged", 6])
    assert not torch.equal(seen["inclusive", 5], seen["inclusive", 6])
