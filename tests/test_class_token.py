"""The class token has scales, offsets and bits of its own, in the groups of the other tokens."""

import copy

import pytest
import torch
from conftest import make_batches, make_quantized

from quantformer_hf import QuantformerConfig, QuantformerForImageClassification
from quantformer_hf.backbone_layers import describe_backbone
from quantformer_hf.class_token import ClassTokenQuantizer
from quantformer_hf.expected_tensors import expected_tensors
from quantformer_hf.exporters.traceable import TraceableActivation
from quantformer_hf.inspect_checkpoint import format_report, inspect_checkpoint
from quantformer_hf.kernels import cuda, fake_quantized, instruction_set, using
from quantformer_hf.kernels.plans import TokenPlan, plan_channels, plan_weight
from quantformer_hf.layer_bits import check_same_quantization
from quantformer_hf.mixed_precision.candidates import grouped_quantizer
from quantformer_hf.mixed_precision.cost import CostModel
from quantformer_hf.mixed_precision.search_space import SearchSpace
from quantformer_hf.packed_encoder import PackedBlock
from quantformer_hf.quantize import reading_layers
from quantformer_hf.quantizers import GroupActivationQuantizer
from quantformer_hf.report import bit_operations, distinct_levels, products


TOKENS = {"vit": 1, "deit": 2}


@pytest.fixture(params=list(TOKENS))
def backbone(request):
    return request.param


def logits(model, images):
    with torch.no_grad():
        return model(pixel_values=images).logits


def quantizer_with_class_token(bits=3, class_bits=3, groups=1):
    quantizer = GroupActivationQuantizer(6, bits, "layer", calibrated=True, stage="finetune", num_groups=groups)
    ClassTokenQuantizer(quantizer, class_bits, tokens=1)
    return quantizer


def most_values(x):
    """The most distinct values of any channel of `x`, `(..., channels)`."""
    return max(len(column.unique()) for column in x.reshape(-1, x.shape[-1]).T)


def test_each_token_is_quantized_by_the_scales_that_are_its_own():
    quantizer = quantizer_with_class_token(bits=2, class_bits=3)
    with torch.no_grad():
        quantizer.class_token.scale.fill_(10)
        quantizer.class_token.offset.fill_(-5)
        got = quantizer(torch.full((2, 4, 6), 32.0))
    # 2 bits: 0 to 3 in steps of 1. 3 bits in steps of 10 from -5: 35 is the nearest of -5, 5, ..., 65.
    assert torch.equal(got[:, 1:], torch.full((2, 3, 6), 3.0))
    assert torch.equal(got[:, :1], torch.full((2, 1, 6), 35.0))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_no_token_has_more_levels_than_its_bits_allow(backbone, stage):
    model = make_quantized(backbone, stage, bit_width=3, class_token_bits=2).eval()
    seen = {}
    for quantizer in reading_layers(model):
        quantizer.register_forward_hook(lambda module, _, output: seen.__setitem__(module, output))
    images = torch.cat([*make_batches(), *(batch.flip(-1) for batch in make_batches())])
    with fake_quantized():
        logits(model, images)
    assert seen
    most = [[most_values(part) for _, part in quantizer.parts(output)] for quantizer, output in seen.items()]
    assert max(first for first, _ in most) <= 4
    assert max(others for _, others in most) <= 8
    assert distinct_levels(model, images)[1] <= 8


def test_a_class_token_of_another_range_is_met_by_calibration():
    """Where it is ten times as large as patches are, one scale for both is no good for either."""
    x = torch.randn(64, 5, 6)
    x[:, 0] *= 10

    def errors(own):
        quantizer = GroupActivationQuantizer(6, 4, "layer")
        if own:
            ClassTokenQuantizer(quantizer, 4, tokens=1)
        for part, seen in quantizer.parts(x):
            observer = part.make_observer()
            observer.add(seen)
            part.calibrate(observer.quantiles())
        for part in quantizer.with_class_token():
            part.begin_search(2)
        for part in quantizer.with_class_token():
            part.freeze_groups()
        squared = (quantizer(x) - x).square()
        return squared[:, 0].mean().item(), squared[:, 1:].mean().item()

    of_class_token, of_others = errors(own=True)
    shared_of_class_token, shared_of_others = errors(own=False)
    assert of_class_token < 0.8 * shared_of_class_token
    assert of_others < 0.1 * shared_of_others


