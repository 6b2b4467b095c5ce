"""The stages of a run: each starts from what the one before it left, and can be interrupted and resumed."""

import functools
import hashlib
import json
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import BaseImageProcessor, PreTrainedModel, set_seed

from .arguments import PUSH_ARGUMENTS, SEARCH_ARGUMENTS, StageArguments, defaults
from .checkpointing import flush_tree, newest_checkpoint, write_durably, writing
from .classifiers import build_full_precision, is_quantized, load_classifier
from .configuration_quantformer import QUANTIZATION_ARGUMENTS, QuantformerConfig
from .data import ImageData, load_image_data
from .estimate import Estimate
from .images import calibration_batches, with_crop
from .layer_bits import check_same_quantization
from .mixed_precision.allocation_file import BitAllocation
from .model_card import write_model_card
from .modeling_quantformer import QuantformerForImageClassification
from .pretrained import QuantformerPreTrainedModel
from .run_history import STAGE_FILE, history_in, is_local, read_stage_file, record_of
from .stage_folders import PACKED_FOLDER, READ_PATHS, delete_folder
from .stage_start import StageStart
from .stage_trainer import evaluating_trainer, training_trainer
from .teachers import check_image_size, check_teacher, renormalize
from .trainer import QuantformerTrainer


logger = logging.getLogger(__name__)

#: Arguments that do not change what a stage computes: they may differ when a run is resumed.
NEUTRAL_ARGUMENTS = {
    "stages",
    "overwrite_output_dir",
    "output_dir",
    # What counts is the checkpoint that the stage itself starts from.
    "model_name_or_path",
    "disable_tqdm",
    "logging_steps",
    "logging_strategy",
    "report_to",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "dataloader_num_workers",
    "run_name",
    "do_eval",
    "on_bad_image",
    # Only their product with the number of processes matters, and is compared.
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    *PUSH_ARGUMENTS,
}


#: How a model in full precision becomes a quantized one, beside `QUANTIZATION_ARGUMENTS`.
CALIBRATION_ARGUMENTS = ("calibration_samples", "reconstruction_samples", "centre_channels", "rotate_channels")


class Built(NamedTuple):
    """What a stage works with.

    Attributes:
        model: what it trains.
        processor: of the images, also of those that the teacher sees.
        data: the images, their classes numbered as the model's.
        teacher: where the stage starts in full precision, or some loss needs one.
        full_precision: what a quantized model was made of.
        is_start: whether the model was kept by an earlier run of the stage.
    """

    model: PreTrainedModel
    processor: BaseImageProcessor
    data: ImageData
    teacher: PreTrainedModel | None = None
    full_precision: PreTrainedModel | None = None
    is_start: bool = False


