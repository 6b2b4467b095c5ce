"""The stages of a run: each starts from what the one before it left, and can be interrupted and resumed."""

import json
import logging
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    ViTImageProcessor,
    set_seed,
)

from .arguments import RUN_STAGES, StageArguments
from .data import ImageData, calibration_batches, collate, load_image_data, train_transform, with_pixel_values
from .metrics import compute_metrics, most_probable_classes
from .modeling_quantformer import QuantformerForImageClassification, QuantformerPreTrainedModel
from .trainer import QuantformerTrainer


logger = logging.getLogger(__name__)

#: In each stage's folder: what the stage was told, and what came out once it is complete.
STAGE_FILE = "stage.json"

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
        self.told = {k: v for k, v in arguments.given.items() if k not in NEUTRAL_ARGUMENTS} | {"source": source}

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
        processor = load_processor(self.source, arguments.model.backbone_config)
        results = {}
        model, teacher = self._build_model(data, processor, results)
        trainer = make_trainer(
            model,
            training,
            data,
            processor,
            teacher=teacher,
            train_dataset=with_pixel_values(data.train, data, processor, train_transform(processor, arguments.data)),
        )
        if self.stage == "finetune":
            results["frozen_accuracy"] = accuracy(trainer)
        if self.stage == "pretrain" and teacher is not None:
            results["full_precision_accuracy"] = accuracy(make_trainer(teacher, training, data, processor))
        train_result = trainer.train(resume_from_checkpoint=newest_checkpoint(self.folder))
        results[f"{self.stage}_accuracy"] = accuracy(trainer)
        trainer.save_model()
        trainer.save_state()
        trainer.save_metrics("train", train_result.metrics)
        self._write(results)
        return results

    def _build_model(
        self, data: ImageData, processor: BaseImageProcessor, results: dict[str, float]
    ) -> tuple[PreTrainedModel, PreTrainedModel | None]:
        """The model that the stage trains, and its teacher if some loss needs one (or pretrain its accuracy)."""
        arguments = self.arguments.model
        if self.stage == "full_precision":
            return build_full_precision(self.source, arguments.backbone_config, data, arguments), None
        batches = partial(
            calibration_batches,
            data,
            processor,
            self.arguments.data.calibration_samples,
            self.arguments.training.per_device_eval_batch_size,
            self.arguments.training.seed,
        )
        if self.source is None:
            raise ValueError(
                f"the stage '{self.stage}' starts from a checkpoint: give --model_name_or_path, or begin with an earlier"
                f" stage ({', '.join(RUN_STAGES)})"
            )
        if self.stage == "pretrain":
            full_precision = load_classifier(self.source, data, arguments.ignore_mismatched_sizes)
            if isinstance(full_precision, QuantformerPreTrainedModel):
                raise ValueError(f"{self.source} is quantized already: start it at the stage search or finetune")
            model = QuantformerForImageClassification.from_full_precision(
                full_precision, **arguments.quantization_arguments()
            )
            model.calibrate(batches())
            teacher = full_precision
        else:
            model = AutoModelForImageClassification.from_pretrained(self.source)
            if not isinstance(model, QuantformerPreTrainedModel):
                raise ValueError(f"{self.source} is in full precision: begin with the stage pretrain")
            teacher = None
        if self.stage == "search":
            model.begin_search(arguments.num_groups, batches())
        if self.stage == "finetune":
            model.freeze_groups()
        if teacher is None or arguments.teacher_name_or_path is not None:
            teacher = self._load_teacher(model, data) if self.arguments.training.needs_teacher else None
        return model, teacher

    def _load_teacher(self, model: QuantformerPreTrainedModel, data: ImageData) -> PreTrainedModel:
        name = self.arguments.model.teacher_name_or_path or model.config.full_precision_name_or_path
        if name is None:
            raise ValueError("the model does not remember its full-precision checkpoint: give --teacher_name_or_path")
        try:
            return load_classifier(name, data, ignore_mismatched_sizes=False)
        except OSError as error:
            raise ValueError(f"the teacher {name!r} cannot be loaded: give --teacher_name_or_path ({error})") from error

    def _write(self, results: dict[str, float] | None) -> None:
        """Write what the stage was told, and its results, in one step that cannot be left half done."""
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / STAGE_FILE
            draft = path.with_suffix(".tmp")
            draft.write_text(json.dumps({"arguments": self.told, "results": results}, indent=1))
            os.replace(draft, path)
        PartialState().wait_for_everyone()


def newest_checkpoint(folder: Path) -> str | None:
    """The last `checkpoint-*` in `folder` that was written to its end (`trainer_state.json` comes last)."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def delete_stage(output_dir: Path, stage: str) -> None:
    """Remove what an earlier run left of `stage`."""
    if PartialState().is_main_process and (output_dir / stage).exists():
        shutil.rmtree(output_dir / stage)
    PartialState().wait_for_everyone()


def load_processor(source: str | None, backbone_config: dict[str, Any] | None) -> BaseImageProcessor:
    """The image processor that belongs to `source`, or a new one of the size in `backbone_config`."""
    if source is not None:
        return AutoImageProcessor.from_pretrained(source)
    size = (backbone_config or {}).get("image_size", 224)
    return ViTImageProcessor(size={"height": size, "width": size})


def load_classifier(name: str, data: ImageData, ignore_mismatched_sizes: bool) -> PreTrainedModel:
    """Load an image classifier and see that its classes are the data set's.

    Raises:
        ValueError: other classes, and no leave to make a new classifier.
    """
    config = AutoConfig.from_pretrained(name)
    classes = {}
    if config.num_labels != len(data.label_names):
        if not ignore_mismatched_sizes:
            raise ValueError(
                f"{name} has {config.num_labels} classes and the data set {len(data.label_names)}: give"
                f" --ignore_mismatched_sizes for a new classifier"
            )
        classes = class_names(data) | {"ignore_mismatched_sizes": True}
    return AutoModelForImageClassification.from_pretrained(name, dtype="float32", **classes)


def build_full_precision(
    source: str | None, backbone_config: dict[str, Any] | None, data: ImageData, arguments: Any
) -> PreTrainedModel:
    """A full-precision classifier to train: `source` with the data set's classes, or a new model of `backbone_config`."""
    if source is not None:
        return load_classifier(source, data, arguments.ignore_mismatched_sizes)
    if backbone_config is None:
        raise ValueError("the stage 'full_precision' needs --model_name_or_path or a backbone_config")
    config = dict(backbone_config)
    model_type = config.pop("model_type", "vit")
    config = AutoConfig.for_model(model_type, **config, **class_names(data))
    config.architectures = [f"{model_type} image classifier"]
    return AutoModelForImageClassification.from_config(config)


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
    **kwargs,
) -> QuantformerTrainer:
    """A trainer that evaluates on `data.validation`."""
    return QuantformerTrainer(
        model=model,
        args=training,
        eval_dataset=with_pixel_values(data.validation, data, processor),
        processing_class=processor,
        data_collator=partial(collate, num_labels=model.config.num_labels),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=most_probable_classes,
        **kwargs,
    )


def accuracy(trainer: QuantformerTrainer) -> float:
    """Top-1 accuracy on the validation images."""
    return trainer.evaluate()["eval_accuracy"]
