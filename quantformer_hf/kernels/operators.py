"""The operators of a packed model, as torch custom operators: `torch.compile` and `torch.export` see them whole.

On a CPU they run the compiled kernels (`csrc/`), on CUDA quantization and the linear product those of `triton_kernels.py`,
elsewhere and without these the plain torch of `reference.py`, with the same results bit for bit. `call` runs one of them.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int64, c_uint8

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from . import cuda, reference
from .checks import check_float32, check_product, check_source, check_sums
from .library import AttentionMix, AttentionProbabilities, Codes, LayerNorm, Norm, Product, check, library
from .merging import merged_groups


_LIBRARY = torch.library.Library("quantformer", "DEF")
_LIBRARY.define(
    "quantize(Tensor x, Tensor offset, Tensor inverse, Tensor? source, int largest, bool gelu=False, int? knee=None)"
    " -> Tensor"
)
_LIBRARY.define("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float epsilon) -> Tensor")
_LIBRARY.define(
    "multiply(Tensor codes, Tensor weight, int columns, int bits, int largest_code, int multiplier, int addend,"
    " Tensor? source, int[] group_ends, Tensor group_scales, int largest, Tensor scale, Tensor bias,"
    " Tensor? multiples=None) -> Tensor"
)
_LIBRARY.define(
    "attention_probabilities(Tensor query, Tensor key, Tensor? mask, Tensor operands, int largest, float scaling)"
    " -> Tensor"
)
_LIBRARY.define("attention_mix(Tensor probabilities, Tensor value, Tensor operand, int largest) -> Tensor")


def call(kernel: Callable[..., Tensor], x: Tensor, *arguments) -> Tensor:
    """Run one of the operators below on `x` and the rest of its arguments.

    The dispatcher takes as long as a small product: where nothing listens there, and `x` is on a CPU, it is passed by.
    """
    if nobody_listens(x):
        return kernel(x, *arguments)
    return getattr(torch.ops.quantformer, kernel.__name__)(x, *arguments)


def nobody_listens(x: Tensor) -> bool:
    """Whether the dispatcher would do nothing but call the kernel of the CPU."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and not is_compiling()
        # A kernel would read it without its sign.
        and not x.is_neg()
        and peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
        and not _len_torch_dispatch_stack()
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
    """Codes `clip(round((f(x) - offset) * inverse), 0, largest)`, then in the order of `source`.

    Args:
        x: `(..., channels)`, float32.
        offset, inverse: `(channels,)`, float32; `inverse` is 1 / scale.
        source: `(positions,)`, int32: the channel of each position, `channels` where there is none (code 0).
        largest: at most 255.
        gelu: whether f is GELU, and not the identity.
        knee: above it codes are only every third integer, the nearest of these (`ops/levels.py`); None: all are.

    Returns:
        `(..., positions)`, uint8.
    """
    if library() is None:
        return reference.quantize(x, offset, inverse, source, largest, gelu, knee)
    return run_quantize(prepare_quantize(offset, inverse, source, largest, gelu, knee), x)


def prepare_quantize(
    offset: Tensor, inverse: Tensor, source: Tensor | None, largest: int, gelu: bool, knee: int | None = None
) -> Codes:
    """All of `quantize` but x, for `run_quantize`. It points into these tensors, which the caller keeps."""
    check_float32(offset, inverse)
    channels = offset.numel()
    if inverse.numel() != channels:
        raise ValueError(f"there are {channels} offsets and {inverse.numel()} scales")
    check_source(source, channels)
    at, positions = (0, channels) if source is None else (source.data_ptr(), source.numel())
    knee = largest if knee is None else knee
    return Codes(0, 0, channels, offset.data_ptr(), inverse.data_ptr(), largest, knee, gelu, at, positions, 0, None)


def run_quantize(prepared: Codes, x: Tensor, norm: LayerNorm | None = None) -> Tensor:
    """`quantize`, of what is prepared, and of `layer_norm(x)` where there is a norm."""
    kernels = library()
    x = x.contiguous()
    check_float32(x)
    rows = x.shape[:-1]
    # A copy, since several threads may run what one of them prepared.
    job = Codes.from_buffer_copy(prepared)
    if x.shape[-1] != job.channels:
        raise ValueError(f"there are scales and offsets for {job.channels} channels, and the input has {x.shape[-1]}")
    codes = torch.empty((*rows, job.positions), dtype=torch.uint8, device="cpu")
    job.x, job.rows, job.codes = x.data_ptr(), rows.numel(), codes.data_ptr()
    job.image_rows = x.shape[-2] if job.first_rows else 0
    if norm is not None:
        job.norm = ctypes.pointer(norm)
    check(kernels.quantformer_quantize(ctypes.byref(job), torch.get_num_threads(), kernels.parallel_for))
    return codes


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """`(x - mean) / sqrt(variance + epsilon) * weight + bias` over the channels.

    Args:
        x: `(..., channels)`, float32.
        weight, bias: `(channels,)`, float32.

    Returns:
        `(..., channels)`, float32.
    """
    kernels = library()
    if kernels is None:
        return reference.layer_norm(x, weight, bias, epsilon)
    x = x.contiguous()
    check_float32(x)
    y = torch.empty_like(x)
    norm = prepare_layer_norm(x.shape[-1], weight, bias, epsilon)
    job = Norm(x.data_ptr(), x.shape[:-1].numel(), x.shape[-1], norm, y.data_ptr())
    check(kernels.quantformer_layer_norm(ctypes.byref(job), torch.get_num_threads(), kernels.parallel_for))
    return y


