"""Stored losses of each stage: a refactoring that changes the arithmetic is seen.

`python tests/test_reference_curves.py` writes them anew, where a change was meant: the means of what machines may differ in.
"""

import json
import os
import statistics
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from runs import run_as_typed, write_recipe


CURVES = Path(__file__).parent / "reference_curves.json"

#: What changes last digits, and should change no more. A last digit moves a value to the next level of its grid.
VARIANTS = (
    {"OMP_NUM_THREADS": "1"},
    {"OMP_NUM_THREADS": "2"},
    {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default"},
    {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
)

#: These four are up to 2.0e-3 from their mean (AMD EPYC with AVX2, 2026-11-28), and up to 3.8e-3 from each other.
TOLERANCE = 3e-3

SETTINGS = {
    "max_steps": 20,
    "max_train_samples": None,
    "bit_width": 8,
    "learning_rate": 5.0e-4,
    "scale_learning_rate": 5.0e-6,
    "adam_epsilon": 1.0e-4,
    "feature_weight": 1.0,
    "save_strategy": "no",
    "full_precision": {"aux_weight": 0.0, "distillation_weight": 0.0, "feature_weight": 0.0},
}


def losses_of_all_stages(folder: Path) -> dict[str, list[float]]:
    run_as_typed(write_recipe(folder, **SETTINGS))
    curves = {}
    for stage in ("full_precision", "pretrain", "search", "finetune"):
        history = json.loads((folder / "out" / stage / "trainer_state.json").read_text())["log_history"]
        curves[stage] = [entry["loss"] for entry in history if "loss" in entry]
    return curves


@pytest.mark.slow
def test_the_losses_are_those_that_were_stored(tmp_path):
    stored, now = json.loads(CURVES.read_text()), losses_of_all_stages(tmp_path)
    for stage, expected in stored.items():
        assert len(now[stage]) == 20
        torch.testing.assert_close(torch.tensor(now[stage]), torch.tensor(expected), rtol=0, atol=TOLERANCE, msg=stage)


if __name__ == "__main__":
    found = []
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, variant):
            found.append(losses_of_all_stages(Path(folder)))
    means = {
        stage: [statistics.mean(at) for at in zip(*(one[stage] for one in found), strict=True)] for stage in found[0]
    }
    CURVES.write_text(json.dumps(means, indent=1) + "\n")
