"""What a kernel of the CPU reads, it reads without looking: refuse tensors that are not what it is told."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..packing import packed_width
from .reference import largest_weight


LARGEST_INT32 = 2**31 - 1


def check_product(weight, columns, bits, positions, group_ends, group_scales, scale, bias) -> None:
    """A kernel reads what it is told is there: raise ValueError where it is not."""
    outputs = len(weight)
    if weight.dtype != torch.uint8 or not weight.is_contiguous() or weight.shape[1] != packed_width(columns, bits):
        raise ValueError(
            f"a weight of {columns} columns and {bits} bits is packed in contiguous rows of {packed_width(columns, bits)}"
            f" bytes, and this one is {tuple(weight.shape)} {weight.dtype}"
        )
    if len(group_ends) != group_scales.numel() or group_ends[-1] != positions:
        raise ValueError(f"{group_scales.numel()} groups end at {list(group_ends)}, of {positions} positions")
    if scale.numel() != outputs or bias.numel() != outputs:
        raise ValueError(f"there are {scale.numel()} scales and {bias.numel()} biases for {outputs} outputs")


def check_source(source: Tensor | None, channels: int) -> None:
    """Raise TypeError or ValueError unless `source` has a channel for each position, or `channels` where there is none."""
    if source is None:
        return
    if source.dtype != torch.int32:
        raise TypeError(f"the order of the channels is {source.dtype}: convert it to torch.int32 first")
    if not source.is_contiguous():
        raise ValueError("the order of the channels is not in one piece: call .contiguous() on it first")
    least, most = (end.item() for end in source.aminmax())
    if least < 0 or most > channels:
        raise ValueError(f"the order of the channels has numbers from {least} to {most}: they are 0 to {channels}")


def reason_against_sums(
    group_ends: Sequence[int], largest: int, largest_code: int, multiplier: int, addend: int
) -> str | None:
    """Why the sums of a group may not fit into the 32 bits in which kernels add up, or None where they do."""
    longest = max(end - start for start, end in zip((0, *group_ends[:-1]), group_ends, strict=True))
    if longest * largest * largest_weight(largest_code, multiplier, addend) > LARGEST_INT32:
        return f"the sums of a group of {longest} channels may not fit into 32 bits"
    return None


def check_sums(group_ends: Sequence[int], largest: int, largest_code: int, multiplier: int, addend: int) -> None:
    """Raise ValueError where they may not."""
    reason = reason_against_sums(group_ends, largest, largest_code, multiplier, addend)
    if reason is not None:
        raise ValueError(f"{reason}: quantize the layer to fewer bits, or leave it in floating point (32)")


def check_float32(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != torch.float32:
            raise TypeError(f"a kernel was given {tensor.dtype}: convert it to torch.float32 first")
        if not tensor.is_cpu:
            raise ValueError(f"a kernel of the CPU was given a tensor on {tensor.device}: move the model to one device")
