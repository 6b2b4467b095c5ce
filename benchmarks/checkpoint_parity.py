"""Do all the names of DeiT, Swin and ViT, in every form of file, give the logits of timm?

For each name: a timm model with seeded random weights is saved in each form, loaded by `load_full_precision`, and wrapped
by `from_full_precision` with quantization off. The table shows the largest difference of a logit on real images.

    python benchmarks/checkpoint_parity.py                     # all, some minutes
    python benchmarks/checkpoint_parity.py --only 'swin_tiny*'
"""

import argparse
import fnmatch
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from _machine import describe_machine
from datasets import load_dataset
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn
from transformers.utils import logging

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.checkpoints import FullPrecisionCheckpoint, load_full_precision


#: timm's names; those of Swin that end in `.ms_in22k` have 21,841 classes.
NAMES = (
    *(f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")),
    *(f"deit_{size}_distilled_patch16_224" for size in ("tiny", "small", "base")),
    "deit_base_patch16_384",
    "deit_base_distilled_patch16_384",
    *(f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base", "large")),
    *(f"swin_{size}_patch4_window12_384" for size in ("base", "large")),
    *(f"swin_{size}_patch4_window7_224.ms_in22k" for size in ("tiny", "small", "base", "large")),
    *(f"swin_{size}_patch4_window12_384.ms_in22k" for size in ("base", "large")),
    "deit3_small_patch16_224",
    "deit3_medium_patch16_224",
    "deit3_base_patch16_384",
    "vit_tiny_patch16_224",
    "vit_small_patch32_224",
    "vit_small_patch16_384",
    "vit_base_patch8_224",
    "vit_base_patch16_224_miil",
    "vit_large_patch16_224",
)

IMAGES = Path(__file__).parents[2] / "shared" / "data" / "imagenet-sample"
QUANTIZATION_OFF = {"bit_width": 32, "embedding_bits": 32, "classifier_bits": 32, "attention_bits": None}


def make_model(name: str) -> nn.Module:
    """A timm model in which no parameter, LayerScale and position tables included, is what it starts from."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            matrix = parameter.ndim > 1 and min(parameter.shape[-2:]) > 32
            parameter.add_(torch.randn_like(parameter) * (0.01 if matrix else 0.1))
    return model


def save_official(model: nn.Module, name: str, folder: Path) -> Path:
    """`{"model": state_dict}`; for Swin with the merging at the end of the stages, `head`, and the buffers."""
    state_dict = dict(model.state_dict())
    if name.startswith("swin"):
        state_dict = {
            re.sub(r"^layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", key).replace(
                "head.fc.", "head."
            ): tensor
            for key, tensor in state_dict.items()
        }
        for key, module in model.named_modules():
            for buffer in ("relative_position_index", "attn_mask"):
                if getattr(module, buffer, None) is not None:
                    state_dict[f"{key}.{buffer}"] = getattr(module, buffer)
    path = folder / "official.pth"
    torch.save({"model": state_dict, "epoch": 299}, path)
    return path


def save_state_dict(model: nn.Module, name: str, folder: Path) -> Path:
    path = folder / f"{name.partition('.')[0]}.safetensors"
    save_file(model.state_dict(), path)
    return path


def save_timm_folder(model: nn.Module, name: str, folder: Path) -> Path:
    save_for_hf(model, folder, safe_serialization=True)
    return folder


def save_transformers(model: nn.Module, name: str, folder: Path) -> Path:
    checkpoint = load_full_precision(save_state_dict(model, name, folder))
    checkpoint.model.save_pretrained(folder / "transformers")
    checkpoint.processor.save_pretrained(folder / "transformers")
    return folder / "transformers"


#: How each form is made. The authors of ViT published no torch files.
FORMS: dict[str, Callable[[nn.Module, str, Path], Path]] = {
    "official file": save_official,
    "timm state dict": save_state_dict,
    "timm folder": save_timm_folder,
    "transformers folder": save_transformers,
}


def make_pixels(checkpoint: FullPrecisionCheckpoint, batch_size: int = 2) -> Tensor:
    """`(batch, channels, height, width)` of ImageNet's images, or of noise where they are not there."""
    if IMAGES.exists():
        data = load_dataset("parquet", data_files=str(IMAGES / "*.parquet"), split="train")
        images = [data[index]["image"].convert("RGB") for index in range(batch_size)]
        return checkpoint.processor(images, return_tensors="pt")["pixel_values"]
    size = checkpoint.model.config.image_size
    return torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def compare(name: str) -> float:
    """Print a row of the table for each form of `name`; return the largest difference of a logit."""
    model = make_model(name)
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    largest, expected = 0.0, None
    for form, save in FORMS.items():
        if form == "official file" and name.startswith("vit"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = load_full_precision(save(model, name, Path(folder)))
            quantized = QuantformerForImageClassification.from_full_precision(checkpoint.model, **QUANTIZATION_OFF)
            if expected is None:
                pixels = make_pixels(checkpoint)
                expected = model(pixels)
            difference = (quantized.eval()(pixels).logits - expected).abs().max().item()
        largest = max(largest, difference)
        print(f"{name:<44} {form:<20} {parameters:>10.1f} {difference:>10.1e} {expected.abs().max():>8.2f}", flush=True)
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names, such as 'deit_*'")
    pattern = parser.parse_args().only
    names = fnmatch.filter(NAMES, pattern)
    if not names:
        parser.error(f"--only {pattern!r} matches none of {', '.join(NAMES)}")
    logging.disable_progress_bar()
    print(describe_machine())
    print(f"images: {'imagenet-sample' if IMAGES.exists() else f'random noise, for {IMAGES} is not there'}")
    print(f"{'name':<44} {'form':<20} {'params (M)':>10} {'max |Δ|':>10} {'max |y|':>8}")
    largest = max(map(compare, names))
    print(f"{len(names)} names, largest difference {largest:.1e}")


if __name__ == "__main__":
    main()
