"""Bytes of packed checkpoints, beside the ideal, full precision, and ONNX Runtime's int8 file of the same model.

    python benchmarks/checkpoint_size.py [--models deit_tiny_patch16_224 ...] [--bits 4 3 2]

Sizes do not depend on the values of the weights: random ones are packed, with 8 groups. The ideal is the sum over all
tensors of elements times bits / 8. ONNX Runtime's column needs `pip install onnx onnxruntime onnxscript`; its file is
dynamic quantization to int8 of the exported full-precision model.
"""

import argparse
import importlib.util
import tempfile
from pathlib import Path

import timm
import torch
from _machine import describe_machine
from safetensors import safe_open
from torch import nn

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.checkpoints import load_full_precision
from quantformer_hf.packed_layers import PackedWeight
from quantformer_hf.report import format_table, megabytes


MODELS = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    arguments = parser.parse_args()
    with_onnx = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
    rows = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            full = full_precision(name, Path(folder))
            full_bytes = sum(p.numel() * p.element_size() for p in full.parameters())
            onnx = megabytes(onnx_int8_bytes(full, Path(folder))) if with_onnx else "not installed"
            for bits in arguments.bits:
                size, ideal = packed_bytes(full, bits, Path(folder) / f"w{bits}")
                rows.append(
                    [
                        f"{name} W{bits}A{bits}",
                        megabytes(size),
                        megabytes(ideal),
                        f"{size / ideal:.3f}",
                        megabytes(full_bytes),
                        f"{full_bytes / size:.1f}",
                        onnx,
                    ]
                )
    print(describe_machine())
    header = ["", "file", "ideal", "file / ideal", "full precision", "full / file", "ONNX Runtime int8"]
    print(format_table(header, rows))


def full_precision(name: str, folder: Path) -> nn.Module:
    """A model of timm's architecture `name` with random weights, in transformers' form."""
    path = folder / f"{name}.pth"
    torch.save(timm.create_model(name, pretrained=False).state_dict(), path)
    return load_full_precision(str(path), architecture=name).model


def packed_bytes(full: nn.Module, bits: int, folder: Path) -> tuple[int, int]:
    """Bytes of the file, and of its tensors at their bit widths."""
    size = full.config.image_size
    model = QuantformerForImageClassification.from_full_precision(full, bit_width=bits)
    model.calibrate([torch.randn(2, 3, size, size)]).begin_search(8).freeze_groups().pack()
    model.save_pretrained(folder)
    packed = {f"{name}.codes": m for name, m in model.named_modules() if isinstance(m, PackedWeight)}
    ideal = 0
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  a handle, and no dictionary
            tensor = file.get_tensor(name)
            if name in packed:
                ideal += packed[name].out_channels * packed[name].columns * packed[name].grid.bits
            else:
                ideal += 8 * tensor.numel() * tensor.element_size()
    return (folder / "model.safetensors").stat().st_size, ideal // 8


def onnx_int8_bytes(full: nn.Module, folder: Path) -> int:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = full.eval()
            self.model.set_attn_implementation("eager")

        def forward(self, pixel_values):
            return self.model(pixel_values=pixel_values).logits

    size = full.config.image_size
    exported, quantized = folder / "model.onnx", folder / "int8.onnx"
    torch.onnx.export(Logits(), (torch.zeros(1, 3, size, size),), str(exported), dynamo=True, external_data=False)
    quantize_dynamic(str(exported), str(quantized), weight_type=QuantType.QInt8)
    return quantized.stat().st_size


if __name__ == "__main__":
    main()
