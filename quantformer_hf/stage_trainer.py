"""The trainer of a stage: what it trains and evaluates on."""

from datasets import IterableDataset
from transformers import BaseImageProcessor, PreTrainedModel, TrainingArguments

from .arguments import StageArguments
from .augmentation import Collator, train_transform
from .data import ImageData
from .images import TransformedImages
from .metrics import compute_metrics, rank_and_loss
from .streaming import StreamedEvaluationImages, StreamedTrainingImages
from .trainer import QuantformerTrainer


def evaluating_trainer(
    model: PreTrainedModel,
    training: TrainingArguments,
    data: ImageData,
    processor: BaseImageProcessor,
    kind: type[QuantformerTrainer] = QuantformerTrainer,
    **kwargs,
) -> QuantformerTrainer:
    """A trainer of the class `kind` that evaluates on `data.validation`; `kwargs` are its own."""
    kwargs.setdefault("data_collator", Collator(model.config.num_labels))
    return kind(
        model=model,
        args=training,
        eval_dataset=_images_to_evaluate(data, processor, training),
        processing_class=processor,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=rank_and_loss,
        **kwargs,
    )


def training_trainer(
    model: PreTrainedModel, arguments: StageArguments, data: ImageData, processor: BaseImageProcessor, **kwargs
) -> QuantformerTrainer:
    """The same, which trains on `data.train`, augmented as `arguments` say."""
    told, training = arguments.data, arguments.training
    return evaluating_trainer(
        model,
        training,
        data,
        processor,
        train_dataset=_images_to_train_on(data, processor, arguments),
        data_collator=Collator(model.config.num_labels, told.mixup, told.cutmix, training.label_smoothing_factor),
        **kwargs,
    )


def _images_to_train_on(
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


def _images_to_evaluate(
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
