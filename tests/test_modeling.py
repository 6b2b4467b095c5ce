"""The five verbs, round trips, and what a quantized model emits."""

import copy

import pytest
import torch
from conftest import IMAGE_SIZE, NUM_LABELS, make_batches, make_full_precision, make_quantized
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
)

from quantformer_hf import QuantformerConfig, QuantformerForImageClassification
from quantformer_hf.attention import attention_modules, capture_attention
from quantformer_hf.kernels import fake_quantized
from quantformer_hf.layers import QuantConv2d, QuantLayerNorm, QuantLinear
from quantformer_hf.ops import attention as attention_ops
from quantformer_hf.quantize import (
    activation_quantizers,
    bit_widths,
    group_quantizers,
    weight_quantized_layers,
)
from quantformer_hf.quantizers import GroupActivationQuantizer


LEAVE_ALONE = {
    "weight_bits": 32,
    "activation_bits": 32,
    "attention_bits": None,
    "embedding_bits": 32,
    "classifier_bits": 32,
}


def logits(model, batch):
    with torch.no_grad():
        return model(batch).logits


# From full precision


def test_with_32_bits_everywhere_the_logits_are_the_full_precision_ones(backbone):
    full_precision, batch = make_full_precision(backbone), make_batches(1)[0]
    quantized = QuantformerForImageClassification.from_full_precision(full_precision, **LEAVE_ALONE).eval()
    torch.testing.assert_close(logits(quantized, batch), logits(full_precision, batch), rtol=1e-5, atol=1e-5)


def test_eight_bits_are_close_to_full_precision(backbone):
    full_precision, batch = make_full_precision(backbone), make_batches(1)[0]
    exact = logits(full_precision, batch)
    error = logits(make_quantized(backbone, bit_width=8), batch) - exact
    # These random weights amplify rounding; a trained model loses far less.
    assert error.std() < 0.1 * exact.std()


def test_the_full_precision_model_is_copied_and_not_touched():
    full_precision = make_full_precision()
    before = {name: tensor.clone() for name, tensor in full_precision.state_dict().items()}
    quantized = QuantformerForImageClassification.from_full_precision(full_precision)
    with torch.no_grad():
        for parameter in quantized.parameters():
            parameter.add_(1)
    after = full_precision.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("training", [True, False])
def test_a_quantized_copy_is_in_the_mode_of_its_model(training):
    model = QuantformerForImageClassification.from_full_precision(make_full_precision("swin").train(training))
    assert all(module.training == training for module in model.modules())


def test_from_a_folder_and_remembers_it(tmp_path):
    full_precision, batch = make_full_precision("deit-distilled"), make_batches(1)[0]
    full_precision.save_pretrained(tmp_path)
    quantized = QuantformerForImageClassification.from_full_precision(str(tmp_path), **LEAVE_ALONE)
    assert not quantized.training
    assert quantized.config.full_precision_name_or_path == str(tmp_path)
    torch.testing.assert_close(logits(quantized, batch), logits(full_precision, batch), rtol=1e-5, atol=1e-5)


def test_a_new_classifier_where_the_classes_differ(tmp_path):
    make_full_precision().save_pretrained(tmp_path)
    quantized = QuantformerForImageClassification.from_full_precision(
        str(tmp_path), num_labels=3, ignore_mismatched_sizes=True
    )
    assert quantized.config.num_labels == quantized.config.backbone_config.num_labels == 3
    assert quantized.backbone.classifier.out_features == 3


# What is quantized


