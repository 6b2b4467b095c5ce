"""The layers of a stock ViT, DeiT or Swin by name, shape and input, found without building the model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Layer:
    """A linear, or the patch embedding, of a backbone.

    Attributes:
        kind: `embedding`, `block` or `classifier`.
        shape: of the weight, `(out, in)` or `(out, in, height, width)`.
        bias: whether it has one.
        input_quantizer: name of what quantizes its input, which several layers may share.
    """

    kind: str
    shape: tuple[int, ...]
    bias: bool
    input_quantizer: str

    @property
    def inputs(self) -> int:
        """Columns of the weight as a matrix."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True)
class Backbone:
    """The parts of a stock ViT, DeiT or Swin.

    Attributes:
        layers: by name.
        attention: names of the attention blocks.
        others: shapes of the other parameters by name; None where the shape is not looked at.
    """

    layers: dict[str, Layer]
    attention: list[str]
    others: dict[str, tuple[int, ...] | None]


def describe_backbone(config: PreTrainedConfig) -> Backbone:
    """The parts of the image classifier of `config` (`vit`, `deit` or `swin`)."""
    parts = _describe_swin(config) if config.model_type == "swin" else _describe_vit(config)
    width = config.hidden_size
    heads = ["classifier"]
    if "DeiTForImageClassificationWithTeacher" in (config.architectures or ()):
        heads = ["cls_classifier", "distillation_classifier"]
    for head in heads:
        parts.layers[head] = Layer("classifier", (config.num_labels, width), True, f"{head}.input_quantizer")
    return parts


def _describe_vit(config: PreTrainedConfig) -> Backbone:
    root, width = config.model_type, config.hidden_size
    parts = Backbone({}, [], {})
    _add_embedding(parts, root, config, width)
    special = 2 if root == "deit" else 1
    patches = math.prod(i // p for i, p in zip(pair(config.image_size), pair(config.patch_size), strict=True))
    parts.others[f"{root}.embeddings.cls_token"] = (1, 1, width)
    if root == "deit":
        parts.others[f"{root}.embeddings.distillation_token"] = (1, 1, width)
    parts.others[f"{root}.embeddings.position_embeddings"] = (1, patches + special, width)
    for number in range(config.num_hidden_layers):
        block = f"{root}.layers.{number}"
        _add_block(
            parts, block, width, config.intermediate_size, config.qkv_bias, f"{block}.layernorm_before.output_quantizer"
        )
    _add_norm(parts, f"{root}.layernorm", width)
    return parts


def _describe_swin(config: PreTrainedConfig) -> Backbone:
    parts = Backbone({}, [], {})
    _add_embedding(parts, "swin", config, config.embed_dim)
    _add_norm(parts, "swin.embeddings.norm", config.embed_dim)
    if config.use_absolute_embeddings:
        parts.others["swin.embeddings.position_embeddings"] = None
    for stage, depth in enumerate(config.depths):
        width = config.embed_dim * 2**stage
        for number in range(depth):
            block = f"swin.encoder.layers.{stage}.blocks.{number}"
            # Padding comes between LayerNorm and attention: the attention block quantizes (quantize.find_shared_inputs).
            quantizer = f"{block}.attention.input_quantizer"
            _add_block(parts, block, width, int(config.mlp_ratio * width), config.qkv_bias, quantizer)
            # Its window is the image's where that is smaller.
            parts.others[f"{block}.attention.relative_position_bias.relative_position_bias_table"] = None
        if stage < len(config.depths) - 1:
            merging = f"swin.encoder.layers.{stage}.downsample"
            parts.layers[f"{merging}.reduction"] = Layer(
                "block", (2 * width, 4 * width), False, f"{merging}.norm.output_quantizer"
            )
            _add_norm(parts, f"{merging}.norm", 4 * width)
    _add_norm(parts, "swin.layernorm", config.hidden_size)
    return parts


def _add_embedding(parts: Backbone, root: str, config: PreTrainedConfig, width: int) -> None:
    name = f"{root}.embeddings.patch_embeddings.projection"
    shape = (width, config.num_channels, *pair(config.patch_size))
    parts.layers[name] = Layer("embedding", shape, True, f"{name}.input_quantizer")


def _add_block(parts: Backbone, block: str, width: int, hidden: int, qkv_bias: bool, qkv_quantizer: str) -> None:
    attention = f"{block}.attention"
    parts.attention.append(attention)
    for letter in "qkv":
        parts.layers[f"{attention}.{letter}_proj"] = Layer("block", (width, width), qkv_bias, qkv_quantizer)
    output, fc1, fc2 = f"{attention}.o_proj", f"{block}.mlp.fc1", f"{block}.mlp.fc2"
    parts.layers[output] = Layer("block", (width, width), True, f"{output}.input_quantizer")
    parts.layers[fc1] = Layer("block", (hidden, width), True, f"{block}.layernorm_after.output_quantizer")
    parts.layers[fc2] = Layer("block", (width, hidden), True, f"{fc2}.input_quantizer")
    _add_norm(parts, f"{block}.layernorm_before", width)
    _add_norm(parts, f"{block}.layernorm_after", width)


def _add_norm(parts: Backbone, name: str, width: int) -> None:
    parts.others.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, of which a config may have one number for both."""
    return tuple(value) if isinstance(value, list | tuple) else (value, value)
