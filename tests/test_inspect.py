"""`python -m quantformer_hf inspect`: the files say what the model says, and damage is named."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import BACKBONES, make_full_precision, make_quantized
from safetensors.torch import load_file, save_file
from torch import nn

from quantformer_hf import QuantformerConfig, QuantformerForImageClassification
from quantformer_hf.__main__ import main
from quantformer_hf.backbone_layers import describe_backbone
from quantformer_hf.configuration_quantformer import STAGES
from quantformer_hf.expected_tensors import expected_tensors, layer_bits, quantizer_bits
from quantformer_hf.inspect_checkpoint import format_report, inspect_checkpoint
from quantformer_hf.layer_bits import resolve_layer_bits
from quantformer_hf.quantize import bit_widths
from quantformer_hf.quantizers import WEIGHT_QUANTIZERS
from quantformer_hf.report import weights_on_disk


OVERRIDES = {
    "*.mlp.fc1": {"weight_bits": 2},
    "*.attention.o_proj": 32,
    "*.0.attention": {"attention_bits": 5},
}


def build(backbone, stage, **arguments):
    """A model with the tensors of `stage`, as initialised."""
    if stage == "packed":
        return build(backbone, "finetune", **arguments).pack()
    backbone_config = make_full_precision(backbone).config
    backbone_config.architectures = [BACKBONES[backbone]().__class__.__name__]
    config = QuantformerConfig(backbone_config=backbone_config, stage=stage, num_groups=4, **arguments)
    return QuantformerForImageClassification(config)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def checkpoint(tmp_path):
    make_quantized("vit", "finetune").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("weight_quantizer", WEIGHT_QUANTIZERS)
def test_expected_tensors_are_those_of_the_model(backbone, stage, weight_quantizer):
    for arguments in ({}, {"layer_bits": OVERRIDES, "attention_bits": None}, {"weight_bits": 1}, {"weight_bits": 2}):
        model = build(backbone, stage, weight_quantizer=weight_quantizer, **arguments)
        parts = describe_backbone(model.config.backbone_config)
        expected, found = expected_tensors(parts, model.config), model.state_dict()
        assert expected.keys() == found.keys()
        for name, shape in expected.items():
            assert shape is None or shape == tuple(found[name].shape), name
        assert layer_bits(parts, model.config) == resolve_layer_bits(model.backbone, model.config)
        assert quantizer_bits(parts, model.config) == bit_widths(model.backbone)


def test_the_report_is_that_of_the_model(tmp_path, backbone, stage):
    model = make_quantized(backbone, stage, weight_bits=3, activation_bits=4)
    model.save_pretrained(tmp_path)
    report = inspect_checkpoint(tmp_path)
    assert report.file_bytes == weights_on_disk(tmp_path)
    full = sum(parameter.numel() for parameter in make_full_precision(backbone).parameters())
    assert report.full_precision_bytes == 4 * full
    assert not report.unexpected
    rows = {row.name: row for row in report.layers}
    for name, module in model.backbone.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            row = rows.pop(name)
            assert row.weight_bits == module.weight_quantizer.grid.bits
            scale = module.weight_quantizer.scale
            assert row.scales == (scale.min().item(), scale.max().item())
            assert sum(row.channels) == module.weight[0].numel()
            assert len(row.channels) == (4 if stage != "pretrain" and row.weight_bits == 3 else 1)
    assert all(row.weight_bits is None and row.input_bits == 8 for row in rows.values())
    assert len(rows) == len(model.concentration_degree)


def test_channels_in_each_group_are_counted_by_hand(checkpoint):
    quantizer = "backbone.vit.layers.0.mlp.fc2.input_quantizer"
    index = load_file(checkpoint / "model.safetensors")[f"{quantizer}.group_index"]
    (row,) = [row for row in inspect_checkpoint(checkpoint).layers if row.name == "vit.layers.0.mlp.fc2"]
    assert row.channels == tuple((index == group).sum().item() for group in range(4))


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
def test_a_packed_file_is_measured_against_its_ideal(tmp_path, backbone, bits):
    model = build(backbone, "finetune", weight_bits=bits)
    model.save_pretrained(tmp_path)
    unpacked = inspect_checkpoint(tmp_path)
    model.pack().save_pretrained(tmp_path)
    report = inspect_checkpoint(tmp_path)
    assert report.file_bytes == weights_on_disk(tmp_path) < unpacked.file_bytes
    assert report.full_precision_bytes == unpacked.full_precision_bytes
    assert not report.unexpected
    # The widths of these layers leave no byte half used: only the headers are over the ideal.
    assert report.file_bytes - report.header_bytes == report.ideal_bytes
    assert "until they are packed" not in format_report(report)


def test_sharded_files_are_read_through_the_index(tmp_path, checkpoint):
    model = make_quantized("vit", "finetune")
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert inspect_checkpoint(sharded).layers == inspect_checkpoint(checkpoint).layers
    next(sharded.glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="copy all shards"):
        inspect_checkpoint(sharded)


def test_the_command_prints_a_table(checkpoint, capsys):
    main(["inspect", str(checkpoint)])
    printed = capsys.readouterr().out
    for text in ("vit.layers.1.mlp.fc2", "channels in each group", "full precision", "until they are packed"):
        assert text in printed


@pytest.mark.slow
def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    command = [sys.executable, "-m", "quantformer_hf", "inspect", tmp_path / "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("FileNotFoundError: ")
    assert "Traceback" not in done.stderr


def test_missing_folders_and_foreign_checkpoints_are_named(tmp_path, checkpoint):
    with pytest.raises(SystemExit, match="does not exist"):
        main(["inspect", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="is a file"):
        main(["inspect", str(checkpoint / "model.safetensors")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        inspect_checkpoint(tmp_path / "empty")
    BACKBONES["vit"]().save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="model_type is 'vit'"):
        inspect_checkpoint(tmp_path / "full")
    edit_config(checkpoint, stage="later")
    with pytest.raises(ValueError, match="stage is 'later'"):
        inspect_checkpoint(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        inspect_checkpoint(checkpoint)


def test_a_truncated_file_is_named(checkpoint):
    path = checkpoint / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            inspect_checkpoint(checkpoint)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        inspect_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_bits": 3}, "was quantized with .* and its config says"),
        ({"activation_bits": 5}, "was quantized with"),
        ({"attention_bits": None}, "bit_widths"),
        ({"num_groups": 3}, r"has the shape \(4,\), and by the config \(3,\)"),
        ({"stage": "search"}, "lacks tensors that its config names: .*assignment_logits"),
        ({"stage": "packed", "packing_layout": 1}, "lacks tensors that its config names: .*codes"),
        ({"stage": "packed", "packing_layout": 99}, "packing_layout is 99"),
        ({"weight_quantizer": "minmax"}, None),
    ],
)
def test_a_config_that_contradicts_the_file_is_named(checkpoint, changes, message):
    edit_config(checkpoint, **changes)
    if message is None:
        assert "weight_quantizer.scale" in inspect_checkpoint(checkpoint).unexpected[0]
        return
    with pytest.raises(ValueError, match=message):
        inspect_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("changes", "of_backbone"),
    [
        ({"weight_bits": "four"}, {}),
        ({"id2label": ["cat", "dog"]}, {}),
        ({"layer_bits": 4}, {}),
        ({"backbone_config": "vit"}, {}),
        ({}, {"patch_size": 0}),
        ({}, {"patch_size": None}),
        ({}, {"hidden_size": "wide"}),
        ({}, {"image_size": [16, 16, 16]}),
    ],
)
def test_a_config_that_describes_no_model_is_named(checkpoint, changes, of_backbone):
    config = json.loads((checkpoint / "config.json").read_text())
    edit_config(checkpoint, **({"backbone_config": config["backbone_config"] | of_backbone} | changes))
    with pytest.raises(ValueError, match=r"config\.json describes no model \(.+\): restore the one that was saved"):
        inspect_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.zeros(32), r"layernorm_before\.output_quantizer\.group_index' holds float32, and no groups"),
        (torch.full((32,), -1, dtype=torch.int8), r"group_index' names the group -1, and there are 4"),
    ],
)
def test_what_is_no_group_is_named(checkpoint, index, message):
    name = "backbone.vit.layers.0.layernorm_before.output_quantizer.group_index"
    edit_tensors(checkpoint, lambda tensors: tensors.update({name: index}))
    with pytest.raises(ValueError, match=message):
        inspect_checkpoint(checkpoint)


def test_packed_codes_of_other_bits_than_the_config_says_are_named(tmp_path):
    build("vit", "finetune", weight_bits=3).pack().save_pretrained(tmp_path)
    edit_config(tmp_path, weight_bits=4)
    with pytest.raises(
        ValueError, match=r"q_proj\.weight_quantizer\.codes' has the shape \(32, 12\), and by .* \(32, 16\)"
    ):
        inspect_checkpoint(tmp_path)


def test_values_that_cannot_be_are_named(checkpoint):
    quantizer = "backbone.vit.layers.0.mlp.fc2"
    edit_tensors(checkpoint, lambda tensors: tensors[f"{quantizer}.weight_quantizer.scale"][3].fill_(torch.nan))
    with pytest.raises(ValueError, match=r"weight_quantizer\.scale' holds nan"):
        inspect_checkpoint(checkpoint)
    make_quantized("vit", "finetune").save_pretrained(checkpoint)
    edit_tensors(checkpoint, lambda tensors: tensors[f"{quantizer}.weight"][3].fill_(torch.inf))
    with pytest.raises(ValueError, match=r"fc2\.weight' holds inf"):
        inspect_checkpoint(checkpoint)
    with pytest.raises(SystemExit, match=r"fc2\.weight' holds inf"):
        main(["export", "onnx", str(checkpoint), "--output", str(checkpoint / "model.onnx")])
    make_quantized("vit", "finetune").save_pretrained(checkpoint)
    edit_tensors(checkpoint, lambda tensors: tensors[f"{quantizer}.input_quantizer.group_index"][0].fill_(4))
    with pytest.raises(ValueError, match="names the group 4, and there are 4"):
        inspect_checkpoint(checkpoint)
    edit_tensors(checkpoint, lambda tensors: tensors.pop("backbone.vit.embeddings.cls_token"))
    with pytest.raises(ValueError, match=r"lacks tensors .*cls_token"):
        inspect_checkpoint(checkpoint)


def test_a_damaged_packed_file_is_named(tmp_path):
    build("vit", "packed").save_pretrained(tmp_path)
    codes = "backbone.vit.layers.0.mlp.fc1.weight_quantizer.codes"
    edit_tensors(tmp_path, lambda tensors: tensors[codes][0, 0].bitwise_xor_(1))
    with pytest.raises(ValueError, match="is damaged: its tensors, or one of weight_quantizer"):
        inspect_checkpoint(tmp_path)


@pytest.mark.parametrize("stage", ["pretrain", "search", "finetune"])
def test_a_model_in_bfloat16_is_read(stage, tmp_path):
    model = make_quantized("vit", stage)
    model.bfloat16().save_pretrained(tmp_path / "narrow")
    # Of the same digits: some channels are near to two groups, and rounding would decide.
    model.float().save_pretrained(tmp_path / "wide")
    wide, narrow = (inspect_checkpoint(tmp_path / name) for name in ("wide", "narrow"))
    assert [layer.channels for layer in narrow.layers] == [layer.channels for layer in wide.layers]
