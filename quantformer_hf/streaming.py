"""Streams of images: each process and worker reads its part, once, and all processes make the same number of steps."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import fsspec.asyn
import torch
from accelerate.data_loader import prepare_data_loader
from datasets.distributed import split_dataset_by_node
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from transformers import BaseImageProcessor, TrainingArguments

from .bad_images import BadImageError, decode, origin
from .data import ImageData, shuffled
from .images import evaluation_rows, processor_size, undecoded
from .labels import IGNORED_LABEL, check_labelled


#: Shards for each reader from which on they are dealt out whole, though one may have one more than another: single images
#: are dealt out evenly, but then everybody reads everything.
MIN_SHARDS = 4

#: Bad images in a row at which a worker gives up.
MAX_BAD_RUN = 1000


class StreamedImages(torch.utils.data.IterableDataset):
    """What streams share: a data set that splits itself among the processes, in batches.

    Its data loader is `stream_loader`, which keeps accelerate from splitting it again.

    Args:
        batch_size: of one process.
        num_processes, process_index: processes that share the stream, and which one this is.
    """

    def __init__(self, data: ImageData, batch_size: int, num_processes: int, process_index: int):
        self.image_column, self.label_column = data.image_column, data.label_column
        self.class_of = data.class_of
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.process_index = process_index

    def place(self) -> tuple[int, int]:
        """Number of this worker, and of workers in this process."""
        info = get_worker_info()
        if info is None:
            return 0, 1
        # A worker is a fork: a filesystem of its parent would wait for a thread that is not there.
        fsspec.asyn.reset_lock()
        return info.id, info.num_workers


class StreamedTrainingImages(StreamedImages):
    """A stream as augmented training rows, shuffled anew each epoch; an epoch has a known length.

    Shards are dealt out to the workers of all processes (`split_dataset_by_node`), or single images where shards are few.
    Each worker makes its share of the epoch's batches. Parts may differ in length: a worker that comes to the end of its
    part begins again, and one with more leaves the rest; the next epoch deals the shards out anew.
    Bad images are left out for the next one, so that batches keep their size.

    Random numbers follow from the seed, the epoch, the worker's place and the image's position: a run that is resumed with
    the same processes and workers sees the images of an uninterrupted one.

    Args:
        data: with a stream as `train`.
        augment: training transform of a PIL image and a key of random numbers.
        seed: of order and augmentation.
        kwargs: as in `StreamedImages`.

    Raises:
        ValueError: the number of images is not known, or smaller than a batch of all processes.
    """

    def __init__(
        self,
        data: ImageData,
        augment: Callable[[PILImage.Image, tuple[int, ...]], Tensor],
        seed: int,
        **kwargs: int,
    ):
        super().__init__(data, **kwargs)
        if data.train_samples is None:
            raise ValueError(
                "the data set does not say how many training images it has, and a stream must be told: give"
                " --train_samples_per_epoch"
            )
        self.samples = data.train_samples
        self.stream = shuffled(undecoded(data.train, data), seed, data.shuffle_buffer_size)
        self.augment = augment
        self.seed = seed
        # Shared memory: workers that persist over epochs have copies of this object.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        if self.steps == 0:
            raise ValueError(
                f"{self.samples} images are less than one batch of {self.batch_size} in each of {self.num_processes}"
                f" processes: lower --per_device_train_batch_size"
            )

    @property
    def steps(self) -> int:
        """Batches of each process in an epoch."""
        return self.samples // (self.batch_size * self.num_processes)

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, workers = self.place()
        epoch = self.epoch.item()
        # The loader takes batches from its workers in turn.
        rows_to_make = self.batch_size * len(range(worker, self.steps, workers))
        reader = self.process_index * workers + worker
        rows = self._rows(reader, self.num_processes * workers, epoch)
        bad_images: list[str] = []
        for position in range(rows_to_make):
            key = (self.seed, epoch, position, reader)
            for number, row in rows:
                cell, label = row[self.image_column], self.class_of(row[self.label_column])
                image, name = decode(cell), origin(cell, f"image {number} of reader {reader}")
                if image is not None:
                    break
                bad_images.append(name)
                if len(bad_images) == MAX_BAD_RUN:
                    raise BadImageError(f"{MAX_BAD_RUN} bad images in a row, such as {', '.join(bad_images[:5])}")
            check_labelled(label, name, self.label_column, "train_split")
            made = {"pixel_values": self.augment(image, key), "labels": label, "draw": key}
            if bad_images:
                made["bad_images"], bad_images = bad_images, []
            yield made

    def _rows(self, reader: int, readers: int, epoch: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """This reader's part of the stream, over and over, with the position of each row in it."""
        shards = self.stream.num_shards
        strategy = "shards" if shards % readers == 0 or shards >= MIN_SHARDS * readers else "examples"
        part = split_dataset_by_node(self.stream, reader, readers, strategy)
        part.set_epoch(epoch)
        while True:
            found = False
            # `iter` leaves the workers to us, where `__iter__` would split the part again.
            for number, rows in enumerate(part.iter(1)):
                found = True
                yield number, {name: cells[0] for name, cells in rows.items()}
            if not found:
                raise ValueError(
                    f"reader {reader} of {readers} found no image in its part of the stream: lower"
                    f" --dataloader_num_workers"
                )


class StreamedEvaluationImages(StreamedImages):
    """A stream as rows to evaluate, each image once, in the order in which a map-style data set is dealt out.

    Every worker reads the whole stream, and decodes its own batches: only so does it know, without knowing the length, when
    the others stop. Rows with `IGNORED_LABEL` fill up the last batches, so that every process makes as many steps as the
    others.

    Args:
        data: with a stream as `validation`.
        processor: makes the pixel values, as at inference.
        kwargs: as in `StreamedImages`.
    """

    def __init__(self, data: ImageData, processor: BaseImageProcessor, **kwargs: int):
        super().__init__(data, **kwargs)
        self.stream = undecoded(data.validation, data)
        self.processor = processor

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, workers = self.place()
        batches = self.stream.iter(self.batch_size)
        for step in itertools.count():
            # One batch for each process.
            taken = list(itertools.islice(batches, self.num_processes))
            if not taken:
                return
            if step % workers != worker:
                continue
            rows = []
            if self.process_index < len(taken):
                found = taken[self.process_index]
                start = (step * self.num_processes + self.process_index) * self.batch_size
                cells = found[self.image_column]
                origins = [origin(cell, f"image {start + i}") for i, cell in enumerate(cells)]
                labels = [self.class_of(label) for label in found[self.label_column]]
                for label, name in zip(labels, origins, strict=True):
                    check_labelled(label, name, self.label_column, "eval_split")
                rows = evaluation_rows([decode(cell) for cell in cells], labels, origins, self.processor)
            yield from rows
            filling = {
                "pixel_values": torch.zeros(3, *processor_size(self.processor)),
                "labels": IGNORED_LABEL,
            }
            yield from itertools.repeat(filling, self.batch_size - len(rows))


def stream_loader(
    images: StreamedImages,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    arguments: TrainingArguments,
) -> DataLoader:
    """accelerate's data loader of `images`, told that there is one process: they have split themselves already."""
    loader = DataLoader(
        images,
        batch_size=images.batch_size,
        collate_fn=collate,
        num_workers=arguments.dataloader_num_workers,
        pin_memory=arguments.dataloader_pin_memory,
        persistent_workers=arguments.dataloader_persistent_workers,
        prefetch_factor=arguments.dataloader_prefetch_factor,
    )
    return prepare_data_loader(
        loader, device=arguments.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )
