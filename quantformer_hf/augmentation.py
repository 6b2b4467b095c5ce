"""Training augmentation by timm's parts, with random numbers that follow from what is augmented alone."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from timm.data import Mixup, create_transform
from timm.data.auto_augment import NAME_TO_OP, posterize
from timm.data.mixup import mixup_target
from torch import Tensor
from transformers import BaseImageProcessor

from .data import DataArguments
from .images import pixel_scaling, processor_size
from .labels import IGNORED_LABEL, check_labels


#: Keeps the random numbers of a batch apart from those of its first image.
_MIXING = 1


def _posterize(image: PILImage.Image, bits_to_keep: int, **options: Any) -> PILImage.Image:
    """timm's, which asks for no bit at the greatest magnitude: Pillow 13 refuses that, where earlier ones made black."""
    return image.point(lambda _: 0) if bits_to_keep < 1 else posterize(image, bits_to_keep, **options)


# RandAugment of DeiT's recipe comes to it once in about a thousand images, and the whole run would end there.
NAME_TO_OP.update({name: _posterize for name, operation in NAME_TO_OP.items() if operation is posterize})


@contextlib.contextmanager
def random_numbers_of(*key: int) -> Iterator[None]:
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


def train_transform(
    processor: BaseImageProcessor, arguments: DataArguments
) -> Callable[[PILImage.Image, tuple[int, ...]], Tensor]:
    """timm's training augmentation, with the size and the range of pixel values of `processor`.

    Returns:
        A function of an RGB image and the key of its random numbers, to `(channels, height, width)`.

    Raises:
        ValueError: a processor that makes images of no fixed size, or of pixel values that timm's parts cannot make.
    """
    mean, std = pixel_scaling(processor)
    if arguments.random_erasing and not processor.do_normalize:
        raise ValueError(
            f"random_erasing is {arguments.random_erasing}, whose noise has the mean 0 and the deviation 1, and the"
            f" checkpoint's {type(processor).__name__} does not normalize (do_normalize): leave it out"
        )
    return SeededTransform(
        create_transform(
            input_size=(3, *processor_size(processor)),
            is_training=True,
            scale=(arguments.crop_scale, 1.0),
            ratio=(arguments.crop_ratio, 1 / arguments.crop_ratio),
            hflip=arguments.horizontal_flip,
            color_jitter=arguments.color_jitter or None,
            auto_augment=arguments.auto_augment,
            interpolation="bicubic",
            mean=mean,
            std=std,
            re_prob=arguments.random_erasing,
            # Noise, not a constant, as DeiT erases.
            re_mode="pixel",
        )
    )


class SeededTransform:
    """Runs `transform` with the random numbers of a key."""

    def __init__(self, transform: Callable[[PILImage.Image], Tensor]):
        self.transform = transform

    def __call__(self, image: PILImage.Image, key: tuple[int, ...]) -> Tensor:
        with random_numbers_of(*key):
            return self.transform(image)


class Collator:
    """Rows to a batch; training rows, which know their draw, are mixed if `mixup` or `cutmix` is above 0.

    A batch's random numbers follow from the draw of its first image, so that a resumed run mixes as an uninterrupted one.

    Args:
        num_labels: number of classes.
        mixup, cutmix: alpha of mixup (arXiv 1710.09412) and of CutMix (arXiv 1905.04899); with both, each batch takes one
            of them at even odds, as in DeiT.
        label_smoothing: of the mixed targets; Trainer smooths the others.
    """

    def __init__(self, num_labels: int, mixup: float = 0.0, cutmix: float = 0.0, label_smoothing: float = 0.0):
        self.num_labels = num_labels
        self.label_smoothing = label_smoothing
        self.mixup = None
        if mixup > 0 or cutmix > 0:
            self.mixup = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_labels)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """`pixel_values` `(batch, channels, height, width)` and `labels`: `(batch,)`, or `(batch, classes)` where mixed.

        `bad_images` names the images that could not be decoded, where there are some.

        Raises:
            ValueError: a label outside `num_labels`.
        """
        labels = torch.tensor([row["labels"] for row in rows])
        check_labels(labels[labels != IGNORED_LABEL], self.num_labels)
        batch = {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels}
        if self.mixup is not None and "draw" in rows[0]:
            with random_numbers_of(*rows[0]["draw"], _MIXING):
                batch["labels"] = self._mix(batch["pixel_values"], labels)
        bad_images = [name for row in rows for name in row.get("bad_images", ())]
        if bad_images:
            batch["bad_images"] = bad_images
        return batch

    def _mix(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        """Mix in place, and return soft targets. timm mixes in pairs: the last image of an odd batch stays as it is."""
        targets = mixup_target(labels, self.num_labels, smoothing=self.label_smoothing)
        paired = len(labels) // 2 * 2
        if paired:
            pixel_values[:paired], targets[:paired] = self.mixup(pixel_values[:paired], labels[:paired])
        return targets
