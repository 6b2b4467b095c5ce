"""Kernels, whatever instructions this machine has, against plain torch and against exact arithmetic."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_batches, make_quantized
from torch.utils._python_dispatch import TorchDispatchMode

from quantformer_hf.kernels import (
    fake_quantized,
    in_integers,
    instruction_set,
    library,
    operators,
    plans,
    reference,
    using,
)
from quantformer_hf.modeling_quantformer import StageError
from quantformer_hf.packed_layers import PackedLayer
from quantformer_hf.packing import pack_codes


def available() -> list[str]:
    names = []
    for name in ("plain", "avx2", "avx512", "neon", "neon_dotprod"):
        try:
            with using(name):
                names.append(name)
        except ValueError:
            # Not of this machine.
            continue
    return names


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
@pytest.mark.parametrize("name", available())
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


@pytest.mark.parametrize("name", [None, *available()])
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
                arguments = plans._arguments(packed, weight, channels, only, ones, torch.zeros(shape[2]))
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
@pytest.mark.parametrize("name", available())
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
        mixed = operators.attention_mix(probabilities, value, operands, largest)
    assert torch.equal(mixed, reference.attention_mix(probabilities, value, operands, largest))

    def dequantized(x, row):
        scale, inverse, offset = operands[row]
        codes = ((x - offset) * inverse).round().clamp(0, largest)
        return codes.double() * scale.double().item() + offset.double().item()

    exact = dequantized(query, 0) @ dequantized(key, 1).transpose(2, 3) * head_size**-0.5
    torch.testing.assert_close(attention.double(), exact.softmax(-1), rtol=1e-4, atol=1e-6)
    exact = (dequantized(probabilities, 0) @ dequantized(value, 1)).transpose(1, 2)
    torch.testing.assert_close(mixed.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


@pytest.mark.parametrize("name", [None, *available()])
@pytest.mark.parametrize("channels", [1, 8, 100])
def test_gelu_is_made_on_the_way_to_codes(name, channels):
    """The bits of plain torch, and the function of torch to 1e-6."""
    x = torch.linspace(-12, 12, 40 * channels).view(channels, 40).T.contiguous()
    offset, inverse = torch.full((channels,), -0.25), torch.full((channels,), 20.0)
    with using(name):
        codes = operators.quantize(x, offset, inverse, None, 255, gelu=True)
    assert torch.equal(codes, reference.quantize(reference.gelu_of(x), offset, inverse, None, 255))
    torch.testing.assert_close(reference.gelu_of(x).double(), torch.nn.functional.gelu(x.double()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [None, *available()])
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


@pytest.mark.parametrize("name", [None, *available()])
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
    codes = channels.quantize(x)
    with pytest.raises(ValueError, match=f"the codes have 3 positions, and the layer {codes.shape[1]}"):
        linear(codes[:, :3])
    with pytest.raises(ValueError, match="the instruction set 'mmx' cannot run here"), using("mmx"):
        pass


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
    torch.library.opcheck(ops.attention_mix.default, (torch.rand(2, 3, 4, 6), key, operands, 255))


# Models


def logits(model, batch):
    with torch.no_grad():
        return model(pixel_values=batch).logits


@pytest.mark.parametrize("name", [None, *available()])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_packing_changes_no_bit_of_the_logits(backbone, bits, name):
    model = make_quantized(backbone, "finetune", weight_bits=bits, activation_bits=max(2, bits))
    batch = make_batches()[0]
    expected = logits(model, batch)
    with using(name):
        assert torch.equal(logits(model.pack(), batch), expected)


def test_batch_size_and_threads_change_no_bit():
    model = make_quantized("swin", "finetune").pack()
    batch = make_batches(1, batch_size=5)[0]
    expected = logits(model, batch)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(torch.cat([logits(model, image) for image in batch.split(1)]), expected)
            assert torch.equal(logits(model, batch), expected)
    finally:
        torch.set_num_threads(threads)


def test_integers_and_floating_point_agree_where_no_activation_is_near_a_border():
    """At eight bits and in a model of two blocks a last digit moves nothing far."""
    model = make_quantized("vit", "finetune", bit_width=8)
    batch = make_batches()[0]
    expected = logits(model, batch)
    with fake_quantized():
        in_floating_point = logits(model, batch)
        assert torch.equal(logits(model.pack(), batch), in_floating_point)
    torch.testing.assert_close(in_floating_point, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_code_is_above_the_largest(backbone, bits):
    model = make_quantized(backbone, "finetune", bit_width=bits, embedding_bits=bits, classifier_bits=bits).pack()
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if function is torch.ops.quantformer.quantize.default:
                seen.append(result.max().item())
            return result

    with Watch():
        logits(model, make_batches(1)[0])
    assert len(seen) > 8
    assert max(seen) <= 2**bits - 1


def test_a_packed_model_compiles_and_exports_whole():
    model = make_quantized("vit", "finetune").pack()
    batch = make_batches()[0]
    expected = logits(model, batch)
    torch.testing.assert_close(logits(torch.compile(model.backbone, fullgraph=True), batch), expected)
    exported = torch.export.export(model.backbone, (), {"pixel_values": batch})
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    operators_of_ours = {name for name in names if name.startswith("quantformer.")}
    assert operators_of_ours == {
        f"quantformer.{name}.default"
        for name in ("layer_norm", "quantize", "multiply", "attention_probabilities", "attention_mix")
    }
    with torch.no_grad():
        assert torch.equal(exported.module()(pixel_values=batch).logits, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_packed_model_takes_any_number_of_images(strict):
    model = make_quantized("vit", "finetune").pack()
    batch = torch.cat(make_batches())
    sizes = {"pixel_values": {0: torch.export.Dim("images", min=1, max=64)}}
    exported = torch.export.export(
        model.backbone, (), {"pixel_values": batch[:4]}, dynamic_shapes=sizes, strict=strict
    ).module()
    for images in (batch[:4], batch[:3], batch):
        with torch.no_grad():
            assert torch.equal(exported(pixel_values=images).logits, logits(model, images))


def test_floating_point_is_for_the_thread_that_asks():
    def elsewhere(function):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function).result()

    one, other = fake_quantized(), fake_quantized()
    one.__enter__()
    assert not in_integers()
    assert elsewhere(in_integers)
    elsewhere(other.__enter__)
    one.__exit__(None, None, None)
    assert in_integers()
    assert elsewhere(in_integers)


def test_a_trace_holds_the_operators():
    layer = make_quantized("vit", "finetune").pack().backbone.vit.layers[0].mlp.fc2
    example, other = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    with torch.no_grad():
        traced = torch.jit.trace(layer, (example,), check_trace=False)
        assert torch.equal(traced(other), layer(other))


def test_plans_follow_tensors_that_change():
    model = make_quantized("vit", "finetune").pack()
    batch = make_batches()[0]
    before = logits(model, batch)
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, PackedLayer) and m.reads).weight_quantizer.scale.mul_(1.5)
    assert not torch.equal(logits(model, batch), before)


def test_inference_sees_what_a_fused_optimizer_has_moved():
    """Such a step leaves the version of a tensor as it was."""
    model = make_quantized("vit", "finetune")
    batch = make_batches()[0]
    logits(model, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    model.train()(pixel_values=batch).logits.square().sum().backward()
    optimizer.step()
    result = logits(model.eval(), batch)
    fresh = make_quantized("vit", "finetune")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(result, logits(fresh, batch))


def test_a_model_that_is_packed_again_follows_what_was_trained_between():
    model = make_quantized("vit", "finetune").pack()
    batch = make_batches()[0]
    logits(model, batch)
    model.unpack().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    model(pixel_values=batch).logits.square().sum().backward()
    optimizer.step()
    expected = logits(model.eval(), batch)
    assert torch.equal(logits(model.pack(), batch), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_moved_to_another_dtype_infer_packed_or_not(backbone, dtype):
    model = make_quantized(backbone, "finetune").to(dtype)
    batch = make_batches()[0].to(dtype)
    expected = logits(model, batch)
    assert expected.dtype == dtype
    result = logits(model.pack(), batch)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected)


def test_inputs_of_other_sizes_are_refused():
    model = make_quantized("vit", "finetune")
    for fc2 in (model.backbone.vit.layers[0].mlp.fc2, model.pack().backbone.vit.layers[0].mlp.fc2):
        with torch.no_grad(), pytest.raises(ValueError, match=r"mlp\.fc2' takes 64 channels, and was given 40"):
            fc2.eval()(torch.randn(2, 40))


def test_a_packed_model_has_no_gradients_and_half_precision_keeps_its_dtype(tmp_path):
    model = make_quantized("swin", "finetune").pack()
    batch = make_batches()[0]
    assert not model(pixel_values=batch).logits.requires_grad
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert logits(half, batch.bfloat16()).dtype == torch.bfloat16


def test_kernel_info_says_what_serves_each_layer(backbone):
    model = make_quantized(backbone, "finetune", layer_bits={"*.fc1": {"activation_bits": 32}})
    with pytest.raises(StageError, match=r"run model\.pack\(\) first"):
        model.kernel_info()
    info = model.pack().kernel_info()
    assert len([name for name in info if not name.endswith("operands")]) == len(
        [m for m in model.modules() if isinstance(m, PackedLayer)]
    )
    served = f"kernel ({instruction_set()})" if instruction_set() else "integers in plain torch"
    assert all(text.startswith("floating point, W4: its input") for name, text in info.items() if name.endswith("fc1"))
    assert all(text == f"{served}, W4A4" for name, text in info.items() if name.endswith(("q_proj", "o_proj", "fc2")))
    assert all(text == f"{served}, A8" for name, text in info.items() if name.endswith("operands"))
    with using(None):
        assert "integers in plain torch, W4A4" in model.kernel_info().values()


def test_without_kernels_the_same_results_come_with_one_warning(monkeypatch, caplog):
    model = make_quantized("vit", "finetune").pack()
    batch = make_batches()[0]
    expected = logits(model, batch)
    monkeypatch.setattr(library, "_looked", False)
    monkeypatch.setattr(library, "_kernels", None)
    monkeypatch.setattr(library, "NAME", "quantformer_hf.kernels._absent")
    assert torch.equal(logits(model, batch), expected)
    logits(model, batch)
    assert [record.message[:42] for record in caplog.records] == ["the kernels of quantformer_hf were not bui"]
