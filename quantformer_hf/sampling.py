"""Which training images an epoch draws, in which order."""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence, Sized
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


def by_turns(images: Iterable[int], labels: Sequence[Hashable]) -> list[int]:
    """The first of `images` of each class, then the second of each that has one, and so on, otherwise in their order."""
    seen, turns = Counter(), []
    for image in images:
        turns.append((seen[labels[image]], image))
        seen[labels[image]] += 1
    return [image for _, image in sorted(turns, key=lambda turn: turn[0])]


class EpochSampler(Sampler[Draw]):
    """A permutation of the images for each epoch; with `repeats` above 1, repeated augmentation (arXiv 1902.05509).

    An epoch then draws a `1 / repeats` part of the images, each as many times, and each time augmented anew. timm's
    sampler says which process is to see what; the order here is the one that accelerate deals out to that end, batch after
    batch, process after process.

    With `labels`, an epoch has as many draws as there are images, and of each class as many as of any other, or one more:
    some images of a large class, and those of a small one more than once, each time augmented anew.

    Args:
        images: the data set.
        seed: of the order, with the epoch.
        repeats: draws of an image.
        labels: of the images, to draw all classes equally often; without `repeats`.
        batch_size, num_processes: to deal out repeated images.
    """

    def __init__(
        self,
        images: Sized,
        seed: int,
        repeats: int = 1,
        batch_size: int = 1,
        num_processes: int = 1,
        labels: Sequence[Hashable] | None = None,
    ):
        self.images = images
        self.seed = seed
        self.labels = labels
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
            draws = [Draw(index, self.epoch) for index in order]
            return iter(draws if self.labels is None else self._balanced(draws, generator))
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

    def _balanced(self, draws: list[Draw], generator: torch.Generator) -> list[Draw]:
        """As many draws, of all classes in turn, and then mixed."""
        of_class: dict[Hashable, list[Draw]] = {}
        for draw in draws:
            of_class.setdefault(self.labels[draw.index], []).append(draw)
        classes, chosen = list(of_class.values()), []
        for number in range(len(draws)):
            turn, place = divmod(number, len(classes))
            copy, member = divmod(turn, len(classes[place]))
            chosen.append(classes[place][member]._replace(copy=copy))
        return [chosen[place] for place in torch.randperm(len(chosen), generator=generator).tolist()]
