"""What an allocation of bits costs: BitOps and milliseconds of one image, and the bytes of the packed file.

A cost is a sum: something fixed, and a share of each layer that depends on its own bits alone. That is what lets an integer
programme find the best allocation exactly.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..configuration_quantformer import QuantformerConfig
from ..modeling_quantformer import QuantformerForImageClassification
from ..packed_layers import PackedWeight
from ..packing import LAYOUT_VERSION, packed_width
from ..quantize import full_precision
from ..report import Product, products
from .budget import BIT_OPERATIONS, BYTES, MILLISECONDS, Budget, UniformBudget
from .latency_table import LatencyTable
from .search_space import SearchSpace, Widths


#: safetensors' names of the dtypes that a packed file has.
DTYPE_NAMES = {torch.float32: "F32", torch.uint8: "U8"}


@dataclass
class Cost:
    """One cost of a model.

    Attributes:
        unit: `BitOps`, `bytes` or `ms`.
        fixed: what does not depend on the choice.
        shares: of each layer, by (weight bits, activation bits).
    """

    unit: str
    fixed: float
    shares: dict[str, dict[tuple[int, int], float]]

    def share(self, name: str, widths: Widths) -> float:
        """Of one layer."""
        return self.shares[name][widths[name].weight_bits, widths[name].activation_bits]

    def linear(self, widths: Widths) -> float:
        """`fixed + Σ shares`."""
        return self.fixed + sum(self.share(name, widths) for name in self.shares)

    def total(self, widths: Widths) -> float:
        """What the model costs, exactly."""
        return self.linear(widths)


@dataclass
class ByteCost(Cost):
    """Bytes of the file that `pack()` and `save_pretrained` write.

    `fixed` has the header as long as the narrowest weights leave it: offsets of more digits make it a few bytes longer,
    which `total` counts.

    Attributes:
        tensors: dtype and shape of each tensor of the file, by name; the codes' last dimension is of no account.
        columns: of each weight in play, by the name of its codes.
    """

    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    columns: dict[str, tuple[str, int]] = field(default_factory=dict)

    def total(self, widths: Widths) -> int:
        tensors = dict(self.tensors)
        for name, (codes, columns) in self.columns.items():
            dtype, (rows, _) = tensors[codes]
            tensors[codes] = dtype, (rows, packed_width(columns, widths[name].weight_bits))
        return file_bytes(tensors)


def file_bytes(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of a safetensors file as transformers writes it: eight for the header's length, the header, the tensors.

    Args:
        tensors: dtype (`F32`, `U8`) and shape by name.
    """
    sizes = {"F32": 4, "U8": 1}
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    # The order in which safetensors lays them out: wide types first, for their alignment, then by name.
    for name in sorted(tensors, key=lambda name: (-sizes[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        start, end = end, end + sizes[dtype] * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + end


class CostModel:
    """Every cost of the packed models of one configuration. Nothing is computed: layers are counted on the meta device.

    Args:
        config: the backbone, `num_groups`, and the bits of what is not in play.
        space: the choices.
        latencies: measured times; None where no one asks for milliseconds.

    Raises:
        ValueError: a layer whose time is not in `latencies`.
    """

    def __init__(self, config: QuantformerConfig, space: SearchSpace, latencies: LatencyTable | None = None):
        self.space = space
        self.products = _count(_build(config, space, "pretrain"))
        model = _build(config, space, "packed")
        self.costs = {
            BIT_OPERATIONS: self._bit_operations(),
            BYTES: self._bytes(model),
        }
        if latencies is not None:
            self.costs[MILLISECONDS] = self._milliseconds(config.num_groups, model, latencies)

    def __getitem__(self, unit: str) -> Cost:
        """The cost in `unit`.

        Raises:
            ValueError: milliseconds, without a table of them.
        """
        if unit not in self.costs:
            raise ValueError(
                "a budget in milliseconds needs measured times: make them by"
                " `python -m quantformer_hf measure-latency MODEL --output latency.csv` on the machine that it is for, and"
                " give --latency_table latency.csv"
            )
        return self.costs[unit]

    def totals(self, widths: Widths) -> dict[str, float]:
        """All costs of an allocation, by unit."""
        return {unit: cost.total(widths) for unit, cost in self.costs.items()}

    def pairs(self) -> Iterable[tuple[int, int]]:
        """All (weight bits, activation bits)."""
        return [(w, a) for w in self.space.weight_bits for a in self.space.activation_bits]

    def _bit_operations(self) -> Cost:
        in_play = {*self.space.inputs, *self.space.attention}
        fixed = sum(product.bit_operations for name, product in self.products.items() if name not in in_play)

        def shares(name: str) -> dict[tuple[int, int], int]:
            product = self.products[name]
            return {(w, a): replace(product, weight_bits=w, activation_bits=a).bit_operations for w, a in self.pairs()}

        of_attention = {
            name: {(b, b): replace(self.products[name], weight_bits=b, activation_bits=b).bit_operations for b in bits}
            for name, bits in self._attention()
        }
        return Cost(BIT_OPERATIONS, fixed, {name: shares(name) for name in self.space.inputs} | of_attention)

    def _attention(self) -> Iterable[tuple[str, tuple[int, ...]]]:
        return ((name, self.space.attention_bits) for name in self.space.attention)

    def _attention_for_nothing(self) -> dict[str, dict[tuple[int, int], float]]:
        """Its operands have the same number of tensors and, in a byte each, take the same time, whatever their bits."""
        return {name: {(b, b): 0.0 for b in bits} for name, bits in self._attention()}

    def _bytes(self, model: QuantformerForImageClassification) -> ByteCost:
        tensors = {name: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in model.state_dict().items()}
        columns, shares = {}, {}
        for name in self.space.inputs:
            weight: PackedWeight = model.backbone.get_submodule(name).weight_quantizer
            columns[name] = f"backbone.{name}.weight_quantizer.codes", weight.columns
            shares[name] = {(w, a): weight.out_channels * packed_width(weight.columns, w) for w, a in self.pairs()}
        shares |= self._attention_for_nothing()
        cost = ByteCost(BYTES, 0, shares, tensors, columns)
        narrowest = self.space.uniform(self.space.weight_bits[0], self.space.activation_bits[0])
        cost.fixed = cost.total(narrowest) - cost.linear(narrowest)
        return cost

    def _milliseconds(self, num_groups: int, model: QuantformerForImageClassification, latencies: LatencyTable) -> Cost:
        def times(name: str) -> dict[tuple[int, int], float]:
            layer = model.backbone.get_submodule(name)
            shape = self.products[name].rows, layer.in_features, layer.out_features, num_groups
            return {(w, a): latencies.milliseconds(name, *shape, w, a) for w, a in self.pairs()}

        shares = {name: times(name) for name in self.space.inputs}
        return Cost(MILLISECONDS, latencies.rest, shares | self._attention_for_nothing())


def budget_in_numbers(
    budget: Budget | UniformBudget, config: QuantformerConfig, latencies: LatencyTable | None = None
) -> Budget:
    """`budget`, or what its bits cost in a model of `config`.

    Raises:
        ValueError: milliseconds, of bits that are not in `latencies`.
    """
    if isinstance(budget, Budget):
        return budget
    space = replace(
        SearchSpace.of(config), weight_bits=(budget.weight_bits,), activation_bits=(budget.activation_bits,)
    )
    cost = CostModel(config, space, latencies if budget.unit == MILLISECONDS else None)[budget.unit]
    return Budget(budget.unit, cost.total(space.uniform(budget.weight_bits, budget.activation_bits)))


def _build(config: QuantformerConfig, space: SearchSpace, stage: str) -> QuantformerForImageClassification:
    """The model in `stage` at the widest candidates, without values."""
    widest = {"weight_bits": space.weight_bits[-1], "activation_bits": space.activation_bits[-1]}
    arguments = config.to_dict() | {
        "stage": stage,
        "packing_layout": LAYOUT_VERSION if stage == "packed" else None,
        "layer_bits": dict.fromkeys(space.inputs, widest),
    }
    with torch.device("meta"):
        return QuantformerForImageClassification(QuantformerConfig.from_dict(arguments)).eval()


def _count(model: QuantformerForImageClassification) -> dict[str, Product]:
    with full_precision(model):
        return products(model.backbone, one_image(model.config))


def one_image(config: QuantformerConfig, device: str = "meta") -> Tensor:
    """An image of the size that the model is made for, `(1, channels, height, width)`, of zeros."""
    backbone = config.backbone_config
    size = backbone.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.zeros(1, backbone.num_channels, height, width, device=device)
