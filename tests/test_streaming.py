"""Streams on several processes and workers."""

import itertools
from collections import Counter

import pytest
import torch
from conftest import make_full_precision
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from transformers import ViTImageProcessor

from quantformer_hf import QuantformerTrainer, QuantformerTrainingArguments
from quantformer_hf.augmentation import Collator
from quantformer_hf.data import DataArguments, ImageData, load_image_data
from quantformer_hf.images import TransformedImages
from quantformer_hf.labels import IGNORED_LABEL
from quantformer_hf.metrics import compute_metrics, rank_and_loss
from quantformer_hf.streaming import StreamedEvaluationImages, StreamedTrainingImages, stream_loader


PROCESSOR = ViTImageProcessor(size={"height": 4, "width": 4})


def numbered(count, shards=4, bad=(), buffer=8):
    """Images of which each has its number as its label, and as its colour."""
    values = [
        {"bytes": b"none", "path": f"{i}.png"} if i in bad else PILImage.new("RGB", (4, 4), (i, i, i))
        for i in range(count)
    ]
    features = Features({"image": Image(), "label": ClassLabel(100)})
    rows = Dataset.from_dict({"image": values, "label": list(range(count))}, features=features)
    stream = rows.to_iterable_dataset(shards)
    return ImageData(stream, stream, "image", "label", [str(i) for i in range(100)], count, buffer)


def colour(image, key):
    """In place of an augmentation: the image's number, and the first number of its key that is random."""
    return torch.tensor([image.getpixel((0, 0))[0], *key], dtype=torch.float32)


def training(data, process=0, processes=1, batch_size=4, epoch=0):
    images = StreamedTrainingImages(
        data, colour, 0, batch_size=batch_size, num_processes=processes, process_index=process
    )
    images.set_epoch(epoch)
    return images


def batches_of(images, workers, folder, persistent=False):
    arguments = QuantformerTrainingArguments(
        folder,
        report_to="none",
        use_cpu=True,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=persistent,
        dataloader_pin_memory=False,
    )
    return stream_loader(images, Collator(100), arguments)


def labels_of(loader):
    return [batch["labels"].tolist() for batch in loader]


