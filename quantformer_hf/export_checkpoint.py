"""A checkpoint in the format of another engine: `python -m quantformer_hf export onnx CHECKPOINT --output FILE`."""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch

from .finite import check_finite
from .inspect_checkpoint import read_config
from .modeling_quantformer import QuantformerForImageClassification
from .report import megabytes, weights_on_disk


#: What each format needs, by its name: the packages of the extra that is called like it.
FORMATS = {"onnx": ("onnx", "onnxscript")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `export`."""
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("checkpoint", help="folder of a finetuned or packed checkpoint, as save_pretrained writes it")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="which must not be there yet")
    parser.add_argument(
        "--opset",
        type=int,
        default=21,
        help="ONNX operator set: 21 (default), or 25 for weights of 1 and 2 bits in two bits, which OpenVINO does not read",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="write the arithmetic of the packed model itself: ONNX Runtime, and OpenVINO in float32, give its logits bit"
        " for bit, more slowly",
    )


def run(arguments: Any) -> None:
    """Write `arguments.output`, and print its size beside that of the checkpoint.

    Raises:
        ValueError: not a quantformer checkpoint, one that cannot be exported, or a package that is not installed.
        OSError: no such checkpoint, or an output that is there already or cannot be written.
    """
    missing = [name for name in FORMATS[arguments.format] if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"export {arguments.format} needs {' and '.join(missing)}, not installed here: run"
            f" pip install 'quantformer_hf[{arguments.format}]'"
        )
    from .exporters.onnx import check_export, export_onnx

    folder = Path(arguments.checkpoint)
    check_export(read_config(folder), arguments.output, arguments.opset)
    model = QuantformerForImageClassification.from_pretrained(folder, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        check_finite(folder, name, tensor)
    written = sum(
        path.stat().st_size for path in export_onnx(model, arguments.output, arguments.opset, arguments.exact)
    )
    print(f"{arguments.output}: {megabytes(written)}, from {megabytes(weights_on_disk(folder))} in {folder}")
