"""Levels of two step sizes, for what GELU puts out."""

import json
from itertools import pairwise

import pytest
import torch
from conftest import BACKBONES, instruction_sets, make_batches, make_quantized
from packed_models import logits
from safetensors.torch import load_file, save_file

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.grids import GELU_KNEES, Grid, fit_affine, gelu_grid
from quantformer_hf.kernels import fake_quantized, operators, reference, using
from quantformer_hf.layer_bits import check_same_quantization
from quantformer_hf.mixed_precision.candidates import Candidates
from quantformer_hf.mixed_precision.search_space import SearchSpace
from quantformer_hf.mixed_precision.width_mixture import WidthMixtures
from quantformer_hf.ops import fake_quantize_widths
from quantformer_hf.ops.levels import last_code, nearest_level
from quantformer_hf.packed_checkpoint import DIGEST_NAME
from quantformer_hf.packing import digest
from quantformer_hf.quantize import group_quantizers


#: Those of three and of four bits.
LEVELS = {3: [0, 1, 2, 5, 8, 11, 14, 17], 4: [0, 1, 2, 3, 4, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35]}


def nearest(positions, levels):
    """Of two that are as near, the one with the even number."""
    levels = torch.tensor(levels, dtype=torch.float64)
    distance = (positions.double().unsqueeze(-1) - levels).abs()
    odd = torch.arange(len(levels)) % 2
    return levels[(distance + 1e-12 * odd).argmin(-1)]


@pytest.mark.parametrize("bits", LEVELS)
def test_the_nearest_level_is_the_nearest_of_two_to_the_bits(bits):
    grid, levels = gelu_grid(bits), LEVELS[bits]
    assert (grid.qmin, grid.qmax, grid.levels, grid.knee) == (0, levels[-1], len(levels), GELU_KNEES[bits])
    assert last_code(grid.qmax, grid.knee) == len(levels) - 1
    # Halves, among them all that are as near to two levels, and what lies between.
    positions = torch.cat([torch.arange(-4, 2 * levels[-1] + 10) / 2, 40 * torch.rand(2000) - 2])
    assert torch.equal(grid.nearest(positions).double(), nearest(positions, levels))
    # At half a position's last digit the choice is free.
    borders = torch.tensor([(low + high) / 2 for low, high in pairwise(levels)])
    for near, side in ((borders * (1 - 2e-6), levels[:-1]), (borders * (1 + 2e-6), levels[1:])):
        assert nearest_level(near, grid.qmax, grid.knee).tolist() == side


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_other_widths_keep_even_levels(bits):
    assert gelu_grid(bits) == Grid(bits, signed=False)


@pytest.mark.parametrize(("bits", "share"), [(3, 0.6), (4, 0.55)])
def test_less_is_lost_of_what_gelu_puts_out(bits, share):
    # Mostly of what is below zero, as in trained models.
    values = torch.nn.functional.gelu(torch.randn(20000, generator=torch.Generator().manual_seed(0)) - 1)
    lost = []
    for grid in (gelu_grid(bits), Grid(bits, signed=False)):
        scale, offset = fit_affine(values, torch.ones_like(values), grid)
        lost.append((grid.nearest((values - offset) / scale) * scale + offset - values).square().mean())
    assert lost[0] < share * lost[1]


@pytest.mark.parametrize("bits", LEVELS)
def test_fitted_scale_and_offset_recover_values_on_the_grid(bits):
    values = 0.37 * torch.tensor(LEVELS[bits]).repeat(10) - 1.9
    scale, offset = fit_affine(values, torch.ones_like(values), gelu_grid(bits))
    torch.testing.assert_close(scale, torch.tensor(0.37), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(offset, torch.tensor(-1.9), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [None, *instruction_sets()])
@pytest.mark.parametrize("channels", [1, 8, 100, 192])
@pytest.mark.parametrize("gelu", [False, True])
def test_kernels_find_the_levels_of_plain_torch(name, channels, gelu):
    generator = torch.Generator().manual_seed(channels)
    x = torch.linspace(-4, 40, 90 * channels).view(channels, 90).T.contiguous()
    x[0, :1], x[1, :1], x[2, :1], x[3, :1] = float("nan"), float("inf"), -float("inf"), -1e30
    offset, inverse = torch.randn(channels, generator=generator), 0.5 + torch.rand(channels, generator=generator)
    # Halfway between levels, where nothing but the sizes of the steps decides.
    offset[::2], inverse[::2], x[4:] = 0, 1, (2 * x[4:]).round() / 2
    for bits, levels in LEVELS.items():
        arguments = offset, inverse, None, levels[-1], gelu, GELU_KNEES[bits]
        with using(name):
            codes = operators.quantize(x, *arguments)
        assert torch.equal(codes, reference.quantize(x, *arguments))
        if not gelu:
            position = ((x - offset) * inverse).nan_to_num(nan=0.0).clamp(-1, levels[-1] + 1)
            assert torch.equal(codes.double(), nearest(position, levels))


def gelu_quantizers(model):
    return [quantizer for quantizer in group_quantizers(model) if quantizer.producer == "gelu"]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("bits", LEVELS)
def test_the_search_begins_with_them_and_packing_keeps_them(backbone, bits, tmp_path):
    model = make_quantized(backbone, "pretrain", bit_width=bits)
    assert (model.config.twin_levels, {q.grid.knee for q in group_quantizers(model)}) == (None, {None})
    model.begin_search(4).freeze_groups()
    assert model.config.twin_levels is True
    assert gelu_quantizers(model)
    for quantizer in group_quantizers(model):
        assert quantizer.grid.knee == (GELU_KNEES[bits] if quantizer.producer == "gelu" else None)
    images = make_batches(1)[0]
    expected = logits(model, images)
    model.save_pretrained(tmp_path / "finetune")
    again = QuantformerForImageClassification.from_pretrained(tmp_path / "finetune")
    assert torch.equal(logits(again, images), expected)
    model.pack().save_pretrained(tmp_path / "packed")
    again = QuantformerForImageClassification.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again, images), expected)
    assert torch.equal(logits(again.unpack(), images), expected)


