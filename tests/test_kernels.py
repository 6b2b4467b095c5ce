"""Kernels, whatever instructions this machine has, against plain torch and against exact arithmetic."""

import ctypes
import importlib.util
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import instruction_sets

from quantformer_hf.kernels import (
    instruction_set,
    library,
    operators,
    plans,
    reference,
    using,
)
from quantformer_hf.kernels.checks import check_sums
from quantformer_hf.ops import quantize_rows
from quantformer_hf.packing import pack_codes


needs_kernels = pytest.mark.skipif(instruction_set() is None, reason="the kernels were not built: no C++ compiler")

#: rows, columns, outputs, groups: a single value, odd sizes, groups of one channel and of none, several panels.
SHAPES = [(1, 1, 1, 1), (7, 33, 17, 5), (13, 100, 40, 8), (3, 700, 16, 2), (5, 8, 30, 8), (2, 3, 5, 6), (40, 64, 33, 1)]


def make_layer(shape, weight_bits, activation_bits, shift, seed=0):
    """Random codes, plans and bias of a linear layer, and its weight in integers."""
    rows, columns, outputs, groups = shape
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, groups, (columns,), generator=generator)
    scale, offset = torch.rand(groups, generator=generator) + 0.1, torch.randn(groups, generator=generator)
    channels = plans.plan_channels(columns, scale, offset, index, 2**activation_bits - 1)
    codes = torch.randint(0, 2**weight_bits, (outputs, columns), generator=generator)
    packed = pack_codes(codes, weight_bits)
    qmin, qmax = -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1
    weight = plans.plan_weight(columns, weight_bits, qmin, qmax, shift, torch.rand(outputs, generator=generator) + 0.1)
    bias = torch.randn(outputs, generator=generator)
    x = 4 * torch.randn(rows, columns, generator=generator)
    return x, channels, packed, plans.plan_linear(weight, packed, bias, channels), bias, codes + qmin + shift


@needs_kernels
@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("weight_bits", range(1, 9))
def test_each_instruction_set_gives_the_bits_of_plain_torch(name, weight_bits):
    for shape, bits, shift in itertools.product(SHAPES, range(2, 9), (0, 0.5)):
        x, channels, _, linear, _, _ = make_layer(shape, weight_bits, bits, shift)
        with using(None):
            expected_codes = channels.quantize(x)
            expected = linear(expected_codes)
        with using(name):
            codes = channels.quantize(x)
            assert torch.equal(codes, expected_codes)
            assert torch.equal(linear(codes), expected)


@pytest.mark.parametrize("name", [None, *instruction_sets()])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_inner_sums_are_exact(name, bits):
    for shape in SHAPES:
        x, channels, packed, linear, _, integers = make_layer(shape, bits, bits, 0)
        with using(name):
            codes = channels.quantize(x)
            weight, ones = linear.weight, torch.ones(shape[2])
            for group in range(shape[3]):
                only = torch.zeros(shape[3])
                only[group] = 1
                arguments = plans._arguments(
                    packed, weight, channels.source, channels, only, ones, torch.zeros(shape[2])
                )
                sums = operators.multiply(codes, *arguments)
                start = channels.group_ends[group - 1] if group else 0
                members = channels.source[start : channels.group_ends[group]].long()
                members = members[members < shape[1]]
                exact = codes[:, start : start + len(members)].long() @ integers[:, members].long().T
                assert torch.equal(sums.long(), exact)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [0, 0.5])
