"""Every form of full-precision weights gives the logits that its authors' code gives."""

import argparse
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm_checkpoints import (
    MODELS,
    SWINS,
    VIT,
    VITS,
    assert_same_logits,
    logits,
    make_images,
    make_timm_model,
    save_timm_folder,
    save_torch,
    serve_timm_weights,
    to_official_swin,
)

from quantformer_hf.checkpoints import load_full_precision


CLASSES = {
    "deit_tiny_distilled_patch16_224": "DeiTForImageClassificationWithTeacher",
    "swin_tiny_patch4_window7_224": "SwinForImageClassification",
    "swin_base_patch4_window12_384": "SwinForImageClassification",
}


@pytest.mark.parametrize("name", VITS)
def test_an_official_deit_file_has_the_logits_of_timm(name, tmp_path):
    model = make_timm_model(name)
    path = save_torch(tmp_path / f"{name}-a1311bcf.pth", {"model": model.state_dict()})
    checkpoint = load_full_precision(path)
    assert_same_logits(checkpoint, model)
    assert type(checkpoint.model).__name__ == CLASSES.get(name, "ViTForImageClassification")
    kind = "official DeiT file" if name.startswith("deit") else "timm state dict"
    assert checkpoint.form.startswith(f"{kind} (like {name}, with 2 blocks")


@pytest.mark.parametrize("name", SWINS)
def test_an_official_swin_file_has_the_logits_of_timm(name, tmp_path):
    model = make_timm_model(name)
    path = save_torch(tmp_path / "ckpt_epoch_299.pth", {"model": to_official_swin(model), "epoch": 299})
    checkpoint = load_full_precision(path)
    assert_same_logits(checkpoint, model)
    assert checkpoint.form.startswith("official Swin file")
    assert checkpoint.model.config.image_size == 64
    assert checkpoint.model.config.window_size == 2


@pytest.mark.parametrize("name", MODELS)
def test_a_timm_state_dict_has_the_logits_of_timm(name, tmp_path):
    model = make_timm_model(name)
    path = tmp_path / f"my_{name}.safetensors"
    save_file(model.state_dict(), path)
    checkpoint = load_full_precision(path)
    assert_same_logits(checkpoint, model)
    assert checkpoint.form.startswith("timm state dict")


@pytest.mark.parametrize("name", MODELS)
def test_a_timm_folder_has_the_logits_of_timm(name, tmp_path):
    model = make_timm_model(name)
    checkpoint = load_full_precision(save_timm_folder(tmp_path, name, model))
    assert_same_logits(checkpoint, model)
    assert checkpoint.form == f"timm folder ({name})"
    assert list(checkpoint.processor.image_std) == [0.25] * 3
    assert checkpoint.processor.size["shortest_edge"] == 80


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_that_timm_saved_has_the_logits_of_timm(name, tmp_path):
    model = make_timm_model(name)
    save_for_hf(model, tmp_path, model_args=MODELS[name], safe_serialization=name in SWINS)
    assert_same_logits(load_full_precision(tmp_path), model)


@pytest.mark.parametrize("name", MODELS)
def test_saved_by_transformers_it_loads_with_the_same_logits_and_processor(name, tmp_path):
    checkpoint = load_full_precision(save_timm_folder(tmp_path / "timm", name, make_timm_model(name)))
    folder = tmp_path / "transformers"
    checkpoint.model.save_pretrained(folder)
    checkpoint.processor.save_pretrained(folder)
    again = load_full_precision(folder)
    assert torch.equal(logits(again.model, make_images()), logits(checkpoint.model, make_images()))
    assert again.form == f"transformers checkpoint ({type(checkpoint.model).__name__})"
    assert again.processor.to_dict() == checkpoint.processor.to_dict()
    assert again.model.config.id2label == checkpoint.model.config.id2label


@pytest.mark.parametrize("prefix", ["", "timm/"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.augreg_in21k_ft_in1k", "deit_tiny_distilled_patch16_224"])
def test_a_timm_name_is_loaded_by_timm(prefix, name, monkeypatch, tmp_path):
    model = make_timm_model(name, depth=12)
    downloads = serve_timm_weights(monkeypatch, model)
    checkpoint = load_full_precision(prefix + name, cache_dir=tmp_path)
    assert_same_logits(checkpoint, model, 224)
    assert checkpoint.form == f"timm model ({name})"
    assert checkpoint.model.name_or_path == prefix + name
    assert [(model_id.startswith(f"timm/{name}"), cache) for model_id, cache in downloads] == [(True, tmp_path)]


def test_a_repository_of_the_hub_in_timm_format_is_loaded_by_timm(monkeypatch):
    model = make_timm_model("vit_tiny_patch16_224")
    config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"mean": [0.4] * 3, "num_classes": 1000}}
    monkeypatch.setattr("transformers.PreTrainedConfig.get_config_dict", lambda *args, **kwargs: (dict(config), {}))
    monkeypatch.setattr(
        "timm.models._factory.load_model_config_from_hf",
        lambda name, **kwargs: (
            config["pretrained_cfg"] | {"hf_hub_id": name, "source": "hf-hub", "input_size": [3, 64, 64]},
            "vit_tiny_patch16_224",
            VIT,
        ),
    )
    serve_timm_weights(monkeypatch, model)
    checkpoint = load_full_precision("someone/their-vit")
    assert_same_logits(checkpoint, model)
    assert list(checkpoint.processor.image_mean) == [0.4] * 3


