"""`bit_allocation.json`: written, read, and taken by everything that takes `layer_bits`."""

import json
import math

import pytest
import torch
from conftest import make_batches, make_full_precision
from test_cost import config_of, random_widths

from quantformer_hf import QuantformerConfig, QuantformerForImageClassification
from quantformer_hf.backbone_layers import describe_backbone
from quantformer_hf.inspect_checkpoint import inspect_checkpoint
from quantformer_hf.layer_bits import LayerBits, attention_bits_by_name, check_same_quantization
from quantformer_hf.mixed_precision.allocation import make_allocation, mean_bits, write_allocation
from quantformer_hf.mixed_precision.allocation_file import BitAllocation
from quantformer_hf.mixed_precision.budget import Budget
from quantformer_hf.mixed_precision.cost import CostModel
from quantformer_hf.mixed_precision.search_space import SearchSpace


def write(folder, backbone="vit", attention=(4, 6)):
    """A random allocation, and the path of its file."""
    config = config_of(backbone)
    costs = CostModel(config, SearchSpace.of(config, attention_candidates=attention))
    widths = random_widths(costs.space, 0)
    allocation = make_allocation(config, widths, costs, [Budget("bytes", 1e6)], "budget")
    return allocation, str(write_allocation(folder, allocation))


def edit(path, change):
    with open(path) as file:
        content = json.load(file)
    change(content)
    with open(path, "w") as file:
        json.dump(content, file)


def test_what_is_written_is_read(tmp_path):
    allocation, path = write(tmp_path)
    assert BitAllocation.read(path) == allocation
    assert allocation.budget == {"bytes": 1e6}
    # What the layers do not have is in the rest of the model.
    assert {block.bits for block in allocation.attention.values()} <= {4, 6, 8}
    shares = sum(part.cost["BitOps"] for part in (*allocation.layers.values(), *allocation.attention.values()))
    assert 0 < shares < allocation.cost["BitOps"]


def test_a_model_takes_it_in_every_stage_and_inspect_shows_it(backbone, tmp_path):
    allocation, path = write(tmp_path, backbone)
    assert config_of(backbone, layer_bits=path).layer_bits == allocation.layer_bits
    model = QuantformerForImageClassification.from_full_precision(
        make_full_precision(backbone), layer_bits=path, num_groups=4
    )
    model.calibrate(make_batches())
    images, logits = make_batches(1)[0], {}
    for verb in ("begin_search", "freeze_groups", "pack"):
        getattr(model, verb)()
        folder = tmp_path / verb
        model.save_pretrained(folder)
        loaded = QuantformerForImageClassification.from_pretrained(folder)
        with torch.no_grad():
            logits[verb] = loaded.eval()(images).logits
        assert loaded.config.layer_bits == allocation.layer_bits
        found = {row.name: (row.weight_bits, row.input_bits) for row in inspect_checkpoint(folder).layers}
        for name, layer in allocation.layers.items():
            assert found[name] == (layer.weight_bits, layer.activation_bits)
        for name, block in allocation.attention.items():
            assert found[f"{name} (products)"] == (None, block.bits)
    assert inspect_checkpoint(folder).file_bytes == allocation.cost["bytes"]
    assert torch.equal(logits["pack"], logits["freeze_groups"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 1}, r"names the layer 'vit.layers.1.attention.q_proj', which this vit does not have"),
        ({"num_hidden_layers": 3}, r"says nothing of the layer 'vit.layers.2.attention.q_proj'"),
        (
            {"intermediate_size": 128},
            r"weight of 'vit.layers.0.mlp.fc1' has the shape \(64, 32\) in it and \(128, 32\)",
        ),
    ],
)
def test_an_allocation_for_another_architecture_names_the_first_layer(tmp_path, change, message):
    _, path = write(tmp_path)
    backbone_config = make_full_precision("vit").config.to_dict() | change
    with pytest.raises(ValueError, match=message):
        QuantformerConfig(backbone_config=backbone_config, layer_bits=path)


def test_a_damaged_or_missing_file_is_named(tmp_path):
    _, path = write(tmp_path)
    edit(path, lambda content: content.update(format=9))
    with pytest.raises(ValueError, match=r"bit_allocation.json is no bit allocation \(ValueError: its format is 9"):
        BitAllocation.read(path)
    (tmp_path / "torn.json").write_text('{"format": 1, "lay')
    with pytest.raises(ValueError, match=r"torn\.json is no bit allocation"):
        BitAllocation.read(tmp_path / "torn.json")
    with pytest.raises(FileNotFoundError, match=r"there is no file nowhere\.json"):
        config_of("vit", layer_bits="nowhere.json")


