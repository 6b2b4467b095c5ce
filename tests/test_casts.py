"""Verbs of models that were cast, frozen or compiled before."""

import pytest
import torch
from conftest import make_batches, make_full_precision, make_quantized

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.ops.compiling import eager_functions


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_was_cast_goes_through_all_verbs(dtype):
    images = [batch.to(dtype) for batch in make_batches()]
    # Each dtype would be a kernel of its own.
    with eager_functions():
        model = make_quantized("vit", "pretrain").to(dtype).calibrate(images)
        model.begin_search(4).reconstruct(images)
        model.freeze_groups().reconstruct(images)
        with torch.no_grad():
            before = model.eval()(images[0]).logits
            after = model.pack()(images[0]).logits
    assert before.dtype == after.dtype == dtype
    assert torch.equal(before, after)
    assert after.isfinite().all()


def test_what_is_frozen_stays_so():
    model = make_quantized("vit", "pretrain").requires_grad_(False)
    for verb in (lambda: model.begin_search(4), model.freeze_groups, lambda: model.reconstruct(make_batches())):
        verb()
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_some_layers_may_be_frozen_where_others_are_refitted():
    model, whole = make_quantized("vit", "finetune"), make_quantized("vit", "finetune").reconstruct(make_batches())
    model.requires_grad_(False).backbone.classifier.requires_grad_(True)
    model.reconstruct(make_batches())
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_what_torch_compile_has_made_is_quantized_as_what_it_was_made_of():
    stock = make_full_precision()
    model = QuantformerForImageClassification.from_full_precision(torch.compile(stock))
    assert torch.equal(model.backbone.classifier.weight, stock.classifier.weight)
