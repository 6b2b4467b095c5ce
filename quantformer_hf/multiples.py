"""Scales of groups that are small whole multiples of a unit.

The products of a group are then integers in units, and those of all groups add up as if they were one group: kernels need
no sum of its own for each of them, nor a conversion to floating point. Two levels of scales, of which the one of the groups
is a small integer, are those of VS-Quant (arXiv 2102.04503). Here units have few digits besides, so that sums of products
times scales, where they are not too many, are exact in float32, in whatever order they are made (`kernels/merging.py`).
"""

import torch
from torch import Tensor

from .ops.scales import positive, positive_backward


#: A weight of four bits times this is a signed byte.
LARGEST_MULTIPLE = 15

#: Bits of a float32 below its exponent, and of these the ones that are zero in a unit, which is 1, 1.25, 1.5 or 1.75 times
#: a power of two.
MANTISSA_BITS = 23
ZERO_BITS = 21
EXPONENT_OF_ONE = 127

#: A scale that is smaller than the largest by at least so many powers of two has a unit that is smaller by as many.
UNIT_STEP = 3


def to_multiples(scale: Tensor) -> Tensor:
    """Scales near those given that are whole multiples, 1 to `LARGEST_MULTIPLE`, of their unit.

    The unit is the least of which the largest scale is such a multiple. Scales that are smaller by a factor of 8 have one
    that is smaller by 8, those of 64 by 64, and so on, so that none is changed by more than a third.

    Args:
        scale: `(groups,)`, positive.

    Returns:
        `(groups,)`, of the same dtype.
    """
    units = _units(scale.float())
    return (scale / units).round().clamp(1, LARGEST_MULTIPLE).mul(units).to(scale.dtype)


def learned_multiples(scale: Tensor) -> Tensor:
    """`to_multiples(positive(scale))`, with the gradient of `positive(scale)`: straight through the rounding."""
    return _LearnedMultiples.apply(scale)


class _LearnedMultiples(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale):
        ctx.save_for_backward(scale)
        return to_multiples(positive(scale))

    @staticmethod
    def backward(ctx, grad):
        return positive_backward(grad, *ctx.saved_tensors)


def _units(scale: Tensor) -> Tensor:
    """The unit of each of the scales. By bits, since no rounding of a logarithm is to decide."""
    largest = scale.amax()
    # A little more than the largest multiple still rounds to it.
    least = largest / (LARGEST_MULTIPLE + 0.5)
    unit = ((_bits(least) >> ZERO_BITS) + 1 << ZERO_BITS).view(torch.float32)
    smaller = ((_bits(largest / scale) >> MANTISSA_BITS) - EXPONENT_OF_ONE) // UNIT_STEP * UNIT_STEP
    return unit * (EXPONENT_OF_ONE - smaller << MANTISSA_BITS).view(torch.float32)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)
