"""Runs that are killed, and what they do when the same command is typed again."""

import json
import os
import random
import subprocess
import sys
import time

import pytest
from test_run_quantformer import RECIPE, ROOT, same_weights, weights, write_recipe


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


class Worker:
    """`fault_worker.py`, which runs one command after the other."""

    def __init__(self, folder):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "fault_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            # Compiling anew in each child would be most of the time.
            env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
        )

    def run(self, recipe, kill=None):
        """The exit code, and the calls of each (stage, what, step)."""
        log, report = self.folder / "log.txt", self.folder / "report.txt"
        order = {"argv": [str(recipe)], "kill": kill, "log": str(log), "report": str(report)}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        if code not in (0, -9):
            raise AssertionError(log.read_text()[-5000:])
        calls = [json.loads(line) for line in report.read_text().splitlines()]
        return code, {(stage, name, step): number for stage, name, step, number in calls}

    def close(self):
        self.process.stdin.close()
        self.process.wait()


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
    worker = Worker(tmp_path)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole, parts = write_recipe(tmp_path / "whole", **SMALL), write_recipe(tmp_path / "parts", **SMALL)
    code, calls = worker.run(whole)
    assert code == 0
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
            code, _ = worker.run(parts, kill)
            assert code == -9, (kill, (tmp_path / "log.txt").read_text()[-3000:])
    code, _ = worker.run(parts)
    assert code == 0
    worker.close()
    for stage in STAGES:
        expected, found = tmp_path / "whole" / "out" / stage, tmp_path / "parts" / "out" / stage
        assert losses(found) == losses(expected), stage
        assert same_weights(weights(found), weights(expected)), stage
        assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in expected.iterdir())
    results = [(tmp_path / name / "out" / "all_results.json").read_text() for name in ("whole", "parts")]
    assert results[0] == results[1]