def test_what_the_design_says_is_quantized_is(backbone):
    model = make_quantized(
        backbone, weight_bits=3, activation_bits=5, attention_bits=7, embedding_bits=6, classifier_bits=8
    )
    linears = {name: module for name, module in model.backbone.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, linear in linears.items():
        assert isinstance(linear, QuantLinear), name
        assert linear.weight_quantizer.grid.bits == (8 if "classifier" in name else 3)
    assert all(quantizer.grid.bits == 5 for quantizer in group_quantizers(model))
    # One quantizer for q, k and v; one each for the output projection, fc1 and fc2; one a patch merging.
    blocks = len(attention_modules(model))
    assert len(group_quantizers(model)) == 4 * blocks + (1 if backbone == "swin" else 0)
    for module in attention_modules(model):
        assert all(projection.input_quantizer is None for projection in (module.q_proj, module.k_proj, module.v_proj))
        assert all(quantizer.grid.bits == 7 for quantizer in activation_quantizers(module.operands))
    convolution = next(module for module in model.modules() if isinstance(module, QuantConv2d))
    assert convolution.weight_quantizer.grid.bits == convolution.input_quantizer.grid.bits == 6
    classifiers = [linear for name, linear in linears.items() if "classifier" in name]
    assert len(classifiers) == (2 if backbone == "deit-distilled" else 1)
    assert all(classifier.input_quantizer.grid.bits == 8 for classifier in classifiers)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_never_more_than_two_to_the_bits_values_reach_a_product(backbone, stage, bits, monkeypatch):
    model = make_quantized(backbone, stage, bit_width=bits, attention_bits=bits)
    seen = []

    def count(module, arguments, output):
        if not isinstance(module, GroupActivationQuantizer):
            assert output.unique().numel() <= 2**module.grid.bits
        elif module.stage != "search":
            groups = module.group_index if module.stage == "finetune" else torch.zeros(module.channels)
            for group in groups.unique():
                assert output[..., groups == group].unique().numel() <= 2**bits
        seen.append(module)

    operands = {q for module in attention_modules(model) for q in activation_quantizers(module.operands)}
    for quantizer in set(activation_quantizers(model)) - operands:
        quantizer.register_forward_hook(count)
    products, original = [], attention_ops._quantize

    def count_operand(*arguments):
        result = original(*arguments)
        assert result.unique().numel() <= 2**bits
        products.append(result)
        return result

    monkeypatch.setattr(attention_ops, "_quantize", count_operand)
    with fake_quantized():
        logits(model, make_batches(1)[0])
    assert set(seen) == set(activation_quantizers(model)) - operands
    assert len(products) == len(operands)
    for layer in weight_quantized_layers(model):
        for row in layer.weight_quantizer(layer.weight):
            assert row.unique().numel() <= 2**layer.weight_quantizer.grid.bits


def test_what_a_swin_block_pads_is_quantized_after_the_padding():
    model = make_quantized("swin", bit_width=2)
    attention = attention_modules(model)[0]
    inputs = []
    attention.q_proj.register_forward_hook(lambda module, arguments, output: inputs.append(arguments[0]))
    logits(model, make_batches(1)[0])
    # Nine windows of 3x3 cover the 8x8 patches of each of the four images, padded with zeros.
    assert inputs[0].shape[:2] == (4 * 9, 9)
    assert inputs[0].unique().numel() <= 4


def test_q_k_and_v_read_one_quantized_tensor():
    model = make_quantized("vit")
    attention = attention_modules(model)[0]
    inputs = []
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.register_forward_hook(lambda module, arguments, output: inputs.append(arguments[0].data_ptr()))
    logits(model, make_batches(1)[0])
    assert len(inputs) == 3
    assert len(set(inputs)) == 1
    assert isinstance(model.backbone.vit.layers[0].layernorm_before, QuantLayerNorm)


def test_layer_bits_override_by_name_and_pattern_and_the_last_wins():
    model = make_quantized(
        bit_width=4,
        layer_bits={"vit.layers.0.*": 8, "vit.layers.0.mlp.fc1": {"weight_bits": 2}, "classifier": 32},
    )
    widths = bit_widths(model.backbone)
    assert widths["vit.layers.0.mlp.fc1.weight_quantizer"] == 2
    assert widths["vit.layers.0.layernorm_after.output_quantizer"] == 8
    assert widths["vit.layers.0.mlp.fc2.weight_quantizer"] == 8
    assert widths["vit.layers.1.mlp.fc2.weight_quantizer"] == 4
    assert type(model.backbone.classifier) is torch.nn.Linear


def test_one_bit_weights(backbone):
    model = make_quantized(backbone, weight_bits=1)
    assert logits(model, make_batches(1)[0]).isfinite().all()


def test_a_longer_name_wins_over_bit_width():
    config = QuantformerConfig(bit_width=3, activation_bits=6)
    assert (config.weight_bits, config.activation_bits) == (3, 6)


# Calibration and search


def test_calibration_takes_tensors_and_dictionaries_and_is_deterministic():
    batches = make_batches()
    models = []
    for given in (batches, [{"pixel_values": batch, "labels": None} for batch in batches], iter(batches)):
        model = QuantformerForImageClassification.from_full_precision(make_full_precision())
        models.append(model.calibrate(given))
    state = models[0].state_dict()
    for other in models[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in other.state_dict().items())


def test_begin_search_with_batches_looks_at_the_ranges_anew():
    scales = []
    for batches in (None, make_batches()):
        model = make_quantized()
        norm = model.backbone.vit.layers[0].layernorm_before
        with torch.no_grad():
            norm.weight.mul_(5)
            norm.bias.mul_(5)
        model.begin_search(2, batches)
        scales.append(norm.output_quantizer.scale)
    torch.testing.assert_close(scales[1], 5 * scales[0], rtol=0.1, atol=0)


def test_captured_maps_are_the_models_own_attention(backbone):
    full_precision = make_full_precision(backbone)
    full_precision.set_attn_implementation("quantformer")
    batch = make_batches(1)[0]
    with torch.no_grad(), capture_attention(full_precision) as maps:
        full_precision(batch)
    assert len(maps) == len(attention_modules(full_precision))
    for attention in maps:
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    if backbone != "swin":
        full_precision.set_attn_implementation("eager")
        reference = full_precision(batch, output_attentions=True).attentions
        for ours, theirs in zip(maps, reference, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_capture_without_a_forward_pass_is_an_error():
    message = "0 attention maps were captured from 2 attention blocks"
    with pytest.raises(RuntimeError, match=message), capture_attention(make_quantized()):
        pass


def test_other_image_sizes_run_with_interpolated_positions():
    model = make_quantized("vit")
    with torch.no_grad():
        assert model(torch.randn(1, 3, 24, 24), interpolate_pos_encoding=True).logits.shape == (1, NUM_LABELS)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_bits": 9}, "weight_bits is 9: choose 1 to 8"),
        ({"weight_bits": 0}, "weight_bits is 0"),
        ({"activation_bits": 1}, r"activation_bits is 1: choose 2 to 8 \(1 bit is for weights only\)"),
        ({"bit_width": 16}, "weight_bits is 16"),
        ({"attention_bits": 1}, "attention_bits is 1"),
        ({"layer_bits": [1]}, r"layer_bits is \[1\]: give a dictionary, or pairs"),
        ({"layer_bits": {"classifier": 12}}, r"layer_bits\['classifier'\] is 12"),
        ({"layer_bits": {"classifier": {"bits": 4}}}, "has the key 'bits': choose from weight_bits, activation_bits"),
        ({"layer_bits": {"vit.layers.7.mlp.fc1": 4}}, "matches no layer: did you mean 'vit.layers"),
        ({"layer_bits": {"*.q_proj": {"attention_bits": 6}}}, r"'\*\.q_proj', which matches no attention block"),
        ({"layer_bits": {"*.attention": {"attention_bits": 1}}}, r"\['attention_bits'\] is 1: choose 2 to 8"),
        ({"layer_bits": {"*.q_proj": {"activation_bits": 8}}}, "read the same tensor, which is quantized once"),
        ({"num_groups": 0}, "num_groups is 0"),
        ({"num_groups": 48}, r"num_groups is 48, but layer 'vit\.layers\.0.*has only 32 channels"),
        (
            {"weight_quantizer": "lsqq"},
            "weight_quantizer is 'lsqq': choose one of lsq_by_width, auto, lsq, lsq_shifted, statsq, minmax",
        ),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantformerForImageClassification.from_full_precision(make_full_precision(), **arguments)


def test_unknown_quantization_argument_names_the_nearest():
    with pytest.raises(TypeError, match="unknown quantization argument 'bitwidth': did you mean 'bit_width'"):
        QuantformerForImageClassification.from_full_precision(make_full_precision(), bitwidth=4)
    # Among those for the loading of a checkpoint, too.
    with pytest.raises(TypeError, match="unknown argument 'bitwidth': did you mean 'bit_width'"):
        QuantformerForImageClassification.from_full_precision("user/model", bitwidth=4)


def test_other_architectures_are_refused():
    resnet = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=2))
    with pytest.raises(TypeError, match=r"ResNetForImageClassification is not supported.*vit, deit, swin"):
        QuantformerForImageClassification.from_full_precision(resnet)
    # As models of timm are, which have no config.
    with pytest.raises(TypeError, match=r"Linear is not supported.*or the name of a model of timm"):
        QuantformerForImageClassification.from_full_precision(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="quantized already"):
        QuantformerForImageClassification.from_full_precision(make_quantized())


