"""Which layers, and which tensors of which shape, the checkpoint of a config holds: found without building the model."""

from collections.abc import Iterator

from .backbone_layers import Backbone, Layer
from .configuration_quantformer import QuantformerConfig
from .grids import FULL_PRECISION_BITS
from .layer_bits import LayerBits, attention_bits_by_name, layer_bits_by_kind
from .observers import QUANTILES
from .packed_checkpoint import DIGEST_NAME
from .packing import DIGEST_BYTES, packed_width
from .quantizers import LSQWeightQuantizer, weight_quantizer_kind


#: Prefix of the tensors of the stock model in a checkpoint.
PREFIX = "backbone."

#: The operands of the two attention products, a quantizer each; that of the probabilities has no tensors.
OPERANDS = ("query", "key", "value", "probabilities")


def layer_bits(backbone: Backbone, config: QuantformerConfig) -> dict[str, LayerBits]:
    """The bit widths of each layer by its name, with `config.layer_bits` applied.

    Raises:
        ValueError: a pattern of `layer_bits` that matches no layer.
    """
    return layer_bits_by_kind({name: layer.kind for name, layer in backbone.layers.items()}, config)


def quantizer_bits(backbone: Backbone, config: QuantformerConfig) -> dict[str, int]:
    """The bit width of each quantizer by its name, without `backbone.` before it; not in the order of the modules."""
    widths = {}
    for name, bits in layer_bits(backbone, config).items():
        if bits.weight_bits != FULL_PRECISION_BITS:
            widths[f"{name}.weight_quantizer"] = bits.weight_bits
        if bits.activation_bits != FULL_PRECISION_BITS:
            widths[backbone.layers[name].input_quantizer] = bits.activation_bits
            if config.class_token_bits is not None and backbone.layers[name].kind == "block":
                widths[f"{backbone.layers[name].input_quantizer}.class_token"] = config.class_token_bits
    for attention, bits in attention_bits_by_name(backbone.attention, config).items():
        if bits != FULL_PRECISION_BITS:
            widths |= {f"{attention}.operands.{operand}": bits for operand in OPERANDS}
    return widths


def expected_tensors(backbone: Backbone, config: QuantformerConfig) -> dict[str, tuple[int, ...] | None]:
    """Shapes of the tensors of a checkpoint in `config.stage`, by name; None where the shape is not looked at."""
    bits = layer_bits(backbone, config)
    shapes = dict(backbone.others)
    for name, layer in backbone.layers.items():
        shapes |= dict(_layer_tensors(name, layer, bits[name], config))
    for quantizer in quantizer_bits(backbone, config):
        if ".operands." in quantizer and not quantizer.endswith(".probabilities"):
            shapes |= {f"{quantizer}.scale": (1,), f"{quantizer}.offset": (1,)}
    shapes = {f"{PREFIX}{name}": shape for name, shape in shapes.items()}
    shapes["concentration_degree"] = (len(backbone.attention),)
    shapes["bit_widths"] = (len(quantizer_bits(backbone, config)),)
    if config.stage == "packed":
        shapes[DIGEST_NAME] = (DIGEST_BYTES,)
    return shapes


def _layer_tensors(
    name: str, layer: Layer, bits: LayerBits, config: QuantformerConfig
) -> Iterator[tuple[str, tuple[int, ...]]]:
    packed = config.stage == "packed" and bits.weight_bits != FULL_PRECISION_BITS
    kind = weight_quantizer_kind(config.weight_quantizer if layer.kind == "block" else "lsq", bits.weight_bits)
    learned = issubclass(kind, LSQWeightQuantizer)
    if packed:
        yield f"{name}.weight_quantizer.codes", (layer.shape[0], packed_width(layer.inputs, bits.weight_bits))
    else:
        yield f"{name}.weight", layer.shape
    if packed or (learned and bits.weight_bits != FULL_PRECISION_BITS):
        yield f"{name}.weight_quantizer.scale", (layer.shape[0],)
    if layer.bias:
        yield f"{name}.bias", (layer.shape[0],)
    if bits.activation_bits == FULL_PRECISION_BITS:
        return
    grouped = layer.kind == "block"
    groups = config.num_groups if grouped and config.stage != "pretrain" else 1
    own = [layer.input_quantizer]
    if grouped and config.class_token_bits is not None:
        own.append(f"{layer.input_quantizer}.class_token")
    for quantizer in own:
        yield f"{quantizer}.scale", (groups,)
        yield f"{quantizer}.offset", (groups,)
        if grouped and config.stage == "pretrain":
            yield f"{quantizer}.channel_quantiles", (layer.inputs, len(QUANTILES))
    if not grouped or config.stage == "pretrain":
        return
    if config.stage == "search":
        yield f"{layer.input_quantizer}.assignment_logits", (groups, layer.inputs)
    else:
        yield f"{layer.input_quantizer}.group_index", (layer.inputs,)
