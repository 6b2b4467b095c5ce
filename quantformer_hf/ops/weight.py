"""Fake quantization of a weight matrix with one scale a row (output channel)."""

import torch
from torch import Tensor

from .compiling import compiled
from .scales import positive, positive_backward


@compiled
def _forward(weight: Tensor, scale: Tensor, shift: float, qmin: int, qmax: int) -> Tensor:
    scale = scale.unsqueeze(1)
    codes = (weight.to(scale.dtype) / scale - shift).round().clamp(qmin, qmax)
    return ((codes + shift) * scale).to(weight.dtype)


@compiled
def _backward(grad: Tensor, weight: Tensor, scale: Tensor, shift: float, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    position = weight.to(scale.dtype) / scale.unsqueeze(1) - shift
    inside = (position >= qmin) & (position <= qmax)
    codes = position.round().clamp(qmin, qmax)
    grad_scale = (grad * torch.where(inside, codes - position, codes + shift)).sum(1, dtype=scale.dtype)
    return torch.where(inside, grad, 0.0), grad_scale


class _FakeQuantizeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, scale, shift, qmin, qmax, gradient_scale):
        ctx.save_for_backward(weight, scale)
        ctx.arguments = shift, qmin, qmax
        ctx.gradient_scale = gradient_scale
        return _forward(weight.flatten(1), positive(scale), shift, qmin, qmax).view(weight.shape)

    @staticmethod
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        grad_weight, grad_scale = _backward(grad.flatten(1), weight.flatten(1), positive(scale), *ctx.arguments)
        grad_scale = positive_backward(grad_scale, scale) * ctx.gradient_scale
        return grad_weight.view(weight.shape), grad_scale, *[None] * 4


def fake_quantize_rows(
    weight: Tensor, scale: Tensor, qmin: int, qmax: int, shift: float = 0.0, gradient_scale: float = 1.0
) -> Tensor:
    """`ŵ = scale * (clip(round(w / scale - shift), qmin, qmax) + shift)`, one scale a row.

    The gradient passes straight through the rounding and is zero outside the clip range; that of the scale is LSQ's
    (arXiv 1902.08153, equation 3), times `gradient_scale`.

    Args:
        weight: `(out, ...)`.
        scale: `(out,)`. Its magnitude counts.
        qmin, qmax: ends of the integer grid.
        shift: 0 for a grid that holds zero, 0.5 for the half-shifted grid of StatsQ (arXiv 2302.02210).
        gradient_scale: factor on the gradient of the scale.

    Returns:
        `(out, ...)`, with at most `qmax - qmin + 1` distinct values a row.
    """
    return _FakeQuantizeRows.apply(weight, scale, shift, qmin, qmax, gradient_scale)
