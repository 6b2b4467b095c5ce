"""Full-precision weights as people have them: from transformers, from timm, and the official DeiT and Swin files."""

import contextlib
import json
import logging
import math
import os
import pickle
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Resampling
from safetensors import SafetensorError
from timm.data import ImageNetInfo, resolve_data_config
from transformers import (
    AutoModelForImageClassification,
    BaseImageProcessor,
    CLIPImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
)

from .checkpoint_files import TORCH_SUFFIXES, first_sentence, shortened
from .checkpoint_layouts import (
    TRANSFORMERS_CLASSES,
    check_parameters,
    is_classifier,
    refuse_parameters,
    resize_tables,
    to_transformers,
    transformers_config,
)
from .checkpoint_timm import (
    TimmWeights,
    check_supported,
    did_you_mean,
    download_timm,
    read_timm_file,
    read_timm_folder,
    registered_name,
)
from .image_processors import find_image_processor


logger = logging.getLogger(__name__)

#: Arguments that say where and how transformers downloads; a local file has no use for them.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

#: What is said of an encoder alone.
NO_CLASSIFIER = "it has no classifier (one has to be trained by labels first, as the stage full_precision does)"


@dataclass
class FullPrecisionCheckpoint:
    """A stock image classifier of transformers (ViT, DeiT or Swin), float32 and in eval mode, with what belongs to it.

    `processor` makes its `pixel_values`; it is None only for a folder in transformers format that has none. `form` says
    in a line what was loaded, such as "official DeiT file (deit_tiny_patch16_224)".
    """

    model: PreTrainedModel
    processor: BaseImageProcessor | None
    form: str


def load_full_precision(
    name_or_path: str | Path,
    *,
    architecture: str | None = None,
    image_size: int | None = None,
    window_size: int | None = None,
    id2label: Mapping[int, str] | None = None,
    label2id: Mapping[str, int] | None = None,
    ignore_mismatched_sizes: bool = False,
    **kwargs,
) -> FullPrecisionCheckpoint:
    """Load a full-precision ViT, DeiT or Swin in any of the forms in which people have them.

    Args:
        name_or_path: a hub id or folder in transformers format; a timm name (`deit_tiny_patch16_224`,
            `timm/deit_tiny_patch16_224.fb_in1k`) or a folder of timm's; or one file, official or timm's (.pth,
            .safetensors).
        architecture: timm's or the official name of a file's model, where the file's own name does not hold it: for a plain
            ViT, whose parameters look like a DeiT's and whose preprocessing is another.
        image_size: height and width of the images, for another size than the checkpoint's: position embeddings are
            interpolated.
        window_size: as `image_size`, for Swin's windows and their relative-position tables.
        id2label: class names, instead of the checkpoint's; ImageNet's for timm and official classifiers of 1,000.
        label2id: the same the other way round; one of the two is enough.
        ignore_mismatched_sizes: give the model a new classifier where the checkpoint's has another number of classes.
        kwargs: with a hub id or transformers folder, for `from_pretrained` (`revision`, `token`, ...); `num_labels`
            with all; `cache_dir` with timm's names.

    Raises:
        FileNotFoundError: no such name, file or folder, or a folder without what it needs.
        TypeError: a `quantformer` checkpoint, which is quantized already, or an argument that the form does not take.
        ValueError: a file that is damaged, unsafe, of another architecture, or whose parameters are not those of its
            architecture; a classifier of another size.
    """
    name = str(name_or_path)
    sizes = {"image_size": image_size, "window_size": window_size}
    for size, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{size} is {value}: choose a number of pixels or patches, or leave it out")
    labels = {"id2label": id2label, "label2id": label2id, "num_labels": kwargs.pop("num_labels", None)}
    labels = {key: value for key, value in labels.items() if value is not None}
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    with _naming(name):
        weights = _timm_weights(name, architecture, kwargs)
        if weights is None:
            checkpoint = _load_transformers(name, sizes, labels, ignore_mismatched_sizes, kwargs)
        else:
            checkpoint = _convert(weights, sizes, labels, ignore_mismatched_sizes)
    checkpoint.model.config._name_or_path = checkpoint.model.name_or_path = name
    return checkpoint


def origin_of(model: PreTrainedModel) -> str | None:
    """The name of the checkpoint that `model` was loaded from, an absolute one if it is local: found from any folder, and
    never taken for a hub id."""
    name = model.name_or_path
    return os.path.abspath(name) if name and os.path.exists(name) else name or None


