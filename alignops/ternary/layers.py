"""Inference layers: ternary linear, dense int8 linear, and siblings computed in one call.

Shape letters: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alignops.ternary import checks, ops
from alignops.ternary.weight import TernaryWeight, quantize


class TernaryLinear(nn.Module):
    """y = x W^T + b with a ternary weight, in place of `torch.nn.Linear`.

    The state dict holds `weight.idx`, `weight.sign`, `weight.scale`, `weight.format` and `bias`.
    The bias is trainable, and gradients pass through to x.

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
    _place: int = 0

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
        checks.check_act(act, "TernaryLinear")
        self.out_features, self.in_features = weight.shape
        self.act = act
        self.weight = weight
        self.register_parameter("bias", bias)

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
        """(..., K) -> (..., N) in x.dtype."""
        if self._siblings is not None:
            return self._siblings(self._place, x)
        # Past nn.Module.__getattr__, which costs 0.3 us a name.
        weight: Any = self._modules["weight"]
        return ops.ternary_linear(x, weight, self._parameters["bias"], self.act)

    def extra_repr(self) -> str:
        """Like that of `torch.nn.Linear`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, act={self.act}"
        )


class Siblings:
    """Layers that read the same input, such as q, k and v: one call computes all of them.

    The layer that is called first computes all outputs; the others take theirs if they are called
    with the same tensor object, unchanged since. The bits are the same as without. Layers that turn
    out to read different inputs soon compute their own outputs only.

    Threads may call the layers at once: every result is kept and taken as one object. Tensors made
    under `torch.inference_mode` cannot tell whether they were changed, so every layer computes its
    own output there; prefer `torch.no_grad`. Code under `torch.compile` must not change the input
    in place between the layers.
    """

    def __init__(self, layers: tuple[TernaryLinear, ...]) -> None:
        self.layers = layers
        self.sizes = [layer.out_features for layer in layers]
        self._kept: dict[int, tuple[Any, ...]] = {}  # place of a layer: its output, and for what
        self._misses = 0  # results not taken, minus those taken
        for place, layer in enumerate(layers):
            layer._siblings = self
            layer._place = place
        self.weight()

    def weight(self) -> TernaryWeight | None:
        """The stacked weight; None if the weights of the layers have become too different."""
        weights: Any = tuple([layer._modules["weight"] for layer in self.layers])
        fused: TernaryWeight | None = weights[0].fused_with(weights)
        return fused

    def __call__(self, place: int, x: Tensor) -> Tensor:
        """Output of the layer at `place` for x (..., K)."""
        layer = self.layers[place]
        weight: Any = layer._modules["weight"]
        kept = self._kept.pop(place, None)
        traced = torch.compiler.is_dynamo_compiling()  # there a version is data, not a number
        if kept is not None:
            of, version, grad, act, fusion, fused, output = kept
            if (
                of is x
                and (traced or version == x._version)
                and grad == torch.is_grad_enabled()
                and act == layer.act
                and fusion is weight._fusion
                and fused is fusion.weight
            ):
                if self._misses > 0:
                    self._misses -= 1
                y: Tensor = output
                return y
        if kept is not None or self._kept:
            self._misses += 1
        alone = self._misses > 8 or (not traced and x.is_inference())
        fused = None if alone else self.weight()
        if fused is None:
            self._kept.clear()
            return ops.ternary_linear(x, weight, layer.bias, layer.act)
        biases = [sibling._parameters["bias"] for sibling in self.layers]
        outputs = ops.fused_outputs(x, fused, self.sizes, biases, layer.act)
        version = 0 if traced else x._version
        state = (x, version, torch.is_grad_enabled(), layer.act, weight._fusion, fused)
        for i, output in enumerate(outputs):
            if i != place:
                self._kept[i] = (*state, output)
        return outputs[place]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}


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
        checks.check_act(act, "Int8Linear")
        self.in_features, self.out_features, self.act = in_features, out_features, act
        weight = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", torch.zeros(out_features, device=device, dtype=torch.float32))
        self.register_parameter(
            "bias",
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None,
        )

    @classmethod
    def from_weight(
        cls, w: Tensor, bias: nn.Parameter | None = None, act: str = "auto"
    ) -> Int8Linear:
        """Quantize the rows of w (N, K); the bias stays the same parameter."""
        layer = cls(w.shape[1], w.shape[0], False, act, "meta")
        layer.weight, layer.scale = ops.int8_quantize(w.detach())
        layer.bias = bias
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear, act: str = "auto") -> Int8Linear:
        """Quantize the weight of a `torch.nn.Linear`."""
        return cls.from_weight(linear.weight, linear.bias, act).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) in x.dtype."""
        return ops.int8_linear(x, self.weight, self.scale, self.bias, self.act)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        weight, scale = self.weight, self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in (("weight", weight), ("scale", scale)):
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        """Like that of `torch.nn.Linear`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, act={self.act}"
        )
