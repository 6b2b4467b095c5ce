"""How much tokens count: what they are, and what they do not depend on."""

import pytest
import torch
from conftest import NUM_LABELS, make_batches, make_full_precision, make_quantized

from quantformer_hf import token_weights as subject
from quantformer_hf.quantize import full_precision, reading_layers
from quantformer_hf.token_weights import fisher_directions, token_weights


def weights_of(model, batches):
    """Of each quantizer, the weights of all rows."""
    readers = reading_layers(model)
    with full_precision(model):
        weights, _ = token_weights(model, batches, readers)
    return {quantizer: torch.cat([of_batch[quantizer] for of_batch in weights]) for quantizer in readers}


def test_they_are_of_mean_one_and_find_the_token_that_is_read():
    model = make_full_precision("vit")
    quantized = make_quantized("vit")
    weights = weights_of(quantized, make_batches(1))
    assert weights.keys() == reading_layers(quantized).keys()
    for weight in weights.values():
        assert (weight >= 0).all()
        assert weight.mean().item() == pytest.approx(1.0, rel=1e-4)
    # Only the class token leaves the last block.
    tokens = (model.config.image_size // model.config.patch_size) ** 2 + 1
    last = quantized.backbone.vit.layers[-1].mlp.fc2.input_quantizer
    per_token = weights[last].view(-1, tokens)
    assert (per_token[:, 0] > 0).all()
    assert (per_token[:, 1:] == 0).all()


def test_a_certain_model_weighs_all_tokens_alike():
    quantized = make_quantized("vit")
    quantized.backbone.classifier.bias.data[0] = 1e4
    for weight in weights_of(quantized, make_batches(1)).values():
        assert (weight == 1).all()


def test_they_are_the_same_however_images_come(backbone, monkeypatch):
    # With the same random numbers for the same images.
    monkeypatch.setattr(subject, "DRAWS", 1)
    images = torch.cat(make_batches(2))
    drawn = torch.randn(len(images), NUM_LABELS, generator=torch.Generator().manual_seed(0))

    def directions(logits, *_):
        root = logits.detach().softmax(-1).sqrt()
        noise = drawn[directions.first : directions.first + len(logits)]
        yield root * (noise - root * (root * noise).sum(-1, keepdim=True))
        directions.first += len(logits)

    monkeypatch.setattr(subject, "fisher_directions", directions)
    found = []
    for size in (1, 3, len(images)):
        directions.first = 0
        found.append(weights_of(make_quantized(backbone), images.split(size)))
    for one, three, all_at_once in zip(*(weights.values() for weights in found), strict=True):
        torch.testing.assert_close(one, all_at_once, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(three, all_at_once, rtol=1e-3, atol=1e-4)


def test_the_directions_have_the_moments_of_the_information():
    logits = torch.tensor([[2.0, 0.0, -1.0, 0.5], [9.0, 0.0, 0.0, 0.0]])
    drawn = torch.stack(list(fisher_directions(logits, 200_000, torch.Generator().manual_seed(0))))
    probabilities = logits.softmax(-1)
    expected = torch.diag_embed(probabilities) - probabilities.unsqueeze(2) * probabilities.unsqueeze(1)
    moments = torch.einsum("dbi,dbj->bij", drawn, drawn) / len(drawn)
    torch.testing.assert_close(moments, expected, rtol=0.05, atol=2e-3)


def test_random_numbers_are_those_of_the_images_and_not_of_the_moment():
    torch.manual_seed(0)
    first = weights_of(make_quantized("vit"), make_batches(2))
    torch.manual_seed(1)
    again = weights_of(make_quantized("vit"), make_batches(2))
    for one, other in zip(first.values(), again.values(), strict=True):
        assert torch.equal(one, other)
