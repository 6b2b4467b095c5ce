"""`--stages allocate ...`, as a user types it."""

import json
import subprocess
import sys

import pytest
import yaml
from PIL import Image
from runs import RECIPE, ROOT, run
from transformers import AutoModelForImageClassification

from quantformer_hf import QuantformerConfig
from quantformer_hf.arguments import RunArguments
from quantformer_hf.layer_bits import LayerBits
from quantformer_hf.mixed_precision.allocation_file import BitAllocation
from quantformer_hf.mixed_precision.budget import parse_budgets
from quantformer_hf.mixed_precision.cost import budget_in_numbers
from quantformer_hf.mixed_precision.latency_table import LatencyTable
from quantformer_hf.mixed_precision.pictures import draw_bits
from quantformer_hf.mixed_precision.stage import check_later_stages
from quantformer_hf.report import weights_on_disk


FLAGS = ["--dataset_name", "digits"]

#: A run whose process gets SIGTERM in its second step.
STOPPED_AT_STEP_2 = """
import os, runpy, signal, sys
from transformers import Trainer
step = Trainer.training_step
def stopping(self, *arguments, **named):
    if self.state.global_step == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, *arguments, **named)
Trainer.training_step = stopping
sys.argv[0] = "run_quantformer.py"
runpy.run_path("run_quantformer.py", run_name="__main__")
"""


def test_flags_of_the_allocation_are_read():
    told = RunArguments([*FLAGS, "--budget", "2.5MB", "20GBitOps", "--candidate_bits", "4", "2", "--refine", "3"])
    allocation = told.for_stage("allocate").allocation
    assert [(b.unit, b.most) for b in allocation.budgets()] == [("bytes", 2.5e6), ("BitOps", 20e9)]
    assert (allocation.candidate_bits, allocation.refine) == ([2, 4], 3)


def test_one_value_in_a_file_needs_no_brackets(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("dataset_name: digits\nbudget: 120kB\ncandidate_bits: 4\n")
    allocation = RunArguments([str(path)]).for_stage("allocate").allocation
    assert [(b.unit, b.most) for b in allocation.budgets()] == [("bytes", 120e3)]
    assert allocation.candidate_bits == [4]


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ({"finetune": {"num_groups": 32}}, "num_groups is 32 in the stage 'finetune' and .* in the stage 'allocate'"),
        ({"finetune": {"image_size": 32}}, "image_size is 32 in the stage 'finetune' and None in the stage 'allocate'"),
        ({"search": {"layer_bits": {"vit.layers.*": 8}}}, "leave it out of the stage 'search'"),
    ],
)
def test_later_stages_cannot_make_another_model_of_an_allocation(tmp_path, later, message):
    path = tmp_path / "recipe.yaml"
    stages = ["allocate", "search", "finetune"]
    path.write_text(yaml.safe_dump({"dataset_name": "digits", "budget": "120kB", "stages": stages} | later))
    with pytest.raises(ValueError, match=message):
        check_later_stages(RunArguments([str(path)]), stages)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget", "2.5"], "budget is '2.5'"),
        (["--candidate_bits", "4", "9"], "candidate_bits has 9: choose from 1 to 8"),
        (["--attention_candidate_bits", "1", "6"], "attention_candidate_bits has 1: choose from 2 to 8"),
        (["--allocation_method", "haq"], "allocation_method is 'haq': choose one of budget, edmips"),
        (["--refine", "-1"], "refine is -1"),
        (["--cost_weight", "-1"], "cost_weight is -1"),
        (["--refine", "2", "--allocation_method", "edmips"], "leave it at 0 with edmips"),
    ],
)
def test_wrong_flags_are_explained(flags, message):
    with pytest.raises(ValueError, match=message):
        RunArguments([*FLAGS, *flags]).for_stage("allocate")


