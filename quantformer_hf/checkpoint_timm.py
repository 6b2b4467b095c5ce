"""Which timm model a state dict or a name stands for, and whether transformers can hold it."""

import difflib
import functools
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.layers import Attention
from timm.models import get_pretrained_cfg, is_model_pretrained
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .checkpoint_files import first_sentence, read_state_dict, shortened
from .checkpoint_layouts import TRANSFORMERS_CLASSES, is_official_swin, to_timm_layout


logger = logging.getLogger(__name__)

#: Names of timm's models that are looked for in the names of files.
TIMM_NAMES = ("vit_*", "deit*", "swin_*")

#: Files that hold the weights in a folder of timm's, in the order of preference.
TIMM_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")

#: What parts of parameter names say about a model that transformers' ViT, DeiT and Swin cannot hold.
UNSUPPORTED_NAMES = {
    "patch_embed.backbone.": "a convolutional stem",
    "norm_pre.": "a norm before the blocks",
    "reg_token": "register tokens",
    "fc_norm.": "its last norm after the pooling",
    "attn_pool.": "attention pooling",
    ".q_norm.": "norms of the queries and keys",
    ".attn.norm.": "a norm inside the attention",
    ".mlp.norm.": "a norm inside the MLP",
    ".mlp.w1": "a gated MLP",
    "logit_scale": "the cosine attention of Swin V2",
    "absolute_pos_embed": "absolute position embeddings in a Swin",
    "rel_pos_": "relative position embeddings",
    "rope.": "rotary position embeddings",
}

#: What the inference of timm's arguments looks at, and its number of dimensions; without these there is no telling what a
#: file is.
VIT_ANCHORS = {
    "patch_embed.proj.weight": 4,
    "pos_embed": 3,
    "blocks.0.attn.qkv.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
}
SWIN_ANCHORS = {
    "patch_embed.proj.weight": 4,
    "layers.0.blocks.0.attn.relative_position_bias_table": 2,
    "layers.0.blocks.0.attn.qkv.weight": 2,
    "layers.0.blocks.0.mlp.fc1.weight": 2,
}

#: Sizes of DeiT by width, and of Swin by width and depths, as they stand in timm's names.
DEIT_SIZES = {192: "tiny", 384: "small", 512: "medium", 768: "base", 1024: "large", 1280: "huge"}
SWIN_SIZES = {
    (96, (2, 2, 6, 2)): "tiny",
    (96, (2, 2, 18, 2)): "small",
    (128, (2, 2, 18, 2)): "base",
    (192, (2, 2, 18, 2)): "large",
}

#: The model whose preprocessing and heads a DeiT or Swin of no known size is taken to share.
REFERENCES = {
    "deit": "deit_tiny_patch16_224",
    "deit_distilled": "deit_tiny_distilled_patch16_224",
    "deit3": "deit3_small_patch16_224",
    "swin": "swin_tiny_patch4_window7_224",
}


@dataclass
class TimmWeights:
    """Weights before their conversion: in the layout of timm 1.x, beside a timm model that tells the architecture.

    The parameters of `model` may be on the meta device. Its `pretrained_cfg` is timm's word for the preprocessing.
    """

    model: nn.Module
    state_dict: dict[str, Tensor]
    form: str


