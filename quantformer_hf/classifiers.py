"""Image classifiers to start from, of any form, with the classes of a data set."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ViTImageProcessor,
)

from .arguments import ModelArguments
from .backbone_layers import pair
from .bad_images import MODE
from .checkpoint_files import shortened
from .checkpoints import load_full_precision
from .class_names import numbers_among, share_a_name
from .class_token import CLASS_TOKENS
from .configuration_quantformer import QuantformerConfig
from .data import ImageData
from .images import processor_size


logger = logging.getLogger(__name__)


class Classifier(NamedTuple):
    """A model, and images to show it.

    Attributes:
        model: in full precision or quantized.
        processor: of its images.
        data: the data set, its classes numbered as the model's.
    """

    model: PreTrainedModel
    processor: BaseImageProcessor
    data: ImageData


def load_classifier(name: str, data: ImageData, arguments: ModelArguments) -> Classifier:
    """An image classifier for the classes of the data set, in full precision (of any form) or quantized.

    Where all classes of the data set are found among the checkpoint's by their names (`class_names.numbers_among`), they get
    its numbers, in whatever order they are and however many others it has. Where the checkpoint's names say nothing
    (`LABEL_0`, ...), it gets those of the data set. Where most are others, they and the classifier stay, for the same
    classes may have names in two languages: a warning says so. With `ignore_mismatched_sizes`, after which it is trained by
    labels, it gets the data set's.

    Raises:
        ValueError: another number of classes, which are not all found among its own, and no leave to make a new classifier;
            no image processor, or one that makes images of another size than the model takes; a model of gray images.
    """
    may_be_new = arguments.ignore_mismatched_sizes
    asked = {"num_labels": len(data.label_names), "ignore_mismatched_sizes": True} if may_be_new else {}
    model, processor = _load(name, arguments, **asked)
    own = [model.config.id2label[index] for index in range(model.config.num_labels)]
    numbers = numbers_among(own, data.label_names)
    if numbers is not None and numbers != list(range(len(own))):
        example = _told(numbers[0], own[numbers[0]], data.label_names[0])
        logger.info(f"the data set's {len(numbers)} classes are numbered as the {len(own)} of {name} ({example})")
        data = replace(data, label_names=own, numbers=numbers)
    if len(own) != len(data.label_names):
        raise ValueError(
            f"{name} has {len(own)} classes and the data set {len(data.label_names)}, not all by names of the former: give"
            f" --ignore_mismatched_sizes for a new classifier, and a stage that trains it by labels, such as"
            f" --stages full_precision finetune --full_precision.num_train_epochs 5"
        )
    _agree_on_names(name, model, data, may_be_new)
    if processor is None:
        raise ValueError(f"{name} has no image processor: save one beside it, such as ViTImageProcessor(size=...)")
    made, config = processor_size(processor), _stock_config(model)
    _check_channels(name, config)
    taken = pair(config.image_size)
    # Swin takes any size.
    if config.model_type in CLASS_TOKENS and made != taken:
        raise ValueError(
            f"{name} takes images of {taken[0]} x {taken[1]}, and its {type(processor).__name__} makes {made[0]} x"
            f" {made[1]}: correct its preprocessor_config.json, or give --image_size {made[0]} for a model of that size"
        )
    return Classifier(model, processor, data)


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


def _agree_on_names(name: str, model: PreTrainedModel, data: ImageData, takes_names: bool) -> None:
    own, wanted = [model.config.id2label[index] for index in range(model.config.num_labels)], data.label_names
    pairs = [(i, a, b) for i, (a, b) in enumerate(zip(own, wanted, strict=True)) if a != b]
    differing = [_told(*pair) for pair in pairs if not share_a_name(*pair[1:])]
    nameless = own == [f"LABEL_{index}" for index in range(len(own))]
    # Where most agree, others are spelled otherwise.
    if 2 * len(differing) > len(own) and not nameless:
        outcome = (
            "its classifier is kept, to be trained under the names of the data set"
            if takes_names
            else "they are taken for the same classes under the checkpoint's names; where they are not, give"
            " --ignore_mismatched_sizes, and a stage that trains the classifier by labels, such as full_precision"
        )
        logger.warning(f"{name} and the data set have other class names ({shortened(differing)}): {outcome}")
    if nameless or takes_names:
        for config in (model.config, _stock_config(model)):
            config.id2label, config.label2id = class_names(data).values()


def _check_channels(name: str, config: PreTrainedConfig) -> None:
    if config.num_channels != len(MODE):
        raise ValueError(
            f"{name} takes images of {config.num_channels} channels, and those of a data set are decoded to"
            f" {len(MODE)} ({MODE}): start from a model of such images, or quantize this one in Python"
        )


def _told(index: int, own: str, wanted: str) -> str:
    return f"class {index} is {own!r} and {wanted!r}"


def _stock_config(model: PreTrainedModel) -> PreTrainedConfig:
    return getattr(model.config, "backbone_config", model.config)


def _load(name: str, arguments: ModelArguments, **classes: Any) -> tuple[PreTrainedModel, BaseImageProcessor | None]:
    # Of the folders that stages leave it says nothing.
    architecture = arguments.architecture if name == arguments.model_name_or_path or Path(name).is_file() else None
    if is_quantized(name):
        if architecture is not None:
            raise ValueError(f"architecture is {architecture}, and {name} is quantized and says its own: leave it out")
        model = AutoModelForImageClassification.from_pretrained(name, **classes)
        logger.info(f"{name}: quantformer checkpoint of the stage '{model.config.stage}'")
        return model, model.image_processor
    checkpoint = load_full_precision(
        name,
        architecture=architecture,
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
    _check_channels("backbone_config", config)
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
