"""The Triton kernels under Triton's interpreter, on CPU tensors: `test_triton.py` runs this file with TRITON_INTERPRET=1.

Not collected by itself: triton looks at the variable when it is first imported, and torch may have done that.
"""

import itertools

import pytest
import torch

from quantformer_hf.kernels import plans, reference, triton_kernels
from quantformer_hf.kernels.laid_out import lay_out
from quantformer_hf.packing import pack_codes


#: rows, columns, outputs, groups: a single value, odd sizes, groups of one channel and of none, several blocks each way.
SHAPES = [(1, 1, 1, 1), (1, 33, 17, 5), (5, 8, 30, 8), (2, 3, 5, 6), (35, 40, 65, 2), (130, 9, 3, 1)]


def make_layer(shape, bits, activation_bits, shift, multiples=False):
    """A random layer: what its plan is made of, and codes of its input.

    Args:
        multiples: make the scales of the groups small multiples of a unit, by which they may be merged.
    """
    rows, columns, outputs, groups = shape
    index = torch.randint(0, groups, (columns,))
    scale = torch.randint(1, 8, (groups,)) / 8 if multiples else torch.rand(groups) + 0.1
    # As on a GPU; in every other case as on a CPU, which the kernel is to take as well.
    alignment = 16 if multiples else None
    channels = plans.plan_channels(
        columns, scale, torch.randn(groups), index, 2**activation_bits - 1, alignment=alignment
    )
    weight = plans.plan_weight(columns, bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, shift, torch.rand(outputs) + 0.1)
    packed = pack_codes(torch.randint(0, 2**bits, (outputs, columns)), bits)
    codes = torch.randint(0, channels.largest + 1, (rows, channels.source.numel()), dtype=torch.uint8)
    codes[:, channels.source == columns] = 0
    return weight, packed, torch.randn(outputs), channels, codes


def make_operands(*layer):
    """Arguments of `multiply`, and what it is to give."""
    *parts, codes = make_layer(*layer)
    return laid_out(*parts, codes), reference.multiply(codes, *plans.plan_linear(*parts).arguments)


def laid_out(weight, packed, bias, channels, codes):
    """Arguments of `multiply`."""
    plan = plans.plan_part(weight, packed, bias, channels, lay_out(weight, packed, channels.source))
    names = (
        *("weight", "columns", "bits", "largest_code", "multiplier", "addend", "source", "run_ends", "run_scales"),
        *("largest", "scale", "bias", "multiples"),
    )
    operands = {"codes": codes} | dict(zip(names, plan.arguments, strict=True))
    assert operands.pop("source") is None
    assert operands.pop("columns") == codes.shape[-1]
    return operands


def same_bits(x, y):
    """Also -0.0 is not 0.0."""
    return torch.equal(x.view(torch.int32), y.view(torch.int32))


@pytest.mark.parametrize("bits", range(1, 9))
def test_products_are_those_of_the_reference_bit_for_bit(bits):
    torch.manual_seed(bits)
    merged = 0
    for shape, activation_bits, shift, multiples in itertools.product(SHAPES, (4, 8), (0, 0.5), (False, True)):
        operands, expected = make_operands(shape, bits, activation_bits, shift, multiples)
        merged += operands["multiples"] is not None
        assert same_bits(triton_kernels.multiply(**operands), expected), (shape, activation_bits, shift, multiples)
    # A weight of eight bits times two is no byte.
    assert (merged > 0) == (bits < 8)


def test_groups_that_are_one_for_some_of_their_multiples_run_together():
    # 15 * 8 is a byte, 16 * 8 is none: two runs, the second of which is odd.
    channels = plans.plan_channels(96, torch.tensor([1.0, 15.0, 17.0]), torch.randn(3), torch.arange(96) % 3, 15)
    weight = plans.plan_weight(96, 4, -8, 7, 0, torch.rand(5) + 0.1)
    packed = pack_codes(torch.randint(0, 16, (5, 96)), 4)
    plan = plans.plan_linear(weight, packed, None, channels)
    codes = torch.randint(0, 16, (3, 96), dtype=torch.uint8)
    operands = laid_out(weight, packed, None, channels, codes)
    assert operands["run_ends"] == (64, 96)
    assert same_bits(triton_kernels.multiply(**operands), reference.multiply(codes, *plan.arguments))


