"""Layers whose weights are integer codes: what `pack()` makes of `QuantLinear` and `QuantConv2d`."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from .kernels import ChannelPlan, LinearPlan, Remembered, in_integers, plan_linear, plan_weight
from .kernels.plans import WeightPlan
from .layers import QuantConv2d, QuantizedInput, QuantLinear
from .ops import positive, widest
from .packing import pack_codes, packed_width, unpack_codes
from .quantizers import LSQWeightQuantizer, StatsQWeightQuantizer, WeightQuantizer


class PackedWeight(WeightQuantizer):
    """A weight `scale * (q + shift)` as packed codes; see `packing` for the layout.

    `codes` is `(out, packed_width(in, bits))` uint8 and `scale` `(out,)` float32.

    Args:
        bits: 1 to 8.
        shape: of the weight, `(out, in)` or `(out, in, height, width)`.
        shift: 0, or 0.5 on the half-shifted grid.
    """

    def __init__(self, bits: int, shape: Sequence[int], shift: float):
        super().__init__(bits, shape[0])
        self.shape = tuple(shape)
        self.shift = shift
        self.grid = replace(self.grid, shift=shift)
        self.columns = prod(shape[1:])
        self.register_buffer("codes", torch.zeros(shape[0], packed_width(self.columns, bits), dtype=torch.uint8))
        self.scale = nn.Parameter(torch.ones(shape[0]), requires_grad=False)

    @torch.no_grad()
    def fill(self, weight: Tensor, quantizer: WeightQuantizer) -> None:
        """Take the codes and scales that `quantizer` gives `weight`."""
        self.codes.copy_(pack_codes(quantizer.integers(weight) - self.grid.qmin, self.grid.bits))
        self.scale.copy_(positive(quantizer.step(weight)))

    def integers(self, weight: Tensor | None = None) -> Tensor:
        """q, `(out, in)`, int32."""
        return unpack_codes(self.codes, self.grid.bits, self.columns).int() + self.grid.qmin

    def step(self, weight: Tensor | None = None) -> Tensor:
        return self.scale

    def plan(self) -> WeightPlan:
        """As the kernels take it."""
        return plan_weight(self.columns, self.grid.bits, self.grid.qmin, self.grid.qmax, self.shift, self.scale)

    def dequantized(self) -> Tensor:
        """The weight in floating point, of `shape`: made anew at each call, and nowhere kept."""
        return ((self.integers().float() + self.shift) * self.scale.unsqueeze(1)).view(self.shape)

    def quantize(self, weight: Tensor) -> Tensor:
        # What a caller has is the layer's `weight`, without values.
        return self.dequantized()


class PackedLayer(QuantizedInput):
    """What the packed layers share: no floating-point weight, and integer arithmetic wherever their input is quantized."""

    weight_quantizer: PackedWeight

    def take_over(self, layer: QuantLinear | QuantConv2d, weight_quantizer: PackedWeight) -> None:
        """Bias and quantizers of `layer`, codes of `weight_quantizer`."""
        self.register_parameter("bias", layer.bias)
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = layer.input_quantizer
        self.shared_quantizer = layer.shared_quantizer
        self._plan: Remembered[LinearPlan] = Remembered()

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the weight, on the device `meta`: its values are codes (`weight_quantizer.dequantized()`).

        ViT's patch embedding looks at the dtype in each forward pass.
        """
        dtype = self.weight_quantizer.scale.dtype if self.bias is None else self.bias.dtype
        return torch.empty(self.weight_quantizer.shape, dtype=dtype, device="meta")

    def quantized_operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        return x, self.weight_quantizer.dequantized().to(x.dtype)

    def can_infer(self) -> bool:
        return in_integers() and self.reads is not None

    def infer(self, x: Tensor) -> Tensor:
        """As `QuantizedInput.infer`; codes of the input may come in its place, `(..., positions)` uint8."""
        quantizer = self.reads
        # Only what shares its quantizer with other layers is handed codes; other bytes are data, as an image may be.
        if self.shared_quantizer and x.dtype == torch.uint8:
            codes, channels, dtype = x, quantizer.plan_of_codes, quantizer.input_dtype
        else:
            self.check_channels(x, self.weight_quantizer.columns)
            quantizer.check_calibrated()
            dtype = x.dtype if x.is_floating_point() else self.weight.dtype
            channels = self.channel_plan()
            codes = channels.quantize(x.float())
        return self.plan(channels)(codes).to(dtype)

    def channel_plan(self) -> ChannelPlan:
        """How its input lies as codes."""
        return self.reads.plan(self.weight_quantizer.columns)

    def plan(self, channels: ChannelPlan) -> LinearPlan:
        """Weight and folded bias as the kernels take them, for an input of this plan."""
        weight = self.weight_quantizer
        make = functools.partial(self._make_plan, weight, channels)
        return self._plan.get((weight, self), make, of=channels)

    def _make_plan(self, weight: PackedWeight, channels: ChannelPlan) -> LinearPlan:
        return plan_linear(weight.plan(), weight.codes, self.bias, channels)


