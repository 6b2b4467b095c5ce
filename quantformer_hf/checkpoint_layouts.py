"""From timm's and the official layouts of ViT, DeiT and Swin to the one of transformers: names, shapes and configs.

The official DeiT files have timm's names. Those of Swin differ in two: the patch merging belongs to the stage before it,
and the classifier is `head` instead of `head.fc`. https://github.com/facebookresearch/deit,
https://github.com/microsoft/Swin-Transformer.
"""

import math
import re
from collections.abc import Mapping

import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    PreTrainedConfig,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from .checkpoint_files import shortened


#: transformers' class and config by the class of the timm model.
TRANSFORMERS_CLASSES: dict[type[nn.Module], tuple[type[PreTrainedModel], type[PreTrainedConfig]]] = {
    VisionTransformer: (ViTForImageClassification, ViTConfig),
    VisionTransformerDistilled: (DeiTForImageClassificationWithTeacher, DeiTConfig),
    SwinTransformer: (SwinForImageClassification, SwinConfig),
}

#: New names of parameters, and of parts of them, by `model_type`, in the order in which they apply.
RENAMES = {
    "vit": (
        (r"^head\.", "classifier."),
        (r"^cls_token$", "embeddings.cls_token"),
        (r"^dist_token$", "embeddings.distillation_token"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^blocks\.", "layers."),
        (r"^norm\.", "layernorm."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.o_proj."),
    ),
    "swin": (
        (r"^head\.fc\.", "classifier."),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^patch_embed\.norm\.", "embeddings.norm."),
        # timm merges patches before a stage, transformers after the one before.
        (r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) - 1}.downsample."),
        (r"^layers\.", "encoder.layers."),
        (r"^norm\.", "layernorm."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.o_proj."),
        (r"\.attn\.relative_position_bias_table$", ".attention.relative_position_bias.relative_position_bias_table"),
    ),
}
RENAMES["deit"] = (
    (r"^head\.", "cls_classifier."),
    (r"^head_dist\.", "distillation_classifier."),
    *RENAMES["vit"][1:],
)

#: Buffers of the official Swin files: they follow from the window and the image size.
SWIN_BUFFERS = ("relative_position_index", "attn_mask")


def is_official_swin(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the patch merging stands at the end of the stages, as in Swin's own code and in timm before 1.0."""
    return "layers.0.downsample.reduction.weight" in state_dict


def to_timm_layout(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an official or timm file under the names of timm 1.x.

    Raises:
        ValueError: a state dict of something else than a ViT, DeiT or Swin in these layouts.
    """
    vit = any(re.match(r"blocks\.\d+\.attn\.", name) for name in state_dict)
    swin = any(re.match(r"layers\.\d+\.blocks\.\d+\.attn\.", name) for name in state_dict)
    if not vit and not swin:
        ours = any(name.startswith(("vit.", "deit.", "swin.")) for name in state_dict)
        way_out = "; these are transformers' names: give the folder that also has the config.json" if ours else ""
        raise ValueError(
            f"expected a ViT, DeiT or Swin with parameters such as 'blocks.0.attn.qkv.weight' or"
            f" 'layers.0.blocks.0.attn.qkv.weight', found {shortened(state_dict)}{way_out}"
        )
    if vit:
        # DeiT III's own files call the LayerScale gamma_1 and gamma_2.
        return {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name): tensor for name, tensor in state_dict.items()}
    shift = 1 if is_official_swin(state_dict) else 0
    renamed = {}
    for name, tensor in state_dict.items():
        if name.endswith(SWIN_BUFFERS):
            continue
        name = re.sub(
            r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) + shift}.downsample.", name
        )
        renamed[re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)] = tensor
    return renamed


def transformers_config(model: nn.Module, **labels) -> PreTrainedConfig:
    """The config under which transformers computes what the timm model does; `labels` go to it as they are."""
    model_class, config_class = TRANSFORMERS_CLASSES[type(model)]
    projection = model.patch_embed.proj
    arguments = {
        "image_size": model.patch_embed.img_size[0],
        "patch_size": projection.kernel_size[0],
        "num_channels": projection.in_channels,
        "hidden_act": "gelu",
        "layer_norm_eps": model.norm.eps,
        "architectures": [model_class.__name__],
    }
    if config_class is SwinConfig:
        blocks = [stage.blocks[0] for stage in model.layers]
        arguments |= {
            "embed_dim": projection.out_channels,
            "depths": [len(stage.blocks) for stage in model.layers],
            "num_heads": [block.attn.num_heads for block in blocks],
            "window_size": blocks[0].attn.window_size[0],
            "mlp_ratio": blocks[0].mlp.fc1.out_features / projection.out_channels,
            "qkv_bias": blocks[0].attn.qkv.bias is not None,
        }
    else:
        arguments |= {
            "hidden_size": model.embed_dim,
            "num_hidden_layers": len(model.blocks),
            "num_attention_heads": model.blocks[0].attn.num_heads,
            "intermediate_size": model.blocks[0].mlp.fc1.out_features,
            "qkv_bias": model.blocks[0].attn.qkv.bias is not None,
        }
    return config_class(**arguments, **labels)


def to_transformers(state_dict: Mapping[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
    """The parameters of a timm model, in the layout of timm 1.x, under transformers' names, float32.

    The fused `qkv` `(3 * channels, channels)` is split. LayerScale, `x + γ * f(x)`, goes into the projection that ends f:
    its rows and its bias times γ. Patch merging needs nothing: timm, the official code and transformers all concatenate
    the 2×2 patches column by column.
    """
    state_dict = _fold_layer_scale({name: tensor.float() for name, tensor in state_dict.items()})
    if "pos_embed" in state_dict and state_dict["pos_embed"].shape[1] == _num_patches(config):
        tokens = 2 if "dist_token" in state_dict else 1
        state_dict["pos_embed"] = nn.functional.pad(state_dict["pos_embed"], (0, 0, tokens, 0))
    renamed = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in RENAMES[config.model_type]:
            name = re.sub(pattern, replacement, name)
        if not is_classifier(name):
            name = f"{config.model_type}.{name}"
        if ".attn.qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(".attn.qkv.", f".attention.{letter}_proj.")] = part.clone()
        else:
            renamed[name] = tensor
    return renamed


def _fold_layer_scale(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    folded = {name: tensor for name, tensor in state_dict.items() if not re.search(r"\.ls[12]\.gamma$", name)}
    for scale, projection in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
        for name in folded:
            block, end, kind = name.partition(f".{projection}.")
            gamma = state_dict.get(f"{block}.{scale}.gamma")
            if end and gamma is not None:
                folded[name] = folded[name] * (gamma[:, None] if kind == "weight" else gamma)
    return folded


def is_classifier(name: str) -> bool:
    """Whether a parameter of a transformers model belongs to its classifier, or to one of the two of a distilled DeiT."""
    return name.partition(".")[0] in ("classifier", "cls_classifier", "distillation_classifier")


def _grid(config: PreTrainedConfig) -> tuple[int, int]:
    image_size, patch_size = (
        size if isinstance(size, list | tuple) else (size, size) for size in (config.image_size, config.patch_size)
    )
    return image_size[0] // patch_size[0], image_size[1] // patch_size[1]


def _num_patches(config: PreTrainedConfig) -> int:
    return math.prod(_grid(config))


@torch.no_grad()
def resize_tables(
    state_dict: dict[str, Tensor], config: PreTrainedConfig, image_size: int | None, window_size: int | None
) -> None:
    """Make `state_dict` and `config` of a transformers model fit another image or window size, in place.

    Position embeddings and relative-position tables are interpolated by timm's own functions, bicubic.

    Raises:
        ValueError: sizes that patches or windows do not divide into, or a window size for a model without windows.
    """
    if window_size is not None and config.model_type != "swin":
        raise ValueError(f"window_size is for Swin, and the checkpoint is a {config.model_type}")
    old_grid = _grid(config)
    if image_size is not None:
        patch_size = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
        if image_size <= 0 or image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of the patch size {patch_size}")
        config.image_size = image_size
    if config.model_type == "swin":
        _resize_windows(state_dict, config, window_size)
    name = f"{config.model_type}.embeddings.position_embeddings"
    if name in state_dict and _grid(config) != old_grid:
        state_dict[name] = resample_abs_pos_embed(
            state_dict[name],
            new_size=_grid(config),
            old_size=old_grid,
            num_prefix_tokens={"vit": 1, "deit": 2, "swin": 0}[config.model_type],
        )


def _resize_windows(state_dict: dict[str, Tensor], config: PreTrainedConfig, window_size: int | None) -> None:
    window_size = window_size or config.window_size
    smallest = math.ceil(min(_grid(config)) / 2 ** (len(config.depths) - 1))
    # transformers would shrink the window there, and not the table.
    if not 0 < window_size <= smallest:
        raise ValueError(
            f"window_size {window_size} does not fit: the last stage has {smallest}×{smallest} patches of an image of"
            f" {config.image_size}: choose window_size from 1 to {smallest}"
        )
    if window_size != config.window_size:
        for name, table in state_dict.items():
            if name.endswith("relative_position_bias_table"):
                shape = ((2 * window_size - 1) ** 2, table.shape[1])
                state_dict[name] = resize_rel_pos_bias_table(table, (window_size, window_size), shape)
        config.window_size = window_size


def check_parameters(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise ValueError that lists what is missing, not expected, or of another shape in `found`."""
    refuse_parameters(
        missing=[name for name in expected if name not in found],
        not_expected=[name for name in found if name not in expected],
        of_another_shape=[
            f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in found and found[name].shape != tensor.shape
        ],
    )


def refuse_parameters(**problems: list[str]) -> None:
    """Raise ValueError with the first names of each kind of problem, if there are any."""
    kinds = [f"{kind.replace('_', ' ')}: {shortened(names)}" for kind, names in problems.items() if names]
    if kinds:
        raise ValueError("; ".join(kinds))
