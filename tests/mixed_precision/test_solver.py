"""The integer programme against trying everything."""

import itertools
import random
import re

import pytest
from test_cost import config_of

from quantformer_hf.layer_bits import LayerBits
from quantformer_hf.mixed_precision.budget import Budget
from quantformer_hf.mixed_precision.cost import CostModel
from quantformer_hf.mixed_precision.latency_table import LatencyKey, LatencyTable
from quantformer_hf.mixed_precision.search_space import SearchSpace
from quantformer_hf.mixed_precision.solver import AllocationProblem, Losses


def random_losses(space, seed=0):
    """Losses that shrink with the bits, by layer at another pace."""
    draw = random.Random(seed)

    def table(names, candidates):
        return {name: {bits: draw.uniform(0.1, 1) / 4**bits for bits in candidates} for name in names}

    weights, inputs = table(space.inputs, space.weight_bits), table(space.quantizers, space.activation_bits)
    return Losses(weights, inputs, table(space.attention, space.attention_bits))


def first_block_only(costs):
    """A problem small enough to try all of it: other layers are held at the narrowest bits."""
    config = costs
    config.backbone_config.num_hidden_layers = 1
    return config


@pytest.fixture(scope="module")
def small():
    config = first_block_only(config_of("vit"))
    return CostModel(config, SearchSpace.of(config, (2, 4), (3,)))


def narrowest(space):
    """The fewest bits that there are."""
    of_attention = dict.fromkeys(space.attention, space.of_attention(min(space.attention_bits)))
    return space.uniform(2, 2) | of_attention


@pytest.mark.parametrize("units", [("BitOps",), ("bytes",), ("BitOps", "bytes")])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_no_allocation_within_the_budget_loses_less(small, units, share):
    space, losses = small.space, random_losses(small.space)
    low, high = narrowest(space), space.uniform(4, 4)
    budgets = [Budget(u, small[u].total(low) + share * (small[u].total(high) - small[u].total(low))) for u in units]
    found = AllocationProblem(losses, small).solve(budgets)
    assert all(small[b.unit].total(found) <= b.most for b in budgets)
    least = float("inf")
    for inputs in itertools.product((2, 4), repeat=len(space.quantizers)):
        activations = dict(zip(space.quantizers, inputs, strict=True))
        for weights in itertools.product((2, 4), repeat=len(space.inputs)):
            layers = {n: LayerBits(w, activations[q]) for (n, q), w in zip(space.inputs.items(), weights, strict=True)}
            for bits in (3, 8):
                widths = layers | dict.fromkeys(space.attention, space.of_attention(bits))
                if all(small[b.unit].total(widths) <= b.most for b in budgets):
                    least = min(least, losses.total(space, widths))
    assert losses.total(space, found) == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("backbone", ["vit", "swin"])
@pytest.mark.parametrize("unit", ["BitOps", "bytes"])
def test_the_budget_is_never_exceeded_and_readers_of_one_tensor_agree(backbone, unit):
    config = config_of(backbone)
    costs = CostModel(config, SearchSpace.of(config))
    space = costs.space
    low, high = (costs[unit].total(space.uniform(b, b)) for b in (2, 8))
    draw = random.Random(0)
    for seed in range(8):
        budget = Budget(unit, draw.uniform(low, high))
        widths = AllocationProblem(random_losses(space, seed), costs).solve([budget])
        assert costs[unit].total(widths) <= budget.most
        for quantizer in space.quantizers:
            assert len({widths[n].activation_bits for n, q in space.inputs.items() if q == quantizer}) == 1


def test_a_few_bytes_of_header_do_not_break_the_budget():
    config = config_of("vit")
    costs = CostModel(config, SearchSpace.of(config))
    smallest = costs["bytes"].total(costs.space.uniform(2, 2))
    losses = random_losses(costs.space)
    for extra in range(0, 400, 7):
        widths = AllocationProblem(losses, costs).solve([Budget("bytes", smallest + extra)])
        assert costs["bytes"].total(widths) <= smallest + extra


@pytest.mark.parametrize("unit", ["BitOps", "bytes"])
def test_a_budget_below_the_smallest_cost_says_what_the_smallest_is(small, unit):
    smallest = small[unit].total(narrowest(small.space))
    problem = AllocationProblem(random_losses(small.space), small)
    found = problem.solve([Budget(unit, smallest)])
    assert {found[name].weight_bits for name in small.space.inputs} == {2}
    assert small[unit].total(found) == smallest
    with pytest.raises(ValueError, match="below the smallest possible cost, ") as error:
        problem.solve([Budget(unit, smallest - 1)])
    # What it names is enough.
    named = Budget.parse(re.search(r"possible cost, (\S+)", str(error.value))[1])
    assert problem.solve([named]) == found


def test_budgets_that_cannot_be_kept_together_are_refused():
    config = first_block_only(config_of("vit"))
    space = SearchSpace.of(config, (2, 4))
    shapes = [(17, 32, 32), (17, 32, 64), (17, 64, 32)]
    # A machine on which narrow weights are slow.
    times = {LatencyKey(*shape, 4, w, a): 1.0 / w for shape in shapes for w in (2, 4) for a in (2, 4)}
    costs = CostModel(config, space, LatencyTable(times))
    budgets = [Budget("ms", 1.6), Budget("bytes", costs["bytes"].total(space.uniform(2, 2)))]
    problem = AllocationProblem(random_losses(space), costs)
    assert all(problem.solve([budget]) for budget in budgets)
    with pytest.raises(ValueError, match="together"):
        problem.solve(budgets)
