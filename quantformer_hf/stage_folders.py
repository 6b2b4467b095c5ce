"""The folders of a run: what an earlier one left there, and what this one reads."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from .arguments import RunArguments


#: Arguments that are paths of what is read.
READ_PATHS = ("model_name_or_path", "teacher_name_or_path", "layer_bits", "latency_table", "dataset_dir")

#: Beside the folders of the stages, the model of the last one as integer codes.
PACKED_FOLDER = "packed"


def delete_folder(folder: Path) -> None:
    """Remove what an earlier run left, if it did."""
    PartialState().wait_for_everyone()
    if PartialState().is_main_process and folder.exists():
        shutil.rmtree(folder)
    PartialState().wait_for_everyone()


def check_nothing_needed_is_deleted(run: RunArguments, stages: Sequence[str], output_dir: Path) -> None:
    """Raise ValueError where one of `stages` reads what `--overwrite_output_dir` would delete before."""
    folders = [(output_dir / name).resolve() for name in (*stages, PACKED_FOLDER)]
    for stage in stages:
        given = run.for_stage(stage).given
        for name in READ_PATHS:
            value = given.get(name)
            is_path = isinstance(value, str) and not value.lstrip().startswith("{")
            if is_path and any(Path(value).resolve().is_relative_to(folder) for folder in folders):
                raise ValueError(
                    f"{name} is {value}, which --overwrite_output_dir would delete: choose another --output_dir, or leave it"
                    f" out"
                )
