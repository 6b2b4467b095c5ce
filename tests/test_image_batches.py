"""Batches as users have them."""

import pytest
import torch
from conftest import make_batches, make_full_precision

from quantformer_hf import QuantformerForImageClassification


def test_one_batch_need_not_be_in_a_list():
    (images,) = make_batches(1)
    expected = None
    for batches in ([images], images, {"pixel_values": images}, ({"pixel_values": images} for _ in range(1))):
        model = QuantformerForImageClassification.from_full_precision(make_full_precision()).calibrate(batches).eval()
        with torch.no_grad():
            logits = model(images).logits
        expected = logits if expected is None else expected
        assert torch.equal(logits, expected)


def test_what_is_no_batch_of_images_is_told():
    model = QuantformerForImageClassification.from_full_precision(make_full_precision())
    with pytest.raises(TypeError, match="the batches are a NoneType"):
        model.calibrate(None)
    with pytest.raises(ValueError, match=r"a calibration batch has the shape \(3, 16, 16\)"):
        model.calibrate([make_batches(1)[0][0]])
    with pytest.raises(ValueError, match=r"a calibration batch has the shape \(0, 3, 16, 16\)"):
        model.calibrate([make_batches(1)[0][:0]])
