"""Where images and labels come from: data sets of `datasets`, their splits, columns and classes."""

import json
import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
)
from datasets.exceptions import DatasetGenerationError
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_transform

from .columns import check_all_labelled, find_column, with_classes, with_images
from .configuration_quantformer import nearest


logger = logging.getLogger(__name__)

#: What the evaluation's split is looked for as, in this order.
EVAL_SPLITS = ("validation", "val", "valid", "dev", "test")

#: Pieces that a map-style data set is streamed in.
STREAM_SHARDS = 8


@dataclass
class DataArguments:
    """Where the images come from, and how training images are augmented."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set of the hub, or 'digits': scikit-learn's 1,797 handwritten digits."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_dir: str | None = field(
        default=None, metadata={"help": "Folder of images (split/class/file) or of parquet files (split-*.parquet)."}
    )
    data_files: dict | str | None = field(
        default=None,
        metadata={
            "help": 'Parquet files by split, local or remote, as JSON: {"train": "https://.../train-*.parquet", ...}.'
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the images as they are needed, instead of downloading them first."}
    )
    train_samples_per_epoch: int | None = field(
        default=None,
        metadata={"help": "Images of an epoch of a stream. Default: what the data set says of its split."},
    )
    shuffle_buffer_size: int = field(
        default=10_000, metadata={"help": "Images of a stream to draw from at random, in each worker."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train and calibrate on."})
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on. Default: validation or val, else test, else eval_fraction."},
    )
    eval_fraction: float = field(
        default=0.2, metadata={"help": "Share of the training images held out, of each class alike, see eval_split."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column of images, or of the bytes of their files. Default: the one of images."}
    )
    label_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of class labels, or of strings or integers, of which each is a class. Default: the one of class"
            " labels."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many images only."})
    calibration_samples: int = field(default=256, metadata={"help": "Training images that calibrate the quantizers."})
    crop_pct: float | None = field(
        default=None,
        metadata={
            "help": "Share of the shorter edge that the evaluation's centre crop keeps. Default: the checkpoint's."
        },
    )
    crop_scale: float = field(default=0.08, metadata={"help": "Smallest share of the image in a random crop."})
    crop_ratio: float = field(
        default=0.75, metadata={"help": "Smallest aspect ratio of a crop; its inverse the largest."}
    )
    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})
    color_jitter: float = field(
        default=0.0, metadata={"help": "Strength of the colour jitter. timm leaves it out beside auto_augment."}
    )
    auto_augment: str | None = field(
        default=None, metadata={"help": "timm's augmentation policy, such as rand-m9-mstd0.5-inc1."}
    )
    random_erasing: float = field(default=0.0, metadata={"help": "Probability of random erasing."})

    mixup: float = field(default=0.0, metadata={"help": "Alpha of mixup, 0.8 in DeiT. 0: off."})
    cutmix: float = field(default=0.0, metadata={"help": "Alpha of CutMix, 1.0 in DeiT. 0: off."})

    def __post_init__(self):
        if isinstance(self.data_files, str):
            try:
                self.data_files = json.loads(self.data_files)
            except json.JSONDecodeError as error:
                raise ValueError(f"data_files is not JSON ({error}): {self.data_files}") from error
        for name in ("dataset_name", "dataset_dir"):
            if not isinstance(getattr(self, name), str | os.PathLike | None):
                raise ValueError(f"{name} is {getattr(self, name)!r}: write a name")
        if sum(given is not None for given in (self.dataset_name, self.dataset_dir, self.data_files)) != 1:
            raise ValueError(
                "give the images by one of dataset_name ('digits' needs no download), dataset_dir and data_files"
            )
        for name in ("mixup", "cutmix", "color_jitter"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: choose 0 (off) or more")
        for name in ("random_erasing", "horizontal_flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: choose a probability, 0 to 1")
        for name in ("crop_scale", "crop_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: choose more than 0 and at most 1")
        if not 0 < self.eval_fraction < 1:
            raise ValueError(
                f"eval_fraction is {self.eval_fraction}: choose more than 0 and less than 1, or name a split by eval_split"
            )
        counts = "train_samples_per_epoch", "shuffle_buffer_size", "max_train_samples", "max_eval_samples"
        for name in (*counts, "calibration_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: choose at least 1")
        if self.train_samples_per_epoch is not None and not self.streaming:
            raise ValueError("train_samples_per_epoch is for --streaming: give --max_train_samples instead")
        if self.auto_augment is not None:
            try:
                create_transform(224, is_training=True, auto_augment=self.auto_augment)
            except (AssertionError, KeyError, ValueError) as error:
                raise ValueError(
                    f"auto_augment is {self.auto_augment!r}, which timm does not know ({type(error).__name__}"
                    f" {error}): try rand-m9-mstd0.5-inc1"
                ) from error


@dataclass
class ImageData:
    """A data set with its columns found: `train` and `validation` may each be missing.

    Attributes:
        train_samples: images of an epoch, where it is known.
        shuffle_buffer_size: of a stream.
        numbers: of the classes that the label column knows, among `label_names`, where these are others.
    """

    train: Dataset | IterableDataset | None
    validation: Dataset | IterableDataset | None
    image_column: str
    label_column: str
    label_names: list[str]
    train_samples: int | None
    shuffle_buffer_size: int
    numbers: list[int] | None = None

    def class_of(self, label: int | None) -> int | None:
        """The number, among `label_names`, of what a row has in its label column; a row without a class has none.

        Raises:
            ValueError: a label that is no class.
        """
        if self.numbers is None or label is None or label < 0:
            return label
        if label >= len(self.numbers):
            raise ValueError(f"label {label} in {self.label_column!r} is outside of its {len(self.numbers)} classes")
        return self.numbers[label]


def load_digits_dataset() -> DatasetDict:
    """The handwritten digits inside scikit-learn, 8x8 pixels, split 80/20 with a fixed seed."""
    digits = load_digits()
    images = [PILImage.fromarray((image * (255 / 16)).round().astype(np.uint8)) for image in digits.images]
    train, validation = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=digits.target)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})

    def subset(indices: np.ndarray) -> Dataset:
        rows = {"image": [images[i] for i in indices], "label": [int(digits.target[i]) for i in indices]}
        return Dataset.from_dict(rows, features=features)

    return DatasetDict(train=subset(train), validation=subset(validation))


def load_image_data(arguments: DataArguments, seed: int) -> ImageData:
    """Load the data set of `arguments`, with its splits, columns and class names.

    Raises:
        ValueError: a split or column that is not there, with those that are; splits whose classes differ; no labels to
            evaluate by; nothing to evaluate on that could be held out.
        FileNotFoundError: no such folder.
    """
    splits = _load_splits(arguments)
    train = splits.get(arguments.train_split)
    eval_split = arguments.eval_split
    if eval_split is None:
        eval_split = next((name for name in EVAL_SPLITS if name in splits and name != arguments.train_split), None)
    if eval_split is not None and eval_split not in splits:
        raise ValueError(f"the data set has no split {eval_split!r}{nearest(str(eval_split), splits)}")
    if eval_split is None and train is None:
        raise ValueError(
            f"the data set has neither the split {arguments.train_split!r} nor one to evaluate on, only"
            f" {', '.join(map(str, splits))}: name them by train_split and eval_split"
        )

    features = (splits[eval_split] if train is None else train).features
    image_column = find_column(features, "image", arguments.image_column, Image)
    label_column = find_column(features, "label", arguments.label_column, ClassLabel)
    used = [name for name in (arguments.train_split, eval_split) if name in splits]
    splits = with_classes(splits, label_column, used)
    splits = {name: with_images(rows, image_column, name) for name, rows in splits.items()}
    train = splits.get(arguments.train_split)
    label_names = splits[used[0]].features[label_column].names
    if len(label_names) < 2:
        raise ValueError(f"the column {label_column!r} knows {len(label_names)} class: a classifier needs two at least")
    if eval_split is None:
        if not arguments.streaming:
            check_all_labelled(train, label_column, f"the split {arguments.train_split!r}", "train_split")
        train, validation = _hold_out(train, label_column, arguments, seed)
    else:
        validation = splits[eval_split]
        _check_same_classes(validation.features, label_column, label_names, eval_split, arguments.train_split)

    train_samples = None
    if train is not None:
        if arguments.streaming:
            declared = (train.info.splits or {}).get(arguments.train_split)
            train_samples = arguments.train_samples_per_epoch or getattr(declared, "num_examples", None)
        else:
            train_samples = len(train)
        if arguments.max_train_samples is not None:
            # Of a stream the first ones: to shuffle before would make others of them in each epoch.
            train = train if arguments.streaming else train.shuffle(seed=seed)
            train = first(train, arguments.max_train_samples)
            train_samples = min(train_samples or arguments.max_train_samples, arguments.max_train_samples)
    if arguments.max_eval_samples is not None:
        validation = validation if arguments.streaming else validation.shuffle(seed=seed)
        validation = first(validation, arguments.max_eval_samples)
    if eval_split is not None and not arguments.streaming:
        # Training looks at each label as it comes: without it, as in calibration alone, none is needed.
        drawn = "" if arguments.max_eval_samples is None else "what is drawn of "
        check_all_labelled(validation, label_column, f"{drawn}the split {eval_split!r}", "eval_split")
    held_out = f"what is held out of {arguments.train_split!r}"
    logger.info(
        f"images to train on: {'none' if train is None else repr(arguments.train_split)}; to evaluate on:"
        f" {held_out if eval_split is None else repr(eval_split)} (of the splits {', '.join(map(str, splits))})"
    )
    return ImageData(
        train, validation, image_column, label_column, label_names, train_samples, arguments.shuffle_buffer_size
    )


def _load_splits(arguments: DataArguments) -> DatasetDict | IterableDatasetDict:
    streaming = arguments.streaming
    if arguments.dataset_name == "digits":
        splits = load_digits_dataset()
        if streaming:
            shards = {name: rows.to_iterable_dataset(STREAM_SHARDS) for name, rows in splits.items()}
            splits = IterableDatasetDict(shards)
    elif arguments.dataset_name is not None:
        splits = _read(arguments.dataset_name, arguments.dataset_config_name, streaming=streaming)
    elif arguments.data_files is not None:
        splits = _read("parquet", data_files=arguments.data_files, streaming=streaming)
    else:
        if not Path(arguments.dataset_dir).is_dir():
            raise FileNotFoundError(f"dataset_dir {arguments.dataset_dir!r} is not a folder")
        _check_split_folders(Path(arguments.dataset_dir))
        splits = _read(str(arguments.dataset_dir), streaming=streaming)
    # A stream without a description of its columns has to be looked into.
    if streaming and any(rows.features is None for rows in splits.values()):
        splits = IterableDatasetDict({name: rows._resolve_features() for name, rows in splits.items()})
    return splits


def _check_split_folders(folder: Path) -> None:
    """Raise ValueError for folders of splits in capitals: `datasets` takes all of them together for the training images."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name != path.name.lower() and path.name.lower() in ("train", *EVAL_SPLITS):
            raise ValueError(
                f"{path} is not read as the split {path.name.lower()!r}, for its capital letters: rename it to that, in the"
                f" other splits too"
            )


