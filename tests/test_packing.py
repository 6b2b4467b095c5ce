"""Codes packed without waste, layers made of them, and what a packed checkpoint refuses."""

import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import IMAGE_SIZE, make_batches, make_quantized
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTImageProcessor

from quantformer_hf import QuantformerConfig, QuantformerForImageClassification, StageError
from quantformer_hf.ops import positive
from quantformer_hf.packed_layers import PackedWeight
from quantformer_hf.packing import digest, pack_codes, packed_width, unpack_codes
from quantformer_hf.quantize import weight_quantized_layers
from quantformer_hf.quantizers import WEIGHT_QUANTIZERS, build_weight_quantizer


WEIGHTS = "model.safetensors"


@torch.no_grad()
def logits(model):
    model.eval()
    return torch.cat([model(pixel_values=batch).logits for batch in make_batches()])


def assert_same_logits(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# Codes


def test_the_example_of_the_docstring():
    packed = pack_codes(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]]), bits=3)
    assert packed.tolist() == [[0xD1, 0x58, 0x1F]]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 13, 64])
def test_packed_codes_come_back_and_waste_nothing(bits, columns):
    codes = torch.randint(0, 2**bits, (5, columns), generator=torch.Generator().manual_seed(bits))
    packed = pack_codes(codes, bits)
    assert packed.shape == (5, packed_width(columns, bits))
    assert 8 * packed.shape[1] - columns * bits < 8
    assert torch.equal(unpack_codes(packed, bits, columns), codes.to(torch.uint8))
    assert torch.equal(pack_codes(codes.to(torch.uint8), bits), packed)


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="codes from 0 to 4 do not fit into 2 bits"):
        pack_codes(torch.tensor([[0, 4]]), bits=2)
    with pytest.raises(ValueError, match="codes from -1 to 3 do not fit into 2 bits"):
        pack_codes(torch.tensor([[-1, 3]]), bits=2)


def test_a_digest_is_of_names_dtypes_shapes_and_contents_in_any_order():
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.uint8)}
    expected = digest(["a", "b"], tensors.__getitem__, "context")
    assert torch.equal(digest(["b", "a"], tensors.__getitem__, "context"), expected)
    others = {"a": tensors["a"].view(3, 2)}, {"a": tensors["a"].view(torch.int32)}, {"b": 1 - tensors["b"]}
    made = [digest(["a", "b"], (tensors | other).__getitem__, "context") for other in others]
    made += [digest(["a"], tensors.__getitem__, "context"), digest(["a", "b"], tensors.__getitem__, "another")]
    assert not any(torch.equal(other, expected) for other in made)