def test_more_groups_than_channels_at_the_search():
    with pytest.raises(ValueError, match="has only 32 channels"):
        make_quantized().begin_search(33)


@pytest.mark.parametrize("number", [0, -1, 256, 2.5, True, "4"])
def test_what_is_no_number_of_groups_at_the_search(number):
    model = make_quantized()
    with pytest.raises(ValueError, match=f"num_groups is {number!r}: choose an int from 1 to 255"):
        model.begin_search(number)
    assert model.config.stage == "pretrain"


def test_verbs_out_of_order_say_which_one_is_missing():
    fresh = QuantformerForImageClassification.from_full_precision(make_full_precision())
    with pytest.raises(RuntimeError, match=r"run model\.calibrate\(batches\) first"):
        fresh.begin_search(4)
    with pytest.raises(RuntimeError, match=r"the model is in 'pretrain': run model\.begin_search\(\) first"):
        fresh.freeze_groups()
    searching = make_quantized(stage="search")
    with pytest.raises(RuntimeError, match="the search has begun already"):
        searching.begin_search(4)
    with pytest.raises(RuntimeError, match=r"calibrate\(\) comes before that"):
        searching.calibrate(make_batches())
    with pytest.raises(RuntimeError, match="the groups are frozen already"):
        make_quantized(stage="finetune").freeze_groups()


