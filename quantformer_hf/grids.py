"""Integer grids, and the scale and offset that fit given values best."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .ops.levels import COARSE_STEP, nearest_level
from .ops.scales import SMALLEST_SCALE


#: Bit width that means "leave this tensor in floating point".
FULL_PRECISION_BITS = 32


@dataclass(frozen=True)
class Grid:
    """The levels that a quantizer may produce, in units of its scale: exactly `2 ** bits` of them, integers plus `shift`.

    Args:
        bits: 1 to 8.
        signed: two's complement range if true, else from 0.
        shift: 0, or 0.5: of a signed grid, half-shifted, the levels lie evenly about zero, and none of them is zero.
        knee: of an unsigned grid, the level up to which levels are one step apart, and above which `COARSE_STEP` steps
            (`ops/levels.py`). None: all are one step apart.
    """

    bits: int
    signed: bool
    shift: float = 0.0
    knee: int | None = None

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """The highest level, less `shift`."""
        last = 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1
        return last if self.knee is None else self.knee + (last - self.knee) * COARSE_STEP

    @property
    def levels(self) -> int:
        return 2**self.bits

    def nearest(self, positions: Tensor) -> Tensor:
        """The nearest level of each of `positions`, in units of the scale."""
        if not self.signed:
            return nearest_level(positions, self.qmax, self.knee)
        return (positions - self.shift).round().clamp(self.qmin, self.qmax) + self.shift


#: Knees of the grids of what GELU puts out, by bits: with them a layer loses half of what even levels lose at four bits, and
#: two thirds at three (docs/choices.md). Products of two bits are looked up by codes up to 3; more bits lose little anyhow.
GELU_KNEES = {3: 2, 4: 5}


def gelu_grid(bits: int) -> Grid:
    """The levels for what GELU puts out: dense at its lower end, where the bits make that pay."""
    return Grid(bits, signed=False, knee=GELU_KNEES.get(bits))


def fit_row_scales(weight: Tensor, grid: Grid, importance: Tensor | None = None, refinements: int = 5) -> Tensor:
    """The scale of each row with the least squared error of a symmetric quantizer.

    A search over clip ranges, then alternating least squares: for fixed levels q the best scale is `Σ h w q / Σ h q²`.

    Args:
        weight: `(rows, columns)`.
        grid: signed grid.
        importance: h `(columns,)`, what a squared error of each column costs; by default the same for all.
        refinements: rounds of least squares.

    Returns:
        `(rows,)`, float32, positive. A row of zeros has scale 1, or where no level is zero, 1e-8.
    """
    weight = weight.detach().float()
    # Of mean one, so that no sum of products leaves the range of float32.
    importance = torch.ones_like(weight[0]) if importance is None else (importance / importance.mean()).to(weight)
    top = max(grid.qmax, 1) if grid.shift == 0 else grid.qmax + grid.shift
    largest = weight.abs().amax(1, keepdim=True)
    empty, of_empty = largest == 0, 1.0 if grid.shift == 0 else SMALLEST_SCALE
    largest = largest.masked_fill(empty, top)

    def levels_and_error(scale: Tensor) -> tuple[Tensor, Tensor]:
        levels = grid.nearest(weight / scale)
        return levels, (weight - levels * scale).square().mul(importance).sum(1, keepdim=True)

    best, least = largest / top, torch.full_like(largest, torch.inf)

    def keep_better(scale: Tensor) -> Tensor:
        nonlocal best, least
        levels, error = levels_and_error(scale)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
        return levels

    for fraction in torch.linspace(0.05, 1.0, 39).tolist():
        keep_better(largest * fraction / top)
    for _ in range(refinements):
        levels, _ = levels_and_error(best)
        energy = levels.square().mul(importance).sum(1, keepdim=True)
        fitted = (weight * levels).mul(importance).sum(1, keepdim=True) / energy.clamp_min(
            torch.finfo(energy.dtype).tiny
        )
        keep_better(torch.where((energy > 0) & (fitted > 0), fitted, best))
    return best.masked_fill(empty, of_empty).squeeze(1)


def fit_affine(values: Tensor, weights: Tensor, grid: Grid, refinements: int = 8) -> tuple[Tensor, Tensor]:
    """The scale and offset with the least weighted squared error of `scale * q + offset`, for each row of weights.

    A search over clip ranges, each end by itself, then `refine_affine`.

    Args:
        values: `(..., n)`, or `(n,)` for all rows.
        weights: `(..., n)`, how often each value occurs, or how much it matters; a positive total in each row. Values of
            weight zero do not belong to the row.
        grid: unsigned grid.
        refinements: rounds of least squares.

    Returns:
        scale and offset, `(...)`, float32, the scales positive. Constant values have scale 1 and themselves as offset.
    """
    weights = weights.detach().float()
    values = values.detach().float().expand_as(weights)
    centre = _weighted_mean(values, weights)
    low = values.masked_fill(weights == 0, torch.inf).amin(-1, keepdim=True)
    high = values.masked_fill(weights == 0, -torch.inf).amax(-1, keepdim=True)
    constant = low == high
    best_scale, best_offset = torch.ones_like(low), low
    least = torch.full_like(low, torch.inf)
    fractions = torch.linspace(0.1, 1.0, 10).tolist()
    for left in fractions:
        offset = centre - left * (centre - low)
        for right in fractions:
            scale = (centre + right * (high - centre) - offset) / grid.qmax
            scale = scale.where(~constant, torch.ones_like(scale))
            error = _affine_error(values, weights, scale, offset, grid)
            better = error < least
            best_scale, best_offset = scale.where(better, best_scale), offset.where(better, best_offset)
            least = error.where(better, least)
    return refine_affine(values, weights, grid, best_scale.squeeze(-1), best_offset.squeeze(-1), refinements)


def refine_affine(
    values: Tensor, weights: Tensor, grid: Grid, scale: Tensor, offset: Tensor, refinements: int = 8
) -> tuple[Tensor, Tensor]:
    """Alternating least squares from `scale` and `offset`: for fixed codes, they are the regression of the values on them.

    Arguments and results as in `fit_affine`; the error never grows. A row of zero weights keeps what it has.
    """
    weights = weights.detach().float()
    values = values.detach().float().expand_as(weights)
    scale, offset = scale.unsqueeze(-1), offset.unsqueeze(-1)
    centre = _weighted_mean(values, weights)
    least = _affine_error(values, weights, scale, offset, grid)
    for _ in range(refinements):
        codes = grid.nearest((values - offset) / scale)
        mean = _weighted_mean(codes, weights)
        variance = (weights * (codes - mean).square()).sum(-1, keepdim=True)
        covariance = (weights * (codes - mean) * (values - centre)).sum(-1, keepdim=True)
        fitted = covariance / variance.clamp_min(torch.finfo(variance.dtype).tiny)
        shifted = centre - fitted * mean
        usable = (variance > 0) & (fitted > 0)
        error = _affine_error(values, weights, fitted.where(usable, scale), shifted, grid)
        better = usable & (error < least)
        if not better.any():
            break
        scale, offset, least = fitted.where(better, scale), shifted.where(better, offset), error.where(better, least)
    return scale.squeeze(-1), offset.squeeze(-1)


def fit_offset(
    values: Tensor, weights: Tensor, grid: Grid, scale: Tensor, offset: Tensor, refinements: int = 3
) -> Tensor:
    """As `refine_affine`, of the offset alone: for fixed codes, it is the mean of what they leave."""
    weights = weights.detach().float()
    values = values.detach().float().expand_as(weights)
    scale, offset = scale.unsqueeze(-1), offset.unsqueeze(-1)
    for _ in range(refinements):
        codes = grid.nearest((values - offset) / scale)
        offset = _weighted_mean(values - codes * scale, weights)
    return offset.squeeze(-1)


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    tiny = torch.finfo(weights.dtype).tiny
    return (weights * values).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True).clamp_min(tiny)


def _affine_error(values: Tensor, weights: Tensor, scale: Tensor, offset: Tensor, grid: Grid) -> Tensor:
    codes = grid.nearest((values - offset) / scale)
    return (weights * (values - codes * scale - offset).square()).sum(-1, keepdim=True)
