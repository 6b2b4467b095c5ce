"""Checkpoints that outlive a fault: written whole or not at all, before a SIGTERM ends the run too, and resumed exactly.

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
import signal
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = logging.getLogger(__name__)

#: In a checkpoint: its files and their sizes, the batch that it was trained with, and the losses that no log has yet.
MANIFEST = "checkpoint.json"

#: Beside the checkpoints: the one that is being written. (Uploads to the hub leave out names with an underscore.)
UNFINISHED = "_unfinished"

#: What a shell reports of a process that SIGTERM has ended.
SIGTERM_EXIT_CODE = 128 + signal.SIGTERM


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
    if _sizes(checkpoint).items() >= manifest["files"].items():
        return manifest
    return None


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(files)}


# Training


class ResumableTrainer(Trainer):
    """A `Trainer` whose checkpoints are whole, and that ends on SIGTERM after writing one.

    What it repeats exactly on resuming, beyond `Trainer`: losses logged over steps on both sides of the interruption, and
    a run that was interrupted between its last step and its end.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        #: Stands in for the output folder while a checkpoint is written.
        self._staging: Path | None = None
        self._termination = TerminationCallback()
        self.add_callback(self._termination)
        self.add_callback(_RestoreUnlogged(self))
        self._resumed_from: dict[str, Any] | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in Trainer.

        Raises:
            ValueError: a checkpoint that is not whole, has no optimizer, or is of a run with another global batch.
            SystemExit: with code 143, after SIGTERM, once a checkpoint is written.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(Path(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"there is no whole checkpoint in {self.args.output_dir}: leave out resume_from_checkpoint"
                )
        self._resumed_from = None
        if resume_from_checkpoint:
            resume_from_checkpoint = str(resume_from_checkpoint)
            self._resumed_from = self._fitting_manifest(Path(resume_from_checkpoint))
        self._discard_unfinished(Path(self.args.output_dir))
        # Behind callbacks that were added since, so that its word is the last.
        self.remove_callback(self._termination)
        self.add_callback(self._termination)
        with self._termination.listen():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _fitting_manifest(self, checkpoint: Path) -> dict[str, Any]:
        manifest = read_manifest(checkpoint)
        if manifest is None:
            raise ValueError(
                f"{checkpoint} is not whole: its {MANIFEST}, or a file listed there, is missing or cut short"
            )
        if manifest["model_only"]:
            raise ValueError(
                f"{checkpoint} has no optimizer (save_only_model): start from it as a model, in another output folder"
            )
        before, now = manifest["global_batch"], self.get_total_train_batch_size(self.args)
        if before != now:
            raise ValueError(
                f"{checkpoint} was trained with {before} images a step ({manifest['processes']} processes), and this run"
                f" has {now} ({self.args.world_size} processes): choose per_device_train_batch_size and"
                f" gradient_accumulation_steps so that their product with the number of processes is {before}"
            )
        if manifest["processes"] != self.args.world_size:
            logger.warning(
                f"{checkpoint} was trained by {manifest['processes']} processes, and goes on with {self.args.world_size}:"
                f" the same images a step, but sums are rounded otherwise and dropout draws other numbers"
            )
        return manifest

    def evaluate(self, *args, **kwargs):
        """As in Trainer, without a trace in the random numbers of the training: SIGTERM may skip an evaluation."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def get_train_dataloader(self):
        """As in Trainer; the workers outlive a SIGTERM to the whole process group, as the last step needs them."""
        loader = super().get_train_dataloader()
        if self.args.dataloader_num_workers > 0:
            worker_init_fn = partial(_ignore_sigterm, then=loader.worker_init_fn)
            # accelerate iterates over the loader within its own, and copies its own to skip batches.
            for part in (loader, loader.base_dataloader):
                part.worker_init_fn = worker_init_fn
        return loader

    def _run_epoch(self, *args, **kwargs):
        # Trainer takes a step before it looks whether any is left: one too many, where only the last checkpoint was.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    # Checkpoints

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """As in Trainer, in one step.

        Raises:
            OSError: it cannot be written. No earlier checkpoint is touched, and nothing is left of this one.
        """
        run_dir = Path(self._get_output_dir(trial))
        checkpoint = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = run_dir / UNFINISHED
        draft = staging / checkpoint.name
        what = f"the checkpoint of step {self.state.global_step}"
        self._discard_unfinished(run_dir)
        self.accelerator.wait_for_everyone()
        try:
            self._staging = staging
            with writing(what, run_dir):
                super()._save_checkpoint(model, trial)
                self._set_best_checkpoint(run_dir, draft)
            manifest = {
                "processes": self.args.world_size,
                "global_batch": self.get_total_train_batch_size(self.args),
                "model_only": self.args.save_only_model,
                "unlogged": self._unlogged(),
            }
            self.accelerator.wait_for_everyone()
            with writing(what, run_dir):
                if self.args.local_process_index == 0:
                    # Each node has what its own processes wrote in its own memory.
                    flush_tree(draft)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                with writing(what, run_dir):
                    write_durably(draft / MANIFEST, json.dumps(manifest | {"files": _sizes(draft)}, indent=1))
                    if checkpoint.exists():
                        # Not whole, or of a run that this one starts anew.
                        checkpoint.rename(staging / "replaced")
                    draft.rename(checkpoint)
                    flush(run_dir)
                    self._rotate(run_dir, checkpoint)
        finally:
            self._staging = None
            self._discard_unfinished(run_dir)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(checkpoint))

    def _discard_unfinished(self, run_dir: Path) -> None:
        """Remove what a save that failed or was killed has left."""
        if self.args.should_save and (run_dir / UNFINISHED).exists():
            shutil.rmtree(run_dir / UNFINISHED)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Called by Trainer before the checkpoint has its name: `_save_checkpoint` does it afterwards."""

    def _set_best_checkpoint(self, run_dir: Path, draft: Path) -> None:
        """Trainer looks for the best checkpoint beside the draft of this one, and writes down what it finds there."""
        if self.state.best_global_step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if self.state.best_global_step == self.state.global_step or best.is_dir():
                self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(draft / TRAINER_STATE_NAME))

    def _rotate(self, run_dir: Path, newest: Path) -> None:
        """Keep `save_total_limit` whole checkpoints, with the one just written and the best always among them.

        Folders that are not whole do not count, so that they cannot displace one that is.
        """
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        whole = whole_checkpoints(run_dir)
        kept = {newest.name, Path(self.state.best_model_checkpoint or newest).name}
        for old in [path for path in whole if path.name not in kept][: max(0, len(whole) - max(limit, len(kept)))]:
            # Out of its name first: a removal that is killed leaves half a checkpoint.
            old.rename(run_dir / UNFINISHED / old.name)

    # Losses that no log has yet

    def _unlogged(self) -> dict[str, Any]:
        """Sums since the last log, as JSON; means over the processes, all of which must call this."""
        mean = self.accelerator.reduce(self._tr_loss.detach().clone(), reduction="mean")
        return {"loss": mean.item(), "last_logged_step": self._globalstep_last_logged}

    def _restore_unlogged(self, unlogged: dict[str, Any]) -> None:
        self._tr_loss += unlogged["loss"]
        self._globalstep_last_logged = unlogged["last_logged_step"]
        # The mean loss at the end is one over the steps of this call.
        self._total_loss_scalar -= unlogged["loss"]


