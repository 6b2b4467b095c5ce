"""Weights refitted without training."""

import copy
import re

import pytest
import torch
from conftest import make_batches, make_full_precision, make_quantized

from quantformer_hf import (
    QuantformerForImageClassification,
    StageError,
    model_refit,
    quantize,
    reconstruction,
    regression,
    token_weights,
)
from quantformer_hf.kernels import fake_quantized
from quantformer_hf.layers import QuantLinear
from quantformer_hf.paused import PausedRuns, Place
from quantformer_hf.quantize import reading_layers
from quantformer_hf.quantizers import LSQWeightQuantizer
from quantformer_hf.regression import (
    DAMPINGS,
    FOLDS,
    Evidence,
    Moments,
    choose_damping,
    nothing,
    refit_layer,
    refit_weight,
)


def correlated_rows(rows: int = 400, channels: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(channels, channels, generator=generator)
    return torch.randn(rows, channels, generator=generator) @ mixing


def test_moments_do_not_depend_on_the_parts():
    x = correlated_rows()
    x_hat, weights = x.round(), torch.rand(len(x), generator=torch.Generator().manual_seed(1))
    missing = (x - x_hat)[:, :5]
    whole = Moments.of([(nothing(x), x_hat, missing, weights)])
    parts = Moments.of([(nothing(x[i::3]), x_hat[i::3], missing[i::3], weights[i::3]) for i in range(3)])
    share = (weights / weights.sum()).double()
    expected = torch.cov(x_hat.double().T, correction=0, aweights=share)
    torch.testing.assert_close(whole.quantized, parts.quantized, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.quantized, expected, rtol=1e-4, atol=1e-4)
    assert whole.full_precision.numel() == 0
    own = Moments.of([(x, x_hat, nothing(x), weights)])
    assert own.missing.numel() == 0
    expected = torch.cov(x.double().T, correction=0, aweights=share)
    torch.testing.assert_close(own.full_precision, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.missing, parts.missing, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.missing, (own.cross - own.quantized)[:5], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.missing_mean, (share @ missing.double()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.quantized_mean, (share @ x_hat.double()), rtol=1e-5, atol=1e-5)


def evidence_of(x: torch.Tensor, x_hat: torch.Tensor, missing: torch.Tensor | None = None) -> Evidence:
    """Without folds."""
    exact, missing = (x, nothing(x)) if missing is None else (nothing(x), missing)
    return Evidence(Moments.of([(exact, x_hat, missing, torch.ones(len(x)))]), [])


def test_the_refitted_weight_makes_up_for_noisy_inputs():
    x = correlated_rows(4000)
    # Noise that the other channels tell of, as that of the layers before is.
    x_hat = x + 0.3 * x.roll(1, dims=1)
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    refitted = refit_weight(weight, evidence_of(x, x_hat)).float()
    target = (x - x.mean(0)) @ weight.T
    errors = [((x_hat - x_hat.mean(0)) @ w.T - target).square().sum() for w in (refitted, weight)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("unbiasedness", [0.0, 0.5, 1.0])
def test_what_a_noisy_layer_puts_out_is_as_large_as_in_full_precision(monkeypatch, unbiasedness):
    monkeypatch.setattr(regression, "UNBIASEDNESS", unbiasedness)
    x = correlated_rows(4000)
    x_hat = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    # A row of zeros has nothing to vary.
    weight[3] = 0
    refitted = refit_weight(weight, evidence_of(x, x_hat)).float()
    assert (refitted[3] == 0).all()
    expected, given = ((rows @ w.T)[:, weight.any(1)] for rows, w in ((x, weight), (x_hat, refitted)))
    expected, given = expected - expected.mean(0), given - given.mean(0)
    variances = expected.square().mean(0), given.square().mean(0)
    together = (expected * given).mean(0)
    assert ((together / (variances[0] * variances[1]).sqrt()) < 0.99).all()
    ratio = (variances[0] / variances[1]).sqrt() ** (1 - unbiasedness) * (variances[0] / together) ** unbiasedness
    torch.testing.assert_close(ratio, torch.ones(7), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(8))
def test_inputs_that_do_not_vary_leave_the_weight_as_it_is(seed):
    x = torch.full((400, 16), 3.7) + torch.arange(16)
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    layer = QuantLinear.from_float(torch.nn.Linear(16, 8), LSQWeightQuantizer(8, 8))
    with torch.no_grad():
        layer.weight.copy_(weight)
    for exact, missing in ((x, nothing(x)), (nothing(x), torch.ones(400, 8))):
        weights = torch.rand(400, generator=torch.Generator().manual_seed(seed))
        parts = [(exact, x, missing, weights)]
        evidence = Evidence.of(parts, [100]) if missing.shape[1] else Evidence(Moments.of(parts), [])
        torch.testing.assert_close(refit_weight(weight, evidence).float(), weight, rtol=1e-3, atol=1e-3)
        refit_layer(layer, evidence)
        assert layer.weight.isfinite().all()


def test_identical_inputs_change_no_weight():
    x = correlated_rows()
    weight = torch.randn(8, 16)
    torch.testing.assert_close(refit_weight(weight, evidence_of(x, x)).float(), weight)


def test_a_layer_makes_up_for_what_the_stream_lacks():
    x, weight = correlated_rows(), torch.randn(8, 16)
    lost = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))
    whole = evidence_of(x, x, x @ lost.T + 5).moments
    evidence = Evidence.of([(nothing(x), x, x @ lost.T + 5, torch.ones(len(x)))], [8])
    torch.testing.assert_close(evidence.moments.missing, whole.missing, rtol=1e-4, atol=1e-4)
    # Without noise nothing speaks for a larger ridge than the least.
    assert choose_damping(evidence.folds) == DAMPINGS[0]
    covariance = whole.quantized
    shrunk = lost.double() @ covariance @ torch.linalg.inv(covariance + whole.damping(DAMPINGS[0]))
    torch.testing.assert_close(refit_weight(weight, evidence), weight.double() + shrunk, rtol=1e-4, atol=1e-4)
    layer = QuantLinear.from_float(torch.nn.Linear(16, 8), LSQWeightQuantizer(8, 8))
    bias = layer.bias.detach().clone()
    refit_layer(layer, evidence_of(x, x, torch.full((len(x), 8), 5.0)))
    torch.testing.assert_close(layer.bias.detach() - bias, torch.full((8,), 5.0), rtol=0, atol=0.05)


def test_what_is_noise_on_other_images_is_not_learnt():
    x = correlated_rows(24)
    noise = torch.randn(24, 8, generator=torch.Generator().manual_seed(3))
    evidence = Evidence.of([(nothing(x), x, noise, torch.ones(24))], [24])
    assert choose_damping(evidence.folds) > 10 * DAMPINGS[0]


def test_images_are_dealt_to_the_folds_one_by_one_however_they_are_batched():
    x = correlated_rows(60)
    weights = torch.rand(60, generator=torch.Generator().manual_seed(1))
    # Ten images of six rows.
    whole = Evidence.of([(x, x, x, weights)], [10])
    apart = Evidence.of(
        [(x[i : i + 6], x[i : i + 6], x[i : i + 6], weights[i : i + 6]) for i in range(0, 60, 6)], [1] * 10
    )
    assert len(whole.folds) == len(apart.folds) == FOLDS
    of_first = torch.cat([x[i : i + 6] for i in range(0, 60, 6 * FOLDS)])
    weights_of_first = torch.cat([weights[i : i + 6] for i in range(0, 60, 6 * FOLDS)])
    expected = Moments.of([(of_first, of_first, of_first, weights_of_first)])
    for evidence in (whole, apart):
        torch.testing.assert_close(evidence.folds[0][1].quantized, expected.quantized, rtol=1e-4, atol=1e-4)


def test_one_image_or_images_that_do_not_count_give_no_folds():
    x = correlated_rows(12)
    assert Evidence.of([(x, x, x, torch.ones(12))], [1]).folds == []
    weights = torch.ones(12)
    weights[3:6] = 0
    evidence = Evidence.of([(x, x, x, weights)], [4])
    assert len(evidence.folds) == 3
    assert all(moments.quantized.isfinite().all() for pair in evidence.folds for moments in pair)
    assert choose_damping([]) == DAMPINGS[-1]


def output_error(model, backbone, batches) -> float:
    original = make_full_precision(backbone)
    with torch.no_grad():
        differences = [model(batch).logits - original(batch).logits for batch in batches]
    return torch.cat(differences).square().mean().item()


def test_a_reconstructed_model_is_nearer_to_full_precision(backbone):
    # Random networks pass on the noise of their activations chaotically: at eight bits there is little of it.
    model = make_quantized(backbone, "finetune", weight_bits=2, activation_bits=8)
    others = make_batches(8, seed=9)
    before = output_error(model, backbone, others)
    model.reconstruct(make_batches(8, batch_size=8))
    assert output_error(model, backbone, others) < before
    assert model.config.stage == "finetune"


def test_making_up_for_the_stream_brings_the_output_nearer(backbone, monkeypatch):
    # On the images of the reconstruction: of so few, random networks learn nothing that holds for others.
    batches = make_batches(8, batch_size=8)
    errors = []
    for streams in (quantize.writing_streams, lambda model: {}):
        monkeypatch.setattr(model_refit, "writing_streams", streams)
        model = make_quantized(backbone, "finetune", weight_bits=2, activation_bits=8)
        errors.append(output_error(model.reconstruct(batches), backbone, batches))
    assert errors[0] < 0.95 * errors[1]


def test_every_block_has_its_writers(backbone):
    model = make_quantized(backbone)
    writers = {layer for quantizer in quantize.writing_streams(model) for layer in reading_layers(model)[quantizer]}
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if module in writers}
    assert names == ({"fc2"} if backbone == "swin" else {"fc2", "o_proj"})
    assert len(writers) == len(names) * sum(hasattr(block, "mlp") for block in quantize.blocks(model))


