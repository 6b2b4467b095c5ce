"""Which arithmetic a quantized model computes in: integers for inference, floating point for training."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import nn


#: Of a thread, or another context, by itself.
_in_floating_point: ContextVar[bool] = ContextVar("in_floating_point", default=False)


@contextlib.contextmanager
def fake_quantized() -> Iterator[None]:
    """Run quantized models, packed ones too, in floating point inside the `with` block, as training does.

    To export or look at what the quantizers put out. A last digit of a sum may then move an activation to another
    level, so that logits differ a little from those in integers. Other threads go on as they were.
    """
    token = _in_floating_point.set(True)
    try:
        yield
    finally:
        _in_floating_point.reset(token)


def in_integers() -> bool:
    """Whether packed layers compute in integers: always in a graph that is traced, where the context cannot be read."""
    return torch.compiler.is_compiling() or not _in_floating_point.get()


def infers(module: nn.Module) -> bool:
    """Whether a layer that is not packed is asked for inference, and so computes what it will compute when packed."""
    return not (module.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or _in_floating_point.get())
