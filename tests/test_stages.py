"""What a stage makes of what it is told, up to its training."""

import pytest
import torch
from conftest import IMAGE_SIZE
from runs import make_stage, save_classifier
from transformers import ViTImageProcessor

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.image_batches import pixel_values_in


VERBS = ("calibrate", "begin_search", "reconstruct")


@pytest.fixture
def source(tmp_path):
    return save_classifier(tmp_path / "source")


@pytest.fixture
def asked(monkeypatch):
    """What verbs of models were asked for, a list that fills: the verb, how many images, and all other arguments."""
    asked = []

    def listen(verb):
        real = getattr(QuantformerForImageClassification, verb)

        def listening(model, *given):
            # The images are the first argument, or the one after the number of groups.
            at = 1 if verb == "begin_search" else 0
            images = len(torch.cat(list(pixel_values_in(given[at])))) if len(given) > at else None
            asked.append((verb, images, *given[:at], *given[at + 1 :]))
            if images is not None:
                # They may have been an iterator.
                given = (*given[:at], [torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)], *given[at + 1 :])
            return real(model, *given)

        monkeypatch.setattr(QuantformerForImageClassification, verb, listening)

    for verb in VERBS:
        listen(verb)
    return asked


def test_verbs_have_the_images_and_settings_that_the_stage_was_told(source, tmp_path, asked):
    flags = ["--calibration_samples", "9", "--reconstruction_samples", "5", "--centre_channels", "False"]
    stage, data = make_stage("finetune", source, tmp_path, *flags)
    stage._build_model(data)
    assert asked == [("calibrate", 9, False, None), ("begin_search", None), ("reconstruct", 5)]


def test_groups_of_a_trained_model_are_made_from_what_it_sees_now(source, tmp_path, asked):
    stage, data = make_stage("pretrain", source, tmp_path, "--calibration_samples", "9")
    built = stage._build_model(data)
    built.model.save_pretrained(tmp_path / "pretrain")
    built.processor.save_pretrained(tmp_path / "pretrain")
    del asked[:]
    stage, data = make_stage("search", str(tmp_path / "pretrain"), tmp_path, "--calibration_samples", "7")
    assert stage._build_model(data).model.config.stage == "search"
    assert asked == [("begin_search", 7, 4)]


def test_calibration_goes_by_the_seed_the_classes_and_the_bad_images_of_the_run(source, tmp_path):
    flags = ["--seed", "3", "--on_bad_image", "error", "--balance_classes", "True"]
    stage, data = make_stage("finetune", source, tmp_path, *flags)
    told = stage._calibration_batches(data, ViTImageProcessor()).keywords
    assert (told["seed"], told["on_bad_image"], told["balance_classes"]) == (3, "error", True)


def test_images_are_cropped_as_told(source, tmp_path):
    stage, data = make_stage("full_precision", source, tmp_path, "--crop_pct", "1.0")
    assert stage._build_model(data).processor.size["shortest_edge"] == IMAGE_SIZE


def test_a_teacher_of_another_image_size_is_refused(source, tmp_path):
    teacher = save_classifier(tmp_path / "teacher", image_size=32)
    flags = ["--teacher_name_or_path", teacher, "--distillation_weight", "1", "--calibration_samples", "4"]
    stage, data = make_stage("pretrain", source, tmp_path, *flags)
    with pytest.raises(ValueError, match="takes images of 32 px, and the model of 16"):
        stage._build_model(data)


def test_a_stage_that_is_to_be_overwritten_takes_what_was_packed_of_it_along(source, tmp_path):
    for stage, leaves in (("search", True), ("finetune", False)):
        for name in (stage, "packed"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "model.safetensors").write_text("old")
        make_stage(stage, source, tmp_path, "--overwrite_output_dir", "True")[0]._begin()
        assert not (tmp_path / stage / "model.safetensors").exists()
        assert (tmp_path / "packed" / "model.safetensors").exists() == leaves
