"""What is in a checkpoint, layer by layer, from its files alone: `python -m quantformer_hf inspect PATH`."""

import argparse
import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .backbone_layers import Backbone, describe_backbone
from .checkpoint_files import shortened
from .checkpoint_reader import CheckpointReader, read_json
from .configuration_quantformer import QuantformerConfig, check_model_type
from .expected_tensors import (
    OPERANDS,
    PREFIX,
    expected_tensors,
    layer_bits,
    quantizer_bits,
)
from .finite import check_finite
from .grids import FULL_PRECISION_BITS
from .layer_bits import attention_bits_by_name
from .ops.scales import SMALLEST_SCALE
from .packed_checkpoint import check_packed_files
from .report import format_table, megabytes


@dataclass(frozen=True)
class LayerReport:
    """A row of the table.

    Attributes:
        name: of the layer in the backbone, or of an attention block's products.
        weight_bits: None where there is no weight.
        input_bits: of its input (of an attention block: of the four operands).
        channels: how many channels each group of the input has; None where the input has no quantizer. In the stage
            `search`, by the largest assignment logit.
        scales: smallest and largest weight scale; None where the file has none.
        bytes: of its tensors. An input quantizer that several layers share counts for the first of them.
    """

    name: str
    weight_bits: int | None
    input_bits: int
    channels: tuple[int, ...] | None
    scales: tuple[float, float] | None
    bytes: int


@dataclass(frozen=True)
class CheckpointReport:
    """What the files of a checkpoint hold.

    Attributes:
        config: of the checkpoint.
        layers: in the order of the network.
        other_bytes: tensors that belong to no row.
        header_bytes: what is in the files beside tensors.
        ideal_bytes: `Σ elements * bits / 8` over the tensors: quantized weights at their bits, the others at those of
            their type in the file.
        full_precision_bytes: of the full-precision model's parameters in float32.
        unexpected: tensors that the config does not explain.
    """

    config: QuantformerConfig
    layers: list[LayerReport]
    other_bytes: int
    header_bytes: int
    ideal_bytes: int
    full_precision_bytes: int
    unexpected: list[str]

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight files."""
        return self.header_bytes + self.other_bytes + sum(layer.bytes for layer in self.layers)


def read_config(folder: Path) -> QuantformerConfig:
    """The configuration in `folder`.

    Raises:
        FileNotFoundError: no such folder, or no config in it.
        ValueError: not of this package, or with a value that cannot be.
    """
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {kind}: name the folder of a checkpoint, as save_pretrained writes it")
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: name the folder that save_pretrained has written")
    content = read_json(path)
    check_model_type(folder, content)
    with _describing(folder):
        return QuantformerConfig.from_dict(content)


@contextlib.contextmanager
def _describing(folder: Path) -> Iterator[None]:
    # Of a value of another type transformers raises nearly anything, or lets it pass.
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{folder / 'config.json'} describes no model ({' '.join(str(error).split())}): restore the one that was saved"
        ) from error


def inspect_checkpoint(folder: str | Path) -> CheckpointReport:
    """Look at the files in `folder`, of any stage, packed or not, whole or sharded; no model is built.

    Raises:
        FileNotFoundError: no folder, config or weight file.
        ValueError: not a quantformer checkpoint, a damaged file, or tensors that contradict the config.
    """
    folder = Path(folder)
    config = read_config(folder)
    files = CheckpointReader.open(folder)
    with _describing(folder):
        backbone = describe_backbone(config.backbone_config)
        expected = expected_tensors(backbone, config)
    _check_tensors(folder, files, expected)
    for name in expected:
        check_finite(folder, name, torch.from_numpy(files.read(name)))
    _check_bit_widths(folder, files, quantizer_bits(backbone, config))
    if config.stage == "packed":
        check_packed_files(folder, config)
    layers, counted = _report_layers(folder, files, backbone, config)
    tensor_bytes = sum(tensor.bytes for tensor in files.tensors.values())
    return CheckpointReport(
        config=config,
        layers=layers,
        other_bytes=tensor_bytes - counted,
        header_bytes=files.file_bytes - tensor_bytes,
        ideal_bytes=_ideal_bytes(files, backbone, config),
        full_precision_bytes=full_precision_bytes(files, backbone),
        unexpected=sorted(files.tensors.keys() - expected.keys()),
    )


def full_precision_bytes(files: CheckpointReader, backbone: Backbone) -> int:
    """Bytes of the full-precision model's parameters in float32."""
    parameters = sum(math.prod(layer.shape) + layer.bias * layer.shape[0] for layer in backbone.layers.values())
    parameters += sum(files.tensors[f"{PREFIX}{name}"].elements for name in backbone.others)
    return 4 * parameters