def test_a_picture_of_the_bits_is_a_png(tmp_path):
    widths = {f"vit.layers.{i}.{kind}": LayerBits(i + 2, 3) for i in range(3) for kind in ("fc1", "fc2")}
    draw_bits(widths, tmp_path / "bits.png")
    with Image.open(tmp_path / "bits.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300


@pytest.fixture(scope="module")
def full_precision(tmp_path_factory):
    """A digits classifier, trained by the recipe."""
    folder = tmp_path_factory.mktemp("full_precision")
    recipe = RECIPE | {"stages": ["full_precision"], "output_dir": str(folder)}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    run(path)
    return folder / "full_precision"


def write_recipe(folder, full_precision, **changes):
    recipe = RECIPE | {
        "model_name_or_path": str(full_precision),
        "output_dir": str(folder / "out"),
        "num_train_epochs": 1,
    }
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"save_strategy": "no"} | changes))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("method", "operations"), [("budget", "W3A4"), ("edmips", "7MBitOps")])
def test_one_command_makes_a_checkpoint_within_the_budget(full_precision, tmp_path, method, operations):
    recipe = write_recipe(
        tmp_path,
        full_precision,
        stages=["allocate", "pretrain", "search", "finetune"],
        budget=["28kB", operations],
        allocation_method=method,
        sensitivity_samples=16,
        candidate_bits=[2, 3, 4, 8],
    )
    done = run(recipe)
    out = tmp_path / "out"
    allocation = BitAllocation.read(out / "allocate" / "bit_allocation.json")
    assert allocation.method == method
    assert weights_on_disk(out / "packed") == allocation.cost["bytes"] <= 28_000
    most = budget_in_numbers(*parse_budgets([operations]), QuantformerConfig.from_pretrained(out / "packed")).most
    assert 0.9 * most < allocation.cost["BitOps"] <= most
    assert len({(layer.weight_bits, layer.activation_bits) for layer in allocation.layers.values()}) > 1
    for stage in ("pretrain", "search", "finetune", "packed"):
        config = AutoModelForImageClassification.from_pretrained(out / stage).config
        assert config.layer_bits == allocation.layer_bits
    assert {path.name for path in (out / "allocate").glob("*.png")} == {"bit_allocation.png", "front.png"}
    assert "mixed precision, packed" in done.stdout
    results = json.loads((out / "all_results.json").read_text())
    assert results["allocation_bytes"] == allocation.cost["bytes"]
    # Typed again, nothing is searched or trained anew.
    before = (out / "allocate" / "bit_allocation.json").stat().st_mtime_ns
    assert "the stage 'allocate' is complete" in run(recipe).stderr
    assert (out / "allocate" / "bit_allocation.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_budget_of_time_is_kept_by_the_table_measured_here_or_given(full_precision, tmp_path):
    common = {"stages": ["allocate"], "sensitivity_samples": 16, "candidate_bits": [2, 4]}
    # Of bits that are no candidates. Whether these are as quick here is chance; the table is written before that is asked.
    done = run(write_recipe(tmp_path / "here", full_precision, budget=["W8A8ms", "W4A4"], **common), code=None)
    too_little = ("is below the smallest possible cost", "no allocation keeps")
    assert done.returncode == 0 or any(words in done.stderr for words in too_little), done.stderr
    measured = LatencyTable.read(tmp_path / "here" / "out" / "allocate" / "latency.csv")
    assert {(key.weight_bits, key.activation_bits) for key in measured.times} >= {(2, 2), (2, 4), (8, 8)}
    # A processor on which time goes by bits.
    given = LatencyTable({key: key.weight_bits + key.activation_bits for key in measured.times}, rest=1.0)
    given.write(tmp_path / "latency.csv")
    linears = 2 * 6
    budget = 1.0 + linears * (2 + 2 + 4 + 4) / 2
    flags = {"budget": [f"{budget}ms"], "latency_table": str(tmp_path / "latency.csv")}
    run(write_recipe(tmp_path / "there", full_precision, **flags, **common))
    allocation = BitAllocation.read(tmp_path / "there" / "out" / "allocate" / "bit_allocation.json")
    chosen = sum(layer.weight_bits + layer.activation_bits for layer in allocation.layers.values())
    assert len(allocation.layers) == linears
    assert allocation.cost["ms"] == pytest.approx(1.0 + chosen)
    # Half way between the least and the most, and as near as choices of two bits come to it.
    assert budget - 2 < allocation.cost["ms"] <= budget
    assert not (tmp_path / "there" / "out" / "allocate" / "latency.csv").exists()


@pytest.mark.slow
def test_what_cannot_be_is_said_in_one_line(full_precision, tmp_path):
    cases = {
        ("--budget", "1kB"): "is below the smallest possible cost",
        (): "needs a budget",
        ("--budget", "0.00001ms"): "is below the smallest possible cost",
        ("--budget", "5ms", "--latency_table", "nowhere.csv"): "no latency table nowhere.csv",
        ("--budget", "1MB", "--layer_bits", '{"vit.*": 4}'): "chooses layer_bits",
        ("--budget", "1MB", "--layer_bits", "nowhere.json"): "there is no file nowhere.json",
        ("--allocation_method", "edmips", "--num_train_epochs", "0"): "edmips searches by training",
    }
    for number, (flags, message) in enumerate(cases.items()):
        recipe = write_recipe(tmp_path, full_precision, stages=["allocate"])
        done = run(recipe, *flags, "--output_dir", tmp_path / str(number), code=1)
        assert message in done.stderr
        assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_edmips_searches_one_epoch_at_most_and_begins_anew_after_sigterm(full_precision, tmp_path):
    changes = {
        "stages": ["allocate"],
        "allocation_method": "edmips",
        "sensitivity_samples": 16,
        "candidate_bits": [2, 4],
    }
    changes |= {"max_train_samples": 64, "max_steps": 1000}
    whole = write_recipe(tmp_path / "whole", full_precision, **changes)
    assert "one epoch at most: 4 steps, and not 1000" in run(whole).stderr
    parts = write_recipe(tmp_path / "parts", full_precision, **changes)
    stopped = subprocess.run(
        [sys.executable, "-c", STOPPED_AT_STEP_2, str(parts)], capture_output=True, text=True, cwd=ROOT
    )
    assert stopped.returncode == 143, stopped.stderr
    folder = tmp_path / "parts" / "out" / "allocate"
    assert "SIGTERM: the same command begins anew" in stopped.stderr
    assert not list(folder.glob("checkpoint-*"))
    run(parts)
    files = [tmp_path / name / "out" / "allocate" / "measured.json" for name in ("whole", "parts")]
    one, other = (json.loads(file.read_text())["losses"] for file in files)
    assert one == other


def test_a_budget_that_no_stage_keeps_is_refused(tmp_path, full_precision):
    recipe = write_recipe(tmp_path, full_precision, stages=["finetune"], budget="1kB")
    error = run(recipe, code=1).stderr
    assert "budget is 1kB, and the stage 'allocate', which keeps to it, is not among the stages (finetune)" in error
    assert not (tmp_path / "out" / "finetune").exists()
