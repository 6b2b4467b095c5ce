"""Small models of every backbone, and batches for them."""

import copy
import os

import pytest
import torch
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.kernels import using


# For the processes that tests start. On tensors this small, several threads only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

NUM_LABELS = 5
IMAGE_SIZE = 16

_PLAIN = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": IMAGE_SIZE,
    "patch_size": 4,
    "num_labels": NUM_LABELS,
}
# An 8x8 grid of patches, then 4x4, in windows of 3: both stages pad, and the first also shifts.
_SWIN = {
    "embed_dim": 16,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "window_size": 3,
    "image_size": IMAGE_SIZE,
    "patch_size": 2,
    "num_labels": NUM_LABELS,
}

BACKBONES = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**_PLAIN)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**_PLAIN)),
    "deit-distilled": lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**_PLAIN)),
    "swin": lambda: SwinForImageClassification(SwinConfig(**_SWIN)),
}


def make_full_precision(backbone: str = "vit", seed: int = 0):
    """A small classifier whose weights are large enough for attention that is not flat."""
    torch.manual_seed(seed)
    model = BACKBONES[backbone]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def make_batches(count: int = 2, batch_size: int = 4, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) for _ in range(count)]


_MADE = {}


def make_quantized(backbone: str = "vit", stage: str = "pretrain", num_groups: int = 4, **arguments):
    """A calibrated model in `stage`, and the random numbers as making it leaves them: made once, then copied."""
    key = repr((backbone, stage, num_groups, sorted(arguments.items())))
    if key not in _MADE:
        model = QuantformerForImageClassification.from_full_precision(make_full_precision(backbone), **arguments)
        model.calibrate(make_batches())
        if stage != "pretrain":
            model.begin_search(num_groups)
        if stage == "finetune":
            model.freeze_groups()
        _MADE[key] = model.eval(), torch.get_rng_state()
    model, random_state = _MADE[key]
    torch.set_rng_state(random_state)
    return copy.deepcopy(model)


@pytest.fixture(params=list(BACKBONES))
def backbone(request) -> str:
    return request.param


@pytest.fixture(params=["pretrain", "search", "finetune"])
def stage(request) -> str:
    return request.param


def instruction_sets() -> list[str]:
    """Those that run here."""
    names = []
    for name in ("plain", "avx2", "avx512", "amx", "neon", "neon_dotprod"):
        try:
            with using(name):
                names.append(name)
        except ValueError:
            # Not of this machine.
            continue
    return names
