"""What is whole, what is kept, and what is resumed."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import make_full_precision, make_quantized
from torch.utils.data import IterableDataset
from trainers import ALL_LOSSES, StopAt, logged, make_trainer
from transformers import TrainerCallback

from quantformer_hf import resumable_trainer
from quantformer_hf.checkpointing import MANIFEST, UNFINISHED, check_writable, newest_checkpoint, whole_checkpoints


EACH_STEP = {"save_strategy": "steps", "save_steps": 1}


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def quantized_trainer(folder, callbacks=(), **arguments):
    arguments = {"max_steps": 5} | EACH_STEP | arguments
    return make_trainer(folder, make_quantized(), make_full_precision(), callbacks=list(callbacks), **arguments)


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def checkpoints(tmp_path):
    """checkpoint-1 and checkpoint-2."""
    make_trainer(tmp_path, make_quantized(), max_steps=2, **EACH_STEP).train()
    return tmp_path


# Whole or not


def test_a_checkpoint_that_was_cut_short_anywhere_is_not_taken(checkpoints):
    assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-2"
    files = sorted(path for path in (checkpoints / "checkpoint-2").iterdir() if path.stat().st_size)
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", MANIFEST} < {path.name for path in files}
    moment = random.Random(0)
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[: moment.randrange(len(content))])
        assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-1", path
        path.unlink()
        assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-1", path
        path.write_bytes(content)
        assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-2", path


def test_what_is_no_checkpoint_is_passed_over(checkpoints):
    (checkpoints / "checkpoint-best").mkdir()
    (checkpoints / "checkpoint-7").mkdir()
    (checkpoints / "checkpoint-8").write_text("a file")
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / UNFINISHED / "checkpoint-9")
    for number, content in enumerate(("{}", "null", "[]", '{"files": 1}'), start=10):
        shutil.copytree(checkpoints / "checkpoint-2", checkpoints / f"checkpoint-{number}")
        (checkpoints / f"checkpoint-{number}" / MANIFEST).write_text(content)
    assert [path.name for path in whole_checkpoints(checkpoints)] == ["checkpoint-1", "checkpoint-2"]
    assert newest_checkpoint(checkpoints / "nowhere") is None


def test_half_a_checkpoint_is_refused_by_name_and_none_by_true(checkpoints):
    (checkpoints / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="checkpoint-2 is not whole"):
        quantized_trainer(checkpoints).train(resume_from_checkpoint=str(checkpoints / "checkpoint-2"))
    with pytest.raises(ValueError, match="there is no whole checkpoint"):
        quantized_trainer(checkpoints / "empty").train(resume_from_checkpoint=True)


# What is kept


def test_the_limit_keeps_the_newest_whole_checkpoint_beside_half_a_newer_one(checkpoints):
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-4")
    (checkpoints / "checkpoint-4" / MANIFEST).unlink()
    (checkpoints / UNFINISHED).mkdir()
    seen = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append([path.name for path in whole_checkpoints(checkpoints)])

    trainer = quantized_trainer(checkpoints, [Look()], save_total_limit=1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5
    # Step 4 is written in place of the half.
    assert seen == [["checkpoint-3"], ["checkpoint-4"], ["checkpoint-5"]]
    assert names(checkpoints) == ["checkpoint-5"]


def test_a_run_killed_after_its_last_save_keeps_the_limit_when_it_goes_on(tmp_path):
    quantized_trainer(tmp_path).train()
    assert len(names(tmp_path)) == 5
    # From an earlier one, steps are taken anew; what is there stays until they are.
    trainer = quantized_trainer(tmp_path, save_total_limit=1, max_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(names(tmp_path)) == 5
    trainer = quantized_trainer(tmp_path, save_total_limit=1)
    trainer.train(resume_from_checkpoint=True)
    assert names(tmp_path) == ["checkpoint-5"]


def test_a_run_that_goes_on_keeps_its_best_checkpoint_too(tmp_path):
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    arguments |= {"metric_for_best_model": "eval_loss", "greater_is_better": True, "learning_rate": 1e-2}
    trainer = quantized_trainer(tmp_path, **arguments)
    trainer.train()
    assert trainer.state.best_global_step < 4
    quantized_trainer(tmp_path, save_total_limit=2, **arguments).train(resume_from_checkpoint=True)
    assert names(tmp_path) == [f"checkpoint-{trainer.state.best_global_step}", "checkpoint-5"]


def test_a_process_that_saves_nothing_does_not_look_at_what_another_removes(tmp_path, monkeypatch):
    quantized_trainer(tmp_path).train()
    trainer = quantized_trainer(tmp_path, save_total_limit=1)
    monkeypatch.setattr(type(trainer.args), "should_save", property(lambda arguments: False))
    monkeypatch.setattr(resumable_trainer, "whole_checkpoints", lambda folder: pytest.fail("looked"))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert len(names(tmp_path)) == 5


def test_the_limit_keeps_the_best_checkpoint_and_remembers_where_it_is(tmp_path):
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    arguments |= {"metric_for_best_model": "eval_loss", "greater_is_better": True, "learning_rate": 1e-2}
    trainer = quantized_trainer(tmp_path, save_total_limit=2, **arguments)
    trainer.train()
    best = tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    assert {best.name, "checkpoint-5"} <= set(names(tmp_path))
    assert len(names(tmp_path)) <= 2
    assert trainer.state.best_model_checkpoint == str(best)
    state = json.loads((newest_checkpoint(tmp_path) / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)


def test_a_full_disk_is_named_and_leaves_the_last_checkpoint_alone(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class FillDisk(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                weights = (tmp_path / str(room) / "checkpoint-2" / "model.safetensors").stat().st_size
                # Writing beyond is an error, as on a full disk: Python ignores the signal.
                resource.setrlimit(resource.RLIMIT_FSIZE, (weights + room, hard))

    # Too little for the weights (safetensors fails), or for the larger state of the optimizer (torch.save fails).
    for room in (-1, 1):
        folder = tmp_path / str(room)
        try:
            with pytest.raises(OSError, match=r"the checkpoint of step 3 cannot be written to .* MB free"):
                quantized_trainer(folder, [FillDisk()], save_total_limit=1).train()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert names(folder) == ["checkpoint-2"]
        resumed = quantized_trainer(folder)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 5


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            OSError, match=f"the output folder {folder} cannot be read and written .* another --output_dir"
        ):
            check_writable(folder)
    check_writable(tmp_path / "new" / "deep")
    assert names(tmp_path / "new" / "deep") == []


# Resuming


def test_losses_of_steps_on_both_sides_of_an_interruption_are_logged_as_without_it(tmp_path):
    arguments = {"logging_steps": 4, "num_train_epochs": 2, "max_steps": -1, "gradient_share_steps": 5} | ALL_LOSSES
    whole = quantized_trainer(tmp_path / "whole", **arguments)
    result = whole.train()
    quantized_trainer(tmp_path / "parts", [StopAt(6)], **arguments).train()
    resumed = quantized_trainer(tmp_path / "parts", **arguments)
    resumed.train(resume_from_checkpoint=True)
    for name in ("loss", "loss_task", "loss_attention", "gradient_share_task"):
        assert len(logged(whole, name)) >= 2
        assert logged(resumed, name) == logged(whole, name), name
    assert same_weights(resumed, whole)
    assert result.global_step == 12


def test_resumed_after_the_last_step_of_a_part_of_an_epoch_a_run_takes_no_further_one(tmp_path):
    whole = quantized_trainer(tmp_path, max_steps=5)
    whole.train()
    resumed = quantized_trainer(tmp_path, max_steps=5)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    assert same_weights(resumed, whole)


def test_an_evaluation_leaves_the_random_numbers_alone(tmp_path):
    trainer = quantized_trainer(tmp_path)
    before = torch.get_rng_state()
    trainer.evaluate()
    assert torch.equal(before, torch.get_rng_state())


def test_another_global_batch_is_refused_and_the_same_in_other_parts_goes_on(tmp_path):
    # Eight bits and small steps: at four, the last digit of a sum in another order moves an activation to the next level.
    def trainer(**arguments):
        steady = {"max_steps": 5, "learning_rate": 1e-4, "scale_learning_rate": 1e-6, "adam_epsilon": 1e-4}
        return make_trainer(tmp_path, make_quantized(bit_width=8), **steady | arguments)

    trainer(max_steps=2, **EACH_STEP).train()
    with pytest.raises(ValueError, match=r"with 4 images a step \(1 processes\), and this run has 8 .* is 4"):
        trainer(per_device_train_batch_size=8).train(resume_from_checkpoint=True)
    losses, norms = [], []
    for size, accumulated in ((4, 1), (2, 2)):
        parts = trainer(per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)
        parts.train(resume_from_checkpoint=True)
        losses.append(logged(parts))
        norms.append(logged(parts, "grad_norm"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)


def test_a_stream_goes_on_with_as_many_processes(tmp_path):
    quantized_trainer(tmp_path, max_steps=2, save_steps=2).train()
    manifest = tmp_path / "checkpoint-2" / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"processes": 2}))
    trainer = quantized_trainer(tmp_path, max_steps=3)
    trainer.train_dataset = Stream(trainer.train_dataset)
    with pytest.raises(
        ValueError, match=r"by 2 processes, each with its part of a stream, and this run has 1: start as"
    ):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_without_optimizer_is_not_resumed(tmp_path):
    quantized_trainer(tmp_path, save_only_model=True, max_steps=1).train()
    with pytest.raises(ValueError, match="has no optimizer"):
        quantized_trainer(tmp_path).train(resume_from_checkpoint=True)


# SIGTERM


class TerminateAt(TrainerCallback):
    def __init__(self, event, step):
        self.step = step
        setattr(self, event, self.terminate)

    def terminate(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("event", "step", "saved"),
    [
        ("on_step_begin", 2, 3),
        # At an epoch's last step, by the schedule of checkpoints; while one is written; at an epoch's end.
        ("on_step_begin", 5, 6),
        ("on_save", 4, 5),
        ("on_epoch_end", 6, 6),
    ],
)
def test_sigterm_writes_a_checkpoint_and_ends_with_143(event, step, saved, tmp_path):
    arguments = {"max_steps": -1, "save_steps": 4, "logging_steps": 4, "eval_strategy": "epoch"}
    handler = signal.getsignal(signal.SIGTERM)
    whole = quantized_trainer(tmp_path / "whole", **arguments)
    whole.train()
    with pytest.raises(SystemExit) as stopped:
        quantized_trainer(tmp_path / "parts", [TerminateAt(event, step)], **arguments).train()
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert newest_checkpoint(tmp_path / "parts").name == f"checkpoint-{saved}"
    resumed = quantized_trainer(tmp_path / "parts", **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logged(whole)
    assert same_weights(resumed, whole)


def test_sigterm_after_the_last_step_ends_with_143_too(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        quantized_trainer(tmp_path, [TerminateAt("on_train_end", 2)], max_steps=2).train()
    assert stopped.value.code == 143
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"


#: A process whose training ends by itself (0) or by an error (1) while loaders are at work, or kept.
WITH_LOADERS = """
import sys
from conftest import make_quantized
from trainers import make_trainer
from transformers import TrainerCallback

