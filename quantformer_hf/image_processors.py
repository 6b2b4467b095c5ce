"""Image processors that lie beside checkpoints."""

import logging
import os

from torch import nn
from transformers import AutoImageProcessor, BaseImageProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file

from .checkpoint_files import first_sentence
from .run_history import hub_id


logger = logging.getLogger(__name__)


def find_image_processor(name: str, location: dict) -> BaseImageProcessor | None:
    """What was saved beside the model, so that it travels on wherever the model is saved or pushed next."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if cached_file(name, IMAGE_PROCESSOR_NAME, **location, **quiet) is None:
        return None
    try:
        # Code of its own would be asked for on a terminal.
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **location)
    except ValueError as error:
        # No reason not to load the model.
        logger.warning(
            f"the image processor of {name} is left out ({first_sentence(error)}): set model.image_processor to have one"
            f" saved and pushed with the model"
        )
        return None


def image_processor_of(model: nn.Module) -> BaseImageProcessor | None:
    """What lies beside the checkpoint in the layout of transformers that `model` was loaded from, if it was from one."""
    name = getattr(model, "name_or_path", None)
    return find_image_processor(name, {}) if name and (os.path.isdir(name) or hub_id(name)) else None
