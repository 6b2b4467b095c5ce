"""What a stage starts from is made once, however often it is interrupted."""

import json

import pytest
import torch
from runs import make_stage, same_weights, save_classifier, weights

from quantformer_hf import QuantformerForImageClassification, QuantformerTrainer
from quantformer_hf.arguments import RunArguments
from quantformer_hf.stage_start import START
from quantformer_hf.stages import StageRun


VERBS = ("calibrate", "begin_search", "freeze_groups", "reconstruct")

#: Three steps on few images.
QUICK = "--max_steps 3 --learning_rate 1e-3 --max_train_samples 32 --max_eval_samples 16 --calibration_samples 16"
FLAGS = [*QUICK.split(), "--reconstruction_samples", "8", "--distillation_weight", "1", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.manual_seed(0)
    return save_classifier(tmp_path_factory.mktemp("source"))


def run_stage(name, source, folder, *flags):
    return make_stage(name, source, folder, *FLAGS, *flags)[0].run()


def interrupt(monkeypatch, name, source, folder, *flags):
    """A stage that ends before its first step, with what it would start from."""

    def stop(*arguments, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(QuantformerTrainer, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            run_stage(name, source, folder, *flags)
    assert (folder / name / START).is_dir()


def forbid(monkeypatch):
    """From here on a stage that begins anew fails."""

    def fail(*arguments, **keywords):
        raise AssertionError("the stage begins anew")

    for verb in VERBS:
        monkeypatch.setattr(QuantformerForImageClassification, verb, fail)


@pytest.mark.parametrize("stage", ["pretrain", "search", "finetune"])
def test_an_interrupted_stage_neither_calibrates_nor_refits_again_and_ends_alike(stage, source, tmp_path, monkeypatch):
    expected = run_stage(stage, source, tmp_path / "whole")
    interrupt(monkeypatch, stage, source, tmp_path / "parts")
    forbid(monkeypatch)
    measured = []
    evaluate = QuantformerTrainer.evaluate
    monkeypatch.setattr(QuantformerTrainer, "evaluate", lambda self: measured.append(self) or evaluate(self))
    assert run_stage(stage, source, tmp_path / "parts") == expected
    # What was measured of the start is known as well.
    assert len(measured) == 1
    assert same_weights(weights(tmp_path / "parts" / stage), weights(tmp_path / "whole" / stage))
    for folder in (tmp_path / "whole", tmp_path / "parts"):
        assert not [path for path in (folder / stage).iterdir() if path.name.startswith("_")]


def test_a_start_that_was_told_otherwise_is_not_taken(source, tmp_path, monkeypatch):
    interrupt(monkeypatch, "finetune", source, tmp_path, "--bit_width", "4")
    run_stage("finetune", source, tmp_path, "--bit_width", "3")
    config = json.loads((tmp_path / "finetune" / "config.json").read_text())
    assert config["weight_bits"] == config["activation_bits"] == 3


def test_to_overwrite_is_to_begin_anew(source, tmp_path, monkeypatch):
    interrupt(monkeypatch, "finetune", source, tmp_path)
    forbid(monkeypatch)
    with pytest.raises(AssertionError, match="begins anew"):
        run_stage("finetune", source, tmp_path, "--overwrite_output_dir", "True")


def test_a_start_that_was_cut_short_is_made_anew(source, tmp_path):
    draft = tmp_path / "finetune" / f"{START}.tmp"
    draft.mkdir(parents=True)
    (draft / "model.safetensors").write_bytes(b"half")
    run_stage("finetune", source, tmp_path)
    assert not draft.exists()


@pytest.mark.parametrize(("flags", "said"), [(["--feature_weight", "1"], "feature_weight needs a teacher")])
def test_a_teacher_that_cannot_teach_is_known_before_what_takes_minutes(flags, said, source, tmp_path, monkeypatch):
    narrow = save_classifier(tmp_path / "narrow", hidden_size=16)
    forbid(monkeypatch)
    with pytest.raises(ValueError, match=said):
        run_stage("finetune", source, tmp_path / "out", "--teacher_name_or_path", narrow, *flags)


def test_no_start_is_kept_where_nothing_is_trained(source, tmp_path, monkeypatch):
    told = RunArguments(
        ["--preset", "ptq", "--dataset_name", "digits", *FLAGS[2:], "--use_cpu", "True", "--output_dir", str(tmp_path)]
    ).for_stage("finetune")
    kept = []
    monkeypatch.setattr("quantformer_hf.stage_start.StageStart.save", lambda self, model: kept.append(model))
    StageRun(told, source, tmp_path).run()
    assert kept == []
