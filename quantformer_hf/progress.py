"""Bars for what takes minutes outside of training."""

import os
from collections.abc import Iterable
from typing import TypeVar

from transformers.utils.logging import tqdm


Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, total: int | None = None) -> Iterable[Item]:
    """`items`, with a bar named `what`, by one process of a machine.

    `transformers.utils.logging.disable_progress_bar()` turns it off, as those of transformers.

    Args:
        total: how many items there are, where `items` does not say.
    """
    # Not by accelerate's: a process that only quantizes would join a group, and take a GPU.
    return tqdm(items, desc=what, total=total, disable=os.environ.get("LOCAL_RANK", "0") != "0")
