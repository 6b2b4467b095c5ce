"""Which training images an epoch draws, in which order."""

from collections import Counter
from collections.abc import Iterator, Sized
from typing import NamedTuple

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """An image as an epoch draws it: augmentation follows from these three numbers and the seed.

    They travel with the index, since a data set's own `epoch` stays behind: accelerate tells it the epoch neither on several
    processes nor after a resume within an epoch, and workers that persist have copies of it.
    """

    index: int
    epoch: int = 0
    copy: int = 0


class EpochSampler(Sampler[Draw]):
    """A permutation of the images for each epoch; with `repeats` above 1, repeated augmentation (arXiv 1902.05509).

    An epoch then draws a `1 / repeats` part of the images, each as many times, and each time augmented anew. timm's
    sampler says which process is to see what; the order here is the one that accelerate deals out to that end, batch after
    batch, process after process.

    Args:
        images: the data set.
        seed: of the order, with the epoch.
        repeats: draws of an image.
        batch_size, num_processes: to deal out repeated images.
    """

    def __init__(self, images: Sized, seed: int, repeats: int = 1, batch_size: int = 1, num_processes: int = 1):
        self.images = images
        self.seed = seed
        self.batch_size = batch_size
        self.epoch = 0
        self.repeated = []
        if repeats > 1:
            # Length as the data set's, not rounded down to 256 images.
            self.repeated = [
                RepeatAugSampler(images, num_processes, rank, num_repeats=repeats, selected_round=0)
                for rank in range(num_processes)
            ]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self.repeated)) if self.repeated else len(self.images)

    def __iter__(self) -> Iterator[Draw]:
        if not self.repeated:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(self.images), generator=generator).tolist()
            return iter([Draw(index, self.epoch) for index in order])
        for sampler in self.repeated:
            sampler.set_epoch(self.seed + self.epoch)
        by_process = [list(sampler) for sampler in self.repeated]
        starts = range(0, len(by_process[0]), self.batch_size)
        order = [i for start in starts for indices in by_process for i in indices[start : start + self.batch_size]]
        seen = Counter()
        draws = []
        for index in order:
            draws.append(Draw(index, self.epoch, seen[index]))
            seen[index] += 1
        return iter(draws)