def read_timm_file(path: Path, architecture: str | None) -> TimmWeights:
    """The weights in one file of timm or of the authors of DeiT or Swin.

    Shapes tell the architecture. What they cannot tell (preprocessing, a Swin's image size) is taken from the model that
    `architecture` or the file's name names, and without such a name from the DeiT or Swin that the shapes belong to.

    Raises:
        ValueError: see `load_full_precision`.
    """
    state_dict, entry = read_state_dict(path)
    check_supported_names(state_dict)
    official_swin = is_official_swin(state_dict)
    image_size = swin_image_size(state_dict) if official_swin else None
    state_dict = to_timm_layout(state_dict)
    arguments = timm_arguments(state_dict)
    if image_size is not None:
        arguments["img_size"] = image_size
    if architecture is None:
        name = _name_in(path.stem) or _guess_name(arguments, "dist_token" in state_dict, official=entry == "model")
    elif (name := _name_in(architecture)) is None:
        raise ValueError(f"architecture {architecture!r} is not known to timm{did_you_mean(architecture)}")

    named = build_timm_model(name)
    if architecture is not None:
        # What is said has to be so, but for what training on other data changes.
        arguments = {key: arguments[key] for key in ("img_size", "num_classes") if key in arguments}
    elif "depth" in arguments:
        # Nothing in a ViT tells its heads; they have 64 channels in all published sizes up to large.
        same_width = named.embed_dim == arguments["embed_dim"]
        heads = named.blocks[0].attn.num_heads if same_width else max(1, arguments["embed_dim"] // 64)
        arguments["num_heads"] = heads
        if not same_width or _num_blocks(named) != arguments["depth"]:
            logger.warning(
                f"{path} does not tell how many attention heads its blocks have: {heads} are taken, as its width of"
                f" {arguments['embed_dim']} has elsewhere; with others it would be another model: then say by architecture="
                f" (--architecture) which of timm's it is"
            )
    model = build_timm_model(name, **arguments)
    details = name.partition(".")[0]
    if model.embed_dim != named.embed_dim or _num_blocks(model) != _num_blocks(named):
        details = f"like {details}, with {_num_blocks(model)} blocks of width {model.embed_dim}"
    if official_swin:
        form = f"official Swin file ({details})"
    elif entry == "model" and name.startswith("deit"):
        form = f"official DeiT file ({details})"
    else:
        form = f"timm state dict ({details})"
    return TimmWeights(model, state_dict, form)


def read_timm_folder(folder: Path) -> TimmWeights:
    """The weights in a folder with a config.json of timm's.

    Raises:
        FileNotFoundError: no weights in the folder.
        ValueError: see `load_full_precision`.
    """
    weights = next((folder / name for name in TIMM_WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        files = shortened(sorted(entry.name for entry in folder.iterdir()))
        raise FileNotFoundError(f"the folder '{folder}' has no weights: expected {TIMM_WEIGHTS[0]}, found {files}")
    check_supported(build_timm_model(f"local-dir:{folder}"))
    state_dict = to_timm_layout(read_state_dict(weights)[0])
    arguments = timm_arguments(state_dict)
    arguments = {key: arguments[key] for key in ("img_size", "num_classes") if key in arguments}
    model = build_timm_model(f"local-dir:{folder}", **arguments)
    return TimmWeights(model, state_dict, f"timm folder ({model.pretrained_cfg['architecture']})")


def download_timm(name: str, **kwargs) -> TimmWeights:
    """The pretrained weights of a timm name or of `hf-hub:owner/name`, by timm's own loader.

    Raises:
        ValueError: no such weights, or a model that transformers cannot hold.
    """
    check_supported(build_timm_model(name, **kwargs))
    try:
        model = timm.create_model(name, pretrained=True, **kwargs)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"timm does not give the weights of {name!r}: {first_sentence(error)}") from error
    return TimmWeights(model, model.state_dict(), f"timm model ({name.removeprefix('hf-hub:')})")


def build_timm_model(name: str, **arguments) -> nn.Module:
    """A timm model on the meta device: its shapes and names, without memory.

    Raises:
        ValueError: a name or arguments that timm refuses.
    """
    try:
        with torch.device("meta"):
            return timm.create_model(name, **arguments)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"timm cannot build {name!r} with {arguments}: {first_sentence(error)}") from error


def _num_blocks(model: nn.Module) -> int:
    return len(model.blocks) if hasattr(model, "blocks") else sum(len(stage.blocks) for stage in model.layers)


def registered_name(name: str) -> str | None:
    """`name` as timm knows it, without `timm/`, if it is one of its models, with or without a tag; else None."""
    name = name.removeprefix("timm/")
    model, _, tag = name.partition(".")
    known = timm.is_model(model) and (not tag or is_model_pretrained(name))
    return name if known else None


def did_you_mean(name: str) -> str:
    """`": did you mean 'x'?"`, if there is a timm name near."""
    close = difflib.get_close_matches(name, timm.list_models(list(TIMM_NAMES)), n=1)
    return f": did you mean {close[0]!r}?" if close else ""


@functools.cache
def _official_files() -> dict[str, str]:
    """timm's names, with tag, by the names of the files that the authors of DeiT and Swin published."""
    names = timm.list_pretrained(["deit*", "swin_*"])
    return {Path(config.url).stem: name for name in names if (config := get_pretrained_cfg(name)) and config.url}


def _name_in(text: str) -> str | None:
    """The name of timm's, with its tag if there is one, that `text` is or contains."""
    if text in _official_files():
        return _official_files()[text]
    if registered_name(text):
        return registered_name(text)
    names = timm.list_models(list(TIMM_NAMES))
    return max((name for name in names if re.search(rf"(?<![a-z]){name}", text)), key=len, default=None)


def _guess_name(arguments: dict[str, Any], distilled: bool, official: bool) -> str:
    """The DeiT or Swin that has these arguments (see `timm_arguments`), or one of its family where timm has none.

    A Swin's image size is added to `arguments` if it is not there: the size at which the last stage is one window, as in
    all published ones (224 for windows of 7, 384 for 12).
    """
    width, patch = arguments["embed_dim"], arguments["patch_size"]
    if "window_size" in arguments:
        window, depths = arguments["window_size"], arguments["depths"]
        image = arguments.setdefault("img_size", window * patch * 2 ** (len(depths) - 1))
        name = f"swin_{SWIN_SIZES.get((width, depths))}_patch{patch}_window{window}_{image}"
        return name if timm.is_model(name) else REFERENCES["swin"]
    if not distilled and not arguments["no_embed_class"] and (not official or "init_values" in arguments):
        raise ValueError(
            "a ViT and a DeiT have the same parameters and not the same preprocessing: pass architecture, such as"
            " 'deit_tiny_patch16_224' or 'vit_tiny_patch16_224', or have it in the name of the file"
        )
    family = "deit_distilled" if distilled else "deit3" if arguments["no_embed_class"] else "deit"
    name = f"{family}_patch{patch}_{arguments['img_size']}".replace("_", f"_{DEIT_SIZES.get(width)}_", 1)
    return name if timm.is_model(name) else REFERENCES[family]


def swin_image_size(state_dict: Mapping[str, Tensor]) -> int | None:
    """The image size that the shift mask `(windows, window², window²)` of an official file tells, if it has one."""
    mask = state_dict.get("layers.0.blocks.1.attn_mask")
    if mask is None or "patch_embed.proj.weight" not in state_dict:
        return None
    return math.isqrt(mask.shape[0]) * math.isqrt(mask.shape[1]) * state_dict["patch_embed.proj.weight"].shape[-1]


def timm_arguments(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the timm model that `state_dict`, in the layout of timm 1.x, comes from.

    All that shapes tell: not the heads of a ViT, and not the image size of a Swin.

    Raises:
        ValueError: a parameter that is missing or of an impossible shape.
    """
    swin = any(name.startswith("layers.") for name in state_dict)
    anchors = SWIN_ANCHORS if swin else VIT_ANCHORS
    missing = [name for name in anchors if name not in state_dict]
    if missing:
        raise ValueError(f"it lacks {shortened(missing)}")
    block = "layers.0.blocks.0" if swin else "blocks.0"
    projection = state_dict["patch_embed.proj.weight"]
    head_name = "head.fc.weight" if swin else "head.weight"
    head = state_dict.get(head_name)
    for name, dimensions in (anchors | {head_name: 2}).items():
        if name in state_dict and state_dict[name].ndim != dimensions:
            raise ValueError(
                f"its {name} has the shape {tuple(state_dict[name].shape)}: expected {dimensions} dimensions; get the file"
                f" again"
            )
    if 0 in projection.shape:
        raise ValueError(f"its patch embedding has the shape {tuple(projection.shape)}: expected no dimension of 0")
    arguments = {
        "embed_dim": projection.shape[0],
        "in_chans": projection.shape[1],
        "patch_size": projection.shape[-1],
        "mlp_ratio": state_dict[f"{block}.mlp.fc1.weight"].shape[0] / projection.shape[0],
        "qkv_bias": f"{block}.attn.qkv.bias" in state_dict,
        "num_classes": 0 if head is None else head.shape[0],
    }
    return arguments | (_swin_arguments(state_dict) if swin else _vit_arguments(state_dict, projection.shape[-1]))


def _vit_arguments(state_dict: Mapping[str, Tensor], patch_size: int) -> dict[str, Any]:
    depth = 1 + max(int(match[1]) for name in state_dict if (match := re.match(r"blocks\.(\d+)\.", name)))
    positions = state_dict["pos_embed"].shape[1]
    tokens = 1 + ("dist_token" in state_dict)
    # DeiT III adds its position embeddings before the class token comes in.
    no_embed_class = math.isqrt(positions) ** 2 == positions
    side = math.isqrt(positions if no_embed_class else positions - tokens)
    if not no_embed_class and side**2 + tokens != positions:
        raise ValueError(
            f"its pos_embed has {positions} positions: expected a square number, and {tokens} or none more"
        )
    arguments = {"depth": depth, "img_size": side * patch_size, "no_embed_class": no_embed_class}
    if "blocks.0.ls1.gamma" in state_dict:
        arguments["init_values"] = 1.0
    return arguments


def _swin_arguments(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    tables = {
        tuple(map(int, match.groups())): tensor
        for name, tensor in state_dict.items()
        if (match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table$", name))
    }
    stages = 1 + max(stage for stage, _ in tables)
    if any((stage, 0) not in tables for stage in range(stages)):
        raise ValueError(f"it lacks the first block of one of its {stages} stages")
    windows = {(math.isqrt(table.shape[0]) + 1) // 2 for table in tables.values()}
    if len(windows) > 1:
        raise ValueError(f"it has windows of several sizes ({shortened(map(str, sorted(windows)))})")
    return {
        "depths": tuple(1 + max(block for stage, block in tables if stage == i) for i in range(stages)),
        "num_heads": tuple(tables[i, 0].shape[1] for i in range(stages)),
        "window_size": windows.pop(),
    }


def unsupported_parts(model: nn.Module) -> list[str]:
    """What a timm model has that transformers' ViT, DeiT and Swin do not, in words."""
    parts = _unsupported_names(model.state_dict())
    if type(model) not in TRANSFORMERS_CLASSES:
        return [f"the layers of timm's {type(model).__name__}", *parts]
    swin = isinstance(model, SwinTransformer)
    blocks = [block for stage in model.layers for block in stage.blocks] if swin else list(model.blocks)
    norms = [module for module in model.modules() if hasattr(module, "eps")]
    if not swin:
        if model.cls_token is None:
            parts.append("no class token")
        elif model.global_pool != "token":
            parts.append(f"'{model.global_pool}' pooling")
        if model.pos_embed is None:
            parts.append("no position embeddings")
        if not any(isinstance(norm, nn.LayerNorm) for norm in (model.norm, model.fc_norm)):
            parts.append("no norm after the blocks")
        if any(type(block) is not Block or type(block.attn) is not Attention for block in blocks):
            parts.append("blocks of another kind")
            return parts
    else:
        if model.head.global_pool.pool_type != "avg":
            parts.append(f"'{model.head.global_pool.pool_type}' pooling")
        if len({block.attn.window_size for block in blocks}) > 1 or len(set(blocks[0].attn.window_size)) > 1:
            parts.append("windows of several sizes")
    if len(set(model.patch_embed.img_size)) > 1:
        parts.append("images that are not square")
    if any(not isinstance(block.mlp.act, nn.GELU) or block.mlp.act.approximate != "none" for block in blocks):
        parts.append("another activation than the exact GELU")
    if any(block.attn.proj.bias is None for block in blocks):
        parts.append("projections without a bias")
    # Some norms of transformers' Swin have this eps whatever its config says.
    eps = {norm.eps for norm in norms}
    if any(not isinstance(norm, nn.LayerNorm) for norm in norms) or len(eps) > 1 or (swin and eps != {1e-5}):
        parts.append("norms of another kind or eps")
    return parts


def check_supported(model: nn.Module) -> None:
    """Raise ValueError for a timm model that transformers' ViT, DeiT and Swin cannot hold."""
    parts = unsupported_parts(model)
    if parts:
        raise ValueError(f"it has {shortened(parts)}, which transformers' ViT, DeiT and Swin do not have")


def check_supported_names(state_dict: Iterable[str]) -> None:
    """As `check_supported`, by the names of the parameters alone."""
    parts = _unsupported_names(state_dict)
    if parts:
        raise ValueError(f"it has {shortened(parts)}, which transformers' ViT, DeiT and Swin do not have")


def _unsupported_names(state_dict: Iterable[str]) -> list[str]:
    names = [f".{name}" for name in state_dict]
    return [words for part, words in UNSUPPORTED_NAMES.items() if any(part in name for name in names)]
