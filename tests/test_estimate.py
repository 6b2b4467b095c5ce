"""What is said of a run before it starts."""

from types import SimpleNamespace

import torch
from torch import nn

from quantformer_hf import estimate
from quantformer_hf.estimate import Estimate, free_bytes


def model(width: int) -> nn.Module:
    layer = nn.Linear(width, width, bias=False)
    layer.register_buffer("count", torch.zeros(8, dtype=torch.uint8))
    return layer


def test_the_estimate_counts_steps_images_and_bytes():
    frozen = model(16).requires_grad_(False)
    made = Estimate.of(model(32), frozen, images_per_epoch=100, global_batch=8, epochs=2.5)
    assert (made.steps, made.images) == (33, 33 * 8)
    assert made.model_bytes == 32 * 32 * 4 + 8
    assert made.training_bytes == 3 * 32 * 32 * 4
    assert made.teacher_bytes == 16 * 16 * 4 + 8
    assert "33 steps of 8 images: 264 images, of 100 an epoch" in str(made)


def test_max_steps_wins_and_no_teacher_is_not_mentioned():
    made = Estimate.of(model(4), None, images_per_epoch=100, global_batch=8, epochs=300, max_steps=7)
    assert made.steps == 7
    assert "teacher" not in str(made)


def test_free_memory_is_told_where_anybody_knows_it(monkeypatch):
    monkeypatch.setattr(estimate.psutil, "virtual_memory", lambda: SimpleNamespace(total=9, available=7, free=5))
    assert free_bytes(torch.device("cpu")) == 7
    assert free_bytes(torch.device("meta")) is None
