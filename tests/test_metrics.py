"""Accuracies."""

import pytest
import torch
import torch.nn.functional as F
from transformers import EvalPrediction

from quantformer_hf.labels import IGNORED_LABEL
from quantformer_hf.metrics import compute_metrics, rank_and_loss


LOGITS = torch.tensor([[0.0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 9, 0, 0, 0, 0]])


def metrics_of(logits, labels):
    ranked, losses = rank_and_loss(logits, labels)
    return compute_metrics(EvalPrediction((ranked.numpy(), losses.numpy()), labels.numpy()))


def test_accuracies_and_loss_by_hand():
    labels = torch.tensor([5, 4, 1])
    loss = pytest.approx(F.cross_entropy(LOGITS, labels).item())
    assert metrics_of(LOGITS, labels) == {"accuracy": pytest.approx(2 / 3), "top5_accuracy": 1.0, "loss": loss}
    assert set(metrics_of(LOGITS[:, :3], torch.tensor([2, 1, 1]))) == {"accuracy", "loss"}


def test_ignored_rows_do_not_count():
    labels = torch.tensor([5, IGNORED_LABEL, 1])
    metrics = metrics_of(LOGITS, labels)
    assert metrics["accuracy"] == 1.0
    assert metrics["loss"] == pytest.approx(F.cross_entropy(LOGITS, labels).item())
    with pytest.raises(ValueError, match="no image to evaluate on"):
        metrics_of(LOGITS, torch.full((3,), IGNORED_LABEL))