def _timm_weights(name: str, architecture: str | None, kwargs: dict[str, Any]) -> TimmWeights | None:
    """The weights by that name if they are timm's or official ones, None if they are transformers'."""
    path = Path(name)
    if path.is_file():
        _refuse_arguments(kwargs, HUB_ARGUMENTS)
        return read_timm_file(path, architecture)
    if architecture is not None:
        raise TypeError(f"architecture is for a single file, and '{name}' is none")
    if not path.exists() and (timm_name := registered_name(name)):
        _refuse_arguments(kwargs, ("cache_dir",))
        return download_timm(timm_name, **kwargs)
    config = _read_config(name, kwargs)
    if config.get("model_type") == "quantformer":
        raise TypeError(f"'{name}' is a quantformer checkpoint, quantized already: load it with from_pretrained")
    if "architecture" not in config:
        model_types = [config_class.model_type for _, config_class in TRANSFORMERS_CLASSES.values()]
        if config.get("model_type") not in model_types:
            raise ValueError(f"it is a {config.get('model_type')}: expected one of {', '.join(model_types)}")
        return None
    if path.is_dir():
        _refuse_arguments(kwargs, HUB_ARGUMENTS)
        return read_timm_folder(path / kwargs.get("subfolder", ""))
    _refuse_arguments(kwargs, ("cache_dir",))
    return download_timm(f"hf-hub:{name}", **kwargs)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"'{name}' cannot be loaded: {error}") from None


