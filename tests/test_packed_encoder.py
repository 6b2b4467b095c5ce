"""All blocks in one call, and of the last one the class token alone, unless somebody looks at what they put out."""

import copy

import pytest
import torch
from conftest import make_batches, make_quantized
from packed_models import listen, logits, needs_kernels, one_by_one, outermost, ran_as_one, ran_whole, whole_modules
from torch import nn

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.attention import AttentionOperands
from quantformer_hf.classes_only import classes_only
from quantformer_hf.kernels import using
from quantformer_hf.packed_encoder import PackedPlainBlock
from quantformer_hf.packed_forms import PackedViTAttention, PackedViTLayer, PackedViTMLP
from quantformer_hf.packed_layers import PackedLinear


@needs_kernels
@pytest.mark.parametrize("backbone", ["vit", "deit", "deit-distilled"])
@pytest.mark.parametrize("class_token_bits", [None, 8])
@pytest.mark.parametrize("together", [False, True])
def test_the_last_block_works_out_the_class_token_alone(backbone, class_token_bits, together, monkeypatch):
    """Unless somebody looks at the others; logits are the same. By itself, or with all blocks in one call."""
    packed = make_quantized(backbone, "finetune", class_token_bits=class_token_bits).pack()
    first, *_, last = [module for module in packed.modules() if isinstance(module, PackedPlainBlock)]
    encoder = getattr(packed.backbone, packed.config.backbone_config.model_type)
    tokens = {"vit": 1, "deit": 2}[packed.config.backbone_config.model_type]
    sizes = []
    # Else all of the model is one call.
    listen([packed.backbone])
    if not together:
        listen([first])
    block = first if together else last
    run = block._run
    for images in (*make_batches(), make_batches()[0][:1]):
        expected = one_by_one(packed, images)
        with monkeypatch.context() as patch:
            patch.setattr(block, "_run", lambda *given: sizes.append(run(*given)) or sizes[-1])
            assert torch.equal(logits(packed, images), expected)
        assert sizes.pop().shape[1] == tokens
    with torch.no_grad():
        all_tokens = encoder(images).last_hidden_state
        # With hooks that stay.
        states = packed(pixel_values=images, output_hidden_states=True)
    assert all_tokens.shape[1] > tokens
    assert states.hidden_states[-1].shape == all_tokens.shape
    assert torch.equal(states.logits, expected)


