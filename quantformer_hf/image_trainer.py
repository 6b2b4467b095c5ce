"""`ImageTrainer`: what a transformers Trainer has to know of this package's data, and of averaged weights."""

import contextlib
import os
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, Trainer
from transformers.integrations import TensorBoardCallback

from .bad_images import BadImageTally
from .callbacks import EpochCallback
from .ema import EmaCallback
from .images import TransformedImages
from .labels import IGNORED_LABEL
from .sampling import EpochSampler
from .streaming import StreamedImages, StreamedTrainingImages, stream_loader
from .training_args import QuantformerTrainingArguments


class ImageTrainer(Trainer):
    """A `transformers.Trainer` that draws images by `EpochSampler`, reads streams, and judges bad images.

    Args:
        kwargs: as for `transformers.Trainer`; `args` is a `QuantformerTrainingArguments`. Data sets of other kinds than
            `TransformedImages` and `StreamedImages` are treated as Trainer does.

    Raises:
        ValueError: `ema_decay` where processes do not hold whole weights.
    """

    args: QuantformerTrainingArguments

    def __init__(self, model: PreTrainedModel, args: QuantformerTrainingArguments, **kwargs):
        super().__init__(model=model, args=args, **kwargs)
        self._model_takes_labels = "labels" in self.label_names
        self.label_names = ["labels"]
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                # Trainer says so only when training begins: an evaluation by itself would write to `./runs`.
                callback.logging_dir = os.path.join(args.output_dir, "runs")
        self._ema = None
        if args.ema_decay > 0:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("ema_decay needs whole weights in each process: leave it out with FSDP and DeepSpeed")
            self._ema = EmaCallback(args.ema_decay)
            self.add_callback(self._ema)
        self.add_callback(EpochCallback(self._begin_epoch, self._end_epoch))
        self._train_sampler: EpochSampler | None = None
        self._train_tally = BadImageTally("training images", args.on_bad_image, self.images_per_epoch())
        self._eval_tally = BadImageTally("evaluation images", args.on_bad_image)

    def images_per_epoch(self) -> int | None:
        """Training images that an epoch counts; None for data sets of other kinds than this package's."""
        if isinstance(self.train_dataset, StreamedTrainingImages):
            return self.train_dataset.samples
        return len(self.train_dataset) if isinstance(self.train_dataset, TransformedImages) else None

    def get_train_dataloader(self) -> DataLoader:
        if not isinstance(self.train_dataset, StreamedImages):
            return super().get_train_dataloader()
        for name, wanted in self._draws_at_will():
            if wanted:
                raise ValueError(f"{name} draws images at will, which a stream cannot: leave out one of both")
        # Trainer may have found a smaller one (auto_find_batch_size).
        self.train_dataset.batch_size = self._train_batch_size
        return stream_loader(self.train_dataset, self.data_collator, self.args)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        images = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(images, StreamedImages):
            return super().get_eval_dataloader(eval_dataset)
        return stream_loader(images, self.data_collator, self.args)

    def num_examples(self, dataloader: DataLoader) -> int:
        if isinstance(dataloader.dataset, StreamedTrainingImages):
            return len(dataloader.dataset) * dataloader.dataset.num_processes
        return super().num_examples(dataloader)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        images = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(images, TransformedImages):
            for name, wanted in self._draws_at_will():
                if wanted:
                    raise ValueError(f"{name} needs TransformedImages as train_dataset")
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._train_sampler = EpochSampler(
            images,
            seed,
            self.args.repeated_augmentation,
            self._train_batch_size,
            self.args.world_size,
            images.labels if self.args.balance_classes else None,
        )
        return self._train_sampler

    def _draws_at_will(self) -> list[tuple[str, bool]]:
        """What asks for more than one draw of each image an epoch, and whether it does."""
        return [
            ("repeated_augmentation", self.args.repeated_augmentation > 1),
            ("balance_classes", self.args.balance_classes),
        ]

    def _begin_epoch(self, epoch: int) -> None:
        # accelerate does so as well, but not on several processes after a resume within an epoch.
        if self._train_sampler is not None:
            self._train_sampler.set_epoch(epoch)

    def _end_epoch(self) -> None:
        self._train_tally.finish()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As in Trainer; what the loader says of bad images goes to the tally, not to the model."""
        bad_images = inputs.pop("bad_images", ())
        if "labels" in inputs:
            if self.model.training:
                self._train_tally.add(len(inputs["labels"]), bad_images)
            else:
                # Rows without a label are bad images, or fill up a batch of a stream.
                labelled = len(inputs["labels"]) - (inputs["labels"] == IGNORED_LABEL).sum().item()
                self._eval_tally.add(labelled + len(bad_images), bad_images)
        return super()._prepare_inputs(inputs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As in Trainer, of the averaged weights if there are any; `eval_skipped_images` are those that are bad."""
        with self._ema.applied(self.model) if self._ema is not None else contextlib.nullcontext():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics[f"{metric_key_prefix}_skipped_images"] = self._eval_tally.finish()
        return output

    # Checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As in Trainer, with the averaged weights: before the file that says that the checkpoint is whole."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self._ema is not None and self.args.should_save:
            self._ema.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._ema is not None and checkpoint is not None:
            self._ema.load(checkpoint, self.model)
