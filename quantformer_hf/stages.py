"""The stages of a run: each starts from what the one before it left, and can be interrupted and resumed."""

import json
import logging
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import IterableDataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    TrainingArguments,
    ViTImageProcessor,
    set_seed,
)

from .arguments import RUN_STAGES, ModelArguments, StageArguments
from .augmentation import Collator, train_transform
from .checkpointing import flush_tree, newest_checkpoint, write_durably, writing
from .checkpoints import load_full_precision
from .configuration_quantformer import QuantformerConfig
from .data import ImageData, load_image_data
from .estimate import Estimate
from .images import TransformedImages, calibration_batches, with_crop
from .layer_bits import check_same_bits
from .metrics import compute_metrics, rank_and_loss
from .mixed_precision.allocation_file import BitAllocation
from .model_card import write_model_card
from .modeling_quantformer import QuantformerForImageClassification
from .pretrained import QuantformerPreTrainedModel
from .run_history import STAGE_FILE, history_in, record_of
from .streaming import StreamedEvaluationImages, StreamedTrainingImages
from .trainer import QuantformerTrainer


logger = logging.getLogger(__name__)

#: Arguments that do not change what a stage computes: they may differ when a run is resumed.
NEUTRAL_ARGUMENTS = {
    "stages",
    "overwrite_output_dir",
    "output_dir",
    "disable_tqdm",
    "logging_steps",
    "logging_strategy",
    "report_to",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "dataloader_num_workers",
    "push_to_hub",
    "hub_model_id",
    "do_eval",
    "on_bad_image",
    # Only their product with the number of processes matters, and is compared.
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
}


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
        if arguments.data.streaming:
            # Each worker reads its own part of a stream.
            neutral = neutral - {"dataloader_num_workers"}
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
            ValueError: an earlier run left this folder with other arguments.
        """
        path = self.folder / STAGE_FILE
        if not path.exists():
            return None
        earlier = json.loads(path.read_text())
        told = json.loads(json.dumps(self.told))
        for key in sorted(earlier["arguments"].keys() | told.keys()):
            before, now = earlier["arguments"].get(key), told.get(key)
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
        return earlier["results"]

    def run(self) -> dict[str, float]:
        """Run the stage, or what is left of it, and return its results."""
        results = self.earlier_results()
        if results is not None:
            logger.info(f"the stage '{self.stage}' is complete in {self.folder}")
            return results
        self._write(None)
        arguments = self.arguments
        training = arguments.training
        training.output_dir = str(self.folder)
        set_seed(training.seed)
        data = load_image_data(arguments.data, training.seed)
        if data.train is None:
            raise ValueError(f"the data set has no split {arguments.data.train_split!r}: name one by train_split")
        results = {}
        model, teacher, processor = self._build_model(data)
        history = history_in(self.source) or getattr(model.config, "run_history", None) or []
        trainer = make_trainer(
            model,
            training,
            data,
            processor,
            teacher=teacher,
            train_dataset=images_to_train_on(data, processor, arguments),
            data_collator=Collator(
                model.config.num_labels, arguments.data.mixup, arguments.data.cutmix, training.label_smoothing_factor
            ),
        )
        trains = training.max_steps > 0 or training.num_train_epochs > 0
        if self.stage == "finetune" and trains:
            results["frozen_accuracy"] = trainer.evaluate()["eval_accuracy"]
        if teacher is not None and not is_quantized(self.source):
            metrics = make_trainer(teacher, training, data, processor).evaluate()
            results["full_precision_accuracy"] = metrics["eval_accuracy"]
        if trains:
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

    def _build_model(self, data: ImageData) -> tuple[PreTrainedModel, PreTrainedModel | None, BaseImageProcessor]:
        """The model that the stage trains, its teacher if some loss needs one or it starts there, its processor."""
        arguments = self.arguments.model
        if self.source is None and self.stage == "full_precision":
            model, processor = build_full_precision(arguments.backbone_config, data)
            return model, None, processor
        if self.source is None:
            raise ValueError(
                f"the stage '{self.stage}' starts from a checkpoint: give --model_name_or_path, or begin with an earlier"
                f" stage ({', '.join(RUN_STAGES)})"
            )
        model, processor = load_classifier(self.source, data, arguments)
        processor = with_crop(processor, self.arguments.data.crop_pct)
        quantized = isinstance(model, QuantformerPreTrainedModel)
        if quantized and self.stage in ("full_precision", "allocate", "pretrain"):
            raise ValueError(f"{self.source} is quantized already: start it at the stage search or finetune")
        if self.stage == "full_precision":
            return model, None, processor
        if quantized:
            check_same_bits(model.backbone, model.config, arguments.quantization_arguments(), self.source)
        batches = self._calibration_batches(data, processor)
        teacher = None
        if not quantized:
            # A later stage that starts here has the verbs of the earlier ones run, without their training.
            teacher = model
            model = QuantformerForImageClassification.from_full_precision(model, **arguments.quantization_arguments())
            model.calibrate(batches(), arguments.centre_channels, arguments.rotate_channels)
            if self.stage in ("search", "finetune"):
                model.begin_search()
        elif self.stage == "search":
            model.begin_search(arguments.num_groups, batches())
        if self.stage == "finetune":
            if model.config.stage == "packed":
                model.unpack()
            elif model.config.stage != "finetune":
                model.freeze_groups()
        if not quantized and self.stage != "allocate" and arguments.reconstruction_samples > 0:
            model.reconstruct(batches(samples=arguments.reconstruction_samples))
        if self.arguments.training.needs_teacher and (teacher is None or arguments.teacher_name_or_path is not None):
            teacher = self._load_teacher(model, data)
        return model, teacher, processor

    def _calibration_batches(self, data: ImageData, processor: BaseImageProcessor) -> partial:
        """A function that gives the calibration images anew at each call; `samples=` for more or fewer of them."""
        return partial(
            calibration_batches,
            data,
            processor,
            samples=self.arguments.data.calibration_samples,
            batch_size=self.arguments.training.per_device_eval_batch_size,
            seed=self.arguments.training.seed,
            on_bad_image=self.arguments.training.on_bad_image,
            balance_classes=self.arguments.training.balance_classes,
        )

    def _load_teacher(self, model: QuantformerPreTrainedModel, data: ImageData) -> PreTrainedModel:
        arguments = self.arguments.model
        name = arguments.teacher_name_or_path or model.config.full_precision_name_or_path
        if name is None:
            raise ValueError("the model does not remember its full-precision checkpoint: give --teacher_name_or_path")
        try:
            return load_classifier(name, data, replace(arguments, ignore_mismatched_sizes=False))[0]
        except OSError as error:
            raise ValueError(f"the teacher {name!r} cannot be loaded: give --teacher_name_or_path ({error})") from error

    def _write(self, results: dict[str, float] | None) -> None:
        """Write what the stage was told, and its results, in one step that cannot be left half done."""
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            if results is not None:
                # Not before the model that they belong to.
                flush_tree(self.folder)
            write_durably(self.folder / STAGE_FILE, json.dumps({"arguments": self.told, "results": results}, indent=1))
        PartialState().wait_for_everyone()


def delete_stage(output_dir: Path, stage: str) -> None:
    """Remove what an earlier run left of `stage`."""
    if PartialState().is_main_process and (output_dir / stage).exists():
        shutil.rmtree(output_dir / stage)
    PartialState().wait_for_everyone()


def load_classifier(
    name: str, data: ImageData, arguments: ModelArguments
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """An image classifier with the classes of the data set, in full precision (of any form) or quantized, and its processor.

    Raises:
        ValueError: other classes, and no leave to make a new classifier; or no image processor.
    """
    model, processor = _load(name, arguments)
    if model.config.num_labels != len(data.label_names):
        if not arguments.ignore_mismatched_sizes:
            raise ValueError(
                f"{name} has {model.config.num_labels} classes and the data set {len(data.label_names)}: give"
                f" --ignore_mismatched_sizes for a new classifier"
            )
        model, processor = _load(name, arguments, **class_names(data), ignore_mismatched_sizes=True)
    if processor is None:
        raise ValueError(f"{name} has no image processor: save one beside it, such as ViTImageProcessor(size=...)")
    return model, processor


def is_quantized(name: str) -> bool:
    """Whether `name` is a folder, or a repository of the hub, with a quantformer checkpoint."""
    path = Path(name)
    if path.exists():
        config = path / "config.json"
        return config.is_file() and json.loads(config.read_text()).get("model_type") == QuantformerConfig.model_type
    try:
        return isinstance(AutoConfig.from_pretrained(name), QuantformerConfig)
    except (OSError, ValueError):
        # No config of transformers' own: load_full_precision knows the other forms, and says what is wrong.
        return False


def _load(name: str, arguments: ModelArguments, **classes: Any) -> tuple[PreTrainedModel, BaseImageProcessor | None]:
    if is_quantized(name):
        model = AutoModelForImageClassification.from_pretrained(name, **classes)
        logger.info(f"{name}: quantformer checkpoint of the stage '{model.config.stage}'")
        return model, AutoImageProcessor.from_pretrained(name)
    checkpoint = load_full_precision(
        name,
        architecture=arguments.architecture if Path(name).is_file() else None,
        image_size=arguments.image_size,
        window_size=arguments.window_size,
        **classes,
    )
    logger.info(f"{name}: {checkpoint.form}")
    return checkpoint.model, checkpoint.processor


def build_full_precision(
    backbone_config: dict[str, Any] | None, data: ImageData
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A new classifier of `backbone_config` with the classes of the data set, and a processor for its image size."""
    if backbone_config is None:
        raise ValueError("the stage 'full_precision' needs --model_name_or_path or a backbone_config")
    config = dict(backbone_config)
    config = AutoConfig.for_model(config.pop("model_type", "vit"), **config, **class_names(data))
    # AutoModel looks for a distilling DeiT by this field, and stumbles where it is None.
    config.architectures = []
    size = config.image_size
    processor = ViTImageProcessor(size={"height": size, "width": size})
    return AutoModelForImageClassification.from_config(config), processor


