"""A calibrated model refitted without training: block by block, and then its classifier."""

import functools

import torch
from torch import Tensor, nn

from .classifier_refit import refit_classifier
from .image_batches import Batches, pixel_values_in
from .kernels import fake_quantized
from .quantize import blocks, classifiers, full_precision, reading_layers, writing_streams
from .reconstruction import reconstruct_unit, token_weights, unit_inputs


def reconstruct(model: nn.Module, batches: Batches) -> None:
    """Refit the block linears, the scales of their inputs, and the classifier, to the quantized model's activations.

    By `reconstruction.py` and `classifier_refit.py`.

    Raises:
        TypeError, ValueError: as `pixel_values_in`; no batch at all, images of several sizes, or values that are not finite;
            a model that was made under `torch.inference_mode()`.
        torch.OutOfMemoryError: on a GPU too small for what one block makes of all images; some blocks may be refitted.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "the model was made under torch.inference_mode(), and has no gradients: make it outside of that"
        )
    device = next(model.parameters()).device
    # Gradients weigh the tokens, and few digits would change what is fitted: whatever mode the caller is in.
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        images = [pixel_values.to(device) for pixel_values in pixel_values_in(batches)]
        images = [pixel_values.clone() if pixel_values.is_inference() else pixel_values for pixel_values in images]
        if not images:
            raise ValueError("no batch to reconstruct from: give model.reconstruct() batches of images")
        if len({pixel_values.shape[1:] for pixel_values in images}) > 1:
            raise ValueError("the batches to reconstruct from are of images of several sizes: give them all one size")
        if not all(pixel_values.isfinite().all() for pixel_values in images):
            raise ValueError("a batch to reconstruct from has pixel_values that are not finite: leave those images out")
        try:
            _reconstruct(model, images)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"{error}\nreconstruct() holds what a whole block makes of all {sum(map(len, images))} images: give it fewer"
                f" (--reconstruction_samples)"
            ) from error


def _reconstruct(model: nn.Module, batches: list[Tensor]) -> None:
    units = blocks(model)
    readers = reading_layers(model)
    training = model.training
    model.eval()
    try:
        with full_precision(model):
            weights, logits = zip(*(token_weights(model, batch, readers) for batch in batches), strict=True)
            weights = {quantizer: torch.cat([of_batch[quantizer] for of_batch in weights]) for quantizer in readers}
            with torch.no_grad():
                exact, arguments = unit_inputs(model, units, batches)
        # What the quantizers put out is looked at.
        with torch.no_grad(), fake_quantized():
            hidden, _ = unit_inputs(model, units, batches)
            streams, off = writing_streams(model), functools.partial(full_precision, model)
            for unit, of_unit in zip(units, arguments, strict=True):
                exact, hidden = reconstruct_unit(unit, of_unit, exact, hidden, readers, streams, weights, off)
            # Softmax has nothing to say of several labels an image.
            if model.backbone.config.problem_type in (None, "single_label_classification"):
                refit_classifier(model, classifiers(model), batches, logits)
    finally:
        model.train(training)
