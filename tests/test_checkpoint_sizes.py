"""Weights loaded at another image or window size are interpolated as timm does it."""

import pytest
import timm
from timm.models.swin_transformer import checkpoint_filter_fn as swin_filter
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter
from timm_checkpoints import MODELS, SWINS, assert_same_logits, make_timm_model, save_torch, to_official_swin
from transformers import ViTImageProcessor

from quantformer_hf.checkpoints import load_full_precision


@pytest.mark.parametrize("name", MODELS)
def test_another_image_size_interpolates_as_timm_does(name, tmp_path):
    model = make_timm_model(name)
    path = save_torch(tmp_path / f"{name}.pth", model.state_dict())
    resized = timm.create_model(name, **(MODELS[name] | {"img_size": 96})).eval()
    weights = (swin_filter if name in SWINS else vit_filter)(model.state_dict(), resized)
    resized.load_state_dict(weights)
    checkpoint = load_full_precision(path, image_size=96)
    assert_same_logits(checkpoint, resized, 96)
    assert checkpoint.model.config.image_size == 96
    assert checkpoint.processor.crop_size == {"height": 96, "width": 96}

    load_full_precision(path, image_size=64).model.save_pretrained(tmp_path / "saved")
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "saved")
    again = load_full_precision(tmp_path / "saved", image_size=96)
    assert_same_logits(again, resized, 96)
    assert again.processor.size == {"height": 96, "width": 96}


@pytest.mark.parametrize("name", SWINS)
def test_another_window_size_interpolates_as_timm_does(name, tmp_path):
    model = make_timm_model(name)
    path = save_torch(tmp_path / f"{name}.pth", to_official_swin(model))
    resized = timm.create_model(name, **(MODELS[name] | {"img_size": 96, "window_size": 3})).eval()
    resized.load_state_dict(swin_filter(model.state_dict(), resized))
    checkpoint = load_full_precision(path, image_size=96, window_size=3)
    assert_same_logits(checkpoint, resized, 96)
    assert checkpoint.model.config.window_size == 3


def test_sizes_that_do_not_fit_are_refused(tmp_path):
    path = save_torch(tmp_path / "swin.pth", make_timm_model("swin_tiny_patch4_window7_224").state_dict())
    with pytest.raises(ValueError, match="choose window_size from 1 to 2"):
        load_full_precision(path, window_size=3)
    with pytest.raises(ValueError, match="image_size 63 is not a multiple of the patch size 4"):
        load_full_precision(path, image_size=63)
    path = save_torch(tmp_path / "deit_tiny_patch16_224.pth", make_timm_model("deit_tiny_patch16_224").state_dict())
    with pytest.raises(ValueError, match="window_size is for Swin"):
        load_full_precision(path, window_size=3)