def class_names(data: ImageData) -> dict[str, dict]:
    """`id2label` and `label2id` of the data set."""
    return {
        "id2label": dict(enumerate(data.label_names)),
        "label2id": {name: index for index, name in enumerate(data.label_names)},
    }


def make_trainer(
    model: PreTrainedModel,
    training,
    data: ImageData,
    processor: BaseImageProcessor,
    kind: type[QuantformerTrainer] = QuantformerTrainer,
    **kwargs,
) -> QuantformerTrainer:
    """A trainer of the class `kind` that evaluates on `data.validation`."""
    kwargs.setdefault("data_collator", Collator(model.config.num_labels))
    return kind(
        model=model,
        args=training,
        eval_dataset=images_to_evaluate(data, processor, training),
        processing_class=processor,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=rank_and_loss,
        **kwargs,
    )


def images_to_train_on(
    data: ImageData, processor: BaseImageProcessor, arguments: StageArguments
) -> TransformedImages | StreamedTrainingImages:
    """The training images of `data`, augmented."""
    training, augment = arguments.training, train_transform(processor, arguments.data)
    if not isinstance(data.train, IterableDataset):
        return TransformedImages(data.train, data, processor, augment, training.seed)
    return StreamedTrainingImages(
        data,
        augment,
        training.seed,
        batch_size=training.train_batch_size,
        num_processes=training.world_size,
        process_index=training.process_index,
    )


def images_to_evaluate(
    data: ImageData, processor: BaseImageProcessor, training: TrainingArguments
) -> TransformedImages | StreamedEvaluationImages:
    """The validation images of `data`, as at inference."""
    if not isinstance(data.validation, IterableDataset):
        return TransformedImages(data.validation, data, processor)
    return StreamedEvaluationImages(
        data,
        processor,
        batch_size=training.eval_batch_size,
        num_processes=training.world_size,
        process_index=training.process_index,
    )
