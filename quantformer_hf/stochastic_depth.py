"""Stochastic depth (arXiv 1603.09382) on the residual branches of a model that has been built without it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import drop_path
from torch import Tensor, nn


@contextlib.contextmanager
def stochastic_depth(model: nn.Module, rate: float | None) -> Iterator[None]:
    """Inside the `with` block, blocks in training mode drop their attention and their MLP, image by image.

    The probability grows linearly with depth, from 0 to `rate`, as in timm's models; what is kept is divided by the
    probability of keeping it. Swin's own modules, which know the attention alone, give way to these.

    Args:
        model: a ViT, DeiT or Swin of transformers, quantized or not.
        rate: of the last block; None leaves the model as it is.
    """
    layers = [] if rate is None else [m for m in model.modules() if hasattr(m, "layernorm_before")]
    rates = torch.linspace(0, rate or 0.0, len(layers)).tolist()
    handles, own_rates = [], []
    for layer, probability in zip(layers, rates, strict=True):

        def drop(module: nn.Module, arguments: tuple, output: Any, probability: float = probability) -> Any:
            if isinstance(output, Tensor):
                return drop_path(output, probability, module.training)
            return (drop_path(output[0], probability, module.training), *output[1:])

        attention = layer.attention
        if hasattr(layer, "drop_path"):
            # Swin's attention runs on windows: here they are images again.
            attention = layer.drop_path
            if hasattr(attention, "drop_prob"):
                own_rates.append((attention, attention.drop_prob))
                attention.drop_prob = 0.0
        handles += [branch.register_forward_hook(drop) for branch in (attention, layer.mlp)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, own_rate in own_rates:
            module.drop_prob = own_rate
