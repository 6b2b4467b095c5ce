"""Rows of a data set as tensors, in training, calibration and evaluation."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image, IterableDataset
from PIL import Image as PILImage
from torch import Tensor
from transformers import BaseImageProcessor

from .bad_images import MODE, BadImageError, BadImageTally, decode, origin
from .data import ImageData, first, shuffled
from .labels import IGNORED_LABEL, check_labelled
from .sampling import Draw, by_turns


#: Replacements that are tried for a bad image.
REPLACEMENTS = 100


def processor_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of the images that `processor` makes.

    Raises:
        ValueError: they have no size of their own, but one that follows from the image's.
    """
    crops = getattr(processor, "do_center_crop", False)
    size = dict((processor.crop_size if crops else processor.size) or {})
    if not {"height", "width"} <= size.keys():
        raise ValueError(
            f"the {type(processor).__name__} makes images of many sizes (do_resize {processor.do_resize}, size"
            f" {dict(processor.size or {})}, do_center_crop {crops}), which no batch can hold: write into its"
            f" preprocessor_config.json do_center_crop true and crop_size with height and width, or do_resize true and size"
            f" with these"
        )
    return size["height"], size["width"]


def pixel_scaling(processor: BaseImageProcessor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that make of pixels from 0 to 1, as timm normalizes, the values that `processor` makes.

    Raises:
        ValueError: values that no such two make.
    """
    name = type(processor).__name__
    for option in ("do_flip_channel_order", "rescale_offset"):
        if getattr(processor, option, False):
            raise ValueError(
                f"the checkpoint's {name} has {option}, which training images cannot have: choose another processor"
            )
    if not (processor.do_rescale or processor.do_normalize):
        raise ValueError(
            f"the checkpoint's {name} leaves pixels as bytes, which no model takes: write do_rescale or do_normalize true"
            f" into its preprocessor_config.json"
        )
    # What the processor makes of a white pixel before it normalizes.
    white = 255 * (processor.rescale_factor if processor.do_rescale else 1)
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    if mean is None or std is None:
        raise ValueError(
            f"the checkpoint's {name} normalizes by image_mean {mean} and image_std {std}: write both into its"
            f" preprocessor_config.json, or do_normalize false"
        )
    return tuple(np.broadcast_to(mean, 3) / white), tuple(np.broadcast_to(std, 3) / white)


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


def undecoded(rows: Dataset, data: ImageData) -> Dataset:
    """The columns that count, with images as `{"bytes", "path"}`: a bad one must not take its whole batch with it."""
    return rows.select_columns([data.image_column, data.label_column]).cast_column(
        data.image_column, Image(decode=False)
    )


def place(rows: Dataset | IterableDataset, index: int) -> str:
    """What a message calls the image `index` of `rows`: by its number in the split that they were drawn from."""
    drawn = getattr(rows, "_indices", None)
    return f"image {index if drawn is None else drawn.column(0)[index].as_py()}"


def evaluation_rows(
    images: list[PILImage.Image | None], labels: list[int], origins: list[str], processor: BaseImageProcessor
) -> list[dict[str, Any]]:
    """Rows of `pixel_values` and `labels`, as at inference.

    A bad image (None) keeps its place with `IGNORED_LABEL`, so that batches have the same size in every process; no metric
    counts it, and `bad_images` names it.
    """
    placeholder = PILImage.new(MODE, processor_size(processor)[::-1])
    readable = [placeholder if image is None else image for image in images]
    rows = []
    for pixels, image, label, name in zip(
        processor(readable, return_tensors="pt")["pixel_values"], images, labels, origins, strict=True
    ):
        if image is None:
            rows.append({"pixel_values": pixels, "labels": IGNORED_LABEL, "bad_images": [name]})
        else:
            rows.append({"pixel_values": pixels, "labels": label})
    return rows


class TransformedImages(torch.utils.data.Dataset):
    """Rows of a data set as `pixel_values` `(channels, height, width)` and `labels`, made as they are read.

    The random numbers of an image's augmentation follow from the seed and its `Draw` alone, whichever process or worker
    reads it and whatever was read before: a resumed run sees the images of an uninterrupted one.

    A bad image is named in the row's `bad_images`. In evaluation it keeps its place, see `evaluation_rows`. In training
    another image takes it, chosen by the same numbers: batches keep their size, so that all processes stay in step, and
    nothing depends on which process or worker met it.

    Args:
        rows: images and labels.
        data: where `rows` comes from, for its columns.
        processor: makes the pixel values, as at inference, where `augment` is None.
        augment: training transform of a PIL image and a key of random numbers.
        seed: of the augmentation.
    """

    def __init__(
        self,
        rows: Dataset,
        data: ImageData,
        processor: BaseImageProcessor,
        augment: Callable[[PILImage.Image, tuple[int, ...]], Tensor] | None = None,
        seed: int = 0,
    ):
        self.rows = undecoded(rows, data)
        self.image_column, self.label_column = data.image_column, data.label_column
        self.class_of = data.class_of
        self.processor = processor
        self.augment = augment
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> list[int]:
        """The class of each row."""
        return [self.class_of(label) for label in self.rows[self.label_column][:]]

    def __getitem__(self, draw: Draw | int) -> dict[str, Any]:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw | int]) -> list[dict[str, Any]]:
        """
        Args:
            draws: of `EpochSampler`; a plain index is the first draw of the epoch 0.

        Raises:
            BadImageError: `REPLACEMENTS` for a bad training image were bad as well.
            ValueError: an image without a class.
        """
        draws = [draw if isinstance(draw, Draw) else Draw(draw) for draw in draws]
        rows = self.rows[[draw.index for draw in draws]]
        cells, labels = rows[self.image_column], [self.class_of(label) for label in rows[self.label_column]]
        images = [decode(cell) for cell in cells]
        if self.augment is None:
            origins = [origin(cell, place(self.rows, draw.index)) for cell, draw in zip(cells, draws, strict=True)]
            for label, name in zip(labels, origins, strict=True):
                check_labelled(label, name, self.label_column, "eval_split")
            return evaluation_rows(images, labels, origins, self.processor)
        return [
            self._training_row(draw, cell, image, label)
            for draw, cell, image, label in zip(draws, cells, images, labels, strict=True)
        ]

    def _training_row(self, draw: Draw, cell: dict, image: PILImage.Image | None, label: int) -> dict[str, Any]:
        key = (self.seed, draw.epoch, draw.index, draw.copy)
        name, bad_images = origin(cell, place(self.rows, draw.index)), []
        if image is None:
            bad_images.append(name)
            generator = np.random.default_rng(key)
            for index in map(int, generator.integers(len(self.rows), size=REPLACEMENTS)):
                row = self.rows[index]
                image, label = decode(row[self.image_column]), self.class_of(row[self.label_column])
                name = origin(row[self.image_column], place(self.rows, index))
                if image is not None:
                    break
                bad_images.append(name)
            else:
                raise BadImageError(f"nearly all images are bad, such as {', '.join(sorted(set(bad_images))[:5])}")
        check_labelled(label, name, self.label_column, "train_split")
        row = {"pixel_values": self.augment(image, key), "labels": label, "draw": key}
        return row | {"bad_images": bad_images} if bad_images else row


def calibration_batches(
    data: ImageData,
    processor: BaseImageProcessor,
    samples: int,
    batch_size: int,
    seed: int,
    on_bad_image: str = "skip",
    balance_classes: bool = False,
) -> Iterator[Tensor]:
    """Batches of `pixel_values` from random training images without augmentation, the same in every process.

    Bad images are left out and reported, and so a batch may be smaller. With `balance_classes`, classes have the same number
    of images, as far as they have so many.

    Raises:
        BadImageError: see `BadImageTally`.
        ValueError: `balance_classes` of a stream.
    """
    tally = BadImageTally("calibration images", on_bad_image)
    rows = shuffled(undecoded(data.train, data), seed, data.shuffle_buffer_size)
    if balance_classes:
        if isinstance(rows, IterableDataset):
            raise ValueError("balance_classes draws images at will, which a stream cannot: leave out one of both")
        rows = rows.select(by_turns(range(len(rows)), rows[data.label_column][:]))
    chosen = first(rows, samples)
    for start, rows in zip(itertools.count(step=batch_size), chosen.iter(batch_size)):
        cells = rows[data.image_column]
        origins = [origin(cell, place(chosen, start + i)) for i, cell in enumerate(cells)]
        found = evaluation_rows([decode(cell) for cell in cells], rows[data.label_column], origins, processor)
        tally.add(len(found), [name for row in found for name in row.get("bad_images", ())])
        good = [row["pixel_values"] for row in found if "bad_images" not in row]
        if good:
            yield torch.stack(good)
    tally.finish(alike=True)