def test_a_layer_is_the_fake_quantized_one_to_the_last_digits(bits, shift):
    """The formula of the deployment form, offsets folded, against float64 on dequantized operands."""
    for shape in SHAPES:
        x, channels, _, linear, bias, levels = make_layer(shape, bits, bits, shift)
        scale = channels.inverse.double().reciprocal()
        dequantized = ((x - channels.offset) * channels.inverse).clamp(0, channels.largest).round() * scale
        weight = levels.double() * (linear.weight.scale * (2 if shift else 1)).double().unsqueeze(1)
        expected = (dequantized + channels.offset.double()) @ weight.T + bias.double()
        result = linear(channels.quantize(x))
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@needs_kernels
@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("bits", [2, 4, 5, 6, 8])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 11, 9), (17, 50, 64)])
def test_attention_products_give_the_bits_of_plain_torch(name, bits, sizes):
    queries, keys, head_size = sizes
    generator = torch.Generator().manual_seed(bits)

    def operand(tokens):
        # As projections leave them: heads in the third dimension of memory.
        return torch.randn(2, tokens, 3, head_size, generator=generator).transpose(1, 2)

    query, key, value = operand(queries), operand(keys), operand(keys)
    probabilities = torch.rand(2, 3, queries, keys, generator=generator)
    scale = torch.rand(2, generator=generator) + 0.05
    operands = torch.stack([scale, 1 / scale, torch.randn(2, generator=generator)], 1)
    largest = 2**bits - 1
    # None, Swin's (bias by head, shift by window), and one that hides keys.
    biases = torch.randn(1, 3, queries, keys, generator=generator), torch.randn(2, 1, 1, keys, generator=generator)
    hiding = torch.zeros(queries, keys).masked_fill(torch.ones(queries, keys).triu(1) > 0, -torch.inf)
    for mask in (hiding, sum(biases), None):
        arguments = query, key, mask, operands, largest, head_size**-0.5
        with using(name):
            attention = operators.attention_probabilities(*arguments)
        assert torch.equal(attention, reference.attention_probabilities(*arguments))
    with using(name):
        mixed = operators.attention_mix(probabilities, value, operands[1], largest)
    assert torch.equal(mixed, reference.attention_mix(probabilities, value, operands[1], largest))

    def dequantized(x, row):
        scale, inverse, offset = operands[row]
        codes = ((x - offset) * inverse).round().clamp(0, largest)
        return codes.double() * scale.double().item() + offset.double().item()

    exact = dequantized(query, 0) @ dequantized(key, 1).transpose(2, 3) * head_size**-0.5
    torch.testing.assert_close(attention.double(), exact.softmax(-1), rtol=1e-4, atol=1e-6)
    exact = (quantize_rows(probabilities, largest).double() @ dequantized(value, 1)).transpose(1, 2)
    torch.testing.assert_close(mixed.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


@pytest.mark.parametrize("name", [None, *instruction_sets()])
@pytest.mark.parametrize("channels", [1, 8, 100])
def test_gelu_is_made_on_the_way_to_codes(name, channels):
    """The bits of plain torch, and the function of torch to 1e-6."""
    x = torch.linspace(-12, 12, 40 * channels).view(channels, 40).T.contiguous()
    offset, inverse = torch.full((channels,), -0.25), torch.full((channels,), 20.0)
    with using(name):
        codes = operators.quantize(x, offset, inverse, None, 255, gelu=True)
    assert torch.equal(codes, reference.quantize(reference.gelu_of(x), offset, inverse, None, 255))
    torch.testing.assert_close(reference.gelu_of(x).double(), torch.nn.functional.gelu(x.double()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [None, *instruction_sets()])
@pytest.mark.parametrize("channels", [1, 8, 100, 192])
def test_layer_norm_has_the_bits_of_plain_torch_also_on_the_way_to_codes(name, channels):
    """And is the function of torch to its last digits."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(3, 40, channels, generator=generator) * 5 + 2
    weight, bias = torch.rand(channels, generator=generator), torch.randn(channels, generator=generator)
    index = torch.randint(0, 3, (channels,), generator=generator)
    plan = plans.plan_channels(channels, torch.tensor([0.1, 0.2, 0.05]), torch.tensor([-1.0, 0.0, 0.5]), index, 15)
    for affine in ((weight, bias), (weight, None), (None, None)):
        expected = reference.layer_norm(x, *affine, 1e-5)
        with using(name):
            assert torch.equal(operators.layer_norm(x, *affine, 1e-5), expected)
            assert torch.equal(plan.quantize_norm(x, *affine, 1e-5), plan.quantize(expected))
        wide = [None if tensor is None else tensor.double() for tensor in affine]
        of_torch = torch.nn.functional.layer_norm(x.double(), (channels,), *wide, 1e-5)
        torch.testing.assert_close(expected.double(), of_torch, rtol=1e-5, atol=1e-5)


def test_softmax_is_that_of_torch_to_its_last_digits():
    x = torch.randn(50, 197, generator=torch.Generator().manual_seed(0)) * 20
    # The subtraction of the largest is exact then.
    x -= x.amax(1, keepdim=True)
    # A last digit of 80 is 4e-6 in its exponent.
    torch.testing.assert_close(reference.softmax(x).double(), x.double().softmax(-1), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("name", [None, *instruction_sets()])
def test_what_is_no_number_has_code_zero_and_what_is_outside_is_clipped(name):
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1e30, 2.5, 3.5]])
    with using(name):
        codes = operators.quantize(x, torch.zeros(6), torch.ones(6), None, 15)
    # Halves go to the even neighbour.
    assert codes.tolist() == [[0, 15, 0, 15, 2, 4]]


@needs_kernels
def test_operands_that_a_kernel_cannot_take_are_refused():
    x, channels, _, linear, _, _ = make_layer((2, 8, 4, 2), 4, 4, 0)
    with pytest.raises(TypeError, match=r"torch\.float64"):
        operators.quantize(x.double(), channels.offset, channels.inverse, None, 15)
    order = channels.source
    for source, error, message in (
        (torch.full_like(order, 50_000_000), ValueError, "numbers from 50000000 to 50000000: they are 0 to 8"),
        (torch.full_like(order, -1), ValueError, "numbers from -1 to -1"),
        (order.long(), TypeError, r"torch\.int64: convert it to torch\.int32"),
        (order.repeat_interleave(2)[::2], ValueError, "is not in one piece"),
    ):
        with pytest.raises(error, match=message):
            torch.ops.quantformer.quantize(x, channels.offset, channels.inverse, source, 15)
        with pytest.raises(error, match=message):
            operators.prepare_multiply(*linear.arguments[:6], source, *linear.arguments[7:])
    codes = channels.quantize(x)
    with pytest.raises(ValueError, match=f"the codes have 3 positions, and the layer {codes.shape[1]}"):
        linear(codes[:, :3])
    with pytest.raises(ValueError, match="scales and offsets for 8 channels, and the input has 7"):
        channels.quantize(x[:, :7])
    with pytest.raises(ValueError, match="there are 8 offsets and 7 scales"):
        operators.quantize(x, channels.offset, channels.inverse[:7], None, 15)
    with pytest.raises(ValueError, match="the instruction set 'mmx' cannot run here"), using("mmx"):
        pass


#: Arguments of the product of a layer of 8 inputs and 4 outputs, by their place, and what is said of them.
WRONG_OPERANDS = {
    "dtype of codes": (0, lambda weight: weight.to(torch.int8), r"bytes, and this one is \(4, 4\) torch\.int8"),
    "width": (0, lambda weight: weight[:, :3].contiguous(), r"rows of 4 bytes, and this one is \(4, 3\)"),
    "not in one piece": (0, lambda weight: weight.T.contiguous().T, "packed in contiguous rows"),
    "a group too few": (7, lambda ends: ends[1:], "2 groups end at"),
    "positions": (7, lambda ends: (*ends[:-1], ends[-1] + 4), "2 groups end at"),
    "scales": (10, lambda scale: scale[:3], "there are 3 scales and 4 biases for 4 outputs"),
    "biases": (11, lambda bias: bias[:3], "there are 4 scales and 3 biases for 4 outputs"),
    "another device": (11, lambda bias: bias.to("meta"), "was given a tensor on meta"),
}


@pytest.mark.parametrize(("place", "change", "message"), WRONG_OPERANDS.values(), ids=WRONG_OPERANDS)
def test_no_product_reads_what_is_not_there(place, change, message):
    arguments = list(make_layer((2, 8, 4, 2), 4, 4, 0)[3].arguments)
    arguments[place] = change(arguments[place])
    with pytest.raises(ValueError, match=message):
        operators.prepare_multiply(*arguments)


@needs_kernels
def test_no_layer_norm_or_attention_reads_what_is_not_there():
    weight, x = torch.ones(8), torch.ones(2, 8)
    with pytest.raises(ValueError, match="LayerNorm has 7 channels, and its input 8"):
        operators.layer_norm(x, weight[:7], None, 1e-5)
    with pytest.raises(ValueError, match="weight or bias of a LayerNorm is not in one piece"):
        operators.layer_norm(x, weight, torch.ones(16)[::2], 1e-5)
    tokens, operands = torch.ones(1, 1, 3, 4), torch.ones(2, 3)
    for function, arguments in (
        (operators.attention_probabilities, (tokens.double(), tokens, None, operands, 15, 0.5)),
        (operators.attention_probabilities, (tokens, tokens, torch.ones(3).double(), operands, 15, 0.5)),
        (operators.attention_mix, (torch.ones(1, 1, 3, 3), tokens.double(), operands[0], 15)),
    ):
        with pytest.raises(TypeError, match=r"was given torch\.float64"):
            function(*arguments)


def test_operators_are_what_torch_expects_of_them():
    x, channels, packed, linear, bias, _ = make_layer((5, 24, 18, 3), 4, 4, 0)
    weight = linear.weight
    codes = channels.quantize(x)
    ops = torch.ops.quantformer
    torch.library.opcheck(ops.quantize.default, (x, channels.offset, channels.inverse, channels.source, 15))
    torch.library.opcheck(ops.layer_norm.default, (x, torch.ones(24), torch.zeros(24), 1e-5))
    arguments = (weight.columns, weight.bits, weight.largest_code, weight.multiplier, weight.addend, channels.source)
    arguments += (channels.group_ends, channels.group_scales, channels.largest, weight.scale, bias)
    torch.library.opcheck(ops.multiply.default, (codes, packed, *arguments))
    operands = torch.tensor([[0.1, 10.0, -1.0], [0.1, 10.0, -1.0]])
    query, key = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8)
    for mask in (None, torch.randn(4, 6)):
        torch.library.opcheck(ops.attention_probabilities.default, (query, key, mask, operands, 255, 0.5))
    torch.library.opcheck(ops.attention_mix.default, (torch.rand(2, 3, 4, 6), key, operands[0], 255))


def test_where_kernels_are_missing_or_damaged_the_warning_says_how_to_build_them(tmp_path, monkeypatch, caplog):
    root = Path(library.__file__).parents[2]
    in_checkout = (root / "setup.py").exists()
    how = f"pip install -e {root}" if in_checkout else "pip install --force-reinstall --no-deps quantformer_hf"
    (tmp_path / "damaged.so").write_bytes(b"no library")
    for found in (None, SimpleNamespace(origin=str(tmp_path / "damaged.so"))):
        caplog.clear()
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found)
        assert library._load() is None
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert f"{how} builds them" in caplog.text


@needs_kernels
@pytest.mark.parametrize("fields", [2, 4])
def test_kernels_whose_jobs_have_other_sizes_are_not_run(fields, monkeypatch, caplog):
    class Other(ctypes.Structure):
        _fields_ = [(f"field{number}", ctypes.c_int64) for number in range(fields)]

    monkeypatch.setattr(library, "Step", Other)
    assert library._load() is None
    assert "are of another version or damaged" in caplog.text


def test_sums_that_32_bits_may_not_hold_are_refused():
    # Codes of 8 bits up to 255, weights of 8 bits from -128: 65,793 products of 255 * 128 fit, and 33,025 of 255 * 255.
    for most, integers in ((65793, (255, 1, -128)), (33025, (255, 2, -255))):
        check_sums([most, 2 * most], 255, *integers)
        with pytest.raises(
            ValueError, match=f"a group of {most + 1} channels may not fit into 32 bits: quantize the layer"
        ):
            check_sums([5, most + 6], 255, *integers)
