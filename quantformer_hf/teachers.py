"""Whether one model can teach another, and its hidden states as the other has them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel

from .attention import attention_modules
from .backbone_layers import pair
from .class_token import CLASS_TOKENS
from .images import pixel_scaling
from .rotation import rotated
from .training_args import QuantformerTrainingArguments


#: What has to be alike in both models for each loss (`_facts`).
ALIKE = {
    "distillation_weight": ("number of classes",),
    "aux_weight": ("heads of each attention block", "grid of patches, windows and special tokens"),
    "feature_weight": ("channels of each attention block", "grid of patches, windows and special tokens"),
}


def check_is_teacher(teacher: Any, student: PreTrainedModel) -> None:
    """Raise TypeError or ValueError unless `teacher` is a model of transformers, and another one, or None."""
    if teacher is None:
        return
    if not isinstance(teacher, PreTrainedModel):
        raise TypeError(
            f"the teacher is a {type(teacher).__name__}: give a model of transformers; those of timm, and other"
            f" checkpoints, are made such by quantformer_hf.checkpoints.load_full_precision(name).model"
        )
    if teacher is student:
        raise ValueError("the teacher is the model itself: give the full-precision one that it was made from")


def check_teacher(student: PreTrainedModel, teacher: PreTrainedModel, arguments: QuantformerTrainingArguments) -> None:
    """Look, before anything runs, at what the losses of `arguments` compare.

    Raises:
        ValueError: other classes where logits are compared, other heads where attention maps are, other channels where
            hidden states are; another number of blocks or tokens with either of these two.
    """
    own, others = _facts(student), _facts(teacher)
    for loss, names in ALIKE.items():
        for name in names if getattr(arguments, loss) > 0 else ():
            if own[name] != others[name]:
                raise ValueError(
                    f"{loss} needs a teacher with the model's {name}: the model has {own[name]}, and the teacher"
                    f" {others[name]}; give another one, or {loss} 0"
                )


def _facts(model: PreTrainedModel) -> dict[str, Any]:
    config = getattr(model.config, "backbone_config", model.config)
    blocks = attention_modules(model)
    sizes = [getattr(config, name, None) for name in ("image_size", "patch_size", "window_size")]
    return {
        "number of classes": model.config.num_labels,
        "heads of each attention block": [block.num_attention_heads for block in blocks],
        "channels of each attention block": [block.q_proj.out_features for block in blocks],
        "grid of patches, windows and special tokens": [*sizes, CLASS_TOKENS.get(config.model_type)],
    }


def hidden_states_for(student: PreTrainedModel, teacher: PreTrainedModel, states: Sequence[Tensor]) -> Sequence[Tensor]:
    """`states` of the teacher, turned as those of the student are (`rotation.py`)."""
    turned = [getattr(model.config, "channels_rotated", False) for model in (student, teacher)]
    # R is its own inverse: it turns, and turns back.
    return rotated(states) if turned[0] != turned[1] else states


def check_image_size(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise ValueError where the teacher takes images of one size alone, as ViT and DeiT do, and the student has others."""
    own, others = (getattr(model.config, "backbone_config", model.config) for model in (student, teacher))
    if others.model_type in CLASS_TOKENS and pair(others.image_size) != pair(own.image_size):
        raise ValueError(
            f"the teacher {teacher.name_or_path!r} takes images of {others.image_size} px, and the model of"
            f" {own.image_size}: give --image_size, which holds for both, or another --teacher_name_or_path"
        )


def renormalize(teacher: PreTrainedModel, given: BaseImageProcessor, own: BaseImageProcessor) -> None:
    """Let `teacher` take `pixel_values` that `given` has normalized, where it was trained on those of `own`."""
    (mean, deviation), (own_mean, own_deviation) = (
        [torch.tensor(values).float().view(-1, 1, 1) for values in pixel_scaling(processor)]
        for processor in (given, own)
    )
    factor, shift = deviation / own_deviation, (mean - own_mean) / own_deviation
    if (factor == 1).all() and (shift == 0).all():
        return

    def as_its_own(module: nn.Module, arguments: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        pixel_values = kwargs["pixel_values"]
        return arguments, kwargs | {"pixel_values": pixel_values * factor.to(pixel_values) + shift.to(pixel_values)}

    teacher.register_forward_pre_hook(as_its_own, with_kwargs=True)
