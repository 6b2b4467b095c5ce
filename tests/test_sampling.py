"""Which images an epoch draws, on one process and on several."""

from collections import Counter

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import make_full_precision
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import BatchSampler
from trainers import make_trainer
from transformers import ViTImageProcessor

from quantformer_hf.data import DataArguments, load_image_data
from quantformer_hf.images import TransformedImages
from quantformer_hf.sampling import Draw, EpochSampler, by_turns


def batches_of(sampler, batch_size, processes):
    """Batches of each process, as accelerate deals them out."""
    return [
        list(BatchSamplerShard(BatchSampler(sampler, batch_size, drop_last=False), processes, rank))
        for rank in range(processes)
    ]


def test_an_epoch_is_a_permutation_and_another_one_each_time():
    sampler = EpochSampler(range(10), seed=3)
    first = list(sampler)
    assert sorted(draw.index for draw in first) == list(range(10))
    assert first == list(sampler)
    assert {draw.epoch for draw in first} == {0}
    sampler.set_epoch(1)
    assert [draw.index for draw in sampler] != [draw.index for draw in first]
    assert {draw.epoch for draw in sampler} == {1}
    # In the order of torch's and accelerate's own samplers.
    expected = torch.randperm(10, generator=torch.Generator().manual_seed(4)).tolist()
    assert [draw.index for draw in sampler] == expected


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_repeated_augmentation_gives_each_process_what_timm_gives_it(processes):
    sampler = EpochSampler(range(24), seed=5, repeats=3, batch_size=4, num_processes=processes)
    sampler.set_epoch(2)
    for rank, batches in enumerate(batches_of(sampler, 4, processes)):
        timm = RepeatAugSampler(range(24), processes, rank, num_repeats=3, selected_round=0)
        timm.set_epoch(7)
        assert [draw.index for batch in batches for draw in batch] == list(timm)


def test_repeated_images_are_told_apart_by_their_copy():
    draws = list(EpochSampler(range(24), seed=0, repeats=3, batch_size=4, num_processes=2))
    assert len(draws) == len(set(draws)) == 24
    assert set(Counter(draw.index for draw in draws).values()) == {3}
    assert {draw.copy for draw in draws} == {0, 1, 2}


def test_a_draw_counts_as_its_numbers():
    assert Draw(3) == (3, 0, 0)


LABELS = [0] * 20 + [1, 2, 2]


def test_balanced_classes_are_drawn_equally_often_in_an_epoch_of_the_same_length():
    sampler = EpochSampler(range(23), seed=1, labels=LABELS)
    draws = list(sampler)
    assert len(draws) == len(sampler) == len(set(draws)) == 23
    assert sorted(Counter(LABELS[draw.index] for draw in draws).values()) == [7, 8, 8]
    # As few repetitions as there can be.
    repeated = Counter(draw.index for draw in draws)
    assert all(repeated[image] <= 1 for image in range(20))
    assert abs(repeated[21] - repeated[22]) <= 1
    assert [draw.index for draw in draws] != sorted(draw.index for draw in draws)
    assert list(sampler) == draws
    sampler.set_epoch(1)
    assert {draw.index for draw in sampler} != {draw.index for draw in draws}


def test_the_trainer_balances_classes_and_refuses_what_it_cannot(tmp_path):
    data = load_image_data(DataArguments(dataset_name="digits"), seed=0)
    labels = data.train[data.label_column][:]
    rows = [i for i, label in enumerate(labels) if label < 2] + [labels.index(label) for label in range(2, 10)]
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    for balance in (False, True):
        trainer = make_trainer(tmp_path, make_full_precision(), balance_classes=balance, dataloader_drop_last=False)
        trainer.train_dataset = TransformedImages(data.train.select(rows), data, processor)
        drawn = Counter(label for batch in trainer.get_train_dataloader() for label in batch["labels"].tolist())
        assert sum(drawn.values()) == len(rows)
        assert (max(drawn.values()) - min(drawn.values()) <= 1) == balance
    trainer.train_dataset = [{}]
    with pytest.raises(ValueError, match="balance_classes needs TransformedImages as train_dataset"):
        trainer.get_train_dataloader()


def test_classes_that_are_balanced_already_are_all_drawn_once():
    draws = list(EpochSampler(range(12), seed=1, labels=[0, 1, 2] * 4))
    assert sorted(draw.index for draw in draws) == list(range(12))
    assert {draw.copy for draw in draws} == {0}


def test_turns_take_one_of_each_class_as_long_as_there_are_some():
    assert by_turns([3, 0, 1, 21, 20, 22], LABELS) == [3, 21, 20, 0, 22, 1]
