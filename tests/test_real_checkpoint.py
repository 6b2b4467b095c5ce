"""A real ImageNet checkpoint on real images, where `shared` lies beside the repository."""

from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForImageClassification

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.checkpoints import load_full_precision
from quantformer_hf.images import with_crop


SHARED = Path(__file__).parents[2] / "shared"
IMAGES = SHARED / "data" / "imagenet-val650"


@pytest.fixture
def checkpoint():
    folder = SHARED / "models" / "vit_tiny_patch16_224"
    if not folder.exists() or not IMAGES.exists():
        pytest.skip(f"{SHARED} with the checkpoint and its images is not there")
    return load_full_precision(str(folder))


def test_the_real_checkpoint_loads(checkpoint):
    assert checkpoint.form == "timm folder (vit_tiny_patch16_224)"
    assert list(checkpoint.processor.image_mean) == [0.5] * 3
    assert checkpoint.model.config.id2label[1] == "goldfish, Carassius auratus"
    assert round(sum(parameter.numel() for parameter in checkpoint.model.parameters()) / 1e6, 1) == 5.7


@pytest.mark.slow
@torch.no_grad()
def test_the_real_checkpoint_scores_what_it_scores_in_timm(checkpoint):
    data = load_dataset("parquet", data_files=str(IMAGES / "*.parquet"), split="train")
    hits = 0
    for start in range(0, len(data), 50):
        rows = data[start : start + 50]
        images = [image.convert("RGB") for image in rows["image"]]
        pixels = checkpoint.processor(images, return_tensors="pt")["pixel_values"]
        hits += (checkpoint.model(pixels).logits.argmax(1) == torch.tensor(rows["label"])).sum().item()
    # 532 images, as with timm's model and transform. They are crops already, which the checkpoint's crop of 0.9 cuts again;
    # seen whole it is 539, or 82.9 %: see test_run_quantformer.py.
    assert hits / len(data) == pytest.approx(0.8185, abs=0.004)


@pytest.mark.slow
@torch.no_grad()
def test_a_packed_vit_tiny_sees_the_same_in_each_image(checkpoint, tmp_path):
    processor = with_crop(checkpoint.processor, 1.0)
    images = load_dataset(str(IMAGES), split="test").select(range(0, 650, 13))["image"]
    pixel_values = processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    model = QuantformerForImageClassification.from_full_precision(checkpoint.model, bit_width=3)
    model.calibrate([pixel_values[:16]]).begin_search(8).freeze_groups().eval()
    expected = model(pixel_values).logits
    model.pack().save_pretrained(tmp_path)
    logits = AutoModelForImageClassification.from_pretrained(tmp_path)(pixel_values).logits
    assert torch.equal(logits, expected)
    assert torch.equal(logits.argmax(1), expected.argmax(1))
