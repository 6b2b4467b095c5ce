"""Scales refitted to what reaches a quantizer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quantformer_hf import reconstruction
from quantformer_hf.class_token import ClassTokenQuantizer
from quantformer_hf.groups import channel_importance
from quantformer_hf.quantizers import GroupActivationQuantizer
from quantformer_hf.reconstruction import Seen


@pytest.fixture
def refitted(monkeypatch):
    """What was refitted, with what: a list that fills."""
    refitted = []
    monkeypatch.setattr(GroupActivationQuantizer, "refit", lambda *given: refitted.append(given))
    return refitted


def refit(weights):
    """A quantizer of GELU's output, and two images of five tokens whose scales are refitted with these `weights`."""
    quantizer = GroupActivationQuantizer(6, 4, "layer", True, "gelu")
    ClassTokenQuantizer(quantizer, 4, tokens=1)
    given, layers = torch.randn(10, 6), [nn.Linear(6, 3), nn.Linear(6, 2)]
    reconstruction._refit_readers(quantizer, layers, [Seen(given, given, None, torch.tensor(weights * 2), 2)])
    return quantizer, F.gelu(given).view(2, 5, 6), channel_importance(layers)


def test_scales_are_fitted_to_the_tokens_and_channels_that_count(refitted):
    quantizer, tokens, importance = refit([1.0, 0.0, 2.0, 0.0, 0.0])
    assert [part for part, *_ in refitted] == [quantizer.class_token, quantizer]
    for (_, quantiles, counts), rows in zip(refitted, (tokens[:, 0], tokens[:, 2]), strict=True):
        torch.testing.assert_close(quantiles[:, [0, -1]], torch.stack(rows.aminmax(dim=0), 1))
        assert torch.equal(counts, importance)


def test_scales_of_tokens_that_nobody_looks_at_stay(refitted):
    quantizer, *_ = refit([1.0, 0.0, 0.0, 0.0, 0.0])
    assert [part for part, *_ in refitted] == [quantizer.class_token]
