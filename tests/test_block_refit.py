"""Blocks refitted as wholes."""

import pytest
import torch
from conftest import BACKBONES, make_batches, make_full_precision, make_quantized

from quantformer_hf import block_refit
from quantformer_hf.kernels import fake_quantized
from quantformer_hf.quantize import blocks, full_precision, searched_quantizers


STEPS = 40


def put_out(model, batches):
    """What each block puts out, `(images, tokens, channels)`."""
    outputs = {}
    hooks = [
        unit.register_forward_hook(
            lambda module, _, output: outputs.setdefault(module, []).append(block_refit._first(output))
        )
        for unit in blocks(model)
    ]
    with torch.no_grad(), fake_quantized():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return [torch.cat(of_block) for of_block in outputs.values()]


def errors(model, wanted, batches):
    return [(a - b).square().mean().item() for a, b in zip(put_out(model, batches), wanted, strict=True)]


def test_blocks_come_nearer_to_what_they_put_out_in_full_precision(backbone):
    batches = make_batches(8)
    model = make_quantized(backbone, "finetune", bit_width=3)
    with full_precision(model):
        wanted = put_out(model, batches)
    by_layer = errors(make_quantized(backbone, "finetune", bit_width=3).reconstruct(batches), wanted, batches)
    by_block = errors(model.reconstruct(batches, STEPS), wanted, batches)
    # Each but the first learns on what the ones before it make.
    assert by_block[-1] < by_layer[-1]
    assert sum(by_block) < sum(by_layer)
    assert len(by_block) == (4 if backbone == "swin" else 2)


def test_each_block_learns_what_the_model_was_before_anything_was_refitted(backbone, monkeypatch):
    batches = make_batches()
    model = make_quantized(backbone, "finetune", bit_width=3)
    with full_precision(model):
        wanted = put_out(model, batches)
    learnt = []
    monkeypatch.setattr(block_refit, "_train", lambda unit, call, given, wanted, *_: learnt.append(wanted))
    model.reconstruct(batches, STEPS)
    for one, other in zip(learnt, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_each_block_learns_on_what_the_refitted_ones_before_it_give(monkeypatch):
    batches = make_batches()
    model = make_quantized("vit", "finetune", bit_width=3)
    given = []
    train = block_refit._train
    monkeypatch.setattr(
        block_refit, "_train", lambda unit, call, x, *rest: given.append(x) or train(unit, call, x, *rest)
    )
    model.reconstruct(batches, STEPS)
    torch.testing.assert_close(given[1], put_out(model, batches)[0])


def test_it_works_in_every_stage_is_the_same_each_time_and_leaves_no_trace(stage):
    batches = make_batches()
    models = [make_quantized("vit", stage, bit_width=3) for _ in range(2)]
    assignments = [q.assignment_logits.clone() for q in searched_quantizers(models[0])] if stage == "search" else []
    random_state = torch.get_rng_state()
    for model in models:
        model.train(stage == "pretrain").reconstruct(batches, 3)
        assert model.training == (stage == "pretrain")
        assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    for one, other in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(one, other)
    for quantizer, before in zip(searched_quantizers(models[0]) if assignments else [], assignments, strict=True):
        assert torch.equal(quantizer.assignment_logits, before)


def test_what_is_frozen_stays():
    batches = make_batches()
    model = make_quantized("vit", "finetune", bit_width=3)
    bias = model.backbone.vit.layers[0].attention.q_proj.bias
    bias.requires_grad_(False)
    by_layer = make_quantized("vit", "finetune", bit_width=3).reconstruct(batches)
    model.reconstruct(batches, 3)
    assert torch.equal(bias, by_layer.backbone.vit.layers[0].attention.q_proj.bias)


def test_weights_move_by_a_share_of_their_own_levels():
    model = make_quantized("vit", "finetune", bit_width=3)
    unit = blocks(model)[0]
    rates = {id(group["params"][0]): group["lr"] for group in block_refit._parameter_groups(unit)}
    layers = [module for module in unit.modules() if getattr(module, "weight_quantizer", None) is not None]
    assert len(layers) == 6
    for layer in layers:
        assert rates[id(layer.weight)] == pytest.approx(
            block_refit.WEIGHT_RATE * layer.weight_quantizer.scale.mean().item()
        )
        assert rates[id(layer.weight_quantizer.scale)] == block_refit.SCALE_RATE
        assert rates[id(layer.bias)] == block_refit.RATE


def test_images_of_several_sizes_are_refused_with_steps():
    batches = [torch.randn(1, 3, 16, 16), torch.randn(1, 3, 32, 32)]
    with pytest.raises(ValueError, match="images to reconstruct from are of 2 sizes"):
        make_quantized("swin", "finetune").reconstruct(batches, 1)


def test_a_model_without_quantized_inputs_is_passed_over():
    model = make_quantized("vit", "finetune", activation_bits=32)
    with torch.no_grad():
        model.reconstruct(make_batches(), 3)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_model_in_full_precision_is_not_touched(name):
    original = make_full_precision(name)
    state = {key: tensor.clone() for key, tensor in original.state_dict().items()}
    make_quantized(name, "finetune", bit_width=3).reconstruct(make_batches(), 2)
    assert all(torch.equal(tensor, state[key]) for key, tensor in original.state_dict().items())
