"""A calibrated model refitted without training: layer by layer, and then its classifier."""

import functools
import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .classifier_refit import refit_classifier
from .estimate import free_bytes, mebibytes
from .image_batches import Batches, pixel_values_in
from .kernels import fake_quantized
from .labels import one_class_an_image
from .quantize import classifiers, full_precision, reading_layers, writing_streams
from .quantizers import GroupActivationQuantizer
from .reconstruction import reconstruct_layers
from .token_weights import Readers, token_weights


logger = logging.getLogger(__name__)

#: Images that run together, while all others wait where a quantizer stopped them.
IMAGES_AT_ONCE = 32

#: What an image holds while it waits, in outputs of the widest linear: its tensors are 3 in ViT and DeiT, 5 in Swin, whose
#: attention has every token in windows as well. The allocator's share comes on top: ViT-Tiny's process takes 6 an image.
HELD_OUTPUTS = 5


def reconstruct(model: nn.Module, batches: Batches) -> None:
    """Refit the block linears, the scales of their inputs, and the classifier, to the quantized model's activations.

    By `reconstruction.py` and `classifier_refit.py`.

    Raises:
        TypeError, ValueError: as `pixel_values_in`; no batch at all, or values that are not finite; a model that was made
            under `torch.inference_mode()`.
        torch.OutOfMemoryError: on a GPU too small for the hidden states of all images; some blocks may be refitted.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "the model was made under torch.inference_mode(), and has no gradients: make it outside of that"
        )
    device = next(model.parameters()).device
    # Gradients weigh the tokens, and few digits would change what is fitted: whatever mode the caller is in.
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        images = [
            few.to(device) for pixel_values in pixel_values_in(batches) for few in pixel_values.split(IMAGES_AT_ONCE)
        ]
        images = [pixel_values.clone() if pixel_values.is_inference() else pixel_values for pixel_values in images]
        if not images:
            raise ValueError("no batch to reconstruct from: give model.reconstruct() batches of images")
        if not all(pixel_values.isfinite().all() for pixel_values in images):
            raise ValueError("a batch to reconstruct from has pixel_values that are not finite: leave those images out")
        _reconstruct(model, images)


def _reconstruct(model: nn.Module, batches: list[Tensor]) -> None:
    readers, streams, heads = reading_layers(model), writing_streams(model), classifiers(model)
    off = functools.partial(full_precision, model)
    training = model.training
    model.eval()
    try:
        with off():
            weights, logits = token_weights(model, batches, readers)
        _warn_of_too_little_memory(batches, weights, readers)
        # What the quantizers put out is looked at.
        with torch.no_grad(), fake_quantized():
            try:
                features = reconstruct_layers(model, batches, readers, streams, weights, off, heads)
            except torch.OutOfMemoryError as error:
                raise torch.OutOfMemoryError(
                    f"{error}\nreconstruct() holds hidden states of all {sum(map(len, batches))} images: give it fewer"
                    f" (--reconstruction_samples)"
                ) from error
            if one_class_an_image(model.config):
                refit_classifier(heads, features, torch.cat(logits))
    finally:
        model.train(training)


def _warn_of_too_little_memory(
    batches: Sequence[Tensor], weights: Sequence[Mapping[GroupActivationQuantizer, Tensor]], readers: Readers
) -> None:
    """On a CPU the system ends a process that takes too much, without a word: this is the last one that there is."""
    free, held = free_bytes(batches[0].device), 0
    for of_batch in weights:
        outputs = (
            len(rows) * max(layer.out_features for layer in readers[quantizer]) for quantizer, rows in of_batch.items()
        )
        held += HELD_OUTPUTS * max(outputs, default=0) * torch.finfo(torch.float32).bits // 8
    if free is not None and held > free:
        images = sum(map(len, batches))
        logger.warning(
            f"reconstruct() may hold {mebibytes(held)}, hidden states of all {images} images, and {mebibytes(free)} are"
            f" free: if that fails, give it {max(1, images * free // held)} images or fewer (--reconstruction_samples)"
        )