def test_what_integers_compute_is_what_is_fake_quantized():
    model, images = make_quantized("vit", "finetune", bit_width=4), make_batches(1)[0]
    expected = logits(model, images)
    with fake_quantized():
        faked = logits(model, images)
    # A last digit may move an activation to another level.
    assert (faked - expected).abs().median() < 0.02 * expected.std()
    for quantizer in gelu_quantizers(model):
        quantizer.set_levels(twin=False)
    assert (logits(model, images) - expected).abs().median() > 0.02 * expected.std()


def test_they_can_be_left_out():
    model = make_quantized("vit", "finetune", bit_width=4, twin_levels=False)
    assert model.config.twin_levels is False
    assert {quantizer.grid.knee for quantizer in group_quantizers(model)} == {None}


def test_checkpoints_from_before_keep_even_levels(tmp_path):
    model = make_quantized("vit", "finetune", bit_width=4, twin_levels=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("twin_levels") is False
    (tmp_path / "config.json").write_text(json.dumps(config))
    old, images = QuantformerForImageClassification.from_pretrained(tmp_path), make_batches(1)[0]
    assert torch.equal(logits(old, images), logits(model, images))
    # And so do packed ones, whose digest was of these alone.
    old.pack().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state[DIGEST_NAME] = digest([name for name in state if name != DIGEST_NAME], state.__getitem__, "lsq_by_width")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    packed = QuantformerForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(packed, images), logits(model, images))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"twin_levels": True}))
    with pytest.raises(ValueError, match="is damaged"):
        QuantformerForImageClassification.from_pretrained(tmp_path)


def test_a_class_token_has_those_of_its_own_bits():
    for bits, knee in ((4, 5), (8, None)):
        model = make_quantized("vit", "finetune", bit_width=3, class_token_bits=bits)
        assert {quantizer.class_token.grid.knee for quantizer in gelu_quantizers(model) if quantizer.class_token} == {
            knee
        }
        assert torch.equal(*(logits(made, make_batches(1)[0]) for made in (model, model.pack())))


@pytest.mark.parametrize("twin", [None, False])
def test_both_searches_for_bits_have_them(twin):
    model = make_quantized("vit", "pretrain", twin_levels=twin)
    space = SearchSpace.of(model.config, (2, 3, 4))
    of_budgets = Candidates.of(model, space, make_batches(1)).inputs
    WidthMixtures(model, space)
    for name, candidates in of_budgets.items():
        mixture = model.backbone.get_submodule(name)
        for bits, of_mixture in zip(candidates, mixture.quantizers, strict=True):
            is_twin = twin is None and mixture.producer == "gelu"
            assert candidates[bits].grid == of_mixture.grid
            assert candidates[bits].grid.knee == (GELU_KNEES.get(bits) if is_twin else None)


def test_a_mixture_of_widths_has_the_levels_of_each():
    x = torch.linspace(-1, 40, 300).unsqueeze(1)
    scale, offset, qmax, knee = (
        torch.ones(2, 1),
        torch.zeros(2, 1),
        torch.tensor([15.0, 35.0]),
        torch.tensor([15.0, 5.0]),
    )
    even, twin = (fake_quantize_widths(x, scale, offset, torch.eye(2)[k], qmax, knee=knee) for k in (0, 1))
    assert torch.equal(even, x.round().clamp(0, 15))
    assert torch.equal(twin.double(), nearest(x.clamp(0, 35), LEVELS[4]))


def test_a_model_takes_over_how_groups_lay_where_a_run_was_saved():
    """By an older version, or with the other setting."""
    saved, model = (make_quantized("vit", "finetune", bit_width=4, twin_levels=twin) for twin in (False, None))
    saved.config.whole_multiples, saved.config.twin_levels = False, None
    for quantizer in group_quantizers(saved):
        quantizer.whole_multiples = False
    model.follow_stage(saved.config)
    model.load_state_dict(saved.state_dict())
    assert (model.config.twin_levels, model.config.whole_multiples) == (None, False)
    assert torch.equal(logits(model, make_batches(1)[0]), logits(saved, make_batches(1)[0]))


def test_a_model_that_is_told_to_have_them_has_them_from_the_search_on():
    model = make_quantized("vit", "pretrain", bit_width=4, twin_levels=True)
    assert {quantizer.grid.knee for quantizer in group_quantizers(model)} == {None}
    model.begin_search(4)
    assert {quantizer.grid.knee for quantizer in gelu_quantizers(model)} == {5}


def test_a_later_command_may_say_it_where_there_are_no_groups_yet():
    begun, grouped = (make_quantized("vit", stage, bit_width=4) for stage in ("pretrain", "finetune"))
    check_same_quantization(begun.backbone, begun.config, {"twin_levels": False, "num_groups": 7}, "begun")
    check_same_quantization(grouped.backbone, grouped.config, {"twin_levels": True}, "grouped")
    with pytest.raises(ValueError, match="grouped has twin_levels True, and not False: start from the full-precision"):
        check_same_quantization(grouped.backbone, grouped.config, {"twin_levels": False}, "grouped")
    grouped.config.twin_levels = None  # an older checkpoint
    check_same_quantization(grouped.backbone, grouped.config, {"twin_levels": False}, "grouped")
