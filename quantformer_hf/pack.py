"""From quantized layers to packed ones, and back."""

import torch
from torch import nn

from .attention import AttentionOperands
from .configuration_quantformer import QuantformerConfig
from .kernels import Remembered, describe_device, describe_layer
from .layer_bits import resolve_layer_bits
from .layers import QuantConv2d, QuantLinear
from .packed_layers import PackedLayer, packed_form, unpacked_form
from .packed_model import ModelJob
from .quantize import connect_readers, group_quantizers, make_weight_quantizer, weight_quantized_layers


@torch.no_grad()
def pack(backbone: nn.Module) -> None:
    """Put integer codes in the place of every quantized weight, one layer after the other."""
    for name, layer in _named_weight_quantized_layers(backbone):
        packed = packed_form(layer)
        packed.weight_quantizer.fill(layer.weight, layer.weight_quantizer)
        backbone.set_submodule(name, packed)
    _mark_packed(backbone, True)
    prepare_inference(backbone)


def describe_kernels(model: nn.Module) -> dict[str, str]:
    """What serves each packed layer and attention block, in words, by its name."""
    said = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer):
            said[name] = describe_layer(module, module.reads)
        elif isinstance(module, AttentionOperands):
            said[name] = f"{describe_device(module.query.scale.device)}, A{module.query.grid.bits}"
    return said


def prepare_inference(model: nn.Module) -> None:
    """Make what packed layers remember beside their codes, so that the first call is no slower and can be traced."""
    for module in model.modules():
        if isinstance(module, PackedLayer) and module.can_infer():
            module.plan(module.channel_plan())
        elif isinstance(module, AttentionOperands) and module.query.packed:
            module.operands()


def prepare_anew(backbone: nn.Module, *_) -> None:
    """Forget what the modules of a packed model remember, and make it from the tensors as they are now.

    A hook of `load_state_dict`: graphs are traced with what is remembered, and of some changes tensors say nothing.
    """
    remembered = [held for module in backbone.modules() for held in vars(module).values()]
    for held in remembered:
        if isinstance(held, Remembered | ModelJob):
            held.forget()
    # A skeleton is filled later.
    if not any(tensor.is_meta for tensor in backbone.parameters()):
        prepare_inference(backbone)


def unpack(backbone: nn.Module, config: QuantformerConfig) -> None:
    """The inverse of `pack`: floating-point weights that round to the codes.

    Raises:
        ValueError: codes or scales would be others, in a dtype of few digits. Nothing is changed then.
    """
    bits = resolve_layer_bits(backbone, config)
    unpacked = {}
    for name, layer in _named_weight_quantized_layers(backbone):
        made = unpacked_form(layer, make_weight_quantizer(name, layer, bits[name], config))
        packed, quantizer = layer.weight_quantizer, made.weight_quantizer
        if not (
            torch.equal(quantizer.integers(made.weight), packed.integers())
            and torch.allclose(quantizer.step(made.weight).float(), packed.scale.float(), rtol=1e-5, atol=0)
        ):
            raise ValueError(
                f"layer '{name}' cannot be unpacked in {made.weight.dtype}, which has too few digits for the codes and"
                f" scales of its weights: run model.float() first"
            )
        unpacked[name] = made.train(layer.training)
    for name, made in unpacked.items():
        backbone.set_submodule(name, made)
    _mark_packed(backbone, False)


def _mark_packed(backbone: nn.Module, packed: bool) -> None:
    for quantizer in group_quantizers(backbone):
        quantizer.stage = "packed" if packed else "finetune"
    connect_readers(backbone, packed)


def _named_weight_quantized_layers(backbone: nn.Module) -> list[tuple[str, QuantLinear | QuantConv2d]]:
    wanted = set(weight_quantized_layers(backbone))
    return [(name, module) for name, module in backbone.named_modules() if module in wanted]
