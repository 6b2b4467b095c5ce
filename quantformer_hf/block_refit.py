"""Blocks refitted as wholes, by gradient: each to what it puts out in full precision, on what reaches it now.

The layers of a block that `reconstruction.py` has refitted know only of themselves. Here all of its weights, biases, norms
and scales are trained together towards the block's own output (BRECQ, arXiv 2102.05426), with straight-through gradients.
That an image tells of each block what all of its tokens are to become, a thousand images are learnt by heart far less than
where a whole model learns their logits. Tokens count by how much the model's output depends on them, as there.
"""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from .kernels import fake_quantized
from .paused import PausedRuns, Place
from .progress import progress
from .quantize import blocks, full_precision
from .quantizers import LSQWeightQuantizer
from .reconstruction import output_information, relative_weights


#: Images of a step, and of what runs at once.
IMAGES_AT_ONCE = 32

#: Of Adam, at its highest: the share of the distance between two levels by which a weight moves in a step, ...
WEIGHT_RATE = 0.025

#: ... how far a scale or an offset moves, and how far everything else.
SCALE_RATE, RATE = 1e-4, 1e-3

#: Share of the steps in which the rates rise, before they fall along a cosine.
WARM_UP = 0.1

#: A block with what it is given beside the hidden states.
Call = Callable[[nn.Module, Tensor], Tensor]


class BlockRefit:
    """What is remembered of a model in full precision, so that its blocks can be refitted when its weights are others.

    Args:
        model: calibrated, in evaluation.
        batches: `(batch, channels, height, width)` each.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor]):
        self._model, self._batches = model, batches
        self._exact = copy.deepcopy(model)
        self._calls = _calls(model, batches[0])
        with full_precision(self._exact):
            units = blocks(self._exact)
            by_batch = [output_information(self._exact, batch, units)[0] for batch in batches]
        # Of each block `(images, tokens)`.
        self._weights = [relative_weights(torch.cat(of_block)) for of_block in zip(*by_batch, strict=True)]

    def run(self, steps: int) -> None:
        """Train each block of the model for `steps` steps, in the order in which they run."""
        units, exact_units = blocks(self._model), blocks(self._exact)
        [hidden] = entering(self._model, self._batches, units[:1])
        with full_precision(self._exact):
            [exact] = entering(self._exact, self._batches, exact_units[:1])
        for unit, exact_unit, call, weights in progress(
            list(zip(units, exact_units, self._calls, self._weights, strict=True)), "Refitting, blocks"
        ):
            with full_precision(exact_unit):
                exact = _through(exact_unit, call, exact)
            _train(unit, call, hidden, exact, weights, steps)
            hidden = _through(unit, call, hidden)


def _calls(model: nn.Module, batch: Tensor) -> list[Call]:
    """How each block is called: what comes beside the hidden states is alike for all images."""
    found: list[Call] = []

    def look(module: nn.Module, given: tuple, kwargs: dict) -> None:
        found.append(lambda unit, states: _first(unit(states, *given[1:], **kwargs)))

    hooks = [unit.register_forward_pre_hook(look, with_kwargs=True) for unit in blocks(model)]
    try:
        with torch.no_grad(), fake_quantized():
            model(pixel_values=batch[:1], output_hidden_states=False, output_attentions=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _first(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def entering(model: nn.Module, batches: Sequence[Tensor], modules: Sequence[nn.Module]) -> list[Tensor]:
    """What enters each of `modules`, which run in that order, `(images, ..., channels)`."""
    with torch.no_grad(), fake_quantized(), PausedRuns(model, batches, [Place(module) for module in modules]) as runs:
        return [torch.cat(runs.go_on()[1]) for _ in modules]


def _through(unit: nn.Module, call: Call, states: Tensor) -> Tensor:
    with torch.no_grad(), fake_quantized():
        return torch.cat([call(unit, few) for few in states.split(IMAGES_AT_ONCE)])


def _train(unit: nn.Module, call: Call, given: Tensor, wanted: Tensor, weights: Tensor, steps: int) -> None:
    """Let `unit` make `wanted` of `given`, both `(images, tokens, channels)`, by the weighted squared error."""
    optimizer = torch.optim.Adam(_parameter_groups(unit), betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARM_UP * steps), steps)
    # The same draws on every process.
    generator = torch.Generator().manual_seed(0)
    rounds = math.ceil(steps * IMAGES_AT_ONCE / len(given))
    order = torch.cat([torch.randperm(len(given), generator=generator) for _ in range(rounds)])
    for chosen in order.split(IMAGES_AT_ONCE)[:steps]:
        chosen = chosen.to(given.device)
        with torch.enable_grad():
            error = (call(unit, given[chosen]).float() - wanted[chosen].float()).square().mean(-1)
            loss = (weights[chosen] * error).mean()
            loss.backward()
        optimizer.step()
        schedule.step()
        unit.zero_grad()


def _parameter_groups(unit: nn.Module) -> list[dict]:
    """Parameters with their learning rates. Channels stay in their groups."""
    rates = {}
    for name, parameter in unit.named_parameters():
        own = name.rpartition(".")[2]
        if parameter.requires_grad and own != "assignment_logits":
            rates[parameter] = SCALE_RATE if own in ("scale", "offset") else RATE
    for layer in unit.modules():
        quantizer = getattr(layer, "weight_quantizer", None)
        if isinstance(quantizer, LSQWeightQuantizer) and layer.weight in rates:
            rates[layer.weight] = WEIGHT_RATE * quantizer.scale.mean().item()
    return [{"params": [parameter], "lr": rate} for parameter, rate in rates.items()]
