"""Whether one model can teach another, and its hidden states as the other has them."""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import attention_modules
from .rotation import rotated
from .training_args import QuantformerTrainingArguments


def check_teacher(student: PreTrainedModel, teacher: PreTrainedModel, arguments: QuantformerTrainingArguments) -> None:
    """Look, before anything runs, at what the losses of `arguments` compare.

    Raises:
        ValueError: other classes, where logits are compared; another architecture, where attention maps or hidden states
            are.
    """
    classes = student.config.num_labels, teacher.config.num_labels
    if arguments.distillation_weight > 0 and len(set(classes)) == 2:
        raise ValueError(
            f"the model has {classes[0]} classes and the teacher {classes[1]}: distillation_weight compares their logits,"
            f" so give a teacher of the same classes, or distillation_weight 0"
        )
    if arguments.aux_weight > 0 or arguments.feature_weight > 0:
        own, others = _shapes(student), _shapes(teacher)
        if own != others:
            raise ValueError(
                f"the model has attention blocks of {_words(own)}, and the teacher of {_words(others)}: aux_weight and"
                f" feature_weight compare them block by block, so give a teacher of the same architecture, or 0 for both"
            )


def _shapes(model: nn.Module) -> list[tuple[int, int]]:
    """Channels and heads of each attention block."""
    return [(m.q_proj.out_features, m.num_attention_heads) for m in attention_modules(model)]


def _words(shapes: Sequence[tuple[int, int]]) -> str:
    different = ", ".join(f"{channels} channels in {heads} heads" for channels, heads in dict.fromkeys(shapes))
    return f"{different} ({len(shapes)} blocks)" if shapes else "no known kind"


def hidden_states_for(student: PreTrainedModel, teacher: PreTrainedModel, states: Sequence[Tensor]) -> Sequence[Tensor]:
    """`states` of the teacher, turned as those of the student are (`rotation.py`)."""
    turned = [getattr(model.config, "channels_rotated", False) for model in (student, teacher)]
    # R is its own inverse: it turns, and turns back.
    return rotated(states) if turned[0] != turned[1] else states