class StageRun:
    """One stage of a run in its folder, `<output_dir>/<stage>`.

    Args:
        arguments: what the stage is told.
        source: checkpoint that it starts from; None to build a new full-precision model.
        output_dir: of the whole run.
    """

    def __init__(self, arguments: StageArguments, source: str | None, output_dir: Path):
        self.arguments = arguments
        self.stage = arguments.stage
        self.source = source
        self.folder = output_dir / self.stage
        neutral = NEUTRAL_ARGUMENTS
        if self.stage == "full_precision":
            # What comes after it may be told otherwise.
            neutral = neutral | {*QUANTIZATION_ARGUMENTS, *CALIBRATION_ARGUMENTS}
        if self.stage != "search":
            neutral = neutral | SEARCH_ARGUMENTS
        if arguments.data.streaming:
            # Each worker reads its own part of a stream.
            neutral = neutral - {"dataloader_num_workers"}
        self._neutral = neutral
        self.told = {k: v for k, v in arguments.given.items() if k not in neutral} | {"source": source}
        if isinstance(arguments.model.layer_bits, str):
            # Another allocation in a file of the same name is another run.
            self.told["layer_bits"] = BitAllocation.read(arguments.model.layer_bits).layer_bits
        training = arguments.training
        self.told["global_batch"] = (
            training.train_batch_size * training.gradient_accumulation_steps * training.world_size
        )

    def earlier_results(self) -> dict[str, float] | None:
        """Results of this stage if an earlier run has completed it, else None.

        Raises:
            ValueError: an earlier run left this folder with other arguments, or from what is no longer there.
        """
        path = self.folder / STAGE_FILE
        if self.arguments.model.overwrite_output_dir or not path.exists():
            return None
        earlier = read_stage_file(path)
        if earlier["results"] is None and newest_checkpoint(self.folder) is None:
            # It came to nothing that another command could spoil.
            return None
        # What is said by one alone, such as what a preset gained since, may be what the other did without saying it.
        unsaid = defaults()
        told = json.loads(json.dumps(self.told))
        # What has become neutral since may still be written there.
        for key in sorted((earlier["arguments"].keys() | told.keys()) - self._neutral):
            before, now = (_plainly(key, said.get(key, unsaid.get(key))) for said in (earlier["arguments"], told))
            if key == "global_batch" and before == now * (1 + self.arguments.training.unused_gpus):
                # As it was counted while GPUs that nobody used counted.
                continue
            if before != now and key == "global_batch":
                raise ValueError(
                    f"{self.folder} holds the stage '{self.stage}' of a run with {before} images a step, and this one has"
                    f" {now}: choose --per_device_train_batch_size and --gradient_accumulation_steps so that their product"
                    f" with the number of processes ({self.arguments.training.world_size}) is {before}, or another"
                    f" --output_dir, or --overwrite_output_dir to delete it"
                )
            if before != now:
                raise ValueError(
                    f"{self.folder} holds the stage '{self.stage}' of a run with {key}={before!r}, and this one has"
                    f" {now!r}: choose another --output_dir, or --overwrite_output_dir to delete it"
                )
        if earlier.get("source_digest") not in (None, self._source_digest()):
            raise ValueError(
                f"{self.folder} was made from {self.source}, which was made anew since: choose another --output_dir, or"
                f" --overwrite_output_dir to delete what came of the old one"
            )
        return earlier["results"]

    @functools.cached_property
    def _start(self) -> StageStart:
        return StageStart(self.folder, self.told | {"source_digest": self._source_digest()})

    def _source_digest(self) -> str | None:
        """Of what the stage that made the source was told, and what came out; None where no stage did."""
        path = None if self.source is None else Path(self.source) / STAGE_FILE
        return hashlib.sha256(path.read_bytes()).hexdigest() if path is not None and path.is_file() else None

    def run(self) -> dict[str, float]:
        """Run the stage, or what is left of it, and return its results."""
        results = self.earlier_results()
        if results is not None:
            logger.info(f"the stage '{self.stage}' is complete in {self.folder}")
            return results
        arguments = self.arguments
        training = arguments.training
        training.output_dir = str(self.folder)
        set_seed(training.seed)
        data = load_image_data(arguments.data, training.seed)
        if data.train is None:
            raise ValueError(f"the data set has no split {arguments.data.train_split!r}: name one by train_split")
        model, processor, data, teacher, full_precision, is_start = self._build_model(data)
        self._begin()
        history = history_in(self.source) or getattr(model.config, "run_history", None) or []
        results = self._start.results() if is_start else {}
        if isinstance(model, QuantformerPreTrainedModel) and arguments.trains and not is_start:
            self._start.save(model)
        trainer = training_trainer(model, arguments, data, processor, teacher=teacher)
        if self.stage == "finetune" and arguments.trains and "frozen_accuracy" not in results:
            results["frozen_accuracy"] = trainer.evaluate()["eval_accuracy"]
        if full_precision is not None and "full_precision_accuracy" not in results:
            metrics = evaluating_trainer(full_precision, training, data, processor).evaluate()
            results["full_precision_accuracy"] = metrics["eval_accuracy"]
        if arguments.trains:
            self._start.keep_results(results)
            self._announce(trainer, teacher)
            # One process decides: another node's view of the folder may be older.
            checkpoint = broadcast_object_list([newest_checkpoint(self.folder)])[0]
            train_result = trainer.train(resume_from_checkpoint=checkpoint)
            trainer.save_metrics("train", train_result.metrics)
        metrics = trainer.evaluate()
        results[f"{self.stage}_accuracy"] = metrics["eval_accuracy"]
        history = [*history, record_of(self.stage, self.told, results)]
        if isinstance(model, QuantformerPreTrainedModel):
            model.config.run_history = history
        with writing(f"the model of the stage '{self.stage}'", self.folder):
            trainer.save_metrics("eval", metrics)
            trainer.save_model()
            if not isinstance(model, QuantformerPreTrainedModel) and PartialState().is_main_process:
                write_model_card(self.folder, model.config, history)
            trainer.save_state()
            if PartialState().is_main_process:
                self._start.remove()
            self._write(results)
        return results

    def _announce(self, trainer: QuantformerTrainer, teacher: PreTrainedModel | None) -> None:
        """Say, and write to `estimate.json`, what the training will take."""
        training = self.arguments.training
        estimate = Estimate.of(
            trainer.model,
            teacher,
            images_per_epoch=trainer.images_per_epoch(),
            global_batch=self.told["global_batch"],
            epochs=training.num_train_epochs,
            max_steps=training.max_steps,
        )
        logger.info(f"{self.stage}: {estimate}")
        if PartialState().is_main_process:
            write_durably(self.folder / "estimate.json", json.dumps(asdict(estimate), indent=1))

    def _build_model(self, data: ImageData) -> Built:
        arguments = self.arguments.model
        if self.source is None and self.stage == "full_precision":
            return Built(*build_full_precision(arguments.backbone_config, data), data)
        if self.source is None:
            raise ValueError(
                f"the stage '{self.stage}' starts from a checkpoint: give --model_name_or_path, or put the stage"
                f" 'full_precision' before it"
            )
        may_be_new = arguments.ignore_mismatched_sizes and self.arguments.trains_classifier(is_quantized(self.source))
        told = replace(arguments, ignore_mismatched_sizes=may_be_new)
        model, processor, data = load_classifier(self.source, data, told)
        processor = with_crop(processor, self.arguments.data.crop_pct)
        quantized = isinstance(model, QuantformerPreTrainedModel)
        if quantized:
            self._check_follows(model.config)
            check_same_quantization(model.backbone, model.config, self.arguments.typed_quantization(), self.source)
        if self.stage == "full_precision":
            return Built(model, processor, data)
        full_precision = None if quantized else model
        teacher = full_precision
        if self.arguments.training.needs_teacher:
            if teacher is None or arguments.teacher_name_or_path is not None:
                teacher = self._load_teacher(model, data, processor)
            # Before what takes minutes.
            check_teacher(model, teacher, self.arguments.training)
        start = self._start.load() if self.arguments.trains and not arguments.overwrite_output_dir else None
        model = start or self._quantized(model, self._calibration_batches(data, processor))
        return Built(model, processor, data, teacher, full_precision, is_start=start is not None)

    def _quantized(self, model: PreTrainedModel, batches: functools.partial) -> QuantformerPreTrainedModel:
        """What the stage trains, of a model in full precision or of an earlier stage.

        Where it starts at a later stage than `model` is, the verbs of those between are run, without their training.
        """
        arguments = self.arguments.model
        quantized = isinstance(model, QuantformerPreTrainedModel)
        if not quantized:
            model = QuantformerForImageClassification.from_full_precision(model, **arguments.quantization_arguments())
            rotate_channels = arguments.rotate_channels
            if rotate_channels is None and self.stage == "allocate":
                # What comes of it has several widths, whatever the model has now.
                rotate_channels = True
            model.calibrate(batches(), arguments.centre_channels, rotate_channels)
            if self.stage in ("search", "finetune"):
                model.begin_search()
        elif model.config.stage == "pretrain":
            if arguments.twin_levels is not None:
                model.config.twin_levels = arguments.twin_levels
            model.begin_search(arguments.num_groups, batches())
        if self.stage == "finetune":
            if model.config.stage == "packed":
                model.unpack()
            elif model.config.stage != "finetune":
                model.freeze_groups()
        if not quantized and self.stage != "allocate" and arguments.reconstruction_samples > 0:
            model.reconstruct(batches(samples=arguments.reconstruction_samples))
        return model

    def _check_follows(self, config: QuantformerConfig) -> None:
        """Raise ValueError where a model that is quantized already cannot go through this stage, or not as told."""
        fitting = ("search", "finetune") if config.stage == "pretrain" else ("finetune",)
        if self.stage not in fitting:
            raise ValueError(
                f"{self.source} is quantized already, in the stage '{config.stage}': start it at {' or '.join(fitting)}"
            )
        told = self.arguments.model
        starts_here = self.source == told.model_name_or_path
        if starts_here and "reconstruction_samples" in self.arguments.typed and told.reconstruction_samples > 0:
            raise ValueError(
                f"reconstruction_samples is {told.reconstruction_samples}, and {self.source} is quantized already: weights"
                f" are refitted on the way from full precision; leave it out, or start there"
            )
        if starts_here and told.rotate_channels not in (None, config.channels_rotated):
            raise ValueError(
                f"rotate_channels is {told.rotate_channels}, and those of {self.source} are"
                f"{'' if config.channels_rotated else ' not'} rotated: leave it out, or start from full precision"
            )

    def _calibration_batches(self, data: ImageData, processor: BaseImageProcessor) -> functools.partial:
        """A function that gives the calibration images anew at each call; `samples=` for more or fewer of them."""
        return functools.partial(
            calibration_batches,
            data,
            processor,
            samples=self.arguments.data.calibration_samples,
            batch_size=self.arguments.training.per_device_eval_batch_size,
            seed=self.arguments.training.seed,
            on_bad_image=self.arguments.training.on_bad_image,
            balance_classes=self.arguments.training.balance_classes,
        )

    def _load_teacher(
        self, model: QuantformerPreTrainedModel, data: ImageData, processor: BaseImageProcessor
    ) -> PreTrainedModel:
        """The full-precision model to learn from, which takes images that are normalized by `processor`."""
        arguments = self.arguments.model
        name = arguments.teacher_name_or_path or model.config.full_precision_name_or_path
        if name is None:
            raise ValueError("the model does not remember its full-precision checkpoint: give --teacher_name_or_path")
        try:
            told = replace(arguments, ignore_mismatched_sizes=False)
            teacher, own, numbered = load_classifier(name, data, told)
        except OSError as error:
            raise ValueError(f"the teacher {name!r} cannot be loaded: give --teacher_name_or_path ({error})") from error
        if numbered is not data:
            raise ValueError(
                f"the teacher {name!r} has the classes of the model in another order, or more of them: give one of the same"
                f" classes by --teacher_name_or_path"
            )
        check_image_size(model, teacher)
        renormalize(teacher, processor, own)
        return teacher

    def _begin(self) -> None:
        """Take the folder, from which what an earlier run left is deleted where that is asked for."""
        if self.arguments.model.overwrite_output_dir:
            delete_folder(self.folder)
            if self.stage == "finetune":
                delete_folder(self.folder.with_name(PACKED_FOLDER))
        self._write(None)

    def _write(self, results: dict[str, float] | None) -> None:
        """Write what the stage was told, and its results, in one step that cannot be left half done."""
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            if results is not None:
                # Not before the model that they belong to.
                flush_tree(self.folder)
            written = {"arguments": self.told, "results": results, "source_digest": self._source_digest()}
            written["local_source"] = is_local(self.source)
            write_durably(self.folder / STAGE_FILE, json.dumps(written, indent=1))
        PartialState().wait_for_everyone()


def _plainly(name: str, value: Any) -> Any:
    """A value as any other way to type the same gives it."""
    if name in READ_PATHS and isinstance(value, str):
        return json.loads(value) if value.lstrip().startswith("{") else os.path.normpath(value)
    return value
