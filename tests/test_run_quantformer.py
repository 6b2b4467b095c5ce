"""The entry point, as a user types it."""

import json
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
import yaml
from conftest import make_full_precision
from huggingface_hub import ModelCard
from runs import RECIPE, ROOT, TWO_PROCESSES, run, run_as_typed, same_weights, weights, write_recipe
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of all four stages: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    return folder, run_as_typed(write_recipe(folder))


@pytest.mark.slow
def test_all_stages_leave_loadable_models_and_the_results(finished):
    folder, done = finished
    results = json.loads((folder / "out" / "all_results.json").read_text())
    names = {"full_precision", "pretrain", "search", "frozen", "finetune", "reloaded"}
    assert set(results) == {f"{name}_accuracy" for name in names}
    assert all(0 <= value <= 1 for value in results.values())
    assert results["reloaded_accuracy"] == results["finetune_accuracy"]
    for stage in [*RECIPE["stages"], "packed"]:
        model = AutoModelForImageClassification.from_pretrained(folder / "out" / stage)
        assert model.config.id2label[3] == "3"
        if stage != "full_precision":
            assert model.config.stage == stage
            assert model.config.full_precision_name_or_path == str(folder / "out" / "full_precision")
        assert AutoImageProcessor.from_pretrained(folder / "out" / stage).size["height"] == 16
    for text in ("after stage", "packed", "pipeline says"):
        assert text in done.stdout


@pytest.mark.slow
def test_each_stage_and_the_packed_model_have_a_card_with_what_was_measured(finished):
    folder, _ = finished
    results = json.loads((folder / "out" / "all_results.json").read_text())
    for name in (*RECIPE["stages"], "packed"):
        card = ModelCard.load(folder / "out" / name / "README.md")
        stage = "finetune" if name == "packed" else name
        assert card.data.eval_results[0].metric_value == round(results[f"{stage}_accuracy"], 4)
        assert card.data.eval_results[0].dataset_type == "digits"
        assert f"| full precision | {100 * results['full_precision_accuracy']:.2f} % |" in card.text
        assert str(folder) not in str(card)
        for before in RECIPE["stages"][: RECIPE["stages"].index(stage) + 1]:
            assert f"- **{before.replace('_', ' ')}**: num_train_epochs 2" in card.text
    assert "dm_weight 0.1" in card.text


