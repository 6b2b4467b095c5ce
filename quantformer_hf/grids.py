"""Integer grids, and the scale and offset that fit given values best."""

from dataclasses import dataclass

import torch
from torch import Tensor


#: Bit width that means "leave this tensor in floating point".
FULL_PRECISION_BITS = 32


@dataclass(frozen=True)
class Grid:
    """The integers that a quantizer may produce: exactly `2 ** bits` of them.

    Args:
        bits: 1 to 8.
        signed: two's complement range if true, else from 0.
    """

    bits: int
    signed: bool

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def levels(self) -> int:
        return 2**self.bits


def fit_row_scales(weight: Tensor, grid: Grid, refinements: int = 5) -> Tensor:
    """The scale of each row with the least squared error of a symmetric quantizer.

    A search over clip ranges, then alternating least squares: for fixed codes q the best scale is `Σ w q / Σ q²`.

    Args:
        weight: `(rows, columns)`.
        grid: signed grid.
        refinements: rounds of least squares.

    Returns:
        `(rows,)`, float32, positive. A row of zeros has scale 1.
    """
    weight = weight.detach().float()
    largest = weight.abs().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest) * max(grid.qmax, 1))

    def codes_and_error(scale: Tensor) -> tuple[Tensor, Tensor]:
        codes = (weight / scale).round().clamp(grid.qmin, grid.qmax)
        return codes, (weight - codes * scale).square().sum(1, keepdim=True)

    best, least = largest / max(grid.qmax, 1), torch.full_like(largest, torch.inf)

    def keep_better(scale: Tensor) -> Tensor:
        nonlocal best, least
        codes, error = codes_and_error(scale)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
        return codes

    for fraction in torch.linspace(0.05, 1.0, 39).tolist():
        keep_better(largest * fraction / max(grid.qmax, 1))
    for _ in range(refinements):
        codes, _ = codes_and_error(best)
        energy = codes.square().sum(1, keepdim=True)
        fitted = (weight * codes).sum(1, keepdim=True) / energy.clamp_min(1)
        keep_better(torch.where((energy > 0) & (fitted > 0), fitted, best))
    return best.squeeze(1)


def fit_affine(values: Tensor, weights: Tensor, grid: Grid, refinements: int = 8) -> tuple[Tensor, Tensor]:
    """The scale and offset with the least weighted squared error of `scale * q + offset`.

    A search over clip ranges, each end by itself, then alternating least squares: for fixed codes q, scale and offset
    are the linear regression of the values on q.

    Args:
        values: `(n,)`.
        weights: `(n,)`, how often each value occurs; any positive total.
        grid: unsigned grid.
        refinements: rounds of least squares.

    Returns:
        scale and offset, float32 scalars, the scale positive. Constant values have scale 1 and themselves as offset.
    """
    values, weights = values.detach().float(), weights.detach().float()
    weights = weights / weights.sum()
    low, high = values.min(), values.max()
    if low == high:
        return torch.ones_like(low), low.clone()
    centre = (weights * values).sum()

    def codes_and_error(scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        codes = ((values - offset) / scale).round().clamp(grid.qmin, grid.qmax)
        return codes, (weights * (values - codes * scale - offset).square()).sum()

    best, least = ((high - low) / grid.qmax, low), torch.tensor(torch.inf)

    def keep_better(scale: Tensor, offset: Tensor) -> None:
        nonlocal best, least
        _, error = codes_and_error(scale, offset)
        if error < least:
            best, least = (scale, offset), error

    fractions = torch.linspace(0.1, 1.0, 10).tolist()
    for left in fractions:
        offset = centre - left * (centre - low)
        for right in fractions:
            keep_better((centre + right * (high - centre) - offset) / grid.qmax, offset)
    for _ in range(refinements):
        codes, _ = codes_and_error(*best)
        mean = (weights * codes).sum()
        variance = (weights * (codes - mean).square()).sum()
        if variance <= 0:
            break
        scale = (weights * (codes - mean) * (values - centre)).sum() / variance
        if scale <= 0:
            break
        keep_better(scale, centre - scale * mean)
    return best
