"""Scales and weights refitted to calibration data, layer by layer, without training.

Each quantizer of activations is fitted to what reaches it through the quantized layers before it. Then each linear that
reads it is to give on these quantized inputs what the full-precision one gives on its own: a regression with a strong pull
to the old weight (`regression.py`), then rounding column by column, where the columns not yet rounded make up for those
that are (GPTQ, arXiv 2210.17323, with the asymmetric target of GPTAQ, arXiv 2504.02692). A linear that writes to the
residual stream is to make up for what the stream beside it lacks as well: errors would otherwise add up from block to
block. Tokens count by how much the model's output depends on them (FIMA-Q, arXiv 2506.11543, weighs errors by the Fisher
information): without that the few tokens with huge values, which cannot be met, spoil the fit of all others.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .groups import channel_importance
from .observers import weighted_quantiles
from .quantizers import GroupActivationQuantizer, LSQWeightQuantizer
from .regression import Evidence, Moments, nothing, refit_layer


#: Power of a token's Fisher information that becomes its weight.
TOKEN_WEIGHT_POWER = 0.5

Readers = Mapping[GroupActivationQuantizer, Sequence[nn.Linear]]

#: For the quantizers whose one reader writes to the residual stream: whose input the stream then is (a LayerNorm), or the
#: block, whose output it is.
Streams = Mapping[GroupActivationQuantizer, nn.Module]


def token_weights(
    model: nn.Module, pixel_values: Tensor, readers: Readers
) -> tuple[dict[GroupActivationQuantizer, Tensor], Tensor]:
    """How much each row that a quantizer sees matters: `‖∂ log p(y)/∂(outputs of its readers)‖`, `(rows,)`, of mean one.

    y is drawn from the model's own prediction, so that no labels are needed. The logits are returned beside them, float32.

    Args:
        model: an image classifier in full precision.
        pixel_values: `(batch, channels, height, width)`.
        readers: the linears that read what each quantizer puts out.
    """
    outputs: dict[GroupActivationQuantizer, list[Tensor]] = {quantizer: [] for quantizer in readers}
    handles = [
        layer.register_forward_hook(lambda _, __, output, quantizer=quantizer: outputs[quantizer].append(output))
        for quantizer, layers in readers.items()
        for layer in layers
    ]
    try:
        with torch.enable_grad():
            logits = model(pixel_values=pixel_values).logits.float()
            # The same draw for the same images, on every process.
            generator = torch.Generator().manual_seed(0)
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(1)
            loss = F.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
            flat = [output for group in outputs.values() for output in group]
            gradients = iter(torch.autograd.grad(loss, flat))
    finally:
        for handle in handles:
            handle.remove()
    weights = {}
    for quantizer, group in outputs.items():
        information = sum(next(gradients).float().square().sum(-1).flatten() for _ in group)
        weight = information.pow(TOKEN_WEIGHT_POWER)
        # A model that is certain of all images has no gradient left to tell tokens by.
        weights[quantizer] = weight / weight.mean() if weight.mean() > 0 else torch.ones_like(weight)
    return weights, logits.detach()


@dataclass
class Seen:
    """What a run of a unit shows. Tensors are `(rows, channels)`, float32, but for `output`.

    Attributes:
        inputs: of each quantizer, in the order in which they ran.
        streams: of those in `Streams`, the residual stream with the output of their reader in it.
        output: of the unit, where it was run to the end.
        images: in which the rows lie one after the other.
    """

    inputs: dict[GroupActivationQuantizer, Tensor]
    streams: dict[GroupActivationQuantizer, Tensor]
    output: Tensor | None
    images: int

    def beside(self, quantizer: GroupActivationQuantizer, layer: nn.Linear) -> Tensor:
        """The stream without what `layer`, which reads `quantizer`, has added to it."""
        tokens = self.inputs[quantizer].unflatten(0, (self.images, -1))
        return self.streams[quantizer] - layer(tokens.to(layer.weight.dtype)).float().flatten(0, 1)


def look_inside(
    unit: nn.Module,
    positional: tuple,
    named: dict[str, Any],
    streams: Streams,
    quantizers: Sequence[GroupActivationQuantizer],
    hidden: Tensor,
    to_the_end: bool = True,
) -> Seen:
    """Run `unit` on `hidden`, with the other arguments that it is called with, and watch `quantizers`.

    Not `to_the_end`, it stops as soon as all is seen.
    """
    writers = [quantizer for quantizer in quantizers if quantizer in streams]
    norms = [streams[quantizer] for quantizer in writers if streams[quantizer] is not unit]
    to_the_end = to_the_end or len(norms) < len(writers)
    output = None
    with captured_inputs([*quantizers, *norms], stop=not to_the_end) as seen:
        output = unit(hidden, *positional, **named)
        output = output[0] if isinstance(output, tuple) else output
        seen[unit] = output.reshape(-1, output.shape[-1]).float()
    return Seen(
        {quantizer: seen[quantizer] for quantizer in seen if quantizer in quantizers},
        {quantizer: seen[streams[quantizer]] for quantizer in writers},
        output,
        len(hidden),
    )


def reconstruct_units(
    units: Sequence[nn.Module],
    readers: Readers,
    streams: Streams,
    full_precision_inputs: list[Tensor],
    quantized_inputs: list[Tensor],
    arguments: Sequence[tuple[tuple, dict]],
    weights: Sequence[Mapping[GroupActivationQuantizer, Tensor]],
    full_precision: Callable[[], Any],
) -> None:
    """Refit the linears of each unit in the order in which they run, each on what the refitted ones before it give.

    Args:
        units: modules of which each one's output is the next one's input (blocks, patch merging).
        readers: as in `token_weights`.
        streams: of the quantizers whose reader is to make up for what the residual stream lacks.
        full_precision_inputs, quantized_inputs: of the first unit, a tensor a batch.
        arguments: what else each unit is called with, positional and by keyword.
        weights: `token_weights` of each batch.
        full_precision: context manager that turns all quantizers off.
    """
    for unit, (positional, named) in zip(units, arguments, strict=True):
        inside = [module for module in unit.modules() if module in readers]
        look = functools.partial(look_inside, unit, positional, named, streams)
        expected = []
        with full_precision():
            for batch, hidden in enumerate(full_precision_inputs):
                expected.append(look(inside, hidden))
                full_precision_inputs[batch] = expected[batch].output
        # In the order in which they ran.
        for quantizer in list(expected[0].inputs):
            _refit_readers(quantizer, readers[quantizer], look, expected, quantized_inputs, weights, full_precision)
        quantized_inputs[:] = [look([], hidden).output for hidden in quantized_inputs]


def _refit_readers(
    quantizer: GroupActivationQuantizer,
    layers: Sequence[nn.Linear],
    look: Callable[..., Seen],
    expected: Sequence[Seen],
    inputs: Sequence[Tensor],
    weights: Sequence[Mapping[GroupActivationQuantizer, Tensor]],
    full_precision: Callable[[], Any],
) -> None:
    """Refit `quantizer`, then what reads it.

    Args:
        look: `look_inside` of the quantized unit.
        expected: what a run in full precision showed.
        weights: `token_weights` of each batch.
        full_precision: as in `reconstruct_units`.
    """
    seen = [look([quantizer], hidden, to_the_end=False) for hidden in inputs]
    writes = quantizer in seen[0].streams
    if writes:
        with full_precision():
            others = [of_batch.beside(quantizer, layers[0]) for of_batch in expected]
        missing = [other - of_batch.beside(quantizer, layers[0]) for other, of_batch in zip(others, seen, strict=True)]
    else:
        missing = [nothing(of_batch.inputs[quantizer]) for of_batch in seen]
    _refit_quantizer(quantizer, layers, seen, torch.cat([of_batch[quantizer] for of_batch in weights]))
    layers = [layer for layer in layers if isinstance(getattr(layer, "weight_quantizer", None), LSQWeightQuantizer)]
    if not layers:
        return
    parts = (
        (
            quantizer.produce(expected[batch].inputs[quantizer]),
            _quantized(quantizer, seen[batch]),
            missing[batch],
            weights[batch][quantizer],
        )
        for batch in range(len(seen))
    )
    evidence = Evidence.of(parts, [len(batch) for batch in inputs]) if writes else Evidence(Moments.of(parts), [])
    for layer in layers:
        refit_layer(layer, evidence)


def _refit_quantizer(
    quantizer: GroupActivationQuantizer, layers: Sequence[nn.Linear], seen: Sequence[Seen], row_weights: Tensor
) -> None:
    """Fit `quantizer`, and that of the class token, to what they were given; `row_weights` is `(rows,)`."""
    images = sum(of_batch.images for of_batch in seen)
    produced = torch.cat([quantizer.produce(of_batch.inputs[quantizer]) for of_batch in seen])
    tokens, weights = (of_rows.unflatten(0, (images, -1)) for of_rows in (produced, row_weights.unsqueeze(1)))
    for (part, own), (_, weight) in zip(quantizer.parts(tokens), quantizer.parts(weights), strict=True):
        # Of the last block nobody looks at what patches become.
        if weight.sum() > 0:
            part.refit(weighted_quantiles(own.flatten(0, 1), weight.flatten()), channel_importance(layers))


def _quantized(quantizer: GroupActivationQuantizer, seen: Seen) -> Tensor:
    """What `quantizer` puts out for what it was given, `(rows, channels)`."""
    parts = quantizer.parts(seen.inputs[quantizer].unflatten(0, (seen.images, -1)))
    return torch.cat([part.quantize(tokens, 1.0) for part, tokens in parts], 1).flatten(0, 1)


class _AllSeen(Exception):
    """Ends a run of which nothing more is wanted."""


@contextlib.contextmanager
def captured_inputs(modules: Sequence[nn.Module], stop: bool = False) -> Iterator[dict[nn.Module, Tensor]]:
    """Collect what enters `modules` inside the `with` block, as `(rows, channels)` float32, in the order of their calls.

    With `stop`, the block is left when the last of them is called.
    """
    seen: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, arguments: tuple) -> None:
        seen[module] = arguments[0].detach().reshape(-1, arguments[0].shape[-1]).float()
        if stop and len(seen) == len(modules):
            raise _AllSeen

    handles = [module.register_forward_pre_hook(keep) for module in modules]
    try:
        with contextlib.suppress(_AllSeen):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def unit_inputs(
    model: nn.Module, units: Sequence[nn.Module], batches: Iterable[Tensor]
) -> tuple[list[Tensor], list[tuple[tuple, dict]]]:
    """What enters the first unit, and what else each unit is called with, of which the first batch tells.

    That one alone is run to the end.

    Args:
        units: as in `reconstruct_units`.
        batches: `pixel_values`, `(batch, channels, height, width)` each.

    Returns:
        `(batch, tokens, channels)` of each batch, and positional and named arguments of each unit.
    """
    first: list[Tensor] = []
    arguments: dict[nn.Module, tuple[tuple, dict]] = {}

    def keep(unit: nn.Module, positional: tuple, named: dict) -> None:
        if unit is units[0]:
            first.append(positional[0])
            if len(first) > 1:
                raise _AllSeen
        arguments[unit] = positional[1:], named

    handles = [unit.register_forward_pre_hook(keep, with_kwargs=True) for unit in units]
    try:
        for batch in batches:
            with contextlib.suppress(_AllSeen):
                model(pixel_values=batch)
    finally:
        for handle in handles:
            handle.remove()
    return first, [arguments[unit] for unit in units]
