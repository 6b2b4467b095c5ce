"""Which bit widths each layer has: the config's defaults by kind of layer, and its overrides."""

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .backbone_layers import describe_backbone
from .configuration_quantformer import QuantformerConfig, nearest
from .grids import FULL_PRECISION_BITS


#: Of an entry of `layer_bits`: what speaks of the products of attention blocks.
ATTENTION_KEY = "attention_bits"

CLASSIFIERS = ("classifier", "cls_classifier", "distillation_classifier")


@dataclass(frozen=True)
class LayerBits:
    """Bit widths of one layer's weight and input; 32 leaves it in floating point."""

    weight_bits: int
    activation_bits: int


def resolve_layer_bits(backbone: nn.Module, config: QuantformerConfig) -> dict[str, LayerBits]:
    """The bit widths of each linear and convolution of `backbone`, by name, with `config.layer_bits` applied in order.

    Raises:
        ValueError: a pattern of `layer_bits` that matches no layer.
    """
    kinds = {}
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            kinds[name] = "embedding"
        elif isinstance(module, nn.Linear):
            kinds[name] = "classifier" if name in CLASSIFIERS else "block"
    return layer_bits_by_kind(kinds, config)


def layer_bits_by_kind(kinds: Mapping[str, str], config: QuantformerConfig) -> dict[str, LayerBits]:
    """As `resolve_layer_bits`, from the names of the layers and their kinds: `embedding`, `block` or `classifier`."""
    by_kind = {
        "embedding": LayerBits(config.embedding_bits, config.embedding_bits),
        "block": LayerBits(config.weight_bits, config.activation_bits),
        "classifier": LayerBits(config.classifier_bits, config.classifier_bits),
    }
    bits = {name: by_kind[kind] for name, kind in kinds.items()}
    for pattern, override in (config.layer_bits or {}).items():
        if not isinstance(override, Mapping):
            override = {"weight_bits": override, "activation_bits": override}
        of_layers = {key: value for key, value in override.items() if key != ATTENTION_KEY}
        if of_layers:
            for name in _matching(pattern, bits, "layer"):
                bits[name] = replace(bits[name], **of_layers)
    return bits


def attention_bits_by_name(blocks: Iterable[str], config: QuantformerConfig) -> dict[str, int]:
    """The bits of the operands of each attention block, 32 for floating point, with `config.layer_bits` applied in order.

    Args:
        blocks: names of the attention blocks of the backbone.

    Raises:
        ValueError: a pattern of `layer_bits` that has `attention_bits` and matches no attention block.
    """
    everywhere = FULL_PRECISION_BITS if config.attention_bits is None else config.attention_bits
    bits = dict.fromkeys(blocks, everywhere)
    for pattern, override in (config.layer_bits or {}).items():
        if isinstance(override, Mapping) and ATTENTION_KEY in override:
            for name in _matching(pattern, bits, "attention block"):
                bits[name] = override[ATTENTION_KEY]
    return bits


def _matching(pattern: str, names: Mapping[str, Any], what: str) -> list[str]:
    matches = fnmatch.filter(names, pattern)
    if not matches:
        raise ValueError(f"layer_bits names {pattern!r}, which matches no {what}{nearest(pattern, names)}")
    return matches


def check_same_quantization(backbone: nn.Module, config: QuantformerConfig, told: dict[str, Any], source: str) -> None:
    """Raise ValueError if the quantized model of `config` is quantized otherwise than `told` asks for.

    Args:
        backbone: of the model.
        told: quantization arguments that somebody gave, and image and window size. Groups are those to come where the model
            has none yet.
        source: where the model comes from, for the message.
    """
    wanted = {name: told[name] for name in told if name not in ("bit_width", "layer_bits")}
    if "bit_width" in told:
        wanted = {"weight_bits": told["bit_width"], "activation_bits": told["bit_width"]} | wanted
    if config.stage == "pretrain":
        wanted = {name: value for name, value in wanted.items() if name not in ("num_groups", "twin_levels")}
    for name, value in wanted.items():
        found = getattr(config if hasattr(config, name) else config.backbone_config, name, None)
        # Checkpoints that are older than these have none.
        found = bool(found) if name == "twin_levels" else found
        found = FULL_PRECISION_BITS if name == "attention_bits" and found is None else found
        if value not in (None, found):
            raise ValueError(
                f"{source} has {name} {found}, and not {value}: start from the full-precision checkpoint, or leave out"
                f" --{name}"
            )
    if not told.get("layer_bits"):
        return
    of_told = QuantformerConfig.from_dict(config.to_dict() | {"layer_bits": told["layer_bits"]})
    asked = resolve_layer_bits(backbone, of_told)
    for name, found in resolve_layer_bits(backbone, config).items():
        if found != asked[name]:
            raise ValueError(
                f"layer '{name}' of {source} has W{found.weight_bits}A{found.activation_bits}, and layer_bits asks for"
                f" W{asked[name].weight_bits}A{asked[name].activation_bits}: start from the full-precision checkpoint, or"
                f" leave out --layer_bits"
            )
    blocks = describe_backbone(config.backbone_config).attention
    asked, found = (attention_bits_by_name(blocks, each) for each in (of_told, config))
    for name in blocks:
        if found[name] != asked[name]:
            raise ValueError(
                f"the attention block '{name}' of {source} has {found[name]} bits, and layer_bits asks for {asked[name]}:"
                f" start from the full-precision checkpoint, or leave out --layer_bits"
            )
