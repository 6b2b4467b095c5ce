"""The arithmetic of a packed model in plain torch, on any device: what the kernels compute, bit for bit.

Sums of products are sums of integers, which floating point holds exactly below `2^24` (float32) or `2^53` (float64), in
any order. What is not an integer is one rounding an operation, in the order that is written here. So a machine, a number
of threads or a batch size changes no bit, and no activation moves to another level for a last digit.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.levels import nearest_level
from ..packing import unpack_codes


#: Integers up to here are exact in float32.
EXACT_FLOAT32 = 2**24

#: Coefficients, highest power first: of 2^f in `exponential`, and of what GELU's tail is the 16th power of.
EXPONENTIAL_POLYNOMIAL = (1.3276471771e-3, 9.6755413327e-3, 5.5507132742e-2, 2.4022119724e-1, 6.9314696706e-1, 1.0)
ERROR_POLYNOMIAL = (
    *(5.3829750000e-6, 4.8890635643e-5, 3.8003575000e-5, 3.2776263241e-3),
    *(2.1141006150e-2, 4.9867346967e-2, 1.0),
)


def quantize(
    x: Tensor,
    offset: Tensor,
    inverse: Tensor,
    source: Tensor | None,
    largest: int,
    gelu: bool = False,
    knee: int | None = None,
) -> Tensor:
    """See `operators.quantize`."""
    x = gelu_of(x) if gelu else x
    position = ((x - offset) * inverse).nan_to_num(nan=0.0).clamp_min(0)
    codes = nearest_level(position, largest, knee).to(torch.uint8)
    if source is None:
        return codes
    return F.pad(codes, (0, 1)).index_select(-1, source)


def exponential(x: Tensor) -> Tensor:
    """e^x for x <= 0, and 2^-124 for all that is less than that, float32, in the order of `csrc/pointwise.h`."""
    x = x * 1.44269504088896341
    x = torch.where(x > -124.0, x, -124.0)
    n = x.round()
    f = x - n
    p = _polynomial(f, EXPONENTIAL_POLYNOMIAL)
    return p * ((n.int() + 127) << 23).view(torch.float32)


def gelu_of(x: Tensor) -> Tensor:
    """`x Φ(x)`, float32, in the order of `csrc/pointwise.h`."""
    p = _polynomial(x.abs(), ERROR_POLYNOMIAL)
    for _ in range(4):
        p = p * p
    tail = 0.5 * p.reciprocal()
    return x * torch.where(x < 0, tail, 1.0 - tail)


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    p = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        p = p * x + coefficient
    return p


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """See `operators.layer_norm`, in the order of `csrc/pointwise.h`."""
    difference = x - mean(x)
    variance = mean(difference * difference) + epsilon
    # On CPUs torch takes the root by MKL, which does not round it correctly.
    root = variance.double().sqrt().float() if variance.is_cpu else variance.sqrt()
    y = difference * root.reciprocal()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def softmax(x: Tensor) -> Tensor:
    """Over the last dimension, float32, in the order of `csrc/pointwise.h`."""
    powers = exponential(x - x.amax(-1, keepdim=True))
    return powers * _row_sums(powers).reciprocal()


def mean(x: Tensor) -> Tensor:
    """Over the last dimension, which stays, with one element."""
    return _row_sums(x) * (1 / x.shape[-1])


def _row_sums(x: Tensor) -> Tensor:
    """Over the last dimension, which stays, with one element: each of eight lanes adds up by itself, and the lanes then do
    by halves."""
    lanes = F.pad(x, (0, -x.shape[-1] % 8)).unflatten(-1, (-1, 8))
    total = torch.zeros_like(lanes[..., 0, :])
    for part in lanes.unbind(-2):
        total = total + part
    while total.shape[-1] > 1:
        low, high = total.chunk(2, -1)
        total = low + high
    return total


def exact_product(x: Tensor, weight: Tensor, largest: int) -> Tensor:
    """`x @ weightᵀ` of integers, exact before it is rounded to float32.

    Args:
        x: `(..., rows, n)`, integers of any dtype.
        weight: `(..., columns, n)`.
        largest: magnitude of any product of two of their elements.
    """
    wide = torch.float64 if largest * x.shape[-1] > EXACT_FLOAT32 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        return (x.to(wide) @ weight.to(wide).transpose(-2, -1)).float()


def largest_weight(largest_code: int, multiplier: int, addend: int) -> int:
    """Magnitude of any integer `code * multiplier + addend`."""
    return max(abs(addend), abs(largest_code * multiplier + addend))


def weight_integers(
    weight: Tensor, columns: int, bits: int, multiplier: int, addend: int, source: Tensor | None
) -> Tensor:
    """`code * multiplier + addend` of each position, 0 where there is no column, `(outputs, positions)` int16; arguments as
    of `operators.multiply`."""
    integers = unpack_codes(weight, bits, columns).short() * multiplier + addend
    return integers if source is None else F.pad(integers, (0, 1)).index_select(1, source)


def weight_integers_by_rows(weight: Tensor, *arguments, rows: int = 16) -> Iterator[Tensor]:
    """`weight_integers`, with its other arguments, of so many outputs at a time: `(rows, positions)` int16, the last of them
    fewer. A whole weight would take many times its packed size."""
    for some in weight.split(rows):
        yield weight_integers(some, *arguments)


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
    """See `operators.multiply`."""
    integers = weight_integers(weight, columns, bits, multiplier, addend, source)
    largest_product = largest * largest_weight(largest_code, multiplier, addend)
    if multiples is not None:
        # Whatever is summed up stays below 2^24.
        integers, largest_product = integers * multiples, 0
    sums, start = None, 0
    for end, group_scale in zip(group_ends, group_scales, strict=True):
        if end > start:
            part = exact_product(codes[..., start:end], integers[:, start:end], largest_product) * group_scale
            sums = part if sums is None else sums + part
        start = end
    if sums is None:
        sums = scale.new_zeros((*codes.shape[:-1], 1))
    return sums * scale + bias


def attention_probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None, operands: Tensor, largest: int, scaling: float
) -> Tensor:
    """See `operators.attention_probabilities`."""
    return softmax(attention_scores(query, key, mask, operands, largest, scaling))


def attention_scores(
    query: Tensor, key: Tensor, mask: Tensor | None, operands: Tensor, largest: int, scaling: float
) -> Tensor:
    """What the softmax of attention takes, less what is the same for all keys of a query: it does not see that."""
    of_query, of_key = operands
    query, key = _operand(query, of_query, largest), _centred(_operand(key, of_key, largest), largest)
    products = exact_product(query, key, largest * middle(largest)) * (of_query[0] * of_key[0] * scaling)
    scores = products + (key.float().sum(-1) * (of_query[2] * of_key[0] * scaling)).unsqueeze(-2)
    return scores if mask is None else scores + mask


def attention_mix(probabilities: Tensor, value: Tensor, operand: Tensor, largest: int) -> Tensor:
    """See `operators.attention_mix`."""
    zero, inverse = probabilities.new_zeros(()), largest / probabilities.amax(-1, keepdim=True)
    codes = quantize(probabilities, zero, inverse, None, largest)
    value = _centred(_operand(value, operand, largest), largest)
    products = exact_product(codes, value.transpose(-2, -1), largest * middle(largest)) * operand[0]
    # Shares add up to one, so that the value's offset is the output's.
    share = 1 / codes.float().sum(-1, keepdim=True)
    return (products * share + (operand[2] + middle(largest) * operand[0])).transpose(1, 2).contiguous()


def middle(largest: int) -> int:
    """What is taken off the codes of one operand of a product: they are then signed bytes, and its offset is greater by
    so many scales."""
    return (largest + 1) // 2


def _centred(codes: Tensor, largest: int) -> Tensor:
    return codes.short() - middle(largest)


def _operand(x: Tensor, operand: Tensor, largest: int) -> Tensor:
    return quantize(x, operand[2], operand[1], None, largest)
