"""`ResumableTrainer`: a Trainer whose runs outlive a fault."""

import ctypes
import json
import logging
import shutil
from functools import partial
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .checkpointing import (
    MANIFEST,
    UNFINISHED,
    flush,
    flush_tree,
    newest_checkpoint,
    read_manifest,
    sizes,
    whole_checkpoints,
    write_durably,
    writing,
)
from .pretrained import QuantformerPreTrainedModel
from .termination import TerminationCallback, ignore_sigterm


logger = logging.getLogger(__name__)


class ResumableTrainer(Trainer):
    """A `Trainer` whose checkpoints are whole, and that ends on SIGTERM after writing one.

    What it repeats exactly on resuming, beyond `Trainer`: losses logged over steps on both sides of the interruption, and
    a run that was interrupted between its last step and its end.
    """

    #: Whether SIGTERM leaves a checkpoint.
    saves_on_sigterm = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        #: Stands in for the output folder while a checkpoint is written.
        self._staging: Path | None = None
        self._termination = TerminationCallback(self.saves_on_sigterm)
        self.add_callback(self._termination)
        self.add_callback(_Resumption(self))
        self._resumed_from: Path | None = None
        #: Of the loaders' workers as well: whether a training runs, which needs them.
        self._running: ctypes.c_byte | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in Trainer.

        Raises:
            ValueError: a checkpoint that is not whole, has no optimizer, or is of a run with another global batch.
            FloatingPointError: weights that are not finite any more, which are not saved.
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
            self._resumed_from = Path(resume_from_checkpoint)
            self._check_fits(self._resumed_from)
            resume_from_checkpoint = str(resume_from_checkpoint)
        self._discard_unfinished(Path(self.args.output_dir))
        # Behind callbacks that were added since, so that its word is the last.
        self.remove_callback(self._termination)
        self.add_callback(self._termination)
        self._running = RawValue("b", True)
        try:
            with self._termination.listen():
                result = super().train(resume_from_checkpoint, *args, **kwargs)
            self._check_weights()
            return result
        finally:
            self._running.value = False
            self._running = None

    def _check_fits(self, checkpoint: Path) -> None:
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
            if isinstance(self.train_dataset, IterableDataset):
                raise ValueError(
                    f"{checkpoint} was trained by {manifest['processes']} processes, each with its part of a stream, and"
                    f" this run has {self.args.world_size}: start as many, or choose another output folder"
                )
            logger.warning(
                f"{checkpoint} was trained by {manifest['processes']} processes, and goes on with {self.args.world_size}:"
                f" the same images a step, but sums are rounded otherwise and dropout draws other numbers"
            )

    def _check_weights(self) -> None:
        for name, parameter in self.model.named_parameters():
            # Each process looks at its own part of one that is sharded.
            values = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if not torch.isfinite(values).all():
                raise FloatingPointError(
                    f"{name} is not finite after step {self.state.global_step}: lower the learning rate, in another"
                    f" output_dir; checkpoints from before are in {self.args.output_dir}"
                )

    def evaluate(self, *args, **kwargs):
        """As in Trainer, without a trace in the random numbers of the training: SIGTERM may skip an evaluation."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def get_train_dataloader(self):
        """As in Trainer; its workers outlive a SIGTERM to the whole process group: the last step needs them."""
        return self._outliving_sigterm(super().get_train_dataloader())

    def get_eval_dataloader(self, *args, **kwargs):
        """As in Trainer; so do its workers while a training runs: an evaluation is finished before its end."""
        return self._outliving_sigterm(super().get_eval_dataloader(*args, **kwargs))

    def _outliving_sigterm(self, loader):
        if self.args.dataloader_num_workers > 0 and self._running is not None:
            worker_init_fn = partial(ignore_sigterm, running=self._running, then=loader.worker_init_fn)
            # accelerate iterates over the loader within its own, and copies its own to skip batches.
            for part in (loader, getattr(loader, "base_dataloader", loader)):
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
            FloatingPointError: weights are not finite, from which nothing could go on.
        """
        self._check_weights()
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
                    write_durably(draft / MANIFEST, json.dumps(manifest | {"files": sizes(draft)}, indent=1))
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

    def _finish_rotation(self, resumed: Path) -> None:
        """Do what a save that was killed just before the end left to do: with no step to go, no other save follows."""
        if not self.args.should_save:
            # Another process removes what this one would read.
            return
        run_dir = resumed.parent
        # A run may also go on from an earlier checkpoint, or from another folder's: none goes for that.
        if whole_checkpoints(run_dir)[-1:] == [resumed] and run_dir.samefile(self.args.output_dir):
            (run_dir / UNFINISHED).mkdir()
            self._rotate(run_dir, resumed)
            self._discard_unfinished(run_dir)

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

    def _load_best_model(self) -> None:
        """As at the start of a resumed run, and for the same reason."""
        if self._is_sharded():
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load through `from_pretrained`, which knows every layout of the names and checks what it finds.

        Trainer's own way is `load_state_dict(strict=False)`, which restores nothing under another name and says so in a
        warning at most.
        """
        if self._is_sharded():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        model = self.model if model is None else model
        saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
        if isinstance(model, QuantformerPreTrainedModel):
            model.follow_stage(saved.config)
        model.load_state_dict(saved.state_dict())

    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled


class _Resumption(TrainerCallback):
    """Trainer sets its sums to zero, and loads its state, just before this event."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        resumed = self.trainer._resumed_from
        if resumed is not None:
            self.trainer._restore_unlogged(read_manifest(resumed)["unlogged"])
            self.trainer._finish_rotation(resumed)
