"""What each width of each tensor loses: a second-order estimate of the divergence of the predictions.

For a small error Δ of one tensor the KL divergence from full precision is `½ Δᵀ F Δ`, F the Fisher information, and
`Δᵀ F Δ = E[(Δ · ∂(z · logits)/∂tensor)²]` over images and over random z of covariance `diag(p) - p pᵀ`, the Fisher
information of the logits (as Hutchinson estimates a trace). One backward pass a draw gives it for all tensors and all
widths together, where running the model for each of them would take hundreds of forward passes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..modeling_quantformer import QuantformerForImageClassification
from ..progress import progress
from ..quantize import full_precision
from ..token_weights import fisher_directions, with_gradient
from .candidates import Candidates
from .search_space import SearchSpace
from .solver import Losses


#: Random z for each image.
DRAWS = 4


def measure_sensitivities(
    model: QuantformerForImageClassification,
    candidates: Candidates,
    space: SearchSpace,
    batches: Sequence[Tensor],
    draws: int = DRAWS,
) -> Losses:
    """The estimated KL divergence, in nats, with each tensor alone at each width.

    Args:
        model: calibrated, in the stage `pretrain`; it is not changed.
        candidates: the tensors at each width.
        batches: `pixel_values`.
        draws: random z for each image.
    """
    weights = {name: dict.fromkeys(space.weight_bits, 0.0) for name in space.inputs}
    inputs = {name: dict.fromkeys(space.activation_bits, 0.0) for name in space.quantizers}
    attention = {name: dict.fromkeys(space.attention_bits, 0.0) for name in space.attention}
    samples = draws * sum(len(batch) for batch in batches)
    training = model.training
    model.eval()
    try:
        for batch in progress(batches, "Measuring sensitivities, batches"):
            for passed in backward_passes(model, space, batch, draws):
                _add_weights(weights, passed, candidates, samples)
                _add_inputs(inputs, passed, candidates, samples)
                _add_attention(attention, passed, candidates, samples)
    finally:
        model.train(training)
    return Losses(weights, inputs, attention)


@dataclass
class BackwardPass:
    """What a forward and a backward pass leave of each layer.

    Attributes:
        layers: the linears, by name.
        quantizers: of each linear's input, by the name of the linear.
        raw: what each quantizer was given, of any shape.
        inputs: what it put out in full precision, `(batch, rows, channels)`.
        gradients: `∂(z · logits)` with respect to the output of each linear, `(batch, rows, out)`.
        attention: what the products of each attention block in play were given, and their output in full precision.
    """

    layers: dict[str, nn.Linear]
    quantizers: dict[str, str]
    raw: dict[str, Tensor]
    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    attention: dict[str, tuple[tuple, Tensor]]


def backward_passes(
    model: QuantformerForImageClassification, space: SearchSpace, batch: Tensor, draws: int
) -> Iterator[BackwardPass]:
    """One for each draw of z, all from one forward pass in full precision."""
    layers = {name: model.backbone.get_submodule(name) for name in space.inputs}
    raw: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    attention: dict[str, tuple[tuple, Tensor]] = {}

    def keep_attention(name: str) -> Callable:
        def keep(module: nn.Module, arguments: tuple, output: tuple[Tensor, Tensor]) -> None:
            given = tuple(of.detach() if isinstance(of, Tensor) else of for of in arguments)
            attention[name] = given, output[0].detach()

        return keep

    def keep_input(name: str) -> Callable:
        def keep(module: nn.Module, arguments: tuple, output: Tensor) -> None:
            raw[name] = arguments[0].detach()
            inputs[name] = _by_image(output.detach(), batch)

        return keep

    def keep_output(name: str) -> Callable:
        def keep(module: nn.Module, arguments: tuple, output: Tensor) -> None:
            outputs[name] = with_gradient(output)

        return keep

    handles = [model.backbone.get_submodule(q).register_forward_hook(keep_input(q)) for q in space.quantizers]
    handles += [layer.register_forward_hook(keep_output(name)) for name, layer in layers.items()]
    blocks = {name: model.backbone.get_submodule(name) for name in space.attention}
    handles += [block.operands.register_forward_hook(keep_attention(name)) for name, block in blocks.items()]
    try:
        with full_precision(model), torch.enable_grad():
            logits = model(batch).logits.float()
    finally:
        for handle in handles:
            handle.remove()
    # The same draws for the same images, on every process.
    generator = torch.Generator().manual_seed(0)
    for z in fisher_directions(logits, draws, generator):
        total = (z * logits).sum()
        gradients = torch.autograd.grad(total, list(outputs.values()), retain_graph=True)
        by_name = {name: _by_image(g, batch) for name, g in zip(outputs, gradients, strict=True)}
        yield BackwardPass(layers, space.inputs, raw, inputs, by_name, attention)


def _by_image(x: Tensor, batch: Tensor) -> Tensor:
    """`(batch, rows, channels)`; Swin's windows of one image come together."""
    return x.reshape(len(batch), -1, x.shape[-1])


@torch.no_grad()
def _add_weights(
    losses: dict[str, dict[int, float]], passed: BackwardPass, candidates: Candidates, samples: int
) -> None:
    for name, layer in passed.layers.items():
        x, gradient = passed.inputs[passed.quantizers[name]], passed.gradients[name]
        by_weight = torch.einsum("bro,bri->boi", gradient, x).flatten(1)
        by_bias = gradient.sum(1)
        for bits, rounded in candidates.weights[name].items():
            slope = by_weight @ (rounded.value() - layer.weight).flatten()
            if rounded.bias is not None:
                slope += by_bias @ (rounded.bias - layer.bias)
            losses[name][bits] += slope.square().sum().item() / (2 * samples)


@torch.no_grad()
def _add_inputs(
    losses: dict[str, dict[int, float]], passed: BackwardPass, candidates: Candidates, samples: int
) -> None:
    gradients: dict[str, Tensor] = {}
    for name, layer in passed.layers.items():
        # An error of a shared tensor reaches all its readers.
        quantizer = passed.quantizers[name]
        gradients[quantizer] = gradients.get(quantizer, 0) + passed.gradients[name] @ layer.weight
    for quantizer, gradient in gradients.items():
        raw, x = passed.raw[quantizer], passed.inputs[quantizer]
        for bits, candidate in candidates.inputs[quantizer].items():
            error = candidate(raw).reshape(x.shape) - x
            losses[quantizer][bits] += (error * gradient).flatten(1).sum(1).square().sum().item() / (2 * samples)


@torch.no_grad()
def _add_attention(
    losses: dict[str, dict[int, float]], passed: BackwardPass, candidates: Candidates, samples: int
) -> None:
    for name, (given, output) in passed.attention.items():
        # What the products put out, the output projection reads: `(batch, heads, tokens, head_dim)`, heads side by side.
        reader = f"{name}.o_proj"
        gradient = passed.gradients[reader] @ passed.layers[reader].weight
        for bits, candidate in candidates.attention[name].items():
            error = (candidate(*given)[0] - output).transpose(1, 2).reshape(gradient.shape)
            losses[name][bits] += (error * gradient).flatten(1).sum(1).square().sum().item() / (2 * samples)
