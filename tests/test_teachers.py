"""Which models can teach a quantized one."""

import copy

import pytest
from conftest import make_batches, make_full_precision, make_quantized
from trainers import logged, make_trainer
from transformers import ViTForImageClassification

from quantformer_hf import QuantformerForImageClassification


def other_teacher(**changes):
    config = copy.deepcopy(make_full_precision().config)
    for name, value in changes.items():
        setattr(config, name, value)
    return ViTForImageClassification(config)


@pytest.mark.parametrize("loss", ["aux_weight", "feature_weight"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"of 32 channels in 2 heads \(2 blocks\), and the teacher of .* \(3 blocks\)"),
        ({"hidden_size": 64}, r"the teacher of 64 channels in 2 heads"),
        ({"num_attention_heads": 4}, r"the teacher of 32 channels in 4 heads"),
    ],
)
def test_a_teacher_of_another_architecture_is_refused_where_blocks_are_compared(tmp_path, loss, changes, message):
    trainer = make_trainer(tmp_path, make_quantized(), other_teacher(**changes), **{loss: 1.0})
    with pytest.raises(ValueError, match=message):
        trainer.train()
    # Logits alone can be compared.
    make_trainer(tmp_path, make_quantized(), other_teacher(**changes), max_steps=1, distillation_weight=1.0).train()


@pytest.mark.parametrize("classes", [1, 7])
def test_a_teacher_of_other_classes_is_refused_where_logits_are_compared(tmp_path, classes):
    teacher = other_teacher(num_labels=classes)
    with pytest.raises(ValueError, match=f"the model has 5 classes and the teacher {classes}: distillation_weight"):
        make_trainer(tmp_path, make_quantized(), teacher, distillation_weight=1.0).train()
    make_trainer(tmp_path, make_quantized(), teacher, max_steps=1, feature_weight=1.0).train()


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
