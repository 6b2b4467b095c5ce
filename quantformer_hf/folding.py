"""Channels centred before they are grouped: a shift of each channel, folded into the layers on both sides of it.

Where one layer with a bias makes a tensor and linears with biases read it, `x_c - r_c` may stand for `x_c`: the maker's
bias takes `-r`, the readers' biases take `+W r`, and the network computes what it did before. The shift costs nothing at
inference, and groups have only the widths of the channels left to share (after RepQ-ViT, arXiv 2212.08254,
which folds scales as well, at the cost of weights that are harder to quantize).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import attention_modules
from .grids import Grid, fit_affine
from .layers import QuantLayerNorm, QuantLinear
from .observers import QUANTILE_WEIGHTS
from .quantizers import ActivationQuantizer, GroupActivationQuantizer


@dataclass(frozen=True)
class FoldingSite:
    """A quantized tensor between the layer that makes it and the linears that read it.

    Attributes:
        beside: other quantizers of what the maker puts out, which see each shift as well.
    """

    maker: nn.Module
    quantizer: GroupActivationQuantizer
    readers: list[nn.Linear]
    beside: tuple[ActivationQuantizer, ...] = ()


def folding_sites(model: nn.Module, readers: dict[GroupActivationQuantizer, list[nn.Linear]]) -> list[FoldingSite]:
    """Where channels can be shifted: LayerNorm to its readers, and v to the output projection.

    The latter since the rows of an attention map sum to one: a shift of v arrives whole. Not behind GELU, nor where Swin
    pads between the LayerNorm and its readers (zeros would not be shifted with the rest), nor before a linear without bias.

    Args:
        model: a quantized ViT, DeiT or Swin.
        readers: the linears that read what each quantizer puts out.
    """
    makers = {module.output_quantizer: module for module in model.modules() if isinstance(module, QuantLayerNorm)}
    beside: dict[GroupActivationQuantizer, tuple[ActivationQuantizer, ...]] = {}
    for attention in attention_modules(model):
        if isinstance(attention.o_proj, QuantLinear) and attention.o_proj.input_quantizer is not None:
            quantizer, operands = attention.o_proj.input_quantizer, getattr(attention, "operands", None)
            makers[quantizer] = attention.v_proj
            beside[quantizer] = () if operands is None else (operands.value,)
    return [
        FoldingSite(maker, quantizer, readers[quantizer], beside.get(quantizer, ()))
        for quantizer, maker in makers.items()
        if all(layer.bias is not None for layer in (maker, *readers[quantizer]))
    ]


@torch.no_grad()
def centre_site(site: FoldingSite, quantiles: Tensor) -> Tensor:
    """Shift the channels of `site` so that the best quantizer of each, taken alone, is centred on zero.

    Args:
        site: its biases are changed in place.
        quantiles: what was observed there, `(channels, quantiles)`.

    Returns:
        the shift, `(channels,)`: by how much values there have become less.
    """
    centres = channel_centres(quantiles, site.quantizer.grid)
    site.maker.bias -= centres.to(site.maker.bias)
    for layer in site.readers:
        layer.bias += (layer.weight.float() @ centres).to(layer.bias)
    return centres


def channel_centres(quantiles: Tensor, grid: Grid) -> Tensor:
    """The middle of each channel's best grid, `(channels,)`, from `(channels, quantiles)`."""
    weights = QUANTILE_WEIGHTS.to(quantiles.device).expand_as(quantiles)
    scale, offset = fit_affine(quantiles, weights, grid)
    return offset + scale * (grid.qmax / 2)
