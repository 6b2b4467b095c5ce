"""Scales of groups that are multiples of units, groups in whole steps of the kernels, and the products that merge them."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import instruction_sets, make_quantized

from quantformer_hf import QuantformerForImageClassification, groups
from quantformer_hf.grids import Grid
from quantformer_hf.groups import channel_errors, cluster_channels, in_whole_steps
from quantformer_hf.kernels import STEP, operators, plan_channels, plan_linear, plan_weight, using
from quantformer_hf.kernels.laid_out import lay_out, merge_runs
from quantformer_hf.kernels.merging import merged_groups
from quantformer_hf.mixed_precision.width_mixture import ActivationWidthMixture
from quantformer_hf.multiples import LARGEST_MULTIPLE, learned_multiples, to_multiples
from quantformer_hf.observers import QUANTILES
from quantformer_hf.packing import pack_codes
from quantformer_hf.quantize import group_quantizers
from quantformer_hf.quantizers import GroupActivationQuantizer


GRID = Grid(4, signed=False)


def scales(spread: float, groups: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.exp(spread * torch.randn(groups, generator=torch.Generator().manual_seed(seed)))


def test_the_unit_is_the_least_of_which_the_largest_scale_is_still_a_multiple():
    assert to_multiples(torch.tensor([15.4, 1.0])).tolist() == [15, 1]


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 3.0])
def test_multiples_lie_near_the_scales_and_few_units_serve_all(spread):
    for seed in range(50):
        given = scales(spread, seed=seed)
        made = to_multiples(given)
        assert ((made / given - 1).abs() <= 1 / 3).all()
        assert (made[given > given.max() / 2] / given[given > given.max() / 2] - 1).abs().max() < 0.1
        # Within a factor of 8 of the largest one, all are multiples of the largest number of which that is one.
        within = made[given > given.max() / 8]
        assert any(
            torch.equal((within / unit).round() * unit, within)
            for unit in (within.max() / m for m in range(1, LARGEST_MULTIPLE + 1))
        )


def test_the_gradient_passes_straight_through_and_leads_out_of_zero():
    given = scales(1.0)
    given[2:4] = torch.tensor([0.0, -0.5])
    given.requires_grad_()
    (learned_multiples(given) * torch.arange(8.0)).sum().backward()
    assert torch.equal(given.grad, torch.tensor([0.0, 1.0, 2.0, -3.0, 4.0, 5.0, 6.0, 7.0]))


def test_multiples_keep_the_dtype():
    made = to_multiples(scales(1.0).bfloat16())
    assert made.dtype == torch.bfloat16
    assert torch.equal(made.float(), to_multiples(scales(1.0).bfloat16().float()))


def test_a_quantizer_takes_multiples_where_it_has_groups_and_was_told_to():
    told, untold = (
        GroupActivationQuantizer(32, 4, "layer", True, "identity", "finetune", 8, whole) for whole in (True, False)
    )
    one = GroupActivationQuantizer(32, 4, "layer", True, "identity", "finetune", 1, True)
    for quantizer in (told, untold, one):
        quantizer.scale.data.copy_(scales(1.0)[: quantizer.scale.numel()])
    assert torch.equal(told.step(), to_multiples(told.scale))
    assert not torch.equal(told.step(), told.scale)
    assert torch.equal(untold.step(), untold.scale)
    assert torch.equal(one.step(), one.scale)


def test_checkpoints_from_before_keep_their_scales(tmp_path):
    model = make_quantized("vit", "finetune")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("whole_multiples")
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = QuantformerForImageClassification.from_pretrained(tmp_path)
    for quantizer, new in zip(group_quantizers(old), group_quantizers(model), strict=True):
        assert torch.equal(quantizer.step(), new.scale)
        assert torch.equal(new.step(), to_multiples(new.scale))


def random_losses(groups: int = 8, channels: int = 192) -> torch.Tensor:
    return torch.rand(groups, channels, generator=torch.Generator().manual_seed(0))


def test_groups_become_whole_steps_but_for_those_below_one():
    losses = random_losses()
    # Almost all channels are near to several groups, and a group of two is far from everything.
    losses = 1 + 1e-3 * losses
    losses[0] = 100
    losses[0, :2] = 0.1
    index = losses.argmin(0)
    made = in_whole_steps(index, losses)
    before, sizes = (torch.bincount(i, minlength=8) for i in (index, made))
    assert before[0] == sizes[0] == 2
    # The others have 190 channels, and two of them fill no step.
    assert sum(size % STEP for size in sizes[1:].tolist()) == 2
    moved = (made != index).nonzero().flatten()
    assert 0 < len(moved) < 2 * 8
    # A channel that stayed would have lost no less than those that went from its group to the same one.
    costs = losses - losses.amin(0)
    for channel in moved.tolist():
        stayed = (made == index) & (index == index[channel])
        assert (costs[made[channel], stayed] >= costs[made[channel], channel]).all()


def test_no_channel_leaves_its_group_where_that_costs_much():
    index = torch.arange(32) % 5
    losses = 1.0 - torch.nn.functional.one_hot(index, 5).T.float() * 0.9
    assert torch.equal(in_whole_steps(index, losses), index)


def test_groups_of_whole_steps_stay_as_they_are():
    index = torch.arange(32) // 8
    assert torch.equal(in_whole_steps(index, random_losses(4, 32)), index)


def test_a_group_gives_away_no_more_than_it_has_beyond_its_last_step():
    # Of 9, 6 and 5 channels; those of the first would lose least.
    index = torch.tensor([0] * 9 + [1] * 6 + [2] * 5)
    losses = 1 - F.one_hot(index, 3).T * torch.where(index == 0, 1e-6, 1e-5)
    made = in_whole_steps(index, losses)
    assert torch.bincount(made).tolist() == [8, 8, 4]


def test_groups_of_less_than_a_step_are_not_filled_up():
    index = torch.tensor([0] * 3 + [1] * 5)
    assert torch.equal(in_whole_steps(index, 1 - F.one_hot(index, 2).T * 1e-6), index)


def test_clusters_say_which_group_a_channel_is_in_by_its_least_error():
    generator = torch.Generator().manual_seed(0)
    quantiles = (
        torch.randn(96, len(QUANTILES), generator=generator).sort(1).values
        * torch.rand(96, 1, generator=generator).exp()
    )
    scale, offset, errors = cluster_channels(quantiles, torch.ones(96), 5, Grid(4, signed=False))
    sizes = torch.bincount(errors.argmin(0), minlength=5)
    true = channel_errors(quantiles, to_multiples(scale), offset, Grid(4, signed=False))
    assert sum(-size % STEP for size in sizes.tolist()) < sum(
        -size % STEP for size in torch.bincount(true.argmin(0), minlength=5).tolist()
    )
    assert torch.equal(errors.sort(0).values, true.sort(0).values)


def random_clusters(importance, groups=5):
    """What is clustered, and the clusters."""
    generator = torch.Generator().manual_seed(0)
    widths = torch.rand(len(importance), 1, generator=generator).exp()
    quantiles = torch.randn(len(importance), len(QUANTILES), generator=generator).sort(1).values * widths
    return quantiles, cluster_channels(quantiles, importance, groups, GRID)


def test_channels_leave_their_groups_by_what_they_count_for(monkeypatch):
    importance, told = torch.rand(96, generator=torch.Generator().manual_seed(1)), []
    monkeypatch.setattr(groups, "in_whole_steps", lambda index, losses: told.append(losses) or index)
    quantiles, (scale, offset, _) = random_clusters(importance)
    torch.testing.assert_close(told, [channel_errors(quantiles, to_multiples(scale), offset, GRID) * importance])


def test_offsets_of_clusters_are_fitted_to_the_multiples_of_their_scales(monkeypatch):
    told, fit_offset = [], groups.fit_offset
    monkeypatch.setattr(groups, "fit_offset", lambda *given: told.append((given[3], fit_offset(*given))) or told[0][1])
    _, (scale, offset, _) = random_clusters(torch.ones(96))
    torch.testing.assert_close(told, [(to_multiples(scale), offset)])


def test_a_cluster_that_nobody_wants_keeps_its_scale_and_asks_for_no_larger_unit(monkeypatch):
    # Two clusters of channels that are alike: all of them go to the first. Where they lie leaves a third without any.
    quantiles = torch.linspace(-1, 1, len(QUANTILES)) + torch.tensor([[10.0]] * 4 + [[10.0]] * 4 + [[-10.0]] * 8)
    monkeypatch.setattr(groups, "_cluster_ranges", lambda *_: torch.arange(16) // 4 - torch.arange(16) // 12)
    scale, _, errors = cluster_channels(quantiles, torch.ones(16), 4, GRID)
    assert errors.argmin(0).tolist() == [0] * 8 + [2] * 8
    torch.testing.assert_close(scale[1], scale[0])
    assert scale[3] == scale[:3].max()


def test_what_is_merged_is_multiples_of_units():
    merged = merged_groups((8, 8, 16, 32), torch.tensor([0.75, 9.0, 1.25, 16.0]), 15, 8)
    assert merged == [(3, 0.25), (1, 0.25), (5, 0.25), (1, 16.0)]


@pytest.mark.parametrize(
    ("ends", "group_scales", "largest_weight"),
    [
        ((16, 32), [float("nan"), 1.0], 8),
        ((16, 32), [1.0, float("inf")], 8),
        ((20000, 40000), [1.25, 2.5], 8),  # of the unit a sum below 2^24 would be one, and of its digits none
        ((32,), [1.0], 8),  # one group
        ((16, 32), [1.0, 17.0], 8),  # 17 * 8 is no signed byte
        ((16, 32), [1.0, 1.5], 128),  # nor 2 * 128
        ((16, 32), [0.1, 0.3], 8),  # of float32 these are multiples of something tiny alone
        ((50000, 100000), [1.0, 2.0], 8),  # sums beyond 2^24
        ((16, 32), [0.0, 1.0], 8),
    ],
)
def test_what_cannot_be_merged_stays_apart(ends, group_scales, largest_weight):
    assert merged_groups(ends, torch.tensor(group_scales), 15, largest_weight) is None


def test_weights_are_looked_at_where_the_largest_ones_would_be_too_much():
    """640 positions times 98 or 21, codes of 35: beyond 2^24 at weights of 8, and below at 7."""
    ends, scales = (8, 640), torch.tensor([5.25, 24.5])
    seen = []

    def weights_of(row):
        for some in torch.tensor([[-1] * 640, row], dtype=torch.int16).split(1):
            seen.append(some)
            yield some

    assert merged_groups(ends, scales, 35, 8) is None
    assert merged_groups(ends, scales, 35, 8, weights_of([8] * 8 + [-7] * 632)) == [(3, 1.75), (14, 1.75)]
    assert merged_groups(ends, scales, 35, 8, weights_of([8] * 640)) is None
    assert len(seen) == 4
    assert merged_groups(ends, scales, 15, 8, weights_of([8] * 640)) is not None
    assert merged_groups((8, 6000), scales, 35, 8, weights_of([0] * 640)) is None
    assert len(seen) == 4


#: Groups of 56 channels: of one unit, of two digits more than a power of two, of two units, and multiples beyond 15.
MERGED = {
    "one unit": [3.0, 5.0, 4.0],
    "digits": to_multiples(torch.tensor([21.0, 19.0, 16.0])).tolist(),
    "two units": [0.125, 0.25, 3.0],
    "large multiples": [5.0, 1.625, 0.125],
}


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("group_scales", MERGED.values(), ids=MERGED.keys())
def test_merged_products_give_the_bits_of_those_by_group(name, group_scales):
    generator = torch.Generator().manual_seed(0)
    groups, inputs, outputs = len(group_scales), 56 * len(group_scales), 40
    index = torch.arange(inputs) // 56
    for bits, activation_bits, shift, extreme in itertools.product(
        (1, 2, 3, 4), (2, 4, 8), (0, 0.5), (None, "low", "high")
    ):
        scales, offsets = torch.tensor(group_scales), torch.zeros(groups)
        channels = plan_channels(inputs, scales, offsets, index, 2**activation_bits - 1)
        codes = torch.randint(2**activation_bits, (19, inputs), generator=generator)
        weights = torch.randint(2**bits, (outputs, inputs), generator=generator)
        if extreme is not None:
            codes.fill_(2**activation_bits - 1)
            weights.fill_(0 if extreme == "low" else 2**bits - 1)
        weight = plan_weight(inputs, bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, shift, torch.ones(outputs))
        plan = plan_linear(weight, pack_codes(weights, bits), None, channels)
        codes = codes.to(torch.uint8)
        with using(None):
            expected = plan(codes)
        with using(name):
            job, _ = plan.ordered_job()
            for made in (operators.run_multiply(job, codes), plan(codes)):
                assert torch.equal(made, expected), (bits, activation_bits, shift, extreme)


@pytest.mark.parametrize(("eights", "merged"), [(476, True), (477, False)])
def test_real_weights_decide_at_the_very_bound(eights, merged):
    """All codes at 35, weights of -7 and some of -8: 35 * (21 * 56 + 98 * (629 * 7 + 476)) is the last one below 2^24. What
    fills up the second group counts for nothing."""
    inputs = 637
    channels = plan_channels(
        inputs, torch.tensor([5.25, 24.5]), torch.zeros(2), (torch.arange(inputs) >= 8).long(), 35, 5
    )
    assert channels.group_ends == (8, 640)
    codes = torch.ones(40, inputs, dtype=torch.long)
    codes[-1, 8 : 8 + eights] = 0
    weight, packed = plan_weight(inputs, 4, -8, 7, 0, torch.ones(40)), pack_codes(codes, 4)
    plan = plan_linear(weight, packed, None, channels)
    rows = torch.full((2, 640), 35, dtype=torch.uint8)
    rows[:, inputs:] = 0
    with using(None):
        expected = plan(rows)
    assert bool(plan.job.multiples) == merged
    for name in instruction_sets():
        with using(name):
            assert torch.equal(operators.run_multiply(plan.ordered_job()[0], rows), expected)
            assert torch.equal(operators.multiply(rows, *plan.arguments), expected)
    laid_out = lay_out(weight, packed, channels.source)
    assert (merge_runs(channels, *laid_out)[2] is not None) == merged


def test_a_mixture_of_one_width_is_that_quantizer():
    quantizer = GroupActivationQuantizer(32, 4, "layer", True)
    quantizer.channel_quantiles.copy_(torch.randn(32, len(QUANTILES)).sort(1).values * scales(1.0, 32).unsqueeze(1))
    quantizer.begin_search(4)
    quantizer.freeze_groups()
    x = torch.randn(5, 32)
    torch.testing.assert_close(ActivationWidthMixture([quantizer])(x), quantizer(x))


def test_an_empty_group_asks_for_no_larger_unit():
    quantizer = GroupActivationQuantizer(4, 4, "layer", True, "identity", "search", 4, True)
    with torch.no_grad():
        quantizer.scale.copy_(torch.tensor([1.0, 0.9, 0.7, 7.9]))
        quantizer.assignment_logits[:3].add_(1)
    quantizer.freeze_groups()
    assert torch.equal(quantizer.step()[:3], to_multiples(torch.tensor([1.0, 0.9, 0.7])))
