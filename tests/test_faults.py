"""Runs that are killed, and what they do when the same command is typed again."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import RECIPE, ROOT, TWO_PROCESSES, run, same_weights, weights, write_recipe

from quantformer_hf.checkpointing import newest_checkpoint, step_of


STAGES = RECIPE["stages"]
STEPS = 7

#: Steps that are no multiple of an epoch's, logs that are none of the saves, dropout and an evaluation in between.
SMALL = {
    "max_steps": STEPS,
    "save_steps": 2,
    "save_total_limit": 1,
    "logging_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "pnorm": "2",
    "disable_tqdm": True,
    "backbone_config": RECIPE["backbone_config"] | {"hidden_dropout_prob": 0.1},
}
SAVES = [2, 4, 6, 7]


def calls_of(report):
    """The calls of each (stage, what, step)."""
    return {(stage, name, step): calls for stage, name, step, calls in map(json.loads, report.read_text().splitlines())}


def losses(folder):
    """What was logged while training, without times."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [
        {name: value for name, value in entry.items() if not name.startswith("train_")}
        for entry in log
        if "loss" in entry
    ]


@pytest.mark.slow
def test_killed_anywhere_a_run_repeats_the_losses_and_weights_of_an_uninterrupted_one(tmp_path):
    seed = int(os.environ.get("FAULT_SEED", time.time()))
    print(f"moments of FAULT_SEED={seed}")
    moment = random.Random(seed)
    report = tmp_path / "report.txt"
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole, parts = write_recipe(tmp_path / "whole", **SMALL), write_recipe(tmp_path / "parts", **SMALL)
    run(whole, fault={"kill": None, "report": str(report)})
    calls = calls_of(report)
    for stage in STAGES:
        # In the order of the run: a step's own computation comes before its save.
        step, saved = moment.randint(1, STEPS), moment.choice(SAVES)
        kills = [("training_step", step), ("_save_checkpoint", saved)]
        if step > saved:
            kills.reverse()
        for where, at in [*kills, ("end", None)]:
            kill = {"in": where, "stage": stage, "step": at}
            if where != "end":
                kill["calls"] = moment.randint(1, calls[stage, where, at])
            print(kill)
            run(parts, fault={"kill": kill, "report": str(report)}, code=-signal.SIGKILL)
    run(parts)
    for stage in STAGES:
        expected, found = tmp_path / "whole" / "out" / stage, tmp_path / "parts" / "out" / stage
        assert losses(found) == losses(expected), stage
        assert same_weights(weights(found), weights(expected)), stage
        assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in expected.iterdir())
    results = [(tmp_path / name / "out" / "all_results.json").read_text() for name in ("whole", "parts")]
    assert results[0] == results[1]


# Signals and launchers


#: Long enough to be interrupted; three steps an epoch.
LONG = {
    "stages": ["full_precision"],
    "num_train_epochs": 40,
    "per_device_train_batch_size": 16,
    "save_steps": 4,
    "disable_tqdm": True,
}


def start(recipe, launcher=()):
    """A run in a process group of its own, as a scheduler starts it."""
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "run_quantformer.py"), str(recipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def finish(process, timeout=180):
    """Exit code, output, and the seconds that the process still took."""
    started = time.monotonic()
    try:
        output = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(process.communicate()[0]) from None
    return process.returncode, output, time.monotonic() - started


def wait_for(path, process):
    deadline = time.monotonic() + 180
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            # Of those that have ended there is none to kill.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(process.communicate()[0])
        time.sleep(0.05)


def newest_step(folder):
    return step_of(newest_checkpoint(folder))


def workers_of(process):
    """The children of the launcher that train, by rank."""
    ranks = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_text().split("\0") if parent == process.pid else ()
        except (FileNotFoundError, ProcessLookupError):
            # It ended while we looked.
            continue
        ranks |= {int(v.removeprefix("RANK=")): int(folder.name) for v in variables if v.startswith("RANK=")}
    return ranks


@pytest.mark.slow
def test_sigterm_to_a_run_and_its_loaders_writes_a_checkpoint_and_the_same_command_resumes(tmp_path):
    # Long epochs, so that the signal finds the loaders at work.
    recipe = write_recipe(tmp_path, **LONG | {"dataloader_num_workers": 2, "max_train_samples": 1000})
    folder = tmp_path / "out" / "full_precision"
    process = start(recipe)
    wait_for(folder / "checkpoint-4", process)
    os.killpg(process.pid, signal.SIGTERM)
    code, output, _ = finish(process)
    assert code == 143, output
    step = newest_step(folder)
    assert f"SIGTERM: the checkpoint of step {step} is written" in output
    assert "Traceback" not in output
    process = start(recipe)
    wait_for(folder / f"checkpoint-{step + 4 - step % 4}", process)
    process.kill()
    process.communicate()
    losses_of_a_step = {}
    for entry in json.loads((newest_checkpoint(folder) / "trainer_state.json").read_text())["log_history"]:
        losses_of_a_step.setdefault(entry["step"], []).append(entry["loss"])
    # Each step once: it went on, and did not start anew.
    assert all(len(found) == 1 for found in losses_of_a_step.values())


@pytest.mark.slow
def test_two_processes_of_which_one_dies_or_that_get_sigterm_and_then_one_goes_on(tmp_path):
    recipe = write_recipe(tmp_path, **LONG | {"per_device_train_batch_size": 8})
    folder = tmp_path / "out" / "full_precision"

    process = start(recipe, launcher=TWO_PROCESSES)
    wait_for(folder / "checkpoint-4", process)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    code, output, seconds = finish(process)
    print(f"ended {seconds:.1f} s after the death of one process")
    assert code != 0
    assert seconds < 60, output
    step = newest_step(folder)

    process = start(recipe, launcher=TWO_PROCESSES)
    wait_for(folder / f"checkpoint-{step + 4}", process)
    process.send_signal(signal.SIGTERM)
    code, output, seconds = finish(process)
    print(f"ended {seconds:.1f} s after SIGTERM to the launcher")
    assert code != 0
    stopped = newest_step(folder)
    assert stopped >= step + 4
    assert f"SIGTERM: the checkpoint of step {stopped} is written" in output

    done = run(recipe, code=1)
    assert "of a run with 16 images a step, and this one has 8" in done.stderr
    assert "Traceback" not in done.stderr
    done = run(recipe, "--per_device_train_batch_size", 16)
    assert "trained by 2 processes, and goes on with 1" in done.stderr
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 241))


@pytest.mark.slow
def test_an_output_folder_that_cannot_be_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(write_recipe(tmp_path), "--output_dir", tmp_path / "file" / "out", code=1)
    assert f"the output folder {tmp_path / 'file' / 'out'} cannot be read and written" in done.stderr
    assert "Traceback" not in done.stderr
