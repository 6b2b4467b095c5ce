"""Rows as tensors."""

import torch
from transformers import ViTImageProcessor

from quantformer_hf.data import DataArguments, load_image_data
from quantformer_hf.images import TransformedImages, calibration_batches


PROCESSOR = ViTImageProcessor(size={"height": 16, "width": 16})


def test_evaluation_images_are_the_processors():
    data = load_image_data(DataArguments(dataset_name="digits", max_train_samples=4), seed=0)
    row = TransformedImages(data.train, data, PROCESSOR)[0]
    expected = PROCESSOR(data.train[0]["image"].convert("RGB"), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(row["pixel_values"], expected)
    assert set(row) == {"pixel_values", "labels"}


def test_calibration_batches_repeat():
    for streaming in (False, True):
        data = load_image_data(DataArguments(dataset_name="digits", streaming=streaming), seed=0)
        one, two = (list(calibration_batches(data, PROCESSOR, 20, 8, seed=0)) for _ in range(2))
        assert [len(batch) for batch in one] == [8, 8, 4]
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
