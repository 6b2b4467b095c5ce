"""Data sets, their columns, and images as tensors."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from transformers import EvalPrediction, ViTImageProcessor

from quantformer_hf.data import (
    DataArguments,
    TransformedImages,
    calibration_batches,
    collate,
    load_image_data,
    train_transform,
)
from quantformer_hf.metrics import compute_metrics, most_probable_classes


PROCESSOR = ViTImageProcessor(size={"height": 16, "width": 16})


def write_images(folder, splits=("train", "val"), classes=("cat", "dog"), each=3):
    generator = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for i in range(each):
                pixels = generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)
                PILImage.fromarray(pixels).save(folder / split / name / f"{i}.png")


def write_parquet(folder, columns, split="train"):
    rows = 8
    values = {
        "image": [PILImage.new("RGB", (20, 20), (i, 0, 0)) for i in range(rows)],
        "thumbnail": [PILImage.new("RGB", (4, 4)) for _ in range(rows)],
        "label": [i % 2 for i in range(rows)],
        "coarse": [0] * rows,
        "caption": ["a"] * rows,
    }
    kinds = {
        "image": Image(),
        "thumbnail": Image(),
        "label": ClassLabel(names=["a", "b"]),
        "coarse": ClassLabel(names=["all"]),
        "caption": Value("string"),
    }
    dataset = Dataset.from_dict(
        {name: values[name] for name in columns}, features=Features({name: kinds[name] for name in columns})
    )
    dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def test_digits_are_split_80_20_with_every_class():
    data = load_image_data(DataArguments(dataset_name="digits"), seed=0)
    assert (len(data.train), len(data.validation)) == (1437, 360)
    assert data.label_names == [str(i) for i in range(10)]
    assert set(data.validation["label"]) == set(range(10))
    assert data.train[0]["image"].size == (8, 8)


def test_a_folder_of_images(tmp_path):
    write_images(tmp_path)
    data = load_image_data(DataArguments(dataset_dir=str(tmp_path)), seed=0)
    assert (len(data.train), len(data.validation), data.label_names) == (6, 6, ["cat", "dog"])
    row = TransformedImages(data.validation, data, PROCESSOR)[0]
    assert row["pixel_values"].shape == (3, 16, 16)
    assert row["labels"] == 0


def test_a_folder_of_parquet_files_with_one_split(tmp_path):
    write_parquet(tmp_path, ["image", "label", "caption"])
    data = load_image_data(DataArguments(dataset_dir=str(tmp_path), eval_fraction=0.25), seed=0)
    assert (len(data.train), len(data.validation)) == (6, 2)
    assert (data.image_column, data.label_column) == ("image", "label")


def test_samples_are_limited(tmp_path):
    write_images(tmp_path)
    arguments = DataArguments(dataset_dir=str(tmp_path), max_train_samples=2, max_eval_samples=1)
    data = load_image_data(arguments, seed=0)
    assert (len(data.train), len(data.validation)) == (2, 1)


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        (["image", "label"], {"image_column": "imgae"}, "no image column 'imgae': did you mean 'image'"),
        (["image", "label"], {"label_column": "class"}, "no label column 'class'"),
        (["image", "label", "caption"], {"label_column": "caption"}, "holds Value, not ClassLabel"),
        (["image", "thumbnail", "label"], {}, "2 columns of the type Image .* name one by image_column"),
        (["image", "caption"], {}, "0 columns of the type ClassLabel .* name one by label_column"),
        (["image", "label"], {"eval_split": "validaton"}, "no split 'validaton'"),
    ],
)
def test_columns_and_splits_that_are_not_there_are_named(columns, arguments, message, tmp_path):
    write_parquet(tmp_path, columns)
    with pytest.raises(ValueError, match=message):
        load_image_data(DataArguments(dataset_dir=str(tmp_path), **arguments), seed=0)


def test_a_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        load_image_data(DataArguments(dataset_dir="no-such-folder"), seed=0)


def test_training_images_are_augmented_and_evaluation_images_are_the_processors():
    data = load_image_data(DataArguments(dataset_name="digits", max_train_samples=4), seed=0)
    augment = train_transform(PROCESSOR, DataArguments(dataset_name="digits"))
    augmented = TransformedImages(data.train, data, PROCESSOR, augment)
    assert augmented[0]["pixel_values"].shape == (3, 16, 16)
    state = torch.get_rng_state()
    first = augmented[0]["pixel_values"]
    # Seed, epoch and index decide, and nobody else's random numbers are used up.
    assert torch.equal(first, augmented[0]["pixel_values"])
    assert torch.equal(state, torch.get_rng_state())
    augmented.set_epoch(1)
    assert not torch.equal(first, augmented[0]["pixel_values"])
    other_seed = TransformedImages(data.train, data, PROCESSOR, augment, seed=1)
    assert not torch.equal(first, other_seed[0]["pixel_values"])
    plain = TransformedImages(data.train, data, PROCESSOR)
    expected = PROCESSOR(data.train[0]["image"].convert("RGB"), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(plain[0]["pixel_values"], expected)


def test_calibration_batches_repeat():
    data = load_image_data(DataArguments(dataset_name="digits"), seed=0)
    first, second = (list(calibration_batches(data, PROCESSOR, 20, 8, seed=0)) for _ in range(2))
    assert [len(batch) for batch in first] == [8, 8, 4]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_label_outside_the_classes_is_named_before_it_reaches_the_device():
    rows = [{"pixel_values": torch.zeros(3, 2, 2), "labels": label} for label in (0, 11)]
    with pytest.raises(ValueError, match=r"label 11 is outside 0\.\.9"):
        collate(rows, num_labels=10)
    assert collate(rows, num_labels=12)["labels"].tolist() == [0, 11]


def test_accuracies_by_hand():
    logits = torch.tensor([[0.0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 9, 0, 0, 0, 0]])
    labels = torch.tensor([5, 4, 1])
    metrics = compute_metrics(EvalPrediction(most_probable_classes(logits, labels).numpy(), labels.numpy()))
    assert metrics == {"accuracy": pytest.approx(2 / 3), "top5_accuracy": 1.0}
    metrics = compute_metrics(EvalPrediction(most_probable_classes(logits[:, :3], labels).numpy(), labels.numpy()))
    assert list(metrics) == ["accuracy"]