def prepare_layer_norm(channels: int, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> LayerNorm:
    """All of `layer_norm` but x, for `run_quantize`. It points into these tensors, which the caller keeps."""
    given = [tensor for tensor in (weight, bias) if tensor is not None]
    check_float32(*given)
    if any(tensor.numel() != channels for tensor in given):
        raise ValueError(f"LayerNorm has {given[0].numel()} channels, and its input {channels}")
    if not all(tensor.is_contiguous() for tensor in given):
        raise ValueError("weight or bias of a LayerNorm is not in one piece: call .contiguous() on it first")
    return LayerNorm(*(0 if tensor is None else tensor.data_ptr() for tensor in (weight, bias)), epsilon)


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
    """`y_o = scale_o Σ_g s_g Σ_{c∈g} m_c w_oc x_c + bias_o`, the inner sums in integers (design: deployment form).

    Args:
        codes: x, `(..., positions)` uint8, channels in the order of `source`.
        weight: `(outputs, packed_width(columns, bits))` uint8, see `packing`; `w = code * multiplier + addend`.
        columns: of the weight.
        bits: that a code of the weight takes.
        largest_code: of the weight; less than `2^bits - 1` where codes lie in more bits than they need.
        source: `(positions,)` int32, the column of each position, `columns` for padding; None where columns lie in the
            order of the positions (`laid_out.py`).
        group_ends: the position where each group ends, multiples of 4 that rise to `positions`.
        group_scales: s, `(groups,)` float32.
        largest: code of x.
        scale, bias: `(outputs,)` float32.
        multiples: m, `(positions,)` uint8, or None for 1; times a weight at most 127, and sums below 2^24.

    Returns:
        `(..., outputs)`, float32.
    """
    integers = columns, bits, largest_code, multiplier, addend
    arguments = weight, *integers, source, group_ends, group_scales, largest, scale, bias
    # What is laid out for another device is looked at in plain torch.
    if library() is None or source is None or multiples is not None:
        return reference.multiply(codes, *arguments, multiples)
    return run_multiply(prepare_multiply(*arguments, looks_at_weights=False), codes)


def prepare_multiply(
    weight: Tensor,
    columns: int,
    bits: int,
    largest_code: int,
    multiplier: int,
    addend: int,
    source: Tensor,
    group_ends: Sequence[int],
    group_scales: Tensor,
    largest: int,
    scale: Tensor,
    bias: Tensor,
    looks_at_weights: bool = True,
) -> Product:
    """All of `multiply` but the codes, for `run_multiply`. It points into these tensors, which the caller keeps.

    Args:
        looks_at_weights: whether to find out by them if groups may add up as one, where their range leaves that open. What
            is prepared for one call does without, as looking takes longer than that call.
    """
    outputs, positions = weight.shape[0], source.numel()
    check_float32(group_scales, scale, bias)
    check_product(weight, columns, bits, positions, group_ends, group_scales, scale, bias)
    check_source(source, columns)
    check_sums(group_ends, largest, largest_code, multiplier, addend)
    largest_weight = reference.largest_weight(largest_code, multiplier, addend)
    integers = reference.weight_integers_by_rows(weight, columns, bits, multiplier, addend, source)
    weights = integers if looks_at_weights else None
    merged = merged_groups(group_ends, group_scales, largest, largest_weight, weights)
    return Product(
        0,
        0,
        positions,
        largest,
        weight.data_ptr(),
        weight.shape[1],
        outputs,
        columns,
        bits,
        largest_code,
        multiplier,
        addend,
        source.data_ptr(),
        positions,
        (c_int64 * len(group_ends))(*group_ends),
        group_scales.data_ptr(),
        group_scales.numel(),
        merged and (c_uint8 * len(merged))(*(multiple for multiple, _ in merged)),
        merged and (c_float * len(merged))(*(unit for _, unit in merged)),
        scale.data_ptr(),
        bias.data_ptr(),
        0,
        outputs,
    )


def run_multiply(prepared: Product, codes: Tensor) -> Tensor:
    """`multiply`, of what is prepared."""
    kernels = library()
    codes = codes.contiguous()
    rows = codes.shape[:-1]
    # A copy, since several threads may run what one of them prepared.
    job = Product.from_buffer_copy(prepared)
    if codes.shape[-1] != job.positions:
        raise ValueError(f"the codes have {codes.shape[-1]} positions, and the layer {job.positions}")
    y = torch.empty((*rows, job.outputs), dtype=torch.float32, device="cpu")
    job.x, job.rows, job.y = codes.data_ptr(), rows.numel(), y.data_ptr()
    job.image_rows = codes.shape[-2] if job.first_rows else 0
    check(kernels.quantformer_multiply(ctypes.byref(job), torch.get_num_threads(), kernels.parallel_for))
    return y


def attention_probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None, operands: Tensor, largest: int, scaling: float
) -> Tensor:
    """`softmax(Q(query) Q(key)ᵀ * scaling + mask)`.

    Args:
        query, key: `(batch, heads, tokens, head_size)`, float32.
        mask: broadcast to `(batch, heads, queries, keys)`, float32.
        operands: `(2, 3)` float32: scale, 1 / scale and offset of the query, and of the key.
        largest: code of both.

    Returns:
        `(batch, heads, queries, keys)`, float32.
    """
    kernels = library()
    if kernels is None:
        return reference.attention_probabilities(query, key, mask, operands, largest, scaling)
    query, key = rows_of(query), rows_of(key)
    check_float32(query, key, operands)
    batch, heads, queries, head_size = query.shape
    probabilities = query.new_empty((batch, heads, queries, key.shape[2]))
    if mask is not None:
        check_float32(mask)
        mask = rows_of(mask.expand(probabilities.shape))
    job = AttentionProbabilities(
        query=query.data_ptr(),
        key=key.data_ptr(),
        batch=batch,
        heads=heads,
        queries=queries,
        keys=key.shape[2],
        head_size=head_size,
        query_strides=query.stride()[:3],
        key_strides=key.stride()[:3],
        operands=operands.data_ptr(),
        largest=largest,
        scaling=scaling,
        probabilities=probabilities.data_ptr(),
    )
    if mask is not None:
        job.mask, job.mask_strides = mask.data_ptr(), mask.stride()[:3]
    check(kernels.quantformer_probabilities(ctypes.byref(job), torch.get_num_threads(), kernels.parallel_for))
    return probabilities


