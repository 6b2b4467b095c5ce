"""Some of many, evenly spaced, whatever repeats among them."""

import math


def step_between(total: int, most: int) -> int:
    """The step by which about `most` of `total` are taken, evenly spaced: the least one that shares no factor with `total`.

    Rows of tokens lie image by image, and window by window. With a factor in common, all that is taken may be of the same
    token of its image, or of the same place in its window; without one, all of them come in turn.
    """
    step = max(1, total // most)
    while math.gcd(step, total) > 1:
        step += 1
    return step
