"""Inference layers: ternary linear, dense int8 linear, and siblings computed in one call.

Shape letters: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alignops.ternary import ops
from alignops.ternary.weight import TernaryWeight, quantize


class TernaryLinear(nn.Module):
    """y = x W^T + b with a ternary weight, in place of `torch.nn.Linear`.

    The state dict holds `weight.idx`, `weight.sign`, `weight.scale`, `weight.format` and `bias`. The
    bias is trainable, and gradients pass through to x.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        group: columns that share a scale; None: one scale per row.
        act: how activations enter the products, see `alignops.ternary_linear`.
        stride, scale_dtype: see `alignops.ternary.quantize`.
        device, dtype: of the bias; the weight takes the device only.

    Example:
        >>> import torch
        >>> layer = TernaryLinear.from_linear(torch.nn.Linear(64, 8))
        >>> layer(torch.randn(3, 64)).shape
        torch.Size([3, 8])
    """

    weight: TernaryWeight
    bias: nn.Parameter | None
    _siblings: Siblings | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        group: int | None = None,
        act: str = "auto",
        stride: int = 1,
        scale_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (out_features, in_features)
        self._init(
            TernaryWeight.zeros(shape, group, stride, scale_dtype, device),
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None,
            act,
        )

    def _init(self, weight: TernaryWeight, bias: nn.Parameter | None, act: str) -> None:
        nn.Module.__init__(self)
        ops.check_act(act, "TernaryLinear")
        self.out_features, self.in_features = weight.shape
        self.act = act
        self.weight = weight
        self.bias = bias

    @classmethod
    def from_weight(
        cls, weight: TernaryWeight, bias: nn.Parameter | None = None, act: str = "auto"
    ) -> TernaryLinear:
        """A layer around an existing weight (N, K) and bias (N,)."""
        layer = cls.__new__(cls)
        layer._init(weight, bias, act)
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        group: int | None = None,
        act: str = "auto",
        stride: int = 1,
        scale_dtype: torch.dtype = torch.float32,
    ) -> TernaryLinear:
        """Quantize the weight of a `torch.nn.Linear`; the bias stays the same parameter."""
        weight = quantize(linear.weight, group, stride, scale_dtype)
        layer = cls.from_weight(weight, linear.bias, act)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if self._siblings is not None:
            return self._siblings(self, x)
        return ops.ternary_linear(x, self.weight, self.bias, self.act)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, act={self.act}"
        )


class Siblings:
    """Layers that read the same input, such as q, k and v: one call computes all of them.

    The first layer called with a tensor computes all outputs and keeps them until the others have
    taken theirs. They are the same bits as without. A layer called with another tensor, or with one
    that was changed in place since, starts anew. Where outputs are not taken eight times in a row
    (the layers do not read the same input after all), every layer computes its own.

    Kept results are one tuple, replaced as a whole: several threads get right results, at worst
    without the saving. Tensors made under `torch.inference_mode` do not tell whether they changed
    and are never kept; prefer `torch.no_grad`.
    """

    def __init__(self, layers: tuple[TernaryLinear, ...]) -> None:
        self.layers = layers
        self._unused = 0  # results in a row that were not all taken
        # Input, its version, grad mode, act, fused weight, outputs not yet taken (else None).
        self._kept: tuple[Tensor, int, bool, str, TernaryWeight, tuple[Tensor | None, ...]] | None
        self._kept = None
        for layer in layers:
            layer._siblings = self
        self.weight()

    def weight(self) -> TernaryWeight | None:
        """The stacked weight, None if the weights of the layers have become too different."""
        weights = tuple([layer.weight for layer in self.layers])
        return weights[0].fused_with(weights)

    def __call__(self, layer: TernaryLinear, x: Tensor) -> Tensor:
        fused = self.weight()
        if fused is None or self._unused >= 8 or x.is_inference():
            return ops.ternary_linear(x, layer.weight, layer.bias, layer.act)
        version, grad, act = x._version, torch.is_grad_enabled(), layer.act
        place = self.layers.index(layer)
        kept = self._kept
        if kept is not None:
            if kept[0] is x and kept[1:5] == (version, grad, act, fused):
                y = kept[5][place]
                if y is not None:
                    self._keep(x, version, grad, act, fused, kept[5], place)
                    return y
            self._unused += 1
        biases = [sibling.bias for sibling in self.layers]
        sizes = [sibling.out_features for sibling in self.layers]
        outputs = ops.fused_outputs(x, fused, sizes, biases, act)
        self._keep(x, version, grad, act, fused, outputs, place)
        return outputs[place]

    def _keep(
        self,
        x: Tensor,
        version: int,
        grad: bool,
        act: str,
        fused: TernaryWeight,
        outputs: tuple[Tensor | None, ...],
        taken: int,
    ) -> None:
        rest = (*outputs[:taken], None, *outputs[taken + 1 :])
        if all(y is None for y in rest):
            self._kept = None
            self._unused = 0
        else:
            self._kept = (x, version, grad, act, fused, rest)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


class Int8Linear(nn.Module):
    """y = x W^T + b with int8 weights and one scale per row, for output layers.

    The state dict holds `weight` int8 (N, K), `scale` float32 (N) and `bias`; `.half()` and its kin
    change the bias only.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        act: how activations enter the products, see `alignops.ternary_linear`.
        device, dtype: of the bias; weight and scale take the device only.

    Example:
        >>> import torch
        >>> Int8Linear.from_linear(torch.nn.Linear(64, 8))(torch.randn(3, 64)).shape
        torch.Size([3, 8])
    """

    weight: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        act: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        ops.check_act(act, "Int8Linear")
        self.in_features, self.out_features, self.act = in_features, out_features, act
        weight = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", torch.zeros(out_features, device=device, dtype=torch.float32))
        self.bias = (
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, act: str = "auto") -> Int8Linear:
        """Quantize the rows of a `torch.nn.Linear`; the bias stays the same parameter."""
        layer = cls(linear.in_features, linear.out_features, False, act, "meta")
        w = linear.weight.detach()
        layer.weight, layer.scale = ops.int8_quantize(w.float() if w.dtype == torch.float64 else w)
        layer.bias = linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return ops.int8_linear(x, self.weight, self.scale, self.bias, self.act)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        weight, scale = self.weight, self.scale
        super()._apply(fn, recurse)
        for name, old in (("weight", weight), ("scale", scale)):
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, act={self.act}"
        )
