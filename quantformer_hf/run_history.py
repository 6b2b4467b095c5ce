"""What a run did to a model, stage by stage, in the form that travels with its config and may be shared.

Nothing of it is a path: a record holds the arguments of `RECIPE_ARGUMENTS`, names of the hub, and what was measured.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


#: In each stage's folder: what the stage was told, and what came out once it is complete.
STAGE_FILE = "stage.json"

#: Arguments that say how a stage was run and hold no path.
RECIPE_ARGUMENTS = (
    "preset",
    "allocation_method",
    "budget",
    "num_train_epochs",
    "max_steps",
    "global_batch",
    "max_train_samples",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "scale_learning_rate",
    "learning_rate_per_bit",
    "assignment_learning_rate",
    "assignment_temperature",
    "search_steps",
    "finetune_learning_rate",
    "task_weight",
    "aux_weight",
    "pnorm",
    "dm_weight",
    "distillation_weight",
    "distillation_temperature",
    "feature_weight",
    "block_gradient_scale",
    "calibration_samples",
    "reconstruction_samples",
    "centre_channels",
    "rotate_channels",
    "crop_scale",
    "horizontal_flip",
    "color_jitter",
    "auto_augment",
    "random_erasing",
    "mixup",
    "cutmix",
    "label_smoothing_factor",
    "repeated_augmentation",
    "balance_classes",
    "drop_path_rate",
    "ema_decay",
    "image_size",
    "window_size",
    "seed",
)

#: Arguments that say what was evaluated on.
EVALUATION_ARGUMENTS = ("dataset_config_name", "eval_split", "max_eval_samples", "crop_pct")

#: The one data set that comes from no hub and from no folder of the user's.
DIGITS = "digits"

#: Stands for changes of the weights that no run has recorded.
UNRECORDED = "unrecorded"


def hub_id(name: str | None, bare: bool = False) -> str | None:
    """`name` where it is `user/name` of the hub, else None: a local path is nobody else's business.

    Args:
        name: what somebody gave as a model or data set.
        bare: whether it may also be a name without a user, as older data sets have it.
    """
    if name is None or Path(name).exists() or not (name.count("/") == 1 or (bare and "/" not in name)):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def is_local(source: str | None) -> bool:
    """Whether the checkpoint that a stage starts from lies on this machine. Later, and from elsewhere, nobody could tell."""
    return source is not None and Path(source).exists()


def record_of(
    stage: str, told: dict[str, Any], results: dict[str, float], local_source: bool = False
) -> dict[str, Any]:
    """The record of a complete stage.

    Args:
        stage: its name.
        told: its arguments, with `source`, the checkpoint that it started from.
        results: accuracies, 0 to 1, by name (`pretrain_accuracy`).
        local_source: `is_local` of the source, while it was there.
    """
    dataset = told.get("dataset_name")
    return {
        "stage": stage,
        "source": None if local_source else hub_id(told.get("source")),
        "dataset": DIGITS if dataset == DIGITS else hub_id(dataset, bare=True),
        "evaluation": {name: told[name] for name in EVALUATION_ARGUMENTS if told.get(name) is not None},
        "recipe": {name: told[name] for name in RECIPE_ARGUMENTS if told.get(name) is not None},
        "results": results,
    }


def read_stage_file(path: Path) -> dict[str, Any]:
    """What a stage was told, its results (None where it is not complete) and the digest of what it started from.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path}, which says what the stage was told, is damaged ({error}): give another folder, or"
            f" --overwrite_output_dir to make that stage anew"
        ) from error


def history_in(folder: str | Path | None) -> list[dict[str, Any]]:
    """The records of the stages that led to the model in `folder`: its `stage.json`, and those before it.

    Empty where `folder` is no complete stage of a run.
    """
    records, seen = [], set()
    while folder is not None and folder not in seen and (Path(folder) / STAGE_FILE).is_file():
        seen.add(folder)
        written = read_stage_file(Path(folder) / STAGE_FILE)
        if written["results"] is None:
            break
        told = written["arguments"]
        local = written.get("local_source", False)
        records.insert(0, record_of(Path(folder).name, told, written["results"], local))
        folder = told.get("source")
    return records


def note_change(config: Any) -> None:
    """Say in the history of `config` that the weights are no longer those that were evaluated."""
    if config.run_history and config.run_history[-1]["stage"] != UNRECORDED:
        config.run_history = [*config.run_history, {"stage": UNRECORDED}]


def is_current(history: list[dict[str, Any]]) -> bool:
    """Whether the last record's results are those of the weights. Packing changes no result."""
    return bool(history) and history[-1]["stage"] != UNRECORDED
