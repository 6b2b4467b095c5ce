"""Tensors of checkpoints that hold no numbers any more: of a damaged file, or of a run that went astray."""

from pathlib import Path

from torch import Tensor


def check_finite(folder: str | Path, name: str, tensor: Tensor) -> Tensor:
    """`tensor` as it is, or ValueError if one of its values is no number or infinite.

    Args:
        folder, name: where it comes from, for the message.
        tensor: of any shape and type.
    """
    if tensor.is_floating_point() and not tensor.isfinite().all():
        wrong = tensor[~tensor.isfinite()][0].item()
        raise ValueError(
            f"{folder}: '{name}' holds {wrong}: the file is damaged, or its training went astray; copy or download it"
            f" again, or start from an earlier checkpoint"
        )
    return tensor
