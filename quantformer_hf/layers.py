"""Layers whose weight, and whose input or output, are quantized."""

from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from .quantizers import ActivationQuantizer, WeightQuantizer


class QuantLinear(nn.Linear):
    """Linear layer with a quantized weight.

    `input_quantizer` is None where the producer of the input already quantizes it (`QuantLayerNorm`).
    """

    weight_quantizer: WeightQuantizer | None
    input_quantizer: ActivationQuantizer | None

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        weight_quantizer: WeightQuantizer | None,
        input_quantizer: ActivationQuantizer | None = None,
    ) -> Self:
        """Take over the parameters of `linear`."""
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.weight_quantizer = weight_quantizer
        layer.input_quantizer = input_quantizer
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        return F.linear(*_quantize_operands(self, x), self.bias)


class QuantConv2d(nn.Conv2d):
    """Convolution (the patch embedding) with a quantized weight and input."""

    weight_quantizer: WeightQuantizer | None
    input_quantizer: ActivationQuantizer | None

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d,
        weight_quantizer: WeightQuantizer | None,
        input_quantizer: ActivationQuantizer | None,
    ) -> Self:
        """Take over the parameters of `conv`."""
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            device="meta",
        )
        layer.weight, layer.bias = conv.weight, conv.bias
        layer.weight_quantizer = weight_quantizer
        layer.input_quantizer = input_quantizer
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, channels, height, width)` in and out."""
        return self._conv_forward(*_quantize_operands(self, x), self.bias)


def _quantize_operands(layer: QuantLinear | QuantConv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    if layer.input_quantizer is not None:
        x = layer.input_quantizer(x)
    weight = layer.weight if layer.weight_quantizer is None else layer.weight_quantizer(layer.weight)
    # One that is made from codes, and has no bias beside it, does not know the model's dtype.
    return x, weight.to(x.dtype)


class QuantLayerNorm(nn.LayerNorm):
    """LayerNorm whose output is quantized once for all the layers that read it (q, k and v; fc1; Swin's reduction)."""

    output_quantizer: ActivationQuantizer

    @classmethod
    def from_float(cls, norm: nn.LayerNorm, output_quantizer: ActivationQuantizer) -> Self:
        """Take over the parameters of `norm`."""
        layer = cls(norm.normalized_shape, eps=norm.eps, bias=norm.bias is not None, device="meta")
        layer.weight, layer.bias = norm.weight, norm.bias
        layer.output_quantizer = output_quantizer
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """`(..., channels)` in and out."""
        return self.output_quantizer(super().forward(x))