@needs_kernels
@pytest.mark.parametrize("heard", ["encoder", "layernorm", "last block"])
def test_who_listens_is_told_of_all_tokens(heard):
    packed = make_quantized("vit", "finetune").pack()
    encoder = packed.backbone.vit
    seen = []
    listened = {"encoder": encoder, "layernorm": encoder.layernorm, "last block": encoder.layers[-1]}[heard]
    listened.register_forward_hook(lambda module, given, output: seen.append(output))
    images = make_batches()[0]
    expected = one_by_one(packed, images)
    assert torch.equal(logits(packed, images), expected)
    output = getattr(seen[-1], "last_hidden_state", seen[-1])
    assert output.shape[1] == 1 + (images.shape[-1] // packed.config.backbone_config.patch_size) ** 2


@needs_kernels
@pytest.mark.parametrize("backbone", ["vit", "swin"])
@pytest.mark.parametrize("place", [0, 1])
def test_who_listens_to_a_block_is_told_what_it_puts_out(backbone, place):
    """And not what all of them do together, in one call before and after."""
    packed = make_quantized(backbone, "finetune").pack()
    inner = getattr(packed.backbone, backbone)
    blocks = inner.layers if backbone == "vit" else inner.encoder.layers[0].blocks
    images, seen = make_batches()[0], []
    listen([packed.backbone])
    expected = logits(packed, images)
    assert blocks[0]._chain.value is not None
    handle = blocks[place].register_forward_hook(lambda module, given, output: seen.append(output))
    assert torch.equal(logits(packed, images), expected)
    with using(None):
        logits(packed, images)
    ours, plain = (output if backbone == "vit" else output[0] for output in seen)
    assert torch.equal(ours, plain)
    handle.remove()
    assert torch.equal(logits(packed, images), expected)
    assert len(seen) == 2


class Doubling(nn.Module):
    def forward(self, hidden_states, *_, **kwargs):
        return 2 * hidden_states


@needs_kernels
@pytest.mark.parametrize("place", [0, 1])
def test_a_module_in_the_place_of_a_block_is_called(place):
    packed = make_quantized("vit", "finetune").pack()
    packed.backbone.vit.layers[place] = Doubling()
    images = make_batches()[0]
    with using(None):
        expected = logits(packed, images)
    assert torch.equal(logits(packed, images), expected)


@needs_kernels
def test_a_block_that_is_given_what_others_did_together_still_runs():
    packed, other = (make_quantized("vit", "finetune").pack() for _ in range(2))
    first, block = packed.backbone.vit.layers[0], other.backbone.vit.layers[-1]
    x = torch.randn(2, 5, *first.layernorm_before.normalized_shape)
    with torch.no_grad(), classes_only(packed.backbone):
        together = first(x)
        assert packed.backbone.vit.layers[-1](together) is together
        after = block(together)
    with torch.no_grad():
        assert torch.equal(after, block(together))


@needs_kernels
@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_hooks_that_transformers_leaves_behind_cost_nothing(asked):
    """They stay on the modules once somebody has asked for what lies between, before packing or after it."""
    for when in ("before", "after"):
        model = make_quantized("vit", "finetune")
        images = make_batches()[0]
        model = model if when == "before" else model.pack()
        with torch.no_grad():
            assert model(pixel_values=images, **{asked: True})[asked.removeprefix("output_")]
        model = model.pack() if when == "before" else model
        assert any(module._forward_hooks for module in model.modules())
        expected = one_by_one(model, images)
        for module in whole_modules(model):
            module._job.forget()
        assert torch.equal(logits(model, images), expected)
        assert ran_as_one(model) == outermost(whole_modules(model))


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_outputs_asked_for_by_the_config_are_there(asked, tmp_path):
    make_quantized("vit", "finetune").pack().save_pretrained(tmp_path)
    images = make_batches()[0]
    model = QuantformerForImageClassification.from_pretrained(tmp_path, **{asked: True})
    name = asked.removeprefix("output_")
    with torch.no_grad():
        found, expected = (getattr(model(images, **told), name) for told in ({}, {asked: True}))
        assert getattr(model(images, **{asked: False}), name) is None
    assert len(found) == len(expected) > 0
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@needs_kernels
@pytest.mark.parametrize("patched", ["last block", "layernorm", "encoder", "inside of the layernorm"])
def test_a_forward_in_place_of_the_classs_own_sees_all_tokens(patched):
    """As accelerate puts one there."""
    model = make_quantized("vit", "finetune").pack()
    images = make_batches()[0]
    expected = logits(model, images)
    encoder = model.backbone.vit
    if patched == "inside of the layernorm":
        encoder.layernorm = nn.Sequential(encoder.layernorm)
    module = {"last block": encoder.layers[-1], "encoder": encoder}.get(patched, encoder.layernorm)
    seen = []

    def see(output):
        seen.append(getattr(output, "last_hidden_state", output).shape[1])
        return output

    if patched == "inside of the layernorm":
        module[0].register_forward_hook(lambda module, arguments, output: see(output))
    else:
        own = module.forward
        module.forward = lambda *arguments, **kwargs: see(own(*arguments, **kwargs))
    assert torch.equal(logits(model, images), expected)
    assert seen == [17]


def test_a_model_without_blocks_runs():
    model = make_quantized("vit", "finetune").pack()
    model.backbone.vit.layers = nn.ModuleList()
    assert logits(model, make_batches()[0]).isfinite().all()


def scaled(x):
    """Not the same for all channels, which a LayerNorm would take out."""
    return x * torch.linspace(0.5, 2, x.shape[-1])


class ScalingLayer(PackedViTLayer):
    def forward(self, *args, **kwargs):
        return scaled(super().forward(*args, **kwargs))


class ScalingAttention(PackedViTAttention):
    def forward(self, *args, **kwargs):
        output, probabilities = super().forward(*args, **kwargs)
        return scaled(output), probabilities


class ScalingMlp(PackedViTMLP):
    def forward(self, x):
        return scaled(super().forward(x))


class ScalingLinear(PackedLinear):
    def forward(self, x):
        return scaled(super().forward(x))


class Scaling(nn.Module):
    def forward(self, x):
        return scaled(x)


class Around(nn.Module):
    """A module of somebody else, with ours in it."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, *args, **kwargs):
        output = self.own(*args, **kwargs)
        return (scaled(output[0]), *output[1:]) if isinstance(output, tuple) else scaled(output)


class ScalingIdentity(nn.Identity):
    def forward(self, x):
        return x + 1


class ScalingOperands(AttentionOperands):
    def forward(self, *args, **kwargs):
        output, probabilities = super().forward(*args, **kwargs)
        return scaled(output), probabilities


class Rescaled(nn.Module):
    """Another LayerNorm: ours of other numbers."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, x):
        return self.own(x + scaled(x))


def become(module, kind):
    module.__class__ = kind


#: What somebody does to a block of a ViT.
CHANGED_BLOCKS = {
    "class of the block": lambda block: become(block, ScalingLayer),
    "class of its attention": lambda block: become(block.attention, ScalingAttention),
    "class of its perceptron": lambda block: become(block.mlp, ScalingMlp),
    "class of a linear": lambda block: become(block.mlp.fc2, ScalingLinear),
    "class of the products of attention": lambda block: become(block.attention.operands, ScalingOperands),
    "class of the activation": lambda block: become(block.mlp.activation_fn, ScalingIdentity),
    "another attention": lambda block: setattr(block, "attention", Around(block.attention)),
    "another perceptron": lambda block: setattr(block, "mlp", Around(block.mlp)),
    "another norm before": lambda block: setattr(block, "layernorm_before", Rescaled(block.layernorm_before)),
    "another norm after": lambda block: setattr(block, "layernorm_after", Rescaled(block.layernorm_after)),
    "another dropout": lambda block: setattr(block, "dropout", Scaling()),
    "epsilon before": lambda block: setattr(block.layernorm_before, "eps", 0.5),
    "epsilon after": lambda block: setattr(block.layernorm_after, "eps", 0.5),
}


@needs_kernels
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("place", [0, 1, -1])
@pytest.mark.parametrize("change", list(CHANGED_BLOCKS))
def test_what_a_block_does_now_counts(change, place, ran_before, whole):
    """Whether the model was run before that or not, and in one call or block by block."""
    packed, images = make_quantized("vit", "finetune").pack(), make_batches()[0]
    before = logits(copy.deepcopy(packed), images)
    if not whole:
        # Then blocks follow one another without the model's job.
        listen([packed.backbone.classifier])
    if ran_before:
        assert torch.equal(logits(packed, images), before)
        assert ran_whole(packed, images) == whole
    CHANGED_BLOCKS[change](packed.backbone.vit.layers[place])
    packed.eval()
    after = logits(packed, images)
    assert not torch.equal(after, before)
    for _ in range(2):
        assert torch.equal(after, logits(packed, images))
        assert torch.equal(after, one_by_one(packed, images))


@needs_kernels
@pytest.mark.parametrize("name", ["drop_path", "dropout"])
def test_another_module_of_a_swin_block_is_called(name):
    packed, images = make_quantized("swin", "finetune").pack(), make_batches()[0]
    before = logits(packed, images)
    setattr(packed.backbone.swin.encoder.layers[0].blocks[1], name, Scaling())
    packed.eval()
    after = logits(packed, images)
    assert not torch.equal(after, before)
    assert torch.equal(after, one_by_one(packed, images))


@needs_kernels
@pytest.mark.parametrize("whole", [False, True])
def test_a_block_may_be_there_twice(whole):
    packed, images = make_quantized("vit", "finetune").pack(), make_batches()[0]
    layers = packed.backbone.vit.layers
    layers.append(layers[0])
    if not whole:
        listen([packed.backbone.classifier])
    assert torch.equal(logits(packed, images), one_by_one(packed, images))
    assert ran_whole(packed, images) == whole
    # Each runs by itself.
    listen(layers)
    assert torch.equal(logits(packed, images), one_by_one(packed, images))


@needs_kernels
def test_a_chain_does_not_begin_in_its_middle():
    packed, images = make_quantized("vit", "finetune").pack(), make_batches()[0]
    embeddings, layers = packed.backbone.vit.embeddings, packed.backbone.vit.layers
    layers.append(layers[0])
    # The first block is not run by the kernels then, and is there once more.
    embeddings.register_forward_hook(lambda module, given, output: output.mT.contiguous().mT)
    assert torch.equal(logits(packed, images), one_by_one(packed, images))


@needs_kernels
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ["attention", "mlp", ""])
def test_a_forward_that_is_put_into_a_class_is_called(name, whole, monkeypatch):
    packed, images, called = make_quantized("vit", "finetune").pack(), make_batches()[0], []
    if not whole:
        listen([packed.backbone.classifier])
    before = logits(packed, images)
    form = type(packed.backbone.vit.layers[0].get_submodule(name))
    own = form.forward
    with monkeypatch.context() as patch:
        patch.setattr(form, "forward", lambda self, *args, **kwargs: called.append(self) or own(self, *args, **kwargs))
        assert torch.equal(logits(packed, images), before)
        assert len(called) == len(packed.backbone.vit.layers)
    assert torch.equal(logits(packed, images), before)
    assert len(called) == len(packed.backbone.vit.layers)
    assert ran_whole(packed, images) == whole
