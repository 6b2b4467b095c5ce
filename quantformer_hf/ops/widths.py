"""A softmax mixture of quantizers of several bit widths, for matrices whose columns have scales and offsets of their own.

As in `activation.py`, only the inputs are saved (`mixture.py`): there is never a copy of an activation a width in memory.
"""

import torch
from torch import Tensor

from .activation import PRODUCERS
from .mixture import mixture_kernels
from .scales import positive, positive_backward


class _FakeQuantizeWidths(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, offset, probabilities, qmax, knee, producer):
        ctx.save_for_backward(x, scale, offset, probabilities, qmax, knee)
        ctx.producer = producer
        made = PRODUCERS[producer][0](x).reshape(-1, x.shape[-1])
        return mixture_kernels(len(scale))[0](made, positive(scale), offset, probabilities, qmax, knee).view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        produce, produce_backward = PRODUCERS[ctx.producer]
        x, scale, offset, probabilities, qmax, knee = ctx.saved_tensors
        rows = -1, x.shape[-1]
        grad_made, by_scale, by_offset, by_probability = mixture_kernels(len(scale))[1](
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
