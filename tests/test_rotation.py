"""The residual stream turned by an orthogonal matrix."""

import pytest
import torch
from conftest import make_batches, make_full_precision
from torch import nn
from trainers import StopAt, logged, make_trainer
from transformers import ViTConfig, ViTForImageClassification

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.quantize import full_precision
from quantformer_hf.rotation import rotate_stream, rotated, rotation


@pytest.fixture(params=["vit", "deit", "deit-distilled"])
def original(request):
    """A model whose LayerNorms and biases do something."""
    model = make_full_precision(request.param)
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.data += torch.randn(module.weight.shape, generator=generator)
        if getattr(module, "bias", None) is not None:
            module.bias.data += torch.randn(module.bias.shape, generator=generator)
    return model.eval()


def states_and_logits(model) -> tuple[list[torch.Tensor], torch.Tensor]:
    with torch.no_grad():
        outputs = model(pixel_values=make_batches(1, seed=5)[0], output_hidden_states=True)
    return list(outputs.hidden_states), outputs.logits


@pytest.mark.parametrize("size", [16, 192, 384])
def test_the_matrix_is_orthogonal_keeps_means_and_spreads_every_channel(size):
    matrix = rotation(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix.sum(0), torch.ones(size, dtype=torch.float64))
    assert matrix.abs().max() < 4.5 * size**-0.5
    # In every process, as checkpoints remember no matrix.
    rotation.cache_clear()
    assert torch.equal(rotation(size), matrix)


def test_logits_stay_and_hidden_states_are_rotated(original):
    expected_states, expected = states_and_logits(original)
    model = QuantformerForImageClassification.from_full_precision(original)
    model.calibrate(make_batches(), centre_channels=False).eval()
    with full_precision(model):
        states, logits = states_and_logits(model)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for found, state in zip(states, rotated(expected_states), strict=True):
        torch.testing.assert_close(found, state, rtol=1e-4, atol=1e-4)
    assert model.config.channels_rotated


def test_it_happens_once_and_can_be_left_out():
    model = QuantformerForImageClassification.from_full_precision(make_full_precision("vit"))
    weight = model.backbone.vit.layers[0].mlp.fc2.weight
    before = weight.clone()
    model.calibrate(make_batches(), rotate_channels=False)
    assert torch.equal(weight, before)
    assert not model.config.channels_rotated
    once = model.calibrate(make_batches()).backbone.vit.layers[0].mlp.fc2.weight.clone()
    assert not torch.allclose(once, before)
    assert torch.equal(model.calibrate(make_batches()).backbone.vit.layers[0].mlp.fc2.weight, once)


@pytest.mark.parametrize(
    ("bits", "rotates"),
    [
        ({"activation_bits": 2}, False),
        ({"activation_bits": 2, "class_token_bits": 8}, False),
        ({"activation_bits": 3}, True),
        ({"activation_bits": 4, "layer_bits": {"vit.layers.*": 2}}, False),
        ({"activation_bits": 2, "layer_bits": {"vit.layers.0.*": 4}}, True),
        ({"activation_bits": 32}, True),
    ],
)
def test_two_bits_leave_channels_as_they_are(bits, rotates):
    model = QuantformerForImageClassification.from_full_precision(make_full_precision("vit"), weight_bits=4, **bits)
    assert model.calibrate(make_batches()).config.channels_rotated == rotates


def test_a_run_of_rotated_channels_goes_on_with_them(tmp_path):
    """As one that was begun when two bits were rotated as well."""
    teacher, losses = make_full_precision("vit"), []
    for steps, rotates in ((4, True), (2, True), (4, None)):
        model = QuantformerForImageClassification.from_full_precision(teacher, bit_width=2)
        model.calibrate(make_batches(), rotate_channels=rotates)
        arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "feature_weight": 1.0}
        trainer = make_trainer(tmp_path / str(steps), model, teacher, callbacks=[StopAt(steps)], **arguments)
        trainer.train(resume_from_checkpoint=None if rotates else str(tmp_path / "2" / "checkpoint-2"))
        losses.append(logged(trainer))
    assert losses[2] == losses[0]
    assert model.config.channels_rotated


def test_features_are_compared_with_the_rotated_teacher(tmp_path):
    teacher = make_full_precision("vit")
    model = QuantformerForImageClassification.from_full_precision(teacher).calibrate(make_batches()).train()
    trainer = make_trainer(tmp_path, model, teacher, task_weight=0.0, feature_weight=1.0)
    with full_precision(model):
        loss = trainer.compute_loss(model, {"pixel_values": make_batches(1)[0], "labels": torch.zeros(4).long()})
    assert loss.item() < 1e-6


def test_an_outlying_channel_is_outlying_no_more():
    original = make_full_precision("vit")
    original.vit.embeddings.position_embeddings.data[..., 3] += 30
    spreads = []
    for rotate in (False, True):
        model = QuantformerForImageClassification.from_full_precision(original)
        model.calibrate(make_batches(), centre_channels=False, rotate_channels=rotate)
        quantiles = model.backbone.vit.layers[0].layernorm_before.output_quantizer.channel_quantiles
        spreads.append((quantiles.abs().amax(1).max() / quantiles.abs().amax(1).median()).item())
    assert spreads[1] < spreads[0] / 2


def test_swin_and_readers_without_bias_are_left_alone():
    without_bias = ViTConfig(**make_full_precision("vit").config.to_dict() | {"qkv_bias": False})
    for model in (make_full_precision("swin"), ViTForImageClassification(without_bias)):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert not rotate_stream(model)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
