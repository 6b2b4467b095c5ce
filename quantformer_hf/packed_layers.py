"""Layers whose weights are integer codes: what `pack()` makes of `QuantLinear` and `QuantConv2d`."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from .layers import QuantConv2d, QuantLinear
from .ops import positive
from .packing import pack_codes, packed_width, unpack_codes
from .quantizers import LSQWeightQuantizer, WeightQuantizer


class PackedWeight(WeightQuantizer):
    """A weight `scale * (q + shift)` as packed codes; see `packing` for the layout.

    `codes` is `(out, packed_width(in, bits))` uint8 and `scale` `(out,)` float32.

    Args:
        bits: 1 to 8.
        shape: of the weight, `(out, in)` or `(out, in, height, width)`.
        shift: 0, or 0.5 on the half-shifted grid (`StatsQWeightQuantizer`).
    """

    def __init__(self, bits: int, shape: Sequence[int], shift: float):
        super().__init__(bits, shape[0])
        self.shape = tuple(shape)
        self.shift = shift
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

    def dequantized(self) -> Tensor:
        """The weight in floating point, of `shape`: made anew at each call, and nowhere kept."""
        return ((self.integers().float() + self.shift) * self.scale.unsqueeze(1)).view(self.shape)

    def quantize(self, weight: Tensor) -> Tensor:
        # It comes from `dequantized`: it is on the grid.
        return weight


class PackedLinear(QuantLinear):
    """Linear layer without a floating-point weight: `weight` is made from the codes when it is asked for.

    Args:
        layer: whose sizes, bias and input quantizer are taken over.
        weight_quantizer: the codes.
    """

    def __init__(self, layer: nn.Linear, weight_quantizer: PackedWeight):
        # Not that of nn.Linear, which makes a weight.
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        _take_over(self, layer, weight_quantizer)

    @property
    def weight(self) -> Tensor:
        return _dequantized(self)


class PackedConv2d(QuantConv2d):
    """Convolution without a floating-point weight, as `PackedLinear`."""

    def __init__(self, layer: nn.Conv2d, weight_quantizer: PackedWeight):
        nn.Module.__init__(self)
        for name in (*nn.Conv2d.__constants__, "transposed", "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(layer, name))
        _take_over(self, layer, weight_quantizer)

    @property
    def weight(self) -> Tensor:
        return _dequantized(self)


def _dequantized(layer: PackedLinear | PackedConv2d) -> Tensor:
    # The patch embedding is asked for the dtype of its weight, which is that of the model.
    weight = layer.weight_quantizer.dequantized()
    return weight if layer.bias is None else weight.to(layer.bias.dtype)


def _take_over(packed: PackedLinear | PackedConv2d, layer: QuantLinear | QuantConv2d, weight: PackedWeight) -> None:
    packed.register_parameter("bias", layer.bias)
    packed.weight_quantizer = weight
    packed.input_quantizer = layer.input_quantizer


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
    weight = packed.dequantized() if packed.shift == 0 else _with_mean_of_step(packed)
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
    made.input_quantizer = layer.input_quantizer
    return made


def _with_mean_of_step(packed: PackedWeight) -> Tensor:
    """Weights that round to the codes and whose mean magnitude makes the same step (StatsQ): `mean|w| = 2^(b-2) * step`.

    Levels alone have another mean. Within half a step all magnitudes move by the difference; beyond, those of the
    outermost levels do, which have no upper end.
    """
    levels = packed.integers().float() + packed.shift
    sizes = levels.abs()
    missing = 2.0 ** (packed.grid.bits - 2) - sizes.mean(1, keepdim=True)
    outermost = sizes == sizes.amax(1, keepdim=True)
    moved = torch.where(
        missing.abs() < 0.45, missing, outermost * missing / outermost.float().mean(1, keepdim=True).clamp_min(1e-12)
    )
    return levels.sign() * (sizes + moved) * packed.scale.unsqueeze(1)
