"""Which arithmetic serves each layer of a packed model."""

from torch import nn

from .arithmetic import in_integers
from .library import instruction_set


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
    return f"{describe_device(layer.weight_quantizer.codes.device.type)}, {bits}"


def describe_device(device: str) -> str:
    """The implementation of the operators (`operators.py`) on a kind of device."""
    kernels = instruction_set() if device == "cpu" else None
    return f"kernel ({kernels})" if kernels else "integers in plain torch"
