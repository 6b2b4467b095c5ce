"""Layers whose weight, and whose input or output, are quantized.

For training they compute in floating point. For inference (`eval()`, no gradients) they compute in integers what the
packed layers do (`packed_layers.py`), so that packing a model changes no bit of its logits.
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import in_integers, infers, operators, plan_linear, plan_weight, reference
from .ops import positive
from .quantizers import ActivationQuantizer, WeightQuantizer


class QuantizedInput:
    """What linears and convolutions know of the tensor that they read.

    `input_quantizer` is None where the producer of the input already quantizes it (`QuantLayerNorm`); `shared_quantizer`
    then holds that one, in a tuple, so that it is a submodule of its producer alone.
    """

    weight_quantizer: WeightQuantizer | None
    input_quantizer: ActivationQuantizer | None
    shared_quantizer: tuple[ActivationQuantizer, ...] = ()

    @property
    def reads(self) -> ActivationQuantizer | None:
        """What quantizes the input, here or where it was made."""
        return self.input_quantizer or next(iter(self.shared_quantizer), None)

    def quantized_operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input and weight in floating point, fake-quantized."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        weight = self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)
        # One that is made from codes, and has no bias beside it, does not know the model's dtype.
        return x, weight.to(x.dtype)

    def can_infer(self) -> bool:
        """Whether this is inference, and there are integers to compute with."""
        reads, weight = self.reads, self.weight_quantizer
        return (
            reads is not None
            and weight is not None
            and infers(self)
            and reads.hard
            and weight.hard
            and reads.enabled
            and weight.enabled
            and reads.calibrated
            and reads.observer is None
        )

    def check_channels(self, x: Tensor, expected: int) -> None:
        """Raise ValueError unless `x` has as many channels as the weight."""
        if x.shape[-1] != expected:
            raise ValueError(f"layer '{self.reads.name}' takes {expected} channels, and was given {x.shape[-1]}")

    def infer(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`, in integers; `in` counts everything but the output channels."""
        quantizer, grid = self.weight_quantizer, self.weight_quantizer.grid
        # A byte a code: the same integers as packed ones.
        codes = (quantizer.integers(self.weight) - grid.qmin).to(torch.uint8)
        self.check_channels(x, codes.shape[1])
        scale = positive(quantizer.step(self.weight)).float()
        weight = plan_weight(codes.shape[1], 8, grid.qmin, grid.qmax, quantizer.shift, scale)
        channels = self.reads.plan(x.shape[-1])
        return plan_linear(weight, codes, self.bias, channels)(self.reads.to_codes(x)).to(x.dtype)


class QuantLinear(QuantizedInput, nn.Linear):
    """Linear layer with a quantized weight."""

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
        if self.can_infer():
            return self.infer(x)
        return F.linear(*self.quantized_operands(x), self.bias)


class QuantConv2d(QuantizedInput, nn.Conv2d):
    """Convolution (the patch embedding) with a quantized weight and input."""

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
        if self.can_infer():
            return self.infer_patches(x)
        return self._conv_forward(*self.quantized_operands(x), self.bias)

    @property
    def cuts_patches(self) -> bool:
        """Whether its windows lie side by side, so that it is a linear layer of patches."""
        return (
            self.kernel_size == self.stride
            and self.dilation == (1, 1)
            and self.padding in ((0, 0), "valid")
            and self.groups == 1
        )

    def can_infer(self) -> bool:
        return super().can_infer() and self.cuts_patches

    def infer_patches(self, x: Tensor) -> Tensor:
        """`forward`, in integers."""
        if x.shape[1] != self.in_channels:
            raise ValueError(f"layer '{self.reads.name}' takes {self.in_channels} channels, and was given {x.shape[1]}")
        (height, width), (rows, columns) = (
            self.kernel_size,
            (n // k for n, k in zip(x.shape[2:], self.kernel_size, strict=True)),
        )
        patches = x[..., : rows * height, : columns * width].reshape(*x.shape[:2], rows, height, columns, width)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(
            x.shape[0], rows * columns, self.in_channels * height * width
        )
        return self.infer(patches).transpose(1, 2).unflatten(2, (rows, columns))


class InferenceLayerNorm(nn.LayerNorm):
    """LayerNorm that has the same bits on every CPU where it is asked for inference, as integers have."""

    #: Whether it is part of a packed model.
    packed = False

    @classmethod
    def from_float(cls, norm: nn.LayerNorm) -> Self:
        """Take over the parameters of `norm`."""
        layer = cls(norm.normalized_shape, eps=norm.eps, bias=norm.bias is not None, device="meta")
        layer.weight, layer.bias = norm.weight, norm.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """`(..., channels)` in and out."""
        if not self.can_infer(x):
            return super().forward(x)
        return operators.call(operators.layer_norm, x, self.weight, self.bias, self.eps)

    def can_infer(self, x: Tensor) -> bool:
        """Whether this is inference."""
        return (
            x.dtype == torch.float32
            and (self.weight is None or self.weight.dtype == torch.float32)
            and _is_inference(self)
        )


class InferenceMean(nn.AdaptiveAvgPool1d):
    """Mean over the last dimension (Swin's over its tokens), with the same bits on every CPU as `InferenceLayerNorm`."""

    #: Whether it is part of a packed model.
    packed = False

    def __init__(self):
        super().__init__(1)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, channels, tokens)` to `(batch, channels, 1)`."""
        infer = x.dtype == torch.float32 and _is_inference(self)
        return reference.mean(x) if infer else super().forward(x)


def _is_inference(module: InferenceLayerNorm | InferenceMean) -> bool:
    return in_integers() if module.packed else infers(module)


class QuantLayerNorm(InferenceLayerNorm):
    """LayerNorm whose output is quantized once for all the layers that read it (q, k and v; fc1; Swin's reduction)."""

    output_quantizer: ActivationQuantizer

    #: Whether all readers are packed, and are handed codes.
    gives_codes = False

    @classmethod
    def from_float(cls, norm: nn.LayerNorm, output_quantizer: ActivationQuantizer) -> Self:
        """Take over the parameters of `norm`."""
        layer = super().from_float(norm)
        layer.output_quantizer = output_quantizer
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """`(..., channels)` in and out; where it gives codes, `(..., positions)` uint8."""
        quantizer = self.output_quantizer
        if self.gives_codes and self.can_infer(x):
            return quantizer.to_codes(x, (self.weight, self.bias, self.eps))
        return quantize_for_readers(self, quantizer, super().forward(x))

    def can_infer(self, x: Tensor) -> bool:
        """Whether this is inference, and its output is quantized to codes."""
        quantizer = self.output_quantizer
        return (
            super().can_infer(x)
            and quantizer.hard
            and quantizer.enabled
            and quantizer.calibrated
            and quantizer.observer is None
        )


def quantize_for_readers(producer: nn.Module, quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
    """What `producer`, a LayerNorm or an attention block, hands to the layers that read `x`."""
    return quantizer.to_codes(x) if producer.gives_codes and in_integers() else quantizer(x)


def quantize_first_argument(module: nn.Module, arguments: tuple) -> tuple:
    """Hook before an attention block that quantizes what it is given."""
    return (quantize_for_readers(module, module.input_quantizer, arguments[0]), *arguments[1:])