# Models


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_packed_logits_equal_fake_quantized_logits(backbone, bits, tmp_path):
    model = make_quantized(backbone, "finetune", weight_bits=bits, activation_bits=max(2, bits))
    expected = logits(model)
    assert_same_logits(logits(model.pack()), expected)
    model.save_pretrained(tmp_path)
    assert_same_logits(logits(AutoModelForImageClassification.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("weight_quantizer", ["lsq", "lsq_shifted", "statsq", "minmax"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_an_unpacked_model_emits_the_same_logits_and_trains(weight_quantizer, bits):
    model = make_quantized("swin", "finetune", weight_bits=bits, weight_quantizer=weight_quantizer)
    names = list(model.state_dict())
    expected = logits(model)
    model.pack().unpack()
    assert model.config.stage == "finetune"
    assert list(model.state_dict()) == names
    assert_same_logits(logits(model), expected)
    model.train()(make_batches()[0], labels=torch.zeros(len(make_batches()[0]), dtype=torch.long)).loss.backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in weight_quantized_layers(model))


def test_no_floating_point_copy_of_a_quantized_weight_remains():
    model = make_quantized("vit", "finetune", weight_bits=3)
    packed_bytes = sum(
        layer.weight.shape[0] * packed_width(layer.weight[0].numel(), layer.weight_quantizer.grid.bits)
        for layer in weight_quantized_layers(model)
    )
    shapes = {layer.weight.shape for layer in weight_quantized_layers(model)}
    model.pack()
    tensors = list(model.state_dict().values())
    assert not any(tensor.is_floating_point() and tensor.shape in shapes for tensor in tensors)
    codes = [module.codes for module in model.modules() if isinstance(module, PackedWeight)]
    assert sum(code.numel() for code in codes) == packed_bytes


def test_one_other_code_changes_the_logits():
    model = make_quantized("vit", "finetune").pack()
    expected = logits(model)
    next(module for module in model.modules() if isinstance(module, PackedWeight)).codes[0, 0] ^= 0x80
    assert not torch.allclose(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_half_precision_and_shards_load(tmp_path):
    model = make_quantized("swin", "finetune").pack()
    # What the config of a full-precision checkpoint says, and no one else's dtype.
    model.config.backbone_config.dtype = "float32"
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_logits(logits(AutoModelForImageClassification.from_pretrained(tmp_path)), logits(model))
    half = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(make_batches()[0].bfloat16()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("stage", ["pretrain", "search"])
def test_packing_needs_frozen_groups(stage):
    with pytest.raises(StageError, match=r"freeze_groups\(\) first"):
        make_quantized(stage=stage).pack()


def test_verbs_of_other_stages_say_so():
    model = make_quantized(stage="finetune")
    with pytest.raises(StageError, match="there is nothing to unpack"):
        model.unpack()
    model.pack()
    with pytest.raises(StageError, match="it is packed already"):
        model.pack()
    with pytest.raises(StageError, match=r"run model\.unpack\(\) first"):
        model.reconstruct(make_batches())


# Files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    model = make_quantized("vit", "finetune", weight_bits=3).pack()
    model.save_pretrained(folder)
    return folder, logits(model)


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def load(folder):
    return QuantformerForImageClassification.from_pretrained(folder)


def rewrite(folder, **tensors):
    """The file with some tensors replaced, and the digest as it was."""
    content = load_file(folder / WEIGHTS)
    content.update(tensors)
    save_file(
        {name: tensor for name, tensor in content.items() if tensor is not None}, folder / WEIGHTS, {"format": "pt"}
    )


def test_a_damaged_file_is_an_error_or_the_same_model(saved, tmp_path):
    content = (saved[0] / WEIGHTS).read_bytes()
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    draw = random.Random(0)
    refused = 0
    for trial in range(2000):
        damaged = bytearray(content)
        if trial % 4 == 0:
            del damaged[draw.randrange(len(damaged)) :]
        else:
            # Half of the flips in the header, which is short and where most can go wrong.
            end = 8 + int.from_bytes(content[:8], "little") if trial % 2 else len(damaged)
            damaged[draw.randrange(end)] ^= 1 << draw.randrange(8)
        (tmp_path / WEIGHTS).write_bytes(damaged)
        try:
            model = load(tmp_path)
        except ValueError:
            refused += 1
        else:
            assert_same_logits(logits(model), saved[1])
    assert refused > 1500


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_bits": 4}, "does not fit its config"),
        ({"num_groups": 3}, "does not fit its config"),
        ({"weight_quantizer": "statsq"}, "or one of weight_quantizer, twin_levels, whole_multiples,.* are not those"),
        ({"twin_levels": False}, "is damaged"),
        ({"whole_multiples": False}, "is damaged"),
        ({"backbone_config": {"num_attention_heads": 4}}, "is damaged"),
        ({"backbone_config": {"hidden_act": "relu"}}, "is damaged"),
        ({"backbone_config": {"layer_norm_eps": 1e-5}}, "is damaged"),
        ({"backbone_config": {"patch_size": 2, "num_channels": 12, "image_size": 8}}, "is damaged"),
        ({"packing_layout": 7}, "packing_layout is 7, and this version of quantformer_hf reads 1"),
    ],
)
def test_a_config_that_claims_something_else_is_refused(copy, change, message):
    config = json.loads((copy / "config.json").read_text())
    for name, value in change.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(copy)


def test_a_missing_tensor_and_a_missing_file_are_refused(copy):
    rewrite(copy, **{"backbone.classifier.bias": None})
    with pytest.raises(ValueError, match="is damaged"):
        load(copy)
    (copy / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"has no {WEIGHTS}"):
        load(copy)


def test_a_group_that_there_is_not_is_refused(tmp_path):
    model = make_quantized("vit", "finetune").pack()
    name = next(name for name in model.state_dict() if name.endswith("group_index"))
    model.state_dict()[name][0] = 200
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a channel in group 200, and only 4 groups"):
        load(tmp_path)


def test_images_of_another_size_run(saved):
    images = torch.zeros(1, 3, 2 * IMAGE_SIZE, 2 * IMAGE_SIZE)
    assert load(saved[0])(images, interpolate_pos_encoding=True).logits.isfinite().all()


def test_a_crash_while_saving_leaves_the_old_checkpoint(copy, saved, monkeypatch):
    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    model = make_quantized("vit", "finetune", weight_bits=2).pack()
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    monkeypatch.setattr("quantformer_hf.checkpointing.flush_tree", crash)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert_same_logits(logits(load(copy)), saved[1])


def test_a_model_in_one_file_replaces_one_in_shards(tmp_path):
    model = make_quantized("vit", "finetune")
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    model.pack().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == [WEIGHTS]
    load(tmp_path)


# Not `ru_maxrss`: a process inherits that of the one that starts it, here pytest with all that it has loaded.
MEMORY = """
import sys
from pathlib import Path
from quantformer_hf import QuantformerForImageClassification

def peak():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

QuantformerForImageClassification.from_pretrained(sys.argv[2])
before = peak()
model = QuantformerForImageClassification.from_pretrained(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.slow
def test_loading_a_packed_base_model_allocates_no_full_precision_weights(saved, tmp_path):
    backbone = ViTConfig(num_labels=1000)
    config = QuantformerConfig(backbone_config=backbone, stage="packed", packing_layout=1, calibrated=True)
    model = QuantformerForImageClassification(config)
    full_precision_bytes = 4 * 86_567_656
    model.save_pretrained(tmp_path)
    size = (tmp_path / WEIGHTS).stat().st_size
    assert size < full_precision_bytes / 7
    # A small one first: what importing and loading take in any case is no part of the difference.
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path, saved[0]], capture_output=True, text=True, check=True
    )
    print(f"{size} bytes in the file, {done.stdout.strip()} in memory")
    assert size / 2 < int(done.stdout) < 3 * size < full_precision_bytes / 2


def test_the_image_processor_travels_along(copy, tmp_path):
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(copy)
    load(copy).unpack().pack().save_pretrained(tmp_path / "again")
    assert AutoImageProcessor.from_pretrained(tmp_path / "again").size["height"] == 16


def test_only_the_models_own_files_are_replaced(tmp_path):
    for name in ("adapter.safetensors", "model.fp16.safetensors"):
        (tmp_path / name).write_bytes(b"somebody's")
    make_quantized("vit", "finetune").save_pretrained(tmp_path)
    assert (tmp_path / "adapter.safetensors").exists()
    assert (tmp_path / "model.fp16.safetensors").exists()


@pytest.mark.parametrize("labels", [3, 9])
def test_a_quantized_checkpoint_gets_a_new_classifier(backbone, labels, tmp_path):
    model = make_quantized(backbone, "finetune")
    model.save_pretrained(tmp_path)
    names = {index: str(index) for index in range(labels)}
    classes = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    new = QuantformerForImageClassification.from_pretrained(tmp_path, **classes, ignore_mismatched_sizes=True)
    assert logits(new).shape[1] == labels
    # Its weights are not all rounded to zero.
    assert logits(new).std(0).min() > 0
    new.save_pretrained(tmp_path)
    assert_same_logits(logits(load(tmp_path)), logits(new))
    model.pack().save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="is packed, and a new classifier has to be trained"):
        QuantformerForImageClassification.from_pretrained(tmp_path / "packed", **classes, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("weight_quantizer", ["statsq", "minmax"])
def test_what_would_round_to_other_codes_is_not_unpacked(weight_quantizer):
    model = make_quantized("vit", "finetune", weight_quantizer=weight_quantizer).bfloat16().pack()
    images = make_batches(1)[0].bfloat16()
    with torch.no_grad():
        before = model(images).logits
        with pytest.raises(ValueError, match=r"cannot be unpacked in torch.bfloat16.*run model.float\(\) first"):
            model.unpack()
        assert model.config.stage == "packed"
        assert torch.equal(model(images).logits, before)
        model.float()
        packed = model(images.float()).logits
        assert torch.equal(model.unpack()(images.float()).logits, packed)


def test_every_weight_quantizer_says_what_its_scales_are():
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    for kind in WEIGHT_QUANTIZERS:
        quantizer = build_weight_quantizer(kind, 3, 6)
        quantizer.calibrate(weight)
        packed = PackedWeight(3, weight.shape, quantizer.shift)
        packed.fill(weight, quantizer)
        torch.testing.assert_close(packed.step().detach(), positive(quantizer.step(weight)).detach())
        assert torch.equal(packed.integers(), quantizer.integers(weight))
