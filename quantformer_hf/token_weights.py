"""How much each token counts where layers are fitted: the root of its Fisher information.

What the model's prediction depends on is to be kept; without that the few tokens with huge values, which cannot be met,
spoil the fit of all others (FIMA-Q, arXiv 2506.11543, weighs errors by the Fisher information).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .progress import progress
from .quantizers import GroupActivationQuantizer


#: Power of a token's Fisher information that becomes its weight.
TOKEN_WEIGHT_POWER = 0.5

#: Random directions for each image. A class drawn from the prediction would do for one, and leave the root of the
#: information to few images: where the model is certain, it nearly always draws what that says, whose gradient is next to
#: nothing.
DRAWS = 2

Readers = Mapping[GroupActivationQuantizer, Sequence[nn.Linear]]


def token_weights(
    model: nn.Module, batches: Sequence[Tensor], readers: Readers
) -> tuple[list[dict[GroupActivationQuantizer, Tensor]], list[Tensor]]:
    """The root of the information that the outputs of the readers of each quantizer hold about the class, row by row.

    No labels are needed, and it does not matter how images come in batches, but for the random numbers.

    Args:
        model: an image classifier in full precision.
        batches: `(batch, channels, height, width)` each.
        readers: the linears that read what each quantizer puts out.

    Returns:
        for each batch the weights of the rows that a quantizer sees, `(rows,)`, of mean one over all batches, and the
        logits, float32.
    """
    # The same directions for the same images, on every process.
    generator = torch.Generator().manual_seed(0)
    watched = progress(batches, "Weighing tokens, batches")
    information, logits = zip(*(_information(model, batch, readers, generator) for batch in watched), strict=True)
    weights: list[dict[GroupActivationQuantizer, Tensor]] = [{} for _ in batches]
    for quantizer in readers:
        roots = [of_batch[quantizer].pow(TOKEN_WEIGHT_POWER) for of_batch in information]
        mean = torch.cat(roots).mean()
        for of_batch, root in zip(weights, roots, strict=True):
            # A model that is certain of all images has no gradient left to tell tokens by.
            of_batch[quantizer] = root / mean if mean > 0 else torch.ones_like(root)
    return weights, list(logits)


def _information(
    model: nn.Module, pixel_values: Tensor, readers: Readers, generator: torch.Generator
) -> tuple[dict[GroupActivationQuantizer, Tensor], Tensor]:
    """`E ‖∂ log p(y) / ∂(outputs of the readers)‖²` for each row, `(rows,)`, and the logits."""
    outputs: dict[GroupActivationQuantizer, list[Tensor]] = {quantizer: [] for quantizer in readers}

    def keep(quantizer: GroupActivationQuantizer) -> Callable[[nn.Module, tuple, Tensor], None]:
        return lambda _, __, output: outputs[quantizer].append(with_gradient(output))

    handles = [
        layer.register_forward_hook(keep(quantizer)) for quantizer, layers in readers.items() for layer in layers
    ]
    try:
        with torch.enable_grad():
            logits = model(pixel_values=pixel_values).logits.float()
    finally:
        for handle in handles:
            handle.remove()
    flat = [output for group in outputs.values() for output in group]
    owners = [quantizer for quantizer, group in outputs.items() for _ in group]
    information = dict.fromkeys(readers, 0.0)
    for direction in fisher_directions(logits, DRAWS, generator) if flat else ():
        gradients = torch.autograd.grad((direction * logits).sum(), flat, retain_graph=True)
        for quantizer, gradient in zip(owners, gradients, strict=True):
            information[quantizer] += gradient.float().square().sum(-1).flatten() / DRAWS
    return information, logits.detach()


def fisher_directions(logits: Tensor, draws: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Random z with `E z zᵀ = diag(p) - p pᵀ`, the Fisher information of the logits, for p their softmax.

    So the expectation of `(zᵀ ∂logits/∂x)²` is the information about the class that there is in x.

    Args:
        logits: `(batch, classes)`, float32.
        draws: how many z.
        generator: of random numbers, on the CPU, which are the same for any device.
    """
    root = logits.detach().softmax(-1).sqrt()
    for _ in range(draws):
        noise = torch.randn(logits.shape, generator=generator).to(logits)
        yield root * (noise - root * (root * noise).sum(-1, keepdim=True))


def with_gradient(output: Tensor) -> Tensor:
    """The same tensor, which has a gradient even where no parameter before it has."""
    return output if output.requires_grad else output.requires_grad_()
