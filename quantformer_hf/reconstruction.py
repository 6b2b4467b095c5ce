"""Scales and weights refitted to calibration data, layer by layer, without training.

Each quantizer of what a block linear reads is fitted to what reaches it through the quantized layers before it. Then
each linear that reads it is to give on these quantized inputs what the full-precision one gives on its own: a
regression with a strong pull to the old weight (`regression.py`), then rounding column by column, where the columns
not yet rounded make up for those that are (GPTQ, arXiv 2210.17323, with the asymmetric target of GPTAQ, arXiv
2504.02692). A linear that writes to the residual stream is to make up for what the stream beside it lacks as well:
errors would otherwise add up from block to block. Tokens count by how much the model's output depends on them
(`token_weights.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .groups import channel_importance
from .observers import channel_quantiles, weighted_sample
from .paused import PausedRuns, Place
from .progress import progress
from .quantizers import GroupActivationQuantizer, LSQWeightQuantizer
from .regression import Evidence, Moments, Part, nothing, refit_layer
from .token_weights import Readers


#: For the quantizers whose one reader writes to the residual stream: where that is seen before and after it.
Streams = Mapping[GroupActivationQuantizer, tuple[Place, Place]]


class Seen(NamedTuple):
    """What some images bring to a quantizer. Rows lie image by image.

    Attributes:
        given: what is to be quantized, `(rows, channels)`.
        exact: the same in full precision, `(rows, channels)`, or for a reader that writes to the residual stream what the
            stream then is, `(rows, out)`.
        before: what the stream is before that, quantized, `(rows, out)`; None where the reader does not write to it.
        weights: of `token_weights`, `(rows,)`.
        images: how many.
    """

    given: Tensor
    exact: Tensor
    before: Tensor | None
    weights: Tensor
    images: int


def reconstruct_layers(
    model: nn.Module,
    batches: Sequence[Tensor],
    readers: Readers,
    streams: Streams,
    weights: Sequence[Mapping[GroupActivationQuantizer, Tensor]],
    full_precision: Callable[[], Any],
    heads: Sequence[nn.Module],
) -> list[Tensor]:
    """Refit `readers` in the order in which they run, each on what the refitted ones before it give.

    What all images bring to a quantizer refits it and its readers, before any of them goes on.

    Args:
        model: a calibrated classifier, in evaluation, without gradients and fake-quantized (`kernels.fake_quantized`).
        batches: `(batch, channels, height, width)` each.
        readers: as in `token_weights`.
        streams: of the quantizers whose reader is to make up for what the residual stream lacks.
        weights: `token_weights` of each batch.
        full_precision: context manager that turns all quantizers off.
        heads: the classifiers, in the order in which they run.

    Returns:
        what enters each of `heads` in the end, `(images, channels)`.
    """
    at_heads = [Place(head) for head in heads]
    stops, watched = [*map(Place, readers), *at_heads], [place for place, _ in streams.values()]
    # A run in full precision goes on to where one sees what is to be reached.
    exact_stops = [
        streams[quantizer][1] if quantizer in streams else Place(quantizer) for quantizer in readers
    ] + at_heads
    with PausedRuns(model, batches, exact_stops) as exact_runs, PausedRuns(model, batches, stops, watched) as runs:
        with full_precision():
            _, next_exact = exact_runs.go_on()
        for _ in progress(readers, "Refitting, inputs of layers"):
            (quantizer, _), given = runs.go_on()
            exact = next_exact
            with full_precision():
                # It is to have passed the readers before they change.
                _, next_exact = exact_runs.go_on()
            before = [None] * len(batches)
            if quantizer in streams:
                before = [_rows(seen.pop(streams[quantizer][0])) for seen in runs.seen]
            seen = [
                Seen(_rows(of_batch), _rows(expected), stream, weight[quantizer], len(batch))
                for of_batch, expected, stream, weight, batch in zip(
                    given, exact, before, weights, batches, strict=True
                )
            ]
            _refit_readers(quantizer, readers[quantizer], seen)
            # Not to be held while the runs go on.
            del given, exact, before, seen
        return [torch.cat(runs.go_on()[1]) for _ in heads]


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).float()


def _refit_readers(quantizer: GroupActivationQuantizer, layers: Sequence[nn.Linear], seen: Sequence[Seen]) -> None:
    """Refit `quantizer`, and that of the class token, then `layers`, which read them."""
    tokens = [quantizer.parts(of_images.given.unflatten(0, (of_images.images, -1))) for of_images in seen]
    weights = [quantizer.parts(of_images.weights.view(of_images.images, -1, 1)) for of_images in seen]
    for parts, of_parts in zip(zip(*tokens, strict=True), zip(*weights, strict=True), strict=True):
        part = parts[0][0]
        weight = torch.cat([own.flatten() for _, own in of_parts])
        # Of the last block nobody looks at what patches become.
        if weight.sum() > 0:
            drawn = part.produce(weighted_sample([own.flatten(0, 1) for _, own in parts], weight))
            part.refit(channel_quantiles(drawn), channel_importance(layers))
    layers = [layer for layer in layers if isinstance(getattr(layer, "weight_quantizer", None), LSQWeightQuantizer)]
    if not layers:
        return
    parts = (_part(quantizer, layers[0], of_images) for of_images in seen)
    if seen[0].before is None:
        evidence = Evidence(Moments.of(parts), [])
    else:
        evidence = Evidence.of(parts, [of_images.images for of_images in seen])
    for layer in layers:
        refit_layer(layer, evidence)


def _part(quantizer: GroupActivationQuantizer, layer: nn.Linear, seen: Seen) -> Part:
    """What `seen` tells of what `layer`, which reads `quantizer`, is to give."""
    tokens = quantizer.parts(seen.given.unflatten(0, (seen.images, -1)))
    x_hat = torch.cat([part.quantize(own, 1.0) for part, own in tokens], 1).flatten(0, 1)
    if seen.before is None:
        return quantizer.produce(seen.exact), x_hat, nothing(x_hat), seen.weights
    bias = None if layer.bias is None else layer.bias.float()
    missing = seen.exact - seen.before - F.linear(x_hat, layer.weight.float(), bias)
    return nothing(x_hat), x_hat, missing, seen.weights
