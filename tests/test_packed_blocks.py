"""A module in one call of the kernels computes what its layers compute one by one."""

import copy
import gc
import pickle
import sys
import threading
import weakref

import pytest
import torch
from conftest import make_batches, make_quantized
from packed_models import listen, logits, needs_kernels, one_by_one, outermost, ran_as_one, whole_modules
from torch import nn

from quantformer_hf.attention import capture_attention
from quantformer_hf.kernels import operators, using
from quantformer_hf.packed_encoder import PackedBlock
from quantformer_hf.packed_forms import PACKED_FORMS
from quantformer_hf.packed_layers import PackedLinear
from quantformer_hf.quantizers import ActivationQuantizer


@pytest.fixture
def packed(backbone):
    return make_quantized(backbone, "finetune").pack()


@needs_kernels
def test_a_module_in_one_call_gives_the_bits_of_its_layers(packed):
    for images in (make_batches()[0], make_batches()[0][:1], torch.cat(make_batches())):
        result = logits(packed, images)
        assert torch.equal(result, one_by_one(packed, images))
        with using(None):
            assert torch.equal(result, logits(packed, images))
        threads = torch.get_num_threads()
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(result, logits(packed, images))
        torch.set_num_threads(threads)
    assert ran_as_one(packed) == outermost(whole_modules(packed)) != []


@needs_kernels
def test_a_default_device_is_not_that_of_what_kernels_write(packed):
    images = make_batches()[0]
    expected = logits(packed, images)
    made = copy.deepcopy(packed)
    # Nothing is prepared yet, and layers are called one by one as well.
    with torch.device("meta"), torch.no_grad():
        assert torch.equal(made(images).logits, expected)
        assert torch.equal(made(images, output_attentions=True).logits, expected)
        assert torch.equal(made(images, output_hidden_states=True).logits, expected)


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (4, 1, 17, 1), (4, 1, 1, 17), (1, 2, 17, 17)])
@pytest.mark.parametrize("backbone", ["vit"])
def test_a_mask_may_be_broadcast_over_any_of_its_dimensions(packed, shape):
    images, mask = make_batches()[0], torch.randn(shape)
    with torch.no_grad():
        found = packed(images, attention_mask=mask).logits
        layers = packed(images, attention_mask=mask, output_attentions=True).logits
        whole = packed(images, attention_mask=mask.expand(4, 2, 17, 17).contiguous()).logits
    assert torch.equal(found, layers)
    assert torch.equal(found, whole)


@needs_kernels
@pytest.mark.parametrize("backbone", ["vit"])
def test_a_job_follows_the_scaling_of_attention(packed):
    images = make_batches()[0]
    before = logits(packed, images)
    for block in packed.backbone.vit.layers:
        block.attention.scaling = 1.0
    after = logits(packed, images)
    assert not torch.equal(before, after)
    assert torch.equal(after, one_by_one(packed, images))


@needs_kernels
@pytest.mark.parametrize("backbone", ["vit"])
def test_a_negative_view_keeps_its_sign(packed):
    layer = packed.backbone.classifier
    x = torch.randn(4, layer.in_features)
    with torch.no_grad():
        assert torch.equal(layer(torch._neg_view(x)), layer(-x))


@needs_kernels
@pytest.mark.parametrize("backbone", ["vit", "deit"])
def test_a_block_whose_layernorm_is_listened_to_leaves_its_parts_whole(packed):
    images = make_batches()[0]
    expected = logits(packed, images)
    packed = copy.deepcopy(packed)
    blocks = outermost(whole_modules(packed))
    listen(block.layernorm_after for block in blocks)
    assert torch.equal(logits(packed, images), expected)
    assert ran_as_one(packed) == [part for block in blocks for part in (block.attention, block.mlp)]


