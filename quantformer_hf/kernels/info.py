"""Which arithmetic serves each layer of a packed model."""

import torch
from torch import nn

from . import cuda
from .arithmetic import in_integers
from .library import instruction_set, switched_off


def describe_layer(layer: nn.Module, reads: nn.Module | None) -> str:
    """What runs when a packed linear or convolution is called, in words.

    Args:
        layer: a `PackedLinear` or `PackedConv2d`.
        reads: the quantizer of its input, or None.
    """
    bits = f"W{layer.weight_quantizer.grid.bits}"
    if reads is None:
        return f"floating point, {bits}: its input is not quantized, and the weight is made from codes at each call"
    bits += f"A{reads.grid.bits}"
    if not layer.can_infer():
        return f"floating point, {bits}: {'a convolution whose windows overlap' if in_integers() else 'asked for'}"
    device = layer.weight_quantizer.codes.device
    if device.type != "cuda" or switched_off():
        return f"{describe_device(device)}, {bits}"
    reason = cuda.reason_against(layer.weight_quantizer.plan(), layer.channel_plan(), device)
    return f"kernel (Triton), {bits}" if reason is None else f"integers in plain torch, {bits}: {reason}"


def describe_device(device: torch.device) -> str:
    """What runs the products of attention on a device, and those of layers on a CPU."""
    kernels = instruction_set() if device.type == "cpu" else None
    return f"kernel ({kernels})" if kernels else "integers in plain torch"
