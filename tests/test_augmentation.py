"""Augmentation by timm's parts, and random numbers that follow from the draw."""

import pytest
import torch
from PIL import Image as PILImage
from timm.data.auto_augment import AugmentOp
from transformers import ViTImageProcessor

from quantformer_hf.augmentation import Collator, random_numbers_of, train_transform
from quantformer_hf.data import DataArguments, load_image_data
from quantformer_hf.images import TransformedImages
from quantformer_hf.sampling import Draw


PROCESSOR = ViTImageProcessor(size={"height": 16, "width": 16})


def augmented_digits(seed=0, **arguments):
    arguments = DataArguments(dataset_name="digits", max_train_samples=6, **arguments)
    data = load_image_data(arguments, seed=0)
    return TransformedImages(data.train, data, PROCESSOR, train_transform(PROCESSOR, arguments), seed=seed)


def rows(count, draws=True):
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        row = {"pixel_values": torch.rand(3, 8, 8, generator=generator), "labels": i % 4}
        made.append(row | {"draw": (0, 0, i, 0)} if draws else row)
    return made


def test_seed_epoch_index_and_copy_decide_and_nobody_elses_random_numbers_are_used_up():
    images = augmented_digits()
    state = torch.get_rng_state()
    first = images[Draw(0)]["pixel_values"]
    assert first.shape == (3, 16, 16)
    assert torch.equal(first, images[0]["pixel_values"])
    assert torch.equal(state, torch.get_rng_state())
    for other in (images[Draw(0, epoch=1)], images[Draw(0, copy=1)], augmented_digits(seed=1)[0]):
        assert not torch.equal(first, other["pixel_values"])


def test_every_part_of_deits_recipe_changes_the_image():
    plain = {"crop_scale": 1.0, "crop_ratio": 1.0, "horizontal_flip": 0.0}
    without = augmented_digits(**plain)[0]["pixel_values"]
    for part in ({"auto_augment": "rand-m9-mstd0.5-inc1"}, {"random_erasing": 1.0}, {"color_jitter": 0.3}):
        assert not torch.equal(augmented_digits(**plain, **part)[0]["pixel_values"], without), part


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 0.25},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    ],
)
def test_training_and_evaluation_see_the_same_range(options):
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, **options)
    image = PILImage.new("RGB", (16, 16), (250, 100, 3))
    trained_on = train_transform(processor, DataArguments("digits"))(image, (0,))
    evaluated = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(trained_on, evaluated)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"image_mean": None}, {}, "ViTImageProcessor normalizes by image_mean None"),
        ({"do_flip_channel_order": True}, {}, "has do_flip_channel_order"),
        ({"do_rescale": False, "do_normalize": False}, {}, "leaves pixels as bytes"),
        ({"do_normalize": False}, {"random_erasing": 0.25}, "random_erasing is 0.25, .* does not normalize"),
    ],
)
def test_a_range_that_training_images_cannot_have_is_refused(options, arguments, message):
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, **options)
    with pytest.raises(ValueError, match=message):
        train_transform(processor, DataArguments("digits", **arguments))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("count", [1, 4, 5])
def test_mixed_targets_are_distributions_that_follow_from_the_draw(mixup, cutmix, count):
    collate = Collator(4, mixup, cutmix, label_smoothing=0.1)
    state = torch.get_rng_state()
    batch = collate(rows(count))
    assert torch.equal(state, torch.get_rng_state())
    assert batch["labels"].shape == (count, 4)
    assert torch.allclose(batch["labels"].sum(1), torch.ones(count))
    assert batch["labels"].min() >= 0.1 / 4 - 1e-6
    again = collate(rows(count))
    assert torch.equal(batch["pixel_values"], again["pixel_values"])
    assert torch.equal(batch["labels"], again["labels"])
    plain = torch.stack([row["pixel_values"] for row in rows(count)])
    assert torch.equal(batch["pixel_values"], plain) == (count == 1)
    # The last image of an odd batch has nothing to be mixed with.
    if count % 2:
        assert torch.equal(batch["pixel_values"][-1], plain[-1])
        assert batch["labels"][-1].max().item() == pytest.approx(0.9 + 0.1 / 4)


def test_images_that_are_evaluated_are_not_mixed():
    batch = Collator(4, mixup=0.8)(rows(4, draws=False))
    assert batch["labels"].tolist() == [0, 1, 2, 3]


def test_a_batch_of_one_seed_is_not_mixed_as_that_of_another():
    collate = Collator(4, mixup=0.8)
    other = [row | {"draw": (1, *row["draw"][1:])} for row in rows(4)]
    assert not torch.equal(collate(rows(4))["labels"], collate(other)["labels"])


def test_a_label_outside_the_classes_is_named_before_it_reaches_the_device():
    made = [{"pixel_values": torch.zeros(3, 2, 2), "labels": label} for label in (0, 11)]
    with pytest.raises(ValueError, match=r"label 11 is outside 0\.\.9"):
        Collator(10)(made)
    assert Collator(12)(made)["labels"].tolist() == [0, 11]
    made[1]["labels"] = -1
    with pytest.raises(ValueError, match=r"label -1 is outside 0\.\.9: the image has no class, and has to be left out"):
        Collator(10)(made)


def test_a_key_may_end_in_zeros():
    # numpy pads with zeros: a draw of the copy 0 has the numbers that it has without a copy.
    with random_numbers_of(1, 2, 3):
        short = torch.rand(1)
    with random_numbers_of(1, 2, 3, 0):
        assert torch.equal(short, torch.rand(1))


def test_the_greatest_magnitude_of_posterize_is_no_error():
    image = PILImage.new("RGB", (2, 2), (200, 100, 50))
    black = AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)(image)
    assert black.getextrema() == ((0, 0),) * 3
    one_bit = AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=9)(image)
    assert one_bit.getextrema() == ((128, 128), (0, 0), (0, 0))