def test_more_bits_at_the_class_token_bring_the_model_nearer_to_full_precision(backbone):
    images = torch.cat(make_batches())
    full = make_quantized(backbone, "finetune", weight_bits=8, activation_bits=8, class_token_bits=8)
    errors = [
        (logits(make_quantized(backbone, "finetune", weight_bits=8, activation_bits=8, class_token_bits=bits).eval(), images)
         - logits(full.eval(), images)).square().mean().item()
        for bits in (2, 4, 6)
    ]  # fmt: skip
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("class_bits", [3, 8])
def test_packing_changes_no_bit(backbone, class_bits, tmp_path):
    model = make_quantized(backbone, "finetune", bit_width=3, class_token_bits=class_bits).eval()
    images = make_batches()[0]
    expected = logits(model, images)
    packed = copy.deepcopy(model).pack()
    assert torch.equal(logits(packed, images), expected)
    packed.save_pretrained(tmp_path)
    assert torch.equal(logits(QuantformerForImageClassification.from_pretrained(tmp_path), images), expected)
    with using(None):
        assert torch.equal(logits(packed, images), expected)
    assert torch.equal(logits(packed.unpack().eval(), images), expected)


@pytest.mark.skipif(instruction_set() is None, reason="the kernels were not built")
@pytest.mark.parametrize("bits", [3, 8])
def test_modules_in_one_call_give_the_bits_of_their_layers(backbone, bits):
    packed = make_quantized(backbone, "finetune", bit_width=3, class_token_bits=bits).pack()
    one_by_one = copy.deepcopy(packed)
    for layer in one_by_one.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda *_: None)
    for images in (make_batches()[0], make_batches()[0][:1]):
        assert torch.equal(logits(packed, images), logits(one_by_one, images))
    assert all(module._job.value is not None for module in packed.modules() if isinstance(module, PackedBlock))


def test_reconstruction_fits_the_scales_of_the_class_token(backbone):
    model = make_quantized(backbone, "finetune", bit_width=2, class_token_bits=3)
    parts = [module for module in model.modules() if isinstance(module, ClassTokenQuantizer)]
    before = [part.scale.detach().clone() for part in parts]
    model.reconstruct(make_batches())
    moved = [not torch.equal(part.scale, scale) for part, scale in zip(parts, before, strict=True)]
    assert len(parts) == 8
    # What the first block is given does not depend on the image, and so not on quantization.
    assert sum(moved) >= 7


def test_scales_of_the_class_token_are_learned(backbone):
    model = make_quantized(backbone, "finetune", bit_width=3, class_token_bits=3).train()
    model(pixel_values=make_batches()[0]).logits.square().sum().backward()
    learned = {name: p.grad for name, p in model.named_parameters() if name.endswith("class_token.scale")}
    assert len(learned) == 8
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in learned.values())


@pytest.mark.parametrize("stage", ["pretrain", "search", "finetune", "packed"])
def test_the_tensors_of_a_checkpoint_are_those_expected(backbone, stage):
    model = make_quantized(backbone, "finetune" if stage == "packed" else stage, class_token_bits=6)
    model = copy.deepcopy(model).pack() if stage == "packed" else model
    config = model.config
    expected = expected_tensors(describe_backbone(config.backbone_config), config)
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert set(found) == set(expected)
    assert all(shape is None or found[name] == shape for name, shape in expected.items())


def test_one_assignment_serves_all_tokens(backbone):
    model = make_quantized(backbone, "search", class_token_bits=4)
    assert not any("class_token.assignment" in name for name, _ in model.named_parameters())
    frozen = copy.deepcopy(model).freeze_groups()
    for quantizer in reading_layers(frozen):
        assert torch.equal(quantizer.class_token.channel_groups(), quantizer.channel_groups())
        assert quantizer.class_token.scale.numel() == quantizer.scale.numel()


