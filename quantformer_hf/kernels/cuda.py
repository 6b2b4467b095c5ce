"""The operators on CUDA: Triton kernels where triton and the device allow, plain torch with the same bits elsewhere."""

import functools
import importlib
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .checks import reason_against_sums
from .library import switched_off


if TYPE_CHECKING:
    # They call the operators, which are registered with this module.
    from .plans import ChannelPlan, TokenPlan, WeightPlan


#: Of the oldest devices whose tensor cores triton drives with signed bytes.
LEAST_CAPABILITY = (8, 0)
#: What the sums of a group stay within.

logger = logging.getLogger(__name__)


@functools.cache
def triton_kernels() -> ModuleType | None:
    """The module `triton_kernels`, imported when it is first needed; None, with one warning, where it cannot be."""
    try:
        return importlib.import_module(".triton_kernels", __package__)
    except ImportError as error:
        logger.warning(
            "triton cannot be imported (%s), and packed models run in plain torch on CUDA: same results, slower."
            " Install triton",
            error,
        )
        return None


def reason_against(weight: "WeightPlan", channels: "ChannelPlan | TokenPlan", device: torch.device) -> str | None:
    """Why the Triton kernels do not serve a layer, or some tokens of it, on a CUDA device, or None where they do."""
    integers = weight.largest_code, weight.multiplier, weight.addend
    reasons = (reason_against_sums(part.group_ends, part.largest, *integers) for part in channels.parts)
    return reason_against_device(device) or next(filter(None, reasons), None)


@functools.cache
def reason_against_device(device: torch.device) -> str | None:
    """Why no Triton kernel runs on a CUDA device, or None where they do."""
    if triton_kernels() is None:
        return "triton cannot be imported"
    if torch.version.hip is not None:
        return "the Triton kernels were written for NVIDIA's tensor cores only"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"compute capability {capability}: the Triton kernels need {LEAST_CAPABILITY}"
    return None


def quantize(
    x: Tensor,
    offset: Tensor,
    inverse: Tensor,
    source: Tensor | None,
    largest: int,
    gelu: bool = False,
    knee: int | None = None,
) -> Tensor:
    """See `operators.quantize`; GELU is torch's, whose last digits are others."""
    x = F.gelu(x) if gelu else x
    # Float32 holds these exactly; in float64, plain torch would compute in float64.
    taken = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if switched_off() or not taken or reason_against_device(x.device) is not None:
        return reference.quantize(x, offset, inverse, source, largest, knee=knee)
    return triton_kernels().quantize(x, offset, inverse, source, largest, knee)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """See `operators.layer_norm`; it is torch's, one kernel in place of fifty, whose last digits are others."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)


def attention_probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None, operands: Tensor, largest: int, scaling: float
) -> Tensor:
    """See `operators.attention_probabilities`; the softmax is torch's, one kernel in place of sixty.

    The product stays in plain torch: it is one matrix product of integers of at most 8 bits, which TF32 and bfloat16 hold
    too; sums below 2^24 are exact in float32, and `exact_product` takes float64 beyond.
    """
    return reference.attention_scores(query, key, mask, operands, largest, scaling).softmax(-1)


def multiply(
    codes: Tensor,
    weight: Tensor,
    columns: int,
    bits: int,
    largest_code: int,
    multiplier: int,
    addend: int,
    source: Tensor | None,
    group_ends: Sequence[int],
    group_scales: Tensor,
    largest: int,
    scale: Tensor,
    bias: Tensor,
    multiples: Tensor | None = None,
) -> Tensor:
    """See `operators.multiply`; the kernel takes weights that are laid out for it (`laid_out.py`)."""
    served = (
        source is None
        and not switched_off()
        and reason_against_device(codes.device) is None
        # Merged sums are less than 2^24.
        and (
            multiples is not None or reason_against_sums(group_ends, largest, largest_code, multiplier, addend) is None
        )
    )
    integers = largest_code, multiplier, addend
    if served:
        return triton_kernels().multiply(
            codes, weight, bits, *integers, group_ends, group_scales, largest, scale, bias, multiples
        )
    of_groups = group_ends, group_scales, largest, scale, bias, multiples
    return reference.multiply(codes, weight, columns, bits, *integers, source, *of_groups)
