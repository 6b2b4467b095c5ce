"""Every form of full-precision weights brings the pixels that its authors' code makes."""

import numpy as np
import pytest
import timm
import torch
from conftest import IMAGE_SIZE, make_batches, make_full_precision
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm_checkpoints import MODELS, SWINS, logits, make_timm_model, save_timm_folder, save_torch
from transformers import (
    AutoImageProcessor,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.checkpoints import load_full_precision


def make_pictures():
    # The heights and widths leave no odd half pixel to the crop, which timm rounds to even and transformers down.
    generator = np.random.default_rng(0)
    sizes = [(256, 256), (375, 500), (500, 333), (120, 128)]
    noise = [Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)) for _ in sizes]
    return [
        image.resize((width, height), Image.Resampling.BICUBIC)
        for image, (height, width) in zip(noise, sizes, strict=True)
    ]


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224",
        "deit_base_patch16_384",
        "vit_tiny_patch16_224",
        "vit_base_patch16_224_miil",
        "swin_tiny_patch4_window7_224",
    ],
)
def test_the_processor_makes_the_pixels_of_timm_s_evaluation(name, tmp_path):
    size = 384 if name.endswith("384") else 224
    arguments = MODELS[name] | {"img_size": size} | ({"window_size": 7} if name in SWINS else {})
    model = make_timm_model(name, **arguments)
    processor = load_full_precision(save_torch(tmp_path / f"{name}.pth", {"model": model.state_dict()})).processor
    transform = create_transform(**resolve_data_config(pretrained_cfg=model.pretrained_cfg))
    pictures = [picture for picture in make_pictures() if size == 224 or picture.size == (256, 256)]
    expected = torch.stack([transform(picture) for picture in pictures])
    actual = processor(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)

    processor.save_pretrained(tmp_path)
    reloaded = AutoImageProcessor.from_pretrained(tmp_path)
    level = 1 / 255 / min(processor.image_std)
    difference = (reloaded(pictures, return_tensors="pt")["pixel_values"] - expected).abs()
    assert difference.max() < 3 * level
    assert difference.mean() < 0.05 * level


def test_a_folder_without_a_processor_has_none(tmp_path):
    load_full_precision(
        save_timm_folder(tmp_path / "timm", "vit_tiny_patch16_224", make_timm_model("vit_tiny_patch16_224"))
    ).model.save_pretrained(tmp_path)
    assert load_full_precision(tmp_path).processor is None


def test_model_and_processor_work_in_a_pipeline(tmp_path):
    model = make_timm_model("deit_tiny_distilled_patch16_224")
    path = save_torch(tmp_path / "deit_tiny_distilled_patch16_224.pth", {"model": model.state_dict()})
    checkpoint = load_full_precision(path)
    checkpoint.model.save_pretrained(tmp_path)
    checkpoint.processor.save_pretrained(tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    picture = make_pictures()[0]
    best = logits(model, checkpoint.processor(picture, return_tensors="pt")["pixel_values"]).argmax().item()
    assert classify(picture)[0]["label"] == checkpoint.model.config.id2label[best]


def test_from_full_precision_takes_a_timm_file_and_saves_its_preprocessing_beside_the_model(tmp_path, caplog):
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=2, num_classes=1000).eval()
    path = tmp_path / "deit_tiny_distilled_patch16_224.pth"
    torch.save({"model": model.state_dict()}, path)
    leave_alone = dict.fromkeys(("weight_bits", "activation_bits", "attention_bits", "embedding_bits"), 32)
    with caplog.at_level("INFO", logger="quantformer_hf"):
        quantized = QuantformerForImageClassification.from_full_precision(path, classifier_bits=32, **leave_alone)
    assert "official DeiT file" in caplog.text
    pixels = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(logits(quantized.eval(), pixels), logits(model, pixels), rtol=1e-4, atol=1e-4)
    assert quantized.config.full_precision_name_or_path == str(path)
    assert quantized.config.id2label[1] == "goldfish, Carassius auratus"
    quantized.save_pretrained(tmp_path / "saved")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "saved")
    assert (processor.crop_size["height"], processor.size["shortest_edge"]) == (224, 248)


def test_a_model_of_a_checkpoint_brings_its_preprocessing(tmp_path):
    make_full_precision().save_pretrained(tmp_path)
    model = ViTForImageClassification.from_pretrained(tmp_path)
    assert QuantformerForImageClassification.from_full_precision(model).image_processor is None
    ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(tmp_path)
    quantized = QuantformerForImageClassification.from_full_precision(model)
    assert quantized.image_processor.size["height"] == IMAGE_SIZE
    quantized.calibrate(make_batches()).save_pretrained(tmp_path / "quantized")
    classify = pipeline("image-classification", model=str(tmp_path / "quantized"), device="cpu")
    assert len(classify(Image.new("RGB", (20, 30)), top_k=1)) == 1
