"""Scales of groups that are multiples of units, groups in whole steps of the kernels, and the products that merge them."""

import pytest
import torch

from quantformer_hf import QuantformerConfig
from quantformer_hf.grids import Grid
from quantformer_hf.groups import channel_errors, cluster_channels, in_whole_steps
from quantformer_hf.kernels import STEP, operators, using
from quantformer_hf.kernels.merging import merged_groups
from quantformer_hf.multiples import LARGEST_MULTIPLE, to_multiples
from quantformer_hf.observers import QUANTILES
from quantformer_hf.packing import pack_codes
from quantformer_hf.quantizers import GroupActivationQuantizer


def scales(spread: float, groups: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.exp(spread * torch.randn(groups, generator=torch.Generator().manual_seed(seed)))


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


def test_the_gradient_passes_straight_through():
    given = scales(1.0).requires_grad_()
    (to_multiples(given) * torch.arange(8.0)).sum().backward()
    assert torch.equal(given.grad, torch.arange(8.0))


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


def test_checkpoints_from_before_keep_their_scales():
    saved = QuantformerConfig(stage="finetune", calibrated=True).to_dict()
    del saved["whole_multiples"]
    assert not QuantformerConfig.from_dict(saved).whole_multiples


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


def test_what_is_merged_is_multiples_of_units():
    merged = merged_groups((8, 8, 16, 32), torch.tensor([0.75, 9.0, 1.25, 16.0]), 15, 8)
    assert merged == [(3, 0.25), (1, 0.25), (5, 0.25), (1, 16.0)]


@pytest.mark.parametrize(
    ("ends", "group_scales", "largest_weight"),
    [
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


@pytest.mark.parametrize("weight_bits", [2, 3, 4])
def test_merged_products_give_the_bits_of_those_by_group(weight_bits):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (9, 192), generator=generator).to(torch.uint8)
    weight = torch.randint(2**weight_bits, (40, 192), generator=generator)
    group_scales = to_multiples(scales(0.5))
    arguments = (
        *(pack_codes(weight, weight_bits), 192, weight_bits, 2**weight_bits - 1, 1, -(2 ** (weight_bits - 1))),
        *(torch.arange(192, dtype=torch.int32), tuple(range(24, 193, 24)), group_scales, 15),
        *(torch.rand(40, generator=generator), torch.randn(40, generator=generator)),
    )
    assert merged_groups(arguments[7], group_scales, 15, 2 ** (weight_bits - 1)) is not None
    with using(None):
        expected = operators.call(operators.multiply, codes, *arguments)
    assert torch.equal(operators.multiply(codes, *arguments), expected)
