"""A softmax mixture of quantizers of several bit widths, for matrices whose columns have scales and offsets of their own.

As in `activation.py`, only the inputs are saved, the loop over the widths is unrolled inside one compiled kernel, and the
backward pass computes everything anew: there is never a copy of an activation a width in memory.
"""

import functools

import torch
from torch import Tensor

from .activation import PRODUCERS
from .compiling import compiled
from .levels import nearest_level
from .scales import positive, positive_backward


@functools.cache
def _kernels(num_widths: int):
    """Forward and backward with the loop over `num_widths` unrolled."""

    @compiled
    def forward(x: Tensor, scale: Tensor, offset: Tensor, probabilities: Tensor, qmax: Tensor, knee: Tensor) -> Tensor:
        wide = x.to(scale.dtype)
        mixture = torch.zeros_like(wide)
        for k in range(num_widths):
            codes = nearest_level((wide - offset[k]) * (1 / scale[k]), qmax[k], knee[k])
            mixture = mixture + probabilities[k] * (codes * scale[k] + offset[k])
        return mixture.to(x.dtype)

    @compiled
    def backward(
        grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor, probabilities: Tensor, qmax: Tensor, knee: Tensor
    ):
        wide, grad = x.to(scale.dtype), grad.to(scale.dtype)
        passed = torch.zeros_like(wide)
        by_scale, by_offset, by_probability = [], [], []
        for k in range(num_widths):
            position = (wide - offset[k]) * (1 / scale[k])
            inside = (position >= 0) & (position <= qmax[k])
            codes = nearest_level(position, qmax[k], knee[k])
            passed = passed + torch.where(inside, probabilities[k], 0.0)
            by_probability.append((grad * (codes * scale[k] + offset[k])).sum(0))
            by_scale.append((grad * torch.where(inside, codes - position, codes)).sum(0))
            by_offset.append(torch.where(inside, 0.0, grad).sum(0))
        return (grad * passed).to(x.dtype), torch.stack(by_scale), torch.stack(by_offset), torch.stack(by_probability)

    return forward, backward


class _FakeQuantizeWidths(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, offset, probabilities, qmax, knee, producer):
        ctx.save_for_backward(x, scale, offset, probabilities, qmax, knee)
        ctx.producer = producer
        made = PRODUCERS[producer][0](x).reshape(-1, x.shape[-1])
        return _kernels(len(scale))[0](made, positive(scale), offset, probabilities, qmax, knee).view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        produce, produce_backward = PRODUCERS[ctx.producer]
        x, scale, offset, probabilities, qmax, knee = ctx.saved_tensors
        rows = -1, x.shape[-1]
        grad_made, by_scale, by_offset, by_probability = _kernels(len(scale))[1](
            grad.reshape(rows), produce(x).reshape(rows), positive(scale), offset, probabilities, qmax, knee
        )
        # The kernel leaves sums a width and column; the chain rule weighs those of scales and offsets.
        share = probabilities.unsqueeze(1)
        return (
            produce_backward(grad_made.view(x.shape), x),
            positive_backward(by_scale * share, scale),
            by_offset * share,
            by_probability.sum(1),
            *[None] * 3,
        )


def fake_quantize_widths(
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    probabilities: Tensor,
    qmax: Tensor,
    producer: str = "identity",
    knee: Tensor | None = None,
) -> Tensor:
    """`x̂_c = Σ_k p_k * (s_kc * clip(round((x_c - β_kc) / s_kc), 0, qmax_k) + β_kc)` (EdMIPS, arXiv 2004.05795, equation 8).

    Gradients are those of LSQ+ (arXiv 2004.09576), as in `fake_quantize_groups`, for each column by itself.

    Args:
        x: `(..., columns)`.
        scale, offset: `(widths, columns)`. The magnitude of `scale` counts.
        probabilities: p, `(widths,)`.
        qmax: largest integer of each grid, `(widths,)`, in the dtype of `scale`.
        producer: one of `PRODUCERS`, applied to `x` first.
        knee: of each grid, as in `fake_quantize_groups`, `(widths,)`, `qmax` where there is none; None: none has one.

    Returns:
        `(..., columns)`, in the dtype of `x`.
    """
    knee = qmax if knee is None else knee
    return _FakeQuantizeWidths.apply(x, scale, offset, probabilities, qmax, knee, producer)
