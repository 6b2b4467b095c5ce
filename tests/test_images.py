"""Rows as tensors."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import ViTImageProcessor

from quantformer_hf.data import DataArguments, load_image_data
from quantformer_hf.images import TransformedImages, calibration_batches, processor_size


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


def test_calibration_images_of_all_classes_in_equal_number():
    data = load_image_data(DataArguments(dataset_name="digits"), seed=0)
    labels = data.train[data.label_column]
    # All nought to two, and few of the others.
    rows = [i for i, label in enumerate(labels) if label < 3] + [labels.index(label) for label in range(3, 10)]
    data = replace(data, train=data.train.select(rows))
    of_image = {
        PROCESSOR(row["image"].convert("RGB"))["pixel_values"][0].numpy().tobytes(): row["label"] for row in data.train
    }
    for balance in (False, True):
        (batch,) = calibration_batches(data, PROCESSOR, 16, 16, seed=0, balance_classes=balance)
        drawn = Counter(of_image[image.numpy().tobytes()] for image in batch)
        assert (min(drawn[label] for label in range(10)) == 1) == balance
        assert len(batch) == 16
    assert [drawn[label] for label in range(3)] == [3, 3, 3]


def test_a_stream_cannot_balance_classes():
    data = load_image_data(DataArguments(dataset_name="digits", streaming=True), seed=0)
    with pytest.raises(ValueError, match="balance_classes draws images at will, which a stream cannot"):
        next(calibration_batches(data, PROCESSOR, 16, 16, seed=0, balance_classes=True))


def test_the_size_of_a_batch_is_the_crops_or_that_of_the_resized_image():
    assert processor_size(PROCESSOR) == (16, 16)
    crop = {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": {"height": 16, "width": 12}}
    assert processor_size(ViTImageProcessor(**crop)) == (16, 12)
    assert processor_size(ViTImageProcessor(**crop, do_resize=False)) == (16, 12)
    assert processor_size(ViTImageProcessor(size={"height": 16, "width": 16}, do_resize=False)) == (16, 16)
    for options in ({"size": {"shortest_edge": 20}}, {"do_center_crop": True}):
        with pytest.raises(ValueError, match="the ViTImageProcessor makes images of many sizes"):
            processor_size(ViTImageProcessor(**options))
