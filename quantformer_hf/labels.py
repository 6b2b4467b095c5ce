"""Labels of images, and those that are none."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.loss.loss_utils import ForSequenceClassificationLoss


#: Label of a row that no loss and no metric is to count: what PyTorch's cross-entropy ignores.
IGNORED_LABEL = -100


def one_class_an_image(config: PreTrainedConfig) -> bool:
    """Whether softmax is for its logits: each image is of one class, and not of several, and no number is asked for."""
    return config.num_labels > 1 and config.problem_type in (None, "single_label_classification")


def classification_loss(logits: Tensor, labels: Tensor, config: PreTrainedConfig) -> Tensor:
    """The cross-entropy; for several classes an image, or a number, what transformers takes for them.

    As there, labels in floating point are of several classes where the config does not say, and it says so from then on.

    Args:
        logits: `(batch, classes)`.
        labels: `(batch,)` or `(batch, 1)` integers, or what `problem_type` asks for.

    Raises:
        ValueError: a label that is no class.
    """
    if not one_class_an_image(config) or (labels.is_floating_point() and config.problem_type is None):
        return ForSequenceClassificationLoss(labels, logits, config)
    if not labels.is_floating_point():
        labels = labels.view(-1)
        # On an accelerator this look would stop the pipeline each step: there the data collator looks. Nor does a graph.
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            check_labels(labels, config.num_labels)
    return F.cross_entropy(logits, labels)


def check_labels(labels: Tensor, num_labels: int) -> None:
    """Raise ValueError for a label outside `0 .. num_labels - 1`, other than `IGNORED_LABEL`."""
    outside = labels[((labels < 0) & (labels != IGNORED_LABEL)) | (labels >= num_labels)]
    if outside.numel():
        label = outside[0].item()
        raise ValueError(
            f"label {label} is outside 0..{num_labels - 1}: "
            + (
                "the image has no class, and has to be left out"
                if label < 0
                else "load the model with num_labels set to the number of classes of the data set, and"
                " ignore_mismatched_sizes=True for a new classifier"
            )
        )


def check_labelled(label: int | None, image: str, column: str, argument: str) -> None:
    """Raise ValueError, which names the image, where its label says that it has no class.

    Args:
        column: where the label is from.
        argument: what names another split.
    """
    if label is None or (label < 0 and label != IGNORED_LABEL):
        raise ValueError(
            f"{image} has no class ({label} in the column {column!r}): name a split with labels by --{argument}, or leave"
            f" out what has none"
        )
