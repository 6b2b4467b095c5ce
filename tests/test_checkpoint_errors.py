"""What cannot be loaded is refused with a clear error, and runs nothing."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm_checkpoints import make_timm_model, save_timm_folder, save_torch

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.checkpoints import load_full_precision


class NotATensor:
    pass


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def swin_with_two_windows():
    tables = timm.create_model("swin_s3_tiny_224", device="meta").state_dict()
    return {name: torch.zeros(tensor.shape) for name, tensor in tables.items()}


BAD_FILES = {
    "unsafe": (
        lambda path: save_torch(path / "a.pth", {"model": {}, "config": NotATensor()}),
        r"needs test_checkpoint_errors\.NotATensor, which may run code.* save its state dict alone",
    ),
    "pickled model": (
        lambda path: save_torch(path / "a.pth", torch.nn.Linear(2, 2)),
        r"needs torch\.nn\.modules\.linear\.Linear, which may run code",
    ),
    "truncated": (
        lambda path: truncated(
            save_torch(path / "a.pth", {"model": make_timm_model("deit_tiny_patch16_224").state_dict()})
        ),
        r"expected a file of torch\.save, found \d+ bytes that are none or not all of one",
    ),
    "text": (
        lambda path: (path / "a.pth").write_text("hello " * 50),
        r"expected a file of torch\.save, found 300 bytes",
    ),
    "empty": (lambda path: (path / "a.bin").touch(), r"expected a file of torch\.save, found 0 bytes"),
    "broken safetensors": (
        lambda path: (path / "a.safetensors").write_bytes(b"\x08" + b"\x00" * 7 + b"nonsense"),
        "expected a safetensors file, found 16 bytes that are none",
    ),
    "truncated safetensors": (
        lambda path: (save_file({"a": torch.zeros(99)}, path / "a.safetensors"), truncated(path / "a.safetensors")),
        "expected a safetensors file",
    ),
    "jax": (lambda path: (path / "a.npz").write_bytes(b"PK"), r"expected a file that ends in \.safetensors, \.pth"),
    "list": (lambda path: save_torch(path / "a.pth", [1, 2]), "expected a state dict, found a list"),
    "no tensors": (
        lambda path: save_torch(path / "a.pth", {"weights": {"x": torch.zeros(1)}, "epoch": 3}),
        "expected a state dict, on its own or as one of model, .*found weights, epoch",
    ),
    "resnet": (
        lambda path: save_torch(path / "a.pth", timm.create_model("resnet10t").state_dict()),
        r"expected a ViT, DeiT or Swin with parameters such as .*found conv1\.0\.weight, .* more",
    ),
    "transformers": (
        lambda path: save_torch(path / "a.pth", {"vit.layers.0.mlp.fc1.weight": torch.zeros(1)}),
        "these are transformers' names: give the folder",
    ),
    "anchor missing": (
        lambda path: save_torch(path / "a.pth", {"blocks.0.attn.qkv.weight": torch.zeros(6, 2)}),
        r"it lacks patch_embed\.proj\.weight, pos_embed, blocks\.0\.mlp\.fc1\.weight",
    ),
    "clip": (
        lambda path: save_torch(
            path / "a.pth",
            timm.create_model("vit_base_patch32_clip_224", depth=1, embed_dim=64, num_heads=1).state_dict(),
        ),
        "it has a norm before the blocks, which transformers' ViT, DeiT and Swin do not have",
    ),
    "hybrid": (
        lambda path: save_torch(
            path / "vit_tiny_r_s16_p8_224.pth", timm.create_model("vit_tiny_r_s16_p8_224", depth=1).state_dict()
        ),
        "it has a convolutional stem, which transformers' ViT, DeiT and Swin do not have",
    ),
    "average pooling": (
        lambda path: save_torch(
            path / "vit_medium_patch16_gap_256.pth",
            timm.create_model("vit_medium_patch16_gap_256", depth=1, embed_dim=64, num_heads=1).state_dict(),
        ),
        "it has no class token",
    ),
    "windows": (
        lambda path: save_torch(path / "a.pth", swin_with_two_windows()),
        r"it has windows of several sizes \(7, 14\)",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(case, tmp_path):
    write, message = BAD_FILES[case]
    write(tmp_path)
    (path,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match=message) as error:
        load_full_precision(path)
    assert str(error.value).startswith(f"'{path}' cannot be loaded: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_an_unsafe_file_runs_nothing(tmp_path):
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (Path.touch, (marker,))

    path = save_torch(tmp_path / "deit_tiny_patch16_224.pth", {"model": Payload()})
    with pytest.raises(ValueError, match="may run code"):
        load_full_precision(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_parameters_that_do_not_fit_are_listed(name, tmp_path):
    weights = make_timm_model(name).state_dict()
    del weights["norm.weight"]
    for index in range(6):
        weights[f"extra.{index}"] = torch.zeros(1)
    weights["norm.bias"] = torch.zeros(7)
    width = make_timm_model(name).num_features
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load_full_precision(save_torch(tmp_path / f"{name}.pth", {"model": weights}))
    assert str(error.value).endswith(
        f"missing: norm.weight; not expected: extra.0, extra.1, extra.2, extra.3 and 2 more;"
        f" of another shape: norm.bias (7,) instead of ({width},)"
    )


def test_parameters_that_do_not_fit_are_listed_for_a_transformers_folder(tmp_path):
    folder = save_timm_folder(tmp_path / "timm", "vit_tiny_patch16_224", make_timm_model("vit_tiny_patch16_224"))
    model = load_full_precision(folder).model
    model.save_pretrained(tmp_path, save_original_format=False)
    weights = model.state_dict()
    del weights["vit.layernorm.weight"]
    weights["vit.layernorm.bias"] = torch.zeros(7)
    weights["vit.extra"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load_full_precision(tmp_path)
    assert str(error.value).endswith(
        "missing: vit.layernorm.weight; not expected: vit.extra;"
        " of another shape: vit.layernorm.bias (7,) instead of (192,)"
    )


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (None, FileNotFoundError, r"has no config\.json: expected one with a model_type .*, found notes\.txt"),
        ("{", ValueError, "is not JSON"),
        ('{"a": 1}', ValueError, "neither a model_type .* nor an architecture"),
        ('{"model_type": "quantformer"}', TypeError, "quantized already: load it with from_pretrained"),
        ('{"model_type": "beit"}', ValueError, "it is a beit: expected one of vit, deit, swin"),
        ('{"model_type": "vit"}', ValueError, "transformers cannot read it: .*no file named"),
        ('{"architecture": "vit_tiny_patch16_224"}', FileNotFoundError, r"expected model\.safetensors, found"),
    ],
)
def test_a_bad_folder_is_refused_in_one_line(config, error, message, tmp_path):
    (tmp_path / "notes.txt").touch()
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(error, match=message) as raised:
        load_full_precision(tmp_path)
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\x08" + b"\x00" * 7 + b"nonsense"])
def test_broken_weights_in_a_folder_are_refused_in_one_line(content, tmp_path):
    for name, config in {
        "transformers": {"model_type": "vit"},
        "timm": {"architecture": "vit_tiny_patch16_224"},
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="cannot be loaded") as error:
            load_full_precision(folder)
        assert "\n" not in str(error.value)


def test_a_timm_folder_of_another_architecture_is_refused(tmp_path):
    model = timm.create_model("resnet10t")
    folder = save_timm_folder(tmp_path, "resnet10t", model, {"num_classes": 1000})
    with pytest.raises(ValueError, match="the layers of timm's ResNet"):
        load_full_precision(folder)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("deit_tiny_patch16_225", FileNotFoundError, "did you mean 'deit_tiny_patch16_224'"),
        ("weights/deit.pth", FileNotFoundError, "is no file, folder, timm name or hub id"),
        ("/nowhere/at/all", FileNotFoundError, "is no file, folder, timm name or hub id"),
        ("vit_base_patch16_siglip_224", ValueError, "attention pooling"),
        ("timm/vit_base_patch16_dinov3", ValueError, "the layers of timm's Eva"),
        ("resnet50", ValueError, "the layers of timm's ResNet"),
        ("vit_small_patch16_36x1_224", ValueError, "timm does not give the weights"),
    ],
)
def test_a_name_that_cannot_be_is_refused_in_one_line(name, error, message):
    with pytest.raises(error, match=message) as raised:
        load_full_precision(name)
    assert "\n" not in str(raised.value)
    assert name in str(raised.value)


def test_arguments_that_a_form_does_not_take_are_refused(tmp_path):
    path = save_torch(tmp_path / "deit_tiny_patch16_224.pth", make_timm_model("deit_tiny_patch16_224").state_dict())
    load_full_precision(path, cache_dir="unused", revision=None)
    with pytest.raises(TypeError, match="unexpected argument 'attn_implementation'"):
        load_full_precision(path, attn_implementation="eager")
    with pytest.raises(TypeError, match="unexpected argument 'revision'"):
        load_full_precision("deit_tiny_patch16_224", revision="main")
    with pytest.raises(TypeError, match="architecture is for a single file"):
        load_full_precision(tmp_path, architecture="deit_tiny_patch16_224")


def test_from_full_precision_says_what_it_cannot_take(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"expected a file of torch\.save"):
        QuantformerForImageClassification.from_full_precision(path)
    with pytest.raises(FileNotFoundError, match="is no file, folder, timm name or hub id"):
        QuantformerForImageClassification.from_full_precision("deit_tini_patch16_224")


@pytest.mark.parametrize(
    "name",
    ["patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "head.weight"],
)
def test_a_tensor_without_dimensions_is_named(name, tmp_path):
    weights = make_timm_model("deit_tiny_patch16_224").state_dict() | {name: torch.zeros(())}
    with pytest.raises(ValueError, match=rf"its {name} has the shape \(\): expected \d dimensions"):
        load_full_precision(save_torch(tmp_path / "deit_tiny_patch16_224.pth", {"model": weights}))


@pytest.mark.parametrize("size", ["image_size", "window_size"])
def test_no_size_is_no_size(size, tmp_path):
    folder = save_timm_folder(tmp_path, "vit_tiny_patch16_224", make_timm_model("vit_tiny_patch16_224"))
    with pytest.raises(ValueError, match=f"{size} is 0: choose a number of"):
        load_full_precision(folder, **{size: 0})
