"""Finds out how a model of transformers rotates queries and keys, or that it cannot take part.

A query that attends to a single key gets that key's value, whatever its position. So with one token
and no cache all hidden states are the same at every position, and what attention receives at
position p must be R(p) times what it receives at position 0: each layer is fitted by the
frequencies that the model holds, both orders of pairs, rotary dimensions at either end of a head,
or no rotation. What does not fit is refused, and so is whatever attention over shared blocks would
lose without a sign: learned positions, biases by distance, recurrent layers.

Source: arXiv 2504.06261 (positions of shared blocks); the check itself is ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from alignops._checks import check
from alignops.attention.errors import UnsupportedModel
from alignops.attention.rope import PAIRS, RopeSpec, turn

#: Positions of the fit: one where all angles are small, one where they are not.
NEAR, FAR = 37, 20_000
#: Largest relative error of a fit. In 16 bits the model itself rounds sines, cosines and products.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
#: Tensors that concurrent attention understands or that say nothing about scores.
_KNOWN_TENSORS = {"s_aux", "position_ids", "cache_position"}
_IMPLEMENTATION = "alignops_probe"
_FULL, _SLIDING, _CHUNKED = "full_attention", "sliding_attention", "chunked_attention"

_calls: ContextVar[list[_Call] | None] = ContextVar("alignops_probe_calls", default=None)


class ModelRope(NamedTuple):
    """Rotations of a model; what `KVPool` takes as `rope`.

    Attributes:
        specs: one per kind of rotation, in the order in which layers first use them.
        layer_spec: for each layer the index of its spec; None: nothing is rotated.
    """

    specs: tuple[RopeSpec, ...]
    layer_spec: tuple[int | None, ...]


@dataclass(frozen=True)
class _Call:
    """What a layer hands to attention: q, k, v (1, heads, tokens, D)."""

    layer: int | None
    module: Any
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    options: dict[str, Any]


@dataclass(frozen=True)
class _Pass:
    """A forward at one position: a call per layer, and the frequencies that the model held."""

    position: int
    calls: list[_Call]
    frequencies: list[RopeSpec]


def probe_rope(
    model: PreTrainedModel, *, longrope: str = "short", freeze_dynamic: bool = False
) -> ModelRope:
    """How each layer of a causal language model rotates queries and keys.

    Runs five forwards of one or two tokens with an attention function of its own, and leaves the
    model as it was. The model must not be used by another thread meanwhile.

    Args:
        model: in evaluation mode, of any dtype; a float32 model is fitted a thousand times closer.
        longrope: "short" or "long": which of a LongRoPE model's sets of factors will be used. They
            are for contexts up to the original length and beyond.
        freeze_dynamic: let frequencies that would grow with the length stay what they are.

    Returns:
        Specs and the spec of each layer.

    Raises:
        ValueError: the model is in training mode, or `longrope` is unknown.
        UnsupportedModel: the model cannot attend over shared blocks; the text names the layer and
            the reason.

    Source: arXiv 2504.06261.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3, vocab_size=99))
        >>> rope = probe_rope(model.eval())
        >>> rope.specs[0].pairs, rope.specs[0].rotary_dim, rope.layer_spec
        ('half', 16, (0, 0, 0))
    """
    check(not model.training, "probe_rope: model must be in evaluation mode: call model.eval()")
    check(
        longrope in ("short", "long"),
        f"probe_rope: longrope must be 'short' or 'long', got {longrope!r}",
    )
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    _refuse_by_config(model, config, name, freeze_dynamic)
    first, second = _two_tokens(config)

    def run(ids: Sequence[int], positions: Sequence[int]) -> _Pass:
        return _run(model, config, name, ids, positions, freeze_dynamic)

    with _captured(model):
        near, alone = run([first], [NEAR]), run([first], [0])
        for layer, call in enumerate(alone.calls):
            _refuse_by_call(config, name, layer, call, alone.calls[:layer])
            _check_values(name, layer, call, near)
        far = run([first], [_far(config, freeze_dynamic)])
        after, before = run([second, first], [0, 0]), run([first, second], [0, 0])
    chosen: list[RopeSpec | None] = []
    for layer, call in enumerate(alone.calls):
        _check_alone(name, layer, after.calls[layer], before.calls[layer])
        fit = _fit(name, layer, call, (near, far))
        chosen.append(None if fit is None else fit[0 if longrope == "short" else 1])
    specs = tuple(dict.fromkeys(spec for spec in chosen if spec is not None))
    return ModelRope(specs, tuple(None if s is None else specs.index(s) for s in chosen))


# What the model says about itself


def _refuse_by_config(model: PreTrainedModel, config: Any, name: str, freeze: bool) -> None:
    def refuse(reason: str) -> None:
        raise UnsupportedModel(f"{name}: {reason}")

    if getattr(model.config, "is_encoder_decoder", False):
        refuse("it is an encoder-decoder model")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        refuse("it takes no position_ids; positions by column cannot be shared")
    if getattr(config, "attn_temperature_tuning", False):
        refuse(
            "attn_temperature_tuning scales queries by the length of the cache; "
            "set it to False in the configuration"
        )
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for values in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        if values.get("mrope_section") is not None:
            refuse("M-RoPE (mrope_section): a token has more than one position")
        if "dynamic" in str(values.get("rope_type", values.get("type"))) and not freeze:
            refuse(
                "dynamic frequencies change with the length, stored keys would mix them; "
                "freeze_dynamic=True keeps those of the original length"
            )
    chunk = getattr(config, "attention_chunk_size", None)
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind == _CHUNKED and (chunk is None or chunk < (_length(config) or chunk + 1)):
            refuse(
                f"layer {layer} attends within chunks of {chunk} tokens; only an "
                f"attention_chunk_size of at least {_length(config)} is the same as none"
            )
        if kind not in (_FULL, _SLIDING, _CHUNKED):
            refuse(
                f"layer {layer} is of kind {kind!r}; only full and sliding attention can be shared"
            )
    if getattr(model, "_is_stateful", False):
        refuse("it has recurrent layers: states that are not keys and values")


def _length(config: Any) -> int | None:
    value = getattr(config, "max_position_embeddings", None)
    return value if isinstance(value, int) else None


def _far(config: Any, freeze: bool) -> int:
    """The far position: beyond the original length of LongRoPE, within that of frozen ones."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    tables = [rope, *(v for v in rope.values() if isinstance(v, dict))]
    kinds = {str(v.get("rope_type", v.get("type"))) for v in tables}
    if freeze and any("dynamic" in kind for kind in kinds):
        return min(FAR, (_length(config) or FAR + 1) - 1)
    original = [v.get("original_max_position_embeddings") for v in tables]
    original.append(getattr(config, "original_max_position_embeddings", None))
    if "longrope" in kinds:
        return max(FAR, *(n for n in original if isinstance(n, int)))
    return FAR