def test_calibration_that_reaches_no_layer_names_it_and_changes_nothing():
    model = QuantformerForImageClassification.from_full_precision(make_full_precision())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"layer 'vit\..*' cannot be calibrated: no calibration batch reached it"):
        model.calibrate([])
    with pytest.raises(RuntimeError, match="its input is not finite"):
        model.calibrate([make_batches(1)[0] * float("nan")])
    with pytest.raises(TypeError, match="a calibration batch is a list"):
        model.calibrate([[1, 2]])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.config.calibrated


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_has_no_class(backbone, stage, value):
    model, images = make_quantized(backbone, stage), make_batches(1)[0]
    with torch.no_grad():
        expected = model(images).logits
        images[1, 0, 3, 4] = value
        logits = model(images).logits
    assert logits[1].isnan().all()
    assert torch.equal(logits[[0, 2, 3]], expected[[0, 2, 3]])
    if stage == "finetune":
        with torch.no_grad():
            assert model.pack()(images).logits[1].isnan().all()


@pytest.mark.parametrize("packed", [False, True])
def test_images_may_be_bytes(packed):
    model = make_quantized("vit", "finetune")
    model = model.pack() if packed else model
    images = torch.randint(256, (2, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(model(images).logits, model(images.float()).logits)


def test_logits_may_be_on_another_device_than_images():
    model = make_quantized("vit", "finetune")
    hook = model.backbone.classifier.register_forward_hook(lambda module, arguments, output: output.to("meta"))
    with torch.no_grad():
        assert model(make_batches(1)[0]).logits.shape == (4, NUM_LABELS)
    hook.remove()


def test_labels_outside_the_classes_are_named():
    with pytest.raises(ValueError, match=r"label 7 is outside 0\.\.4"):
        make_quantized()(make_batches(1)[0], labels=torch.tensor([0, 1, 7, 2]))


def test_an_unpacked_model_is_in_the_mode_that_the_packed_one_was_in():
    model = make_quantized("vit", "finetune").pack()
    for training in (False, True):
        unpacked = copy.deepcopy(model).train(training).unpack()
        assert all(module.training == training for module in unpacked.modules())


def test_a_reconstructed_model_is_in_the_mode_that_it_was_in():
    for training in (True, False):
        assert make_quantized("vit").train(training).reconstruct(make_batches(1)).training == training


@pytest.mark.parametrize(("given", "said"), [({}, "missing"), ({"pixel_values": "a.png"}, "a str")])
def test_a_call_without_images_says_what_is_missing(given, said):
    for model in (make_quantized(), make_quantized("vit", "finetune").pack()):
        with pytest.raises(TypeError, match=f"pixel_values is {said}: give a tensor"):
            model(**given)
