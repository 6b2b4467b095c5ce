"""A whole packed classifier in one call of the kernels gives the bits of its modules, and these to who looks at them."""

import copy
import pickle

import pytest
import torch
from conftest import instruction_sets, make_batches, make_quantized
from packed_models import listen, logits, needs_kernels, one_by_one
from torch import nn
from transformers.models.vit.modeling_vit import ViTEmbeddings

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.kernels import using


def make_packed(backbone="vit", **arguments):
    return make_quantized(backbone, "finetune", **arguments).pack()


def ran_whole(model):
    return model.backbone.whole.value is not None


@needs_kernels
@pytest.mark.parametrize(
    ("name", "class_token_bits"), [("vit", None), ("vit", 8), ("deit", None), ("deit", 8), ("swin", None)]
)
def test_a_model_in_one_call_gives_the_bits_of_its_modules(name, class_token_bits):
    packed = make_packed(name, class_token_bits=class_token_bits)
    for images in (make_batches()[0], make_batches()[0][:1], torch.cat(make_batches())):
        result = logits(packed, images)
        assert ran_whole(packed)
        assert torch.equal(result, one_by_one(packed, images))
        for instructions in (None, *instruction_sets()):
            with using(instructions):
                assert torch.equal(result, logits(packed, images))
        threads = torch.get_num_threads()
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(result, logits(packed, images))
        torch.set_num_threads(threads)


@needs_kernels
def test_no_image_has_no_logits():
    packed = make_packed()
    assert logits(packed, make_batches()[0][:0]).shape == (0, packed.config.num_labels)


@needs_kernels
def test_a_deit_of_two_classifiers_runs_module_by_module():
    packed = make_packed("deit-distilled")
    images = make_batches()[0]
    assert torch.equal(logits(packed, images), one_by_one(packed, images))
    assert not ran_whole(packed)


LISTENED = {
    "vit": ["", "vit", "vit.embeddings", "vit.embeddings.patch_embeddings.projection", "vit.layernorm", "classifier"],
    "swin": [
        "swin.embeddings.norm",
        "swin.encoder",
        "swin.encoder.layers.0",
        "swin.encoder.layers.0.downsample",
        "swin.pooler",
    ],
}


@needs_kernels
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize(("backbone", "name"), [(key, name) for key, names in LISTENED.items() for name in names])
def test_who_listens_to_a_module_hears_it(backbone, name, kind):
    packed = make_packed(backbone)
    images, heard = make_batches()[0], []
    expected = logits(packed, images)
    handle = getattr(packed.backbone.get_submodule(name), kind)(lambda *_: heard.append(name))
    assert torch.equal(logits(packed, images), expected)
    assert heard == [name]
    handle.remove()
    assert torch.equal(logits(packed, images), expected)
    assert heard == [name]


class DoublingEmbeddings(ViTEmbeddings):
    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)


@needs_kernels
@pytest.mark.parametrize("change", ["class", "forward", "module", "training"])
def test_modules_that_do_something_else_are_called(change):
    packed = make_packed()
    images = make_batches()[0]
    before = logits(packed, images)
    embeddings = packed.backbone.vit.embeddings
    if change == "class":
        embeddings.__class__ = DoublingEmbeddings
    elif change == "forward":
        real = embeddings.forward
        embeddings.forward = lambda *args, **kwargs: 2 * real(*args, **kwargs)
    elif change == "module":
        packed.backbone.vit.layernorm = nn.LayerNorm(packed.config.backbone_config.hidden_size)
        packed.backbone.vit.layernorm.weight.data.fill_(2)
    else:
        packed.backbone.train()
    packed.backbone.whole.forget()
    after = logits(packed, images)
    assert not ran_whole(packed)
    assert torch.equal(after, before) == (change == "training")


