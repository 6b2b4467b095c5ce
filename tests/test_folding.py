"""Shifts of channels that are folded into the layers around them."""

import pytest
import torch
from conftest import make_batches, make_full_precision
from transformers import ViTConfig, ViTForImageClassification

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.attention import attention_modules
from quantformer_hf.folding import channel_centres, folding_sites
from quantformer_hf.grids import Grid
from quantformer_hf.observers import QUANTILES
from quantformer_hf.quantize import full_precision, group_quantizers, reading_layers


def calibrated(backbone: str, centre_channels: bool = True, **arguments):
    model = QuantformerForImageClassification.from_full_precision(make_full_precision(backbone), **arguments)
    return model.calibrate(make_batches(), centre_channels=centre_channels).eval()


def test_in_full_precision_the_model_computes_what_it_did(backbone):
    original, model = make_full_precision(backbone), calibrated(backbone)
    with torch.no_grad(), full_precision(model):
        for batch in make_batches(seed=5):
            # Swin pads here, and must not be shifted there.
            torch.testing.assert_close(model(batch).logits, original(batch).logits, rtol=1e-4, atol=1e-4)


def test_sites_leave_out_padding_gelu_and_layers_without_bias():
    names = {}
    for kind in ("vit", "swin"):
        model = calibrated(kind)
        names[kind] = {site.quantizer.name.split(".", 3)[-1] for site in folding_sites(model, reading_layers(model))}
    assert names["vit"] == {"attention.q_proj", "attention.o_proj", "mlp.fc1"}
    assert not any("q_proj" in name or "fc2" in name or "reduction" in name for name in names["swin"])
    assert any(name.endswith("o_proj") for name in names["swin"])


def test_neither_side_of_a_shift_needs_a_bias():
    config = ViTConfig(**make_full_precision("vit").config.to_dict() | {"qkv_bias": False})
    original = ViTForImageClassification(config).eval()
    model = QuantformerForImageClassification.from_full_precision(original).calibrate(make_batches()).eval()
    names = {site.quantizer.name.split(".", 3)[-1] for site in folding_sites(model, reading_layers(model))}
    assert names == {"mlp.fc1"}
    batch = make_batches(seed=5)[0]
    with torch.no_grad(), full_precision(model):
        torch.testing.assert_close(model(batch).logits, original(batch).logits, rtol=1e-4, atol=1e-4)


def test_the_centre_of_a_channel_is_the_middle_of_its_levels():
    levels = 0.3 * torch.linspace(0, 7, len(QUANTILES)).round() - 4
    centres = channel_centres(torch.stack([levels, levels + 2]), Grid(3, signed=False))
    torch.testing.assert_close(centres, torch.tensor([0.3 * 3.5 - 4, 0.3 * 3.5 - 2]), rtol=1e-3, atol=1e-3)


def test_shifted_channels_are_centred_and_others_are_not():
    grids = {}
    for centre in (False, True):
        model = calibrated("vit", centre)
        quantizer = model.backbone.vit.layers[0].layernorm_before.output_quantizer
        grids[centre] = channel_centres(quantizer.channel_quantiles, quantizer.grid)
    assert grids[True].abs().max() < 1e-4 < 1e-2 < grids[False].abs().max()


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_one_group_fits_centred_channels_better(kind):
    errors = []
    for centre in (False, True):
        model = calibrated(kind, centre, bit_width=3)
        error = 0.0
        for quantizer in group_quantizers(model):
            quantiles = quantizer.channel_quantiles.T
            error += (quantizer.quantize(quantiles, 1.0) - quantiles).square().mean().item()
        errors.append(error)
    assert errors[1] < errors[0]


def test_the_quantizer_of_v_has_the_range_of_the_v_that_is_left(backbone):
    original = make_full_precision(backbone)
    with torch.no_grad():
        for name, bias in original.named_parameters():
            if name.endswith("v_proj.bias"):
                bias.normal_(std=3.0)
    model = QuantformerForImageClassification.from_full_precision(original).calibrate(make_batches()).eval()
    seen = {}
    for attention in attention_modules(model):
        attention.v_proj.register_forward_hook(lambda *call, of=attention: seen.setdefault(of, []).append(call[-1]))
    with torch.no_grad(), full_precision(model):
        for batch in make_batches():
            model(batch)
    for attention, values in seen.items():
        v, quantizer = torch.cat([one.flatten() for one in values]), attention.operands.value
        steps = (v.max() - v.min()) / quantizer.grid.qmax
        # No more than it needs: before the shift v reached ten times as far.
        assert quantizer.scale.item() < 1.05 * steps
        assert v.min() - 2 * steps < quantizer.offset.item() < v.min() + v.std()
