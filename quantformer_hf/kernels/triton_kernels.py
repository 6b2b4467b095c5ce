"""The operators on CUDA as Triton kernels: integer tensor cores, weights that stay packed in memory.

Bit for bit what `reference.py` computes. Sums over a run (a group, or several that add up as one, `merging.py`) are int32,
hence exact; they become float32 by one rounding, and each further operation is one rounding in the order written there:
`enable_fp_fusion=False` keeps the compiler from contracting a product and a sum into one.

`tl.dot` multiplies signed bytes, and not all operands are such. Activations up to 255 are shifted: `u = x - 128`, and
`Σ x v = Σ u v + 128 Σ v`. Weights beyond a byte (8 bits on the half-shifted grid: odd integers up to ±255) are split:
`w = factor v + rest`, and `Σ x w = factor Σ x v + rest Σ x`. Both corrections are sums of integers made beside the product.

Importing this module imports triton: `cuda.py` does it when the first CUDA tensor comes. With `TRITON_INTERPRET=1` the
kernels run on CPU tensors.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.levels import COARSE_STEP, last_code
from .laid_out import LAID_OUT_BITS, row_width
from .plans import STEP


#: Outputs of a block of the product; its rows follow the input's number of rows.
BLOCK_OUTPUTS = 64
MOST_BLOCK_ROWS = 128
#: The least that `tl.dot` takes of rows, and of bytes to sum over.
LEAST_BLOCK_ROWS = 16
LEAST_BLOCK_POSITIONS = 32
#: Rows and positions of a block of `quantize`.
CODES_BLOCK = (4, 256)


@triton.jit
def quantize_kernel(
    x,
    offset,
    inverse,
    source,
    codes,
    rows,
    channels,
    positions,
    last,
    knee,
    TWIN: tl.constexpr,
    STEP: tl.constexpr,
    IN_ORDER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """Codes of a block of rows and positions. `last` is the number of the highest level, with TWIN those above `knee` are
    STEP apart (both float32); without IN_ORDER `source` gives the channels."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    position = tl.program_id(1) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    inside = (row < rows)[:, None] & (position < positions)[None, :]
    channel = position if IN_ORDER else tl.load(source + position, mask=position < positions, other=channels)
    real = (channel >= 0) & (channel < channels)
    shift = tl.load(offset + channel, mask=real, other=0.0)
    factor = tl.load(inverse + channel, mask=real, other=0.0)
    values = tl.load(x + row[:, None] * channels + channel[None, :], mask=inside & real[None, :], other=0.0)
    level = (values.to(tl.float32) - shift[None, :]) * factor[None, :]
    # Only a NaN differs from itself. Padding too is code 0, whatever its offset.
    level = tl.where((level == level) & real[None, :], level, 0.0)
    level = tl.maximum(level, 0.0)
    if TWIN:
        level = tl.minimum(level, (level - knee) * (1 / STEP) + knee)
    level = tl.minimum(level, last)
    # Neighbours of 2^23 are 1 apart: the sum rounds to the nearest integer, ties to even, as torch.round does.
    level = (level + 8388608.0) - 8388608.0
    if TWIN:
        level = level + tl.maximum(level - knee, 0.0) * (STEP - 1)
    tl.store(codes + row[:, None] * positions + position[None, :], level.to(tl.int32).to(tl.uint8), mask=inside)


@triton.jit
def unpack(packed, BITS: tl.constexpr):
    """Codes of 2, 4 or 8 bits, `(outputs, positions)`, from the bytes of rows, see `packing` for the layout."""
    if BITS == 2:
        even = tl.interleave(packed & 3, (packed >> 4) & 3)
        odd = tl.interleave((packed >> 2) & 3, packed >> 6)
        codes = tl.interleave(even, odd)
    elif BITS == 4:
        codes = tl.interleave(packed & 15, packed >> 4)
    else:
        codes = packed
    return codes