def test_extreme_operands_and_sums_beyond_float32_are_exact():
    for shift, code in itertools.product((0, 0.5), (0, 255)):
        operands, _ = make_operands((2, 2000, 3, 1), 8, 8, shift)
        operands["codes"] = torch.full_like(operands["codes"], 255)
        operands["weight"] = torch.full_like(operands["weight"], code)
        operands["scale"], operands["bias"] = torch.ones(3), torch.zeros(3)
        operands["run_scales"] = torch.ones(1)
        weight = code * operands["multiplier"] + operands["addend"]
        expected = torch.full((2, 3), 2000 * 255 * weight).float()
        assert torch.equal(triton_kernels.multiply(**operands), expected)


def test_any_number_of_dimensions_and_any_strides():
    operands, expected = make_operands((6, 33, 17, 5), 3, 4, 0)
    codes = operands["codes"]
    operands["codes"] = codes.view(2, 3, -1)
    assert same_bits(triton_kernels.multiply(**operands), expected.view(2, 3, -1))
    operands["codes"] = codes.T.contiguous().T
    assert same_bits(triton_kernels.multiply(**operands), expected)
    operands["codes"] = codes[:0]
    assert triton_kernels.multiply(**operands).shape == (0, 17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_are_those_of_the_reference(dtype):
    torch.manual_seed(0)
    for shape, activation_bits in itertools.product(SHAPES, (1, 3, 8)):
        rows, columns, _, groups = shape
        index = torch.randint(0, groups, (columns,))
        scale, offset = torch.rand(groups) + 0.1, torch.randn(groups)
        channels = plans.plan_channels(columns, scale, offset, index, 2**activation_bits - 1)
        x = (20 * torch.randn(rows, columns)).to(dtype)
        x[0, 0] = float("nan")
        x[-1, -1] = float("inf")
        x[rows // 2, columns // 2] = -float("inf")
        for source, knee in itertools.product((None, channels.source), (None, 2)):
            largest = channels.largest if knee is None else 17
            arguments = (x, channels.offset, channels.inverse, source, largest)
            expected = reference.quantize(*arguments, knee=knee)
            assert torch.equal(triton_kernels.quantize(*arguments, knee), expected)


def test_halves_are_rounded_to_even():
    x = torch.arange(0, 256, 0.5).unsqueeze(0)
    arguments = (x, torch.zeros(x.numel()), torch.ones(x.numel()), None)
    assert torch.equal(triton_kernels.quantize(*arguments, 255), reference.quantize(*arguments, 255))
    assert torch.equal(triton_kernels.quantize(*arguments, 254, 11), reference.quantize(*arguments, 254, knee=11))


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("codes", lambda t: t[:, :-4], ValueError),
        ("codes", lambda t: t.float(), TypeError),
        ("weight", lambda t: t[:, :-1], ValueError),
        ("bits", lambda bits: 3, ValueError),
        ("run_scales", lambda t: t[:-1], ValueError),
        ("run_ends", lambda ends: (*ends[:-1], ends[-1] + 4), ValueError),
        ("run_ends", lambda ends: (ends[0] + 1, *ends[1:]), ValueError),
        ("scale", lambda t: t.double(), TypeError),
        ("bias", lambda t: t.to("meta"), ValueError),
        ("multiples", lambda t: t[:-1], ValueError),
    ],
)
def test_what_the_kernel_would_read_beyond_is_refused(name, change, error):
    operands, _ = make_operands((2, 33, 17, 5), 3, 4, 0, name == "multiples")
    operands[name] = change(operands[name])
    with pytest.raises(error, match=r"positions|takes|needs|rise to|is on"):
        triton_kernels.multiply(**operands)
