"""A mixture of quantizers of one matrix, for `activation.py` (of groups) and `widths.py` (of bit widths).

The loop over the quantizers is unrolled inside one compiled kernel, so that no copy of the matrix for each of them is ever
in memory; the backward pass computes everything anew.
"""

import functools

import torch
from torch import Tensor

from .compiling import compiled
from .levels import nearest_level


@functools.cache
def mixture_kernels(count: int):
    """Forward and backward of `Σ_k p_k (s_k clip(round((x - β_k) / s_k), 0, qmax_k) + β_k)`, of `count` quantizers.

    Arguments of both, after the gradient `(rows, columns)` of the backward:
        x: `(rows, columns)`.
        scale, offset, probabilities: s, β and p, `(count,)` or `(count, columns)`; s is positive.
        qmax, knee: as in `fake_quantize_groups`, or for each quantizer, `(count,)`.

    Forward returns `(rows, columns)`, backward the gradient of x and, `(count, columns)` each, the sums of those of scale
    and offset (LSQ+, arXiv 2004.09576), which are yet to be weighed by p, and of p.
    """

    @compiled
    def forward(
        x: Tensor, scale: Tensor, offset: Tensor, probabilities: Tensor, qmax: int | Tensor, knee: int | Tensor | None
    ) -> Tensor:
        wide = x.to(scale.dtype)
        mixture = torch.zeros_like(wide)
        for k in range(count):
            codes = nearest_level((wide - offset[k]) * (1 / scale[k]), _of(qmax, k), _of(knee, k))
            mixture = mixture + probabilities[k] * (codes * scale[k] + offset[k])
        return mixture.to(x.dtype)

    @compiled
    def backward(
        grad: Tensor,
        x: Tensor,
        scale: Tensor,
        offset: Tensor,
        probabilities: Tensor,
        qmax: int | Tensor,
        knee: int | Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide, grad = x.to(scale.dtype), grad.to(scale.dtype)
        passed = torch.zeros_like(wide)
        by_scale, by_offset, by_probability = [], [], []
        for k in range(count):
            position = (wide - offset[k]) * (1 / scale[k])
            inside = (position >= 0) & (position <= _of(qmax, k))
            codes = nearest_level(position, _of(qmax, k), _of(knee, k))
            passed = passed + torch.where(inside, probabilities[k], 0.0)
            by_probability.append((grad * (codes * scale[k] + offset[k])).sum(0))
            by_scale.append((grad * torch.where(inside, codes - position, codes)).sum(0))
            by_offset.append(torch.where(inside, 0.0, grad).sum(0))
        return (grad * passed).to(x.dtype), torch.stack(by_scale), torch.stack(by_offset), torch.stack(by_probability)

    return forward, backward


def _of(value: int | Tensor | None, k: int) -> int | Tensor | None:
    return value[k] if isinstance(value, Tensor) else value
