"""The residual stream of a ViT or DeiT turned by an orthogonal matrix, which spreads outlying channels over all others.

Every layer that writes to the stream turns what it writes, and every layer that reads it turns back, within the weights:
the model computes what it did at the same cost, but in the tensors that are quantized no channel stands out, and values
are nearer to normal (QuaRot, arXiv 2404.00456; SliceGPT, arXiv 2401.15024). Those works need RMSNorm. Here the matrix
has `1 R = 1`: it changes neither mean nor variance of a token, so that `LayerNorm(x R) = LayerNorm(x) R` once weight and
bias of the LayerNorm are folded into its readers.
"""

import functools
import random
from collections.abc import Sequence

import numpy as np
import scipy.fft
import torch
from torch import Tensor, nn

from .layer_bits import CLASSIFIERS


#: Up to so many bits training does better with the channels as they are, whose groups differ more (docs/choices.md).
UNROTATED_BITS = 2


@functools.cache
def rotation(size: int) -> Tensor:
    """R `(size, size)`, float64, the same on every machine: orthogonal, symmetric, and `1 R = 1`.

    `Cᵀ diag(s) C` with C the orthonormal cosine transform, whose first row is constant, and signs s of which the first is +1
    and the others are drawn.
    """
    transform = torch.from_numpy(scipy.fft.dct(np.eye(size), axis=0, norm="ortho"))
    # Python promises the same numbers in all its versions.
    draw = random.Random(0)
    signs = torch.tensor([1.0, *(1.0 if draw.random() < 0.5 else -1.0 for _ in range(size - 1))], dtype=torch.float64)
    return transform.T * signs @ transform


@torch.no_grad()
def rotate_stream(backbone: nn.Module) -> bool:
    """Turn the residual stream of `backbone` by `rotation`, in place.

    Args:
        backbone: an image classifier, with its weights in floating point.

    Returns:
        whether that was done. Not for Swin, whose stream leaves a LayerNorm with a scale for each channel, nor where a layer
        that reads a LayerNorm has no bias to hold the LayerNorm's.
    """
    if backbone.config.model_type not in ("vit", "deit"):
        return False
    encoder = getattr(backbone, backbone.config.model_type)
    classifiers = [module for name, module in backbone.named_children() if name in CLASSIFIERS]
    readers: list[tuple[nn.LayerNorm, list[nn.Linear]]] = [(encoder.layernorm, classifiers)]
    writers: list[nn.Module] = [encoder.embeddings.patch_embeddings.projection]
    for block in encoder.layers:
        attention = block.attention
        readers.append((block.layernorm_before, [attention.q_proj, attention.k_proj, attention.v_proj]))
        readers.append((block.layernorm_after, [block.mlp.fc1]))
        writers += [attention.o_proj, block.mlp.fc2]
    if any(layer.bias is None for _, layers in readers for layer in layers):
        return False

    for norm, layers in readers:
        for layer in layers:
            weight = _wide(layer.weight)
            layer.bias.copy_(_wide(layer.bias) + weight @ _wide(norm.bias))
            layer.weight.copy_(_turned(weight * _wide(norm.weight)))
        norm.weight.fill_(1)
        norm.bias.zero_()
    for layer in writers:
        # Of the patch embedding, a convolution, as well: output channels come first.
        layer.weight.copy_(_turned(layer.weight.flatten(1).T).T.view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.copy_(_turned(layer.bias))
    for name in ("cls_token", "distillation_token", "position_embeddings"):
        if hasattr(encoder.embeddings, name):
            parameter = getattr(encoder.embeddings, name)
            parameter.copy_(_turned(parameter))
    return True


def rotated(hidden_states: Sequence[Tensor]) -> list[Tensor]:
    """Hidden states `(..., size)` of the original model as the rotated one has them."""
    first = hidden_states[0]
    matrix = rotation(first.shape[-1]).to(first.dtype).to(first.device)
    return [states @ matrix for states in hidden_states]


def _turned(rows: Tensor) -> Tensor:
    """`rows R`, `(..., size)`, float64 on the CPU."""
    return _wide(rows) @ rotation(rows.shape[-1])


def _wide(tensor: Tensor) -> Tensor:
    # On the CPU, as some devices have no float64.
    return tensor.cpu().double()
