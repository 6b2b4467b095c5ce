"""Image classifiers to start from, of any form, with the classes of a data set."""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    ViTImageProcessor,
)

from .arguments import ModelArguments
from .checkpoints import load_full_precision
from .configuration_quantformer import QuantformerConfig
from .data import ImageData


logger = logging.getLogger(__name__)


def load_classifier(
    name: str, data: ImageData, arguments: ModelArguments
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """An image classifier with the classes of the data set, in full precision (of any form) or quantized, and its processor.

    Raises:
        ValueError: other classes, and no leave to make a new classifier; the same ones in another order; or no image
            processor.
    """
    model, processor = _load(name, arguments)
    own = [model.config.id2label[index] for index in range(model.config.num_labels)]
    if own != data.label_names and sorted(own) == sorted(data.label_names):
        index = next(i for i, pair in enumerate(zip(own, data.label_names, strict=True)) if len(set(pair)) == 2)
        raise ValueError(
            f"{name} and the data set have the same classes in another order (class {index} is {own[index]!r} and"
            f" {data.label_names[index]!r}): number those of the data set as id2label of the model does"
        )
    if model.config.num_labels != len(data.label_names):
        if not arguments.ignore_mismatched_sizes:
            raise ValueError(
                f"{name} has {model.config.num_labels} classes and the data set {len(data.label_names)}: give"
                f" --ignore_mismatched_sizes for a new classifier, and a stage that trains it by labels, such as"
                f" --stages full_precision finetune --full_precision.num_train_epochs 5"
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
