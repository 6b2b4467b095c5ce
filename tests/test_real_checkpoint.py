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


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} with the checkpoint and its images is not there")
def test_a_packed_vit_tiny_sees_the_same_in_each_image(tmp_path):
    checkpoint = load_full_precision(str(SHARED / "models" / "vit_tiny_patch16_224"))
    processor = with_crop(checkpoint.processor, 1.0)
    images = load_dataset(str(SHARED / "data" / "imagenet-val650"), split="test").select(range(0, 650, 13))["image"]
    pixel_values = processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    model = QuantformerForImageClassification.from_full_precision(checkpoint.model, bit_width=3)
    model.calibrate([pixel_values[:16]]).begin_search(8).freeze_groups().eval()
    with torch.no_grad():
        expected = model(pixel_values).logits
        model.pack().save_pretrained(tmp_path)
        logits = AutoModelForImageClassification.from_pretrained(tmp_path)(pixel_values).logits
    assert (logits - expected).norm() <= 1e-4 * expected.norm()
    assert torch.equal(logits.argmax(1), expected.argmax(1))
