"""Models of transformers: what is refused, what stays unchanged, threads, errors on the way."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers as tf

from alignops.attention import LayoutError, PoolExhausted, PositionError, UnsupportedModel
from alignops.attention.adapter import ConcurrentModel
from alignops.integrations._attention_layers import NAME, HogwildCache, attend
from alignops.integrations._attention_view import attention_view
from alignops.integrations.attention import HFConcurrentModel, concurrent_model
from tests.attention.models import VOCAB, cache_name, model
from tests.attention.test_models import _one_thread as _one_thread
from tests.attention.test_models import concurrent, ids_of, stock_logits


class HookError(Exception):
    """Raised by hooks."""


def started(workers: HFConcurrentModel, count: int = 2) -> tuple[Any, Any, list[Any]]:
    """A workspace with a prompt, and workers who see each other."""
    ws = workers.workspace()
    common = ws.new_block()
    owns = [ws.new_block() for _ in range(count)]
    workers.prefill(ws, common, ids_of(21))
    for own in owns:
        ws.add_worker(f"worker {own.id}", [common, *(o for o in owns if o is not own), own])
    return ws, common, owns


# The model stays as it is


def test_the_model_stays_as_it_is() -> None:
    net = copy.deepcopy(model("llama"))
    before, state = net.config.to_dict(), {k: v.clone() for k, v in net.state_dict().items()}
    modules = {name: vars(m).copy() for name, m in net.named_modules()}
    expected = stock_logits(net, ids_of(9))
    workers = concurrent_model(net, num_pages=32)
    ws, _, owns = started(workers)
    seen: list[str] = []

    def spy(module: Any, _: Any) -> None:
        # While workers run, others use the model: with its own attention function.
        seen.append(net.config._attn_implementation)
        assert torch.equal(stock_logits_untouched(net), expected)

    def stock_logits_untouched(net: Any) -> Any:
        handle.remove()
        return stock_logits(net, ids_of(9))

    handle = net.model.norm.register_forward_pre_hook(spy)
    workers.forward(ws, [[1], [2]])
    assert seen == ["sdpa"]
    assert net.config.to_dict() == before
    assert {name: vars(m) for name, m in net.named_modules()}.keys() == modules.keys()
    assert all(vars(m) == modules[name] for name, m in net.named_modules())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert torch.equal(stock_logits(net, ids_of(9)), expected)
    assert [own.length for own in owns] == [1, 1]


def test_a_view_shares_weights_and_copies_configurations() -> None:
    net = model("gemma3")
    view = attention_view(net, NAME)
    assert type(view) is type(net)
    assert [*map(id, view.parameters())] == [*map(id, net.parameters())]
    assert [*map(id, view.buffers())] == [*map(id, net.buffers())]
    for ours, stock in zip(view.modules(), net.modules(), strict=True):
        if hasattr(stock, "config"):
            assert ours.config is not stock.config
            assert ours.config._attn_implementation == NAME
            assert stock.config._attn_implementation == "sdpa"
        elif ours is not stock:
            assert any(hasattr(m, "config") for m in stock.modules())
    assert view.model.config is view.model.layers[0].self_attn.config
    assert net.get_output_embeddings() is view.get_output_embeddings()


def test_a_view_follows_weights() -> None:
    net = copy.deepcopy(model("llama"))
    workers = concurrent_model(net, num_pages=16)
    with torch.no_grad():
        net.lm_head.weight.mul_(2)
    ws = workers.workspace()
    (logits,) = workers.forward(ws, [ids_of(9)], views=[[ws.new_block()]], all_logits=True).logits
    assert (logits - stock_logits(net, ids_of(9))).abs().max() <= 1e-5


def test_the_attention_function_works_only_inside_a_step() -> None:
    x = torch.zeros(1, 4, 1, 8)
    with pytest.raises(RuntimeError, match=r"inside `ConcurrentModel.forward`.*got no step"):
        attend(torch.nn.Identity(), x, x, x, None)
    view = attention_view(model("llama"), NAME)
    with pytest.raises(RuntimeError, match="got no step"):
        view(input_ids=torch.tensor([[1]]))
    assert NAME not in tf.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS


def test_cache_is_a_witness() -> None:
    cache, x = HogwildCache(12), torch.zeros(1, 2, 3, 8)
    assert cache.update(x, x, 1)[0] is x
    assert cache.update(x, x, 1, {"cache_position": None}, kwargs={})[1] is x
    assert cache.get_seq_length() == cache.get_query_offset(1) == 12
    assert cache.get_mask_sizes(3, 0) == (15, 0)
    assert cache.get_mask_sizes(torch.arange(3), 0) == (15, 0)
    assert isinstance(cache, tf.Cache)
    assert not cache.is_compileable


def test_concurrent_model_is_what_sessions_drive() -> None:
    workers = concurrent("qwen3")
    assert isinstance(workers, ConcurrentModel)
    assert workers.vocab_size == VOCAB
    assert workers.max_length == 4096
    assert workers.device == torch.device("cpu")
    assert workers.pool.k[0].shape[1:] == (2, 16, 16)


# Forward


def test_entries_have_any_number_of_tokens() -> None:
    workers = concurrent("llama")
    ws, common, owns = started(workers, 3)
    result = workers.forward(ws, [[1, 2, 3], [], [4]], mass=True)
    assert result.logits.shape == (3, VOCAB)
    assert result.logits[1].isnan().all()
    assert result.logits[[0, 2]].isfinite().all()
    assert set(result.blocks) == {common, *owns}
    assert result.mass.shape == (3, len(result.blocks))
    assert torch.allclose(result.mass.sum(1), torch.tensor([1.0, 0.0, 1.0]), atol=1e-5)
    assert [own.length for own in owns] == [3, 0, 1]
    rows = workers.forward(ws, [[], [5, 6], []], all_logits=True).logits
    assert [row.shape for row in rows] == [(0, VOCAB), (2, VOCAB), (0, VOCAB)]


def test_no_tokens_at_all_do_nothing() -> None:
    net = copy.deepcopy(model("llama"))
    workers = concurrent_model(net, num_pages=32)
    ws, common, owns = started(workers)
    net.register_forward_pre_hook(_raise)
    result = workers.forward(ws, [[], []], mass=True)
    assert result.logits.shape == (2, VOCAB)
    assert result.logits.isnan().all()
    assert not result.mass.any()
    assert workers.forward(ws, [], workers=[]).logits.shape == (0, VOCAB)
    workers.prefill(ws, common, [])
    assert [b.length for b in (common, *owns)] == [21, 0, 0]


def test_some_workers_and_views_of_their_own() -> None:
    workers = concurrent("llama")
    ws, common, owns = started(workers, 3)
    first = workers.forward(ws, [[7]], workers=[ws.workers[1]]).logits
    assert [own.length for own in owns] == [0, 1, 0]
    note = ws.new_block()
    both = workers.forward(ws, [[7], [8]], views=[[common, note], [common, owns[0]]]).logits
    assert [b.length for b in (note, *owns)] == [1, 1, 1, 0]
    assert torch.allclose(both[0], first[0], atol=5e-6)


@pytest.mark.parametrize("reference", [False, True])
def test_mass_is_the_mean_over_layers_heads_and_tokens(reference: bool) -> None:
    net = model("llama")
    workers = concurrent_model(net, num_pages=32, reference=reference)
    ws, common, owns = started(workers)
    result = workers.forward(ws, [[1, 2, 3]], views=[[common, owns[0]]], mass=True)
    with torch.no_grad():
        attentions = attention_view(net, "eager")(
            input_ids=torch.tensor([[*ids_of(21), 1, 2, 3]]), output_attentions=True
        ).attentions
    share = torch.stack(attentions)[..., 21:, :21].sum(-1).mean()
    assert [block.id for block in result.blocks] == [common.id, owns[0].id]
    assert torch.allclose(result.mass, torch.stack([share, 1 - share])[None], atol=1e-6)


# Errors


def _raise(*_: Any) -> None:
    raise HookError


@pytest.mark.parametrize("where", ["embed_tokens", "layers.1.mlp", "norm"])
def test_an_error_in_a_forward_leaves_everything_unchanged(where: str) -> None:
    net = copy.deepcopy(model("llama"))
    workers = concurrent_model(net, num_pages=32)
    ws, common, owns = started(workers)
    workers.forward(ws, [[1], [2]])
    stats, lengths = ws.stats(), [b.length for b in (common, *owns)]
    handle = net.model.get_submodule(where).register_forward_pre_hook(_raise)
    for _ in range(100):
        with pytest.raises(HookError):
            workers.forward(ws, [[3] * 40, [4] * 40])
    with pytest.raises(HookError):
        workers.prefill(ws, common, ids_of(40))
    handle.remove()
    assert ws.stats() == stats
    assert [b.length for b in (common, *owns)] == lengths
    assert [list(own.tokens) for own in owns] == [[1], [2]]
    other, _, _ = started(workers)
    expected = workers.forward(other, [[1], [2]])
    expected = workers.forward(other, [[3], [4]])
    assert torch.equal(workers.forward(ws, [[3], [4]]).logits, expected.logits)


def test_a_full_pool_changes_nothing() -> None:
    workers = concurrent_model(model("llama"), num_pages=3, page_size=16)
    ws = workers.workspace()
    block = ws.new_block()
    workers.prefill(ws, block, ids_of(30))
    with pytest.raises(PoolExhausted):
        workers.forward(ws, [ids_of(40)], views=[[block]])
    assert block.length == 30
    workers.forward(ws, [ids_of(18)], views=[[block]])


@pytest.mark.parametrize("bad", [-1, VOCAB])
def test_ids_out_of_range(bad: int) -> None:
    workers = concurrent("llama")
    ws, common, owns = started(workers)
    with pytest.raises(ValueError, match=f"forward: inputs must be ids below {VOCAB}, got"):
        workers.forward(ws, [[3], [bad]])
    assert [b.length for b in (common, *owns)] == [21, 0, 0]


def test_prefill_refuses() -> None:
    workers = concurrent("llama")
    ws, common, owns = started(workers)
    with pytest.raises(ValueError, match="prefill: chunk must be at least 1, got 0"):
        workers.prefill(ws, common, [1], chunk=0)
    for view in ([], [common, owns[0]], [owns[0], common, owns[1]]):
        with pytest.raises(LayoutError, match="prefill: view must end with the block"):
            workers.prefill(ws, common, [1], view)
    assert common.length == 21


def test_positions_beyond_the_maximum() -> None:
    net = tf.LlamaForCausalLM(_llama(max_position_embeddings=30)).eval()
    workers = concurrent_model(net, num_pages=32)
    ws, common, owns = started(workers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        workers.forward(ws, [[1] * 5, [2] * 4])  # up to position 29
    with pytest.warns(UserWarning, match=r"position 30 .* max_position_embeddings = 30"):
        workers.forward(ws, [[1], []])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        workers.forward(ws, [[1], []])  # said once
    strict = concurrent_model(net, num_pages=32, strict_positions=True)
    ws, common, owns = started(strict)
    strict.forward(ws, [[1] * 5, [2] * 4])
    stats = ws.stats()
    with pytest.raises(PositionError, match=r"position 30 .* max_position_embeddings = 30"):
        strict.forward(ws, [[1], []])
    assert [b.length for b in (common, *owns)] == [21, 5, 4]
    assert ws.stats() == stats
    strict.forward(ws, [[1]], views=[[common, ws.new_block()]])


# Threads


def test_two_workspaces_in_two_threads() -> None:
    workers = concurrent("smollm3")
    expected = [_run_alone(workers, seed) for seed in range(3)]
    found: list[Any] = [None] * len(expected)
    barrier = threading.Barrier(len(found))

    def run(seed: int) -> None:
        barrier.wait()
        found[seed] = _run_alone(workers, seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert len(set(map(str, expected))) == len(expected)


def _run_alone(workers: HFConcurrentModel, seed: int) -> list[list[int]]:
    ws, common, owns = started(workers)
    given: Sequence[Sequence[int]] = [[seed, 1], [seed + 9]]
    tokens = []
    for step in range(24):
        logits = workers.forward(ws, given).logits
        given = [[int(row.argmax())] for row in logits]
        tokens.append([*given[0], *given[1]])
        if step == 11:
            ws.move(owns[0], common)
    return tokens


# Refusals


def _llama(**more: Any) -> Any:
    size = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tf.LlamaConfig(**(size | heads | more), bos_token_id=None, eos_token_id=None)


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


SMALL = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None}
REFUSED: dict[str, tuple[Any, str]] = {
    "learned positions": (
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2)),
        "GPT2LMHeadModel: layer 0",
    ),
    "ALiBi": (
        lambda: tf.BloomForCausalLM(tf.BloomConfig(**SMALL, hidden_size=16, n_layer=1, n_head=2)),
        "BloomForCausalLM",
    ),
    "outside the interface": (
        lambda: tf.GPTJForCausalLM(
            tf.GPTJConfig(**SMALL, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
        ),
        "GPTJForCausalLM",
    ),
    "dynamic frequencies": (
        lambda: tf.LlamaForCausalLM(_llama(**_rope("dynamic", factor=2.0))),
        "dynamic",
    ),
    "several axes": (
        lambda: tf.LlamaForCausalLM(_llama(**_rope("default", mrope_section=[1, 1, 2]))),
        "M-RoPE",
    ),
    "recurrent": (
        lambda: tf.MambaForCausalLM(
            tf.MambaConfig(**SMALL, hidden_size=16, num_hidden_layers=1, state_size=4)
        ),
        "MambaForCausalLM",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, text = REFUSED[name]
    net = make().eval()
    before = net.config._attn_implementation
    with pytest.raises(UnsupportedModel, match=text):
        concurrent_model(net, num_pages=16)
    assert net.config._attn_implementation == before


def test_query_scaling_by_position_is_refused() -> None:
    rope = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16384}
    more = {"rope_theta": 10000.0, "llama_4_scaling_beta": 0.1}
    config = tf.Ministral3Config(
        **SMALL,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_parameters=rope | more,
    )
    with pytest.raises(UnsupportedModel, match="layer 0"):
        concurrent_model(tf.Ministral3ForCausalLM(config).eval(), num_pages=16)


def test_longrope_needs_raw_queries() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    more = {"original_max_position_embeddings": 64, "rope_theta": 10000.0, "factor": 4.0}
    net = tf.LlamaForCausalLM(_llama(rope_parameters=rope | more)).eval()
    with pytest.raises(UnsupportedModel, match=r"longrope .* rope_mode must be 'raw', got 'local'"):
        concurrent_model(net, num_pages=16, rope_mode="local")
    workers = concurrent_model(net, num_pages=16)
    ws = workers.workspace()
    (logits,) = workers.forward(ws, [ids_of(40)], views=[[ws.new_block()]], all_logits=True).logits
    assert (logits - stock_logits(net, ids_of(40))).abs().max() <= 5e-6


def test_arguments_out_of_range() -> None:
    net = copy.deepcopy(model("llama"))
    with pytest.raises(ValueError, match="rope_mode must be 'raw' or 'local', got 'none'"):
        concurrent_model(net, num_pages=16, rope_mode="none")
    with pytest.raises(ValueError, match=r"evaluation mode: model.eval\(\)"):
        concurrent_model(net.train(), num_pages=16)


def test_cache_name_of_this_release() -> None:
    assert concurrent("llama")._cache_name == cache_name(model("llama"))
