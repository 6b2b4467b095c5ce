"""The classifier refitted to the quantized model's features."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_batches, make_quantized

from quantformer_hf import classifier_refit
from quantformer_hf.classifier_refit import fit_step, refit_classifier
from quantformer_hf.grids import fit_row_scales
from quantformer_hf.kernels import fake_quantized
from quantformer_hf.losses import logit_distillation
from quantformer_hf.paused import PausedRuns, Place
from quantformer_hf.quantize import classifiers, full_precision


CHANNELS = 32


def noisy_features(images: int, classes: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Features with noise that differs by channel, the logits of those without, and the classifier of those."""
    weight = torch.randn(classes, CHANNELS, generator=torch.Generator().manual_seed(0)) / CHANNELS**0.5 * 3
    bias = torch.linspace(-1, 1, classes)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, CHANNELS, generator=generator)
    noise = torch.randn(images, CHANNELS, generator=generator) * torch.linspace(0, 2, CHANNELS)
    return features + noise, F.linear(features, weight, bias), weight, bias


@pytest.mark.parametrize("classes", [10, 300])
def test_logits_come_nearer_on_other_images_the_more_images_there_are(classes):
    others, expected, weight, bias = noisy_features(2000, classes, seed=1)
    divergences = [logit_distillation(F.linear(others, weight, bias), expected).item()]
    for images in (32, 256, 2048):
        inputs, logits, _, _ = noisy_features(images, classes, seed=2)
        change, shift = fit_step(inputs, logits, weight, bias)
        divergences.append(logit_distillation(F.linear(others, weight + change, bias + shift), expected).item())
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[-1] < 0.7 * divergences[0]


def test_the_step_is_where_the_objective_is_least():
    features = noisy_features(64, 10, seed=3)
    exact = [tensor.double() for tensor in features]
    inputs, logits, weight, bias = exact
    probabilities = logits.softmax(1)
    pull = classifier_refit.PULL * CHANNELS / 64 * (probabilities * (1 - probabilities)).mean()
    variance = (inputs - inputs.mean(0)).square().mean()

    def objective(change, shift):
        likely = F.linear(inputs, weight + change, bias + shift).log_softmax(1)
        divergence = F.kl_div(likely, probabilities, reduction="batchmean")
        return divergence + pull * (variance * change.square().sum() + shift.square().sum()) / 2

    least = [part.requires_grad_() for part in fit_step(*exact)]
    for slope in torch.autograd.grad(objective(*least), least):
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-5)
    before, after = objective(*map(torch.zeros_like, least)), objective(*least)
    assert before - after > 1e-2
    # In float32 the solver goes on as long as the loss has digits that tell: the last one of 2 is 2.4e-7, which slopes of
    # some 1e-4 are worth, by whose rounding processors differ.
    assert objective(*(part.double() for part in fit_step(*features))) - after < 1e-6


def test_the_model_puts_out_more_likely_classes(backbone):
    model, batches = make_quantized(backbone, "finetune"), make_batches(8, batch_size=8)
    heads = classifiers(model)
    assert len(heads) == (2 if backbone == "deit-distilled" else 1)
    with torch.no_grad(), fake_quantized():
        with full_precision(model):
            expected = [model(batch).logits for batch in batches]
        before = [model(batch).logits for batch in batches]
        weights = [head.weight.clone() for head in heads]
        with PausedRuns(model, batches, map(Place, heads)) as runs:
            inputs = [torch.cat(runs.go_on()[1]) for _ in heads]
        refit_classifier(heads, inputs, torch.cat(expected))
        after = [model(batch).logits for batch in batches]
    divergences = [logit_distillation(torch.cat(logits), torch.cat(expected)).item() for logits in (before, after)]
    assert divergences[1] < 0.95 * divergences[0]
    for head, weight in zip(heads, weights, strict=True):
        assert not torch.equal(head.weight, weight)
        torch.testing.assert_close(head.weight_quantizer.scale, fit_row_scales(head.weight, head.weight_quantizer.grid))


@pytest.mark.parametrize(
    ("problem", "stays"), [(None, False), ("single_label_classification", False), ("multi_label_classification", True)]
)
def test_a_classifier_of_several_labels_an_image_stays(problem, stays):
    model = make_quantized()
    model.config.problem_type = problem
    weight = model.backbone.classifier.weight.clone()
    model.reconstruct(make_batches())
    assert torch.equal(model.backbone.classifier.weight, weight) == stays


def test_one_in_floating_point_is_refitted_as_well():
    model = make_quantized("vit", "finetune", classifier_bits=32)
    weight = model.backbone.classifier.weight.clone()
    model.reconstruct(make_batches())
    assert not hasattr(model.backbone.classifier, "weight_quantizer")
    assert not torch.equal(model.backbone.classifier.weight, weight)


def test_what_is_fitted_is_what_the_weight_multiplies(monkeypatch):
    fitted = []

    def fit(inputs, logits, weight, bias):
        fitted.append(inputs)
        return torch.full_like(weight, 0.5), torch.full_like(bias, 0.25)

    monkeypatch.setattr(classifier_refit, "fit_step", fit)
    head = make_quantized("vit", "finetune", classifier_bits=2).backbone.classifier
    weight, bias = head.weight.clone(), head.bias.clone()
    features = torch.randn(12, head.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        refit_classifier([head], [features], torch.zeros(12, head.out_features))
    assert fitted[0].shape == features.shape
    assert 2 <= fitted[0].unique().numel() <= 4
    torch.testing.assert_close(head.weight, weight + 0.5)
    torch.testing.assert_close(head.bias, bias + 0.25)


def test_two_heads_are_fitted_as_the_mean_that_the_model_puts_out(monkeypatch):
    generator, fitted = torch.Generator().manual_seed(0), []
    heads = [torch.nn.Linear(6, 4).requires_grad_(False) for _ in range(2)]
    features = torch.randn(2, 12, 6, generator=generator)

    def logits():
        return torch.stack([head(x) for head, x in zip(heads, features, strict=True)]).mean(0)

    def fit(inputs, _, weight, bias):
        torch.testing.assert_close(F.linear(inputs, weight, bias), logits())
        change, shift = (torch.randn(part.shape, generator=generator) for part in (weight, bias))
        fitted.append(F.linear(inputs, weight + change, bias + shift))
        return change, shift

    monkeypatch.setattr(classifier_refit, "fit_step", fit)
    refit_classifier(heads, features.unbind(), torch.zeros(12, 4))
    torch.testing.assert_close(logits(), fitted[0])
