"""Rounding that looks at what the layer puts out."""

import itertools

import pytest
import torch

from quantformer_hf import rounding
from quantformer_hf.grids import Grid, fit_row_scales
from quantformer_hf.rounding import descend, regress_scale, round_weight


@pytest.fixture(params=[0, 0.5], ids=["", "half-shifted"])
def grid(request):
    return Grid(3, signed=True, shift=request.param)


@pytest.fixture
def weight():
    return torch.randn(8, 48, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def hessian():
    """Of inputs that hang together."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 12, generator=generator) @ torch.randn(12, 48, generator=generator)
    x += 0.3 * torch.randn(200, 48, generator=generator)
    return (x.T @ x / len(x)).double()


def loss(weight, rounded, hessian):
    error = (weight - rounded).double()
    return ((error @ hessian) * error).sum(1)


def nearest(values, scale, grid):
    codes = (values / scale.unsqueeze(1) - grid.shift).round().clamp(grid.qmin, grid.qmax)
    return (codes + grid.shift) * scale.unsqueeze(1)


def test_each_step_loses_less_than_the_one_before(weight, hessian, grid):
    scale = fit_row_scales(weight, grid)
    losses = [loss(weight, nearest(weight, scale, grid), hessian)]
    losses += [loss(weight, round_weight(weight, grid, hessian, sweeps).weight, hessian) for sweeps in (0, 1, 2, 8)]
    assert losses[1].sum() < 0.8 * losses[0].sum()
    assert losses[2].sum() < 0.9 * losses[1].sum()
    for before, after in itertools.pairwise(losses[1:]):
        assert (after <= before * 1.0001).all()


def test_scales_begin_where_a_column_of_huge_inputs_is_met(weight, hessian, grid, monkeypatch):
    weight[:, 7] *= 4
    hessian[7] *= 30
    hessian[:, 7] *= 30
    lost = loss(weight, round_weight(weight, grid, hessian).weight, hessian)
    monkeypatch.setattr(rounding, "fit_row_scales", lambda weight, grid, importance: fit_row_scales(weight, grid))
    assert lost.sum() < 0.3 * loss(weight, round_weight(weight, grid, hessian).weight, hessian).sum()


def test_latents_round_to_the_same(weight, hessian, grid):
    for sweeps in (0, 1, 3):
        rounded = round_weight(weight, grid, hessian, sweeps)
        torch.testing.assert_close(nearest(rounded.latent, rounded.scale, grid), rounded.weight)
        assert (rounded.scale > 0).all()


def test_blocks_of_columns_change_nothing(weight, hessian, grid, monkeypatch):
    whole = round_weight(weight, grid, hessian)
    monkeypatch.setattr(rounding, "BLOCK", 5)
    torch.testing.assert_close(round_weight(weight, grid, hessian).weight, whole.weight)


def test_a_descent_ends_where_no_column_can_do_better(weight, hessian, grid):
    scale, curved = fit_row_scales(weight, grid), hessian.float()
    codes = torch.zeros_like(weight)
    for _ in range(50):
        before = codes
        codes, _ = descend(weight, before, scale, grid, curved)
        if torch.equal(codes, before):
            break
    least = loss(weight, codes * scale.unsqueeze(1), hessian)
    for column in range(weight.shape[1]):
        for code in range(grid.qmin, grid.qmax + 1):
            other = codes.clone()
            other[:, column] = code + grid.shift
            assert (loss(weight, other * scale.unsqueeze(1), hessian) >= least * (1 - 1e-5)).all()


def test_the_scale_of_fixed_codes_is_the_best_one(weight, hessian, grid):
    scale, curved = fit_row_scales(weight, grid), hessian.float()
    codes = nearest(weight, scale, grid) / scale.unsqueeze(1)
    codes[3] = 0
    best = regress_scale(weight, codes, scale, curved)
    assert best[3] == scale[3]
    least = loss(weight, codes * best.unsqueeze(1), hessian)
    for factor in (0.99, 1.01):
        assert (loss(weight, codes * (factor * best).unsqueeze(1), hessian) >= least).all()


def test_a_row_of_zeros_stays_zero(weight, hessian, grid):
    weight[2] = 0
    rounded = round_weight(weight, grid, hessian)
    # Where no level is zero, they are as small as scales get.
    assert (rounded.weight[2].abs() <= 2e-8 * grid.shift).all()
    assert rounded.scale.isfinite().all()
