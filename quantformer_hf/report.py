"""The table at the end of a run, and the sizes in it."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from .quantize import weight_quantized_layers


def weights_on_disk(folder: Path) -> int:
    """Bytes of the weight files in `folder`."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def bytes_at_bit_widths(model: nn.Module) -> int:
    """What the model's weights need at their bit widths, everything else in float32; without bookkeeping buffers.

    `model` is a quantized model in any stage. Files are of this size once they are packed.
    """
    layers = weight_quantized_layers(model)
    quantized = {id(layer.weight) for layer in layers}
    bits = sum(layer.weight.numel() * layer.weight_quantizer.grid.bits for layer in layers)
    bits += sum(32 * parameter.numel() for parameter in model.parameters() if id(parameter) not in quantized)
    return -(-bits // 8)


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