def _check_tensors(folder: Path, files: CheckpointReader, expected: dict[str, tuple[int, ...] | None]) -> None:
    missing = [name for name in expected if name not in files.tensors]
    if missing:
        raise ValueError(
            f"{folder} lacks tensors that its config names: {shortened(missing)}: restore the config.json that was saved"
            f" with the weights, or the weights"
        )
    for name, shape in expected.items():
        found = files.tensors[name].shape
        if shape is not None and found != shape:
            raise ValueError(
                f"{folder}: the tensor '{name}' has the shape {found}, and by the config {shape}: restore the config.json"
                f" that was saved with the weights"
            )


def _check_bit_widths(folder: Path, files: CheckpointReader, expected: dict[str, int]) -> None:
    # The file lists them in the order of the modules, which only the model knows: how many there are of each has to do.
    found, wanted = Counter(files.read("bit_widths").tolist()), Counter(expected.values())
    if found != wanted:
        raise ValueError(
            f"{folder} was quantized with {_counts(found)}, and its config says {_counts(wanted)}: restore the"
            f" config.json that was saved with the weights"
        )


def _counts(widths: Counter) -> str:
    return ", ".join(f"{count} quantizers of {bits} bits" for bits, count in sorted(widths.items()))


def _report_layers(
    folder: Path, files: CheckpointReader, backbone: Backbone, config: QuantformerConfig
) -> tuple[list[LayerReport], int]:
    """The rows, and the bytes of the tensors in them."""
    rows, counted = [], set()

    def take_bytes(*prefixes: str) -> int:
        prefixes = tuple(f"{PREFIX}{prefix}." for prefix in prefixes)
        taken = {name for name in files.tensors if name.startswith(prefixes)} - counted
        counted.update(taken)
        return sum(files.tensors[name].bytes for name in taken)

    def attention_row(attention: str) -> LayerReport:
        names = [f"{attention}.operands.{operand}" for operand in OPERANDS]
        return LayerReport(f"{attention} (products)", None, of_attention[attention], (), None, take_bytes(*names))

    of_attention = attention_bits_by_name(backbone.attention, config)
    for name, bits in layer_bits(backbone, config).items():
        quantizer = backbone.layers[name].input_quantizer
        rows.append(
            LayerReport(
                name,
                bits.weight_bits,
                bits.activation_bits,
                _channels(folder, files, quantizer, backbone.layers[name].inputs, bits.activation_bits),
                _scales(folder, files, name),
                take_bytes(name, quantizer),
            )
        )
        attention = name.removesuffix(".o_proj")
        if of_attention.get(attention, FULL_PRECISION_BITS) != FULL_PRECISION_BITS:
            rows.append(attention_row(attention))
    return rows, sum(row.bytes for row in rows)


def _scales(folder: Path, files: CheckpointReader, layer: str) -> tuple[float, float] | None:
    name = f"{PREFIX}{layer}.weight_quantizer.scale"
    if name not in files.tensors:
        return None
    # As `ops.positive` uses them: training may have carried one through zero.
    scales = np.maximum(np.abs(files.read(name)), SMALLEST_SCALE)
    return scales.min().item(), scales.max().item()


