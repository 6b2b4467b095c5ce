"""The classifier refitted to what reaches it through the quantized layers, so that classes are as probable as before.

What the blocks have lost reaches the classifier as noise, of some channels more than of others, and a weight made for
exact features takes it all at its word. Linears of the blocks are refitted to their own outputs (`regression.py`). The
classifier's are what counts, so that it is refitted to the divergence of the class probabilities, by a regression to soft
labels that pulls to the old weight.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import QuantLinear
from .losses import logit_distillation


#: How strong the pull is, for each channel that is read; docs/choices.md has what others cost.
PULL = 100.0

#: Of L-BFGS. The loss is convex, and ten times as many changed no fourth digit of the divergence from 384 images.
ITERATIONS = 30


def refit_classifier(heads: Sequence[nn.Linear], inputs: Sequence[Tensor], logits: Tensor) -> None:
    """Refit `heads`, whose mean is what the model puts out, and the scales of their weights.

    Args:
        heads: linears, quantized or not. With a distillation token there are two.
        inputs: what enters each of them, `(images, channels)`.
        logits: of full precision, `(images, classes)`.
    """
    read = [_read(head, x.float()) for head, x in zip(heads, inputs, strict=True)]
    weights = [head.weight.float() for head in heads]
    bias = torch.stack([head.bias.float() for head in heads]).mean(0)
    change, shift = fit_step(torch.cat(read, 1) / len(heads), logits.float(), torch.cat(weights, 1), bias)
    for head, own in zip(heads, change.split([weight.shape[1] for weight in weights], 1), strict=True):
        head.weight += own.to(head.weight)
        head.bias += shift.to(head.bias)
        if isinstance(head, QuantLinear) and head.weight_quantizer is not None:
            head.weight_quantizer.calibrate(head.weight)


def _read(head: nn.Linear, x: Tensor) -> Tensor:
    """What the weight of `head` multiplies, where `x` enters."""
    return head.quantized_operands(x)[0] if isinstance(head, QuantLinear) else x


def fit_step(inputs: Tensor, logits: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`(D, d)` that minimize `mean KL(p ‖ softmax(x (W + D)ᵀ + b + d)) + λ (v ‖D‖² + ‖d‖²) / 2` over images and classes.

    `λ = PULL · channels · h / images`, where h, the mean of `p (1 - p)`, is how curved the divergence is in one logit:
    like the ridge of Hoerl, Kennard and Baldwin (Communications in Statistics 4(2), 1975), the pull grows with what there
    is to learn and falls with the images. h lets one constant serve ten classes and a thousand. (Cross-validation is of no
    use where a class has one image: it tells how well classes do that were never seen.)

    Args:
        inputs: x, `(images, channels)`, of mean variance v.
        logits: of full precision, `(images, classes)`; p are their probabilities.
        weight, bias: W `(classes, channels)` and b `(classes,)`.

    Returns:
        of the shapes of W and b.
    """
    probabilities = logits.softmax(1)
    curvature = (probabilities * (1 - probabilities)).mean()
    pull = PULL * inputs.shape[1] * curvature / len(inputs)
    variance = inputs.var(0, correction=0).mean()
    change, shift = torch.zeros_like(weight).requires_grad_(), torch.zeros_like(bias).requires_grad_()
    solver = torch.optim.LBFGS([change, shift], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        divergence = logit_distillation(F.linear(inputs, weight + change, bias + shift), logits)
        value = divergence + pull * (variance * change.square().sum() + shift.square().sum()) / 2
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return change.detach(), shift.detach()