def attention_mix(probabilities: Tensor, value: Tensor, operand: Tensor, largest: int) -> Tensor:
    """`R(probabilities) Q(value)`, R as `ops.quantize_rows`.

    Args:
        probabilities: `(batch, heads, queries, keys)`, float32, not negative.
        value: `(batch, heads, keys, head_size)`, float32.
        operand: `(3,)` float32: scale, 1 / scale and offset of the value.
        largest: code of both.

    Returns:
        `(batch, queries, heads, head_size)`, float32.
    """
    kernels = library()
    if kernels is None:
        return reference.attention_mix(probabilities, value, operand, largest)
    probabilities, value = probabilities.contiguous(), rows_of(value)
    check_float32(probabilities, value, operand)
    batch, heads, queries, keys = probabilities.shape
    head_size = value.shape[-1]
    output = value.new_empty((batch, queries, heads, head_size))
    job = AttentionMix(
        probabilities=probabilities.data_ptr(),
        value=value.data_ptr(),
        batch=batch,
        heads=heads,
        queries=queries,
        keys=keys,
        head_size=head_size,
        value_strides=value.stride()[:3],
        operand=operand.data_ptr(),
        largest=largest,
        output=output.data_ptr(),
    )
    check(kernels.quantformer_mix(ctypes.byref(job), torch.get_num_threads(), kernels.parallel_for))
    return output


def rows_of(x: Tensor) -> Tensor:
    """`x` with its last dimension in one piece; the others may lie as they do."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _fake_quantize(x, offset, inverse, source, *arguments):
    positions = x.shape[-1] if source is None else source.shape[0]
    return x.new_empty((*x.shape[:-1], positions), dtype=torch.uint8)


def _fake_layer_norm(x, weight, bias, epsilon):
    return torch.empty_like(x)


def _fake_multiply(codes, weight, *arguments):
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=torch.float32)


def _fake_probabilities(query, key, mask, operands, largest, scaling):
    return query.new_empty((*query.shape[:-1], key.shape[-2]))


def _fake_mix(probabilities, value, operand, largest):
    batch, heads, queries, _ = probabilities.shape
    return probabilities.new_empty((batch, queries, heads, value.shape[-1]))


for _kernel, _plain, _fake in (
    (quantize, reference.quantize, _fake_quantize),
    (layer_norm, reference.layer_norm, _fake_layer_norm),
    (multiply, reference.multiply, _fake_multiply),
    (attention_probabilities, reference.attention_probabilities, _fake_probabilities),
    (attention_mix, reference.attention_mix, _fake_mix),
):
    _LIBRARY.impl(_kernel.__name__, _plain, "CompositeExplicitAutograd")
    _LIBRARY.impl(_kernel.__name__, _kernel, "CPU")
    torch.library.register_fake(f"quantformer::{_kernel.__name__}", _fake, lib=_LIBRARY)

_LIBRARY.impl("quantize", cuda.quantize, "CUDA")
_LIBRARY.impl("layer_norm", cuda.layer_norm, "CUDA")
_LIBRARY.impl("multiply", cuda.multiply, "CUDA")
_LIBRARY.impl("attention_probabilities", cuda.attention_probabilities, "CUDA")
