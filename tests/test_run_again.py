"""Commands after others in the same folders: nothing is lost, nothing stale is taken for new, nothing is ignored."""

import json
import re
import shutil

import pytest
import torch
from runs import run, same_weights, weights, write_recipe
from transformers import AutoImageProcessor, AutoModelForImageClassification

from quantformer_hf.arguments import RunArguments
from quantformer_hf.data import load_image_data
from quantformer_hf.stages import StageRun


#: Two steps a stage.
QUICK = {"num_train_epochs": 1, "max_train_samples": 32, "save_strategy": "no", "max_eval_samples": 16}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("again")
    run(write_recipe(folder, **QUICK))
    return folder / "out"


@pytest.fixture
def out(finished, tmp_path):
    """A copy of the finished run, and its recipe beside it."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def again(out, *flags, code=0, **changes):
    """A command of the recipe in `out`; what it wrote to stderr."""
    return run(write_recipe(out.parent, **QUICK | changes), *flags, code=code).stderr


def results_of(out):
    return json.loads((out / "all_results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--model_name_or_path", "{out}/finetune"],
            "model_name_or_path is .*which --overwrite_output_dir would delete",
        ),
        (["--model_name_or_path", "{out}/packed"], "model_name_or_path is .*which --overwrite_output_dir would delete"),
        (["--model_name_or_path", "{out}/search", "--bit_width", "9"], "weight_bits is 9|has weight_bits 4, and not 9"),
        (["--model_name_or_path", "{out}/no_such"], "no_such"),
    ],
)
def test_nothing_is_deleted_before_the_command_is_known_to_run(out, flags, said):
    before = weights(out / "finetune")
    flags = [flag.format(out=out) for flag in flags]
    stderr = again(out, "--stages", "finetune", "--overwrite_output_dir", "True", *flags, code=1)
    assert "Traceback" not in stderr
    assert re.search(said, stderr), stderr
    assert same_weights(before, weights(out / "finetune"))
    assert (out / "packed" / "model.safetensors").is_file()


@pytest.mark.slow
def test_to_say_what_a_run_did_unsaid_is_no_other_run(out):
    before = weights(out / "full_precision")
    stages = ["--stages", "full_precision"]
    assert "the stage 'full_precision' is complete" in again(out, *stages, "--learning_rate_per_bit", "1")
    said = "of a run with learning_rate_per_bit=1.0, and this one has 2.0: choose another --output_dir"
    assert said in again(out, *stages, "--learning_rate_per_bit", "2", code=1)
    assert same_weights(before, weights(out / "full_precision"))


@pytest.mark.slow
def test_what_came_of_a_stage_that_was_made_anew_is_not_taken_for_complete(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished / "full_precision", out / "full_precision")
    again(out, "--stages", "pretrain", "search", "finetune", "--model_name_or_path", out / "full_precision")
    source = ["--model_name_or_path", str(out / "full_precision")]
    again(out, "--stages", "pretrain", *source, "--overwrite_output_dir", "True", "--pretrain.max_steps", "3")
    stages = ["--stages", "pretrain", "search", "finetune", *source, "--pretrain.max_steps", "3"]
    stderr = again(out, *stages, code=1)
    assert "search was made from" in stderr
    assert "made anew since" in stderr
    again(out, *stages, "--overwrite_output_dir", "True")
    again(out, *stages)


@pytest.mark.slow
def test_a_refused_command_does_not_stand_in_the_way_of_its_correction(finished, tmp_path):
    out = tmp_path / "out"
    command = ["--stages", "finetune", "--model_name_or_path", str(finished / "full_precision")]
    assert "weight_bits is 9" in again(out, *command, "--bit_width", "9", code=1)
    assert "matches no layer" in again(out, *command, "--layer_bits", '{"vit.nothing": 3}', code=1)
    again(out, *command, "--bit_width", "3")
    assert AutoModelForImageClassification.from_pretrained(out / "packed").config.weight_bits == 3


@pytest.mark.slow
def test_full_precision_is_not_trained_again_for_other_bits(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished / "full_precision", out / "full_precision")
    before = weights(out / "full_precision")
    again(out, "--bit_width", "2", "--calibration_samples", "16")
    assert same_weights(before, weights(out / "full_precision"))
    assert AutoModelForImageClassification.from_pretrained(out / "packed").config.weight_bits == 2


@pytest.mark.slow
def test_what_was_written_of_neutral_arguments_does_not_matter(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished / "full_precision", out / "full_precision")
    path = out / "full_precision" / "stage.json"
    written = json.loads(path.read_text())
    written["arguments"] |= {
        "model_name_or_path": None,
        "bit_width": 8,
        "save_steps": 77,
        "hub_private_repo": True,
        "search_steps": 9,
    }
    path.write_text(json.dumps(written))
    assert "the stage 'full_precision' is complete" in again(out, "--stages", "full_precision")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "flags", "said"),
    [
        ("pretrain", ["--bit_width", "2"], "has weight_bits 4, and not 2: start from the full-precision checkpoint"),
        ("pretrain", ["--attention_bits", "4"], "has attention_bits 8, and not 4"),
        ("pretrain", ["--weight_quantizer", "statsq"], "has weight_quantizer lsq_by_width, and not statsq"),
        ("search", ["--num_groups", "2"], "has num_groups 4, and not 2"),
        ("search", ["--twin_levels", "False"], "has twin_levels True, and not False"),
        ("search", ["--image_size", "32"], "has image_size 16, and not 32"),
        ("finetune", ["--reconstruction_samples", "16"], "is quantized already: weights are refitted on the way"),
        ("finetune", ["--rotate_channels", "False"], "are rotated: leave it out, or start from full precision"),
    ],
)
def test_what_a_quantized_checkpoint_cannot_become_is_refused(finished, tmp_path, source, flags, said):
    command = ["--stages", "finetune", "--model_name_or_path", str(finished / source)]
    assert said in again(tmp_path / "out", *command, *flags, code=1)
    assert not (tmp_path / "out" / "finetune").exists()


@pytest.mark.slow
def test_channels_that_are_not_rotated_stay_so(finished, tmp_path):
    command = [
        "--stages",
        "pretrain",
        "--model_name_or_path",
        finished / "full_precision",
        "--rotate_channels",
        "False",
    ]
    again(tmp_path / "out", *command)
    command = [
        "--stages",
        "finetune",
        "--model_name_or_path",
        tmp_path / "out" / "pretrain",
        "--rotate_channels",
        "True",
    ]
    assert "are not rotated: leave it out, or start from full precision" in again(tmp_path / "on", *command, code=1)


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "rotates"), [([], True), (["--rotate_channels", "False"], False)])
def test_an_allocation_is_found_on_rotated_channels_whatever_the_bits_are_now(finished, tmp_path, flags, rotates):
    command = [
        str(write_recipe(tmp_path, **QUICK)),
        "--stages",
        "allocate",
        "--budget",
        "W3A3",
        "--bit_width",
        "2",
        *flags,
    ]
    told = RunArguments(command).for_stage("allocate")
    stage = StageRun(told, str(finished / "full_precision"), tmp_path / "out")
    model = stage._build_model(load_image_data(told.data, told.training.seed)).model
    assert model.config.channels_rotated == rotates


@pytest.mark.slow
def test_full_precision_is_what_is_quantized_and_a_teacher_may_be_another(finished, tmp_path):
    source, teacher = finished / "full_precision", tmp_path / "teacher"
    AutoModelForImageClassification.from_pretrained(source).save_pretrained(teacher)
    processor = AutoImageProcessor.from_pretrained(source)
    processor.image_mean = [mean - 0.5 for mean in processor.image_mean]
    processor.save_pretrained(teacher)
    command = [str(write_recipe(tmp_path, **QUICK)), "--stages", "finetune", "--teacher_name_or_path", str(teacher)]
    told = RunArguments(command).for_stage("finetune")
    stage = StageRun(told, str(source), tmp_path / "out")
    built = stage._build_model(load_image_data(told.data, told.training.seed))
    assert built.full_precision.name_or_path == str(source)
    assert built.teacher.name_or_path == str(teacher)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        # Without a mean that is 0.5 too low, they are lighter.
        lighter = images + torch.tensor(0.5) / torch.tensor(processor.image_std).view(-1, 1, 1)
        expected = built.full_precision(pixel_values=lighter).logits
        torch.testing.assert_close(built.teacher(pixel_values=images).logits, expected)


@pytest.mark.slow
def test_the_same_typed_otherwise_is_the_same_run(finished, tmp_path):
    command = "--stages", "finetune", "--model_name_or_path", finished / "search", "--max_steps", "1"
    again(tmp_path / "out", *command, "--layer_bits", '{"classifier": 8}')
    other = (*command, "--layer_bits", '{"classifier":8}', "--run_name", "again", "--logging_steps", "2")
    assert "is complete in" in again(tmp_path / "out", *other)
    assert "of a run with layer_bits=" in again(tmp_path / "out", *command, "--layer_bits", '{"classifier": 6}', code=1)


@pytest.mark.slow
def test_an_evaluation_says_what_it_does_not_look_at(finished, tmp_path):
    command = ["--stages", "--do_eval", "--bit_width", "2", "--model_name_or_path"]
    assert "has weight_bits 4, and not 2" in again(tmp_path / "out", *command, finished / "packed", code=1)
    stderr = again(tmp_path / "out", *command, finished / "full_precision")
    assert "was evaluated as it is, in full precision, without bit_width, num_groups" in stderr


@pytest.mark.slow
def test_groups_are_made_where_the_search_is_left_out(finished, tmp_path):
    again(tmp_path / "out", "--stages", "pretrain", "finetune", "--model_name_or_path", finished / "full_precision")
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "finetune").config
    assert (config.stage, config.num_groups, config.twin_levels) == ("finetune", 4, True)
    command = "--stages", "finetune", "--model_name_or_path", finished / "pretrain", "--twin_levels", "False"
    again(tmp_path / "out", *command, output_dir=str(tmp_path / "even"))
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "even" / "finetune").config
    assert (config.stage, config.num_groups, config.twin_levels) == ("finetune", 4, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "stage", "way_out"),
    [
        ("packed", "pretrain", "finetune"),
        ("packed", "search", "finetune"),
        ("pretrain", "pretrain", "search or finetune"),
    ],
)
def test_the_stage_at_which_a_quantized_checkpoint_goes_on_is_named(finished, tmp_path, source, stage, way_out):
    command = ["--stages", stage, "--model_name_or_path", finished / source]
    assert f"is quantized already, in the stage '{source}': start it at {way_out}" in again(
        tmp_path / "out", *command, code=1
    )


@pytest.mark.slow
def test_results_of_earlier_commands_stay(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished / "pretrain", out / "pretrain")
    source = out / "pretrain"
    again(out, "--stages", "search", "--model_name_or_path", source)
    again(out, "--stages", "finetune", "--model_name_or_path", out / "search")
    assert {"pretrain_accuracy", "search_accuracy", "frozen_accuracy", "finetune_accuracy"} <= results_of(out).keys()
    assert results_of(out)["pretrain_accuracy"] == results_of(finished)["pretrain_accuracy"]


@pytest.mark.slow
def test_a_checkpoint_with_its_classes_in_another_order_is_as_right_and_no_teacher_beside_one_without(
    finished, tmp_path
):
    folder = tmp_path / "reversed"
    shutil.copytree(finished / "full_precision", folder)
    model = AutoModelForImageClassification.from_pretrained(folder)
    model.config.id2label = {index: str(9 - index) for index in range(10)}
    model.config.label2id = {name: index for index, name in model.config.id2label.items()}
    with torch.no_grad():
        for tensor in (model.classifier.weight, model.classifier.bias):
            tensor.copy_(tensor.flip(0))
    model.save_pretrained(folder)
    measured = []
    for name in (finished / "full_precision", folder):
        again(tmp_path / "out", "--stages", "--do_eval", "--model_name_or_path", name)
        measured.append(json.loads((tmp_path / "out" / "eval_results.json").read_text()))
    assert measured[0] == measured[1]
    assert measured[0]["eval_top5_accuracy"] > 0.3
    flags = ["--stages", "finetune", "--model_name_or_path", finished / "search", "--teacher_name_or_path", folder]
    stderr = again(tmp_path / "out", *flags, code=1)
    assert "has the classes of the model in another order" in stderr
    again(tmp_path / "out", *flags[:2], "--model_name_or_path", folder)
    assert results_of(tmp_path / "out")["full_precision_accuracy"] == measured[0]["eval_accuracy"]
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "packed").config
    assert config.id2label == model.config.id2label


@pytest.mark.slow
def test_what_a_stage_was_told_is_named_where_it_is_damaged_and_made_anew_on_request(out):
    told = out / "finetune" / "stage.json"
    told.write_text(told.read_text()[:50])
    flags = ["--stages", "finetune", "--model_name_or_path", out / "search"]
    assert f"{told}, which says what the stage was told, is damaged" in again(out, *flags, code=1)
    again(out, *flags, "--overwrite_output_dir")
    assert json.loads(told.read_text())["results"]


@pytest.mark.slow
def test_a_new_classifier_that_nothing_would_train_is_refused(finished, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(
        finished / "full_precision", num_labels=3, ignore_mismatched_sizes=True
    )
    shutil.copytree(finished / "full_precision", tmp_path / "three")
    model.save_pretrained(tmp_path / "three")
    for stages in (["--stages", "finetune"], ["--stages", "--do_eval"]):
        flags = [*stages, "--model_name_or_path", tmp_path / "three", "--ignore_mismatched_sizes"]
        stderr = again(tmp_path / "out", *flags, code=1)
        assert "has 3 classes and the data set 10" in stderr
        assert "--stages full_precision finetune --full_precision.num_train_epochs 5" in stderr