def test_bits_that_cannot_be_are_refused(tmp_path):
    _, path = write(tmp_path)
    edit(path, lambda content: content["layers"]["vit.layers.0.mlp.fc1"].update(weight_bits=9))
    with pytest.raises(ValueError, match=r"layer_bits\['vit.layers.0.mlp.fc1'\]\['weight_bits'\] is 9"):
        config_of("vit", layer_bits=path)


def test_a_checkpoint_of_other_bits_is_not_taken_for_the_allocation(tmp_path):
    _, path = write(tmp_path)
    model = QuantformerForImageClassification(config_of("vit", bit_width=5))
    with pytest.raises(ValueError, match=r"layer 'vit.layers.0.attention.q_proj' of somewhere has W5A5, and"):
        check_same_quantization(model.backbone, model.config, {"layer_bits": path}, "somewhere")
    model = QuantformerForImageClassification(config_of("vit", layer_bits=path))
    check_same_quantization(model.backbone, model.config, {"layer_bits": path}, "somewhere")


def test_the_card_says_which_bits_there_are_and_does_not_list_every_layer(tmp_path):
    allocation, _ = write(tmp_path)
    bits = allocation.layer_bits | {"vit.layers.0.attention": {"attention_bits": 6}}
    assert bits["vit.layers.1.attention"] == {"attention_bits": 8}
    QuantformerForImageClassification(config_of("vit", layer_bits=bits)).save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    weights = [layer.weight_bits for layer in allocation.layers.values()]
    inputs = [layer.activation_bits for layer in allocation.layers.values()]
    row = "| linears of the blocks | {} to {} bits, by layer | {} to {} bits, by layer |"
    assert row.format(min(weights), max(weights), min(inputs), max(inputs)) in card
    assert "# ViT mixed precision" in card
    assert "| attention products: q, k, v and probabilities |  | 6 to 8 bits, by layer |" in card
    assert "but `" not in card


def test_settings_with_which_the_budget_would_not_hold_are_refused(tmp_path):
    _, path = write(tmp_path)
    with pytest.raises(ValueError, match="with num_groups 4, and not with 32: give --num_groups 4, or"):
        config_of("vit", layer_bits=path, num_groups=32)
    with pytest.raises(ValueError, match="with embedding_bits 8, and not with 4"):
        config_of("vit", layer_bits=path, embedding_bits=4)
    with pytest.raises(ValueError, match="with weight_quantizer lsq_by_width, and not with minmax"):
        config_of("vit", layer_bits=path, weight_quantizer="minmax")
    larger = config_of("vit").backbone_config.to_dict()
    size = larger["image_size"]
    with pytest.raises(
        ValueError, match=f"with image_size {size}, and not with {2 * size}: give --image_size {size}, or"
    ):
        QuantformerConfig(num_groups=4, layer_bits=path, backbone_config=larger | {"image_size": 2 * size})
    # The same size, in the other way that transformers has of writing it.
    QuantformerConfig(num_groups=4, layer_bits=path, backbone_config=larger | {"image_size": [size, size]})
    # Of attention products it says the bits itself, where it had the choice.
    taken = config_of("vit", layer_bits=path, attention_bits=32)
    assert 32 not in attention_bits_by_name(describe_backbone(taken.backbone_config).attention, taken).values()
    _, path = write(tmp_path, attention=())
    with pytest.raises(ValueError, match="with attention_bits 8, and not with 32"):
        config_of("vit", layer_bits=path, attention_bits=32)


def test_mean_bits_count_weights_by_their_elements_and_inputs_by_multiplications():
    config = config_of("swin")
    costs = CostModel(config, SearchSpace.of(config, (2, 8)))
    name = next(name for name in costs.space.inputs if name.endswith("fc1"))
    widths = costs.space.uniform(2, 2) | {name: LayerBits(8, 8)}
    elements = {name: math.prod(describe_backbone(config.backbone_config).layers[name].shape) for name in widths}
    multiplications = {name: elements[name] * costs.products[name].rows for name in widths}
    expected = [2 + 6 * counts[name] / sum(counts.values()) for counts in (elements, multiplications)]
    assert mean_bits(widths, costs) == pytest.approx(expected)
