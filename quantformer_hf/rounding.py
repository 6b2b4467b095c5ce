"""Rounding of a weight such that what the layer puts out changes least, and not the weight itself.

The loss is `tr((W - Ŵ) H (W - Ŵ)ᵀ)` with H the second moments of the inputs. Codes are found column by column, where those
not yet rounded make up for those that are (GPTQ, arXiv 2210.17323). Then scales and codes take turns: for fixed codes the
best scale of a row is a regression, and for fixed scales each column in turn takes the best codes beside all others
(coordinate descent, as in QuantEase, arXiv 2309.01885). Codes here are levels in units of the scale, with the shift of the
grid in them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .grids import Grid, fit_row_scales


#: Rounds of scales and codes in turn.
SWEEPS = 4

#: Columns whose effect on all others is added at once.
BLOCK = 64


class Rounded(NamedTuple):
    """A weight on its grid.

    Attributes:
        weight: `scale * codes`, `(out, in)`.
        latent: what was rounded, column by column, `(out, in)`: it rounds to the same.
        scale: `(out,)`.
    """

    weight: Tensor
    latent: Tensor
    scale: Tensor


def round_weight(weight: Tensor, grid: Grid, hessian: Tensor, sweeps: int = SWEEPS) -> Rounded:
    """Codes and scales of `weight` with little loss.

    Args:
        weight: `(out, in)`, float32.
        grid: signed grid.
        hessian: H, `(in, in)`, float64, positive definite.
        sweeps: rounds of scales and codes in turn, none of which makes the loss greater.
    """
    # Columns of the largest curvature first.
    order = hessian.diagonal().argsort(descending=True)
    weight, hessian = weight[:, order], hessian[order][:, order]
    # A column of huge inputs is to lie on the grid, even where that costs all others.
    scale = fit_row_scales(weight, grid, hessian.diagonal())
    codes, latent = round_columns(weight, scale, grid, hessian)
    hessian = hessian.to(weight)
    for _ in range(sweeps):
        scale = regress_scale(weight, codes, scale, hessian)
        codes, latent = descend(weight, codes, scale, grid, hessian)
    back = order.argsort()
    return Rounded((codes * scale.unsqueeze(1))[:, back], latent[:, back], scale)


def to_codes(values: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The nearest codes of `values` `(out,)`, as floating-point numbers."""
    return grid.nearest(values / scale)


def round_columns(weight: Tensor, scale: Tensor, grid: Grid, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Codes column by column from the first one on, each error made up for by the columns after it.

    Args:
        weight, grid, hessian: as in `round_weight`.
        scale: `(out,)`.

    Returns:
        the codes, as floating-point numbers, and the weight as it was when each column was rounded, `(out, in)` both.
    """
    factor = torch.linalg.cholesky(hessian)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).to(weight)
    latent = weight.clone()
    codes = torch.empty_like(latent)
    for start in range(0, latent.shape[1], BLOCK):
        end = min(start + BLOCK, latent.shape[1])
        errors = latent.new_empty(len(latent), end - start)
        for column in range(start, end):
            codes[:, column] = to_codes(latent[:, column], scale, grid)
            error = (latent[:, column] - codes[:, column] * scale) / factor[column, column]
            latent[:, column + 1 : end] -= torch.outer(error, factor[column, column + 1 : end])
            errors[:, column - start] = error
        latent[:, end:] -= errors @ factor[start:end, end:]
    return codes, latent


def regress_scale(weight: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """The best scale of each row for its codes q, `q H w / q H q`, `(out,)`; a row that has none keeps its own.

    Args:
        weight, codes: `(out, in)`, float32.
        scale: `(out,)`.
        hessian: H, `(in, in)`, float32.
    """
    curved = codes @ hessian
    fitted = (curved * weight).sum(1) / (curved * codes).sum(1).clamp_min(torch.finfo(weight.dtype).tiny)
    return torch.where(fitted > 0, fitted, scale)


def descend(weight: Tensor, codes: Tensor, scale: Tensor, grid: Grid, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Each column in turn takes the codes that are best beside those of all other columns.

    Args:
        weight, codes, scale, hessian: as in `regress_scale`.
        grid: signed grid.

    Returns:
        codes and latents as `round_columns`.
    """
    codes, latent = codes.clone(), torch.empty_like(weight)
    curvature = hessian.diagonal()
    pull = (weight - codes * scale.unsqueeze(1)) @ hessian
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        own, moved = hessian[start:end, start:end], weight.new_empty(len(weight), end - start)
        for column in range(start, end):
            latent[:, column] = codes[:, column] * scale + pull[:, column] / curvature[column]
            chosen = to_codes(latent[:, column], scale, grid)
            step = (chosen - codes[:, column]) * scale
            codes[:, column] = chosen
            pull[:, start:end] -= torch.outer(step, own[column - start])
            moved[:, column - start] = step
        pull[:, end:] -= moved @ hessian[start:end, end:]
    return codes, latent