def test_its_bits_are_counted(backbone):
    image = make_batches()[0][:1]
    alike, wider = (make_quantized(backbone, "finetune", bit_width=3, class_token_bits=bits) for bits in (3, 8))
    plain = make_quantized(backbone, "finetune", bit_width=3)
    assert bit_operations(alike, image) == bit_operations(plain, image)
    per_row = sum(
        product.multiplications // product.rows
        for name, product in products(plain, image).items()
        if product.activation_bits == 3
    )
    assert bit_operations(wider, image) - bit_operations(plain, image) == TOKENS[backbone] * per_row * 3 * (8 - 3)


def test_costs_of_an_allocation_are_those_of_the_model_that_it_makes(backbone, tmp_path):
    """Budgets are kept with the class token's bits counted in."""
    full = make_quantized(backbone, "pretrain", class_token_bits=8)
    space = SearchSpace.of(full.config, (2, 3, 4))
    totals = CostModel(full.config, space).totals(space.uniform(2, 3))
    packed = make_quantized(
        backbone, "finetune", full.config.num_groups, weight_bits=2, activation_bits=3, class_token_bits=8
    )
    assert totals["BitOps"] == bit_operations(packed, make_batches()[0][:1])
    packed.pack().save_pretrained(tmp_path)
    assert totals["bytes"] == (tmp_path / "model.safetensors").stat().st_size


def test_candidates_of_an_allocation_have_the_class_tokens_bits(backbone):
    model = make_quantized(backbone, "pretrain", class_token_bits=6)
    (quantizer, readers), *_ = reading_layers(model).items()
    made = grouped_quantizer(quantizer, 2, 4, readers, twin_levels=False)
    with torch.no_grad():
        (_, first), (_, others) = made.parts(made(torch.randn(200, 5, made.channels)))
    assert most_values(others) <= 4 < most_values(first) <= 64