def test_reconstruction_works_in_every_stage_and_is_the_same_each_time(stage):
    models = [make_quantized("vit", stage).reconstruct(make_batches()) for _ in range(2)]
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(parameter.grad is None for parameter in models[0].parameters())


def test_layers_in_floating_point_are_passed_over():
    model = make_quantized("vit", layer_bits={"*.fc1": {"weight_bits": 32}, "vit.layers.1.*": 32})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.reconstruct(make_batches())
    for name, tensor in model.state_dict().items():
        if name.endswith("weight") and ("fc1" in name or "layers.1." in name):
            assert torch.equal(tensor, before[name]), name


def test_reconstruction_needs_calibration_and_batches():
    model = QuantformerForImageClassification.from_full_precision(make_full_precision())
    with pytest.raises(StageError, match=r"run model\.calibrate\(batches\) first"):
        model.reconstruct(make_batches())
    with pytest.raises(ValueError, match=r"give model\.reconstruct\(\) batches of images"):
        make_quantized().reconstruct([])


def test_the_callers_mode_changes_nothing():
    expected = make_quantized("vit", "finetune").reconstruct(make_batches()).state_dict()
    for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        model = make_quantized("vit", "finetune")
        with mode:
            # Some of them are made there.
            model.reconstruct([batch.clone() for batch in make_batches()])
        assert all(torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items())
    frozen = make_quantized("vit", "finetune").requires_grad_(False).reconstruct(make_batches())
    assert all(torch.equal(expected[name], tensor) for name, tensor in frozen.state_dict().items())


