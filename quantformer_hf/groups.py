"""From the ranges of the channels to groups of channels."""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from .grids import Grid, fit_affine, fit_offset, refine_affine
from .kernels import STEP
from .multiples import to_multiples
from .observers import QUANTILE_WEIGHTS


#: Of what all channels of a layer lose, the most that one may lose by leaving its group for a step of the kernels.
LARGEST_MOVE = 1e-3

#: Share of the groups' maximum entropy that the first assignment has: certain enough to start near the k-means
#: solution, and open enough for a gradient to move a channel.
INITIAL_ENTROPY = 0.2


def cluster_channels(
    quantiles: Tensor, importance: Tensor, num_groups: int, grid: Grid, iterations: int = 20
) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of channels, each with the quantizer that fits it, and each channel in the group that costs it least.

    K-means on the channels' ranges, then Lloyd's iteration with the error of quantization as the distance: fit a scale
    and an offset to each group, give each channel to the group whose quantizer has the least squared error for it. Offsets
    and errors are those of scales that are multiples in the end (`multiples.py`).

    Args:
        quantiles: `(channels, quantiles)`, ascending along the second dimension, at the probabilities `QUANTILES`.
        importance: `(channels,)`, not negative: what a squared error of each channel costs.
        num_groups: G, at most `channels`.
        grid: unsigned grid.
        iterations: most rounds of Lloyd's iteration.

    Returns:
        scale and offset `(num_groups,)`, and the mean squared error of each channel in each group
        `(num_groups, channels)`, float32, the least of each channel being that in its own group (`in_whole_steps`). A group
        that nobody wants keeps its last quantizer.
    """
    index = _cluster_ranges(quantiles, num_groups)
    mass = channel_mass(importance).unsqueeze(1) * QUANTILE_WEIGHTS.to(quantiles.device)

    def weights_of_groups() -> Tensor:
        members = F.one_hot(index, num_groups).T.to(mass.dtype)
        # An empty group starts as the quantizer of all channels.
        members[members.sum(1) == 0] = 1
        return (members.unsqueeze(2) * mass).flatten(1)

    values = quantiles.flatten()
    scale, offset = fit_affine(values, weights_of_groups(), grid)
    for _ in range(iterations):
        errors = channel_errors(quantiles, scale, offset, grid)
        nearest = errors.argmin(0)
        if torch.equal(nearest, index):
            break
        index = nearest
        inhabited = torch.bincount(index, minlength=num_groups) > 0
        fitted = refine_affine(values, weights_of_groups(), grid, scale, offset, refinements=4)
        scale, offset = fitted[0].where(inhabited, scale), fitted[1].where(inhabited, offset)
    if num_groups == 1:
        return scale, offset, channel_errors(quantiles, scale, offset, grid)
    # An empty group is not to ask for larger units.
    scale = scale.clamp(max=scale[torch.bincount(index, minlength=num_groups) > 0].max())
    multiples = to_multiples(scale)
    offset = fit_offset(values, weights_of_groups(), grid, multiples, offset)
    errors = channel_errors(quantiles, multiples, offset, grid)
    nearest = errors.argmin(0, keepdim=True)
    index = in_whole_steps(nearest.squeeze(0), errors * importance).unsqueeze(0)
    # Of a channel that changes its group for that, the two errors change places.
    least = errors.gather(0, nearest)
    errors.scatter_(0, nearest, errors.gather(0, index)).scatter_(0, index, least)
    return scale, offset, errors


@torch.no_grad()
def channel_importance(layers: Sequence[nn.Linear]) -> Tensor:
    """`Σ_o w_oc²` over the outputs o of all `layers`, `(channels,)`: what an error of channel c adds to theirs, squared."""
    return torch.stack([layer.weight.float().square().sum(0) for layer in layers]).sum(0)


def channel_mass(importance: Tensor) -> Tensor:
    """`importance` `(channels,)` as weights of a fit, which must not all be zero."""
    return importance.float().clamp_min(0) + 1e-12


def channel_errors(quantiles: Tensor, scale: Tensor, offset: Tensor, grid: Grid) -> Tensor:
    """Mean squared error of each channel under each quantizer: `(groups, channels)`, from `(channels, quantiles)`."""
    quantiles, scale, offset = quantiles.float(), scale.float().view(-1, 1, 1), offset.float().view(-1, 1, 1)
    codes = grid.nearest((quantiles - offset) / scale)
    return (quantiles - codes * scale - offset).square() @ QUANTILE_WEIGHTS.to(quantiles.device)


def _cluster_ranges(quantiles: Tensor, num_groups: int) -> Tensor:
    """K-means on each channel's low and high percentile: the group of each channel, `(channels,)`, int64."""
    # The outermost kept quantile rests on one or two observed rows; the next ones are steadier.
    ranges = torch.stack([quantiles[:, 1], quantiles[:, -2]], 1).double().cpu()
    with warnings.catch_warnings():
        # Fewer distinct channels than groups leave some groups empty, which the caller provides for.
        warnings.simplefilter("ignore", ConvergenceWarning)
        kmeans = KMeans(num_groups, n_init=4, random_state=0).fit(ranges.numpy())
    centres = torch.from_numpy(kmeans.cluster_centers_)
    # A numbering that does not depend on k-means' random start: by width, then by position.
    order = sorted(range(num_groups), key=lambda g: ((centres[g, 1] - centres[g, 0]).item(), centres[g, 0].item()))
    return torch.cdist(centres[order], ranges).argmin(0).to(quantiles.device)


