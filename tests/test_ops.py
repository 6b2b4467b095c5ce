"""The hot functions against slow and obvious ones in float64."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from quantformer_hf.ops import (
    PRODUCERS,
    compiling,
    eager_functions,
    fake_quantize_groups,
    fake_quantize_mixture,
    fake_quantize_rows,
    quantize_rows,
    quantized_attention,
)


ROWS, CHANNELS, GROUPS = 11, 6, 3


#: Highest level and knee of unsigned grids.
GRIDS = [(3, None), (15, None), (255, None), (17, 2), (35, 5)]


class RoundStraightThrough(torch.autograd.Function):
    """Rounds half to even, or to the nearest of some levels; the gradient passes."""

    @staticmethod
    def forward(ctx, x, levels):
        return x.round() if levels is None else levels[(x.unsqueeze(-1) - levels).abs().argmin(-1)]

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def reference_quantize(x, scale, offset, qmin, qmax, shift=0.0, knee=None):
    """Autograd through the formula: clamp's own gradient is zero outside, and where it holds the value the result is
    `scale * bound + offset`."""
    position = (x - offset) / scale - shift
    levels = None if knee is None else torch.tensor([*range(knee), *range(knee, qmax + 1, 3)], dtype=x.dtype)
    return scale * (RoundStraightThrough.apply(position.clamp(qmin, qmax), levels) + shift) + offset


def inputs(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def gradients(function, tensors, weights):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    result = function(*leaves)
    return result, torch.autograd.grad((result * weights).sum(), leaves)


@pytest.mark.parametrize("negative_scale", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_row_quantizer_and_its_gradients_are_those_of_the_formula(bits, shift, negative_scale):
    weight, scale, upstream = inputs((ROWS, CHANNELS), (ROWS,), (ROWS, CHANNELS))
    scale = scale.abs() * 2.0 ** (2 - bits) + 0.05
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    signed_scale = -scale if negative_scale else scale

    def slow(w, s):
        return reference_quantize(w, s.abs()[:, None], 0.0, qmin, qmax, shift)

    def fast(w, s):
        return fake_quantize_rows(w, s, qmin, qmax, shift, gradient_scale=1.0)

    expected, expected_gradients = gradients(slow, (weight, signed_scale), upstream)
    result, result_gradients = gradients(fast, (weight, signed_scale), upstream)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    for ours, reference in zip(result_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("producer", list(PRODUCERS))
@pytest.mark.parametrize(("qmax", "knee"), GRIDS)
@pytest.mark.parametrize("grouped", [False, True])
def test_group_quantizer_and_its_gradients_are_those_of_the_formula(qmax, knee, grouped, producer):
    groups = GROUPS if grouped else 1
    x, scale, offset, upstream = inputs((2, ROWS, CHANNELS), (groups,), (groups,), (2, ROWS, CHANNELS))
    scale = scale.abs() * 2.0 / (qmax + 1) + 0.05
    index = torch.arange(CHANNELS) % groups

    def slow(x, s, o):
        made = F.gelu(x) if producer == "gelu" else x
        return reference_quantize(made, s[index], o[index], 0, qmax, knee=knee)

    def fast(x, s, o):
        return fake_quantize_groups(x, s, o, index if grouped else None, qmax, 1.0, producer, knee)

    expected, expected_gradients = gradients(slow, (x, scale, offset), upstream)
    result, result_gradients = gradients(fast, (x, scale, offset), upstream)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    for ours, reference in zip(result_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("producer", list(PRODUCERS))
@pytest.mark.parametrize(("qmax", "knee"), [(3, None), (15, None), (17, 2)])
def test_mixture_and_its_gradients_are_those_of_the_formula(qmax, knee, producer):
    x, scale, offset, logits, upstream = inputs(
        (ROWS, CHANNELS), (GROUPS,), (GROUPS,), (GROUPS, CHANNELS), (ROWS, CHANNELS)
    )
    scale = scale.abs() * 2.0 / (qmax + 1) + 0.05

    def slow(x, s, o, alpha):
        made = F.gelu(x) if producer == "gelu" else x
        each = torch.stack([reference_quantize(made, s[g], o[g], 0, qmax, knee=knee) for g in range(GROUPS)])
        return (alpha.softmax(0)[:, None, :] * each).sum(0)

    def fast(x, s, o, alpha):
        return fake_quantize_mixture(x, s, o, alpha.softmax(0), qmax, 1.0, producer, knee)

    expected, expected_gradients = gradients(slow, (x, scale, offset, logits), upstream)
    result, result_gradients = gradients(fast, (x, scale, offset, logits), upstream)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    for ours, reference in zip(result_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-8)


def rounded_rows(rows, qmax):
    """As in `quantize_rows`, from what the softmax makes before its division."""
    powers = (rows.log() - rows.log().amax(-1, keepdim=True)).exp()
    codes = (powers * qmax).round()
    return codes / codes.sum(-1, keepdim=True)


def straight_through(function, x, *arguments):
    return x + (function(x, *arguments) - x).detach()


@pytest.mark.parametrize("qmax", [3, 15, 255])
def test_rows_have_levels_of_their_own_and_add_up_to_one(qmax):
    # From rows that look at one place to rows that look everywhere.
    rows = torch.cat(
        [torch.randn(20, 50, generator=torch.Generator().manual_seed(0)) * size for size in (0, 0.1, 1, 5)]
    )
    rows = rows.softmax(-1)
    result = quantize_rows(rows, qmax)
    torch.testing.assert_close(result, rounded_rows(rows.double(), qmax).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(result.sum(-1), torch.ones(len(rows)))
    assert max(len(row.unique()) for row in result) <= qmax + 1
    assert (result[:20] == 1 / 50).all()
    assert quantize_rows(rows.bfloat16(), qmax).dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["contiguous", "as the projections leave it"])
@pytest.mark.parametrize("masked", [False, True])
def test_quantized_attention_and_its_gradients_are_those_of_the_formula(layout, masked):
    batch, heads, tokens, dim, qmax, scaling = 4, 2, 5, 3, 7, 0.6
    shapes = [(batch, tokens, heads, dim)] * 3 if layout != "contiguous" else [(batch, heads, tokens, dim)] * 3
    *tensors, mask, upstream, upstream_maps = inputs(
        *shapes, (1, heads, tokens, tokens), (batch, heads, tokens, dim), (batch, heads, tokens, tokens)
    )
    scales = [torch.tensor([value], dtype=torch.float64) for value in (0.4, 0.5, 0.45)]
    offsets = [torch.tensor([value], dtype=torch.float64) for value in (-1.4, -1.6, -1.5)]
    leaves = [tensor.requires_grad_() for tensor in (*tensors, mask, *scales, *offsets)]

    def heads_first(x):
        return x if layout == "contiguous" else x.transpose(1, 2)

    def slow(q, k, v, mask, *parameters):
        s, o = parameters[:3], parameters[3:]
        q, k, v = (reference_quantize(heads_first(x), s[i], o[i], 0, qmax) for i, x in enumerate((q, k, v)))
        scores = q @ k.transpose(2, 3) * scaling
        maps = (scores + mask if masked else scores).softmax(-1)
        return straight_through(rounded_rows, maps, qmax) @ v, maps

    def fast(q, k, v, mask, *parameters):
        q, k, v = (heads_first(x) for x in (q, k, v))
        return quantized_attention(q, k, v, mask if masked else None, parameters[:3], parameters[3:], qmax, scaling)

    results, gradients_of = [], []
    for function in (slow, fast):
        output, maps = function(*leaves)
        loss = (output * upstream).sum() + (maps.float().double() * upstream_maps).sum()
        results.append((output, maps))
        gradients_of.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    # Attention's softmax is in float32, whatever the inputs.
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    factor_of_parameters = (heads * tokens * dim * qmax) ** -0.5
    for number, (expected, result) in enumerate(zip(*gradients_of, strict=True)):
        if number == 3 and not masked:
            assert expected is None
            assert result is None
            continue
        factor = factor_of_parameters if number >= 4 else 1.0
        torch.testing.assert_close(result, expected * factor, rtol=1e-4, atol=1e-5, msg=str(number))


def test_attention_dropout_keeps_the_mean():
    torch.manual_seed(0)
    q, k, v = (torch.randn(64, 2, 6, 4) for _ in range(3))
    scales, offsets = [torch.full((1,), 0.03)] * 3, [torch.full((1,), -3.5)] * 3
    arguments = q, k, v, None, scales, offsets, 255, 0.5
    exact, maps = quantized_attention(*arguments)
    dropped, same_maps = quantized_attention(*arguments, dropout=0.3)
    assert torch.equal(maps, same_maps)
    assert not torch.equal(exact, dropped)
    torch.testing.assert_close(dropped.mean(), exact.mean(), rtol=0, atol=0.03)


def test_attention_dropout_and_its_gradients_are_those_of_the_formula():
    shape, qmax, dropout = (2, 2, 5, 3), 7, 0.4
    leaves = [tensor.requires_grad_() for tensor in inputs(shape, shape, shape)]
    (upstream,) = inputs(shape, seed=1)
    scales = [torch.tensor([value], dtype=torch.float64) for value in (0.4, 0.5, 0.45)]
    offsets = [torch.tensor([value], dtype=torch.float64) for value in (-1.4, -1.6, -1.5)]

    def slow(q, k, v):
        q, k, v = (reference_quantize(x, scales[i], offsets[i], 0, qmax) for i, x in enumerate((q, k, v)))
        maps = (q @ k.transpose(2, 3)).softmax(-1)
        keep = torch.empty_like(maps).bernoulli_(1 - dropout) / (1 - dropout)
        return straight_through(rounded_rows, maps, qmax) * keep @ v

    def fast(q, k, v):
        return quantized_attention(q, k, v, None, scales, offsets, qmax, 1.0, dropout)[0]

    results = []
    for function in (slow, fast):
        torch.manual_seed(0)
        output = function(*leaves)
        results.append((output, *torch.autograd.grad((output * upstream).sum(), leaves)))
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["groups", "mixture", "rows"])
def test_gradient_scale_multiplies_the_gradients_of_scale_and_offset_alone(kind):
    x, scale, offset, upstream = inputs((ROWS, CHANNELS), (1,), (1,), (ROWS, CHANNELS))
    scale = scale.abs() + 0.1

    def quantize(x, scale, offset, factor):
        if kind == "rows":
            return fake_quantize_rows(x + offset, scale.expand(ROWS), -8, 7, 0.5, factor)
        if kind == "mixture":
            return fake_quantize_mixture(x, scale, offset, torch.ones(1, CHANNELS).to(x), 15, factor)
        return fake_quantize_groups(x, scale, offset, None, 15, factor)

    plain, scaled = (
        gradients(lambda *t, factor=factor: quantize(*t, factor), (x, scale, offset), upstream)[1]
        for factor in (1.0, 0.25)
    )
    torch.testing.assert_close(scaled[0], plain[0])
    torch.testing.assert_close(scaled[1], plain[1] * 0.25)
    torch.testing.assert_close(scaled[2], plain[2] * (1 if kind == "rows" else 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_compiled_and_eager_functions_agree(dtype, rows):
    x, scale, offset, logits, upstream = (
        tensor.float()
        for tensor in inputs((rows, CHANNELS), (GROUPS,), (GROUPS,), (GROUPS, CHANNELS), (rows, CHANNELS))
    )
    x, upstream = x.to(dtype), upstream.to(dtype)
    scale = scale.abs() + 0.1
    index = torch.arange(CHANNELS) % GROUPS

    def everything(x, scale, offset, logits):
        return (
            fake_quantize_groups(x, scale, offset, index, 15, 0.5, "gelu")
            + fake_quantize_mixture(x, scale, offset, logits.softmax(0), 3, 0.5)
            + fake_quantize_rows(x.T, scale.repeat(2), -2, 1, 0.5).T
        )

    compiled = gradients(everything, (x, scale, offset, logits), upstream)
    with eager_functions():
        eager = gradients(everything, (x, scale, offset, logits), upstream)
    # The order of the additions differs, nothing else; in bfloat16 sums are rounded to eight bits.
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(compiled[0], eager[0], rtol=tolerance, atol=tolerance)
    for ours, reference in zip(compiled[1], eager[1], strict=True):
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance * rows**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_result_keeps_the_dtype_of_its_input(dtype):
    x = torch.randn(4, CHANNELS).to(dtype)
    scale, offset = torch.full((1,), 0.1), torch.zeros(1)
    assert fake_quantize_groups(x, scale, offset, None, 15).dtype == dtype
    assert fake_quantize_rows(x, torch.ones(4), -8, 7).dtype == dtype


def test_a_scale_that_was_carried_to_zero_is_led_out_of_it():
    weight, scale = torch.tensor([[1.0, -2.0]], requires_grad=True), torch.zeros(1, requires_grad=True)
    groups = fake_quantize_groups(weight, scale, torch.zeros(1), None, 3)
    rows = fake_quantize_rows(weight, scale, -2, 1)
    torch.testing.assert_close(torch.cat([groups, rows]), torch.tensor([[3e-8, 0.0], [1e-8, -2e-8]]), rtol=1e-4, atol=0)
    (groups + rows).sum().backward()
    assert scale.grad.item() == 3 + 1 - 2
    assert weight.grad.eq(0).all()


def test_memory_that_runs_out_is_no_missing_compiler(monkeypatch, caplog):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda function, **_: too_large)
    with pytest.raises(torch.OutOfMemoryError):
        compiling.compiled(lambda x: x)(torch.zeros(1))
    assert compiling._use_compiler
    assert not caplog.records


def test_without_a_compiler_the_eager_functions_run_and_one_warning_says_so(tmp_path):
    program = """
import logging, torch
logging.basicConfig(format="%(message)s")
from quantformer_hf.ops import fake_quantize_groups
x = torch.randn(8, 6, requires_grad=True)
scale = torch.ones(1, requires_grad=True)
for _ in range(2):
    fake_quantize_groups(x, scale, torch.zeros(1), None, 15).sum().backward()
print("gradient", torch.isfinite(scale.grad).all().item())
"""
    environment = {"PATH": "", "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    assert "gradient True" in done.stdout
    assert done.stderr.count("torch.compile could not build the quantizers") == 1