@needs_kernels
@pytest.mark.parametrize("how", ["in place", "by data", "another", "loaded"])
@pytest.mark.parametrize(
    "name", ["vit.embeddings.cls_token", "vit.embeddings.position_embeddings", "vit.layernorm.weight"]
)
def test_a_changed_tensor_is_used(name, how):
    packed = make_packed()
    images = make_batches()[0]
    before = logits(packed, images)
    owner, _, attribute = name.rpartition(".")
    module = packed.backbone.get_submodule(owner)
    parameter = getattr(module, attribute)
    # Not the same for all channels, which a LayerNorm would take out.
    other = parameter.detach() * torch.linspace(0.5, 2, parameter.shape[-1])
    if how == "in place":
        with torch.no_grad():
            parameter.copy_(other)
    elif how == "by data":
        parameter.data = other
    elif how == "another":
        setattr(module, attribute, nn.Parameter(other))
    else:
        packed.backbone.load_state_dict({name: other}, strict=False)
    after = logits(packed, images)
    assert ran_whole(packed)
    assert not torch.equal(before, after)
    assert torch.equal(after, one_by_one(packed, images))


@needs_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_has_no_logits_and_leaves_others_alone(value):
    packed = make_packed()
    images = make_batches()[0]
    expected = logits(packed, images)
    images = images.clone()
    images[1, 0, 0, 0] = value
    found = logits(packed, images)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2, 3]], expected[[0, 2, 3]])


@needs_kernels
def test_whoever_wants_more_than_logits_gets_it():
    packed = make_packed()
    images, labels = make_batches()[0], torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        found = packed(images, labels=labels)
        assert ran_whole(packed)
        assert torch.equal(found.loss, nn.functional.cross_entropy(found.logits, labels))
        assert found.hidden_states is found.attentions is None
        assert len(packed(images, return_dict=False)) == 1
        for asked in ("hidden_states", "attentions"):
            more = packed(images, **{f"output_{asked}": True})
            assert len(more[asked]) > 0
            assert torch.equal(more.logits, found.logits)


@needs_kernels
def test_images_of_another_size_are_refused_or_interpolated():
    packed = make_packed()
    images = make_batches()[0]
    larger = nn.functional.interpolate(images, scale_factor=2)
    logits(packed, images)
    with pytest.raises(ValueError, match="size"):
        logits(packed, larger)
    with pytest.raises(ValueError, match="channel"):
        logits(packed, images[:, :1])
    with torch.no_grad():
        assert packed(larger, interpolate_pos_encoding=True).logits.shape == (4, packed.config.num_labels)


@needs_kernels
def test_a_swin_takes_images_of_several_sizes():
    """Those of an odd number of patches are padded before they are merged, module by module."""
    packed = make_packed("swin")
    images, patch = make_batches()[0], packed.config.backbone_config.patch_size
    side = images.shape[-1]
    for height, width in ((side, side + 2 * patch), (side + patch, side), (side, side), (side + 1, side)):
        other = nn.functional.interpolate(images, size=(height, width))
        found = logits(packed, other)
        assert ran_whole(packed) == (height % (2 * patch) == 0 and width % (2 * patch) == 0)
        assert torch.equal(found, one_by_one(packed, other))


@needs_kernels
def test_another_dtype_is_for_the_modules():
    packed = make_packed().bfloat16()
    images = make_batches()[0]
    found = logits(packed, images)
    assert found.dtype == torch.bfloat16
    assert not ran_whole(packed)
    # A copy of another dtype of the images comes to the same model.
    again = make_packed()
    assert torch.equal(logits(again, images.double()), one_by_one(again, images.double()))


@needs_kernels
def test_copies_saved_and_unpacked_models_have_jobs_of_their_own(tmp_path):
    packed = make_packed()
    images = make_batches()[0]
    expected = logits(packed, images)
    packed.save_pretrained(tmp_path)
    loaded = QuantformerForImageClassification.from_pretrained(tmp_path)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), loaded):
        assert not ran_whole(other)
        assert torch.equal(logits(other, images), expected)
        assert ran_whole(other)
    assert not hasattr(packed.unpack().backbone, "whole")
    assert logits(packed, images).shape == expected.shape
    listen([packed.pack().backbone])
    assert torch.equal(logits(packed, images), expected)