def in_whole_steps(index: Tensor, losses: Tensor) -> Tensor:
    """Groups of which as many as may be are multiples of `STEP` channels, where that costs next to nothing.

    Kernels take so many channels of a group together, and what a group lacks to a multiple of that is multiplied for
    nothing. So groups of at least so many, beginning with those that are nearest to the next multiple, are filled up with
    channels that others have too much, as long as one loses less by it than `LARGEST_MOVE` of what all lose.

    Args:
        index: `(channels,)` int64, the group of each channel, which is the one where it loses least.
        losses: `(groups, channels)`, what each channel loses in each group.

    Returns:
        `(channels,)`, int64.
    """
    index = index.clone()
    sizes = torch.bincount(index, minlength=len(losses))
    beyond = (sizes % STEP).where(sizes >= STEP, 0)
    filled = beyond.argsort(descending=True, stable=True)[: int(beyond.sum()) // STEP]
    lacks = torch.zeros_like(beyond)
    lacks[filled] = STEP - beyond[filled]
    beyond[filled] = 0
    least = losses.gather(0, index.unsqueeze(0))
    costs, limit = losses - least, LARGEST_MOVE * least.sum()
    for _ in range(int(lacks.sum())):
        allowed = (lacks > 0).unsqueeze(1) & (beyond > 0)[index].unsqueeze(0) & (costs < limit)
        if not allowed.any():
            break
        group, channel = divmod(int(costs.where(allowed, torch.inf).argmin()), costs.shape[1])
        beyond[index[channel]] -= 1
        lacks[group] -= 1
        index[channel] = group
    return index


def initial_assignment_logits(distances: Tensor) -> Tensor:
    """`α = -κ d / mean_g d`, each channel by its own mean distance, κ such that the mean entropy is `INITIAL_ENTROPY` log G.

    Args:
        distances: `(groups, channels)`, what each channel would lose in each group, not negative.

    Returns:
        `(groups, channels)`, float32; the largest of each column belongs to the nearest group.
    """
    groups = distances.shape[0]
    relative = distances / distances.mean(0, keepdim=True).clamp_min(1e-12)
    if groups == 1:
        return torch.zeros_like(relative)
    target = INITIAL_ENTROPY * torch.log(torch.tensor(float(groups))).item()
    low, high = 0.0, 1e4
    for _ in range(60):
        kappa = (low + high) / 2
        log_probabilities = (-kappa * relative).log_softmax(0)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(0).mean().item()
        low, high = (kappa, high) if entropy > target else (low, kappa)
    return -kappa * relative
