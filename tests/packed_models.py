"""What the tests of packed modules share: logits, and which modules were run by one call of the kernels."""

import copy

import pytest
import torch
from conftest import make_quantized
from torch import nn

from quantformer_hf.kernels import instruction_set
from quantformer_hf.packed_forms import PLAIN_FORMS


needs_kernels = pytest.mark.skipif(instruction_set() is None, reason="the kernels were not built")


def make_packed(backbone="vit", **arguments):
    return make_quantized(backbone, "finetune", **arguments).pack()


def logits(model, images):
    with torch.no_grad():
        return model(pixel_values=images).logits


def whole_modules(model):
    return [module for module in model.modules() if type(module) in PLAIN_FORMS]


def ran_whole(model, images):
    """Whether the model is one job."""
    with torch.no_grad():
        return model.backbone.whole.run(model.backbone, images, {}) is not None


def ran_as_one(model):
    """The modules whose job was made."""
    return [module for module in whole_modules(model) if module._job.value is not None]


def outermost(modules):
    """Those of `modules` that lie in none of the others."""
    inner = {part for module in modules for part in module.modules() if part is not module}
    return [module for module in modules if module not in inner]


def listen(modules):
    for module in modules:
        module.register_forward_hook(lambda *_: None)


def one_by_one(model, images):
    """Logits of a copy whose layers have hooks, which want to be called."""
    model = copy.deepcopy(model)
    listen(module for module in model.modules() if isinstance(module, nn.Linear))
    result = logits(model, images)
    assert not ran_as_one(model)
    return result
