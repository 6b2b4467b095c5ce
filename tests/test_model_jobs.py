"""The jobs of a whole packed classifier: whose they are, when they are made, and when they are gone."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from conftest import make_batches
from packed_models import listen, logits, make_packed, needs_kernels, one_by_one, ran_whole
from torch.func import functional_call

from quantformer_hf import QuantformerForImageClassification, packed_model
from quantformer_hf.attention import capture_attention
from quantformer_hf.quiet_modules import Quiet


@pytest.fixture
def made(monkeypatch):
    """What each job was made of, a list that fills."""
    made, prepare = [], packed_model.prepare
    monkeypatch.setattr(packed_model, "prepare", lambda *given: made.append(given) or prepare(*given))
    return made


@needs_kernels
def test_copies_saved_and_unpacked_models_have_jobs_of_their_own(tmp_path):
    packed = make_packed()
    images = make_batches()[0]
    expected = logits(packed, images)
    packed.save_pretrained(tmp_path)
    loaded = QuantformerForImageClassification.from_pretrained(tmp_path)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), loaded):
        assert other.backbone.whole is not packed.backbone.whole
        assert torch.equal(logits(other, images), expected)
        assert ran_whole(other, images)
    assert not hasattr(packed.unpack().backbone, "whole")
    assert logits(packed, images).shape == expected.shape
    listen([packed.pack().backbone])
    assert torch.equal(logits(packed, images), expected)


@needs_kernels
def test_parameters_that_are_lent_for_a_call_are_used():
    packed = make_packed()
    images, name = make_batches()[0], "backbone.vit.embeddings.cls_token"
    token = packed.get_parameter(name).detach()
    for factor in torch.linspace(0.5, 3, 6):
        with torch.no_grad():
            found = functional_call(packed, {name: token * factor}, (images,)).logits
            expected = copy.deepcopy(packed)
            expected.get_parameter(name).mul_(factor)
        assert torch.equal(found, one_by_one(expected, images))


@needs_kernels
def test_images_may_be_mapped_over():
    packed = make_packed()
    images = make_batches()[0]
    expected = logits(packed, images)
    mapped = torch.vmap(lambda image: logits(packed, image.unsqueeze(0)).squeeze(0))(images)
    assert torch.equal(mapped, expected)


@needs_kernels
def test_the_device_of_new_tensors_is_the_caller_s_own():
    packed = make_packed()
    images = make_batches()[0]
    expected = one_by_one(packed, images)
    packed.backbone.whole = type(packed.backbone.whole)()
    with torch.device("meta"):
        assert torch.equal(logits(packed, images), expected)


@needs_kernels
def test_jobs_of_a_few_sizes_are_kept(monkeypatch):
    packed = make_packed()
    # As many as a server takes at once.
    assert packed_model.KEPT_SIZES >= 32
    more = packed_model.KEPT_SIZES + 1
    images, made = make_batches(1, more)[0], []
    real = packed_model.prepare
    monkeypatch.setattr(packed_model, "prepare", lambda *given: made.append(given[1]) or real(*given))
    sizes = range(1, packed_model.KEPT_SIZES + 1)
    for size in (*sizes, *sizes):
        assert ran_whole(packed, images[:size])
    assert made == [*sizes]
    assert ran_whole(packed, images)
    assert ran_whole(packed, images[:1])
    assert made == [*sizes, more, 1]
    with torch.no_grad():
        packed.backbone.vit.layernorm.weight.mul_(2)
    assert ran_whole(packed, images[:1])
    # Nothing of what the model was is kept.
    assert len(packed.backbone.whole._of_size) == 1


@needs_kernels
def test_a_model_whose_maps_are_captured_first_runs_whole_after_that():
    packed, images = make_packed(), make_batches()[0]
    with capture_attention(packed) as maps:
        expected = logits(packed, images)
    assert len(maps) == len(packed.backbone.vit.layers)
    assert torch.equal(logits(packed, images), expected)
    assert ran_whole(packed, images)


@needs_kernels
@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_a_model_that_nobody_has_any_more_is_gone(backbone):
    packed = make_packed(backbone)
    logits(packed, make_batches()[0])
    gc.collect()
    gc.disable()
    try:
        # Blocks that are not run by themselves have nothing that holds them.
        codes = weakref.ref(packed.backbone.classifier.weight_quantizer.codes)
        backbone = weakref.ref(packed.backbone)
        del packed
        assert backbone() is None
        assert codes() is None
    finally:
        gc.enable()


@needs_kernels
@pytest.mark.parametrize("change", ["a hook", "training", "a quantizer off"])
def test_a_change_while_the_job_is_made_counts(change, monkeypatch):
    """By another thread, after modules were looked at."""
    packed, images, heard = make_packed(), make_batches()[0], []
    classifier = packed.backbone.classifier

    def act():
        if change == "a hook":
            classifier.register_forward_hook(lambda *_: heard.append(True))
        elif change == "training":
            packed.backbone.vit.embeddings.dropout.train()
        else:
            classifier.input_quantizer.enabled = False

    class Slow(Quiet):
        def __init__(self, *args):
            act()
            super().__init__(*args)

    with monkeypatch.context() as patch:
        patch.setattr(packed_model, "Quiet", Slow)
        logits(packed, images)
    assert not ran_whole(packed, images)
    assert len(heard) == (change == "a hook")


@needs_kernels
def test_copies_that_share_modules_share_their_job(made):
    packed, images = make_packed(), make_batches()[0]
    expected = logits(packed, images)
    copied = copy.copy(packed.backbone)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(copied.whole.run(copied, images, {}), expected)
        assert torch.equal(logits(packed, images), expected)
    assert len(made) == 1
    # The copy's own is its own.
    copied.train(False)
    copied.training = True
    assert copied.whole.run(copied, images, {}) is None


@needs_kernels
def test_tensors_that_are_lent_as_they_are_change_nothing(made):
    packed, images = make_packed(), make_batches()[0]
    expected = logits(packed, images)
    lent = {name: tensor.detach() for name, tensor in packed.named_parameters()}
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(functional_call(packed, lent, (images,)).logits, expected)
        assert torch.equal(logits(packed, images), expected)
    assert len(made) == 1


@needs_kernels
def test_images_of_more_numbers_than_an_index_counts_have_no_job():
    classifier, steps = make_packed().backbone.classifier, packed_model._Steps(1, rows=2**16, width=2**15)
    with pytest.raises(packed_model._NotHere):
        steps.add_linear(classifier, 1, torch.zeros(1, 1), classifier.in_features)
