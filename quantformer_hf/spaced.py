"""Some of many, evenly spaced, whatever repeats among them."""

import math

import torch
from torch import Tensor


#: Its multiples, whole numbers taken off, fill the unit interval more evenly than those of any other number.
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def spaced_places(count: int) -> Tensor:
    """One place in each of `count` stretches of length 1, `(count,)`, float64 on the CPU, the same on every machine.

    Places at equal distances would fall in with any period that divides their distance: rows of tokens, taken so, may all be
    of the same token of their images, or of the same place in their windows.
    """
    numbers = torch.arange(count, dtype=torch.float64)
    return numbers + (numbers * _GOLDEN_RATIO) % 1


def spaced(total: int, most: int) -> Tensor:
    """At most `most` of the numbers below `total`, in their order, `(numbers,)`, int64 on the CPU."""
    if total <= most:
        return torch.arange(total)
    return (spaced_places(most) * (total / most)).long()
