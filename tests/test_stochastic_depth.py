"""Stochastic depth on every backbone."""

import pytest
import torch
from conftest import make_batches, make_full_precision

from quantformer_hf import QuantformerTrainingArguments
from quantformer_hf.stochastic_depth import stochastic_depth


def test_it_drops_in_training_alone_and_leaves_no_trace(backbone):
    model = make_full_precision(backbone)
    images = make_batches(1, batch_size=16)[0]
    # Swin's own is on by default.
    own = [m.drop_prob for m in model.modules() if hasattr(m, "drop_prob")]
    expected = model(pixel_values=images).logits
    with stochastic_depth(model, 0.5):
        assert torch.equal(model(pixel_values=images).logits, expected)
        model.train()
        assert not torch.equal(model(pixel_values=images).logits, model(pixel_values=images).logits)
    assert own == [m.drop_prob for m in model.modules() if hasattr(m, "drop_prob")]
    with stochastic_depth(model, 0.0):
        assert torch.allclose(model(pixel_values=images).logits, expected, atol=1e-5)


def test_whole_images_are_dropped_on_both_branches_and_the_others_are_scaled(backbone):
    model = make_full_precision(backbone).train()
    layers = [m for m in model.modules() if hasattr(m, "layernorm_before")]
    seen = {}

    def keep(module, arguments, output):
        seen[module] = output if isinstance(output, torch.Tensor) else output[0]

    images = make_batches(1, batch_size=64)[0]
    last = layers[-1]
    branches = (getattr(last, "drop_path", last.attention), last.mlp)
    with stochastic_depth(model, 0.5):
        # After the hooks of stochastic depth.
        handles = [branch.register_forward_hook(keep) for branch in branches]
        model(pixel_values=images)
    for handle in handles:
        handle.remove()
    for branch in branches:
        dropped = (seen[branch].flatten(1) == 0).all(1)
        assert len(dropped) == 64
        assert 10 < dropped.sum() < 54
        assert (seen[branch][~dropped].flatten(1) != 0).any(1).all()
    # The first block never drops.
    first_branch = layers[0].mlp
    with stochastic_depth(model, 0.5):
        handle = first_branch.register_forward_hook(keep)
        model(pixel_values=images)
    handle.remove()
    assert (seen[first_branch].flatten(1) != 0).any(1).all()


def test_the_expectation_is_kept():
    model = make_full_precision().train()
    mlp = model.vit.layers[-1].mlp
    inputs = torch.randn(4000, 1, 32)
    expected = mlp(inputs).mean(0)
    with torch.no_grad(), stochastic_depth(model, 0.3):
        outputs = mlp(inputs)
    assert torch.allclose(outputs.mean(0), expected, atol=0.2)


def test_the_rate_is_checked():
    with pytest.raises(ValueError, match="drop_path_rate is 1"):
        QuantformerTrainingArguments("out", drop_path_rate=1.0)