def test_what_cannot_be_reconstructed_is_told():
    model, batches = make_quantized("vit", "finetune"), make_batches()
    batches[1][0, 0, 0, 0] = float("inf")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="pixel_values that are not finite"):
        model.reconstruct(batches)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.inference_mode():
        made_there = make_quantized("vit", "finetune")
    with pytest.raises(ValueError, match=r"made under torch.inference_mode\(\)"):
        made_there.reconstruct(make_batches())


def test_batches_may_be_of_images_of_several_sizes():
    model, batches = make_quantized("swin", "finetune"), make_batches(2, batch_size=4)
    large = torch.nn.functional.interpolate(batches[1], scale_factor=1.5)
    alone = make_quantized("swin", "finetune").reconstruct([batches[0]]).state_dict()
    both = model.reconstruct([batches[0], large]).state_dict()
    assert not all(torch.equal(alone[name], tensor) for name, tensor in both.items())
    with torch.no_grad():
        assert all(model(pixel_values).logits.isfinite().all() for pixel_values in (batches[0], large))


def tensors_at(model: torch.nn.Module, batches: list[torch.Tensor], place: Place) -> list[torch.Tensor]:
    with PausedRuns(model, batches, [place]) as runs:
        return runs.go_on()[1]


def test_what_each_regression_goes_by(backbone, monkeypatch):
    model, batches = (
        make_quantized(backbone, "finetune", weight_bits=2, activation_bits=3),
        make_batches(2, batch_size=4),
    )
    given = {}
    # Layers stay, all tokens count alike, and the images that run together are not those of a batch.
    monkeypatch.setattr(reconstruction, "refit_layer", given.setdefault)
    monkeypatch.setattr(token_weights, "TOKEN_WEIGHT_POWER", 0.0)
    monkeypatch.setattr(model_refit, "IMAGES_AT_ONCE", 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    model.reconstruct(batches)

    images, streams = torch.cat(batches), quantize.writing_streams(model)

    def at(place: Place) -> torch.Tensor:
        with torch.no_grad(), fake_quantized():
            return tensors_at(model, [images], place)[0].flatten(0, -2).double()

    assert 0 < len(streams) < len(given)
    for quantizer, (layer, *_) in reading_layers(model).items():
        moments, place = given[layer].moments, Place(quantizer)
        parts = quantizer.parts(at(place).float().unflatten(0, (len(images), -1)))
        with torch.no_grad():
            x_hat = torch.cat([part.quantize(rows, 1.0) for part, rows in parts], 1).flatten(0, 1).double()
        if quantizer in streams:
            # What is still missing where this layer alone keeps its weight.
            place = streams[quantizer][1]
            layer.weight_quantizer.enabled = False
            kept = at(place)
            layer.weight_quantizer.enabled = True
            moment, mean = moments.missing, moments.missing_mean
        else:
            kept, moment, mean = 0, moments.cross, moments.mean
        with quantize.full_precision(model):
            x = at(place) - kept
        centred = x_hat - x_hat.mean(0)
        for found, wanted in (
            (mean, x.mean(0)),
            (moment, (x - x.mean(0)).T @ centred / len(x)),
            (moments.quantized_mean, x_hat.mean(0)),
            (moments.quantized, centred.T @ centred / len(x)),
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_full_precision_stays_what_it_was_while_layers_are_refitted(backbone, monkeypatch):
    model, batches = (
        make_quantized(backbone, "finetune", weight_bits=2, activation_bits=3),
        make_batches(2, batch_size=4),
    )
    original = copy.deepcopy(model)
    # Its quantizers by those of the model that is refitted.
    twin = dict(zip(model.modules(), original.modules(), strict=True))
    streams, exact, refit_readers = quantize.writing_streams(model), {}, reconstruction._refit_readers

    def refit(quantizer, layers, seen):
        exact[quantizer] = torch.cat([of_batch.exact for of_batch in seen])
        refit_readers(quantizer, layers, seen)

    monkeypatch.setattr(reconstruction, "_refit_readers", refit)
    model.reconstruct(batches)
    assert exact.keys() == reading_layers(model).keys()
    for quantizer, found in exact.items():
        place = streams[quantizer][1] if quantizer in streams else Place(quantizer)
        place = place._replace(module=twin[place.module])
        with torch.no_grad(), fake_quantized(), quantize.full_precision(original):
            given = torch.cat(tensors_at(original, batches, place))
        torch.testing.assert_close(found, given.flatten(0, -2))


def test_activations_in_floating_point_leave_the_classifier_to_be_refitted():
    model = make_quantized("vit", activation_bits=32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.reconstruct(make_batches())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[1] for name in changed} == {"classifier"}


def test_a_gpu_that_is_too_small_is_told_what_would_fit(monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model_refit, "reconstruct_layers", too_large)
    with pytest.raises(torch.OutOfMemoryError, match=r"(?s)CUDA out of memory.*of all 8 images: give it fewer"):
        make_quantized("vit", "finetune").reconstruct(make_batches(2, batch_size=4))


def test_memory_that_will_not_do_is_told_beforehand(monkeypatch, caplog):
    model, batches = make_quantized("vit", "finetune"), make_batches(16, batch_size=64)
    config = model.backbone.config
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    held = 1024 * model_refit.HELD_OUTPUTS * tokens * config.intermediate_size * 4
    monkeypatch.setattr(model_refit, "reconstruct_layers", lambda *_: [])
    monkeypatch.setattr(model_refit, "refit_classifier", lambda *_: None)
    for free in (None, held):
        monkeypatch.setattr(model_refit, "free_bytes", lambda device, free=free: free)
        model.reconstruct(batches)
        assert not caplog.records
    monkeypatch.setattr(model_refit, "free_bytes", lambda device: held // 4)
    model.reconstruct(batches)
    assert re.search(rf"may hold {held // 2**20} MiB.*all 1024 images.*give it 256 images or fewer", caplog.text)
