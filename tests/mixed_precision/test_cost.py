"""Every cost is that of a real packed file, and of a counted model."""

import random

import pytest
from conftest import BACKBONES, make_batches, make_full_precision, make_quantized

from quantformer_hf import QuantformerConfig
from quantformer_hf.layer_bits import LayerBits
from quantformer_hf.mixed_precision.budget import Budget, UniformBudget
from quantformer_hf.mixed_precision.cost import CostModel, budget_in_numbers
from quantformer_hf.mixed_precision.latency_table import LatencyKey, LatencyTable
from quantformer_hf.mixed_precision.search_space import SearchSpace
from quantformer_hf.report import bit_operations, weights_on_disk


IMAGE = make_batches(1, batch_size=1)[0]


def config_of(backbone, **arguments):
    backbone_config = make_full_precision(backbone).config
    backbone_config.architectures = [BACKBONES[backbone]().__class__.__name__]
    return QuantformerConfig(backbone_config=backbone_config, **{"num_groups": 4} | arguments)


def random_widths(space, seed):
    """Any allocation in which readers of one tensor agree."""
    draw = random.Random(seed)
    inputs = {quantizer: draw.choice(space.activation_bits) for quantizer in space.quantizers}
    layers = {n: LayerBits(draw.choice(space.weight_bits), inputs[q]) for n, q in space.inputs.items()}
    return layers | {name: space.of_attention(draw.choice(space.attention_bits)) for name in space.attention}


def as_layer_bits(widths):
    def bits(name, width):
        if name.endswith(".attention"):
            return {"attention_bits": width.activation_bits}
        return {"weight_bits": width.weight_bits, "activation_bits": width.activation_bits}

    return {name: bits(name, width) for name, width in widths.items()}


@pytest.mark.parametrize("arguments", [{}, {"attention_bits": None, "classifier_bits": 3}, {"attention_bits": 7}])
def test_bytes_and_bit_operations_are_those_of_the_packed_model(backbone, arguments, tmp_path):
    config = config_of(backbone, **arguments)
    space = SearchSpace.of(config, (1, 2, 3, 5, 8), (3, 5))
    assert space.attention_bits == (() if config.attention_bits is None else (3, 5, config.attention_bits))
    costs = CostModel(config, space)
    for seed in range(3):
        widths = random_widths(space, seed)
        model = make_quantized(backbone, "finetune", layer_bits=as_layer_bits(widths), **arguments)
        assert costs["BitOps"].total(widths) == bit_operations(model, IMAGE)
        folder = tmp_path / str(seed)
        model.pack().save_pretrained(folder)
        assert costs["bytes"].total(widths) == weights_on_disk(folder)


@pytest.mark.parametrize("class_token_bits", [None, 8])
def test_a_budget_in_bits_is_what_a_model_with_these_bits_costs(class_token_bits, tmp_path):
    settings = {"class_token_bits": class_token_bits}
    config = config_of("deit", **settings)
    model = make_quantized("deit", "finetune", weight_bits=3, activation_bits=5, **settings)
    operations = bit_operations(model, IMAGE)
    model.pack().save_pretrained(tmp_path)
    assert budget_in_numbers(UniformBudget("BitOps", 3, 5), config) == Budget("BitOps", operations)
    assert budget_in_numbers(UniformBudget("bytes", 3, 5), config) == Budget("bytes", weights_on_disk(tmp_path))
    assert budget_in_numbers(Budget("bytes", 7), config) == Budget("bytes", 7)
    with pytest.raises(ValueError, match="needs measured times"):
        budget_in_numbers(UniformBudget("ms", 3, 5), config)


def test_a_budget_in_bits_needs_no_times_but_its_own():
    config = config_of("vit")
    shapes = [(17, 32, 32), (17, 32, 64), (17, 64, 32)]
    table = LatencyTable({LatencyKey(*shape, 4, 3, 5): 1.0 for shape in shapes}, rest=100.0)
    assert budget_in_numbers(UniformBudget("ms", 3, 5), config, table) == Budget("ms", 112.0)
    bare = budget_in_numbers(UniformBudget("bytes", 8, 2), config)
    assert budget_in_numbers(UniformBudget("bytes", 8, 2), config, table) == bare
    with pytest.raises(ValueError, match=r"no time for .* W4A4"):
        budget_in_numbers(UniformBudget("ms", 4, 4), config, table)


def test_the_search_space_ties_the_readers_of_one_tensor():
    config = config_of("vit")
    space = SearchSpace.of(config)
    block = "vit.layers.0"
    assert {space.inputs[f"{block}.attention.{letter}_proj"] for letter in "qkv"} == {
        f"{block}.layernorm_before.output_quantizer"
    }
    assert space.inputs[f"{block}.mlp.fc2"] == f"{block}.mlp.fc2.input_quantizer"
    assert space.inputs[f"{block}.attention.o_proj"] == f"{block}.attention.o_proj.input_quantizer"
    # Four tensors a block: q, k and v's, o's, fc1's and fc2's.
    assert (len(space.inputs), len(space.quantizers)) == (12, 8)


def test_milliseconds_are_the_sum_of_the_table():
    config = config_of("vit")
    space = SearchSpace.of(config, (2, 4))
    shapes = [(17, 32, 32), (17, 32, 64), (17, 64, 32)]
    times = {LatencyKey(*shape, 4, w, a): shape[1] * w + 0.5 * a for shape in shapes for w in (2, 4) for a in (2, 4)}
    costs = CostModel(config, space, LatencyTable(times, rest=100.0))
    # Two blocks, each with four layers of 32 to 32, one up, one down.
    expected = 100 + 2 * (4 * (32 * 2 + 2) + (32 * 2 + 2) + (64 * 2 + 2))
    assert costs["ms"].total(space.uniform(2, 4)) == pytest.approx(expected)


def test_without_a_latency_table_the_way_to_one_is_said():
    config = config_of("vit")
    with pytest.raises(ValueError, match=r"measure-latency MODEL --output latency\.csv"):
        CostModel(config, SearchSpace.of(config))["ms"]


def test_a_shape_that_the_latency_table_lacks_is_named():
    config = config_of("vit")
    space = SearchSpace.of(config, (2,))
    table = LatencyTable({LatencyKey(17, 32, 32, 4, 2, 2): 1.0}, source="latency.csv")
    with pytest.raises(
        ValueError, match=r"latency.csv has no time for 17 rows, 32 to 64 channels, 4 groups, W2A2 \(layer"
    ):
        CostModel(config, space, table)


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ((0, 2), "candidate_bits has 0: choose from 1 to 8"),
        ((2, 9), "has 9"),
        ((True, 4), "has True"),
        ((1,), "activations need one of 2 to 8"),
    ],
)
def test_candidates_outside_1_to_8_are_refused(candidates, message):
    with pytest.raises(ValueError, match=message):
        SearchSpace.of(config_of("vit"), candidates)


def test_one_bit_is_for_weights_only():
    space = SearchSpace.of(config_of("vit"), (8, 1, 4))
    assert (space.weight_bits, space.activation_bits) == ((1, 4, 8), (4, 8))
