"""Images a second: this package's data loader, its streamed one, and timm's on the same files, alone and with a step.

    python benchmarks/data_throughput.py [--shared ../shared] [--images 512] [--workers 1 2 4] [--rounds 3]

JPEG files of Imagenette, written to a temporary folder as `train/<class>/<file>`, go through DeiT's augmentation at 224 px
(random crop, flip, RandAugment, random erasing; no mixup). The step is forward and backward of a quantized DeiT-Tiny in the
main process. Loaders run in turn: alone once to warm up and then `--rounds` times, of which medians are printed, and with a
step once, for `--steps` batches or an epoch.
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _arguments import SHARED, positive, shared_folder
from _machine import describe_machine
from datasets import Image, load_dataset
from timm.data import create_loader
from timm.data.dataset import ImageDataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.augmentation import Collator, train_transform
from quantformer_hf.data import DataArguments, load_image_data
from quantformer_hf.images import TransformedImages
from quantformer_hf.report import format_table
from quantformer_hf.sampling import EpochSampler
from quantformer_hf.streaming import StreamedTrainingImages


SIZE = 224
AUGMENTATION = {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25}
PROCESSOR = ViTImageProcessor(size={"height": SIZE, "width": SIZE})


def write_files(shared: Path, folder: Path, images: int) -> None:
    """The first `images` training images of Imagenette as JPEG files, and one to evaluate on."""
    source = load_dataset(str(shared / "data" / "imagenette"), split="train").shuffle(seed=0).select(range(images))
    image_column = next(name for name, feature in source.features.items() if isinstance(feature, Image))
    label_column = next(name for name in source.features if name != image_column)
    names = source.features[label_column].names
    for number, row in enumerate(source):
        for split in ("train", "val") if number == 0 else ("train",):
            path = folder / split / names[row[label_column]].replace("/", "_") / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            row[image_column].convert("RGB").save(path, quality=90)


def our_loader(folder: Path, batch_size: int, workers: int, streaming: bool) -> DataLoader:
    told = DataArguments(dataset_dir=str(folder), streaming=streaming, shuffle_buffer_size=64, **AUGMENTATION)
    data = load_image_data(told, seed=0)
    augment = train_transform(PROCESSOR, told)
    if streaming:
        data.train_samples = len(list((folder / "train").glob("*/*")))
        images = StreamedTrainingImages(data, augment, seed=0, batch_size=batch_size, num_processes=1, process_index=0)
        sampler = None
    else:
        images = TransformedImages(data.train, data, PROCESSOR, augment)
        sampler = EpochSampler(images, seed=0)
    collate = Collator(len(data.label_names))
    return DataLoader(images, batch_size, sampler=sampler, num_workers=workers, collate_fn=collate, drop_last=True)


def timm_loader(folder: Path, batch_size: int, workers: int) -> DataLoader:
    return create_loader(
        ImageDataset(str(folder / "train")),
        input_size=(3, SIZE, SIZE),
        batch_size=batch_size,
        is_training=True,
        # Normalised in the workers, as ours.
        use_prefetcher=False,
        hflip=0.5,
        auto_augment=AUGMENTATION["auto_augment"],
        re_prob=AUGMENTATION["random_erasing"],
        re_mode="pixel",
        color_jitter=None,
        interpolation="bicubic",
        num_workers=workers,
        persistent_workers=False,
        pin_memory=False,
    )


def training_step(device: str) -> Callable[[Tensor, Tensor], None]:
    config = ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, num_labels=10
    )
    model = QuantformerForImageClassification.from_full_precision(ViTForImageClassification(config), bit_width=4)
    model.calibrate([torch.randn(2, 3, SIZE, SIZE)]).to(device).train()

    def step(pixel_values: Tensor, labels: Tensor) -> None:
        model(pixel_values=pixel_values.to(device), labels=labels.to(device)).loss.backward()
        model.zero_grad()
        if device != "cpu":
            torch.cuda.synchronize()

    return step


def images_a_second(loader: DataLoader, step: Callable[[Tensor, Tensor], None] | None, batches: int) -> float:
    """Over an epoch or `batches` batches, with the start of the workers."""
    start, images = time.perf_counter(), 0
    for number, batch in enumerate(loader):
        pixel_values, labels = (batch["pixel_values"], batch["labels"]) if isinstance(batch, dict) else batch
        images += len(labels)
        if step is not None:
            step(pixel_values, labels)
        if number + 1 == batches:
            break
    return images / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=shared_folder, default=SHARED)
    parser.add_argument("--images", type=positive, default=512)
    parser.add_argument("--batch_size", type=positive, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=positive, default=3, help="of the loader alone")
    parser.add_argument("--steps", type=positive, default=8, help="batches of the loader with a training step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.images < arguments.batch_size:
        parser.error(
            f"--images {arguments.images} make no batch of --batch_size {arguments.batch_size}: give as many or more"
        )
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(arguments.shared, folder, arguments.images)
        loaders = {
            "this package": partial(our_loader, streaming=False),
            "this package, streamed": partial(our_loader, streaming=True),
            "timm": timm_loader,
        }
        step = training_step(arguments.device)
        # The compiler's time is not the loader's.
        step(torch.randn(arguments.batch_size, 3, SIZE, SIZE), torch.zeros(arguments.batch_size, dtype=torch.int64))
        rows = []
        # Alone one round more: the first fills the system's file cache.
        for kind, run, batches, rounds in (
            ("loader alone", None, -1, arguments.rounds + 1),
            ("with a training step", step, arguments.steps, 1),
        ):
            for workers in arguments.workers:
                made = {label: make(folder, arguments.batch_size, workers) for label, make in loaders.items()}
                speeds = {label: [] for label in made}
                for _ in range(rounds):
                    for label, loader in made.items():
                        speeds[label].append(images_a_second(loader, run, batches))
                medians = {label: statistics.median(values[-arguments.rounds :]) for label, values in speeds.items()}
                rows.append([f"{kind}, {workers} workers", *(f"{medians[label]:.0f}" for label in loaders)])
    print(f"{describe_machine()}\n{arguments.images} images, batch {arguments.batch_size};", end=" ")
    print(f"alone: medians of {arguments.rounds} rounds, with a step: {arguments.steps} batches, once\n")
    print(format_table(["images a second", *loaders], rows))


if __name__ == "__main__":
    main()
