"""YAML files and flags."""

import typing
from pathlib import Path

import pytest
import yaml

from quantformer_hf import QuantformerConfig
from quantformer_hf.arguments import ARGUMENT_CLASSES, PRESETS, RUN_STAGES, DataArguments, RunArguments
from run_quantformer import without_effect


CONFIGS = Path(__file__).parents[1] / "configs"


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_a_flag_wins_over_the_file_and_a_stage_over_all_stages(tmp_path):
    path = write(
        tmp_path,
        "dataset_name: digits\nbit_width: 4\nlearning_rate: 1.0e-3\nweight_decay: 0.01\n"
        "search: {learning_rate: 2.0e-3, weight_decay: 0.5}\n",
    )
    run = RunArguments([path, "--bit_width", "2", "--weight_decay", "0.1", "--finetune.learning_rate", "5e-4"])
    by_stage = {stage: run.for_stage(stage) for stage in RUN_STAGES}
    assert {arguments.model.bit_width for arguments in by_stage.values()} == {2}
    rates = {stage: arguments.training.learning_rate for stage, arguments in by_stage.items()}
    assert rates == {"full_precision": 1e-3, "allocate": 1e-3, "pretrain": 1e-3, "search": 2e-3, "finetune": 5e-4}
    assert {arguments.training.weight_decay for arguments in by_stage.values()} == {0.1}


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_parses_and_lies_under_file_and_flags(preset, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("dataset_name: digits\noutput_dir: x\ncalibration_samples: 7\n")
    run = RunArguments([str(path), "--preset", preset, "--num_groups", "3", "--learning_rate", "0.5"])
    for stage in run.model_arguments().stages:
        told = run.for_stage(stage)
        assert told.data.calibration_samples == 7
        assert told.model.num_groups == 3
        assert told.training.learning_rate == 0.5
    assert run.model_arguments().preset == preset


def test_a_flag_wins_over_a_presets_section_of_a_stage():
    flags = ["--preset", "lightning", "--dataset_name", "digits", "--output_dir", "x"]
    run = RunArguments([*flags, "--search.max_steps", "3"])
    assert run.for_stage("search").training.max_steps == 3
    assert run.for_stage("finetune").training.max_steps == 1000
    assert RunArguments([*flags, "--max_steps", "5"]).for_stage("finetune").training.max_steps == 5


@pytest.mark.parametrize("preset", ["lightning", "best"])
def test_a_swin_that_learns_from_its_teacher_has_its_own_stochastic_depth_before_alone(preset):
    flags = ["--preset", preset, "--dataset_name", "digits", "--output_dir", "x"]
    rates = {stage: RunArguments(flags).for_stage(stage).training.drop_path_rate for stage in RUN_STAGES}
    quantized = ("pretrain", "search", "finetune")
    assert rates == dict.fromkeys(RUN_STAGES) | dict.fromkeys(quantized, 0.0)
    assert RunArguments([*flags, "--drop_path_rate", "0.1"]).for_stage("finetune").training.drop_path_rate == 0.1


def test_epochs_that_were_asked_for_win_over_a_presets_steps():
    flags = ["--preset", "lightning", "--dataset_name", "digits", "--output_dir", "x"]
    run = RunArguments([*flags, "--search.num_train_epochs", "2"])
    assert (run.for_stage("search").training.max_steps, run.for_stage("search").training.num_train_epochs) == (-1, 2)
    assert run.for_stage("finetune").training.max_steps == 1000
    assert RunArguments([*flags, "--num_train_epochs", "2"]).for_stage("finetune").training.max_steps == -1


@pytest.mark.parametrize(
    ("stage", "quantized", "flags", "trains"),
    [
        ("full_precision", False, [], True),
        ("full_precision", False, ["--preset", "lightning"], True),
        # No step, or nothing but what the untrained classifier itself says.
        ("full_precision", False, ["--preset", "ptq"], False),
        ("full_precision", False, ["--preset", "ptq", "--full_precision.num_train_epochs", "1"], True),
        ("allocate", False, [], False),
        ("finetune", False, [], True),
        ("finetune", False, ["--preset", "ptq"], False),
        ("finetune", False, ["--preset", "lightning"], False),
        ("finetune", False, ["--distillation_weight", "1"], False),
        ("finetune", True, ["--distillation_weight", "1"], True),
        ("finetune", True, ["--max_steps", "0", "--num_train_epochs", "0"], False),
    ],
)
def test_where_a_new_classifier_would_be_trained(stage, quantized, flags, trains):
    run = RunArguments(["--dataset_name", "digits", "--output_dir", "x", *flags])
    assert run.for_stage(stage).trains_classifier(quantized) == trains


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="preset is 'fast': choose one of ptq, lightning, best"):
        RunArguments(["--preset", "fast", "--dataset_name", "digits"])


