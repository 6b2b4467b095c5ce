"""What a kernel of the CPU reads, it reads without looking: refuse tensors that are not what it is told."""

import torch
from torch import Tensor

from ..packing import packed_width


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


def check_float32(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != torch.float32:
            raise TypeError(f"a kernel was given {tensor.dtype}: convert it to torch.float32 first")
        if not tensor.is_cpu:
            raise ValueError(f"a kernel of the CPU was given a tensor on {tensor.device}: move the model to one device")
