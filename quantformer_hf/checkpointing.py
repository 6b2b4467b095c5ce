"""Checkpoints that outlive a fault: written whole or not at all.

A checkpoint is written into `_unfinished/`, flushed to the disk and only then renamed to `checkpoint-<step>`. Its
`checkpoint.json` lists every other file with its size, so that a copy that broke off is seen as well. On several nodes
the output folder is a file system that all of them see.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = logging.getLogger(__name__)

#: In a checkpoint: its files and their sizes, the batch that it was trained with, and the losses that no log has yet.
MANIFEST = "checkpoint.json"

#: Beside the checkpoints: the one that is being written. (Uploads to the hub leave out names with an underscore.)
UNFINISHED = "_unfinished"

#: In the folder of a model: a save that is being written, and one that is on the disk and moves to its place.
DRAFT, COMPLETE = "_saving", "_saved"


# Files


def flush(path: Path) -> None:
    """Wait until a file, or a folder's own list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """`flush` for everything in `folder`, and itself."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            flush(Path(parent) / name)
        flush(Path(parent))


def write_durably(path: Path, text: str) -> None:
    """Replace the content of `path` in one step that neither a crash nor a power cut leaves half done."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text)
    flush(draft)
    os.replace(draft, path)
    flush(path.parent)


@contextlib.contextmanager
def replaced_together(folder: Path, stale: str) -> Iterator[Path]:
    """An empty folder to write into; what is there in the end takes its place in `folder`, after it is on the disk.

    Killed between two of the files, it leaves the others in `_saved`, which `check_replaced` finds.

    Args:
        folder: made if need be. Files of other names stay.
        stale: regular expression of whole names: earlier files that go when they have no successor (shards of a larger
            model).
    """
    folder.mkdir(parents=True, exist_ok=True)
    draft, complete = folder / DRAFT, folder / COMPLETE
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        flush_tree(draft)
        names = [path.name for path in draft.iterdir()]
        # What a save that was killed has left is of use until this one is on the disk.
        shutil.rmtree(complete, ignore_errors=True)
        draft.rename(complete)
        flush(folder)
        for path in folder.iterdir():
            if re.fullmatch(stale, path.name) and path.name not in names:
                path.unlink()
        for name in names:
            os.replace(complete / name, folder / name)
        flush(folder)
        complete.rmdir()
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_replaced(folder: Path) -> None:
    """Raise ValueError where `replaced_together` was killed between its files, some of which are new and some old."""
    complete = folder / COMPLETE
    if complete.is_dir() and any(complete.iterdir()):
        raise ValueError(
            f"a save into {folder} was interrupted, and what it wrote is in {complete} still: move the files there up into"
            f" {folder}, or save again"
        )


def check_writable(folder: Path) -> None:
    """Make `folder`, read and write it, so that a run does not find out hours later that it cannot.

    Raises:
        OSError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.listdir(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(
            f"the output folder {folder} cannot be read and written ({error}): give another --output_dir"
        ) from error


@contextlib.contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Say of an error while saving what was not saved, and what to do.

    A full disk is an `OSError` from Python, a `RuntimeError` from `torch.save` and a `SafetensorError` from safetensors.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"{what} cannot be written to {folder} ({type(error).__name__}: {error}; {_free_space(folder)}). Earlier"
            f" checkpoints are untouched: make room or mend the folder, and type the same command again"
        ) from error


def _free_space(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB free"


# Which checkpoints there are


def whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder` that are complete, in the order of their steps. Nothing in them is unpickled."""
    return [path for path in _checkpoints(folder) if read_manifest(path) is not None]


def _checkpoints(folder: Path) -> list[Path]:
    # Not glob, which takes a folder that it may not read for an empty one.
    paths = folder.iterdir() if folder.exists() else ()
    return sorted((path for path in paths if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which `checkpoint-<step>` was written."""
    return int(checkpoint.name.rpartition("-")[2])


def newest_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint in `folder`; says which newer ones are passed over."""
    for path in reversed(_checkpoints(folder)):
        if read_manifest(path) is not None:
            return path
        logger.warning(
            f"{path} is not whole and is passed over: its {MANIFEST} or a file listed there is missing or cut"
        )
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """Content of `checkpoint.json`, or None where it or a file that it lists is missing or cut short."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    return manifest if isinstance(listed, dict) and sizes(checkpoint).items() >= listed.items() else None


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file in `folder` but the manifest, by its name."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(files)}