def test_what_is_exported_is_what_is_computed():
    quantizer = quantizer_with_class_token(bits=3, class_bits=5, groups=2)
    with torch.no_grad():
        quantizer.group_index.copy_(torch.tensor([0, 1, 1, 0, 0, 1]))
        for part in quantizer.with_class_token():
            part.scale.copy_(torch.rand(2) + 0.1)
            part.offset.copy_(torch.randn(2))
        x = 4 * torch.randn(3, 5, 6)
        assert torch.equal(TraceableActivation(quantizer)(x), quantizer(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_token_bits": 1}, "class_token_bits is 1: choose 2 to 8"),
        ({"class_token_bits": 32}, "class_token_bits is 32: choose 2 to 8"),
        ({"class_token_bits": 3, "backbone_config": {"model_type": "swin"}}, "a swin has no class token: leave it out"),
        ({"class_token_bits": 8, "activation_bits": 32}, "class_token_bits is 8, and activation_bits 32 leaves"),
        (
            {"class_token_bits": 8, "activation_bits": 32, "layer_bits": {"vit.layers.0.*": {"weight_bits": 2}}},
            "class_token_bits is 8, and activation_bits 32 leaves",
        ),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantformerConfig(**arguments)


def test_it_may_be_quantized_where_some_layers_alone_are():
    layers = {"vit.layers.0.*": {"activation_bits": 4}}
    assert QuantformerConfig(activation_bits=32, class_token_bits=8, layer_bits=layers).class_token_bits == 8


def test_a_group_that_is_empty_at_the_start_of_the_search_has_a_fitted_scale():
    quantizer = quantizer_with_class_token(bits=4, class_bits=4)
    quantizer.set_stage("pretrain", 1)
    quantizer.class_token.set_stage("pretrain", 1)
    x = 100 * torch.randn(64, 5, 6)
    for part, seen in quantizer.parts(x):
        observer = part.make_observer()
        observer.add(seen)
        part.calibrate(observer.quantiles())
    quantizer.begin_search(2)
    with torch.no_grad():
        quantizer.assignment_logits[1] = -10
        quantizer.class_token.begin_search(2)
    # 15 steps over about 600.
    assert (quantizer.class_token.scale > 10).all()


def calibrated_with_class_token(x):
    """Of a search that has just begun: two groups, of which the channels are nearly as likely."""
    quantizer = quantizer_with_class_token(bits=4, class_bits=4)
    for part, seen in quantizer.parts(x):
        part.set_stage("pretrain", 1)
        observer = part.make_observer()
        observer.add(seen)
        part.calibrate(observer.quantiles())
    quantizer.begin_search(2)
    quantizer.assignment_logits.data = 0.1 * torch.eye(2).repeat(1, 3)
    return quantizer


def test_scales_of_the_class_token_are_for_the_groups_that_remain_and_for_channels_that_count():
    x, scales = torch.randn(64, 5, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7.0), {}
    for sharp, important in ((1, False), (1000, False), (1, True)):
        quantizer = calibrated_with_class_token(x)
        quantizer.assignment_logits.data *= sharp
        importance = torch.arange(6) < 2 if important else torch.ones(6)
        quantizer.class_token.begin_search(2, importance.float())
        scales[sharp, important] = quantizer.class_token.scale.detach()
    assert torch.equal(scales[1, False], scales[1000, False])
    assert (scales[1, True] < 0.5 * scales[1, False]).all()


def test_one_description_serves_all_tokens_of_a_layer_on_cuda(monkeypatch):
    """`kernel_info()` asks why Triton may not serve them: no GPU is needed to tell that sums are too long."""
    monkeypatch.setattr(cuda, "reason_against_device", lambda device: None)
    weight = plan_weight(33026, 8, -128, 127, 0.5, torch.ones(3))
    narrow, wide = (plan_channels(33026, torch.ones(1), torch.zeros(1), None, largest) for largest in (15, 255))
    device = torch.device("cuda")
    assert cuda.reason_against(weight, TokenPlan(narrow, narrow, 1), device) is None
    assert "33028 channels" in cuda.reason_against(weight, TokenPlan(wide, narrow, 1), device)
    assert "33028 channels" in cuda.reason_against(weight, TokenPlan(narrow, wide, 1), device)


def test_plans_of_other_groups_do_not_go_together():
    plans = [plan_channels(8, torch.ones(2), torch.zeros(2), torch.arange(8) // size, 3) for size in (4, 7)]
    with pytest.raises(ValueError, match="both plans are to be made from one assignment"):
        TokenPlan(*plans, 1)


def test_a_quantized_model_keeps_its_bits():
    model = make_quantized("vit", "pretrain", class_token_bits=4)
    check_same_quantization(model.backbone, model.config, {"class_token_bits": 4}, "somewhere")
    check_same_quantization(model.backbone, model.config, {}, "somewhere")
    with pytest.raises(ValueError, match="somewhere has class_token_bits 4, and not 8: start from the full-precision"):
        check_same_quantization(model.backbone, model.config, {"class_token_bits": 8}, "somewhere")


def test_inspection_and_card_name_its_bits(tmp_path):
    make_quantized("vit", "finetune", bit_width=3, class_token_bits=6).pack().save_pretrained(tmp_path)
    assert "at the class token, the inputs of the blocks have 6." in format_report(inspect_checkpoint(tmp_path))
    assert "| their inputs at the class token, where quantized |  | 6 bits |" in (tmp_path / "README.md").read_text()


def test_plans_follow_groups_that_change():
    packed = make_quantized("vit", "finetune", class_token_bits=8).pack()
    images = make_batches()[0]
    logits(packed, images)
    for quantizer in reading_layers(packed):
        quantizer.group_index.copy_(quantizer.group_index.flip(0))
    assert torch.equal(logits(packed, images), logits(copy.deepcopy(packed), images))
    with using(None):
        assert torch.equal(logits(packed, images), logits(copy.deepcopy(packed), images))
