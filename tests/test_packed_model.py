"""A whole packed classifier in one call of the kernels gives the bits of its modules, and these to who looks at them."""

import copy

import pytest
import torch
from conftest import instruction_sets, make_batches, make_full_precision
from packed_models import logits, make_packed, needs_kernels, one_by_one, ran_whole
from torch import nn
from torch.nn.utils import parametrize
from transformers.models.vit.modeling_vit import ViTEmbeddings

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.kernels import using
from quantformer_hf.layers import InferenceLayerNorm
from quantformer_hf.packed_layers import PackedLinear


@needs_kernels
@pytest.mark.parametrize(
    ("name", "class_token_bits"), [("vit", None), ("vit", 8), ("deit", None), ("deit", 8), ("swin", None)]
)
def test_a_model_in_one_call_gives_the_bits_of_its_modules(name, class_token_bits):
    packed = make_packed(name, class_token_bits=class_token_bits)
    few = make_batches()[0]
    # So many are worked on in parts, and in more of them where there are threads.
    many = torch.randn(72, *few.shape[1:], generator=torch.Generator().manual_seed(0))
    for images in (few, few[:1], torch.cat(make_batches()), many):
        result = logits(packed, images)
        assert ran_whole(packed, images)
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
    assert not ran_whole(packed, images)


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


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


class DoublingEmbeddings(ViTEmbeddings):
    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)


class DoublingLinear(PackedLinear):
    def forward(self, x):
        return 2 * super().forward(x)