@triton.jit
def multiply_kernel(
    x,
    packed,
    multiples,
    spans,
    run_scales,
    scale,
    bias,
    y,
    rows,
    positions,
    outputs,
    width,
    count,
    multiplier,
    addend,
    factor,
    rest,
    BITS: tl.constexpr,
    MERGED: tl.constexpr,
    SHIFTED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """A block of `y`, see `operators.multiply`.

    Args:
        multiples: read where MERGED.
        spans: `(count, 3)` int32: start, end and number of each run that has positions.
        multiplier, addend: `v = code * multiplier + addend`, a signed byte, also times any multiple.
        factor, rest: `w = factor v + rest`, where SPLIT; else `w = v`.
        SHIFTED: codes of x may be above 127.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    output = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    row_inside, output_inside = row < rows, output < outputs
    x_rows = x + row[:, None] * positions
    packed_rows = packed + output.to(tl.int64)[:, None] * width

    # x + -0.0 is x, -0.0 too: the first run's part enters unchanged, as it does in the reference.
    sums = tl.full((BLOCK_ROWS, BLOCK_OUTPUTS), -0.0, tl.float32)
    for index in range(count):
        start = tl.load(spans + 3 * index)
        end = tl.load(spans + 3 * index + 1)
        run_scale = tl.load(run_scales + tl.load(spans + 3 * index + 2))
        products = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.int32)
        sum_of_v = tl.zeros((BLOCK_OUTPUTS,), tl.int32)
        sum_of_x = tl.zeros((BLOCK_ROWS,), tl.int32)
        # From a whole step, so that what is read is aligned: neighbours are then read by one instruction.
        for first in range(start // BLOCK_POSITIONS * BLOCK_POSITIONS, end, BLOCK_POSITIONS):
            position = first + tl.arange(0, BLOCK_POSITIONS)
            reads = position < positions
            codes = tl.load(x_rows + position[None, :], mask=row_inside[:, None] & reads[None, :], other=0)
            byte = first * BITS // 8 + tl.arange(0, BLOCK_POSITIONS * BITS // 8)
            inside = output_inside[:, None] & (byte < width)[None, :]
            v = unpack(tl.load(packed_rows + byte[None, :], mask=inside, other=0), BITS).to(tl.int32)
            v = v * multiplier + addend
            if MERGED:
                v *= tl.load(multiples + position, mask=reads, other=0).to(tl.int32)[None, :]
            # What is of other runs counts as 0.
            of_run = ((position >= start) & (position < end))[None, :]
            v = tl.where(of_run, v, 0).to(tl.int8)
            if SHIFTED:
                # x - 128 in eight bits is x with its highest bit turned over.
                operand = (codes ^ 128).to(tl.int8, bitcast=True)
                sum_of_v += tl.sum(v.to(tl.int32), axis=1)
            else:
                operand = codes.to(tl.int8, bitcast=True)
            if SPLIT:
                sum_of_x += tl.sum(tl.where(of_run, codes, 0).to(tl.int32), axis=1)
            products = tl.dot(operand, tl.trans(v), products, out_dtype=tl.int32)
        if SHIFTED:
            products += 128 * sum_of_v[None, :]
        if SPLIT:
            products = products * factor + rest * sum_of_x[:, None]
        sums += products.to(tl.float32) * run_scale

    scales = tl.load(scale + output, mask=output_inside, other=0.0)
    biases = tl.load(bias + output, mask=output_inside, other=0.0)
    result = sums * scales[None, :] + biases[None, :]
    y_places = y + row[:, None] * outputs + output[None, :]
    tl.store(y_places, result, mask=row_inside[:, None] & output_inside[None, :])


def quantize(
    x: Tensor, offset: Tensor, inverse: Tensor, source: Tensor | None, largest: int, knee: int | None = None
) -> Tensor:
    """See `operators.quantize`; x may also be float16 or bfloat16, which float32 holds exactly."""
    channels = x.shape[-1]
    positions = channels if source is None else source.numel()
    of_channels = {"offset": (offset, [channels]), "inverse": (inverse, [channels])}
    _check_tensors(x.device, torch.float32, of_channels)
    if source is not None:
        _check_tensors(x.device, torch.int32, {"source": (source, [positions])})
        source = source.contiguous()
    x, offset, inverse = x.contiguous(), offset.contiguous(), inverse.contiguous()
    codes = torch.empty((*x.shape[:-1], positions), dtype=torch.uint8, device=x.device)
    if codes.numel() == 0:
        return codes
    rows = codes.numel() // positions
    block_rows, block_positions = CODES_BLOCK
    with torch.cuda.device_of(x):
        quantize_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(positions, block_positions))](
            x,
            offset,
            inverse,
            source,
            codes,
            rows,
            channels,
            positions,
            float(last_code(largest, knee)),
            float(largest if knee is None else knee),
            TWIN=knee is not None,
            STEP=COARSE_STEP,
            IN_ORDER=source is None,
            BLOCK_ROWS=block_rows,
            BLOCK_POSITIONS=block_positions,
            enable_fp_fusion=False,
        )
    return codes


def multiply(
    codes: Tensor,
    weight: Tensor,
    bits: int,
    largest_code: int,
    multiplier: int,
    addend: int,
    run_ends: Sequence[int],
    run_scales: Tensor,
    largest: int,
    scale: Tensor,
    bias: Tensor,
    multiples: Tensor | None,
) -> Tensor:
    """See `operators.multiply`, of a weight that is laid out (`laid_out.py`).

    The sums of a run must fit into int32: `cuda.reason_against` tells.

    Raises:
        TypeError, ValueError: a tensor of another dtype, size or device than the kernel reads.
    """
    outputs, positions = weight.shape[0], codes.shape[-1]
    device = codes.device
    vectors = {"scale": (scale, [outputs]), "bias": (bias, [outputs]), "group_scales": (run_scales, [len(run_ends)])}
    bytes_of = {"codes": (codes, codes.shape), "weight": (weight, (outputs, row_width(positions, bits)))}
    if multiples is not None:
        bytes_of["multiples"] = (multiples, [positions])
        multiples = multiples.contiguous()
    _check_tensors(device, torch.float32, vectors)
    _check_tensors(device, torch.uint8, bytes_of)
    if bits not in LAID_OUT_BITS:
        raise ValueError(f"the codes of the weight have {bits} bits, and the kernel takes one of {LAID_OUT_BITS}")
    codes, weight = codes.contiguous(), weight.contiguous()
    run_scales, scale, bias = run_scales.contiguous(), scale.contiguous(), bias.contiguous()
    y = torch.empty((*codes.shape[:-1], outputs), dtype=torch.float32, device=device)
    if y.numel() == 0:
        return y
    rows = y.numel() // outputs
    spans = _spans(tuple(run_ends), positions, device)
    smallest, greatest = sorted((addend, addend + largest_code * multiplier))
    split = smallest < -128 or greatest > 127
    # Split, the byte v is the code less 128.
    of_byte, of_weight = (multiplier, addend), (1, 0)
    if split:
        of_byte, of_weight = (1, -128), (multiplier, addend + 128 * multiplier)
    block_rows = min(max(triton.next_power_of_2(rows), LEAST_BLOCK_ROWS), MOST_BLOCK_ROWS)
    # With four warps, the two accumulators of a larger block leave too few registers, and the compiler spills.
    warps = 4 if block_rows < 64 else 8
    # Longer steps where runs are long; short ones waste less at the end of each run.
    block_positions = LEAST_BLOCK_POSITIONS * (2 if positions >= 4 * LEAST_BLOCK_POSITIONS * len(spans) else 1)
    with torch.cuda.device_of(codes):
        multiply_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(outputs, BLOCK_OUTPUTS))](
            codes,
            weight,
            multiples,
            spans,
            run_scales,
            scale,
            bias,
            y,
            rows,
            positions,
            outputs,
            weight.shape[1],
            len(spans),
            *of_byte,
            *of_weight,
            BITS=bits,
            MERGED=multiples is not None,
            SHIFTED=largest > 127,
            SPLIT=split,
            BLOCK_ROWS=block_rows,
            BLOCK_OUTPUTS=BLOCK_OUTPUTS,
            BLOCK_POSITIONS=block_positions,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return y


@functools.lru_cache(maxsize=1024)
def _spans(run_ends: tuple[int, ...], positions: int, device: torch.device) -> Tensor:
    """`(runs that have positions, 3)` int32. Remembered: copying it to the device would wait for the device."""
    starts = (0, *run_ends[:-1])
    rises = all(start <= end for start, end in zip(starts, run_ends, strict=True))
    if run_ends[-1] != positions or not rises or any(end % STEP for end in run_ends):
        raise ValueError(f"the runs end at {run_ends}: they should rise to {positions} in multiples of {STEP}")
    spans = [(start, end, i) for i, (start, end) in enumerate(zip(starts, run_ends, strict=True)) if end > start]
    return torch.tensor(spans, dtype=torch.int32, device=device)


def _check_tensors(device: torch.device, dtype: torch.dtype, tensors: dict[str, tuple[Tensor, Sequence[int]]]) -> None:
    """Each of `tensors` against the shape that a kernel is about to read: it would read beyond a smaller one."""
    for name, (tensor, shape) in tensors.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}, and the kernel takes {dtype}: convert it first")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, and the input on {device}: move the model or the input")
        if tensor.shape != tuple(shape):
            raise ValueError(f"{name} is of shape {tuple(tensor.shape)}, and the layer needs {tuple(shape)}")
