"""Which models can teach a quantized one."""

import copy

import pytest
import torch
from conftest import make_batches, make_full_precision, make_quantized
from trainers import logged, make_trainer
from transformers import ViTForImageClassification, ViTImageProcessor

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.teachers import check_image_size, renormalize


def other_teacher(**changes):
    config = copy.deepcopy(make_full_precision().config)
    for name, value in changes.items():
        setattr(config, name, value)
    return ViTForImageClassification(config)


@pytest.mark.parametrize(
    ("loss", "changes", "message"),
    [
        (
            "aux_weight",
            {"num_hidden_layers": 3},
            r"heads of each .* the model has \[2, 2\], and the teacher \[2, 2, 2\]",
        ),
        ("aux_weight", {"num_attention_heads": 4}, r"and the teacher \[4, 4\]; give another one, or aux_weight 0"),
        ("aux_weight", {"patch_size": 8}, r"the model has \[16, 4, None, 1\], and the teacher \[16, 8, None, 1\]"),
        ("feature_weight", {"num_hidden_layers": 3}, r"channels of each .* and the teacher \[32, 32, 32\]"),
        ("feature_weight", {"hidden_size": 64}, r"and the teacher \[64, 64\]; give another one, or feature_weight 0"),
        ("feature_weight", {"patch_size": 8}, r"the teacher \[16, 8, None, 1\]"),
        ("distillation_weight", {"num_labels": 1}, r"number of classes: the model has 5, and the teacher 1"),
        ("distillation_weight", {"num_labels": 7}, r"number of classes: the model has 5, and the teacher 7"),
    ],
)
def test_a_teacher_that_cannot_be_compared_is_refused(tmp_path, loss, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, make_quantized(), other_teacher(**changes), **{loss: 1.0}).train()


@pytest.mark.parametrize(
    ("loss", "changes"),
    [
        ("aux_weight", {"hidden_size": 64, "num_labels": 7}),
        ("feature_weight", {"num_attention_heads": 4, "num_labels": 7}),
        ("distillation_weight", {"num_hidden_layers": 3, "hidden_size": 64, "patch_size": 8}),
    ],
)
def test_a_teacher_may_be_another_one_where_nobody_looks(tmp_path, loss, changes):
    trainer = make_trainer(tmp_path, make_quantized(), other_teacher(**changes), max_steps=1, **{loss: 1.0})
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("teacher_turned", [True, False])
def test_hidden_states_are_compared_as_the_model_has_them(tmp_path, turned, teacher_turned):
    """A teacher that is quantized itself may be rotated as well, or alone: with eight bits all are nearly alike."""
    models = []
    for rotates in (turned, teacher_turned):
        model = QuantformerForImageClassification.from_full_precision(make_full_precision(), bit_width=8)
        models.append(model.calibrate(make_batches(), rotate_channels=rotates))
    trainer = make_trainer(tmp_path, *models, max_steps=1, learning_rate=0.0, feature_weight=1.0)
    trainer.train()
    (loss,) = logged(trainer, "loss_features")
    # States that were turned once too often would be as far apart as any: two.
    assert loss < 0.02


@pytest.mark.parametrize("deviation", [[0.5, 0.3, 0.2], [0.229, 0.224, 0.225]])
def test_a_teacher_sees_images_as_it_was_trained_on_them(deviation):
    teacher, images = make_full_precision(), torch.rand(4, 3, 16, 16)
    given = ViTImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=deviation)
    own = ViTImageProcessor(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])

    def normalized(processor):
        mean, deviation = (
            torch.tensor(values).view(-1, 1, 1) for values in (processor.image_mean, processor.image_std)
        )
        return (images - mean) / deviation

    with torch.no_grad():
        expected = teacher(pixel_values=normalized(own)).logits
        renormalize(teacher, given, given)
        assert torch.equal(teacher(pixel_values=normalized(own)).logits, expected)
        renormalize(teacher, given, own)
        torch.testing.assert_close(teacher(pixel_values=normalized(given)).logits, expected)


def test_what_is_no_model_of_transformers_says_how_it_becomes_one(tmp_path):
    for teacher in ("vit_tiny_patch16_224", torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=f"the teacher is a {type(teacher).__name__}: .*load_full_precision"):
            make_trainer(tmp_path, make_quantized(), teacher)


def test_a_teacher_of_another_image_size_is_refused_by_name():
    student = make_quantized()
    check_image_size(student, make_full_precision())
    check_image_size(student, other_teacher(image_size=[16, 16]))
    anyones = make_full_precision("swin")
    anyones.config.image_size = 32
    check_image_size(student, anyones)
    teacher = other_teacher(image_size=32)
    teacher.name_or_path = "large/teacher"
    with pytest.raises(
        ValueError, match=r"'large/teacher' takes images of 32 px, and the model of 16: give --image_size"
    ):
        check_image_size(student, teacher)