class DoublingNorm(InferenceLayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Halves(nn.Module):
    def forward(self, weight):
        return weight / 2


def replace_class(module, kind):
    module.__class__ = kind


def replace_forward(module):
    real = module.forward
    module.forward = lambda *args, **kwargs: 2 * real(*args, **kwargs)


def replace_norm(vit):
    vit.layernorm = nn.LayerNorm(vit.config.hidden_size, eps=0.5)


CHANGES = {
    "class of the embeddings": lambda model: replace_class(model.vit.embeddings, DoublingEmbeddings),
    "class of the classifier": lambda model: replace_class(model.classifier, DoublingLinear),
    "class of the norm": lambda model: replace_class(model.vit.layernorm, DoublingNorm),
    "forward": lambda model: replace_forward(model.vit.embeddings),
    "norm": lambda model: replace_norm(model.vit),
    "parametrization": lambda model: parametrize.register_parametrization(model.vit.layernorm, "weight", Halves()),
    "epsilon": lambda model: setattr(model.vit.layernorm, "eps", 0.5),
    "dropout": lambda model: setattr(model.vit.embeddings, "dropout", Doubling()),
    "no blocks": lambda model: setattr(model.vit, "layers", nn.ModuleList()),
    "a module around": lambda model: setattr(model, "classifier", nn.Sequential(model.classifier, Doubling())),
}


@needs_kernels
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("change", list(CHANGES))
def test_what_modules_do_now_counts(change, first):
    """Whether the model was run before that or not."""
    packed = make_packed()
    images = make_batches()[0]
    before = logits(copy.deepcopy(packed), images)
    if first:
        logits(packed, images)
    CHANGES[change](packed.backbone)
    packed.eval()
    after = logits(packed, images)
    assert not torch.equal(after, before)
    for _ in range(2):
        assert torch.equal(after, one_by_one(packed, images))
        assert torch.equal(after, logits(packed, images))


@needs_kernels
@pytest.mark.parametrize("first", [False, True])
def test_a_class_that_is_changed_counts(first, monkeypatch):
    packed = make_packed()
    images = make_batches()[0]
    before = logits(copy.deepcopy(packed), images)
    if first:
        logits(packed, images)
    with monkeypatch.context() as patch:
        real = ViTEmbeddings.forward
        patch.setattr(ViTEmbeddings, "forward", lambda *args, **kwargs: 2 * real(*args, **kwargs))
        after = logits(packed, images)
    assert not torch.equal(after, before)
    assert torch.equal(before, logits(packed, images))


@needs_kernels
def test_windows_that_are_shifted_otherwise_count():
    packed = make_packed("swin")
    images = make_batches()[0]
    before = logits(packed, images)
    shifted = packed.backbone.swin.encoder.layers[0].blocks[1]
    assert shifted.shift_size > 0
    shifted.shift_size = 0
    after = logits(packed, images)
    assert not torch.equal(after, before)
    assert torch.equal(after, one_by_one(packed, images))


@needs_kernels
@pytest.mark.parametrize(
    "name", ["swin", "swin.embeddings", "swin.encoder", "swin.encoder.layers.0.downsample", "swin.pooler"]
)
def test_modules_of_others_are_called(name):
    packed = make_packed("swin")
    images = make_batches()[0]
    expected = logits(packed, images)
    owner, _, attribute = name.rpartition(".")
    owner = packed.backbone.get_submodule(owner)
    setattr(owner, attribute, Around(getattr(owner, attribute)).eval())
    assert torch.equal(logits(packed, images), expected)
    assert not ran_whole(packed, images)


class Around(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def __getattr__(self, name):
        # What classifiers and encoders look at beside.
        return super().__getattr__(name) if name in ("module", "forward") else getattr(self.module, name)


@needs_kernels
def test_a_model_in_training_runs_module_by_module():
    packed = make_packed()
    packed.backbone.train()
    assert not ran_whole(packed, make_batches()[0])


@needs_kernels
@pytest.mark.parametrize("how", ["in place", "in place of its data", "by data", "another", "loaded"])
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
    elif how == "in place of its data":
        # A change that no version tells of.
        parameter.data.copy_(other)
    elif how == "by data":
        parameter.data = other
    elif how == "another":
        setattr(module, attribute, nn.Parameter(other))
    else:
        packed.backbone.load_state_dict({name: other}, strict=False)
    after = logits(packed, images)
    assert ran_whole(packed, images)
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
def test_an_image_as_large_as_numbers_can_be_has_logits():
    packed = make_packed()
    images = make_batches()[0].clone()
    # Their sums are not finite.
    images[0], images[1] = 3e38, -3e38
    assert logits(packed, images).isfinite().all()
    assert torch.equal(logits(packed, images), one_by_one(packed, images))


@needs_kernels
def test_whoever_wants_more_than_logits_gets_it():
    packed = make_packed()
    images, labels = make_batches()[0], torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        found = packed(images, labels=labels)
        assert ran_whole(packed, images)
        assert torch.equal(found.loss, nn.functional.cross_entropy(found.logits, labels))
        assert found.hidden_states is found.attentions is None
        assert len(packed(images, return_dict=False)) == 1
        # The loss comes first, as Trainer has it.
        loss, also = packed(images, labels=labels, return_dict=False)
        assert torch.equal(loss, found.loss)
        assert torch.equal(also, found.logits)
        for asked in ("hidden_states", "attentions"):
            more = packed(images, **{f"output_{asked}": True})
            assert len(more[asked]) > 0
            assert torch.equal(more.logits, found.logits)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_what_the_config_of_a_backbone_asks_for_is_given(name, asked):
    stock, images = make_full_precision(name), make_batches()[0]
    config = type(stock.config)(**stock.config.to_dict() | {asked: True})
    stock = stock._from_config(config, attn_implementation="eager").eval()
    model = QuantformerForImageClassification.from_full_precision(stock).calibrate(images).begin_search(2)
    of = asked.removeprefix("output_")
    with torch.no_grad():
        expected = stock(images)[of]
        for now in (model.freeze_groups(), model.pack()):
            assert [found.shape for found in now(images)[of]] == [tensor.shape for tensor in expected]
            assert now(images, **{asked: False}).get(of) is None


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
    sizes = (side, side + 2 * patch), (side + patch, side), (side, side), (side + 1, side), (side, side + 1)
    for height, width in sizes:
        other = nn.functional.interpolate(images, size=(height, width))
        found = logits(packed, other)
        assert ran_whole(packed, other) == (height % (2 * patch) == 0 and width % (2 * patch) == 0)
        assert torch.equal(found, one_by_one(packed, other))


@needs_kernels
def test_another_dtype_is_for_the_modules():
    packed = make_packed().bfloat16()
    images = make_batches()[0]
    found = logits(packed, images)
    assert found.dtype == torch.bfloat16
    assert not ran_whole(packed, images)
    # A copy of another dtype of the images comes to the same model.
    again = make_packed()
    assert torch.equal(logits(again, images.double()), one_by_one(again, images.double()))


@needs_kernels
def test_images_that_are_the_negatives_of_what_lies_there_are_taken_for_what_they_are():
    packed, images = make_packed(), torch._neg_view(make_batches()[0])
    assert torch.equal(logits(packed, images), logits(packed, images.resolve_neg()))
