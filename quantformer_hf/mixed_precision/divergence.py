"""What a choice of widths really loses: the divergence of the predictions with it put in."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..image_batches import pixel_values_of
from ..losses import logit_distillation
from ..modeling_quantformer import QuantformerForImageClassification
from ..quantize import blocks, full_precision
from .candidates import Candidates
from .search_space import SearchSpace, Widths


class Divergence:
    """KL divergence of the predictions from full precision, on a few images, with any choice of widths put in.

    Args:
        model: calibrated, in the stage `pretrain`; it is itself again after each call.
        candidates: the tensors to put in.
        batches: `pixel_values`, or dictionaries that hold them.
    """

    def __init__(
        self,
        model: QuantformerForImageClassification,
        candidates: Candidates,
        space: SearchSpace,
        batches: Iterable[Tensor | Mapping[str, Any]],
    ):
        self.model, self.candidates, self.space = model, candidates, space
        self.units = blocks(model.backbone)
        names = {module: name for name, module in model.backbone.named_modules()}
        self.unit_names = [names[unit] for unit in self.units]
        self.batches = [pixel_values_of(batch).to(model.device) for batch in batches]
        if not self.batches:
            raise ValueError("no image to measure sensitivities on: give a few batches")
        # What each unit puts out in full precision, and the logits, a batch.
        self.outputs: list[list[Any]] = []
        self.logits: list[Tensor] = []
        with self._evaluating():
            for batch in self.batches:
                outputs: list[Any] = []
                handles = [
                    unit.register_forward_hook(lambda _, __, output, outputs=outputs: outputs.append(output))
                    for unit in self.units
                ]
                try:
                    self.logits.append(model(batch).logits)
                finally:
                    for handle in handles:
                        handle.remove()
                self.outputs.append(outputs)

    def of(
        self, weights: Mapping[str, int], inputs: Mapping[str, int], attention: Mapping[str, int] | None = None
    ) -> tuple[float, float]:
        """With these weights, input quantizers and attention blocks at these bits, and everything else in full precision.

        Returns:
            the divergence, in nats, and the share of images that keep the class that they have in full precision.
        """
        attention = attention or {}
        first = min(self._unit_of(name) for name in (*weights, *inputs, *attention))
        total, kept, images = 0.0, 0, 0
        with self._evaluating(), self._put_in(weights, inputs, attention):
            for batch, outputs, taught in zip(self.batches, self.outputs, self.logits, strict=True):
                with replayed(self.units[:first], outputs):
                    logits = self.model(batch).logits
                total += logit_distillation(logits, taught).item() * len(batch)
                kept += (logits.argmax(1) == taught.argmax(1)).sum().item()
                images += len(batch)
        return total / images, kept / images

    def of_widths(self, widths: Widths) -> tuple[float, float]:
        """Of a whole allocation; as `of`."""
        return self.of(
            {name: widths[name].weight_bits for name in self.space.inputs},
            {quantizer: widths[name].activation_bits for name, quantizer in self.space.inputs.items()},
            {name: widths[name].activation_bits for name in self.space.attention},
        )

    def _unit_of(self, name: str) -> int:
        return next(i for i, unit in enumerate(self.unit_names) if name.startswith(f"{unit}."))

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), full_precision(self.model):
                yield
        finally:
            self.model.train(training)

    @contextlib.contextmanager
    def _put_in(
        self, weights: Mapping[str, int], inputs: Mapping[str, int], attention: Mapping[str, int]
    ) -> Iterator[None]:
        backbone = self.model.backbone
        before_layers, before_quantizers = {}, {}
        try:
            for name, bits in weights.items():
                layer, rounded = backbone.get_submodule(name), self.candidates.weights[name][bits]
                before_layers[name] = layer.weight.data, None if layer.bias is None else layer.bias.data
                layer.weight.data = rounded.value().to(layer.weight.dtype)
                if rounded.bias is not None:
                    layer.bias.data = rounded.bias
            chosen = {name: self.candidates.inputs[name][bits] for name, bits in inputs.items()}
            chosen |= {f"{name}.operands": self.candidates.attention[name][bits] for name, bits in attention.items()}
            for name, quantizer in chosen.items():
                before_quantizers[name] = backbone.get_submodule(name)
                backbone.set_submodule(name, quantizer)
            yield
        finally:
            for name, (weight, bias) in before_layers.items():
                layer = backbone.get_submodule(name)
                layer.weight.data = weight
                if bias is not None:
                    layer.bias.data = bias
            for name, quantizer in before_quantizers.items():
                backbone.set_submodule(name, quantizer)


@contextlib.contextmanager
def replayed(units: list[nn.Module], outputs: list[Any]) -> Iterator[None]:
    """Let `units` put out what they once did, without running them, inside the `with` block."""
    for unit, output in zip(units, outputs, strict=False):
        unit.forward = lambda *_, _output=output, **__: _output
    try:
        yield
    finally:
        for unit in units:
            del unit.forward
