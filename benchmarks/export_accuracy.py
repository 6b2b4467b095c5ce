"""The exported ONNX file beside the packed model: size, and the class that each engine sees in 650 ImageNet images.

    python benchmarks/export_accuracy.py --shared ../shared [--bits 8 4 3 2] [--images 650]

The real ViT-Tiny of `models/`, calibrated on 32 images of `data/imagenet-sample`, 8 groups, packed; needs
`pip install '.[onnx,openvino]'`. Engines run with their default options, but with one
thread and in float32.

Each library adds up in an order of its own, and a last digit that differs moves some activation to another level, which
moves more of them in the next layer. How much that makes without any export is the row "PyTorch without oneDNN": the packed
model itself, with another library for its sums.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import torch
from _arguments import SHARED, positive, shared_folder
from _machine import describe_machine
from datasets import load_dataset
from transformers import BaseImageProcessor
from transformers.utils import logging

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.checkpoints import load_full_precision
from quantformer_hf.exporters.onnx import export_onnx
from quantformer_hf.images import with_crop
from quantformer_hf.report import format_table, megabytes, weights_on_disk


BATCH_SIZE = 10

Run = Callable[[np.ndarray], np.ndarray]


def run_onnxruntime(path: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixel_values": pixels})[0]


def run_openvino(path: Path) -> Run:
    # Where the processor has bfloat16, it would compute in that.
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return lambda pixels: compiled([pixels])[0]


ENGINES = {
    f"ONNX Runtime {onnxruntime.__version__}": run_onnxruntime,
    f"OpenVINO {openvino.__version__.partition('-')[0]}": run_openvino,
}

#: Ways to export: the engines that read it, the most bits for which it makes another file, arguments.
FILES = {
    "opset 21": (tuple(ENGINES), 8, {}),
    "opset 25": (tuple(ENGINES)[:1], 2, {"opset": 25}),
    "exact": (tuple(ENGINES), 8, {"exact": True}),
}


def load_images(folder: Path, processor: BaseImageProcessor, count: int) -> tuple[torch.Tensor, np.ndarray]:
    """`pixel_values` `(count, 3, height, width)` of images evenly spread over the data set, and their labels."""
    data = load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train")
    if count > len(data):
        sys.exit(f"{folder} has {len(data)} images, and {count} are asked for: give --images {len(data)} or fewer")
    data = data.select(range(0, len(data), len(data) // count)).select(range(count))
    pixels = [
        processor([image.convert("RGB") for image in rows["image"]], return_tensors="pt")["pixel_values"]
        for rows in data.iter(BATCH_SIZE)
    ]
    return torch.cat(pixels), np.array(data["label"])


def run_model(model: QuantformerForImageClassification, with_onednn: bool = True) -> Run:
    def run(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), torch.backends.mkldnn.flags(enabled=with_onednn):
            return model(torch.from_numpy(pixels)).logits.numpy()

    return run


def logits_of(run: Run, pixels: torch.Tensor) -> np.ndarray:
    return np.concatenate([run(batch.numpy()) for batch in pixels.split(BATCH_SIZE)])


def compare(model: QuantformerForImageClassification, pixels: torch.Tensor, labels: np.ndarray) -> list[list[str]]:
    """Rows of the table for a packed model."""
    bits = model.config.weight_bits
    width = f"W{bits}A{model.config.activation_bits}"
    expected = logits_of(run_model(model), pixels)
    rows = []

    def add(engine: str, run: Run, size: str, ratio: str) -> None:
        logits = logits_of(run, pixels)
        same = (logits.argmax(1) == expected.argmax(1)).sum()
        difference = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
        accuracies = [f"{100 * (found.argmax(1) == labels).mean():.1f}" for found in (expected, logits)]
        rows.append([f"{width} {engine}", size, ratio, *accuracies, f"{same} of {len(labels)}", f"{difference:.1e}"])
        print("  ".join(rows[-1]), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "packed")
        packed = weights_on_disk(Path(folder) / "packed")
        add("PyTorch without oneDNN", run_model(model, with_onednn=False), megabytes(packed), "1.00")
        for name, (engines, most_bits, arguments) in FILES.items():
            if bits > most_bits:
                continue
            path = Path(folder) / f"{name}.onnx"
            export_onnx(model, path, **arguments)
            size = path.stat().st_size
            for engine in engines:
                add(f"{engine}, {name}", ENGINES[engine](path), megabytes(size), f"{size / packed:.2f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=shared_folder, default=SHARED)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--images", type=positive, default=650)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    checkpoint = load_full_precision(str(arguments.shared / "models" / "vit_tiny_patch16_224"))
    processor = with_crop(checkpoint.processor, 1.0)
    calibration, _ = load_images(arguments.shared / "data" / "imagenet-sample", processor, 32)
    pixels, labels = load_images(arguments.shared / "data" / "imagenet-val650", processor, arguments.images)
    print(describe_machine())
    rows = []
    for bits in arguments.bits:
        model = QuantformerForImageClassification.from_full_precision(checkpoint.model, bit_width=bits)
        model.calibrate(calibration.split(BATCH_SIZE)).begin_search(8).freeze_groups().pack()
        rows += compare(model, pixels, labels)
    header = ["", "file", "file / packed", "top-1, packed", "top-1, engine", "same class", "difference of logits"]
    print(format_table(header, rows))


if __name__ == "__main__":
    main()
