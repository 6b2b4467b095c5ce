"""The operators of a packed model in standard operators of ONNX, with the roundings of `kernels/reference.py`.

What `torch.onnx` is to put in the place of each (`TRANSLATIONS`). Codes are floats here, all of them integers that floats
hold. An engine that runs the operators as they stand gives the logits of the packed model bit for bit; ONNX Runtime does,
whatever its level of optimization, and OpenVINO does in float32. Forms that look simpler are not exact in one of them (1.32
and 2026.4, measured 2026-11-28 and 2026-11-30):

- `1 / x`, with which ONNX Runtime turns `y * (1 / x)` into `y / x`. Here it is `0.5 / x * 2`, which rounds like it.
- A product of integers in floats, and then its scale, which ONNX Runtime multiplies into each part of a long sum. Here
  sums are made int32 first.
- A sum of products in float64, which in OpenVINO is not exact. Here long sums have parts that floats hold.
- Operations with constants one after the other, which OpenVINO makes one: `(y + b) - β` becomes `y + (b - β)`, `(x - β) i`
  becomes `x i - β i`, and `(y s) t` becomes `y (s t)`. Here stands between them what changes no finite number (`_kept`).
- `y s + b` with constants, which OpenVINO rounds once, by a fused instruction. It does not where b comes first.
- BitShift of bytes, whose results are off by one in OpenVINO. Here the file has a weight's codes unpacked
  (`onnx.lay_out_codes`).
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import FLOAT
from onnxscript import opset21 as op

from ..kernels.reference import ERROR_POLYNOMIAL, EXACT_FLOAT32, EXPONENTIAL_POLYNOMIAL, largest_weight, middle
from ..ops.levels import COARSE_STEP, last_code


#: A value of the graph, to `torch.onnx`, which reads these annotations and has no word for one of any type.
Value = TypeVar("Value", bound=FLOAT)


def quantize(
    x: Value,
    offset: Value,
    inverse: Value,
    source: Value | None,
    largest: int,
    gelu: bool = False,
    knee: int | None = None,
) -> Value:
    """As `reference.quantize`, of finite x."""
    x = gelu_of(x) if gelu else x
    position = op.Mul(_kept(op.Sub(_kept(x), offset)), inverse)
    if knee is not None:
        beyond = op.Mul(_kept(op.Sub(_kept(position), _floats(knee))), _floats(1 / COARSE_STEP))
        position = op.Min(position, op.Add(_floats(knee), _kept(beyond)))
    codes = op.Round(op.Clip(position, _floats(0), _floats(last_code(largest, knee))))
    if knee is not None:
        coarse = op.Clip(op.Sub(codes, _floats(knee)), _floats(0))
        codes = op.Add(codes, op.Mul(coarse, _floats(COARSE_STEP - 1)))
    if source is None:
        return codes
    return op.Gather(op.Pad(codes, _integers([0, 1]), None, _integers([-1])), source, axis=-1)


def layer_norm(x: Value, weight: Value | None, bias: Value | None, epsilon: float) -> Value:
    """As `reference.layer_norm`."""
    channels = x.shape[-1]
    share = _floats(1 / channels)
    difference = op.Sub(x, op.Mul(_row_sums(x, channels), share))
    variance = op.Mul(_row_sums(op.Mul(difference, difference), channels), share)
    variance = op.Cast(op.Add(variance, _floats(epsilon)), to=ir.DataType.DOUBLE)
    y = op.Mul(difference, _inverse(op.Cast(op.Sqrt(variance), to=ir.DataType.FLOAT)))
    y = y if weight is None else op.Mul(y, weight)
    return y if bias is None else op.Add(bias, y)


def multiply(
    codes: Value,
    weight: Value,
    columns: int,
    bits: int,
    largest_code: int,
    multiplier: int,
    addend: int,
    source: Value,
    group_ends: Sequence[int],
    group_scales: Value,
    largest: int,
    scale: Value,
    bias: Value,
) -> Value:
    """As `reference.multiply`, of the weight's codes unpacked and in the order of the input's: `(positions, outputs)`."""
    integers = op.Cast(weight, to=ir.DataType.FLOAT)
    integers = op.Add(integers if multiplier == 1 else op.Mul(integers, _floats(multiplier)), _floats(addend))
    largest_product = largest * largest_weight(largest_code, multiplier, addend)
    sums, start = None, 0
    for group, end in enumerate(group_ends):
        if end > start:
            operands = _part(codes, start, end, -1), _part(integers, start, end, 0)
            part = _exact_product(*operands, end - start, largest_product)
            part = op.Mul(part, _part(group_scales, group, group + 1, 0))
            sums = part if sums is None else op.Add(sums, part)
        start = end
    return op.Add(bias, op.Mul(_kept(sums), scale))


def attention_probabilities(
    query: Value, key: Value, mask: Value | None, operands: Value, largest: int, scaling: float
) -> Value:
    """As `reference.attention_probabilities`."""
    (query_scale, query_inverse, query_offset), (key_scale, key_inverse, key_offset) = _operands(operands)
    width, keys = query.shape[-1], key.shape[-2]
    query = quantize(query, query_offset, query_inverse, None, largest)
    key = op.Sub(quantize(key, key_offset, key_inverse, None, largest), _floats(middle(largest)))
    products = _exact_product(query, op.Transpose(key, perm=[0, 1, 3, 2]), width, largest * middle(largest))
    products = op.Mul(products, op.Mul(op.Mul(query_scale, key_scale), _floats(scaling)))
    of_keys = op.Mul(op.Mul(query_offset, key_scale), _floats(scaling))
    of_keys = op.Mul(op.ReduceSum(key, _integers([-1]), keepdims=0), of_keys)
    scores = op.Add(products, op.Unsqueeze(of_keys, _integers([-2])))
    return _softmax(scores if mask is None else op.Add(scores, mask), keys)


def attention_mix(probabilities: Value, value: Value, operand: Value, largest: int) -> Value:
    """As `reference.attention_mix`."""
    scale, inverse, offset = (op.Gather(operand, _integers(i)) for i in range(3))
    of_rows = op.Div(_floats(largest), op.ReduceMax(probabilities, _integers([-1]), keepdims=1))
    codes = quantize(probabilities, _floats(0), of_rows, None, largest)
    keys = value.shape[-2]
    value = op.Sub(quantize(value, offset, inverse, None, largest), _floats(middle(largest)))
    products = op.Mul(_exact_product(codes, value, keys, largest * middle(largest)), scale)
    share = _inverse(op.ReduceSum(codes, _integers([-1]), keepdims=1))
    offset = op.Add(offset, op.Mul(_floats(middle(largest)), scale))
    return op.Transpose(op.Add(offset, op.Mul(products, share)), perm=[0, 2, 1, 3])


#: For `torch.onnx.export`.
TRANSLATIONS: dict[Callable, Callable] = {
    torch.ops.quantformer.quantize.default: quantize,
    torch.ops.quantformer.layer_norm.default: layer_norm,
    torch.ops.quantformer.multiply.default: multiply,
    torch.ops.quantformer.attention_probabilities.default: attention_probabilities,
    torch.ops.quantformer.attention_mix.default: attention_mix,
}


def exponential(x: Value) -> Value:
    """As `reference.exponential`."""
    x = op.Mul(x, _floats(math.log2(math.e)))
    # Max would let NaN through, for which there is no power.
    x = op.Where(op.Greater(x, _floats(-124)), x, _floats(-124))
    n = op.Round(x)
    power = op.Gather(_floats(2.0 ** np.arange(-124, 1)), op.Cast(op.Add(n, _floats(124)), to=ir.DataType.INT64))
    return op.Mul(_polynomial(op.Sub(x, n), EXPONENTIAL_POLYNOMIAL), power)


def gelu_of(x: Value) -> Value:
    """As `reference.gelu_of`."""
    p = _polynomial(op.Abs(x), ERROR_POLYNOMIAL)
    for _ in range(4):
        p = op.Mul(p, p)
    tail = op.Div(_floats(0.5), p)
    return op.Mul(x, op.Where(op.Less(x, _floats(0)), tail, op.Sub(_floats(1), tail)))


def _softmax(x: Value, width: int) -> Value:
    powers = exponential(op.Sub(x, op.ReduceMax(x, _integers([-1]), keepdims=1)))
    return op.Mul(powers, _inverse(_row_sums(powers, width)))


def _polynomial(x: Value, coefficients: Sequence[float]) -> Value:
    p = _floats(coefficients[0])
    for coefficient in coefficients[1:]:
        p = op.Add(op.Mul(p, x), _floats(coefficient))
    return p


def _inverse(x: Value) -> Value:
    return op.Mul(op.Div(_floats(0.5), x), _floats(2))


def _row_sums(x: Value, width: int) -> Value:
    """As `reference.mean` adds up, of rows of `width`."""
    if width % 8:
        x = op.Pad(x, _integers([0, -width % 8]), None, _integers([-1]))
    lanes = -(-width // 8)
    total, *others = op.Split(x, axis=-1, num_outputs=lanes) if lanes > 1 else [x]
    for part in others:
        total = op.Add(total, part)
    for _ in range(3):
        total = op.Add(*op.Split(total, axis=-1, num_outputs=2))
    return total


def _exact_product(x: Value, weight: Value, width: int, largest: int) -> Value:
    """`x @ weight` of integers, exact before it is rounded to float32.

    Args:
        x: `(..., rows, width)`.
        weight: `(..., width, columns)`.
        largest: magnitude of any product of two of their elements.
    """
    exact = EXACT_FLOAT32 // largest
    total = None
    for start in range(0, width, exact):
        end = min(start + exact, width)
        whole = (start, end) == (0, width)
        operands = (x, weight) if whole else (_part(x, start, end, -1), _part(weight, start, end, -2))
        part = op.Cast(op.MatMul(*operands), to=ir.DataType.INT32)
        total = part if total is None else op.Add(total, part)
    return op.Cast(total, to=ir.DataType.FLOAT)


def _operands(operands: Value) -> list[list[Value]]:
    """Scale, its inverse and offset of both."""
    return [[op.Gather(op.Gather(operands, _integers(row)), _integers(i)) for i in range(3)] for row in range(2)]


def _kept(x: Value) -> Value:
    """Finite `x`, where OpenVINO would merge what makes it with what reads it."""
    greatest = np.finfo(np.float32).max
    return op.Clip(x, _floats(-greatest), _floats(greatest))


def _part(x: Value, start: int, end: int, axis: int) -> Value:
    return op.Slice(x, _integers([start]), _integers([end]), _integers([axis]))


def _floats(value: float | np.ndarray) -> Value:
    return op.Constant(value=ir.tensor(np.asarray(value, np.float32)))


def _integers(value: int | Sequence[int]) -> Value:
    return op.Constant(value=ir.tensor(np.asarray(value, np.int64)))
