"""Quantiles of what calibration sees."""

import pytest
import torch

from quantformer_hf.observers import QUANTILE_WEIGHTS, QUANTILES, Observer, channel_quantiles, weighted_sample


def test_rows_count_by_their_weight():
    rows = torch.cat([torch.randn(1000, 3), 50 + torch.randn(1000, 3)])
    weights = torch.cat([torch.full((1000,), 9.0), torch.ones(1000)])
    quantiles = channel_quantiles(weighted_sample(rows.split(700), weights))
    assert quantiles.shape == (3, len(QUANTILES))
    # A tenth of the weight lies at 50.
    assert (quantiles[:, QUANTILES < 0.88] < 10).all()
    assert (quantiles[:, QUANTILES > 0.92] > 40).all()


def test_rows_without_weight_are_not_seen():
    rows = torch.tensor([[0.0], [1.0], [1e6]])
    assert weighted_sample([rows], torch.tensor([1.0, 1.0, 0.0])).max() == 1


def test_quantiles_are_those_of_torch():
    rows = torch.randn(997, 5, generator=torch.Generator().manual_seed(0)) ** 3
    # In float64: in float32 torch 2.11 is less exact.
    expected = torch.quantile(rows.double(), QUANTILES.double(), dim=0).T
    torch.testing.assert_close(channel_quantiles(rows).double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(channel_quantiles(rows[:1]), rows[0].unsqueeze(1).expand(5, len(QUANTILES)))


def test_quantile_weights_are_a_probability():
    assert QUANTILE_WEIGHTS.shape == QUANTILES.shape
    assert QUANTILE_WEIGHTS.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert (QUANTILE_WEIGHTS > 0).all()


def test_observer_keeps_a_bounded_number_of_rows_and_finds_the_quantiles():
    observer = Observer(2, rows_per_batch=100, most_rows=1000)
    many = observer.most_rows
    for _ in range(3 * many // observer.rows_per_batch):
        observer.add(torch.randn(7 * observer.rows_per_batch, 2) * torch.tensor([1.0, 10.0]))
    assert sum(len(batch) for batch in observer.batches) <= many
    median = observer.quantiles()[:, len(QUANTILES) // 2]
    assert median.abs()[0] < 0.1
    assert median.abs()[1] < 1.0


@pytest.mark.parametrize("images", [1, 8, 32, 128, 512])
@pytest.mark.parametrize("windows", [1, 16, 64])
@pytest.mark.parametrize("tokens", [49, 64, 196, 197, 198, 577])
def test_an_observer_sees_all_places_of_images_and_of_windows(tokens, windows, images):
    places = torch.arange(tokens, dtype=torch.uint8 if tokens < 256 else torch.int16).repeat(images * windows)
    observer = Observer(64)
    observer.add(places[:, None].expand(-1, 64))
    seen = observer.batches[0][:, 0].unique()
    assert len(seen) == min(tokens, len(observer.batches[0]))
    # As many as are wanted, but for a step that is a little longer.
    assert len(observer.batches[0]) >= min(len(places), 300)


def test_an_observer_weighs_all_batches_alike():
    observer = Observer(64, rows_per_batch=64, most_rows=256)
    for batch in range(64):
        observer.add(torch.full((1000, 64), float(batch)))
    held = torch.cat(observer.batches)[:, 0]
    assert len(held) <= observer.most_rows
    counts = held.long().bincount(minlength=64)
    assert counts.min() >= 1
    assert counts.max() <= 4


def test_an_observer_without_data_says_so():
    with pytest.raises(RuntimeError, match="no calibration batch reached it"):
        Observer(2).quantiles()
