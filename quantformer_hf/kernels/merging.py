"""Which products may add up groups as one, and still give the same bits."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .reference import EXACT_FLOAT32


#: Of a weight times a multiple, in a signed byte.
LARGEST_BYTE = 127


def merged_groups(
    group_ends: Sequence[int],
    group_scales: Tensor,
    largest: int,
    largest_weight: int,
    weights: Iterable[Tensor] | None = None,
) -> list[tuple[int, float]] | None:
    """The scale of each group as a whole multiple and a unit, for `Product`; None where groups are to stay apart.

    Neighbours have one unit as long as all weights times multiples are bytes. Each scale times a sum of products, and each
    sum of these, is an integer times the greatest power of two of which all scales are multiples. Below 2^24 floating point
    rounds none of them, so that any way of adding up gives the bits of `reference.multiply`.

    Args:
        group_ends, group_scales: as of `operators.multiply`.
        largest: code of the input.
        largest_weight: magnitude of any integer of the weight.
        weights: those integers, `(some outputs, positions)` each, zero at padding; made and looked at where sums of the
            largest could become too large.
    """
    sizes = [end - start for start, end in zip((0, *group_ends[:-1]), group_ends, strict=True)]
    # The scale of an empty group is for nothing.
    used = [group for group, size in enumerate(sizes) if size]
    scales = group_scales[used].tolist()
    if len(used) < 2 or not all(0 < scale < math.inf for scale in scales):
        return None
    ratios = [scale.as_integer_ratio() for scale in scales]
    denominator = max(of for _, of in ratios)
    wholes = [numerator * (denominator // of) for numerator, of in ratios]
    greatest = math.gcd(*wholes)
    power_of_two = greatest & -greatest
    of_groups = [whole // power_of_two for whole in wholes]
    largest_sum = largest * sum(whole * sizes[group] for whole, group in zip(of_groups, used, strict=True))
    # Where weights of one would be too much, there is no need to look at them.
    if weights is not None and largest_sum < EXACT_FLOAT32 <= largest_sum * largest_weight:
        of_positions = torch.tensor(of_groups).repeat_interleave(torch.tensor([sizes[group] for group in used]))
        # Float64 holds these exactly.
        of_positions = of_positions.to(group_scales.device).double()
        too_large = any(largest * int((rows.abs().double() @ of_positions).max()) >= EXACT_FLOAT32 for rows in weights)
    else:
        too_large = largest_sum * largest_weight >= EXACT_FLOAT32
    if too_large:
        return None
    runs: list[list[int]] = []
    for whole in wholes:
        run = [*runs[-1], whole] if runs else [whole]
        if runs and max(run) // math.gcd(*run) * largest_weight <= LARGEST_BYTE:
            runs[-1] = run
        else:
            runs.append([whole])
    if len(runs) == len(used):
        return None
    units = [math.gcd(*run) for run in runs for _ in run]
    of_used = iter([(whole // unit, unit / denominator) for whole, unit in zip(wholes, units, strict=True)])
    merged, last = [], (1, units[0] / denominator)
    for size in sizes:
        last = next(of_used) if size else (1, last[1])
        merged.append(last)
    return merged
