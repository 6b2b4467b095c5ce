"""Which arithmetic a quantized model computes in: integers for inference, floating point for training."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


_in_integers = True


@contextlib.contextmanager
def fake_quantized() -> Iterator[None]:
    """Run quantized models, packed ones too, in floating point inside the `with` block, as training does.

    To export or look at what the quantizers put out. A last digit of a sum may then move an activation to another
    level, so that logits differ a little from those in integers.
    """
    global _in_integers
    before, _in_integers = _in_integers, False
    try:
        yield
    finally:
        _in_integers = before


def in_integers() -> bool:
    """Whether packed layers compute in integers."""
    return _in_integers


def infers(module: nn.Module) -> bool:
    """Whether a layer that is not packed is asked for inference, and so computes what it will compute when packed."""
    return _in_integers and not module.training and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
