"""Ternary models in transformers: save, load, and convert while loading.

Importing this module registers the quantization method "alignops_ternary" with transformers. A
process that loads a saved model has to import it first:

    import alignops.integrations.hf as hf
    from transformers import AutoModelForCausalLM

    hf.convert(model, head="int8")  # as alignops.ternary.convert, and ready for save_pretrained
    model.save_pretrained("folder")
    ...
    model = AutoModelForCausalLM.from_pretrained("folder")

The weights file holds the canonical planes, 1.25 bits per weight; config.json lists the converted
layers. Loading neither quantizes again nor makes dense weights. The fastest way to generate is in
`alignops.integrations.decode`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from alignops import ternary
from alignops.ternary import ConvertReport, Int8Linear, TernaryLinear, TernaryWeight
from alignops.ternary.convert import fuse_siblings

METHOD = "alignops_ternary"
FORMAT_VERSION = 1


@register_quantization_config(METHOD)
class AlignopsTernaryConfig(QuantizationConfigMixin):
    """How a model is or will be converted.

    Pass one to `from_pretrained(..., quantization_config=...)` to convert a dense checkpoint right
    after it is loaded; the options are those of `alignops.ternary.convert`. Saved models bring
    their own, with `layers`.

    Args:
        include, exclude, group, head, act, fuse, stride: see `alignops.ternary.convert`.
        scale_dtype: its name, such as "float32".
        layers: what has been converted: dicts with the `names` of layers, their `kind` ("ternary"
            or "int8"), `act`, and for ternary ones `group`, `stride` and `scale_dtype`.
        format_version: of this description.

    Raises:
        ValueError: the description is of a newer format.
    """

    def __init__(
        self,
        include: list[str] | str | None = None,
        exclude: Iterable[str] | str = ("lm_head",),
        group: int | None = None,
        head: str | None = None,
        act: str = "auto",
        fuse: bool = False,
        stride: int = 1,
        scale_dtype: str = "float32",
        layers: list[dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
    ) -> None:
        if format_version > FORMAT_VERSION:
            raise ValueError(
                f"AlignopsTernaryConfig: format_version must be at most {FORMAT_VERSION}, got "
                f"{format_version}: the model was saved by a newer alignops"
            )
        self.quant_method = quant_method  # type: ignore[assignment]  # an enum of known methods
        self.format_version = format_version
        self.layers = layers
        self.fuse = fuse
        self.include = include
        self.exclude = exclude if isinstance(exclude, str) else list(exclude)
        self.group = group
        self.head = head
        self.act = act
        self.stride = stride
        self.scale_dtype = scale_dtype

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: for a converted model its layers, else the options."""
        names = ["quant_method", "format_version", "fuse"]
        if self.layers is not None:
            names.append("layers")
        else:
            names += ["include", "exclude", "group", "head", "act", "stride", "scale_dtype"]
        return {name: getattr(self, name) for name in names}


@register_quantizer(METHOD)
class AlignopsTernaryQuantizer(HfQuantizer):
    """What `from_pretrained` and `save_pretrained` call; there is no need to use it directly."""

    quantization_config: AlignopsTernaryConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        if self.pre_quantized:
            for entry in self.quantization_config.layers or []:
                for name in entry["names"]:
                    _replace(model, name, entry)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            ternary.convert(
                model,
                config.include,
                config.exclude,
                config.group,
                config.head,
                config.act,
                config.fuse,
                stride=config.stride,
                scale_dtype=getattr(torch, config.scale_dtype),
            )
            attach(model)
            return
        for name, module in model.named_modules():
            if isinstance(module, TernaryWeight):
                _check_format(module, name)
                if module.scale.device.type == "cpu":
                    module.prepack()
        if config.fuse:
            fuse_siblings(model)

    def is_serializable(self) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through to inputs and biases; packed weights have none."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` works."""
        return True


def convert(model: PreTrainedModel, **options: Any) -> ConvertReport:
    """`alignops.ternary.convert` for a model of transformers, followed by `attach`.

    Args:
        model: changed in place.
        options: of `alignops.ternary.convert`.
    """
    report = ternary.convert(model, **options)
    attach(model)
    return report


def attach(model: PreTrainedModel) -> AlignopsTernaryConfig:
    """Prepare a converted model for `save_pretrained`: describe its layers in `model.config`.

    An int8 head that replaced a tied one is no longer tied, and the config says so.

    Args:
        model: converted by `alignops.ternary.convert` or `finalize`.

    Returns:
        The config that will be saved.

    Raises:
        ValueError: no layer of the model is converted.
    """
    entries: dict[tuple[Any, ...], dict[str, Any]] = {}
    fused = False
    for name, module in model.named_modules():
        if isinstance(module, (TernaryLinear, Int8Linear)):
            entry = _describe(module)
            entries.setdefault(tuple(entry.values()), {**entry, "names": []})["names"].append(name)
            fused |= isinstance(module, TernaryLinear) and module._siblings is not None
            _untie(model, name)
    if not entries:
        raise ValueError(
            "attach: model must have converted layers, got none; see alignops.ternary.convert"
        )
    config = AlignopsTernaryConfig(fuse=fused, layers=list(entries.values()))
    vars(model)["hf_quantizer"] = AlignopsTernaryQuantizer(config)
    model.config.quantization_config = config
    return config


def _describe(layer: TernaryLinear | Int8Linear) -> dict[str, Any]:
    if isinstance(layer, Int8Linear):
        return {"kind": "int8", "act": layer.act}
    weight = layer.weight
    return {
        "kind": "ternary",
        "act": layer.act,
        "group": None if weight.group == weight.shape[-1] else weight.group,
        "stride": weight.stride,
        "scale_dtype": str(weight.scale.dtype).removeprefix("torch."),
    }


def _replace(model: PreTrainedModel, name: str, entry: dict[str, Any]) -> None:
    old = model.get_submodule(name)
    conv = type(old).__name__ == "Conv1D"
    if not conv and not isinstance(old, nn.Linear):
        raise ValueError(
            f"{METHOD}: {name} must be a linear layer of the model, got {type(old).__name__}"
        )
    weight = old.get_parameter("weight")
    k, n = weight.shape if conv else reversed(weight.shape)
    place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    bias = old.bias is not None
    new: TernaryLinear | Int8Linear
    if entry["kind"] == "int8":
        new = Int8Linear(k, n, bias, entry["act"], **place)
    elif entry["kind"] == "ternary":
        scale_dtype = getattr(torch, entry["scale_dtype"])
        new = TernaryLinear(
            k, n, bias, entry["group"], entry["act"], entry["stride"], scale_dtype, **place
        )
    else:
        raise ValueError(f"{METHOD}: kind of {name} must be ternary or int8, got {entry['kind']!r}")
    model.set_submodule(name, new)
    _untie(model, name)


def _check_format(weight: TernaryWeight, name: str) -> None:
    found, expected = weight.format.tolist(), weight._format()
    if found != expected:
        raise ValueError(
            f"{METHOD}: {name}.format must be (version, N, K, group, stride) = {expected}, "
            f"got {found}"
        )


def _untie(model: PreTrainedModel, name: str) -> None:
    tied = getattr(model, "all_tied_weights_keys", {})
    if tied.pop(f"{name}.weight", None) is not None:
        model.config.get_text_config(decoder=True).tie_word_embeddings = False
        model.config.tie_word_embeddings = False
