"""Several labels an image, or a number, in the place of one class."""

import copy

import pytest
import torch
from conftest import NUM_LABELS, make_batches, make_full_precision, make_quantized
from trainers import logged, make_trainer
from transformers import ViTForImageClassification

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.quantize import full_precision


@pytest.mark.parametrize(
    ("problem", "classes", "labels"),
    [
        ("multi_label_classification", 4, torch.tensor([[1.0, 0, 1, 0], [0, 0, 1, 1]])),
        (None, 1, torch.tensor([0.5, -1.0])),
        # Found out by the labels, as in transformers.
        (None, 4, torch.tensor([[1.0, 0, 1, 0], [0, 0, 1, 1]])),
        (None, 4, torch.tensor([[2], [3]])),
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
    assert model.config.problem_type in (None, stock.config.problem_type)


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


@pytest.mark.parametrize("quantized", [False, True])
def test_labels_of_several_classes_are_trained_as_such_though_nobody_has_said_so(quantized, tmp_path):
    model = make_quantized() if quantized else make_full_precision()
    trainer = make_trainer(tmp_path, model, max_steps=2)
    for row in trainer.train_dataset:
        row["labels"] = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0])
    batch = trainer.get_train_dataloader().collate_fn(trainer.train_dataset[:4])
    logits = model.train()(pixel_values=batch["pixel_values"]).logits
    found = trainer.compute_loss(model, batch)
    torch.testing.assert_close(found, torch.nn.BCEWithLogitsLoss()(logits, batch["labels"]))
    trainer.train()
    assert model.config.problem_type == "multi_label_classification"


def test_images_without_labels_are_learned_from_the_teacher_alone(tmp_path):
    arguments = {"max_steps": 2, "distillation_weight": 1.0, "eval_strategy": "no"}
    for weight in (1.0, 0.0):
        trainer = make_trainer(tmp_path, make_quantized(), make_full_precision(), task_weight=weight, **arguments)
        trainer.train_dataset = [{"pixel_values": row["pixel_values"]} for row in trainer.train_dataset]
        if weight:
            with pytest.raises(ValueError, match=r"no labels, and task_weight is 1\.0: set it to 0"):
                trainer.train()
    trainer.train()
    assert logged(trainer, "loss_task") == [0.0, 0.0]
    assert all(loss > 0 for loss in logged(trainer, "loss_distillation"))


@pytest.mark.parametrize("how", ["compiled", "exported"])
def test_a_graph_may_have_labels(how):
    model, images, labels = make_quantized().eval(), make_batches()[0], torch.tensor([0, 1, 2, 3])
    if how == "compiled":
        graph = torch.compile(model, fullgraph=True)
    else:
        graph = torch.export.export(model, (), {"pixel_values": images, "labels": labels}).module()
    with torch.no_grad():
        found, expected = graph(pixel_values=images, labels=labels), model(pixel_values=images, labels=labels)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-2, atol=1e-2)
