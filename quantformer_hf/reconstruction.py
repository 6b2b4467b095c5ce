"""Scales and weights refitted to calibration data, layer by layer, without training.

Each quantizer of activations is fitted to what reaches it through the quantized layers before it. Then each linear that
reads it is to give on these quantized inputs what the full-precision one gives on its own: a regression with a strong pull
to the old weight, then rounding column by column, where the columns not yet rounded make up for the error of those that are
(GPTQ, arXiv 2210.17323, with the asymmetric target of GPTAQ, arXiv 2504.02692). A linear that writes to the residual stream
is to make up for what the stream beside it lacks as well: errors would otherwise add up from block to block. Tokens count by
how much the model's output depends on them (FIMA-Q, arXiv 2506.11543, weighs errors by the Fisher information): without that
the few tokens with huge values, which cannot be met, spoil the fit of all others.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .grids import Grid, fit_row_scales
from .groups import channel_importance
from .observers import weighted_quantiles
from .quantizers import GroupActivationQuantizer, LSQWeightQuantizer


#: Ridge of the regression, pulling to the old weight, as a share of the inputs' mean variance. The class token of each
#: image counts for much, and there are few of them: with less the regression learns them by heart.
REGRESSION_DAMPING = 3.0

#: Ridge of the rounding, likewise.
ROUNDING_DAMPING = 0.1

#: Power of a token's Fisher information that becomes its weight.
TOKEN_WEIGHT_POWER = 0.5

Readers = Mapping[GroupActivationQuantizer, Sequence[nn.Linear]]

#: For the quantizers whose one reader writes to the residual stream: whose input the stream then is (a LayerNorm), or the
#: block, whose output it is.
Streams = Mapping[GroupActivationQuantizer, nn.Module]


@dataclass
class Moments:
    """Weighted second moments of a layer's inputs, quantized (x̂) and in full precision (x), and of what else its output
    is to make up for (e), about their means.

    Attributes:
        quantized: `E[x̂ x̂ᵀ]`, `(channels, channels)`, float64.
        cross: `E[x x̂ᵀ]`, likewise.
        missing: `E[e x̂ᵀ]`, `(out, channels)`; of no rows where the layer has nothing to make up for.
        mean, quantized_mean: `(channels,)`.
        missing_mean: `(out,)`.
    """

    quantized: Tensor
    cross: Tensor
    missing: Tensor
    mean: Tensor
    quantized_mean: Tensor
    missing_mean: Tensor

    @classmethod
    def of(cls, parts: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]) -> "Moments":
        """From x, x̂ `(rows, channels)`, e `(rows, out)` or `(rows, 0)` and the rows' weights `(rows,)`, in parts."""
        sums: list[Tensor] | None = None
        for x, x_hat, missing, weights in parts:
            column = weights.unsqueeze(1)
            part = [(rows * column).T @ x_hat for rows in (x_hat, x, missing)]
            part += [weights @ rows for rows in (x_hat, x, missing)]
            part = [tensor.double() for tensor in (*part, weights.sum())]
            sums = part if sums is None else [a + b for a, b in zip(sums, part, strict=True)]
        *products, quantized_mean, mean, missing_mean = (tensor / sums[-1] for tensor in sums[:-1])
        quantized, cross, missing = (
            product - torch.outer(of, quantized_mean)
            for product, of in zip(products, (quantized_mean, mean, missing_mean), strict=True)
        )
        return cls(quantized, cross, missing, mean, quantized_mean, missing_mean)

    def damping(self, share: float) -> Tensor:
        """`share` of the mean variance, on a diagonal."""
        variance = self.quantized.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        return share * variance * torch.eye(len(self.mean), dtype=torch.float64, device=self.mean.device)


def nothing(rows: Tensor) -> Tensor:
    """What a layer that reads `rows` is to make up for, where it writes to no stream: `(rows, 0)`."""
    return rows.new_zeros(len(rows), 0)


def refit_weight(weight: Tensor, moments: Moments) -> Tensor:
    """`argmin_V E‖W x + e - V x̂‖² + λ‖W - V‖²`, `(out, in)`: what the layer should be, before it is rounded."""
    wide = weight.double()
    damped = moments.quantized + moments.damping(REGRESSION_DAMPING)
    wanting = wide @ (moments.cross - moments.quantized)
    if len(moments.missing):
        wanting += moments.missing
    return wide + torch.linalg.solve(damped, wanting, left=False)


