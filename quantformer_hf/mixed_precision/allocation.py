"""From widths to what is written: the allocation with its costs, and the pictures."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..backbone_layers import describe_backbone
from ..checkpointing import write_durably
from ..configuration_quantformer import QuantformerConfig
from .allocation_file import ALLOCATION_FILE, AllocatedAttention, AllocatedLayer, BitAllocation
from .budget import Budget
from .cost import CostModel
from .search_space import Widths


#: What an allocation's cost rests on beside its bits: fields of the config,
SETTINGS = ("class_token_bits", "attention_bits", "embedding_bits", "classifier_bits", "num_groups", "weight_quantizer")
#: and of the backbone's, where it has them.
BACKBONE_SETTINGS = ("image_size", "window_size")


def make_allocation(
    config: QuantformerConfig, widths: Widths, costs: CostModel, budgets: Sequence[Budget], method: str
) -> BitAllocation:
    """The allocation of `widths`, with what it costs.

    Args:
        config: of the model that `costs` counts.
        budgets: that it was found for.
        method: by which, `budget` or `edmips`.
    """
    shapes = {name: layer.shape for name, layer in describe_backbone(config.backbone_config).layers.items()}
    layers = {
        name: AllocatedLayer(
            width.weight_bits,
            width.activation_bits,
            shapes[name],
            {unit: cost.share(name, widths) for unit, cost in costs.costs.items()},
        )
        for name, width in widths.items()
        if name in shapes
    }
    attention = {
        name: AllocatedAttention(
            widths[name].activation_bits, {unit: cost.share(name, widths) for unit, cost in costs.costs.items()}
        )
        for name in costs.space.attention
    }
    settings = {name: getattr(config, name) for name in SETTINGS}
    if attention:
        # Which say it all.
        del settings["attention_bits"]
    backbone = config.backbone_config
    settings |= {name: getattr(backbone, name) for name in BACKBONE_SETTINGS if hasattr(backbone, name)}
    settings["candidate_bits"] = sorted({*costs.space.weight_bits, *costs.space.activation_bits})
    settings["attention_candidate_bits"] = list(costs.space.attention_bits)
    budget = {budget.unit: budget.most for budget in budgets}
    return BitAllocation(layers, costs.totals(widths), budget, method, settings, attention)


def write_allocation(folder: Path, allocation: BitAllocation) -> Path:
    """Write `bit_allocation.json` in `folder`, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / ALLOCATION_FILE, allocation.to_json())
    return folder / ALLOCATION_FILE


def mean_bits(widths: Widths, costs: CostModel) -> tuple[float, float]:
    """Mean bits of the weights, by elements, and of what linears read, by multiplications."""
    products = {name: costs.products[name] for name in costs.space.inputs}
    return (
        _mean((widths[name].weight_bits, product.multiplications / product.rows) for name, product in products.items()),
        _mean((widths[name].activation_bits, product.multiplications) for name, product in products.items()),
    )


def _mean(pairs: Iterable[tuple[float, float]]) -> float:
    pairs = list(pairs)
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
