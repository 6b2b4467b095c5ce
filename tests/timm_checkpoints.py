"""Small timm models, and the files in which people keep such weights."""

import json
import re

import timm
import torch
from safetensors.torch import save_file


#: A model of each kind, made small. All but Swin's depths and image size are in the shapes of the file.
VIT = {"depth": 2, "img_size": 64}
SWIN = {"depths": (2, 2, 2, 1), "window_size": 2, "img_size": 64}
MODELS = {
    "deit_tiny_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "deit_base_patch16_384": VIT | {"embed_dim": 128, "num_heads": 2},
    "deit3_small_patch16_224": VIT,
    "vit_tiny_patch16_224": VIT,
    "vit_base_patch16_224_miil": VIT | {"embed_dim": 128, "num_heads": 2},
    "swin_tiny_patch4_window7_224": SWIN,
    "swin_base_patch4_window12_384": SWIN | {"embed_dim": 48, "num_heads": (1, 2, 4, 8)},
}
VITS = [name for name in MODELS if not name.startswith("swin")]
SWINS = [name for name in MODELS if name.startswith("swin")]


def make_timm_model(name, **arguments):
    """A timm model in which no parameter, LayerScale and tables included, is what it starts from."""
    torch.manual_seed(0)
    model = timm.create_model(name, **(arguments or MODELS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            matrix = parameter.ndim > 1 and min(parameter.shape[-2:]) > 16
            parameter.add_(torch.randn_like(parameter) * (0.03 if matrix else 0.3))
    return model


def make_images(size=64, seed=1):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def logits(model, images):
    with torch.no_grad():
        outputs = model(images)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def assert_same_logits(checkpoint, model, size=64):
    expected = logits(model, make_images(size))
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(checkpoint.model, make_images(size)), expected, rtol=0, atol=1e-4)


def to_official_swin(model):
    """The state dict as Swin's own code saves it: merging at the end of a stage, `head`, and the buffers."""
    state_dict = {
        re.sub(r"^layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", name).replace(
            "head.fc.", "head."
        ): tensor
        for name, tensor in model.state_dict().items()
    }
    for name, block in model.named_modules():
        for buffer in ("relative_position_index", "attn_mask"):
            if getattr(block, buffer, None) is not None:
                state_dict[f"{name}.{buffer}"] = getattr(block, buffer)
    return state_dict


def save_torch(path, contents):
    torch.save(contents, path)
    return path


def save_timm_folder(folder, name, model, arguments=None, **config):
    """A folder as timm's `save_for_hf` writes it, with preprocessing of its own."""
    folder.mkdir(exist_ok=True)
    contents = {"architecture": name, "num_classes": model.num_classes, "model_args": arguments or MODELS[name]}
    pretrained_cfg = {"mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.8, "interpolation": "bilinear"}
    contents["pretrained_cfg"] = pretrained_cfg | {"input_size": [3, 64, 64], "num_classes": model.num_classes}
    (folder / "config.json").write_text(json.dumps(contents | config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def serve_timm_weights(monkeypatch, model):
    """Let timm's loader find the weights of `model` on its hub; the downloads are recorded."""
    downloads = []

    def download(model_id, *args, **kwargs):
        downloads.append((model_id, kwargs.get("cache_dir")))
        return model.state_dict()

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", download)
    return downloads
