"""Modules that nobody looks at, and whether they are what they were."""

import copy
from collections import OrderedDict

import pytest
import torch
from conftest import make_batches, make_quantized
from packed_models import logits
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers.utils import output_capturing

from quantformer_hf.observers import Observer
from quantformer_hf.packed_layers import PackedLinear
from quantformer_hf.quiet_modules import Quiet, quiet_modules


class Other(PackedLinear):
    pass


def write(tensor):
    with torch.no_grad():
        tensor.mul_(1)


def listen(module):
    return module.register_forward_hook(lambda *_: None)


def replace_hooks(module):
    module._forward_hooks = OrderedDict()


def become(module, kind):
    module.__class__ = kind


#: What somebody may do to a model, to its first block and to a linear in it, and whether its modules are quiet after it.
CHANGES = {
    "a hook": (lambda vit, block, linear: listen(linear), False),
    "a hook on a leaf": (lambda vit, block, linear: listen(linear.weight_quantizer), False),
    "a hook before": (lambda vit, block, linear: linear.register_forward_pre_hook(lambda *_: None), False),
    "other attributes": (lambda vit, block, linear: setattr(linear, "__dict__", dict(vars(linear))), True),
    "other dictionaries": (lambda vit, block, linear: replace_hooks(linear), True),
    "training": (lambda vit, block, linear: block.dropout.train(), False),
    "a forward of its own": (lambda vit, block, linear: setattr(linear, "forward", lambda x: x), False),
    "another class": (lambda vit, block, linear: become(linear, Other), True),
    "another module": (lambda vit, block, linear: setattr(block.mlp, "fc2", nn.Identity().eval()), True),
    "no module": (lambda vit, block, linear: setattr(block, "dropout", None), True),
    "one module more": (lambda vit, block, linear: linear.add_module("more", nn.Identity().eval()), True),
    "one less": (lambda vit, block, linear: vit.layers.pop(1), True),
    "blocks in another order": (lambda vit, block, linear: vit.layers.insert(1, vit.layers.pop(0)), True),
    "a tensor that was written to": (lambda vit, block, linear: write(linear.bias), True),
    "a buffer that was written to": (lambda vit, block, linear: write(linear.weight_quantizer.codes), True),
    "a tensor elsewhere": (lambda vit, block, linear: setattr(linear.bias, "data", linear.bias.data.clone()), True),
    "another tensor": (lambda vit, block, linear: setattr(linear, "bias", copy.deepcopy(linear.bias)), True),
    "no tensor": (lambda vit, block, linear: setattr(linear, "bias", None), True),
    "one tensor more": (lambda vit, block, linear: block.register_buffer("more", torch.zeros(1)), True),
    "a quantizer off": (lambda vit, block, linear: setattr(linear.input_quantizer, "enabled", False), False),
    "not calibrated": (lambda vit, block, linear: setattr(linear.input_quantizer, "calibrated", False), False),
    "an observer": (lambda vit, block, linear: setattr(linear.input_quantizer, "observer", Observer(64)), False),
}


def make_model():
    return make_quantized("vit", "finetune").pack().backbone


@pytest.mark.parametrize("change", list(CHANGES))
def test_every_change_is_noticed(change):
    model = make_model()
    block = model.vit.layers[0]
    before = quiet_modules(model)
    quiet = Quiet(model, before)
    assert quiet.holds(model)
    act, still_quiet = CHANGES[change]
    act(model.vit, block, block.mlp.fc2)
    assert not quiet.holds(model)
    after = quiet_modules(model)
    assert (after is not None) == still_quiet
    if still_quiet:
        assert Quiet(model, after).holds(model)


def test_who_listens_to_all_modules_is_noticed():
    model = make_model()
    quiet = Quiet(model, quiet_modules(model))
    handle = register_module_forward_hook(lambda *_: None)
    try:
        assert not quiet.holds(model)
    finally:
        handle.remove()
    assert quiet.holds(model)


def test_a_hook_that_moves_to_the_next_module_is_noticed():
    model = make_quantized("swin", "finetune").pack().backbone
    quiet = Quiet(model, quiet_modules(model))
    first, second = model.swin.encoder.layers[0].blocks[0].attention, model.swin.encoder.layers[0].blocks[1].attention
    (hook,) = first._forward_pre_hooks.values()
    first._forward_pre_hooks.clear()
    assert not quiet.holds(model)
    second.register_forward_pre_hook(hook)
    assert not quiet.holds(model)


def test_it_holds_again_when_a_hook_has_gone():
    model = make_model()
    quiet = Quiet(model, quiet_modules(model))
    handle = listen(model.vit.layers[1].attention)
    assert not quiet.holds(model)
    handle.remove()
    assert quiet.holds(model)


def test_hooks_of_transformers_are_quiet_while_nobody_asks():
    packed = make_quantized("vit", "finetune").pack()
    with torch.no_grad():
        packed(make_batches()[0], output_attentions=True)
    model = packed.backbone
    assert any(module._forward_hooks for module in model.modules())
    quiet = Quiet(model, quiet_modules(model))
    assert quiet.holds(model)
    token = output_capturing._active_collector.set({"attentions": []})
    try:
        assert not quiet.holds(model)
    finally:
        output_capturing._active_collector.reset(token)
    assert quiet.holds(model)


def test_it_is_of_one_model():
    model = make_model()
    quiet = Quiet(model, quiet_modules(model))
    assert not quiet.holds(copy.deepcopy(model))


def test_tensors_of_inference_mode_are_those_that_they_were():
    with torch.inference_mode():
        model = make_model()
        quiet = Quiet(model, quiet_modules(model))
        assert quiet.holds(model)
        bias = model.vit.layers[0].mlp.fc2.bias
        bias.data = bias.data.clone()
        assert not quiet.holds(model)


def test_one_size_changes_nothing_for_another():
    packed = make_quantized("swin", "finetune").pack()
    few, many = make_batches()[0][:2], make_batches()[0]
    logits(packed, few)
    logits(packed, many)
    made = dict(packed.backbone.whole._of_size)
    logits(packed, few)
    assert packed.backbone.whole._of_size == made