@needs_kernels
@pytest.mark.parametrize("disturb", ["training", "dropout", "gradient", "forward", "global hook", "quantizer"])
def test_a_block_calls_its_layers_for_who_wants_them(disturb):
    model = make_quantized("vit", "finetune").pack()
    images = make_batches()[0]
    expected = logits(model, images)
    model = copy.deepcopy(model)
    blocks = outermost(whole_modules(model))
    called = []
    if disturb == "training":
        model.train()
    elif disturb == "dropout":
        blocks[0].dropout.train()
    elif disturb == "forward":
        forward = blocks[0].mlp.forward
        blocks[0].mlp.forward = lambda codes: called.append(codes) or forward(codes)
    elif disturb == "quantizer":
        blocks[0].mlp.fc2.input_quantizer.observer = blocks[0].mlp.fc2.input_quantizer.make_observer()
    if disturb == "gradient":
        x = torch.zeros(1, 5, blocks[0].layernorm_before.normalized_shape[0], requires_grad=True)
        blocks[0](x).sum().backward()
        assert x.grad is not None
    elif disturb == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
        try:
            assert torch.equal(logits(model, images), expected)
        finally:
            handle.remove()
        assert blocks[0].mlp.fc1 in called
    else:
        assert torch.equal(logits(model, images), expected)
        assert len(called) == (disturb == "forward")
    assert blocks[0] not in ran_as_one(model)


@needs_kernels
@pytest.mark.parametrize(
    "changed",
    ["layernorm_before", "q_proj", "o_proj", "layernorm_after", "fc1", "fc2", "operands.query", "fc2.input_quantizer"],
)
def test_a_job_follows_tensors_that_change(changed):
    model = make_quantized("vit", "finetune").pack()
    images = make_batches()[0]
    before = logits(model, images)
    module = next(m for name, m in model.named_modules() if name.endswith(changed))
    with torch.no_grad():
        if isinstance(module, nn.LayerNorm):
            module.weight.mul_(1.5)
        else:
            getattr(module, "weight_quantizer", module).scale.mul_(1.5)
    after = logits(model, images)
    assert not torch.equal(before, after)
    assert torch.equal(after, one_by_one(model, images))


@needs_kernels
def test_a_job_keeps_what_it_points_into_when_another_is_made(packed):
    block = next(module for module in packed.modules() if isinstance(module, PackedBlock))
    x = torch.zeros(1, 4, *block.layernorm_before.normalized_shape)
    with torch.no_grad():
        job = block.job(x)
        # The inverses of the scales, which nothing but the job has.
        pointed_into = weakref.ref(block._job.value[1][0].inverse)
        block._job.forget()
        for quantizer in block.modules():
            if isinstance(quantizer, ActivationQuantizer):
                quantizer.forget_plans()
        assert block.job(x) is not None
        gc.collect()
        assert pointed_into() is not None
        del job
        gc.collect()
        assert pointed_into() is None


@needs_kernels
def test_threads_that_call_a_fresh_model_at_once_get_its_logits(packed):
    images, expected, threads = make_batches()[0], logits(packed, make_batches()[0]), 4
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(3):
            # A copy has prepared nothing yet.
            fresh, got, start = copy.deepcopy(packed), [None] * threads, threading.Barrier(threads)

            def run(place, fresh=fresh, got=got, start=start):
                start.wait()
                got[place] = logits(fresh, images)

            running = [threading.Thread(target=run, args=(place,)) for place in range(threads)]
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
            assert all(torch.equal(one, expected) for one in got)
    finally:
        sys.setswitchinterval(interval)


