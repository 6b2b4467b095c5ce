"""One linear refitted to what it reads."""

import pytest
import torch
import torch.nn.functional as F

from quantformer_hf.layers import QuantLinear
from quantformer_hf.quantizers import LSQWeightQuantizer
from quantformer_hf.regression import (
    LARGEST_GAIN,
    ROUNDING_DAMPING,
    Evidence,
    Moments,
    nothing,
    refit_layer,
    refit_weight,
    row_gains,
)
from quantformer_hf.rounding import round_weight


@pytest.fixture
def x():
    """Rows that lie around two."""
    return 2 + torch.randn(400, 16, generator=torch.Generator().manual_seed(0))


def moments_of(x, x_hat, missing=None):
    exact, missing = (x, nothing(x)) if missing is None else (nothing(x), missing)
    return Moments.of([(exact, x_hat, missing, torch.ones(len(x)))])


def test_a_row_is_scaled_by_no_more_than_the_largest_gain_and_one_against_full_precision_by_none(x):
    weight = torch.eye(16, dtype=torch.float64)[:4]
    refitted = weight * torch.tensor([[0.8], [0.01], [100.0], [-0.8]])
    expected = torch.tensor([1.25, LARGEST_GAIN, 1 / LARGEST_GAIN, 1.0], dtype=torch.float64)
    torch.testing.assert_close(row_gains(weight, refitted, moments_of(x, x)), expected)


def test_a_ridge_is_a_share_of_the_mean_variance(x):
    x = x * torch.arange(1.0, 17.0)
    expected = 0.5 * x.double().var(0, correction=0).mean() * torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(moments_of(x, x).damping(0.5), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("makes_up", [False, True])
def test_a_layer_gets_what_was_rounded_and_a_bias_with_which_its_mean_is_right(x, makes_up):
    layer = QuantLinear.from_float(torch.nn.Linear(16, 8), LSQWeightQuantizer(2, 8))
    quantizer, x_hat = layer.weight_quantizer, 0.5 + (x + 0.5 * x.roll(1, 1)).round()
    with torch.no_grad():
        before = F.linear(x_hat if makes_up else x, layer.weight, layer.bias)
    missing = x[:, :8].square() if makes_up else None
    moments = moments_of(x, x_hat, missing)
    hessian = moments.quantized + moments.damping(ROUNDING_DAMPING)
    rounded = round_weight(refit_weight(layer.weight, Evidence(moments, [])).detach().float(), quantizer.grid, hessian)
    refit_layer(layer, Evidence(moments, []))
    with torch.no_grad():
        weight = quantizer(layer.weight)
        given = F.linear(x_hat, weight, layer.bias)
    torch.testing.assert_close(weight, rounded.weight)
    expected = before.mean(0) if missing is None else (before + missing).mean(0)
    torch.testing.assert_close(given.mean(0), expected, rtol=1e-4, atol=1e-4)