class PackedLinear(PackedLayer, QuantLinear):
    """Linear layer whose weight is codes.

    Args:
        layer: whose sizes, bias and input quantizer are taken over.
        weight_quantizer: the codes.
    """

    def __init__(self, layer: nn.Linear, weight_quantizer: PackedWeight):
        # Not that of nn.Linear, which makes a weight.
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.take_over(layer, weight_quantizer)


class PackedConv2d(PackedLayer, QuantConv2d):
    """Convolution whose weight is codes, as `PackedLinear`."""

    def __init__(self, layer: nn.Conv2d, weight_quantizer: PackedWeight):
        nn.Module.__init__(self)
        for name in (*nn.Conv2d.__constants__, "transposed", "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(layer, name))
        self.take_over(layer, weight_quantizer)

    def can_infer(self) -> bool:
        return super().can_infer() and self.cuts_patches


def packed_form(layer: QuantLinear | QuantConv2d) -> PackedLinear | PackedConv2d:
    """A layer of the same sizes with a `PackedWeight`, whose codes are still to be filled or loaded."""
    quantizer = layer.weight_quantizer
    weight = PackedWeight(quantizer.grid.bits, layer.weight.shape, quantizer.shift)
    return (PackedConv2d if isinstance(layer, QuantConv2d) else PackedLinear)(layer, weight.to(layer.weight.device))


@torch.no_grad()
def unpacked_form(layer: PackedLinear | PackedConv2d, weight_quantizer: WeightQuantizer) -> QuantLinear | QuantConv2d:
    """A layer with a floating-point weight that `weight_quantizer`, new and of the same bits, rounds to the same codes."""
    kind = QuantConv2d if isinstance(layer, PackedConv2d) else QuantLinear
    packed = layer.weight_quantizer
    weight_quantizer = weight_quantizer.to(packed.scale.device)
    by_mean = isinstance(weight_quantizer, StatsQWeightQuantizer)
    weight = _with_mean_of_step(packed) if by_mean else packed.dequantized()
    if isinstance(weight_quantizer, LSQWeightQuantizer):
        weight_quantizer.scale.copy_(packed.scale)
    if kind is QuantLinear:
        made = QuantLinear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    else:
        names = (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        )
        sizes = {name: getattr(layer, name) for name in names}
        made = QuantConv2d(**sizes, bias=layer.bias is not None, device="meta")
    made.weight = nn.Parameter(weight.view(packed.shape).to(weight.dtype if layer.bias is None else layer.bias.dtype))
    made.bias = layer.bias
    made.weight_quantizer = weight_quantizer
    made.input_quantizer, made.shared_quantizer = layer.input_quantizer, layer.shared_quantizer
    return made


def _with_mean_of_step(packed: PackedWeight) -> Tensor:
    """Weights that round to the codes and whose mean magnitude makes the same step (StatsQ): `mean|w| = 2^(b-2) * step`.

    Levels alone have another mean. Within half a step all magnitudes move by the difference; beyond, those of the
    outermost levels do, which have no upper end.
    """
    levels = packed.integers().float() + packed.shift
    sizes = levels.abs()
    steps_to_mean = 2.0 ** (packed.grid.bits - 2)
    missing = steps_to_mean - sizes.mean(1, keepdim=True)
    outermost = sizes == sizes.amax(1, keepdim=True)
    moved = torch.where(
        missing.abs() < 0.45, missing, outermost * missing / outermost.float().mean(1, keepdim=True).clamp_min(1e-12)
    )
    weight = levels.sign() * (sizes + moved) * packed.scale.unsqueeze(1)
    # What rounding has left of the difference goes to one element: the step is then the same to its last digit.
    one = outermost.int().argmax(1, keepdim=True)
    wide = widest(weight)
    left = steps_to_mean * packed.scale.to(wide) * weight.shape[1] - weight.abs().sum(1, dtype=wide)
    largest = weight.gather(1, one).to(wide)
    return weight.scatter_(1, one, (largest + largest.sign() * left.unsqueeze(1)).float())