class Fail(TrainerCallback):
    def on_step_end(self, *given, **kwargs):
        raise MemoryError("out of memory")

callbacks, arguments = ([Fail()], {}) if sys.argv[1] == "1" else ([], {"dataloader_persistent_workers": True})
make_trainer(sys.argv[2], make_quantized(), None, callbacks, max_steps=2, dataloader_num_workers=2, **arguments).train()
"""


@pytest.mark.parametrize("code", [0, 1])
def test_a_process_ends_with_its_loaders(code, tmp_path):
    command = [sys.executable, "-c", WITH_LOADERS, str(code), str(tmp_path)]
    # In a group of its own: workers that ignore the signal would stay behind.
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=Path(__file__).parent
    )
    try:
        error = process.communicate(timeout=120)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code
    assert ("MemoryError" in error) == bool(code)


#: A process that gets SIGTERM with its whole group, loaders too, in the middle of an evaluation.
TERMINATED_IN_EVALUATION = """
import os, signal, sys
from conftest import make_quantized
from trainers import make_trainer
from transformers import TrainerCallback

class Terminate(TrainerCallback):
    def on_prediction_step(self, args, state, control, **kwargs):
        if state.global_step == 2 and not vars(self).get("sent"):
            self.sent = True
            os.killpg(0, signal.SIGTERM)

evaluating = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1}
trainer = make_trainer(sys.argv[1], make_quantized(), None, [Terminate()], dataloader_num_workers=2, **evaluating)
trainer.train()
"""


def test_sigterm_to_a_group_in_an_evaluation_writes_a_checkpoint(tmp_path):
    command = [sys.executable, "-c", TERMINATED_IN_EVALUATION, str(tmp_path)]
    process = subprocess.run(
        command, capture_output=True, text=True, start_new_session=True, cwd=Path(__file__).parent, timeout=120
    )
    assert process.returncode == 143, process.stderr
    # The step after the one that was evaluated is taken yet.
    assert newest_checkpoint(tmp_path).name == "checkpoint-3"


def test_training_in_another_thread_leaves_signals_alone(tmp_path):
    trainer = quantized_trainer(tmp_path, max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert newest_checkpoint(tmp_path).name == "checkpoint-1"