def test_flags_alone_are_enough():
    run = RunArguments(
        ["--dataset_name", "digits", "--stages", "pretrain", "search", "--pnorm", "2", "--num_groups", "4"]
    )
    arguments = run.for_stage("search")
    assert arguments.model.stages == ["pretrain", "search"]
    assert (arguments.training.pnorm, arguments.model.num_groups) == ("2", 4)
    assert arguments.model.quantization_arguments()["num_groups"] == 4


def test_one_stage_in_a_file_needs_no_brackets(tmp_path):
    arguments = RunArguments([write(tmp_path, "dataset_name: digits\nstages: finetune\n")])
    assert arguments.model_arguments().stages == ["finetune"]


def test_json_flags_become_dictionaries():
    run = RunArguments(["--dataset_name", "digits", "--layer_bits", '{"classifier": 4}'])
    assert run.model_arguments().layer_bits == {"classifier": 4}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_shipped_file_parses_with_the_types_of_its_fields(path):
    hints = {name: hint for cls in ARGUMENT_CLASSES for name, hint in typing.get_type_hints(cls).items()}
    run = RunArguments([str(path)])
    for stage in run.model_arguments().stages:
        for key, value in run.for_stage(stage).given.items():
            kinds = typing.get_args(hints[key]) or (hints[key],)
            if float in kinds:
                assert isinstance(value, int | float), key
            elif int in kinds:
                assert isinstance(value, int), key


