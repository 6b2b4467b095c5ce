"""Images that cannot be decoded."""

import io
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import NUM_LABELS, make_full_precision
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from transformers import TrainingArguments, ViTImageProcessor

from quantformer_hf import QuantformerTrainer, QuantformerTrainingArguments
from quantformer_hf.augmentation import Collator, train_transform
from quantformer_hf.bad_images import BadImageError, BadImageTally, decode
from quantformer_hf.data import DataArguments, ImageData
from quantformer_hf.images import TransformedImages, calibration_batches
from quantformer_hf.labels import IGNORED_LABEL
from quantformer_hf.metrics import compute_metrics, rank_and_loss
from quantformer_hf.sampling import Draw
from quantformer_hf.streaming import StreamedEvaluationImages


PROCESSOR = ViTImageProcessor(size={"height": 16, "width": 16})


def write_images(folder, count, bad):
    """A data set of `count` JPEG files: those at `bad` are cut off in the middle, or are no image at all."""
    generator = np.random.default_rng(0)
    paths = []
    for i in range(count):
        path = folder / f"{i}.jpg"
        PILImage.fromarray(generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(path)
        if i in bad:
            path.write_bytes(path.read_bytes()[:400] if i % 2 else b"<html>404</html>")
        paths.append(str(path))
    features = Features({"image": Image(), "label": ClassLabel(NUM_LABELS)})
    rows = Dataset.from_dict({"image": paths, "label": [i % NUM_LABELS for i in range(count)]}, features=features)
    return ImageData(rows, rows, "image", "label", list(map(str, range(NUM_LABELS))), count, 10)


def training_images(data):
    augment = train_transform(PROCESSOR, DataArguments(dataset_name="digits"))
    return TransformedImages(data.train, data, PROCESSOR, augment)


def make_trainer(data, folder, **arguments):
    return QuantformerTrainer(
        make_full_precision(),
        QuantformerTrainingArguments(folder, report_to="none", use_cpu=True, save_strategy="no", **arguments),
        train_dataset=training_images(data),
        eval_dataset=TransformedImages(data.validation, data, PROCESSOR),
        data_collator=Collator(NUM_LABELS),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=rank_and_loss,
    )


def test_what_is_cut_off_missing_or_no_image_is_bad(tmp_path):
    data = write_images(tmp_path, 4, {1, 2})
    cells = data.train.cast_column("image", Image(decode=False))["image"]
    assert [decode(cell) is None for cell in cells] == [False, True, True, False]
    assert decode({"path": str(tmp_path / "nowhere.jpg"), "bytes": None}) is None
    assert decode({"path": None, "bytes": b""}) is None


def cell(pixels, form):
    content = io.BytesIO()
    PILImage.fromarray(pixels).save(content, form)
    return {"path": None, "bytes": content.getvalue()}


@pytest.mark.parametrize(("kind", "form"), [("<u2", "png"), ("<u2", "tiff"), (">u2", "tiff"), ("<i4", "tiff")])
def test_gray_of_16_bits_keeps_its_shades(kind, form):
    shades = np.arange(256).reshape(16, 16)
    image = decode(cell((257 * shades).astype(kind), form))
    assert image.mode == "RGB"
    assert (np.asarray(image) == shades[..., None]).all()


@pytest.mark.parametrize(("kind", "scale"), [("<i4", 1000), ("<i4", -1), ("<f4", 1)])
def test_gray_without_a_known_white_is_bad(kind, scale):
    assert decode(cell((scale * np.arange(256).reshape(16, 16)).astype(kind), "tiff")) is None


def test_a_row_without_an_image_is_bad(tmp_path):
    rows = write_images(tmp_path, 3, set()).train
    rows = Dataset.from_dict({"image": [*rows["image"][:2], None], "label": rows["label"][:]}, features=rows.features)
    data = ImageData(rows, rows, "image", "label", list(map(str, range(NUM_LABELS))), 3, 10)
    assert training_images(data)[2]["bad_images"] == ["image 2"]
    assert TransformedImages(rows, data, PROCESSOR)[2]["bad_images"] == ["image 2"]


def test_another_image_takes_the_place_of_a_bad_one_in_training(tmp_path):
    images = training_images(write_images(tmp_path, 6, {3}))
    draws = [Draw(i) for i in range(6)]
    rows = images.__getitems__(draws)
    assert [row.get("bad_images") for row in rows] == [None] * 3 + [[f"{tmp_path / '3.jpg'} (image 3)"]] + [None] * 2
    # The same one in whatever company it is read, and another one in another epoch.
    assert torch.equal(rows[3]["pixel_values"], images[Draw(3)]["pixel_values"])
    replacements = {images[Draw(3, epoch)]["labels"] for epoch in range(8)}
    assert len(replacements) > 1
    batch = Collator(NUM_LABELS)(rows)
    assert batch["pixel_values"].shape == (6, 3, 16, 16)
    assert batch["bad_images"] == rows[3]["bad_images"]


def test_only_bad_images_are_an_error(tmp_path):
    with pytest.raises(BadImageError, match="nearly all images are bad"):
        training_images(write_images(tmp_path, 2, {0, 1}))[0]


def test_a_bad_image_keeps_its_place_in_evaluation_and_does_not_count(tmp_path):
    data = write_images(tmp_path, 4, {1})
    rows = TransformedImages(data.validation, data, PROCESSOR).__getitems__(range(4))
    assert [row["labels"] for row in rows] == [0, IGNORED_LABEL, 2, 3]
    assert rows[1]["pixel_values"].shape == (3, 16, 16)


@pytest.mark.parametrize("drawn", [False, True])
def test_an_image_without_a_path_is_named_by_its_number_in_the_split(drawn):
    good = io.BytesIO()
    PILImage.new("RGB", (20, 24)).save(good, format="PNG")
    bad = 17
    cells = [{"bytes": b"none" if i == bad else good.getvalue(), "path": None} for i in range(40)]
    features = Features({"image": Image(), "label": ClassLabel(NUM_LABELS)})
    rows = Dataset.from_dict({"image": cells, "label": [0] * len(cells)}, features=features)
    if drawn:
        rows = rows.train_test_split(0.25, seed=0)["train"].shuffle(seed=1).select(range(30))
    data = ImageData(rows, rows, "image", "label", list(map(str, range(NUM_LABELS))), len(rows), 10)
    for images in (training_images(data), TransformedImages(rows, data, PROCESSOR)):
        found = [name for row in images.__getitems__(range(len(rows))) for name in row.get("bad_images", ())]
        assert set(found) == {f"image {bad}"}
    with pytest.raises(BadImageError, match=rf"image {bad}\b"):
        list(calibration_batches(data, PROCESSOR, samples=30, batch_size=4, seed=0, on_bad_image="error"))


def test_calibration_leaves_bad_images_out(tmp_path, caplog):
    data = write_images(tmp_path, 101, {4})
    with caplog.at_level(logging.WARNING):
        batches = list(calibration_batches(data, PROCESSOR, 101, 50, seed=0))
    assert sum(map(len, batches)) == 100
    assert "1 of 101 calibration images could not be decoded" in caplog.text
    with pytest.raises(BadImageError, match=r"cannot decode .*4\.jpg"):
        list(calibration_batches(data, PROCESSOR, 101, 50, seed=0, on_bad_image="error"))


def test_more_than_one_percent_stops():
    tally = BadImageTally("training images", "skip")
    tally.add(100, ["a.jpg"])
    assert tally.finish() == 1
    tally.add(100, ["a.jpg", "b.jpg", "a.jpg"])
    with pytest.raises(BadImageError, match=r"2 of 100 training images .* more than 1%: .* a\.jpg, b\.jpg"):
        tally.finish()
    # As soon as no later image can make it less.
    tally = BadImageTally("training images", "skip", total=300)
    tally.add(4, ["a", "b", "c"])
    with pytest.raises(BadImageError, match="4 of 300"):
        tally.add(1, ["d"])


def test_a_message_names_twenty():
    tally = BadImageTally("images", "error")
    with pytest.raises(BadImageError, match="t and 5 more: repair or remove it, or give --on_bad_image skip"):
        tally.add(30, [chr(ord("a") + i) for i in range(25)])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_trainer_reports_training_and_evaluation(workers, tmp_path, caplog):
    data = write_images(tmp_path, 120, {4})
    trainer = make_trainer(
        data,
        tmp_path / "out",
        num_train_epochs=1,
        per_device_train_batch_size=40,
        per_device_eval_batch_size=60,
        dataloader_num_workers=workers,
        learning_rate=1e-4,
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert f"1 of 120 training images could not be decoded: {tmp_path / '4.jpg'} (image 4)" in caplog.text
    assert trainer.state.global_step == 3
    metrics = trainer.evaluate()
    assert metrics["eval_skipped_images"] == 1
    assert np.isfinite(metrics["eval_loss"])
    correct = metrics["eval_accuracy"] * 119
    assert correct == pytest.approx(round(correct))
    assert "1 of 120 evaluation images" in caplog.text


def test_rows_that_fill_up_the_batches_of_a_stream_are_no_images(tmp_path, caplog):
    data = write_images(tmp_path, 101, {4})
    streamed = replace(data, validation=data.validation.to_iterable_dataset())
    trainer = make_trainer(data, tmp_path / "out")
    trainer.eval_dataset = StreamedEvaluationImages(
        streamed, PROCESSOR, batch_size=64, num_processes=1, process_index=0
    )
    with caplog.at_level(logging.WARNING):
        assert trainer.evaluate()["eval_skipped_images"] == 1
    assert "1 of 101 evaluation images" in caplog.text
    # More than 1 % of 101, and less of the 256 rows of the batch.
    many = write_images(tmp_path, 101, {4, 5})
    trainer.eval_dataset = StreamedEvaluationImages(
        replace(many, validation=many.validation.to_iterable_dataset()),
        PROCESSOR,
        batch_size=256,
        num_processes=1,
        process_index=0,
    )
    with pytest.raises(BadImageError, match="2 of 101 evaluation images"):
        trainer.evaluate()


def test_error_stops_the_training(tmp_path):
    data = write_images(tmp_path, 8, {4})
    trainer = make_trainer(data, tmp_path / "out", max_steps=2, on_bad_image="error", learning_rate=1e-4)
    with pytest.raises(BadImageError, match=r"cannot decode .*4\.jpg"):
        trainer.train()


def test_the_policy_is_checked():
    assert issubclass(QuantformerTrainingArguments, TrainingArguments)
    with pytest.raises(ValueError, match="on_bad_image is 'ignore'"):
        QuantformerTrainingArguments("out", on_bad_image="ignore")


def test_the_end_of_an_epoch_alone_is_not_judged_as_a_whole_one():
    tally = BadImageTally("training images", "skip", total=1000)
    tally.add(64, ["a"])
    assert tally.finish() == 1
