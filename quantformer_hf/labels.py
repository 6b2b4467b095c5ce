"""Labels of images, and those that are none."""

from torch import Tensor
from transformers import PreTrainedConfig


#: Label of a row that no loss and no metric is to count: what PyTorch's cross-entropy ignores.
IGNORED_LABEL = -100


def one_class_an_image(config: PreTrainedConfig) -> bool:
    """Whether softmax is for its logits: each image is of one class, and not of several, and no number is asked for."""
    return config.num_labels > 1 and config.problem_type in (None, "single_label_classification")


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