@needs_kernels
def test_threads_that_read_the_job_of_a_plan_at_once_get_the_same_one(packed, monkeypatch):
    # Copies point into what it alone holds. Python 3.11 let one thread make it, later versions let each make its own.
    layer = next(module for module in packed.modules() if isinstance(module, PackedLinear))
    plan, both_make, got = copy.deepcopy(layer).plan(layer.channel_plan()), threading.Barrier(2, timeout=30), []
    prepare_multiply = operators.prepare_multiply

    def prepare_together(*arguments):
        both_make.wait()
        return prepare_multiply(*arguments)

    monkeypatch.setattr(operators, "prepare_multiply", prepare_together)
    threads = [threading.Thread(target=lambda: got.append(plan.job)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 2
    assert got[0] is got[1] is plan.job


@needs_kernels
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("activation_bits", [2, 4])
@pytest.mark.parametrize("class_token_bits", [None, 8])
def test_weights_of_few_bits_lie_in_the_order_of_the_kernels_and_follow_their_codes(
    bits, activation_bits, class_token_bits
):
    arguments = {"weight_bits": bits, "activation_bits": activation_bits, "class_token_bits": class_token_bits}
    model = make_quantized("vit", "finetune", **arguments).pack()
    images = make_batches()[0]
    before = logits(model, images)
    blocks = outermost(ran_as_one(model))
    assert len(blocks) == 2
    for block in blocks:
        job = block._job.value[0]
        attention, mlp = job.attention, job.mlp
        for product in (attention.query, attention.key, attention.value, attention.output, mlp.first, mlp.second):
            assert bool(product.ordered) == (bits <= 4)
            if class_token_bits is not None:
                # In pairs, which are for two bits of both (`csrc/pairs.h`), the class token cannot read them.
                first = product.first.contents
                assert bool(first.ordered) == (bits <= 4)
                assert (first.ordered == product.ordered) == (first.ordered_bits == product.ordered_bits)
        for layer in block.modules():
            if isinstance(layer, PackedLinear):
                codes = layer.weight_quantizer.codes
                codes.copy_(codes.flip(0))
    after = logits(model, images)
    assert not torch.equal(before, after)
    assert torch.equal(after, one_by_one(model, images))


def test_attention_maps_are_returned_to_who_asks(packed, backbone):
    images = make_batches()[0]
    expected = logits(packed, images)
    with torch.no_grad(), capture_attention(packed) as maps:
        assert torch.equal(packed(pixel_values=images).logits, expected)
    with torch.no_grad():
        outputs = packed(pixel_values=images, output_attentions=True, output_hidden_states=True)
    assert torch.equal(outputs.logits, expected)
    if backbone != "swin":
        # Swin returns them stage by stage.
        assert all(torch.equal(one, other) for one, other in zip(outputs.attentions, maps, strict=True))
    assert torch.equal(logits(packed, images), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_packed_model_that_has_run_can_be_copied(packed, copied):
    images = make_batches()[0]
    expected = logits(packed, images)
    other = copied(packed)
    assert torch.equal(logits(other, images), expected)
    with torch.no_grad():
        for parameter in packed.parameters():
            parameter.zero_()
    assert torch.equal(logits(other, images), expected)


def test_classes_of_transformers_come_back_with_floating_point(packed):
    assert all(type(module) not in PACKED_FORMS for module in packed.modules())
    model = packed.unpack()
    assert not whole_modules(model)
    assert any(type(module) in PACKED_FORMS for module in model.modules())


@needs_kernels
def test_codes_of_another_size_are_refused():
    model = make_quantized("vit", "finetune").pack()
    logits(model, make_batches()[0])
    block = model.backbone.vit.layers[0]
    # Without a batch: the layers say what they make of it, and no kernel takes tokens for images.
    with pytest.raises((ValueError, RuntimeError)), torch.no_grad():
        block.attention(torch.zeros(5, block.attention.q_proj.reads.plan_of_codes.source.numel(), dtype=torch.uint8))
    codes = torch.zeros(1, 5, 3, dtype=torch.uint8)
    for module in (block.mlp, block.attention):
        with pytest.raises(ValueError, match="the codes have 3 positions, and the layer"):
            module(codes)


@needs_kernels
@pytest.mark.parametrize("size", [(32, 32), (40, 56), (24, 24)])
def test_windows_in_one_call_are_those_of_the_layers(size):
    model = make_quantized("swin", "finetune").pack()
    images = nn.functional.interpolate(torch.cat(make_batches()), size)
    result = logits(model, images)
    assert torch.equal(result, one_by_one(model, images))
    blocks = outermost(whole_modules(model))
    assert ran_as_one(model) == blocks != []
    assert any(block.shift_size for block in blocks)


def test_an_image_of_another_size_than_its_tokens_is_refused():
    model = make_quantized("swin", "finetune").pack()
    block = model.backbone.swin.encoder.layers[0].blocks[0]
    tokens = torch.zeros(1, 64, block.layernorm_before.normalized_shape[0])
    with torch.no_grad():
        assert block(tokens, (8, 8))[0].shape == tokens.shape
        with pytest.raises(RuntimeError, match="shape"):
            block(tokens, (8, 9))
