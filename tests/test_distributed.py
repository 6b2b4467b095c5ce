"""The real launcher: two processes on a CPU do what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from test_run_quantformer import ROOT, write_recipe


HERE = Path(__file__).parent / "distributed"

#: Eight bits, and steps that are small against the rounding noise of a sum over two processes: at four bits a last digit
#: that differs now and then moves an activation to the next level, and then everything.
STEADY = {
    "max_train_samples": None,
    "max_steps": 10,
    "bit_width": 8,
    "learning_rate": 1.0e-4,
    "scale_learning_rate": 1.0e-6,
    "adam_epsilon": 1.0e-4,
    "feature_weight": 1.0,
    "save_strategy": "no",
    "full_precision": {"aux_weight": 0.0, "distillation_weight": 0.0, "feature_weight": 0.0},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    path = write_recipe(folder, **STEADY)
    launch(path, "--stages", "full_precision", "--output_dir", folder / "start")
    return path


def launch(recipe, *arguments, processes=1):
    launcher = (
        ["-m", "accelerate.commands.launch", "--config_file", str(HERE / "ddp_cpu.yaml")] if processes > 1 else []
    )
    report = recipe.parent / f"report_{processes}"
    report.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, *launcher, str(HERE / "run_and_report.py"), str(recipe), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=540,
        env=os.environ | {"OMP_NUM_THREADS": "1", "REPORT_DIR": str(report)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def both(recipe):
    """The same stages by one process and by two, with the same global batch; the last one freezes on its way."""
    for processes, batch_size in ((1, 16), (2, 8)):
        common = ["--per_device_train_batch_size", batch_size, "--output_dir", recipe.parent / f"by_{processes}"]
        start = recipe.parent / "start" / "full_precision"
        launch(
            recipe,
            "--stages",
            "pretrain",
            "search",
            "finetune",
            "--model_name_or_path",
            start,
            *common,
            processes=processes,
        )
        common[-1] = recipe.parent / f"frozen_by_{processes}"
        start = recipe.parent / "by_1" / "pretrain"
        flags = ["--stages", "search", "--search.search_steps", 5, "--model_name_or_path", start]
        launch(recipe, *flags, *common, processes=processes)
    return recipe.parent


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return torch.tensor([entry["loss"] for entry in history if "loss" in entry])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["by_{}/pretrain", "by_{}/search", "frozen_by_{}/search"])
def test_two_processes_have_the_losses_of_one(both, stage):
    one, two = (losses(both / stage.format(processes)) for processes in (1, 2))
    assert len(one) == 10
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["by_{}/finetune", "frozen_by_{}/search"])
def test_two_processes_freeze_the_groups_of_one(both, stage):
    one, two = (load_file(both / stage.format(processes) / "model.safetensors") for processes in (1, 2))
    names = [name for name in one if name.endswith("group_index")]
    assert len(names) == 8
    assert all(torch.equal(one[name], two[name]) for name in names)


@pytest.mark.slow
def test_every_process_ends_with_the_same_model(both):
    reports = sorted((both / "report_2").iterdir())
    assert len(reports) == 2 * 4
    for first, second in zip(reports[::2], reports[1::2], strict=True):
        assert json.loads(first.read_text()) == json.loads(second.read_text())


@pytest.mark.parametrize("name", ["ddp", "ddp_multi_node", "fsdp2", "zero2"])
def test_the_shipped_configurations_are_what_accelerate_reads(name):
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == 4 * config.num_machines
    assert config.mixed_precision == "bf16"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="accelerate turns FSDP2 on for accelerators only: two GPUs")
def test_all_stages_run_under_fsdp2(recipe):
    config = ["--config_file", str(ROOT / "configs" / "accelerate" / "fsdp2.yaml"), "--num_processes", "2"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *config, "--mixed_precision", "no"]
    start, out = recipe.parent / "start" / "full_precision", recipe.parent / "fsdp2"
    flags = ["--stages", "pretrain", "search", "finetune", "--model_name_or_path", str(start), "--use_cpu", "False"]
    batch = ["--per_device_train_batch_size", "8", "--output_dir", str(out)]
    subprocess.run([*command, str(ROOT / "run_quantformer.py"), str(recipe), *flags, *batch], check=True, timeout=540)
    assert all(losses(out / stage).isfinite().all() for stage in ("pretrain", "search", "finetune"))


@pytest.mark.slow
def test_parameters_spread_by_fsdp2_have_the_gradients_of_whole_ones():
    """accelerate turns FSDP on for accelerators only; this is what it would call, on gloo."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(HERE / "fsdp2_gradients.py")],
        capture_output=True,
        text=True,
        timeout=540,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-3:] == ["pretrain: same", "search: same", "finetune: same"]
