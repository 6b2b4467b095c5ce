"""Several labels an image, or a number, in the place of one class."""

import copy

import pytest
import torch
from conftest import NUM_LABELS, make_batches, make_full_precision
from transformers import ViTForImageClassification

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.quantize import full_precision


@pytest.mark.parametrize(
    ("problem", "classes", "labels"),
    [
        ("multi_label_classification", 4, torch.tensor([[1.0, 0, 1, 0], [0, 0, 1, 1]])),
        (None, 1, torch.tensor([0.5, -1.0])),
        ("regression", 2, torch.tensor([[0.5, -1.0], [2.0, 0.0]])),
    ],
)
def test_other_problems_have_the_loss_of_the_stock_model(problem, classes, labels):
    config = copy.deepcopy(make_full_precision("vit").config)
    config.num_labels, config.problem_type = classes, problem
    stock = ViTForImageClassification(config).eval()
    model = QuantformerForImageClassification.from_full_precision(stock)
    images = make_batches()[0][:2]
    with torch.no_grad(), full_precision(model):
        torch.testing.assert_close(model(images, labels=labels).loss, stock(images, labels=labels).loss)


def test_what_is_asked_of_the_classes_is_said_once(tmp_path):
    stock = make_full_precision("vit")
    stock.config.problem_type = "multi_label_classification"
    model = QuantformerForImageClassification.from_full_precision(stock)
    # A pipeline reads the first, and takes softmax for anything else.
    assert model.config.problem_type == model.backbone.config.problem_type == "multi_label_classification"
    model.calibrate(make_batches()).save_pretrained(tmp_path)
    for asked in ({}, {"problem_type": "regression"}):
        loaded = QuantformerForImageClassification.from_pretrained(tmp_path, **asked)
        expected = asked.get("problem_type", "multi_label_classification")
        assert loaded.config.problem_type == loaded.backbone.config.problem_type == expected
        images, labels = make_batches()[0], torch.rand(4, NUM_LABELS)
        with torch.no_grad():
            output = loaded(images, labels=labels)
        loss = torch.nn.MSELoss() if asked else torch.nn.BCEWithLogitsLoss()
        torch.testing.assert_close(output.loss, loss(output.logits, labels))