@pytest.mark.parametrize(
    ("wrap", "form"),
    [
        (lambda weights: {"model": weights, "args": argparse.Namespace(lr=1e-3), "epoch": 3}, "official DeiT file"),
        (lambda weights: {"model": weights, "model_ema": {}}, "official DeiT file"),
        (lambda weights: {"state_dict": {}, "state_dict_ema": weights}, "timm state dict"),
        (lambda weights: {"state_dict": {f"module.{name}": weight for name, weight in weights.items()}}, "timm"),
        (lambda weights: {f"timm_model.{name}": weight for name, weight in weights.items()}, "timm"),
        (lambda weights: {name: weight.half() for name, weight in weights.items()}, "timm"),
    ],
    ids=["args", "model", "ema", "module", "wrapper", "half"],
)
def test_the_state_dict_is_found_in_what_wraps_it(wrap, form, tmp_path):
    model = make_timm_model("deit_tiny_patch16_224")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    path = save_torch(tmp_path / "deit_tiny_patch16_224.pth", wrap(model.state_dict()))
    checkpoint = load_full_precision(path)
    assert_same_logits(checkpoint, model)
    assert checkpoint.form.startswith(form)
    assert checkpoint.model.dtype == torch.float32


def test_the_layer_scale_of_deit3_s_own_files_is_found(tmp_path):
    model = make_timm_model("deit3_small_patch16_224")
    weights = {re.sub(r"\.ls(\d)\.gamma", r".gamma_\1", name): weight for name, weight in model.state_dict().items()}
    checkpoint = load_full_precision(save_torch(tmp_path / "deit_3_small_224_21k.pth", {"model": weights}))
    assert_same_logits(checkpoint, model)
    # The published weights that saw ImageNet-22k are evaluated on whole images.
    assert checkpoint.processor.size["shortest_edge"] == 64


@pytest.mark.parametrize(
    ("name", "arguments", "entry", "expected"),
    [
        ("deit_tiny_patch16_224", {}, "model", "official DeiT file (deit_tiny_patch16_224)"),
        ("deit_tiny_distilled_patch16_224", {}, None, "timm state dict (deit_tiny_distilled_patch16_224)"),
        ("deit3_small_patch16_224", {}, None, "timm state dict (deit3_small_patch16_224)"),
        ("swin_tiny_patch4_window7_224", {}, None, "timm state dict (swin_tiny_patch4_window7_224)"),
        (
            "swin_tiny_patch4_window7_224",
            {"num_classes": 21841},
            None,
            "timm state dict (swin_tiny_patch4_window7_224)",
        ),
    ],
)
def test_tensors_alone_tell_the_published_architecture(name, arguments, entry, expected, tmp_path):
    weights = timm.create_model(name, **arguments).state_dict()
    path = save_torch(tmp_path / "weights.pth", {entry: weights} if entry else weights)
    checkpoint = load_full_precision(path)
    assert checkpoint.form == expected
    assert checkpoint.model.config.image_size == 224
    assert checkpoint.model.num_labels == len(checkpoint.model.config.id2label) == arguments.get("num_classes", 1000)


def test_a_plain_file_without_a_telling_name_wants_its_architecture(tmp_path):
    path = save_torch(tmp_path / "weights.pth", make_timm_model("vit_tiny_patch16_224", depth=12).state_dict())
    with pytest.raises(ValueError, match="pass architecture"):
        load_full_precision(path)
    vit = load_full_precision(path, architecture="vit_tiny_patch16_224")
    assert list(vit.processor.image_mean) == [0.5] * 3
    deit = load_full_precision(path, architecture="deit_tiny_patch16_224-a1311bcf")
    assert list(deit.processor.image_mean) != [0.5] * 3
    with pytest.raises(ValueError, match=r"of another shape: cls_token \(1, 1, 192\) instead of \(1, 1, 384\)"):
        load_full_precision(path, architecture="vit_small_patch16_224")
    with pytest.raises(ValueError, match="did you mean 'vit_tiny_patch16_224'"):
        load_full_precision(path, architecture="vit_tiny_patch16_242")


def test_what_was_loaded_can_be_loaded_again_by_its_name(tmp_path):
    folder = save_timm_folder(tmp_path, "vit_tiny_patch16_224", make_timm_model("vit_tiny_patch16_224"))
    model = load_full_precision(folder).model
    assert model.name_or_path == model.config._name_or_path == str(folder)
    assert model.config.architectures == ["ViTForImageClassification"]
    assert not model.training
