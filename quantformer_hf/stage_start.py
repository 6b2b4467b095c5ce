"""What a stage trains, as it was before its first step: to calibrate and refit takes minutes, and is done once.

It lies in the folder of the stage until the stage is complete, whatever layout the checkpoints of its training have.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .checkpointing import flush, flush_tree, write_durably, writing
from .modeling_quantformer import QuantformerForImageClassification


logger = logging.getLogger(__name__)

#: Beside the checkpoints. (Uploads to the hub leave out names with an underscore.)
START = "_start"

#: In there: what the stage was told, and what was measured of the start.
TOLD_FILE, RESULTS_FILE = "told.json", "results.json"


class StageStart:
    """The start of the stage in `folder`, of a stage that is told `told`, which JSON can hold. All processes call alike."""

    def __init__(self, folder: Path, told: dict[str, Any]):
        self.folder = folder / START
        self.told = json.loads(json.dumps(told))

    def load(self) -> QuantformerForImageClassification | None:
        """The model, or None where none was saved, or by a stage that was told otherwise."""
        path = self.folder / TOLD_FILE
        # One process decides: another node's view of the folder may be older.
        found = broadcast_object_list([path.is_file() and json.loads(path.read_text()) == self.told])[0]
        if not found:
            return None
        logger.info(f"calibrated and refitted already: {self.folder}")
        return QuantformerForImageClassification.from_pretrained(self.folder)

    def save(self, model: QuantformerForImageClassification) -> None:
        """Keep `model`, in one step, in place of what is there.

        Raises:
            OSError: it cannot be written.
        """
        if PartialState().is_main_process:
            draft = self.folder.with_name(f"{START}.tmp")
            with writing("what the training starts from", self.folder.parent):
                self.remove()
                model.save_pretrained(draft)
                (draft / TOLD_FILE).write_text(json.dumps(self.told, indent=1))
                flush_tree(draft)
                draft.rename(self.folder)
                flush(self.folder.parent)
        PartialState().wait_for_everyone()

    def results(self) -> dict[str, float]:
        """What `keep_results` was given for this start, else nothing."""
        path = self.folder / RESULTS_FILE
        return broadcast_object_list([json.loads(path.read_text()) if path.is_file() else {}])[0]

    def keep_results(self, results: dict[str, float]) -> None:
        """Keep what was measured of the start, which takes time as well."""
        if PartialState().is_main_process and self.folder.is_dir():
            write_durably(self.folder / RESULTS_FILE, json.dumps(results, indent=1))

    def remove(self) -> None:
        """Of the main process: the start, and what a save that was killed has left of one."""
        for folder in (self.folder, self.folder.with_name(f"{START}.tmp")):
            if folder.exists():
                shutil.rmtree(folder)