def _refuse_arguments(kwargs: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = [key for key in kwargs if key not in known]
    if unknown:
        raise TypeError(f"unexpected argument {unknown[0]!r}: it is for checkpoints in transformers format")


def _read_config(name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a folder or of a repository of the hub."""
    hub_arguments = {key: value for key, value in kwargs.items() if key in HUB_ARGUMENTS}
    folder = Path(name, kwargs.get("subfolder", ""))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            files = shortened(sorted(entry.name for entry in folder.iterdir())) or "nothing"
            raise FileNotFoundError(
                f"the folder '{folder}' has no config.json: expected one with a model_type (transformers) or an"
                f" architecture (timm), found {files}"
            )
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"its config.json is not JSON ({first_sentence(error)})") from None
        if "model_type" not in config and "architecture" not in config:
            raise ValueError(
                f"its config.json has neither a model_type (transformers) nor an architecture (timm), but"
                f" {shortened(config)}"
            )
        return config
    # A hub id has an owner; a path has a suffix, or more folders.
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or Path(name).suffix in (*TORCH_SUFFIXES, ".safetensors"):
        raise FileNotFoundError(f"'{name}' is no file, folder, timm name or hub id{did_you_mean(name)}")
    try:
        return PreTrainedConfig.get_config_dict(name, **hub_arguments)[0]
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"'{name}' is no file, folder or timm name, and the hub did not give its config.json: {first_sentence(error)}"
        ) from error


def _load_transformers(
    name: str, sizes: dict[str, int | None], labels: dict[str, Any], ignore_mismatched_sizes: bool, kwargs: dict
) -> FullPrecisionCheckpoint:
    if "id2label" in labels or "label2id" in labels:
        labels = _both_ways(_as_id2label(labels))
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            name,
            output_loading_info=True,
            # What does not fit is found out below, for this and the other forms alike.
            ignore_mismatched_sizes=True,
            **labels,
            **({"dtype": torch.float32} | kwargs),
        )
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError, KeyError) as error:
        raise ValueError(f"transformers cannot read it: {first_sentence(error)}") from None
    _check_loading_info(info, ignore_mismatched_sizes)

    processor = find_image_processor(name, {key: value for key, value in kwargs.items() if key in HUB_ARGUMENTS})
    if any(sizes.values()):
        config, state_dict = deepcopy(model.config), model.state_dict()
        resize_tables(state_dict, config, **sizes)
        model = type(model).from_pretrained(None, config=config, state_dict=state_dict)
        if processor is not None and sizes["image_size"] is not None:
            _resize_processor(processor, sizes["image_size"])
    return FullPrecisionCheckpoint(model, processor, f"transformers checkpoint ({type(model).__name__})")


def _check_loading_info(info: dict[str, Any], ignore_mismatched_sizes: bool) -> None:
    """Raise ValueError unless all parameters were found, or all but the classifier's where that is asked for."""
    # An encoder on its own has a pooler, which image classifiers do not use.
    unexpected = [name for name in info["unexpected_keys"] if ".pooler." not in f".{name}"]
    mismatched = {name: shapes for name, *shapes in info["mismatched_keys"]}
    new = sorted({name for name in (*info["missing_keys"], *mismatched) if is_classifier(name)})
    refuse_parameters(
        missing=sorted(set(info["missing_keys"]) - set(new) - set(mismatched)),
        not_expected=sorted(unexpected),
        of_another_shape=[
            f"{name} {tuple(found)} instead of {tuple(wanted)}"
            for name, (found, wanted) in sorted(mismatched.items())
            if name not in new
        ],
    )
    if new and not ignore_mismatched_sizes:
        problem = NO_CLASSIFIER
        if new[0] in mismatched:
            found, wanted = mismatched[new[0]]
            problem = f"its classifier has {found[0]} classes, and {wanted[0]} are asked for"
        raise ValueError(f"{problem}: pass ignore_mismatched_sizes=True for a new one")
    if new:
        logger.warning(f"{shortened(new)} are initialised anew, and have to be trained")


def _resize_processor(processor: BaseImageProcessor, image_size: int) -> None:
    """Let `processor` make images of `image_size`, with the share of the image that it crops unchanged."""
    size = {key: value for key, value in dict(processor.size).items() if value is not None}
    if getattr(processor, "do_center_crop", False):
        ratio = image_size / dict(processor.crop_size)["height"]
        processor.size = type(processor.size)(**{key: math.floor(value * ratio) for key, value in size.items()})
        processor.crop_size = type(processor.crop_size)(height=image_size, width=image_size)
    else:
        processor.size = type(processor.size)(**dict.fromkeys(size, image_size))


def _convert(
    weights: TimmWeights, sizes: dict[str, int | None], labels: dict[str, Any], ignore_mismatched_sizes: bool
) -> FullPrecisionCheckpoint:
    check_supported(weights.model)
    check_parameters(weights.model.state_dict(), weights.state_dict)

    classes = weights.model.num_classes
    names = _class_names(classes, labels, weights.model.pretrained_cfg)
    config = transformers_config(weights.model, **_both_ways(names))
    state_dict = to_transformers(weights.state_dict, config)
    if any(sizes.values()):
        resize_tables(state_dict, config, **sizes)
    if len(names) != classes or classes == 0:
        if not ignore_mismatched_sizes or not names:
            found = f"its classifier has {classes} classes" if classes else NO_CLASSIFIER
            wanted = f"and {len(names)} are asked for: pass" if names else "so pass id2label and"
            raise ValueError(f"{found}, {wanted} ignore_mismatched_sizes=True for a new one")
        logger.warning(f"the classifier of {classes} classes gives way to a new one of {len(names)}, to be trained")
        state_dict = {name: tensor for name, tensor in state_dict.items() if not is_classifier(name)}
    model_class, _ = TRANSFORMERS_CLASSES[type(weights.model)]
    model, info = model_class.from_pretrained(None, config=config, state_dict=state_dict, output_loading_info=True)
    _check_loading_info(info, ignore_mismatched_sizes)
    processor = timm_image_processor(weights.model.pretrained_cfg, config.image_size)
    return FullPrecisionCheckpoint(model, processor, weights.form)


def _both_ways(id2label: dict[int, str]) -> dict[str, dict]:
    return {"id2label": id2label, "label2id": {label: index for index, label in id2label.items()}}


def _as_id2label(labels: Mapping[str, Any]) -> dict[int, str]:
    if "id2label" in labels:
        return {int(index): label for index, label in labels["id2label"].items()}
    return {int(index): label for label, index in labels["label2id"].items()}


def _class_names(classes: int, labels: Mapping[str, Any], pretrained_cfg: Mapping[str, Any]) -> dict[int, str]:
    """The names that are asked for, or those that a classifier of so many classes has by itself."""
    if "id2label" in labels or "label2id" in labels:
        return _as_id2label(labels)
    wanted = labels.get("num_labels", classes)
    saved = pretrained_cfg.get("label_names") or ()
    if len(saved) == wanted:
        return dict(enumerate(saved))
    if wanted == classes == 1000:
        return dict(enumerate(imagenet_class_names()))
    return {index: f"LABEL_{index}" for index in range(wanted)}


def imagenet_class_names() -> list[str]:
    """The 1,000 names of ImageNet's classes in WordNet's words, each different: the two cranes are explained."""
    info = ImageNetInfo()
    names = info.label_descriptions()
    occurrences = Counter(names)
    return [
        name if occurrences[name] == 1 else info.index_to_description(index, detailed=True)
        for index, name in enumerate(names)
    ]


def timm_image_processor(pretrained_cfg: Mapping[str, Any], image_size: int) -> BaseImageProcessor:
    """What timm's evaluation does to an image: resize the shorter edge to ⌊image_size / crop_pct⌋, crop, normalise.

    It resizes by PIL, as timm does; loaded again by `AutoImageProcessor`, the class resizes by torchvision, which
    differs by one or two of 255 levels in a pixel of some hundred.

    Raises:
        ValueError: a crop mode or interpolation that the class does not have.
    """
    config = resolve_data_config(pretrained_cfg=dict(pretrained_cfg))
    if config["crop_mode"] != "center" or config["interpolation"].upper() not in Resampling.__members__:
        raise ValueError(
            f"its preprocessing has crop_mode {config['crop_mode']!r} and interpolation {config['interpolation']!r}:"
            f" expected 'center' and one of {', '.join(Resampling.__members__).lower()}"
        )
    return CLIPImageProcessorPil(
        size={"shortest_edge": math.floor(image_size / config["crop_pct"])},
        crop_size={"height": image_size, "width": image_size},
        resample=Resampling[config["interpolation"].upper()],
        image_mean=list(config["mean"]),
        image_std=list(config["std"]),
    )
