"""The table at the end of a run, and the sizes in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .attention import attention_modules, capture_attention
from .grids import FULL_PRECISION_BITS
from .kernels import fake_quantized
from .quantize import reading_layers


def weights_on_disk(folder: Path) -> int:
    """Bytes of the weight files in `folder`."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


@dataclass(frozen=True)
class Product:
    """The matrix product of a layer, or the two of an attention block, for one image.

    Attributes:
        rows: positions (tokens, patches) that a layer's weight is applied to; of an attention block, rows of its map.
        multiplications: of numbers.
        weight_bits, activation_bits: of the two operands.
        class_token_rows, class_token_bits: how many of the rows have an operand of other bits, and of which.
    """

    rows: int
    multiplications: int
    weight_bits: int
    activation_bits: int
    class_token_rows: int = 0
    class_token_bits: int = 0

    @property
    def bit_operations(self) -> int:
        """`multiplications * weight bits * activation bits`."""
        of_rows = (
            self.rows - self.class_token_rows
        ) * self.activation_bits + self.class_token_rows * self.class_token_bits
        return self.multiplications // self.rows * self.weight_bits * of_rows


@torch.no_grad()
def products(model: nn.Module, pixel_values: Tensor) -> dict[str, Product]:
    """The products of one image, by the names of linears, patch embedding and attention blocks.

    Args:
        model: an image classifier, quantized or not, that runs this package's attention function.
        pixel_values: one image, `(1, channels, height, width)`. On the meta device nothing is computed.
    """
    reads = {layer: quantizer for quantizer, layers in reading_layers(model).items() for layer in layers}
    names = {module: name for name, module in model.named_modules()}
    found = {}

    def count(layer: nn.Linear | nn.Conv2d, arguments: tuple, output: Tensor) -> None:
        rows = output.numel() // layer.weight.shape[0]
        first = reads[layer].class_token if layer in reads else None
        found[names[layer]] = Product(
            rows=rows,
            multiplications=rows * layer.weight.numel(),
            weight_bits=_bits(getattr(layer, "weight_quantizer", None)),
            activation_bits=_bits(reads.get(layer) or getattr(layer, "input_quantizer", None)),
            class_token_rows=0 if first is None else first.tokens,
            class_token_bits=0 if first is None else first.grid.bits,
        )

    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        with capture_attention(model) as maps:
            model(pixel_values=pixel_values)
    finally:
        for handle in handles:
            handle.remove()
    for attention, probabilities in zip(attention_modules(model), maps, strict=True):
        operands = getattr(attention, "operands", None)
        bits = _bits(operands.query if operands is not None else None)
        head_size = attention.q_proj.out_features // probabilities.shape[1]
        rows = probabilities.numel() // probabilities.shape[-1]
        found[names[attention]] = Product(rows, 2 * probabilities.numel() * head_size, bits, bits)
    return found


def bit_operations(model: nn.Module, pixel_values: Tensor) -> int:
    """`Σ multiplications * weight bits * activation bits` of one image: linears, patch embedding, attention products.

    Full precision counts as 32 bits (Baskin et al., UNIQ, arXiv 1804.10969, for the measure). Arguments as in `products`.
    """
    return sum(product.bit_operations for product in products(model, pixel_values).values())


def _bits(quantizer: nn.Module | None) -> int:
    return FULL_PRECISION_BITS if quantizer is None else quantizer.grid.bits


@torch.no_grad()
def distinct_levels(model: nn.Module, pixel_values: Tensor) -> tuple[int, int]:
    """The most distinct values of any row of a block linear's weight, and of any channel of its input, counted. Of a class
    token that has a quantizer of its own, the values do not count.

    Args:
        model: a quantized model in the stage `pretrain` or `finetune` (a mixture of quantizers has more).
        pixel_values: images to run, `(batch, channels, height, width)`.
    """
    most = 0

    def count(quantizer: nn.Module, arguments: tuple, output: Tensor) -> None:
        nonlocal most
        _, others = quantizer.parts(output)[-1]
        most = max(most, _most_distinct(others.reshape(-1, output.shape[-1]).T))

    readers = reading_layers(model)
    handles = [quantizer.register_forward_hook(count) for quantizer in readers]
    try:
        with fake_quantized():
            model(pixel_values=pixel_values)
    finally:
        for handle in handles:
            handle.remove()
    layers = [
        layer for group in readers.values() for layer in group if getattr(layer, "weight_quantizer", None) is not None
    ]
    return max((_most_distinct(layer.weight_quantizer(layer.weight)) for layer in layers), default=0), most


def _most_distinct(rows: Tensor) -> int:
    return (rows.sort(1).values.diff(dim=1) != 0).sum(1).max().item() + 1


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal, first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def megabytes(size: int) -> str:
    """Bytes as decimal megabytes."""
    return f"{size / 1e6:.2f} MB"
