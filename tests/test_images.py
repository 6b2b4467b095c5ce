"""Rows as tensors."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image as PILImage
from transformers import ViTImageProcessor

from quantformer_hf.data import DataArguments, load_image_data
from quantformer_hf.images import TransformedImages, calibration_batches, evaluation_rows, processor_size, with_crop


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
        other = next(calibration_batches(data, PROCESSOR, 20, 8, seed=1))
        assert not torch.equal(other, one[0])


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


def test_a_crop_keeps_its_share_of_the_shorter_edge():
    crop = {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": {"height": 16, "width": 12}}
    processor = ViTImageProcessor(**crop)
    # As timm rounds 12 / 0.9.
    assert with_crop(processor, 0.9).size["shortest_edge"] == 13
    assert processor.size["shortest_edge"] == 20
    assert with_crop(processor, None) is processor
    for share, named in ((0.0, processor), (1.1, processor), (0.9, PROCESSOR)):
        with pytest.raises(ValueError, match=f"crop_pct is {share}"):
            with_crop(named, share)


def test_a_bad_image_has_the_place_of_one_that_is_taller_than_wide():
    processor = ViTImageProcessor(size={"height": 16, "width": 12}, do_resize=False)
    rows = evaluation_rows([PILImage.new("RGB", (12, 16)), None], [1, 2], ["good", "bad"], processor)
    assert [row["pixel_values"].shape for row in rows] == [(3, 16, 12)] * 2
