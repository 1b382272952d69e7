"""Models of transformers for concurrent workers over shared cache blocks.

    model = AutoModelForCausalLM.from_pretrained("folder").eval()
    workers = concurrent_model(model, bytes=2**30)
    ws = workers.workspace()
    common, own = ws.new_block(), ws.new_block()
    workers.prefill(ws, common, prompt_ids)
    ws.add_worker("Alice", [common, own])
    logits = workers.forward(ws, [[start_id]]).logits

The model is not changed: its layers run through a view that shares all weights. New tokens of all
workers are packed into one batch row, since nothing but attention mixes tokens; so entries with
different numbers of new tokens need no padding.

Source: arXiv 2504.06261 (Hogwild! Inference).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignops._checks import check
from alignops.attention.adapter import Forward
from alignops.attention.errors import LayoutError, PositionError, UnsupportedModel
from alignops.attention.plan import Plan
from alignops.attention.pool import KVPool
from alignops.attention.workspace import Block, Workspace
from alignops.integrations._attention_layers import (
    NAME,
    HogwildCache,
    LayerGeometry,
    Recorder,
    handled_by,
)
from alignops.integrations._attention_steps import KernelStep, ReferenceStep
from alignops.integrations._attention_view import attention_view
from alignops.integrations.attention_probe import probe_rope

__all__ = ["HFConcurrentModel", "concurrent_model"]


def concurrent_model(
    model: PreTrainedModel,
    *,
    rope_mode: str = "raw",
    num_pages: int | None = None,
    bytes: int | None = None,
    page_size: int = 32,
    dtype: torch.dtype | None = None,
    strict_positions: bool = False,
    longrope: str = "short",
    freeze_dynamic: bool = False,
    reference: bool = False,
) -> HFConcurrentModel:
    """A causal language model of transformers, ready for several workers.

    Runs the model a few times on one or two tokens to find out how its layers rotate queries and
    keys (`probe_rope`); a model that depends on positions in other ways is refused.

    Args:
        model: in evaluation mode, on one device.
        rope_mode: "raw": the operators do all rotations, in float32 from float64 angles; "local":
            the model rotates by the index in the written block, as exactly as its own code does.
        num_pages: pages of the pool; or
        bytes: most memory that it takes.
        page_size: tokens of a page; see `KVPool`.
        dtype: of keys and values; None: the model's. A float32 model may have 16 bit ones.
        strict_positions: positions beyond the model's maximum are errors; else a warning, once.
        longrope: "short" or "long": which factors of a LongRoPE model are used; see `probe_rope`.
        freeze_dynamic: keep frequencies that would grow with the length; see `probe_rope`.
        reference: compute attention by `alignops.reference.attention`: on any device, slowly.

    Raises:
        ValueError: the model is in training mode, or sizes are out of range.
        UnsupportedModel: a ValueError; names the layer and the reason.
    """
    check(not model.training, "concurrent_model: model must be in evaluation mode: model.eval()")
    check(
        rope_mode in ("raw", "local"),
        f"concurrent_model: rope_mode must be 'raw' or 'local', got {rope_mode!r}",
    )
    _refuse(model, rope_mode)
    view = attention_view(model, NAME)
    # Of the view, whose attention function can be exchanged without anybody noticing.
    rope = probe_rope(view, longrope=longrope, freeze_dynamic=freeze_dynamic)
    layers = _geometry(view)
    pool = KVPool(
        len(layers),
        [layer.kv_heads for layer in layers],
        [layer.head_dim for layer in layers],
        [layer.v_head_dim for layer in layers],
        dtype=model.dtype if dtype is None else dtype,
        device=model.device,
        page_size=page_size,
        num_pages=num_pages,
        bytes=bytes,
        rope=(rope.specs, rope.layer_spec),
    )
    return HFConcurrentModel(view, pool, rope_mode, strict_positions, reference)


class HFConcurrentModel:
    """A model of transformers as concurrent sessions see it; made by `concurrent_model`.

    See `alignops.attention.adapter.ConcurrentModel` for what the methods do. Several threads may
    use one model, each with its own workspace, or with lagged visibility with the same one.

    Attributes:
        pool: keys and values of all workspaces.
        vocab_size: V.
        max_length: the model's maximum of positions.
        device: of pool and logits.
        rope_mode: "raw" or "local".
        generation_config: the model's settings of sampling; None: it has none.
    """

    def __init__(
        self,
        view: PreTrainedModel,
        pool: KVPool,
        rope_mode: str,
        strict_positions: bool,
        reference: bool,
    ) -> None:
        head: Any = view.get_output_embeddings()  # type: ignore[no-untyped-call]
        limit = getattr(view.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.pool = pool
        self.vocab_size = int(head.weight.shape[0])
        self.max_length = limit if isinstance(limit, int) else None
        self.device = view.device
        self.rope_mode = rope_mode
        self.generation_config: Any = getattr(view, "generation_config", None)
        self._view = view
        self._strict = strict_positions
        self._warned = False
        self._reference = reference
        self._cache_name = _cache_name(view)
        self._keeps = "logits_to_keep" in inspect.signature(view.forward).parameters

    def workspace(self) -> Workspace:
        """A new workspace over `pool`, with the rotation mode of the model."""
        return Workspace(self.pool, rope_mode=self.rope_mode)

    def forward(
        self,
        ws: Workspace,
        inputs: Sequence[Sequence[int]],
        *,
        workers: Sequence[int] | None = None,
        views: Sequence[Sequence[Block]] | None = None,
        visibility: str = "inclusive",
        mass: bool = False,
        all_logits: bool = False,
    ) -> Forward:
        """One step: plan, run all layers, commit; see `ConcurrentModel.forward`."""
        keep = "all" if all_logits else "last"
        return self._step(ws, inputs, workers, views, visibility, mass, keep)

    def prefill(
        self,
        ws: Workspace,
        block: Block,
        token_ids: Sequence[int],
        view: Sequence[Block] | None = None,
        chunk: int = 2048,
    ) -> None:
        """Append given tokens to a block; see `ConcurrentModel.prefill`."""
        check(chunk >= 1, f"prefill: chunk must be at least 1, got {chunk}")
        blocks = [block] if view is None else list(view)
        if not blocks or blocks[-1].id != block.id:
            raise LayoutError(
                f"prefill: view must end with the block that is written, {block!r}, got {blocks}"
            )
        for start in range(0, len(token_ids), chunk):
            part = token_ids[start : start + chunk]
            self._step(ws, [part], None, [blocks], "inclusive", False, "none")

    @torch.no_grad()
    def _step(
        self,
        ws: Workspace,
        inputs: Sequence[Sequence[int]],
        workers: Sequence[int] | None,
        views: Sequence[Sequence[Block]] | None,
        visibility: str,
        mass: bool,
        keep: str,
    ) -> Forward:
        ids = [list(entry) for entry in inputs]
        flat = [token for entry in ids for token in entry]
        if flat and not 0 <= min(flat) <= max(flat) < self.vocab_size:
            raise ValueError(
                f"forward: inputs must be ids below {self.vocab_size}, got {min(flat)} to "
                f"{max(flat)}"
            )
        counts = [len(entry) for entry in ids]
        plan = ws.plan(counts, visibility=visibility, workers=workers, views=views)
        try:
            before = self._check_positions(plan)
            handler = self._handler(ws, plan, workers, views, visibility, mass)
            logits = self._run(plan, flat, before, handler, keep)
            ws.commit(plan, ids)
        except BaseException:
            ws.abort(plan)
            raise
        return Forward(
            _by_entry(logits, counts, keep),
            handler.mass_by_entry() if mass else None,
            tuple(plan.blocks) if mass else (),
        )

    def _handler(
        self,
        ws: Workspace,
        plan: Plan,
        workers: Sequence[int] | None,
        views: Sequence[Sequence[Block]] | None,
        visibility: str,
        mass: bool,
    ) -> KernelStep:
        if not self._reference:
            return KernelStep(plan, self.pool, mass)
        if views is None:
            views = [ws.view(worker) for worker in (ws.workers if workers is None else workers)]
        numbers = [[block.id for block in view] for view in views]
        lengths = {block.id: block.length for view in views for block in view}
        lagged, local = visibility == "lagged", self.rope_mode == "local"
        return ReferenceStep(plan, self.pool, mass, numbers, lengths, lagged, local)

    def _check_positions(self, plan: Plan) -> int:
        """The highest position of a first new token."""
        first = [p for p, n in zip(plan.first_positions, plan.counts, strict=True) if n > 0]
        last = max(
            (p + n - 1 for p, n in zip(plan.first_positions, plan.counts, strict=True) if n > 0),
            default=0,
        )
        if self.max_length is not None and last >= self.max_length:
            text = (
                f"forward: position {last} is not below the model's max_position_embeddings = "
                f"{self.max_length}"
            )
            if self._strict:
                raise PositionError(text)
            if not self._warned:
                self._warned = True
                warnings.warn(text, stacklevel=5)
        return max(first, default=0)

    def _run(
        self, plan: Plan, flat: list[int], before: int, handler: KernelStep, keep: str
    ) -> Tensor:
        """Logits (n, V) of the rows to keep."""
        if not flat:
            return torch.empty(0, self.vocab_size, dtype=self._view.dtype, device=self.device)
        rows = None if keep == "all" else _last_rows(plan) if keep == "last" else []
        input_ids = torch.tensor([flat], device=self.device)
        arguments: dict[str, Any] = {self._cache_name: HogwildCache(before)}
        if rows is not None and len(rows) < plan.rows and self._keeps:
            arguments["logits_to_keep"] = torch.tensor(rows, dtype=torch.int64, device=self.device)
            rows = None
        with handled_by(handler):
            logits: Tensor = self._view(
                input_ids=input_ids,
                position_ids=self._position_ids(plan),
                use_cache=True,
                **arguments,
            ).logits[0]
        return logits if rows is None or len(rows) == len(logits) else logits[rows]

    def _position_ids(self, plan: Plan) -> Tensor:
        """(1, R): 0 is the identity rotation."""
        if self.rope_mode == "raw":
            return torch.zeros(1, plan.rows, dtype=torch.int64, device=self.device)
        return plan.local_index.to(self.device).unsqueeze(0)


def _last_rows(plan: Plan) -> list[int]:
    """Index of the last row of each entry that has rows."""
    ends, row = [], 0
    for count in plan.counts:
        row += count
        if count:
            ends.append(row - 1)
    return ends


def _by_entry(logits: Tensor, counts: Sequence[int], keep: str) -> Tensor | list[Tensor]:
    """Logits as `Forward` has them, of those of the rows that were kept."""
    if keep == "all":
        return list(logits.split(list(counts)))
    if keep == "none" or all(counts):
        return logits
    result = logits.new_full((len(counts), logits.shape[-1]), float("nan"))
    result[[i for i, count in enumerate(counts) if count]] = logits
    return result


def _cache_name(model: PreTrainedModel) -> str:
    """What this release of transformers calls the cache."""
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def _refuse(model: PreTrainedModel, rope_mode: str) -> None:
    """What a model can be used for, but not so."""
    name = type(model).__name__
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1:
        raise UnsupportedModel(f"{name}: all layers must be on one device, got {devices}")
    kinds = {str(rope.get("rope_type", rope.get("type"))) for rope in _rope_parameters(model)}
    changing = sorted(kinds & {"longrope", "dynamic"})
    if rope_mode != "raw" and changing:
        raise UnsupportedModel(
            f"{name}: frequencies of kind {', '.join(changing)} change with the position; "
            f"rope_mode must be 'raw', got {rope_mode!r}"
        )


def _rope_parameters(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Of all layer types."""
    config = model.config.get_text_config(decoder=True)
    found: list[dict[str, Any]] = []
    for name in ("rope_parameters", "rope_scaling"):
        value = getattr(config, name, None) or {}
        found += [value, *(part for part in value.values() if isinstance(part, dict))]
    return found


def _geometry(view: PreTrainedModel) -> list[LayerGeometry]:
    """What each layer hands to the attention function, by a forward of one token."""
    recorder = Recorder()
    token = torch.zeros(1, 1, dtype=torch.int64, device=view.device)
    cache: dict[str, Any] = {_cache_name(view): HogwildCache(0)}
    with torch.no_grad(), handled_by(recorder):
        view(input_ids=token, position_ids=token, use_cache=True, **cache)
    return recorder.layers