def round_columns(weight: Tensor, scale: Tensor, grid: Grid, hessian: Tensor, block: int = 64) -> tuple[Tensor, Tensor]:
    """Round a weight column by column, those of the largest curvature first (GPTQ, arXiv 2210.17323).

    Args:
        weight: `(out, in)`, float32.
        scale: `(out,)`.
        grid: signed grid.
        hessian: `(in, in)`, float64, positive definite.
        block: columns whose effect on all later ones is added at once.

    Returns:
        the rounded weight, and the weight as it was when each column was rounded: it rounds to the same.
    """
    order = hessian.diagonal().argsort(descending=True)
    factor = torch.linalg.cholesky(hessian[order][:, order])
    factor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).to(weight)
    latent = weight[:, order].clone()
    rounded = torch.empty_like(latent)
    for start in range(0, latent.shape[1], block):
        end = min(start + block, latent.shape[1])
        errors = latent.new_empty(len(latent), end - start)
        for column in range(start, end):
            codes = (latent[:, column] / scale).round().clamp(grid.qmin, grid.qmax)
            rounded[:, column] = codes * scale
            error = (latent[:, column] - rounded[:, column]) / factor[column, column]
            latent[:, column + 1 : end] -= torch.outer(error, factor[column, column + 1 : end])
            errors[:, column - start] = error
        latent[:, end:] -= errors @ factor[start:end, end:]
    back = order.argsort()
    return rounded[:, back], latent[:, back]


@torch.no_grad()
def refit_layer(layer: nn.Linear, moments: Moments) -> None:
    """Refit and round the weight of `layer`, set its scales, and let its bias take up the mean of the error."""
    before = layer.weight.double()
    target = refit_weight(layer.weight, moments).float()
    quantizer = layer.weight_quantizer
    scale = fit_row_scales(target, quantizer.grid)
    hessian = moments.quantized + moments.damping(ROUNDING_DAMPING)
    rounded, latent = round_columns(target, scale, quantizer.grid, hessian)
    layer.weight.copy_(latent)
    quantizer.scale.copy_(scale)
    if layer.bias is not None:
        shift = before @ moments.mean - rounded.double() @ moments.quantized_mean
        if len(moments.missing_mean):
            shift += moments.missing_mean
        layer.bias += shift.to(layer.bias)


def token_weights(model: nn.Module, pixel_values: Tensor, readers: Readers) -> dict[GroupActivationQuantizer, Tensor]:
    """How much each row that a quantizer sees matters: `‖∂ log p(y)/∂(outputs of its readers)‖`, `(rows,)`, of mean one.

    y is drawn from the model's own prediction, so that no labels are needed.

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
    return weights


@dataclass
class Seen:
    """What a run of a unit shows. Tensors are `(rows, channels)`, float32, but for `output`.

    Attributes:
        inputs: of each quantizer, in the order in which they ran.
        streams: of those in `Streams`, the residual stream with the output of their reader in it.
        output: of the unit, where it was run to the end.
    """

    inputs: dict[GroupActivationQuantizer, Tensor]
    streams: dict[GroupActivationQuantizer, Tensor]
    output: Tensor | None

    def beside(self, quantizer: GroupActivationQuantizer, layer: nn.Linear) -> Tensor:
        """The stream without what `layer`, which reads `quantizer`, has added to it."""
        return self.streams[quantizer] - layer(self.inputs[quantizer].to(layer.weight.dtype)).float()


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
    if quantizer in seen[0].streams:
        with full_precision():
            others = [of_batch.beside(quantizer, layers[0]) for of_batch in expected]
        missing = [other - of_batch.beside(quantizer, layers[0]) for other, of_batch in zip(others, seen, strict=True)]
    else:
        missing = [nothing(of_batch.inputs[quantizer]) for of_batch in seen]
    row_weights = torch.cat([of_batch[quantizer] for of_batch in weights])
    produced = torch.cat([quantizer.produce(of_batch.inputs[quantizer]) for of_batch in seen])
    quantizer.refit(weighted_quantiles(produced, row_weights), channel_importance(layers))
    layers = [layer for layer in layers if isinstance(getattr(layer, "weight_quantizer", None), LSQWeightQuantizer)]
    if not layers:
        return
    moments = Moments.of(
        (
            quantizer.produce(expected[batch].inputs[quantizer]),
            quantizer.quantize(seen[batch].inputs[quantizer], 1.0),
            missing[batch],
            weights[batch][quantizer],
        )
        for batch in range(len(seen))
    )
    for layer in layers:
        refit_layer(layer, moments)


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
    """What enters the first unit, a tensor a batch, and what else each unit is called with."""
    first: list[Tensor] = []
    arguments: dict[nn.Module, tuple[tuple, dict]] = {}

    def keep(unit: nn.Module, positional: tuple, named: dict) -> None:
        if unit is units[0]:
            first.append(positional[0])
        arguments[unit] = positional[1:], named

    handles = [unit.register_forward_pre_hook(keep, with_kwargs=True) for unit in units]
    try:
        for batch in batches:
            model(pixel_values=batch)
    finally:
        for handle in handles:
            handle.remove()
    return first, [arguments[unit] for unit in units]
