"""Runs of `run_quantformer.py`: a small recipe, real processes, and quick ones."""

import atexit
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from conftest import IMAGE_SIZE, make_full_precision
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor

from quantformer_hf.arguments import RunArguments
from quantformer_hf.data import load_image_data
from quantformer_hf.stages import StageRun


ROOT = Path(__file__).parents[1]

RECIPE = {
    "stages": ["full_precision", "pretrain", "search", "finetune"],
    "dataset_name": "digits",
    "max_train_samples": 96,
    "max_eval_samples": 40,
    "crop_scale": 0.8,
    "horizontal_flip": 0.0,
    "calibration_samples": 32,
    "backbone_config": {
        "model_type": "vit",
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    },
    "num_groups": 4,
    "per_device_train_batch_size": 16,
    "num_train_epochs": 2,
    "learning_rate": 1.0e-3,
    "aux_weight": 1.0,
    "distillation_weight": 1.0,
    "search": {"dm_weight": 0.1},
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "report_to": "none",
    "use_cpu": True,
}

# accelerate starts several processes on CPUs through its launcher for GPUs; use_cpu in the recipe keeps them there.
TWO_PROCESSES = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
TWO_PROCESSES += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")


def write_recipe(folder, **changes):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(folder / "out")} | changes))
    return path


def run_as_typed(*arguments, launcher=()):
    """A process of its own, from Python's start to its end."""
    command = [sys.executable, *launcher, str(ROOT / "run_quantformer.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@functools.cache
def _server():
    """One for this process."""
    command = [sys.executable, str(ROOT / "tests" / "run_server.py")]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    # It ends with what it reads.
    atexit.register(server.communicate)
    return server


def run(*arguments, code=0, fault=None):
    """The same without the seconds of the imports and of the compiler: see `run_server.py`.

    Args:
        code: the exit code that is expected; None if that is for the caller to judge.
        fault: the arguments of `faults.arm`.
    """
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        files = {name: f"{folder}/{name}" for name in ("stdout", "stderr")}
        order = {"argv": [str(argument) for argument in arguments], "fault": fault} | files
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        returned = int(server.stdout.readline())
        stdout, stderr = (Path(path).read_text() for path in files.values())
    assert code in (returned, None), stdout + stderr
    return subprocess.CompletedProcess(order["argv"], returned, stdout, stderr)


def weights(folder):
    return AutoModelForImageClassification.from_pretrained(folder).state_dict()


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def save_classifier(folder, image_size=IMAGE_SIZE, **changes):
    """A classifier of digits, and the processor of its images."""
    sizes = make_full_precision().config.to_dict() | {"num_labels": 10, "image_size": image_size}
    for name in ("id2label", "label2id"):
        del sizes[name]
    ViTForImageClassification(ViTConfig(**sizes | changes)).save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    crop = {"size": {"shortest_edge": image_size + 4}, "do_center_crop": True, "crop_size": size}
    ViTImageProcessor(**crop).save_pretrained(folder)
    return str(folder)


def make_stage(name, source, folder, *flags):
    """A stage that starts from `source`, and its data."""
    flags = ["--dataset_name", "digits", "--use_cpu", "True", "--report_to", "none", "--num_groups", "4", *flags]
    told = RunArguments([*flags, "--output_dir", str(folder)]).for_stage(name)
    return StageRun(told, source, folder), load_image_data(told.data, told.training.seed)
