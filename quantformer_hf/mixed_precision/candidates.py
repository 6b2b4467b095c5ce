"""Every tensor of the search space at every width.

Weights are rounded as `reconstruct` rounds them (`reconstruction.py`), and inputs have groups of channels as in the stage
`finetune`: what is measured is what will be used.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attention import AttentionOperands
from ..class_token import ClassTokenQuantizer
from ..groups import channel_importance
from ..modeling_quantformer import QuantformerForImageClassification
from ..paused import PausedRuns, Place
from ..quantize import full_precision, observe, reading_layers
from ..quantizers import GroupActivationQuantizer, LSQWeightQuantizer, build_weight_quantizer
from ..regression import Evidence, Moments, nothing, refit_layer
from ..token_weights import token_weights
from .search_space import SearchSpace


@dataclass
class RoundedWeight:
    """A weight `scale * (codes + shift)`, `(out, in)`, in a byte an element, and the bias that goes with it."""

    codes: Tensor
    scale: Tensor
    shift: float
    bias: Tensor | None

    def value(self) -> Tensor:
        return (self.codes.to(self.scale.dtype) + self.shift) * self.scale.unsqueeze(1)


@dataclass
class Candidates:
    """Every tensor of the search space at every width.

    Attributes:
        weights: by layer, then bits.
        inputs: quantizers with frozen groups, by the name of the one that they stand for, then bits.
        attention: quantizers of the operands, by attention block, then bits.
    """

    weights: dict[str, dict[int, RoundedWeight]]
    inputs: dict[str, dict[int, GroupActivationQuantizer]]
    attention: dict[str, dict[int, AttentionOperands]]

    @classmethod
    def of(
        cls, model: QuantformerForImageClassification, space: SearchSpace, batches: Iterable[Tensor]
    ) -> "Candidates":
        """From a calibrated model in the stage `pretrain`, which stays as it is.

        Args:
            batches: `pixel_values`, to which the weights are fitted.
        """
        backbone = model.backbone
        readers = reading_layers(backbone)
        batches = list(batches)
        moments = _moments(model, batches)
        twin_levels = model.config.twin_levels is not False
        weights = {}
        for name in space.inputs:
            layer = backbone.get_submodule(name)
            seen = moments[backbone.get_submodule(space.inputs[name])]
            weights[name] = {
                bits: _rounded(layer, bits, model.config.weight_quantizer, seen) for bits in space.weight_bits
            }
        inputs = {
            name: {
                bits: grouped_quantizer(quantizer, bits, model.config.num_groups, readers[quantizer], twin_levels)
                for bits in space.activation_bits
            }
            for name, quantizer in ((name, backbone.get_submodule(name)) for name in space.quantizers)
        }
        return cls(weights, inputs, _attention_operands(model, space, batches))


def grouped_quantizer(
    quantizer: GroupActivationQuantizer,
    bits: int,
    num_groups: int,
    readers: list[nn.Linear],
    twin_levels: bool,
) -> GroupActivationQuantizer:
    """A quantizer of `bits` bits with frozen groups, from the ranges that the calibrated `quantizer` has seen."""
    made = GroupActivationQuantizer(quantizer.channels, bits, quantizer.name, True, quantizer.producer)
    if quantizer.class_token is not None:
        ClassTokenQuantizer(made, quantizer.class_token.grid.bits, quantizer.class_token.tokens)
    made.to(quantizer.scale.device)
    for part, seen in zip(made.with_class_token(), quantizer.with_class_token(), strict=True):
        part.channel_quantiles.copy_(seen.channel_quantiles)
        part.begin_search(num_groups, channel_importance(readers), twin_levels)
    for part in made.with_class_token():
        part.freeze_groups()
    return made


def _attention_operands(
    model: QuantformerForImageClassification, space: SearchSpace, batches: list[Tensor]
) -> dict[str, dict[int, AttentionOperands]]:
    present = {name: model.backbone.get_submodule(name).operands for name in space.attention}
    if not present:
        return {}
    with full_precision(model):
        seen = observe(model, batches, [quantizer for each in present.values() for quantizer in each.calibrated_ones()])
    found: dict[str, dict[int, AttentionOperands]] = {}
    for name, operands in present.items():
        found[name] = {}
        for bits in space.attention_bits:
            made = AttentionOperands(bits, name, True, operands.value.observed_channels)
            made.to(operands.value.scale.device).train(operands.training)
            for quantizer, of in zip(made.calibrated_ones(), operands.calibrated_ones(), strict=True):
                quantizer.calibrate(seen[of])
            found[name][bits] = made
    return found


@torch.no_grad()
def _rounded(layer: nn.Linear, bits: int, weight_quantizer: str, moments: Moments) -> RoundedWeight:
    fitted = copy.deepcopy(layer)
    quantizer = build_weight_quantizer(weight_quantizer, bits, layer.out_features).to(layer.weight.device)
    fitted.weight_quantizer = quantizer
    if isinstance(quantizer, LSQWeightQuantizer):
        refit_layer(fitted, Evidence(moments, []))
    bias = None if fitted.bias is None else fitted.bias.detach()
    codes = quantizer.integers(fitted.weight).to(torch.int8)
    return RoundedWeight(codes, quantizer.step(fitted.weight).detach().abs(), quantizer.shift, bias)


def _moments(model: nn.Module, batches: list[Tensor]) -> dict[GroupActivationQuantizer, Moments]:
    """Second moments of what each input quantizer quantizes, in full precision, weighted as in `reconstruct`."""
    readers = reading_layers(model)
    found = {}
    with full_precision(model):
        weights, _ = token_weights(model, batches, readers)
        with torch.no_grad(), PausedRuns(model, batches, [Place(quantizer) for quantizer in readers]) as runs:
            for _ in readers:
                (quantizer, _), given = runs.go_on()
                produced = (quantizer.produce(x.reshape(-1, quantizer.channels).float()) for x in given)
                found[quantizer] = Moments.of(
                    (rows, rows, nothing(rows), weight[quantizer])
                    for rows, weight in zip(produced, weights, strict=True)
                )
    return found