def _channels(folder: Path, files: CheckpointReader, quantizer: str, inputs: int, bits: int) -> tuple[int, ...] | None:
    if bits == FULL_PRECISION_BITS:
        return None
    scale, index, logits = (f"{PREFIX}{quantizer}.{part}" for part in ("scale", "group_index", "assignment_logits"))
    groups = files.read(scale).size
    if index in files.tensors:
        assignment = files.read(index)
    elif logits in files.tensors:
        assignment = files.read(logits).argmax(0)
    else:
        return (inputs,)
    if assignment.dtype.kind not in "iu":
        raise ValueError(
            f"{folder}: '{index}' holds {assignment.dtype}, and no groups: copy or download the file again"
        )
    wrong = assignment[(assignment < 0) | (assignment >= groups)]
    if wrong.size:
        raise ValueError(
            f"{folder}: '{index}' names the group {wrong[0]}, and there are {groups}, counted from 0: the file is"
            f" damaged, copy or download it again"
        )
    return tuple(np.bincount(assignment, minlength=groups).tolist())


def _ideal_bytes(files: CheckpointReader, backbone: Backbone, config: QuantformerConfig) -> int:
    bits = {name: 8 * tensor.bytes for name, tensor in files.tensors.items()}
    for name, width in layer_bits(backbone, config).items():
        if width.weight_bits != FULL_PRECISION_BITS:
            stored = "weight_quantizer.codes" if config.stage == "packed" else "weight"
            bits[f"{PREFIX}{name}.{stored}"] = math.prod(backbone.layers[name].shape) * width.weight_bits
    return -(-sum(bits.values()) // 8)


def format_report(report: CheckpointReport) -> str:
    """The table and the totals, for the terminal."""
    total = report.file_bytes
    header = ["layer", "weight bits", "input bits", "groups", "channels in each group", "weight scales", "share"]
    rows = [
        [
            layer.name,
            "" if layer.weight_bits is None else _bits(layer.weight_bits),
            _bits(layer.input_bits),
            str(len(layer.channels)) if layer.channels else "",
            " ".join(map(str, layer.channels or ())),
            "" if layer.scales is None else f"{layer.scales[0]:.2e} to {layer.scales[1]:.2e}",
            f"{100 * layer.bytes / total:.1f} %",
        ]
        for layer in report.layers
    ]
    for name, size in (("other tensors", report.other_bytes), ("headers of the files", report.header_bytes)):
        rows.append([name, "", "", "", "", "", f"{100 * size / total:.1f} %"])
    config = report.config
    lines = [
        f"{config.backbone_config.model_type}, stage '{config.stage}'",
        "",
        format_table(header, rows),
        "",
        f"file            {total:>13,} bytes ({megabytes(total)})",
        f"ideal           {report.ideal_bytes:>13,} bytes: elements x bits / 8, summed over the tensors",
        f"file / ideal    {total / report.ideal_bytes:>13.3f}",
        f"full precision  {report.full_precision_bytes:>13,} bytes ({megabytes(report.full_precision_bytes)}): the"
        f" parameters in float32, {report.full_precision_bytes / total:.1f} times the file",
    ]
    if config.class_token_bits is not None:
        lines.append(
            f"Input bits are those of patches; at the class token, the inputs of the blocks have {config.class_token_bits}."
        )
    if config.stage == "search":
        lines.append("Channels are counted in the group of their largest assignment logit; freezing decides.")
    if config.stage != "packed":
        lines.append("The weights are in floating point, fake-quantized, until they are packed.")
    if report.unexpected:
        lines.append(f"Not explained by the config: {shortened(report.unexpected)}")
    return "\n".join(lines)


def _bits(bits: int) -> str:
    return "float" if bits == FULL_PRECISION_BITS else str(bits)


# Command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `inspect`."""
    parser.add_argument("path", help="folder of a checkpoint, as save_pretrained writes it")


def run(arguments: Any) -> None:
    """Print the report of `arguments.path`."""
    print(format_report(inspect_checkpoint(arguments.path)))
