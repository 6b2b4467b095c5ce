"""The mean of runs from one start."""

import pytest
import torch
from conftest import make_batches, make_quantized
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTImageProcessor

from quantformer_hf.__main__ import main
from quantformer_hf.run_history import is_current, record_of


@pytest.fixture
def runs(tmp_path):
    """Folders of two models that began as the same one and were moved since, and the models."""
    models = [make_quantized(stage="finetune") for _ in range(2)]
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, (folder, model) in enumerate(zip(folders, models, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder)
    return folders, models


def average(*folders, output):
    main(["average", *map(str, folders), "--output", str(output)])


def test_the_average_holds_the_means_and_computes(runs, tmp_path):
    folders, models = runs
    # The sign of a scale means nothing.
    name, scale = next((n, p) for n, p in models[1].named_parameters() if n.endswith("input_quantizer.scale"))
    with torch.no_grad():
        scale.neg_()
    models[1].save_pretrained(folders[1])
    # What was measured of one run is not true of the mean.
    models[0].config.run_history = [record_of("finetune", {}, {"finetune_accuracy": 0.5})]
    models[0].save_pretrained(folders[0])
    average(*folders, output=tmp_path / "mean")

    mean = AutoModelForImageClassification.from_pretrained(tmp_path / "mean").eval()
    first, second = (model.state_dict() for model in models)
    for key, tensor in mean.state_dict().items():
        parts = [part.abs() if key.endswith(".scale") else part for part in (first[key], second[key])]
        torch.testing.assert_close(tensor, (parts[0].double() + parts[1]).div(2).to(tensor.dtype), msg=key)
    assert torch.equal(mean.state_dict()[name], mean.state_dict()[name].abs())
    with torch.no_grad():
        logits = [model(pixel_values=make_batches()[0]).logits for model in (mean, mean.pack(), *models)]
    torch.testing.assert_close(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    assert not is_current(mean.config.run_history)


def test_bad_input_names_itself_and_the_way_out(runs, tmp_path):
    folders, models = runs
    make_quantized("deit-distilled", stage="finetune").save_pretrained(tmp_path / "other")
    quantizer = next(module for module in models[1].modules() if hasattr(module, "group_index"))
    quantizer.group_index.copy_(quantizer.group_index.flip(0))
    models[1].save_pretrained(tmp_path / "regrouped")
    models[0].pack().save_pretrained(tmp_path / "packed")
    make_quantized(stage="finetune", weight_quantizer="lsq_shifted").save_pretrained(tmp_path / "shifted")
    make_quantized(stage="finetune").save_pretrained(tmp_path / "astray")
    tensors = load_file(tmp_path / "astray" / "model.safetensors")
    tensors["backbone.classifier.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "astray" / "model.safetensors", {"format": "pt"})
    for name, mean in (("bright", 0.5), ("dark", 0.1)):
        models[1].image_processor = ViTImageProcessor(image_mean=[mean] * 3)
        models[1].save_pretrained(tmp_path / name)
    output = tmp_path / "mean"
    for given, said in (
        ([folders[0]], "alone has no mean"),
        ([folders[0], tmp_path / "packed"], "is in the stage 'packed'"),
        ([folders[0], tmp_path / "other"], "backbone_config is not the same .* the same checkpoint"),
        ([folders[0], tmp_path / "shifted"], "weight_quantizer is not the same .* the same checkpoint"),
        ([folders[0], tmp_path / "regrouped"], "group_index is not the same .* the same checkpoint"),
        ([folders[0], tmp_path / "astray"], r"astray: 'backbone\.classifier\.weight' holds nan"),
        ([tmp_path / "astray", folders[0]], r"astray: 'backbone\.classifier\.weight' holds nan"),
        ([folders[0], folders[0].parent / "." / folders[0].name], "is named twice"),
        (
            [tmp_path / "bright", tmp_path / "dark"],
            "the preprocessing of images is not the same .* the same checkpoint",
        ),
        ([folders[0], tmp_path / "nowhere"], "nowhere does not exist"),
    ):
        with pytest.raises(SystemExit, match=said):
            average(*given, output=output)
        assert not output.exists()
    with pytest.raises(SystemExit, match="is there already"):
        average(*folders, output=folders[0])
