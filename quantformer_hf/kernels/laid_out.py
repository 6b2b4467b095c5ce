"""Weights once more, as the kernels of a GPU take them.

Files have the columns of a weight in the order of the layer's inputs, in as many bits as they need. A GPU reads neighbours
together: here columns lie in the order of the input's codes, in 2, 4 or 8 bits, none across two bytes, and rows are
aligned. And groups whose scales are multiples of a unit are one run of positions, so that their sums need not become
floating point one by one.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import pack_codes, packed_width, unpack_codes
from .merging import merged_groups
from .reference import largest_weight, weight_integers_by_rows


if TYPE_CHECKING:
    from .plans import ChannelPlan, WeightPlan


#: What a code takes, the least that holds it.
LAID_OUT_BITS = (2, 4, 8)
#: Bytes of a row are a multiple of this: what a GPU reads by one instruction, where it is aligned.
ALIGNMENT = 16


def row_width(positions: int, bits: int) -> int:
    """Bytes of a row of the weight."""
    width = packed_width(positions, bits)
    return width + -width % ALIGNMENT


def lay_out(weight: "WeightPlan", packed: Tensor, source: Tensor) -> tuple["WeightPlan", Tensor]:
    """The weight whose columns are the positions of `source`, `(positions,)` int32; where that is padding, code 0."""
    codes = F.pad(unpack_codes(packed, weight.bits, weight.columns), (0, 1)).index_select(1, source)
    bits = next(width for width in LAID_OUT_BITS if width >= weight.bits)
    rows = pack_codes(codes, bits)
    rows = F.pad(rows, (0, row_width(codes.shape[1], bits) - rows.shape[1]))
    return dataclasses.replace(weight, columns=codes.shape[1], bits=bits), rows


def merge_runs(
    channels: "ChannelPlan", weight: "WeightPlan", rows: Tensor
) -> tuple[tuple[int, ...], Tensor, Tensor | None]:
    """Ends and scales of runs of groups that add up as one, and the multiple of each position, `(positions,)` uint8;
    those of the groups, and None, where they are to stay apart. See `operators.multiply`."""
    ends, scales = channels.group_ends, channels.group_scales
    largest = largest_weight(weight.largest_code, weight.multiplier, weight.addend)

    integers = weight_integers_by_rows(rows, weight.columns, weight.bits, weight.multiplier, weight.addend, None)
    without_padding = (some * (channels.source < channels.channels) for some in integers)
    merged = merged_groups(ends, scales, channels.largest, largest, without_padding)
    if merged is None:
        return ends, scales, None
    run_ends: list[int] = []
    units: list[float] = []
    multiples: list[int] = []
    for end, (multiple, unit) in zip(ends, merged, strict=True):
        multiples += [multiple] * (end - len(multiples))
        if units and units[-1] == unit:
            run_ends[-1] = end
        else:
            run_ends.append(end)
            units.append(unit)
    device = scales.device
    return tuple(run_ends), scales.new_tensor(units), torch.tensor(multiples, dtype=torch.uint8, device=device)
