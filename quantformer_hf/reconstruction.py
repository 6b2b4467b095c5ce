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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .groups import channel_importance
from .observers import channel_quantiles, weighted_sample
from .quantizers import GroupActivationQuantizer, LSQWeightQuantizer
from .regression import Evidence, Moments, Part, nothing, refit_layer


#: Power of a token's Fisher information that becomes its weight.
TOKEN_WEIGHT_POWER = 0.5

#: Images whose rows are looked at together, so that little besides the inputs of a unit is held.
IMAGES_AT_ONCE = 32

Readers = Mapping[GroupActivationQuantizer, Sequence[nn.Linear]]

#: For the quantizers whose one reader writes to the residual stream: whose inputs the stream is before and after that. After
#: the last one of a block, whose output it then is, the block itself.
Streams = Mapping[GroupActivationQuantizer, tuple[nn.Module, nn.Module]]


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


def run_unit(unit: nn.Module, hidden: Tensor, arguments: tuple[tuple, dict[str, Any]]) -> Tensor:
    """What `unit` makes of `hidden` `(images, tokens, channels)` and of what else it is called with."""
    positional, named = arguments
    output = unit(hidden, *positional, **named)
    return output[0] if isinstance(output, tuple) else output


def reconstruct_unit(
    unit: nn.Module,
    arguments: tuple[tuple, dict[str, Any]],
    exact: Tensor,
    hidden: Tensor,
    readers: Readers,
    streams: Streams,
    weights: Mapping[GroupActivationQuantizer, Tensor],
    full_precision: Callable[[], Any],
) -> tuple[Tensor, Tensor]:
    """Refit the linears of a unit (block, patch merging) in the order in which they run.

    It runs once with all images: what reaches a quantizer refits it and its readers, and goes on through them.

    Args:
        arguments: what else `unit` is called with, positional and by keyword.
        exact, hidden: what enters it in full precision and quantized, `(images, tokens, channels)`.
        readers: as in `token_weights`.
        streams: of the quantizers whose reader is to make up for what the residual stream lacks.
        weights: `token_weights` of all images.
        full_precision: context manager that turns all quantizers off.

    Returns:
        what leaves it in full precision and quantized, which is what enters the next one.
    """
    inside = [module for module in unit.modules() if module in readers]
    places = {place for quantizer in inside for place in streams.get(quantizer, ())}
    with full_precision(), captured_inputs([*inside, *places]) as expected:
        exact = run_unit(unit, exact, arguments)
    expected_output = exact.reshape(-1, exact.shape[-1]).float()

    def refit(quantizer: GroupActivationQuantizer, given: tuple[Tensor]) -> None:
        rows = given[0].reshape(-1, quantizer.channels).float()
        wanted = None
        if quantizer in streams:
            before, after = streams[quantizer]
            wanted = (expected_output if after is unit else expected[after]) - seen[before]
        # Not to be held any longer: the inputs of fc2 are the largest that there are.
        in_full_precision, layers = expected.pop(quantizer), readers[quantizer]
        _refit_readers(quantizer, layers, rows, in_full_precision, wanted, weights[quantizer], len(hidden))

    with captured_inputs(places) as seen, contextlib.ExitStack() as hooks:
        for quantizer in inside:
            hooks.callback(quantizer.register_forward_pre_hook(refit).remove)
        return exact, run_unit(unit, hidden, arguments)


def _refit_readers(
    quantizer: GroupActivationQuantizer,
    layers: Sequence[nn.Linear],
    given: Tensor,
    exact: Tensor,
    wanted: Tensor | None,
    weights: Tensor,
    images: int,
) -> None:
    """Refit `quantizer`, and that of the class token, then `layers`, which read them.

    Args:
        given, exact: what is to be quantized, and what it is in full precision, `(rows, channels)`.
        wanted: what the one layer, if it writes to the residual stream, should add to it, `(rows, out)`.
        weights: of `token_weights`, `(rows,)`.
        images: in which the rows lie one after the other.
    """
    tokens, of_tokens = (rows.unflatten(0, (images, -1)) for rows in (given, weights.unsqueeze(1)))
    for (part, own), (_, weight) in zip(quantizer.parts(tokens), quantizer.parts(of_tokens), strict=True):
        # Of the last block nobody looks at what patches become.
        if weight.sum() > 0:
            drawn = part.produce(weighted_sample(own.flatten(0, 1), weight.flatten()))
            part.refit(channel_quantiles(drawn), channel_importance(layers))
    layers = [layer for layer in layers if isinstance(getattr(layer, "weight_quantizer", None), LSQWeightQuantizer)]
    if not layers:
        return
    counts = [len(chunk) for chunk in torch.arange(images).split(IMAGES_AT_ONCE)]
    parts = _parts(quantizer, layers[0], given, exact, wanted, weights, counts)
    evidence = Evidence(Moments.of(parts), []) if wanted is None else Evidence.of(parts, counts)
    for layer in layers:
        refit_layer(layer, evidence)


def _parts(
    quantizer: GroupActivationQuantizer,
    layer: nn.Linear,
    given: Tensor,
    exact: Tensor,
    wanted: Tensor | None,
    weights: Tensor,
    counts: Sequence[int],
) -> Iterator[Part]:
    """What the regression goes by, so many images at a time as `counts` says; arguments of `_refit_readers`."""
    rows_of_image = len(given) // sum(counts)
    first = 0
    for count in counts:
        rows = slice(first, first + count * rows_of_image)
        tokens = quantizer.parts(given[rows].unflatten(0, (count, -1)))
        x_hat = torch.cat([part.quantize(of_part, 1.0) for part, of_part in tokens], 1).flatten(0, 1)
        if wanted is None:
            yield quantizer.produce(exact[rows]), x_hat, nothing(x_hat), weights[rows]
        else:
            bias = None if layer.bias is None else layer.bias.float()
            missing = wanted[rows] - F.linear(x_hat, layer.weight.float(), bias)
            yield nothing(x_hat), x_hat, missing, weights[rows]
        first = rows.stop


class _AllSeen(Exception):
    """Ends a run of which nothing more is wanted."""


@contextlib.contextmanager
def captured_inputs(modules: Collection[nn.Module], stop: bool = False) -> Iterator[dict[nn.Module, Tensor]]:
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
) -> tuple[Tensor, list[tuple[tuple, dict[str, Any]]]]:
    """What enters the first unit, and what else each unit is called with, of which the first batch tells.

    That one alone is run to the end.

    Args:
        units: modules of which each one's output is the next one's input.
        batches: `pixel_values`, `(batch, channels, height, width)` each.

    Returns:
        `(images, tokens, channels)`, and positional and named arguments of each unit.
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
    return torch.cat(first), [arguments[unit] for unit in units]