def _two_tokens(config: Any) -> tuple[int, int]:
    """Two ids that are not special: padding has no embedding in some models."""
    special: set[int | None] = set()
    for kind in ("pad", "bos", "eos"):
        ids = getattr(config, f"{kind}_token_id", None)
        special.update(ids if isinstance(ids, list) else [ids])
    size = int(config.vocab_size)
    plain = [i for i in range(size // 3, size) if i not in special][:2]
    check(len(plain) == 2, f"probe_rope: vocab_size must leave two plain ids, got {size}")
    return plain[0], plain[1]


# Forwards


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of each token to itself alone."""
    calls = _calls.get()
    if calls is None:
        raise RuntimeError(f"{_IMPLEMENTATION}: called outside probe_rope")
    layer = getattr(module, "layer_idx", None)
    calls.append(_Call(layer, module, query, key, value, attention_mask, options))
    groups = query.shape[1] // value.shape[1]
    return value.repeat_interleave(groups, 1).transpose(1, 2).contiguous(), None


AttentionInterface.register(_IMPLEMENTATION, _attend)


@contextmanager
def _captured(model: PreTrainedModel) -> Iterator[None]:
    """The model with `_attend` for its attention."""
    before = [
        (module.config, module.config._attn_implementation)
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
    ]
    model.set_attn_implementation(_IMPLEMENTATION)
    try:
        yield
    finally:
        for config, implementation in before:
            # Not through the model, which would check what it was loaded with once more.
            config._attn_implementation_internal = implementation


def _run(
    model: PreTrainedModel,
    config: Any,
    name: str,
    ids: Sequence[int],
    positions: Sequence[int],
    freeze_dynamic: bool,
) -> _Pass:
    device = next(model.parameters()).device
    calls: list[_Call] = []
    token = _calls.set(calls)
    try:
        with torch.no_grad():
            model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
            )
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModel(
            f"{name}: a forward of tokens at positions {list(positions)} without a cache failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        _calls.reset(token)
    found = [call.layer for call in calls]
    for layer in range(int(config.num_hidden_layers)):
        if found.count(layer) != 1:
            raise UnsupportedModel(
                f"{name}: layer {layer} calls the attention interface {found.count(layer)} times; "
                "its attention, or its recurrent state, is its own"
            )
    if len(found) != config.num_hidden_layers:
        raise UnsupportedModel(
            f"{name}: attention is called by {len(found)} layers, of which the model says it has "
            f"{config.num_hidden_layers}"
        )
    calls.sort(key=lambda call: call.layer or 0)
    return _Pass(positions[0], calls, _frequencies(model, freeze_dynamic))


def _frequencies(model: PreTrainedModel, freeze_dynamic: bool) -> list[RopeSpec]:
    """Those that the model's rotary embeddings hold now, still without order and offset."""
    out = []
    for module in model.modules():
        for name, _ in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
                out.append(
                    RopeSpec.from_module(
                        module,
                        layer_type=name.removesuffix("inv_freq").removesuffix("_") or None,
                        freeze_dynamic=freeze_dynamic,
                    )
                )
    return out


# What the forwards say


def _refuse_by_call(
    config: Any, name: str, layer: int, call: _Call, earlier: Sequence[_Call]
) -> None:
    def refuse(reason: str) -> None:
        raise UnsupportedModel(f"{name}: layer {layer} {reason}")

    for what, x in (("queries", call.q), ("keys", call.k), ("values", call.v)):
        if x.dtype not in TOLERANCE:
            refuse(f"has {what} of {x.dtype}")
        if not x.any():
            refuse(f"has {what} that are all zero")
    if call.mask is not None:
        refuse("attends by a mask of its own, although none is registered")
    for option, value in call.options.items():
        if isinstance(value, Tensor) and option not in _KNOWN_TENSORS:
            refuse(f"passes {option} to attention, which may change its scores")
    if getattr(call.module, "is_causal", True) is False:
        refuse("is not causal")
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    expected = window is not None if not kinds else kinds[layer] == _SLIDING
    if expected and not call.options.get("sliding_window"):
        refuse("has a window that it does not pass to attention as sliding_window")
    for other, before in enumerate(earlier):
        if before.k.shape == call.k.shape and torch.equal(before.k, call.k):
            refuse(f"has no keys of its own but those of layer {other}")


def _check_values(name: str, layer: int, origin: _Call, near: _Pass) -> None:
    """Values are not rotated, so what they say of the position came with the hidden states."""
    if _error(near.calls[layer].v, origin.v) > TOLERANCE[origin.v.dtype]:
        raise UnsupportedModel(
            f"{name}: layer {layer} has values that depend on the position: learned or other "
            "absolute positions"
        )


def _check_alone(name: str, layer: int, after: _Call, before: _Call) -> None:
    """A token that attends to itself alone must not know its column or its neighbours."""
    for x, y in ((after.q, before.q), (after.k, before.k), (after.v, before.v)):
        if _error(x[..., 1, :], y[..., 0, :]) > TOLERANCE[x.dtype]:
            raise UnsupportedModel(
                f"{name}: layer {layer} sees another token or its column besides attention: "
                "a recurrent state, a convolution, or positions by column"
            )


def _fit(
    name: str, layer: int, origin: _Call, passes: Sequence[_Pass]
) -> tuple[RopeSpec, ...] | None:
    """The rotation of a layer, with the frequencies of each pass; None: there is none."""
    tolerance = TOLERANCE[origin.q.dtype]

    def worst(specs: Sequence[RopeSpec | None]) -> float:
        return max(
            _error(here, there if spec is None else _turned(there, run.position, spec))
            for run, spec in zip(passes, specs, strict=True)
            for here, there in (
                (run.calls[layer].q, origin.q),
                (run.calls[layer].k, origin.k),
            )
        )

    if worst([None] * len(passes)) <= tolerance:
        return None
    best = float("inf")
    for specs in _candidates(origin, passes):
        error = worst(specs)
        if error <= tolerance:
            return specs
        best = min(best, error)
    raise UnsupportedModel(f"{name}: layer {layer} {_misfit(layer, origin, passes, best)}")


def _candidates(origin: _Call, passes: Sequence[_Pass]) -> Iterator[tuple[RopeSpec, ...]]:
    """Frequencies of the same module in each pass, by order of pairs, offset and sense."""
    head_dim = origin.q.shape[-1]
    for held in zip(*(run.frequencies for run in passes), strict=True):
        rest = head_dim - held[0].rotary_dim
        if rest < 0:
            continue
        for pairs in PAIRS:
            for offset in dict.fromkeys((0, rest)):
                for sense in (1, -1):  # some models turn the other way
                    yield tuple(
                        RopeSpec(
                            tuple(sense * f for f in spec.inv_freq),
                            pairs,
                            offset,
                            spec.attention_factor,
                        )
                        for spec in held
                    )


def _misfit(layer: int, origin: _Call, passes: Sequence[_Pass], best: float) -> str:
    for run in passes:
        for what, here, there in (
            ("queries", run.calls[layer].q, origin.q),
            ("keys", run.calls[layer].k, origin.k),
        ):
            ratio = float(here.double().norm() / there.double().norm())
            if abs(ratio - 1) > TOLERANCE[here.dtype]:
                return (
                    f"has {what} whose size depends on the position, {ratio:.4g} times as large "
                    f"at {run.position} as at 0: position-dependent scaling"
                )
    if best == float("inf"):
        return "turns queries and keys, but the model holds no frequencies (a buffer inv_freq)"
    return (
        "turns queries and keys by no frequencies that the model holds; the closest are off by "
        f"{best:.2g}"
    )


def _turned(x: Tensor, position: int, spec: RopeSpec) -> Tensor:
    positions = torch.tensor([position], device=x.device)
    return turn(x.float(), spec.rotations(positions, angle_precision="fp32"), spec)


def _error(x: Tensor, y: Tensor) -> float:
    """|x - y| / |y|; infinite if they are not numbers."""
    error = float((x.double() - y.double()).norm() / y.double().norm())
    return error if error == error else float("inf")