@pytest.mark.parametrize(
    ("shards", "processes", "workers"), [(4, 1, 0), (4, 2, 0), (4, 2, 2), (1, 2, 0), (3, 2, 0), (1, 1, 2), (9, 2, 0)]
)
def test_an_epoch_has_every_image_once_over_all_processes_and_workers(shards, processes, workers, tmp_path):
    data = numbered(48, shards)
    found = [labels_of(batches_of(training(data, p, processes), workers, tmp_path)) for p in range(processes)]
    # As many steps in each process, all of one size.
    assert [len(batches) for batches in found] == [12 // processes] * processes
    assert all(len(batch) == 4 for batches in found for batch in batches)
    counts = Counter(itertools.chain.from_iterable(itertools.chain.from_iterable(found)))
    if shards != 9:
        assert counts == Counter(range(48))
    else:
        # Five shards against four: the longer part is cut, the shorter begins again.
        assert sum(counts.values()) == 48
        assert max(counts.values()) == 2


def test_each_epoch_has_an_order_and_random_numbers_of_its_own(tmp_path):
    data = numbered(48)

    def read(epoch):
        return [(row["labels"], row["draw"]) for row in training(data, epoch=epoch)]

    assert read(0) == read(0)
    assert [label for label, _ in read(0)] != list(range(48))
    assert [label for label, _ in read(0)] != [label for label, _ in read(1)]
    keys = [key for epoch in (0, 1) for _, key in read(epoch)]
    assert len(set(keys)) == 96


def test_workers_that_persist_are_told_the_epoch(tmp_path):
    loader = batches_of(training(numbered(48)), 1, tmp_path, persistent=True)
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs.append(labels_of(loader))
    assert epochs[0] != epochs[1]
    fresh = batches_of(training(numbered(48)), 1, tmp_path)
    fresh.set_epoch(1)
    assert epochs[1] == labels_of(fresh)


def test_an_epoch_has_the_length_that_it_was_told():
    data = numbered(48)
    data.train_samples = 30
    images = training(data, processes=2)
    assert len(images) == len(list(images)) == 12
    data.train_samples = 100
    assert len(list(training(data))) == 100
    data.train_samples = None
    with pytest.raises(ValueError, match="give --train_samples_per_epoch"):
        training(data)
    data.train_samples = 7
    with pytest.raises(ValueError, match="7 images are less than one batch of 4 in each of 2 processes"):
        training(data, processes=2)


def test_a_bad_image_is_left_out_and_the_batches_keep_their_size(tmp_path):
    batches = list(batches_of(training(numbered(48, bad={5, 6})), 0, tmp_path))
    assert [len(batch["labels"]) for batch in batches] == [4] * 12
    assert not {5, 6} & {label for batch in batches for label in batch["labels"].tolist()}
    named = [name for batch in batches for name in batch.get("bad_images", ())]
    assert {name.split()[0] for name in named} == {"5.png", "6.png"}


@pytest.mark.parametrize(("count", "processes", "workers"), [(23, 1, 0), (23, 2, 2), (9, 2, 0), (3, 2, 0), (16, 2, 1)])
def test_evaluation_counts_every_image_once_and_fills_up(count, processes, workers, tmp_path):
    data = numbered(count, min(4, count))

    def images(process):
        return StreamedEvaluationImages(data, PROCESSOR, batch_size=4, num_processes=processes, process_index=process)

    found = [labels_of(batches_of(images(p), workers, tmp_path)) for p in range(processes)]
    assert len({len(batches) for batches in found}) == 1
    assert all(len(batch) == 4 for batches in found for batch in batches)
    labels = [label for batches in found for batch in batches for label in batch]
    assert sorted(label for label in labels if label != IGNORED_LABEL) == list(range(count))
    # Batches lie as those of a map-style data set.
    in_order = [label for step in zip(*found, strict=True) for batch in step for label in batch]
    assert [label for label in in_order if label != IGNORED_LABEL] == list(range(count))


@pytest.mark.parametrize("label", [None, -1])
def test_an_image_of_a_stream_without_a_class_is_named(label):
    data = numbered(8)
    nothing = data.train.map(lambda row: row | {"label": label}, features=data.train.features)
    data = ImageData(nothing, nothing, "image", "label", data.label_names, 8, 8)
    place = {"batch_size": 4, "num_processes": 1, "process_index": 0}
    with pytest.raises(ValueError, match=rf"image \d of reader 0 has no class \({label} in .*--train_split"):
        next(iter(training(data)))
    with pytest.raises(ValueError, match=rf"image 0 has no class \({label} in the column 'label'\).*--eval_split"):
        next(iter(StreamedEvaluationImages(data, PROCESSOR, **place)))


def digits(streaming):
    data = load_image_data(DataArguments(dataset_name="digits", streaming=streaming, max_eval_samples=30), seed=0)
    if not streaming:
        full = load_image_data(DataArguments(dataset_name="digits"), seed=0)
        data.validation = full.validation.select(range(30))
    return data


def test_the_trainer_evaluates_a_stream_as_it_does_a_map_style_data_set(tmp_path):
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    arguments = QuantformerTrainingArguments(tmp_path, report_to="none", use_cpu=True, per_device_eval_batch_size=8)
    metrics = []
    for streaming in (False, True):
        data = digits(streaming)
        data.label_names = data.label_names[:5]
        place = {"batch_size": 8, "num_processes": 1, "process_index": 0}
        images = (
            StreamedEvaluationImages(data, processor, **place)
            if streaming
            else TransformedImages(data.validation, data, processor)
        )
        model = make_full_precision()
        model.classifier = torch.nn.Linear(32, 10)
        torch.manual_seed(0)
        torch.nn.init.normal_(model.classifier.weight)
        torch.nn.init.zeros_(model.classifier.bias)
        model.num_labels = model.config.num_labels = 10
        trainer = QuantformerTrainer(
            model,
            arguments,
            eval_dataset=images,
            data_collator=Collator(10),
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=rank_and_loss,
        )
        metrics.append(trainer.evaluate())
    for name in ("eval_accuracy", "eval_top5_accuracy", "eval_loss"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], abs=1e-5), name
