"""Images and labels for training, calibration and evaluation."""

import contextlib
import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_transform
from torch import Tensor
from transformers import BaseImageProcessor

from .configuration_quantformer import nearest
from .modeling_quantformer import check_labels


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
    train_split: str = field(default="train", metadata={"help": "Split to train and calibrate on."})
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on. Default: validation, else test, else eval_fraction of train_split."},
    )
    eval_fraction: float = field(
        default=0.2, metadata={"help": "Share of the training images held out, see eval_split."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Default: the one column of images."})
    label_column: str | None = field(default=None, metadata={"help": "Default: the one column of class labels."})
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
    color_jitter: float = field(default=0.0, metadata={"help": "Strength of the colour jitter."})
    auto_augment: str | None = field(
        default=None, metadata={"help": "timm's augmentation policy, such as rand-m9-mstd0.5-inc1."}
    )
    random_erasing: float = field(default=0.0, metadata={"help": "Probability of random erasing."})

    def __post_init__(self):
        if (self.dataset_name is None) == (self.dataset_dir is None):
            raise ValueError("give the images by one of dataset_name ('digits' needs no download) and dataset_dir")


@dataclass
class ImageData:
    """A data set with its columns found: `train` and `validation` may each be missing."""

    train: Dataset | None
    validation: Dataset | None
    image_column: str
    label_column: str
    label_names: list[str]


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
        ValueError: a split or column that is not there, with those that are.
        FileNotFoundError: no such folder.
    """
    if arguments.dataset_name == "digits":
        splits = load_digits_dataset()
    elif arguments.dataset_name is not None:
        splits = load_dataset(arguments.dataset_name, arguments.dataset_config_name)
    else:
        if not Path(arguments.dataset_dir).is_dir():
            raise FileNotFoundError(f"dataset_dir {arguments.dataset_dir!r} is not a folder")
        splits = load_dataset(str(arguments.dataset_dir))

    features = next(iter(splits.values())).features
    image_column = _find_column(features, "image", arguments.image_column, Image)
    label_column = _find_column(features, "label", arguments.label_column, ClassLabel)
    train = splits.get(arguments.train_split)
    eval_split = arguments.eval_split
    if eval_split is None:
        eval_split = next((name for name in ("validation", "test") if name in splits), None)
    if eval_split is None and train is not None:
        parts = train.train_test_split(arguments.eval_fraction, seed=seed, stratify_by_column=label_column)
        train, validation = parts["train"], parts["test"]
    elif eval_split not in splits:
        raise ValueError(f"the data set has no split {eval_split!r}{nearest(str(eval_split), splits)}")
    else:
        validation = splits[eval_split]
    if train is not None and arguments.max_train_samples is not None:
        train = train.shuffle(seed=seed).select(range(min(arguments.max_train_samples, len(train))))
    if arguments.max_eval_samples is not None:
        validation = validation.shuffle(seed=seed).select(range(min(arguments.max_eval_samples, len(validation))))
    return ImageData(train, validation, image_column, label_column, features[label_column].names)


def _find_column(features: Features, role: str, name: str | None, kind: type) -> str:
    if name is not None:
        if name not in features:
            raise ValueError(f"the data set has no {role} column {name!r}{nearest(name, features)}")
        if not isinstance(features[name], kind):
            raise ValueError(
                f"the {role} column {name!r} holds {type(features[name]).__name__}, not {kind.__name__}: cast it with"
                f" dataset.cast_column, or name another"
            )
        return name
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        raise ValueError(
            f"the data set has {len(found)} columns of the type {kind.__name__} among {', '.join(features)}: name one by"
            f" {role}_column"
        )
    return found[0]


def processor_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of the images that `processor` makes."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    return size["height"], size["width"]


def with_crop(processor: BaseImageProcessor, crop_pct: float | None) -> BaseImageProcessor:
    """A copy of `processor` whose centre crop keeps `crop_pct` of the shorter edge, as timm counts; None changes nothing.

    Raises:
        ValueError: a share outside (0, 1], or a processor without a centre crop.
    """
    if crop_pct is None:
        return processor
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct is {crop_pct}: choose more than 0 and at most 1")
    if not getattr(processor, "do_center_crop", False):
        raise ValueError(f"crop_pct is {crop_pct}, but the checkpoint's {type(processor).__name__} does not crop")
    changed = copy.deepcopy(processor)
    changed.size = type(processor.size)(shortest_edge=math.floor(min(processor_size(processor)) / crop_pct))
    return changed


def train_transform(processor: BaseImageProcessor, arguments: DataArguments) -> Callable[[PILImage.Image], Tensor]:
    """timm's training augmentation, with the size, interpolation, mean and deviation of `processor`."""
    return create_transform(
        input_size=(3, *processor_size(processor)),
        is_training=True,
        scale=(arguments.crop_scale, 1.0),
        ratio=(arguments.crop_ratio, 1 / arguments.crop_ratio),
        hflip=arguments.horizontal_flip,
        color_jitter=arguments.color_jitter or None,
        auto_augment=arguments.auto_augment,
        interpolation="bicubic",
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        re_prob=arguments.random_erasing,
    )


class TransformedImages(torch.utils.data.Dataset):
    """Rows of a data set as `pixel_values` `(channels, height, width)` and `labels`, made as they are read.

    The random numbers of an image's augmentation follow from seed, epoch and index alone, whichever process or worker
    reads it and whatever was read before: a resumed run sees the images of an uninterrupted one.

    Args:
        rows: images and labels.
        data: where `rows` comes from, for its columns.
        processor: makes the pixel values, as at inference, where `augment` is None.
        augment: training transform of a PIL image.
        seed: of the augmentation.
    """

    def __init__(
        self,
        rows: Dataset,
        data: ImageData,
        processor: BaseImageProcessor,
        augment: Callable[[PILImage.Image], Tensor] | None = None,
        seed: int = 0,
    ):
        self.rows = rows.select_columns([data.image_column, data.label_column])
        self.image_column, self.label_column = data.image_column, data.label_column
        self.processor = processor
        self.augment = augment
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows = self.rows[list(indices)]
        images = [image.convert("RGB") for image in rows[self.image_column]]
        if self.augment is None:
            pixel_values = self.processor(images, return_tensors="pt")["pixel_values"]
        else:
            pixel_values = []
            for index, image in zip(indices, images, strict=True):
                with _random_numbers_of(self.seed, self.epoch, index):
                    pixel_values.append(self.augment(image))
        labels = rows[self.label_column]
        return [{"pixel_values": p, "labels": label} for p, label in zip(pixel_values, labels, strict=True)]


@contextlib.contextmanager
def _random_numbers_of(*key: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's generators (timm draws from all three) from `key`, and put them back after."""
    python, numpy, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seeds = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(int(seeds[2]))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(tensor)


def collate(rows: list[dict[str, Any]], num_labels: int) -> dict[str, Tensor]:
    """`pixel_values` `(batch, channels, height, width)` and `labels` `(batch,)`.

    Raises:
        ValueError: a label outside `num_labels`.
    """
    labels = torch.tensor([row["labels"] for row in rows])
    check_labels(labels, num_labels)
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels}


def calibration_batches(
    data: ImageData, processor: BaseImageProcessor, samples: int, batch_size: int, seed: int
) -> Iterator[Tensor]:
    """Batches of `pixel_values` from random training images without augmentation, the same in every process."""
    chosen = data.train.shuffle(seed=seed).select(range(min(samples, len(data.train))))
    images = TransformedImages(chosen, data, processor)
    for start in range(0, len(images), batch_size):
        rows = images.__getitems__(range(start, min(start + batch_size, len(images))))
        yield torch.stack([row["pixel_values"] for row in rows])
