"""Weight quantizers: a scale for each output channel, learned or computed."""

import torch
from torch import Tensor, nn

from .grids import Grid, fit_row_scales
from .ops import fake_quantize_rows, positive, widest


class WeightQuantizer(nn.Module):
    """What the weight quantizers share: the grid, and the view of a weight as `(out, in)`.

    Args:
        bits: 1 to 8.
        out_channels: rows of the weight, one scale each.
    """

    #: 0 on a grid that holds zero, 0.5 on the half-shifted one.
    shift = 0.0

    #: Whether each weight has one level, as codes need.
    hard = True

    def __init__(self, bits: int, out_channels: int):
        super().__init__()
        self.grid = Grid(bits, signed=True, shift=self.shift)
        self.out_channels = out_channels
        self.enabled = True

    def forward(self, weight: Tensor) -> Tensor:
        """Fake-quantized weight, of the shape of `weight`: `(out, in)` or `(out, in, height, width)`."""
        if not self.enabled:
            return weight
        return self.quantize(weight)

    def quantize(self, weight: Tensor) -> Tensor:
        scale = self.step(weight)
        return fake_quantize_rows(
            weight, scale, self.grid.qmin, self.grid.qmax, shift=self.shift, gradient_scale=self.gradient_scale(weight)
        )

    def step(self, weight: Tensor) -> Tensor:
        """The scale of each row, `(out,)`, whose magnitude counts."""
        raise NotImplementedError(f"{type(self).__name__} must say what its scales are")

    def gradient_scale(self, weight: Tensor) -> float:
        """Factor on the gradient of the scales."""
        return 1.0

    @torch.no_grad()
    def integers(self, weight: Tensor) -> Tensor:
        """q of `ŵ = scale * (q + shift)`, `(out, in)`, int32: `in` counts everything but the output channels."""
        scale = positive(self.step(weight)).unsqueeze(1)
        position = weight.flatten(1).to(scale.dtype) / scale - self.shift
        return position.round().clamp(self.grid.qmin, self.grid.qmax).int()

    def calibrate(self, weight: Tensor) -> None:
        """Set what is learned from the full-precision weight. Nothing, for quantizers that compute their scale."""

    def extra_repr(self) -> str:
        return f"bits={self.grid.bits}"


class LSQWeightQuantizer(WeightQuantizer):
    """Learned step size, one scale an output channel (LSQ, arXiv 1902.08153).

    The gradient of a scale is scaled by `1 / sqrt(n * qmax)`, n the number of weights that share it.
    """

    def __init__(self, bits: int, out_channels: int):
        super().__init__(bits, out_channels)
        self.scale = nn.Parameter(torch.ones(out_channels))

    def step(self, weight: Tensor) -> Tensor:
        return self.scale

    def gradient_scale(self, weight: Tensor) -> float:
        return (weight[0].numel() * self.grid.qmax) ** -0.5

    @torch.no_grad()
    def calibrate(self, weight: Tensor) -> None:
        self.scale.copy_(fit_row_scales(weight.flatten(1), self.grid))


class ShiftedLSQWeightQuantizer(LSQWeightQuantizer):
    """Learned step size on the half-shifted grid of `StatsQWeightQuantizer`: one level more counts on the positive side."""

    shift = 0.5


class StatsQWeightQuantizer(WeightQuantizer):
    """Scale from the row's statistics on a half-shifted grid (StatsQ of OFQ, arXiv 2302.02210, section 4.1).

    `s = 2 mean|w|` a row, step `s / 2^(b-1)`, levels `(q + 1/2) * step`: symmetric and without zero, so that all `2^b`
    levels are used. At one bit this is `sign(w) * mean|w|`, the binary quantizer (XNOR-Net, arXiv 1603.05279).
    """

    shift = 0.5

    def step(self, weight: Tensor) -> Tensor:
        sizes = weight.detach().flatten(1).abs()
        return (2 * sizes.mean(1, dtype=widest(sizes)) / 2 ** (self.grid.bits - 1)).float()


class MinMaxWeightQuantizer(WeightQuantizer):
    """The smallest scale that clips no weight of the row."""

    def step(self, weight: Tensor) -> Tensor:
        rows = weight.detach().float().flatten(1)
        return torch.maximum(rows.amax(1) / self.grid.qmax, rows.amin(1) / self.grid.qmin)


_WEIGHT_QUANTIZERS = {
    "lsq": LSQWeightQuantizer,
    "lsq_shifted": ShiftedLSQWeightQuantizer,
    "statsq": StatsQWeightQuantizer,
    "minmax": MinMaxWeightQuantizer,
}

#: Choices that depend on the width: the most bits at which each is `lsq_shifted`; above, it is `lsq`. `auto` is what
#: checkpoints name that were made before three bits were shifted.
_SHIFTED_UP_TO = {"lsq_by_width": 3, "auto": 2}

#: Choices of `QuantformerConfig.weight_quantizer`.
WEIGHT_QUANTIZERS = (*_SHIFTED_UP_TO, *_WEIGHT_QUANTIZERS)


def weight_quantizer_kind(name: str, bits: int) -> type[WeightQuantizer]:
    """The class that `name`, one of `WEIGHT_QUANTIZERS`, stands for; at one bit always the binary one."""
    if name in _SHIFTED_UP_TO:
        name = "lsq_shifted" if bits <= _SHIFTED_UP_TO[name] else "lsq"
    return StatsQWeightQuantizer if bits == 1 else _WEIGHT_QUANTIZERS[name]


def build_weight_quantizer(name: str, bits: int, out_channels: int) -> WeightQuantizer:
    """A quantizer of that class."""
    return weight_quantizer_kind(name, bits)(bits, out_channels)