def test_the_three_recipes_have_the_hyperparameters_of_the_reference():
    recipes = {
        stage: yaml.safe_load((CONFIGS / f"deit_tiny_w4a4_{stage}.yaml").read_text()) for stage in RUN_STAGES[2:]
    }
    table = {
        "num_train_epochs": (120, 1, 5),
        "learning_rate": (1e-4, 2e-6, 5e-6),
        "per_device_train_batch_size": (64, 8, 32),
        "aux_weight": (0.0, 20.0, 20.0),
        "dm_weight": (0.0, 0.025, 0.0),
        "weight_decay": (0.05, 0.05, 0.05),
    }
    for key, values in table.items():
        assert tuple(recipes[stage][key] for stage in recipes) == values, key


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset_name: digits\nbit_widht: 4\n", "unknown key 'bit_widht': did you mean 'bit_width'"),
        (
            "dataset_name: digits\nsearch: {lerning_rate: 1.0}\n",
            "section search: unknown key 'lerning_rate': did you mean",
        ),
        ("dataset_name: digits\nlearning_rate: 2e-4\n", "learning_rate is the string '2e-4': write a number"),
        ("learning_rate: true\n", "learning_rate is True: write a number"),
        ("bit_width: [4]\n", r"bit_width is \[4\]: write a whole number"),
        ("seed: 1.5\n", "seed is 1.5: write a whole number"),
        ("streaming: 0.5\n", "streaming is 0.5: write true or false"),
        ("serach:\n  max_steps: 3\n", "unknown key 'serach': did you mean 'search'"),
        ("- digits\n", "holds a list"),
        ("stages: [pretrain\n", "is not YAML: while parsing"),
        ("seed: 1\nbit_width: 4\nseed: 2\n", "is not YAML: 'seed' is there twice"),
        ("search: {max_steps: 1, max_steps: 2}\n", "'max_steps' is there twice"),
        ("stages:\n", "stages has no value: write one, or leave the line out"),
        ("max_steps:\n", "max_steps has no value"),
        ('rotate_channels: "False"\n', "rotate_channels is the string 'False': write true or false"),
        ("finetune: 3\n", "finetune is 3: write what holds in that stage"),
        ("finetune: {stages: [search]}\n", "stages holds for the whole run: say it without 'finetune'"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        RunArguments([write(tmp_path, text)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bit_width", "9"], "weight_bits is 9"),
        (["--num_groups", "300"], "num_groups is 300: choose 1 to"),
        (["--weight_quantizer", "lsqq"], "weight_quantizer is 'lsqq'"),
        (["--backbone_config", '{"model_type": "beit"}'], "backbone_config.model_type is 'beit'"),
    ],
)
def test_bits_and_groups_that_no_model_has_are_known_before_a_stage_runs(flags, message):
    def told(*flags):
        return (
            RunArguments(["--output_dir", "out", "--dataset_name", "digits", *flags]).for_stage("full_precision").model
        )

    with pytest.raises(ValueError, match=message):
        told(*flags).check_quantization()
    told("--backbone_config", '{"hidden_size": 48}', "--bit_width", "2").check_quantization()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stages", "pretrian"], "unknown stage 'pretrian': did you mean 'pretrain'"),
        (["--stages", "search", "pretrain"], "name each once, in the order"),
        (["--layer_bits", "{classifier"], "layer_bits is not JSON"),
        (["--calibration_samples", "0"], "calibration_samples is 0: choose at least 1"),
        (["--reconstruction_samples", "-1"], "reconstruction_samples is -1: choose 0"),
        (["--finetune.preset", "ptq"], "preset holds for the whole run: say it without 'finetune'"),
        (["--search.output_dir", "x"], "output_dir holds for the whole run"),
        (["--search.push_to_hub", "True"], "push_to_hub holds for the whole run"),
        (["--resume_from_checkpoint", "x"], "resume_from_checkpoint is 'x': the same command goes on by itself"),
        (["--prediction_loss_only", "True"], "prediction_loss_only is True, and a run measures accuracy"),
        (["--do_train", "False"], "do_train is False, and stages train: leave it out"),
        (["--do_predict", "True"], "do_predict has nothing to predict here"),
        (["--metric_for_best_model", "accuracyy"], "metric_for_best_model is 'accuracyy': choose one of accuracy"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "lr_scheduler_kwargs None: .*num_decay_steps"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "lr_scheduler_kwargs None: One of .*min_lr"),
    ],
)
def test_wrong_flags_are_explained(flags, message):
    with pytest.raises(ValueError, match=message):
        RunArguments(["--dataset_name", "digits", *flags]).model_arguments()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset_name: 5\n", "dataset_name is 5: write a name"),
        ("dataset_name: [digits]\n", r"dataset_name is \['digits'\]: write a name"),
        ("dataset_name: digits\nbackbone_config: [1]\n", r"backbone_config is \[1\]: write the fields"),
    ],
)
def test_values_of_another_type_in_a_file_are_named(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        RunArguments([write(tmp_path, text), "--output_dir", "out"]).for_stage("finetune")


def test_steps_of_a_search_are_for_the_stage_that_searches():
    run = RunArguments(["--dataset_name", "digits", "--search_steps", "3"])
    assert {stage: run.for_stage(stage).training.search_steps for stage in ("search", "finetune")} == {
        "search": 3,
        "finetune": -1,
    }


def test_flags_that_say_nothing_to_any_stage_are_known():
    flags = ["--dataset_name", "digits", "--output_dir", "x"]
    run = RunArguments([*flags, "--search.max_steps", "3", "--finetune.max_steps", "3"])
    assert without_effect(run, ["finetune"]) == [
        "flags that begin with --search. are without effect: the stage is not among those that run (finetune)"
    ]
    run = RunArguments([*flags, "--budget", "W3A3", "--bit_width", "3"])
    said = "--bit_width is not what the blocks get: the stage 'allocate' chooses their bits"
    assert without_effect(run, ["allocate", "finetune"]) == [said]
    # What a preset says of stages, nobody typed.
    assert without_effect(RunArguments([*flags, "--preset", "lightning", "--bit_width", "3"]), ["finetune"]) == []


def test_no_bits_in_a_file_leave_the_attention_products_in_floating_point(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("dataset_name: digits\nattention_bits: null\n")
    model = RunArguments([str(path)]).for_stage("finetune").model
    assert QuantformerConfig(**model.quantization_arguments()).attention_bits == 32


def test_an_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit):
        RunArguments(["--bit_widht", "3"])
    assert "--bit_widht" in capsys.readouterr().err


def test_help_names_the_flags(capsys):
    with pytest.raises(SystemExit):
        RunArguments(["--help"])
    printed = capsys.readouterr().out
    for name in ("bit_width", "num_groups", "aux_weight", "dm_weight", "pnorm", "stages", "teacher_name_or_path"):
        assert f"--{name}" in printed


def test_the_images_come_from_one_place():
    with pytest.raises(ValueError, match="one of dataset_name"):
        DataArguments()
    with pytest.raises(ValueError, match="one of dataset_name"):
        DataArguments(dataset_name="digits", dataset_dir="images")


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"no file missing\.yaml"):
        RunArguments(["missing.yaml"])
