"""From the ranges of the channels to groups of channels."""

import warnings

import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor


#: Share of the groups' maximum entropy that the first assignment has: certain enough to start near the k-means
#: solution, and open enough for a gradient to move a channel.
INITIAL_ENTROPY = 0.2


def cluster_channels(quantiles: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """K-means on each channel's low and high percentile.

    Args:
        quantiles: `(channels, quantiles)`, ascending along the second dimension.
        num_groups: G, at most `channels`.

    Returns:
        group of each channel `(channels,)`, int64, where identical channels may leave a group empty; squared distances
        to the groups' centres `(num_groups, channels)`, float32.
    """
    # The outermost kept quantile rests on one or two observed rows; the next ones are steadier.
    ranges = torch.stack([quantiles[:, 1], quantiles[:, -2]], 1).double().cpu()
    with warnings.catch_warnings():
        # Fewer distinct channels than groups leave some groups empty, which the caller provides for.
        warnings.simplefilter("ignore", ConvergenceWarning)
        kmeans = KMeans(num_groups, n_init=4, random_state=0).fit(ranges.numpy())
    centres = torch.from_numpy(kmeans.cluster_centers_)
    # A numbering that does not depend on k-means' random start: by width, then by position.
    order = sorted(range(num_groups), key=lambda g: ((centres[g, 1] - centres[g, 0]).item(), centres[g, 0].item()))
    centres = centres[order]
    distances = torch.cdist(centres, ranges).square()
    index = distances.argmin(0)
    return index.to(quantiles.device), distances.float().to(quantiles.device)


def initial_assignment_logits(distances: Tensor) -> Tensor:
    """`α = -κ d / mean_g d`, each channel by its own mean distance, κ such that the mean entropy is `INITIAL_ENTROPY` log G.

    Args:
        distances: `(groups, channels)`, squared distances of the channels to the groups' centres.

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
