"""The mean of runs from one start: `python -m quantformer_hf average CHECKPOINT CHECKPOINT ... --output FOLDER`.

Runs that see their images in another order end in different places, whose mean is nearer to full precision than each of
them (model soups, arXiv 2203.05482): what one run has learnt by heart, or been driven to by noisy straight-through
gradients, the others have not.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .finite import check_finite
from .inspect_checkpoint import read_config
from .modeling_quantformer import QuantformerForImageClassification
from .run_history import note_change


#: What may differ in the configs of runs from one start.
_OF_ONE_RUN = ("run_history", "full_precision_name_or_path", "transformers_version", "dtype", "_name_or_path")

_WAY_OUT = "average runs that started from the same checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `average`."""
    parser.add_argument("checkpoints", nargs="+", help="folders of the stage finetune, of runs from one checkpoint")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="which must not be there yet")


def run(arguments: Any) -> None:
    """Write the mean to `arguments.output`.

    Raises:
        ValueError: a single checkpoint, one of another stage or none of this package, or some that have no common start.
        OSError: no such checkpoint, or an output that is there already or cannot be written.
    """
    if arguments.output.exists():
        raise FileExistsError(f"{arguments.output} is there already: name another folder by --output")
    folders = [Path(folder) for folder in arguments.checkpoints]
    average_checkpoints(folders).save_pretrained(arguments.output)
    print(
        f"{arguments.output}: the mean of {len(folders)} checkpoints. Accuracy: --stages --do_eval of run_quantformer.py"
    )


def average_checkpoints(folders: Sequence[Path]) -> QuantformerForImageClassification:
    """A model whose weights, scales and offsets are the means of those in `folders`.

    Args:
        folders: of checkpoints in the stage `finetune` that began as the same one, and so have the same groups (of models
            with one group nothing shows it). Before that stage nothing shows whether they did, and after it weights are
            codes, of which a mean is none.

    Raises:
        ValueError: fewer than two, the same one twice, one of another stage, other settings, groups or preprocessing, or
            values that are not finite.
        FileNotFoundError: no such checkpoint.
    """
    if len(folders) < 2:
        raise ValueError(f"{folders[0]} alone has no mean but itself: name two checkpoints or more")
    for number, folder in enumerate(folders):
        if folder.resolve() in (other.resolve() for other in folders[:number]):
            raise ValueError(f"{folder} is named twice, and would count twice: name each checkpoint once")
        stage = read_config(folder).stage
        if stage != "finetune":
            raise ValueError(f"{folder} is in the stage '{stage}': name the folder of its stage 'finetune'")
    _check_same_settings(folders)
    model = QuantformerForImageClassification.from_pretrained(folders[0], dtype=torch.float32)
    own = model.state_dict()
    sums = {name: _addend(name, check_finite(folders[0], name, tensor)).double() for name, tensor in own.items()}
    for folder in folders[1:]:
        another = QuantformerForImageClassification.from_pretrained(folder, dtype=torch.float32)
        if _preprocessing(another) != _preprocessing(model):
            raise ValueError(f"the preprocessing of images is not the same in {folders[0]} and {folder}: {_WAY_OUT}")
        other = another.state_dict()
        for name in sums:
            addend = _addend(name, check_finite(folder, name, other[name]))
            if not addend.is_floating_point() and not torch.equal(own[name], addend):
                raise ValueError(f"{name} is not the same in {folders[0]} and {folder}: {_WAY_OUT}")
            sums[name] += addend
    model.load_state_dict({name: (total / len(folders)).to(own[name].dtype) for name, total in sums.items()})
    note_change(model.config)
    return model


def _check_same_settings(folders: Sequence[Path]) -> None:
    """Raise ValueError where tensors of the same name would not mean the same."""
    first, *others = ({k: v for k, v in read_config(f).to_dict().items() if k not in _OF_ONE_RUN} for f in folders)
    for folder, other in zip(folders[1:], others, strict=True):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise ValueError(f"{name} is not the same in {folders[0]} and {folder}: {_WAY_OUT}")


def _preprocessing(model: QuantformerForImageClassification) -> dict[str, Any] | None:
    return None if model.image_processor is None else model.image_processor.to_dict()


def _addend(name: str, tensor: Tensor) -> Tensor:
    """What is added up: of a scale its magnitude, which alone counts."""
    return tensor.abs() if name.endswith(".scale") else tensor
