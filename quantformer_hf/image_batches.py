"""Batches of images as the verbs of a model take them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor


#: What `calibrate`, `begin_search` and `reconstruct` are given: many batches, or one.
Batches = Iterable[Tensor | Mapping[str, Any]] | Tensor | Mapping[str, Any]


def pixel_values_in(batches: Batches) -> Iterator[Tensor]:
    """The `pixel_values` of each batch; a tensor or a dictionary is one batch by itself.

    Raises:
        TypeError: not batches.
        TypeError, ValueError: as `pixel_values_of`.
    """
    if not isinstance(batches, Iterable):
        raise TypeError(f"the batches are a {type(batches).__name__}: give a list, or another iterable, of batches")
    for batch in [batches] if isinstance(batches, (Tensor, Mapping)) else batches:
        yield pixel_values_of(batch)


def pixel_values_of(batch: Tensor | Mapping[str, Any]) -> Tensor:
    """The `pixel_values` `(batch, channels, height, width)` of a calibration batch.

    Raises:
        TypeError: neither a tensor nor a dictionary that holds one.
        ValueError: no images, or of another shape.
    """
    pixel_values = batch.get("pixel_values") if isinstance(batch, Mapping) else batch
    if not isinstance(pixel_values, Tensor):
        raise TypeError(
            f"a calibration batch is a {type(batch).__name__}: give pixel_values tensors"
            f" (batch, channels, height, width), or dictionaries with the key 'pixel_values'"
        )
    if pixel_values.dim() != 4 or not len(pixel_values):
        raise ValueError(
            f"a calibration batch has the shape {tuple(pixel_values.shape)}: give images (batch, channels, height, width)"
        )
    return pixel_values


def check_given(pixel_values: Any) -> None:
    """Raise TypeError unless a model is called with a tensor of images."""
    if not isinstance(pixel_values, Tensor):
        raise TypeError(
            f"pixel_values is {'missing' if pixel_values is None else f'a {type(pixel_values).__name__}'}: give a tensor"
            f" (batch, channels, height, width), as image_processor(images, return_tensors='pt') makes it"
        )
