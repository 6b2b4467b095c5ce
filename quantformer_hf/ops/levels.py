"""Where the levels of an unsigned grid lie: all of them a step apart, or from a knee on three.

What GELU puts out piles up at its lower end, and levels do more there than where few values lie. Two ranges, each with a
step size, are those of twin uniform quantization (PTQ4ViT, arXiv 2111.12293). Here the larger step is three of the smaller:
each level is still an integer times one scale, and the nearest one is found without a table.
"""

from torch import Tensor


#: Levels above the knee are so many steps apart.
COARSE_STEP = 3


def last_code(largest: int | Tensor, knee: int | Tensor | None) -> int | Tensor:
    """The number of the level `largest`, counted from zero."""
    return largest if knee is None else knee + (largest - knee) // COARSE_STEP


def nearest_level(position: Tensor, largest: int | Tensor, knee: int | Tensor | None) -> Tensor:
    """The level that is nearest to each position: an integer from 0 to `largest`, in the dtype of `position`.

    One rounding an operation, in the order that all kernels keep to: `reference.quantize` gives the same bits.

    Args:
        position: of any shape, in steps from the lowest level.
        largest: the highest level.
        knee: up to here levels are one step apart, above it `COARSE_STEP`, of which `largest - knee` is a multiple. None:
            all of them are one step apart, as with a knee that is `largest`.
    """
    if knee is None:
        return position.round().clamp_min(0).clamp_max(largest)
    code = position.minimum((position - knee) * (1 / COARSE_STEP) + knee)
    code = code.round().clamp_min(0).clamp_max(last_code(largest, knee))
    return code + (code - knee).clamp_min(0) * (COARSE_STEP - 1)
