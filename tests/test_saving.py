"""Quantized models in files: what was saved comes back, and what does not fit is found out."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import NUM_LABELS, make_batches, make_full_precision, make_quantized
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTImageProcessor,
)

from quantformer_hf import QuantformerConfig, QuantformerForImageClassification
from quantformer_hf.inspect_checkpoint import inspect_checkpoint
from quantformer_hf.packed_checkpoint import DIGEST_NAME, digest_of_state
from quantformer_hf.quantize import (
    group_quantizers,
)


def logits(model, batch):
    with torch.no_grad():
        return model(batch).logits


@pytest.mark.parametrize("weight_quantizer", ["lsq", "lsq_shifted", "statsq", "minmax"])
def test_a_saved_model_comes_back_bit_for_bit(backbone, stage, weight_quantizer, tmp_path):
    model = make_quantized(backbone, stage, weight_quantizer=weight_quantizer)
    model.concentration_degree.fill_(1.5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is QuantformerForImageClassification
    assert loaded.config.stage == stage
    assert torch.equal(logits(loaded, make_batches(1)[0]), logits(model, make_batches(1)[0]))
    ours, theirs = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(ours[name].requires_grad == theirs[name].requires_grad for name in ours)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_loaded_model_goes_on_through_the_stages(backbone, tmp_path):
    model = make_quantized(backbone, "pretrain")
    model.save_pretrained(tmp_path)
    loaded = QuantformerForImageClassification.from_pretrained(tmp_path)
    batch = make_batches(1)[0]
    for verb in (lambda m: m.begin_search(4), lambda m: m.freeze_groups()):
        assert torch.equal(logits(verb(loaded).eval(), batch), logits(verb(model).eval(), batch))


def test_an_uncalibrated_model_stays_so_when_saved(tmp_path):
    QuantformerForImageClassification.from_full_precision(make_full_precision()).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="was not calibrated"):
        logits(QuantformerForImageClassification.from_pretrained(tmp_path), make_batches(1)[0])


def test_scales_stay_in_float32_under_another_dtype(stage, tmp_path):
    model = make_quantized(stage=stage)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for quantizer in group_quantizers(loaded):
        assert quantizer.scale.dtype == quantizer.offset.dtype == torch.float32
    assert loaded.backbone.vit.layers[0].mlp.fc1.weight.dtype == torch.bfloat16
    batch = make_batches(1)[0]
    exact = logits(model, batch)
    error = logits(loaded, batch.bfloat16()).float() - exact
    assert error.std() < 0.3 * exact.std()


def test_config_round_trip():
    config = QuantformerConfig(
        backbone_config=make_full_precision().config, bit_width=3, layer_bits={"classifier": 4}, num_groups=5
    )
    again = AutoConfig.for_model("quantformer", **{k: v for k, v in config.to_dict().items() if k != "model_type"})
    assert again.to_dict() == config.to_dict()
    assert (again.weight_bits, again.activation_bits, again.num_labels) == (3, 3, NUM_LABELS)
    assert "bit_width" not in config.to_dict()


def test_a_config_of_other_bits_is_found_out(tmp_path):
    make_quantized(bit_width=4).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"activation_bits": 3}))
    with pytest.raises(
        ValueError, match=r"layer 'vit\.layers\.0.*' of the checkpoint .* has 4 bits, and its config says 3"
    ):
        AutoModelForImageClassification.from_pretrained(tmp_path)
    path.write_text(json.dumps(config | {"weight_bits": 32}))
    with pytest.raises(ValueError, match="does not fit its config"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_a_missing_tensor_is_an_error(tmp_path):
    make_quantized(stage="finetune").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("group_index"))
    save_file({n: t for n, t in tensors.items() if n != name}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"missing: {re.escape(name)}"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_the_order_of_layer_bits_outlives_the_file(tmp_path):
    """Later entries win, and JSON files sort their keys."""
    bits = {"vit.layers.0.*": 8, "*.mlp.fc1": 2}
    model = make_quantized("vit", "finetune", layer_bits=bits)
    model.save_pretrained(tmp_path / "finetune")
    model.pack().save_pretrained(tmp_path / "packed")
    for name in ("finetune", "packed"):
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / name)
        assert list(loaded.config.layer_bits.items()) == list(bits.items())
        assert loaded.backbone.vit.layers[0].mlp.fc1.weight_quantizer.grid.bits == 2
        inspect_checkpoint(tmp_path / name)


def test_a_packed_file_of_other_tensors_can_be_loaded(tmp_path):
    model = make_quantized("vit", "finetune").pack()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "backbone.vit.layers.0.mlp.fc1.bias"
    state[name] += 1
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.state_dict()[name], state[name])


def test_arguments_may_be_given_as_to_any_model_of_transformers(tmp_path):
    model = make_quantized("vit", "finetune").pack()
    model.save_pretrained(tmp_path / "other", False)
    assert not list((tmp_path / "other").glob("*.safetensors"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["backbone.classifier.bias"] += 1
    model.save_pretrained(tmp_path / "main", True, state)
    loaded = QuantformerForImageClassification.from_pretrained(tmp_path / "main")
    assert torch.equal(loaded.backbone.classifier.bias, state["backbone.classifier.bias"])


def test_files_of_a_packed_model_without_a_digest_are_not_loaded(tmp_path):
    make_quantized("vit", "finetune").pack().save_pretrained(tmp_path)
    for told in ({"variant": "fp16"}, {"use_safetensors": False}):
        with pytest.raises(ValueError, match="whose digest is compared: leave out variant and use_safetensors=False"):
            QuantformerForImageClassification.from_pretrained(tmp_path, **told)
    config = json.loads((tmp_path / "config.json").read_text())
    config["backbone_config"]["image_size"] = [8, 32]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is damaged: its tensors, or one of .*image_size in its config\.json"):
        QuantformerForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("stage", ["finetune", "packed"])
def test_files_that_have_scales_of_attention_probabilities_are_read(stage, tmp_path):
    """As those from before 2026-12 have."""
    model = make_quantized("vit", "finetune")
    if stage == "packed":
        model.pack()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    blocks = [name.removesuffix("query.scale") for name in state if name.endswith(".operands.query.scale")]
    assert blocks
    state |= {f"{block}probabilities.{name}": torch.ones(1) for block in blocks for name in ("scale", "offset")}
    if stage == "packed":
        state[DIGEST_NAME] = digest_of_state(state, model.config)
    save_file(state, path, metadata={"format": "pt"})
    loaded = QuantformerForImageClassification.from_pretrained(tmp_path)
    batch = make_batches(1)[0]
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert inspect_checkpoint(tmp_path).config.stage == stage


def test_a_model_without_a_block_is_refused():
    with pytest.raises(ValueError, match="backbone_config has no block to quantize"):
        QuantformerConfig(backbone_config={"model_type": "vit", "num_hidden_layers": 0})


def test_a_packed_model_has_one_layout(tmp_path):
    model = make_quantized("vit", "finetune").pack()
    with pytest.raises(ValueError, match="save_original_format is True, and packed models have one layout alone"):
        model.save_pretrained(tmp_path / "other", save_original_format=True)
    made = QuantformerForImageClassification.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(made(make_batches()[0]).logits, model(make_batches()[0]).logits)


@pytest.mark.parametrize("stage", ["finetune", "packed"])
def test_a_layer_of_somebody_elses_is_not_saved_as_ours(stage, tmp_path):
    model = make_quantized("vit", "finetune")
    if stage == "packed":
        model.pack()
    model.backbone.classifier = torch.nn.Linear(model.backbone.classifier.in_features, 7)
    with pytest.raises(ValueError, match=r"layers were replaced .* ignore_mismatched_sizes=True"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["finetune", "packed"])
def test_parts_of_a_model_are_not_offloaded(stage, tmp_path):
    model = make_quantized("vit", "finetune")
    (model.pack() if stage == "packed" else model).save_pretrained(tmp_path)
    sizes = {
        "device_map": "auto",
        "max_memory": {"cpu": model.get_memory_footprint() // 2},
        "offload_folder": str(tmp_path / "off"),
    }
    with pytest.raises(ValueError, match=r"quantized models are not offloaded|offload the whole model"):
        QuantformerForImageClassification.from_pretrained(tmp_path, **sizes)
    QuantformerForImageClassification.from_pretrained(tmp_path, device_map="auto")(make_batches()[0])


def test_a_packed_model_has_no_variants(tmp_path):
    with pytest.raises(ValueError, match=r"variant is 'w4', and variants share one config\.json"):
        make_quantized(stage="finetune").pack().save_pretrained(tmp_path / "model", variant="w4")
    assert not (tmp_path / "model").exists()


# What cannot be loaded


def assert_same_tensors(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def load(folder, **arguments):
    return QuantformerForImageClassification.from_pretrained(folder, **arguments)


@pytest.fixture(params=["finetune", "packed"])
def folder(request, tmp_path):
    model = make_quantized("vit", "finetune")
    (model.pack() if request.param == "packed" else model).save_pretrained(tmp_path)
    return tmp_path


def fail(*arguments, **keywords):
    raise RuntimeError("Found no NVIDIA driver on your system")


def test_what_has_nothing_to_do_with_the_files_is_not_put_down_to_them(folder, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", fail)
    with pytest.raises(RuntimeError, match="no NVIDIA driver"):
        load(folder, device_map="cuda")


def test_other_classes_are_named_with_a_way_out_that_works(folder):
    packed = QuantformerConfig.from_pretrained(folder).stage == "packed"
    with pytest.raises(ValueError, match=r"of another shape: backbone\.classifier\.bias") as found:
        load(folder, num_labels=7)
    assert ("ignore_mismatched_sizes" in str(found.value)) != packed


def test_a_new_classifier_is_no_leave_for_other_layers(folder):
    config = json.loads((folder / "config.json").read_text())
    config["backbone_config"]["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"of another shape: backbone\.vit\.layers\.0\.mlp") as found:
        load(folder, ignore_mismatched_sizes=True)
    assert "or give ignore_mismatched_sizes" not in str(found.value)


def test_a_stock_model_is_pointed_to_where_it_is_quantized(tmp_path):
    make_full_precision().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type is 'vit'.*from_full_precision makes one of it"):
        load(tmp_path)


def test_bits_are_those_of_the_checkpoint(folder):
    with pytest.raises(TypeError, match=r"bit_width is 2, and bits are fixed in a checkpoint.*from_full_precision"):
        load(folder, bit_width=2)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2"])
def test_another_attention_is_refused_wherever_it_is_asked_for(folder, name):
    config = QuantformerConfig.from_pretrained(folder)
    message = f"attn_implementation is '{name}', and a quantized model has its own"
    for ask in (
        lambda: load(folder, attn_implementation=name),
        lambda: load(folder, attn_implementation=name, config=config),
        lambda: AutoModelForImageClassification.from_pretrained(folder, attn_implementation=name),
        lambda: QuantformerConfig(attn_implementation=name),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
    load(folder, attn_implementation="quantformer")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "index.json is not JSON"),
        ("[]", "holds a list, and not a dictionary"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": {"a": "x.safetensors"}}', r"names the file 'x\.safetensors', which is not in"),
    ],
)
def test_a_damaged_index_is_named(folder, index, message):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(folder)


def test_a_file_cut_short_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        load(folder)


@pytest.mark.parametrize("moved", range(4))
def test_a_save_that_is_killed_leaves_no_mixture_that_loads(moved, folder, tmp_path, monkeypatch):
    first = load(folder)
    target = tmp_path / "target"
    first.save_pretrained(target)
    second = load(folder)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(2)

    class Killed(BaseException):
        pass

    replace = os.replace

    def replace_some(source, destination):
        nonlocal moved
        if Path(source).parent.name == "_saved":
            if moved == 0:
                raise Killed
            moved -= 1
        replace(source, destination)

    monkeypatch.setattr(os, "replace", replace_some)
    with pytest.raises(Killed):
        second.save_pretrained(target, max_shard_size="8KB")
    monkeypatch.undo()
    for read in (load, inspect_checkpoint):
        with pytest.raises(
            ValueError, match=r"was interrupted, and what it wrote is in .*_saved still: move the files"
        ):
            read(target)

    # A save that fails, after the one that was killed, takes nothing away.
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(RuntimeError, match="no NVIDIA driver"):
        second.save_pretrained(target)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="was interrupted"):
        load(target)

    mended = tmp_path / "mended"
    shutil.copytree(target, mended)
    for path in (mended / "_saved").iterdir():
        path.rename(mended / path.name)
    (mended / "_saved").rmdir()
    second.save_pretrained(target)
    for way_out in (mended, target):
        assert_same_tensors(load(way_out), second)
        assert not [path for path in way_out.iterdir() if path.name.startswith("_")]


def test_what_a_killed_save_has_left_goes_with_the_next(folder):
    (folder / "_saving").mkdir()
    (folder / "_saving" / "model.safetensors").write_bytes(b"half")
    model = load(folder)
    model.save_pretrained(folder)
    assert not (folder / "_saving").exists()
    assert_same_tensors(load(folder), model)


@pytest.mark.parametrize("own_class", [False, True])
def test_no_code_of_a_checkpoint_runs_or_is_asked_for(own_class, tmp_path, monkeypatch, caplog):
    model = make_quantized("vit", "finetune")
    model.image_processor = ViTImageProcessor(size={"height": 16, "width": 16})
    model.save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    config = json.loads(path.read_text()) | {"auto_map": {"AutoImageProcessor": "own.Own"}}
    path.write_text(json.dumps(config | ({"image_processor_type": "Own"} if own_class else {})))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    processor = load(tmp_path).image_processor
    assert type(processor) is (type(None) if own_class else ViTImageProcessor)
    assert (f"the image processor of {tmp_path} is left out" in caplog.text) == own_class
    assert not (tmp_path / "ran").exists()