class _RestoreUnlogged(TrainerCallback):
    """Trainer sets its sums to zero just before this event."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer._resumed_from is not None:
            self.trainer._restore_unlogged(self.trainer._resumed_from["unlogged"])


class TerminationCallback(TrainerCallback):
    """On SIGTERM, asks for a checkpoint at the end of the step and ends the process with code 143.

    Schedulers send SIGTERM and some time later SIGKILL (Slurm after `KillWait`, torchrun and `accelerate launch` after 30
    seconds). A signal that reaches one process counts for all: they agree at the end of each step.
    """

    def __init__(self):
        self._received = False
        self._stopping = False
        self._saved_step = -1
        self._group: dist.ProcessGroup | None = None

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Take SIGTERM as a wish, within."""
        if threading.current_thread() is not threading.main_thread():
            # Only there can Python set a handler; SIGTERM ends the process as ever.
            yield
            return
        self._received = self._stopping = False
        self._saved_step = -1
        previous = signal.signal(signal.SIGTERM, self._receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)
        if self._received:
            # After the last step, whose checkpoint is there already.
            raise SystemExit(SIGTERM_EXIT_CODE)

    def _receive(self, signum, frame):
        self._received = True

    def _agreed(self) -> bool:
        if self._group is None:
            return self._received
        received = torch.tensor(int(self._received))
        dist.all_reduce(received, op=dist.ReduceOp.MAX, group=self._group)
        return bool(received)

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1 and self._group is None:
            # On the CPU, so that asking does not wait for the device.
            self._group = dist.new_group(backend="gloo")

    def on_step_end(self, args, state, control, **kwargs):
        # After the last step of an epoch its own log follows, which the checkpoint is to hold: on_epoch_end then asks.
        if not float(state.epoch).is_integer():
            self._stop_if_asked(state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._stop_if_asked(state, control)

    def _stop_if_asked(self, state, control) -> None:
        if not self._agreed():
            return
        self._stopping = True
        if self._saved_step == state.global_step:
            self._stop(state)
        control.should_save = True
        # It may take longer than the scheduler waits.
        control.should_evaluate = False

    def on_save(self, args, state, control, **kwargs):
        self._saved_step = state.global_step
        if self._stopping:
            self._stop(state)

    def _stop(self, state) -> None:
        if state.is_world_process_zero:
            logger.warning(
                f"SIGTERM: the checkpoint of step {state.global_step} is written; the same command goes on from there"
            )
        raise SystemExit(SIGTERM_EXIT_CODE)


def _ignore_sigterm(worker: int, then) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if then is not None:
        then(worker)