def _read(name: str, *args: Any, **kwargs: Any) -> DatasetDict | IterableDatasetDict:
    """As `load_dataset`, whose error does not say what is wrong with the files."""
    try:
        return load_dataset(name, *args, **kwargs)
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        # Its last line says why, those before it what the columns are.
        why = str(cause).strip().rpartition("\n")[2]
        raise ValueError(
            f"the data set {kwargs.get('data_files', name)} cannot be read ({type(cause).__name__}: {why}): a folder holds"
            f" either images (train/<class>/<file>, val/<class>/<file>) or parquet files of the same columns"
            f" (train-*.parquet, test-*.parquet)"
        ) from error


def _hold_out(
    train: Dataset | IterableDataset, label_column: str, arguments: DataArguments, seed: int
) -> tuple[Dataset, Dataset]:
    """What is left to train on, and what is held out to evaluate on: some of each class."""
    if arguments.streaming:
        raise ValueError("a stream cannot be split: name another split to evaluate on by eval_split")
    try:
        parts = train.train_test_split(arguments.eval_fraction, seed=seed, stratify_by_column=label_column)
    except ValueError as error:
        names, counts = train.features[label_column].names, Counter(train[label_column][:])
        outside = sorted(label for label in counts if not 0 <= label < len(names))
        if outside:
            raise ValueError(
                f"the label column {label_column!r} holds {outside[0]}, and names {len(names)} classes, 0 to"
                f" {len(names) - 1}: correct the data set"
            ) from error
        rarest, images = min(counts.items(), key=lambda item: item[1], default=(0, 0))
        raise ValueError(
            f"eval_fraction {arguments.eval_fraction} of {len(train)} images cannot be held out with some of each of"
            f" {len(counts)} classes ({names[rarest]!r} has {images}): choose another --eval_fraction, or name a split by"
            f" --eval_split"
        ) from error
    return parts["train"], parts["test"]


def _check_same_classes(
    features: Features, label_column: str, label_names: list[str], eval_split: str, train_split: str
) -> None:
    found = features.get(label_column)
    names = found.names if isinstance(found, ClassLabel) else []
    if names != label_names:
        differing = sorted(set(names) ^ set(label_names))
        raise ValueError(
            f"the splits {train_split!r} and {eval_split!r} do not have the same classes in {label_column!r}"
            f" ({len(label_names)} and {len(names)}; {', '.join(differing[:5]) or 'in another order'}): their labels would"
            f" not mean the same"
        )


def first(rows: Dataset | IterableDataset, samples: int) -> Dataset | IterableDataset:
    """The first `samples` rows, or as many as there are."""
    return rows.take(samples) if isinstance(rows, IterableDataset) else rows.select(range(min(samples, len(rows))))


def shuffled(rows: Dataset | IterableDataset, seed: int, buffer_size: int) -> Dataset | IterableDataset:
    """The rows in random order: of a stream, its shards, and what a buffer of `buffer_size` rows can do."""
    if isinstance(rows, IterableDataset):
        return rows.shuffle(seed=seed, buffer_size=buffer_size)
    return rows.shuffle(seed=seed)