@pytest.mark.slow
def test_typed_again_a_finished_run_trains_nothing_and_another_one_is_refused(finished):
    folder, _ = finished
    before = weights(folder / "out" / "finetune")
    checkpoints = sorted((folder / "out" / "finetune").glob("checkpoint-*/trainer_state.json"))
    times = [path.stat().st_mtime_ns for path in checkpoints]
    run(folder / "recipe.yaml")
    assert same_weights(before, weights(folder / "out" / "finetune"))
    assert times == [path.stat().st_mtime_ns for path in checkpoints]
    done = run(folder / "recipe.yaml", "--bit_width", "3", code=1)
    assert "with bit_width=None, and this one has 3" in done.stderr
    assert "--overwrite_output_dir" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_stopped(finished, tmp_path):
    folder, _ = finished
    recipe = write_recipe(tmp_path)
    command = [sys.executable, str(ROOT / "run_quantformer.py"), str(recipe)]
    for stage in ("full_precision", "search"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        first_checkpoint = tmp_path / "out" / stage / "checkpoint-4" / "trainer_state.json"
        deadline = time.monotonic() + 240
        while not first_checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert first_checkpoint.exists()
        assert json.loads((tmp_path / "out" / stage / "stage.json").read_text())["results"] is None
    # With the compiler, as the run that it is compared with.
    run_as_typed(recipe)
    for stage in RECIPE["stages"]:
        assert same_weights(weights(folder / "out" / stage), weights(tmp_path / "out" / stage)), stage


@pytest.mark.slow
def test_two_processes_stream_with_the_recipe_of_deit_and_count_each_image_once(tmp_path):
    recipe = write_recipe(
        tmp_path,
        stages=["full_precision"],
        streaming=True,
        max_eval_samples=37,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        dataloader_num_workers=1,
        num_train_epochs=2,
        aux_weight=0.0,
        distillation_weight=0.0,
        auto_augment="rand-m9-mstd0.5-inc1",
        mixup=0.8,
        cutmix=1.0,
        label_smoothing_factor=0.1,
        random_erasing=0.25,
        drop_path_rate=0.1,
        ema_decay=0.5,
    )
    run_as_typed(recipe, launcher=TWO_PROCESSES)
    # 96 images over two processes of eight, twice.
    assert json.loads((tmp_path / "out" / "full_precision" / "trainer_state.json").read_text())["global_step"] == 12
    expected = json.loads((tmp_path / "out" / "all_results.json").read_text())["reloaded_accuracy"]
    assert expected * 37 == pytest.approx(round(expected * 37))
    flags = ["--stages", "--do_eval", "--model_name_or_path", tmp_path / "out" / "full_precision"]
    run(recipe, *flags, "--output_dir", tmp_path / "alone")
    assert json.loads((tmp_path / "alone" / "eval_results.json").read_text())["eval_accuracy"] == expected


@pytest.mark.slow
def test_swin_and_flags_without_a_file(tmp_path):
    backbone = {"model_type": "swin", "image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1]}
    backbone |= {"num_heads": [2, 2], "window_size": 4}
    flags = ["--dataset_name", "digits", "--max_train_samples", "32", "--max_eval_samples", "20"]
    flags += ["--stages", "full_precision", "pretrain", "search", "finetune", "--output_dir", tmp_path / "out"]
    flags += ["--backbone_config", json.dumps(backbone), "--bit_width", "3", "--num_groups", "4", "--aux_weight", "20"]
    flags += ["--search.dm_weight", "0.025", "--pnorm", "2", "--max_steps", "2", "--report_to", "none"]
    run(*flags, "--full_precision.learning_rate", "1e-3", "--calibration_samples", "16", "--use_cpu", "True")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "finetune")
    assert (model.config.weight_bits, model.config.num_groups) == (3, 4)
    assert model.config.backbone_config.model_type == "swin"


@pytest.mark.slow
def test_ptq_needs_no_training_step_and_no_earlier_stage(finished, tmp_path):
    folder, _ = finished
    recipe = write_recipe(tmp_path, model_name_or_path=str(folder / "out" / "full_precision"))
    # The preset's own stages, and nothing trained.
    content = yaml.safe_load(recipe.read_text())
    for name in ("stages", "num_train_epochs"):
        del content[name]
    recipe.write_text(yaml.safe_dump(content))
    done = run(recipe, "--preset", "ptq", "--reconstruction_samples", "32")
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert set(results) == {"full_precision_accuracy", "finetune_accuracy", "reloaded_accuracy"}
    assert results["reloaded_accuracy"] == results["finetune_accuracy"]
    assert "after stage" in done.stdout
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "finetune")
    assert model.config.stage == "finetune"
    assert not list((tmp_path / "out" / "finetune").glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["finetune", "packed"])
def test_a_finished_model_is_trained_on(finished, tmp_path, stage):
    folder, _ = finished
    source = folder / "out" / stage
    changes = {"stages": ["finetune"], "model_name_or_path": str(source), "max_steps": 2, "learning_rate": 1e-6}
    run(write_recipe(tmp_path, **changes))
    before, after = weights(folder / "out" / "finetune"), weights(tmp_path / "out" / "finetune")
    assert before.keys() == after.keys()
    assert not same_weights(before, after)
    groups = [name for name in before if name.endswith("group_index")]
    assert groups
    assert all(torch.equal(before[name], after[name]) for name in groups)


