"""Labels of images, and those that are none."""

from torch import Tensor


#: Label of a row that no loss and no metric is to count: what PyTorch's cross-entropy ignores.
IGNORED_LABEL = -100


def check_labels(labels: Tensor, num_labels: int) -> None:
    """Raise ValueError for a label outside `0 .. num_labels - 1`, other than `IGNORED_LABEL`."""
    outside = labels[((labels < 0) & (labels != IGNORED_LABEL)) | (labels >= num_labels)]
    if outside.numel():
        raise ValueError(
            f"label {outside[0].item()} is outside 0..{num_labels - 1}: load the model with num_labels set to the number"
            f" of classes of the data set, and ignore_mismatched_sizes=True for a new classifier"
        )
