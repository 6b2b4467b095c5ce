"""Fake quantization of activations `(..., channels)` with a scale and an offset for each group of channels.

Both functions save only their inputs and recompute in the backward pass; the loop over the groups is unrolled inside
one compiled kernel, so that no copy per group is ever in memory. What makes the activation elementwise (GELU) can run
inside the function, which then keeps the input of that alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiling import compiled
from .levels import nearest_level
from .mixture import mixture_kernels
from .scales import positive, positive_backward


#: What can make the activation inside the quantizer, so that only its input is kept: value, and gradient of the input.
PRODUCERS = {
    "identity": (lambda x: x, lambda grad, x: grad),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
}


@compiled
def _forward(x: Tensor, scale: Tensor, offset: Tensor, qmax: int, knee: int | None = None) -> Tensor:
    codes = nearest_level((x.to(scale.dtype) - offset) * (1 / scale), qmax, knee)
    return (codes * scale + offset).to(x.dtype)


def _elementwise_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor, qmax: int, knee: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, and of scale and offset before they are added up."""
    wide_grad = grad.to(scale.dtype)
    position = (x.to(scale.dtype) - offset) * (1 / scale)
    inside = (position >= 0) & (position <= qmax)
    codes = nearest_level(position, qmax, knee)
    return (
        torch.where(inside, grad, 0.0),
        wide_grad * torch.where(inside, codes - position, codes),
        torch.where(inside, 0.0, wide_grad),
    )


@compiled
def _channels_backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor, qmax: int, knee: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """With `(channels,)` scales: sums of each channel."""
    grad_x, by_scale, by_offset = _elementwise_gradients(grad, x, scale, offset, qmax, knee)
    return grad_x, by_scale.sum(0), by_offset.sum(0)


@compiled
def _tensor_backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor, qmax: int, knee: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """With one scale, for flat tensors: the compiler then needs one pass instead of two."""
    grad_x, by_scale, by_offset = _elementwise_gradients(grad, x, scale, offset, qmax, knee)
    return grad_x, by_scale.sum(0, keepdim=True), by_offset.sum(0, keepdim=True)


class _FakeQuantizeGroups(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, offset, index, qmax, knee, gradient_scale, producer):
        ctx.save_for_backward(x, scale, offset, index)
        ctx.arguments = qmax, knee, gradient_scale, producer
        made = PRODUCERS[producer][0](x)
        made = made.flatten() if index is None else made.reshape(-1, x.shape[-1])
        return _forward(made, *_of_channels(scale, offset, index), qmax, knee).view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        qmax, knee, gradient_scale, producer = ctx.arguments
        produce, produce_backward = PRODUCERS[producer]
        x, scale, offset, index = ctx.saved_tensors
        made, arguments = produce(x), (*_of_channels(scale, offset, index), qmax, knee)
        if index is None:
            grad_made, grad_scale, grad_offset = _tensor_backward(grad.flatten(), made.flatten(), *arguments)
        else:
            rows = -1, x.shape[-1]
            grad_made, *sums = _channels_backward(grad.reshape(rows), made.reshape(rows), *arguments)
            grad_scale, grad_offset = (scale.new_zeros(scale.shape).index_add_(0, index, s) for s in sums)
        return (
            produce_backward(grad_made.view(x.shape), x),
            positive_backward(grad_scale, scale) * gradient_scale,
            grad_offset * gradient_scale,
            *[None] * 5,
        )


def _of_channels(scale: Tensor, offset: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    scale = positive(scale)
    return (scale, offset) if index is None else (scale[index], offset[index])


def fake_quantize_groups(
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    index: Tensor | None,
    qmax: int,
    gradient_scale: float = 1.0,
    producer: str = "identity",
    knee: int | None = None,
) -> Tensor:
    """`x̂_c = s * clip(round((x_c - β)/s), 0, qmax) + β`, with scale s and offset β of the channel's group.

    The gradients of scale and offset are those of LSQ+ (arXiv 2004.09576, equations 6 to 8), times `gradient_scale`.

    Args:
        x: `(..., channels)`.
        scale, offset: `(groups,)`. The magnitude of `scale` counts.
        index: `(channels,)`, int64, the group of each channel; None for one group.
        qmax: largest integer of the unsigned grid.
        gradient_scale: factor on the gradients of scale and offset.
        producer: one of `PRODUCERS`, applied to `x` first.
        knee: above it integers are levels only three apart (`levels.py`); None: all integers are.

    Returns:
        `(..., channels)`, in the dtype of `x`.
    """
    return _FakeQuantizeGroups.apply(x, scale, offset, index, qmax, knee, gradient_scale, producer)


class _FakeQuantizeMixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, offset, probabilities, qmax, knee, gradient_scale, producer):
        ctx.save_for_backward(x, scale, offset, probabilities)
        ctx.arguments = qmax, knee, gradient_scale, producer
        made = PRODUCERS[producer][0](x).reshape(-1, x.shape[-1])
        kernel, _ = mixture_kernels(scale.numel())
        return kernel(made, positive(scale), offset, probabilities, qmax, knee).view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        qmax, knee, gradient_scale, producer = ctx.arguments
        produce, produce_backward = PRODUCERS[producer]
        x, scale, offset, probabilities = ctx.saved_tensors
        _, kernel = mixture_kernels(scale.numel())
        grad_made, by_scale, by_offset, grad_probabilities = kernel(
            grad.reshape(-1, x.shape[-1]),
            produce(x).reshape(-1, x.shape[-1]),
            positive(scale),
            offset,
            probabilities,
            qmax,
            knee,
        )
        # The kernel leaves one sum a group and channel; the chain rule weighs each by its probability.
        return (
            produce_backward(grad_made.view(x.shape), x),
            positive_backward((by_scale * probabilities).sum(1), scale) * gradient_scale,
            (by_offset * probabilities).sum(1) * gradient_scale,
            grad_probabilities,
            *[None] * 4,
        )


def fake_quantize_mixture(
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    probabilities: Tensor,
    qmax: int,
    gradient_scale: float = 1.0,
    producer: str = "identity",
    knee: int | None = None,
) -> Tensor:
    """`x̂_c = Σ_g probabilities_gc * Q_g(x_c)`, with `Q_g` as in `fake_quantize_groups` (Quantformer, section 3.2).

    Args:
        x: `(..., channels)`.
        scale, offset: `(groups,)`. The magnitude of `scale` counts.
        probabilities: `(groups, channels)`, each column sums to one.
        qmax: largest integer of the unsigned grid.
        gradient_scale: factor on the gradients of scale and offset.
        producer: one of `PRODUCERS`, applied to `x` first.
        knee: as in `fake_quantize_groups`.

    Returns:
        `(..., channels)`, in the dtype of `x`.
    """
    return _FakeQuantizeMixture.apply(x, scale, offset, probabilities, qmax, knee, gradient_scale, producer)