@pytest.mark.slow
def test_a_deit_with_two_classifiers_goes_through_a_run(tmp_path):
    flags = ["--dataset_name", "digits", "--max_train_samples", "32", "--max_eval_samples", "20", "--use_cpu", "True"]
    flags += ["--report_to", "none", "--num_groups", "4", "--calibration_samples", "16", "--ignore_mismatched_sizes"]
    make_full_precision("deit-distilled").save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    flags += ["--model_name_or_path", tmp_path / "model", "--max_steps", "2", "--distillation_weight", "1"]
    run(*flags, "--stages", "full_precision", "finetune", "--output_dir", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["full_precision_accuracy"] >= 0
    assert results["reloaded_accuracy"] == results["finetune_accuracy"]
    full_precision = tmp_path / "out" / "full_precision"
    again = ["--stages", "--do_eval", "--model_name_or_path", full_precision, "--dataset_name", "digits"]
    run(*again, "--max_eval_samples", "20", "--output_dir", tmp_path, "--report_to", "none", "--use_cpu", "True")
    evaluated = json.loads((tmp_path / "eval_results.json").read_text())
    assert evaluated["eval_accuracy"] == results["full_precision_accuracy"]


@pytest.mark.slow
def test_evaluation_alone(finished, tmp_path):
    folder, _ = finished
    expected = json.loads((folder / "out" / "all_results.json").read_text())["finetune_accuracy"]
    recipe = write_recipe(tmp_path, stages=[], model_name_or_path=str(folder / "out" / "finetune"), do_eval=True)
    done = run(recipe)
    assert f"accuracy {100 * expected:.2f} %" in done.stdout
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert set(results) == {"eval_accuracy", "eval_top5_accuracy"}
    assert results["eval_accuracy"] == expected <= results["eval_top5_accuracy"] <= 1


@pytest.mark.slow
def test_what_cannot_be_is_said_in_one_line_and_leaves_earlier_stages_whole(finished, tmp_path):
    folder, _ = finished
    before = weights(folder / "out" / "pretrain")
    cases = {
        ("--stages", "search", "--model_name_or_path", folder / "out" / "finetune"): "start it at finetune",
        ("--stages", "search"): "starts from a checkpoint",
        ("--stages", "pretrain", "--model_name_or_path", folder / "nowhere"): "nowhere",
    }
    for number, (flags, message) in enumerate(cases.items()):
        done = run(write_recipe(tmp_path), *flags, "--output_dir", tmp_path / str(number), code=1)
        assert message in done.stderr
        assert "Traceback" not in done.stderr, done.stderr
    assert same_weights(before, weights(folder / "out" / "pretrain"))


@pytest.mark.slow
def test_a_real_timm_checkpoint_is_evaluated_in_full_precision(tmp_path):
    shared = ROOT.parent / "shared"
    if not (shared / "data" / "imagenet-val650").exists():
        pytest.skip(f"{shared} is not there")
    # The images are crops of 227 pixels already: a crop of 1.0 sees them whole.
    flags = ["--stages", "--do_eval", "--model_name_or_path", shared / "models" / "vit_tiny_patch16_224"]
    flags += ["--dataset_dir", shared / "data" / "imagenet-val650", "--crop_pct", "1.0"]
    done = run(*flags, "--output_dir", tmp_path, "--report_to", "none", "--use_cpu", "True")
    assert "timm folder (vit_tiny_patch16_224)" in done.stderr
    assert "accuracy 82.92 %" in done.stdout


@pytest.mark.slow
def test_a_timm_file_goes_through_the_stages_at_another_image_size(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=7)
    torch.save(model.state_dict(), tmp_path / "vit_tiny_patch16_224.pth")
    flags = ["--dataset_name", "digits", "--max_train_samples", "32", "--max_eval_samples", "20", "--use_cpu", "True"]
    flags += ["--model_name_or_path", tmp_path / "vit_tiny_patch16_224.pth", "--image_size", "48", "--num_groups", "4"]
    flags += ["--ignore_mismatched_sizes", "--max_steps", "1", "--distillation_weight", "1", "--report_to", "none"]
    flags += ["--stages", "full_precision", "pretrain", "search", "finetune", "--output_dir", tmp_path / "out"]
    run(*flags)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "finetune")
    assert model.config.backbone_config.image_size == 48
    assert model.config.num_labels == 10
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out" / "finetune")
    assert processor.crop_size["height"] == 48
