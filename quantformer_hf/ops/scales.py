"""Learned scales, made safe to divide by."""

import torch
from torch import Tensor


SMALLEST_SCALE = 1e-8


def positive(scale: Tensor) -> Tensor:
    """`max(|scale|, 1e-8)`: a gradient step may carry a learned scale through zero."""
    return scale.abs().clamp_min(SMALLEST_SCALE)


def widest(x: Tensor) -> torch.dtype:
    """The dtype in which to add up float32 of that device, such that the order of the sum, in which machines differ,
    changes no digit of what is then rounded to float32; MPS has none."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def positive_backward(grad: Tensor, scale: Tensor) -> Tensor:
    """Gradient of `scale`, given that of `positive(scale)`. At zero it is that of a positive scale, to lead out."""
    return torch.where(scale < 0, -grad, grad)
