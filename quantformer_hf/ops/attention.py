"""Attention whose four operands are fake-quantized: q, k and v with one scale and offset each, probabilities row by row."""

import torch
from torch import Tensor

from .activation import _forward, _tensor_backward
from .compiling import compiled
from .scales import positive, positive_backward


@compiled
def quantize_rows(rows: Tensor, qmax: int) -> Tensor:
    """`c / Σ c` with `c = round(x * (qmax / max x))`: each row in units of its own largest value, and with the sum 1.

    Of probabilities that is `exp(s - max s)`, what the softmax has before it divides (as in SageAttention, arXiv 2410.02367,
    section 4.3): from 0 to 1 in every row, so that nothing is to be calibrated, and a query that looks everywhere has as
    many levels as one that looks at a single token. Divided by the sum of the levels, and not by that of the powers, what is
    rounded to zero moves no mean.

    Args:
        rows: not negative, `(..., keys)`.
        qmax: the largest level.
    """
    x = rows.to(torch.promote_types(rows.dtype, torch.float32))
    codes = (x * (qmax / x.amax(-1, keepdim=True))).round()
    return (codes / codes.sum(-1, keepdim=True)).to(rows.dtype)


class _QuantizedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, keep, scaling, qmax, *scales_and_offsets):
        scales, offsets = scales_and_offsets[:3], scales_and_offsets[3:]
        scores = torch.matmul(
            _quantize(query, scales[0], offsets[0], qmax) * scaling,
            _quantize(key, scales[1], offsets[1], qmax).transpose(-2, -1),
        )
        if mask is not None:
            scores = scores + mask
        probabilities = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        output = torch.matmul(_weights(probabilities, keep, qmax), _quantize(value, scales[2], offsets[2], qmax))
        ctx.save_for_backward(query, key, value, mask, keep, probabilities, *scales_and_offsets)
        ctx.arguments = scaling, qmax
        ctx.set_materialize_grads(False)
        return output, probabilities

    @staticmethod
    def backward(ctx, grad_output, grad_probabilities):
        scaling, qmax = ctx.arguments
        query, key, value, mask, keep, probabilities, *scales_and_offsets = ctx.saved_tensors
        scales, offsets = scales_and_offsets[:3], scales_and_offsets[3:]
        if grad_output is None:
            grad_output = torch.zeros_like(query)

        grad_value = torch.matmul(_weights(probabilities, keep, qmax).transpose(-2, -1), grad_output)
        grad_value, *value_sums = _quantize_backward(grad_value, value, scales[2], offsets[2], qmax)
        # Straight through the rounding of rows. Whatever they are divided by, the softmax does not see.
        total = torch.matmul(grad_output, _quantize(value, scales[2], offsets[2], qmax).transpose(-2, -1))
        total = total if keep is None else total * keep
        if grad_probabilities is not None:
            total = total + grad_probabilities
        grad_scores = torch._softmax_backward_data(total, probabilities, -1, probabilities.dtype)

        grad_query = torch.matmul(grad_scores, _quantize(key, scales[1], offsets[1], qmax)) * scaling
        grad_query, *query_sums = _quantize_backward(grad_query, query, scales[0], offsets[0], qmax)
        grad_key = torch.matmul(grad_scores.transpose(-2, -1), _quantize(query, scales[0], offsets[0], qmax) * scaling)
        grad_key, *key_sums = _quantize_backward(grad_key, key, scales[1], offsets[1], qmax)

        grad_mask = grad_scores.sum_to_size(mask.shape) if ctx.needs_input_grad[3] else None
        sums = (query_sums, key_sums, value_sums)
        return (
            *(grad_query, grad_key, grad_value, grad_mask, None, None, None),
            *(grad_scale for grad_scale, _ in sums),
            *(grad_offset for _, grad_offset in sums),
        )


def _weights(probabilities: Tensor, keep: Tensor | None, qmax: int) -> Tensor:
    weights = quantize_rows(probabilities, qmax)
    return weights if keep is None else weights * keep


def _flat(x: Tensor, like: Tensor) -> Tensor:
    """`x` `(batch, heads, tokens, n)` in one dimension, in the order in which `like` lies in memory.

    There is one scale for all, so that any order will do. The projections leave q, k and v as `(batch, tokens, heads, n)`,
    and in that order they need no copy.
    """
    return x.flatten() if like.is_contiguous() else x.transpose(1, 2).flatten()


def _from_flat(flat: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_flat`."""
    if like.is_contiguous():
        return flat.view(like.shape)
    return flat.view(like.transpose(1, 2).shape).transpose(1, 2)


def _quantize(x: Tensor, scale: Tensor, offset: Tensor, qmax: int) -> Tensor:
    return _from_flat(_forward(_flat(x, x), positive(scale), offset, qmax), x)


def _quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_scale, grad_offset = _tensor_backward(_flat(grad, x), _flat(x, x), positive(scale), offset, qmax)
    gradient_scale = (x[0].numel() * qmax) ** -0.5
    return (
        _from_flat(grad_x, x),
        positive_backward(grad_scale, scale) * gradient_scale,
        grad_offset * gradient_scale,
    )


def quantized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scales: tuple[Tensor, Tensor, Tensor],
    offsets: tuple[Tensor, Tensor, Tensor],
    qmax: int,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`P = softmax(Q(q) Q(k)ᵀ * scaling + mask)`, `R(P) Q(v)`, Q as in `fake_quantize_groups` with one group, R as in
    `quantize_rows`.

    Keeps q, k, v and P, and makes their quantized forms again in the backward pass. Gradients of scales and offsets are
    scaled as LSQ does, by `1 / sqrt(n * qmax)`, n the elements of one sample (a window, in Swin).

    Args:
        query, key, value: `(batch, heads, tokens, head_dim)`.
        mask: added to the scores, broadcast to `(batch, heads, tokens, tokens)`, or None.
        scales, offsets: of q, k and v, `(1,)` each. The magnitude of a scale counts.
        qmax: largest integer of the unsigned grid.
        scaling: factor of the scores.
        dropout: probability of dropping an entry of R(P).

    Returns:
        output `(batch, heads, tokens, head_dim)`, and P `(batch, heads, tokens, tokens)` before dropout.
    """
    keep = None
    if dropout > 0:
        shape = *query.shape[:-1], key.shape[-2]
        keep = query.new_empty(shape).bernoulli_(1 - dropout) / (1 - dropout)
    return _QuantizedAttention.apply(query, key, value, mask, keep, scaling, qmax, *scales, *offsets)
