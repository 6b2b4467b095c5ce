"""One linear refitted to what it reads: a regression, then rounding (`rounding.py`).

`reconstruction.py` says what the regression is to reach.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .rounding import round_weight


#: Ridge of the regression, pulling to the old weight, as a share of the inputs' mean variance.
REGRESSION_DAMPING = 10.0

#: The ridges among which cross-validation chooses, ascending, and the parts into which it divides the images.
DAMPINGS = tuple(0.1 * 4**step for step in range(6))
FOLDS = 4

#: How far a row is scaled on from an output that varies as in full precision (0) to one whose regression on that of full
#: precision has slope one (1).
UNBIASEDNESS = 0.5

#: By which a row is scaled at most: more says that it hardly varies at all, and what is left is noise.
LARGEST_GAIN = 2.0

#: Ridge of the rounding.
ROUNDING_DAMPING = 0.1

#: Variance that means nothing, as a share of the squared mean: products in float32 leave as much of inputs that do not vary.
NOISE = 1e-5

#: What a layer reads in full precision x and quantized x̂, each `(rows, channels)`, what `W x̂` lacks, e `(rows, out)`, and
#: how much each row counts, `(rows,)`. Either x or e has no columns: a layer is to give what it gives on x, or `W x̂ + e`.
Part = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass
class Moments:
    """Weighted second moments about their means, float64, of what a `Part` holds.

    Attributes:
        full_precision: `E[x xᵀ]`, `(channels, channels)`; of no rows, as `cross` and `mean`, where there is no x.
        quantized: `E[x̂ x̂ᵀ]`, `(channels, channels)`.
        cross: `E[x x̂ᵀ]`, `(channels, channels)`.
        missing: `E[e x̂ᵀ]`, `(out, channels)`; of no rows, as `missing_mean`, where there is no e.
        mean, quantized_mean: `(channels,)`.
        missing_mean: `(out,)`.
    """

    full_precision: Tensor
    quantized: Tensor
    cross: Tensor
    missing: Tensor
    mean: Tensor
    quantized_mean: Tensor
    missing_mean: Tensor

    @classmethod
    def of(cls, parts: Iterable[Part]) -> "Moments":
        """From all rows of `parts`."""
        sums: list[Tensor] | None = None
        for part in parts:
            sums = _added(sums, _sums(part))
        return cls._from_sums(sums)

    @classmethod
    def _from_sums(cls, sums: Sequence[Tensor]) -> "Moments":
        *products, mean, quantized_mean, missing_mean = (tensor / sums[-1] for tensor in sums[:-1])
        pairs = (mean, mean), (quantized_mean, quantized_mean), (mean, quantized_mean), (missing_mean, quantized_mean)
        centred = (product - torch.outer(*means) for product, means in zip(products, pairs, strict=True))
        return cls(*centred, mean, quantized_mean, missing_mean)

    def damping(self, share: float) -> Tensor:
        """`share` of the mean variance, on a diagonal, and positive."""
        # Of inputs that do not vary, variances may have either sign.
        noise = NOISE * self.quantized_mean.square().sum() + torch.finfo(torch.float32).tiny
        ridge = (share * self.quantized.diagonal().mean()).maximum(noise)
        return ridge * torch.eye(len(self.quantized), dtype=torch.float64, device=self.quantized.device)

    def wanting(self, weight: Tensor) -> Tensor:
        """What the weight leaves undone, `E[(W x - W x̂) x̂ᵀ]` or `E[e x̂ᵀ]`, `(out, channels)`."""
        return self.missing if len(self.missing) else weight @ (self.cross - self.quantized)


def _sums(part: Part) -> list[Tensor]:
    """Of which `Moments` are made, float64; those of more rows add up."""
    x, x_hat, missing, weights = part
    column = weights.unsqueeze(1)
    pairs = (x, x), (x_hat, x_hat), (x, x_hat), (missing, x_hat)
    products = [(left * column).T @ right for left, right in pairs]
    means = [weights @ rows for rows in (x, x_hat, missing)]
    return [tensor.double() for tensor in (*products, *means, weights.sum())]


def _added(sums: list[Tensor] | None, others: list[Tensor]) -> list[Tensor]:
    return others if sums is None else [a + b for a, b in zip(sums, others, strict=True)]


def nothing(rows: Tensor) -> Tensor:
    """The x or e that a `Part` of so many rows has not: `(rows, 0)`."""
    return rows.new_zeros(len(rows), 0)


@dataclass
class Evidence:
    """What a regression goes by.

    Attributes:
        moments: of all images.
        folds: of all but some images, and of those, for cross-validation; empty where there is none.
    """

    moments: Moments
    folds: list[tuple[Moments, Moments]]

    @classmethod
    def of(cls, parts: Iterable[Part], images: Sequence[int]) -> "Evidence":
        """With folds.

        Args:
            parts: rows in the order of the images.
            images: how many each part has.
        """
        sums: list[list[Tensor] | None] = [None] * FOLDS
        first = 0
        for part, count in zip(parts, images, strict=True):
            for fold in range(FOLDS):
                # Image by image through all parts, however few a part has.
                begin = (fold - first) % FOLDS
                if begin < count:
                    taken = [rows.unflatten(0, (count, -1))[begin::FOLDS].flatten(0, 1) for rows in part]
                    sums[fold] = _added(sums[fold], _sums(tuple(taken)))
            first += count
        # Images whose rows all count for nothing say nothing.
        told = [of_fold for of_fold in sums if of_fold is not None and of_fold[-1] > 0]
        whole = [torch.stack(tensors).sum(0) for tensors in zip(*told, strict=True)]
        folds = []
        for of_fold in told if len(told) > 1 else ():
            others = [a - b for a, b in zip(whole, of_fold, strict=True)]
            folds.append((Moments._from_sums(others), Moments._from_sums(of_fold)))
        return cls(Moments._from_sums(whole), folds)


def solve_damped(wanting: Tensor, moments: Moments, share: float) -> Tensor:
    """`wanting (E[x̂ x̂ᵀ] + λ)⁻¹`, `(out, channels)`, with λ the ridge `share`."""
    factor = torch.linalg.cholesky(moments.quantized + moments.damping(share))
    return torch.cholesky_solve(wanting.T, factor).T


def choose_damping(folds: Sequence[tuple[Moments, Moments]]) -> float:
    """The ridge of `DAMPINGS` with which regression on some images leaves least undone on the others.

    Args:
        folds: as in `Evidence`, with e. Without any, one knows nothing of other images, and the largest ridge is taken.
    """
    if not folds:
        return DAMPINGS[-1]
    losses = torch.zeros(len(DAMPINGS), dtype=torch.float64)
    for seen, unseen in folds:
        for index, share in enumerate(DAMPINGS):
            step = solve_damped(seen.missing, seen, share)
            losses[index] += (((step @ unseen.quantized) * step).sum() - 2 * (step * unseen.missing).sum()).item()
    return DAMPINGS[losses.argmin().item()]


def refit_weight(weight: Tensor, evidence: Evidence) -> Tensor:
    """What the layer should be, before it is rounded: `V = argmin E‖t - V x̂‖² + λ‖W - V‖²`, `(out, in)`, float64, with t
    either `W x̂ + e` or `W x`.

    For the former cross-validation chooses λ: the class token of each image counts for much, and there are few of them,
    which a small ridge learns by heart.

    Elsewhere λ is `REGRESSION_DAMPING`, and each row of V is scaled (`row_gains`). Least squares puts out less the noisier
    x̂ is, which is nearest to `W x`, and no good: attention gets flat, and what follows is made for values of the old size.
    Cross-validation would choose the least ridge almost everywhere, and lose.
    """
    wide, moments = weight.double(), evidence.moments
    makes_up = len(moments.missing) > 0
    share = choose_damping(evidence.folds) if makes_up else REGRESSION_DAMPING
    refitted = wide + solve_damped(moments.wanting(wide), moments, share)
    if makes_up:
        return refitted
    return refitted * row_gains(wide, refitted, moments).unsqueeze(1)


def row_gains(weight: Tensor, refitted: Tensor, moments: Moments) -> Tensor:
    """By what to scale the rows of V, `(out,)`: `(σ / σ̂) ρ^-u` with σ and σ̂ the deviations of `W x` and `V x̂`, ρ their
    correlation and u `UNBIASEDNESS`. A row that does not vary, or against full precision, is left as it is.

    Args:
        weight, refitted: W and V, `(out, in)`, float64.
        moments: with those in full precision.
    """
    expected = ((weight @ moments.full_precision) * weight).sum(1)
    given = ((refitted @ moments.quantized) * refitted).sum(1)
    together = ((weight @ moments.cross) * refitted).sum(1)
    noise = NOISE * weight.square() @ moments.mean.square()
    varies = (expected > noise) & (given > noise) & (together > 0)
    like_variance, unbiased = (expected / given).sqrt(), expected / together
    gain = torch.where(varies, like_variance ** (1 - UNBIASEDNESS) * unbiased**UNBIASEDNESS, 1.0)
    return gain.clamp(1 / LARGEST_GAIN, LARGEST_GAIN)


@torch.no_grad()
def refit_layer(layer: nn.Linear, evidence: Evidence) -> None:
    """Refit and round the weight of `layer`, set its scales, and let its bias take up the mean of the error."""
    before, moments = layer.weight.double(), evidence.moments
    target = refit_weight(layer.weight, evidence).float()
    quantizer = layer.weight_quantizer
    hessian = moments.quantized + moments.damping(ROUNDING_DAMPING)
    rounded = round_weight(target, quantizer.grid, hessian)
    layer.weight.copy_(rounded.latent)
    quantizer.scale.copy_(rounded.scale)
    if layer.bias is not None:
        given = rounded.weight.double() @ moments.quantized_mean
        makes_up = len(moments.missing) > 0
        expected = before @ moments.quantized_mean + moments.missing_mean if makes_up else before @ moments.mean
        layer.bias += (expected - given).to(layer.bias)
