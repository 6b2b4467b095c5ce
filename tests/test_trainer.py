"""Training and the schedule."""

import math

import pytest
import torch
from conftest import make_batches, make_full_precision, make_quantized
from trainers import ALL_LOSSES, dataset, logged, make_trainer
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback, TrainingArguments

from quantformer_hf import (
    QuantformerForImageClassification,
    QuantformerTrainer,
    QuantformerTrainingArguments,
)
from quantformer_hf.losses import logit_distillation
from quantformer_hf.metrics import compute_metrics, rank_and_loss
from quantformer_hf.modeling_quantformer import StageError
from quantformer_hf.quantize import blocks


@pytest.mark.parametrize("kind", [Trainer, QuantformerTrainer])
def test_accumulated_steps_have_the_gradient_of_one(kind, tmp_path):
    images = [{"pixel_values": image, "labels": index % 4} for index, image in enumerate(torch.cat(make_batches())[:8])]

    def norm(batch, steps):
        arguments = QuantformerTrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=steps,
            use_cpu=True, report_to="none", logging_steps=1, save_strategy="no",
        )  # fmt: skip
        trainer = kind(make_quantized("vit", "finetune"), arguments, train_dataset=images)
        trainer.train()
        logs = trainer.state.log_history[0]
        return logs["loss"], logs["grad_norm"]

    assert norm(2, 4) == pytest.approx(norm(8, 1), rel=1e-3)


def test_the_best_model_in_full_precision_is_that_of_its_checkpoint(tmp_path):
    trainer = make_trainer(
        tmp_path, make_full_precision("vit"), max_steps=3, learning_rate=0.3, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    best = type(trainer.model).from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_model_does_not_teach_itself(tmp_path):
    model = make_quantized()
    with pytest.raises(ValueError, match="the teacher is the model itself"):
        make_trainer(tmp_path, model, model, distillation_weight=1.0)


def test_arguments_of_trainer_itself_are_named(tmp_path):
    with pytest.raises(TypeError, match="args is a TrainingArguments: give QuantformerTrainingArguments"):
        QuantformerTrainer(model=make_quantized(), args=TrainingArguments(str(tmp_path), report_to="none"))


def test_integer_codes_are_not_trained_by_trainer_itself_either(tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none")
    trainer = Trainer(model=make_quantized("vit", "finetune").pack(), args=arguments, train_dataset=dataset())
    with pytest.raises(StageError, match=r"cannot be trained: run model\.unpack\(\) first"):
        trainer.train()


def test_integer_codes_are_not_trained(tmp_path):
    with pytest.raises(ValueError, match=r"integer codes cannot be trained: run model\.unpack\(\) first"):
        make_trainer(tmp_path, make_quantized("vit", "finetune").pack(), max_steps=1).train()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_two_classifiers_are_trained_and_evaluated_in_full_precision(tmp_path, smoothing):
    model = make_full_precision("deit-distilled")
    trainer = make_trainer(tmp_path, model, max_steps=2, learning_rate=0.0, label_smoothing_factor=smoothing)
    trainer.compute_metrics, trainer.preprocess_logits_for_metrics = compute_metrics, rank_and_loss
    trainer.train()
    rows = dataset(1)
    with torch.no_grad():
        logits = model.eval()(torch.stack([row["pixel_values"] for row in rows])).logits
    labels = torch.tensor([row["labels"] for row in rows])
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert metrics["eval_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)


def test_reentrant_checkpoints_train_without_shares_of_the_gradient(tmp_path):
    arguments = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = make_trainer(
        tmp_path, make_quantized(), make_full_precision(), max_steps=1, distillation_weight=1.0, **arguments
    )
    trainer.train()
    assert logged(trainer, "loss_distillation")
    assert not logged(trainer, "gradient_share_task")


@pytest.mark.parametrize("quantized", [False, True])
def test_several_labels_an_image_have_the_loss_of_the_model(tmp_path, quantized):
    stock = make_full_precision()
    stock.config.problem_type = "multi_label_classification"
    model = (
        QuantformerForImageClassification.from_full_precision(stock).calibrate(make_batches()) if quantized else stock
    )
    trainer = make_trainer(tmp_path, model)
    inputs = {"pixel_values": make_batches()[0], "labels": torch.eye(5)[:4]}
    with torch.no_grad():
        expected = torch.nn.functional.binary_cross_entropy_with_logits(
            model(inputs["pixel_values"]).logits, inputs["labels"]
        )
        torch.testing.assert_close(trainer.compute_loss(model, dict(inputs)), expected)


# Losses and the teacher


def test_each_block_hands_back_a_share_of_the_gradient(backbone, tmp_path):
    gradients, factor = {}, 0.5

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            units = blocks(model)
            first, last = (next(unit.parameters()).grad.norm().item() for unit in (units[0], units[-1]))
            gradients[args.block_gradient_scale] = first, last, len(units)

    for scale in (1.0, factor):
        trainer = make_trainer(
            tmp_path,
            make_quantized(backbone),
            callbacks=[Look()],
            max_steps=1,
            block_gradient_scale=scale,
            max_grad_norm=0,
        )
        trainer.train()
    (first, last, number), (damped_first, damped_last, _) = gradients[1.0], gradients[factor]
    assert damped_last == pytest.approx(last, rel=1e-4)
    assert damped_first == pytest.approx(first * factor ** (number - 1), rel=1e-4)
    assert first > 0
    assert not any(module._forward_pre_hooks for module in blocks(trainer.model))


def test_the_teacher_is_neither_trained_nor_saved(backbone, tmp_path):
    teacher, model = make_full_precision(backbone), make_quantized(backbone, "search")
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainer = make_trainer(tmp_path, model, teacher.train(), max_steps=3, **ALL_LOSSES)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    trainer.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher.training
    trainer.save_model()
    saved = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert list(saved.state_dict()) == list(model.state_dict())


def test_distillation_has_the_temperature_of_the_run(tmp_path):
    model, teacher, images = make_quantized().train(), make_full_precision(), make_batches()[0]
    arguments = {"task_weight": 0.0, "distillation_weight": 1.0, "distillation_temperature": 3.0}
    trainer = make_trainer(tmp_path, model, teacher, **arguments)
    loss = trainer.compute_loss(model, {"pixel_values": images, "labels": torch.zeros(4).long()})
    torch.testing.assert_close(loss, logit_distillation(model(images).logits, teacher(images).logits, 3.0))


def test_scales_and_logits_have_learning_rates_of_their_own(tmp_path):
    model = make_quantized("vit", "search")
    arguments = {"learning_rate": 1e-3, "scale_learning_rate": 1e-5, "assignment_learning_rate": 1e-2}
    optimizer = make_trainer(tmp_path, model, **arguments).create_optimizer()
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    expected = {"scale": 1e-5, "offset": 1e-5, "assignment_logits": 1e-2}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == expected.get(name.rpartition(".")[2], 1e-3), name


def test_weights_of_fewer_bits_move_faster(tmp_path):
    layer_bits = {"vit.layers.0.mlp.fc1": 2, "vit.layers.1.mlp.fc1": {"weight_bits": 1}, "vit.layers.1.mlp.fc2": 3}
    model = make_quantized("vit", "finetune", layer_bits=layer_bits)
    arguments = {"learning_rate": 1e-3, "scale_learning_rate": 1e-5, "weight_decay": 0.05}

    def groups_of(**more):
        optimizer = make_trainer(tmp_path, model, **arguments, **more).create_optimizer()
        return {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}

    plain, by_bits = groups_of(), groups_of(learning_rate_per_bit=3.0)
    times = {"layers.0.mlp.fc1.weight": 9, "layers.1.mlp.fc1.weight": 27, "layers.1.mlp.fc2.weight": 3}
    for name, parameter in model.named_parameters():
        before, after = plain[id(parameter)], by_bits[id(parameter)]
        assert after["lr"] == pytest.approx(before["lr"] * times.get(name.partition("vit.")[2], 1)), name
        assert after["weight_decay"] == before["weight_decay"], name


def test_the_log_has_each_term_and_its_share_of_the_gradient(backbone, tmp_path):
    trainer = make_trainer(
        tmp_path,
        make_quantized(backbone, "search"),
        make_full_precision(backbone),
        max_steps=3,
        gradient_share_steps=2,
        **ALL_LOSSES,
    )
    trainer.train()
    terms = ("task", "attention", "distillation", "features", "assignment")
    for step, entry in enumerate(entry for entry in trainer.state.log_history if "loss" in entry):
        assert entry["loss"] == pytest.approx(sum(entry[f"loss_{term}"] for term in terms), rel=1e-4)
        assert all(entry[f"loss_{term}"] > 0 for term in terms)
        shares = [entry.get(f"gradient_share_{term}") for term in terms]
        if step % 2 == 0:
            assert sum(shares) == pytest.approx(1.0, abs=1e-5)
            assert min(shares) > 0
        else:
            assert shares == [None] * len(terms)


def test_the_adaptive_degree_moves_and_is_saved(tmp_path):
    model = make_quantized("vit", activation_bits=8, weight_bits=8)
    with torch.no_grad():
        # Sharper queries than the teacher's: the teacher has to be sharpened.
        for layer in model.backbone.vit.layers:
            layer.attention.q_proj.weight.mul_(3)
            layer.attention.q_proj.weight_quantizer.scale.mul_(3)
    trainer = make_trainer(tmp_path, model, make_full_precision("vit"), max_steps=3, learning_rate=0.0, aux_weight=1.0)
    trainer.train()
    assert (model.concentration_degree > 1.01).all()
    trainer.save_model()
    saved = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(saved.concentration_degree, model.concentration_degree)


def test_an_evaluation_by_itself_logs_to_the_output_folder(tmp_path, monkeypatch):
    here, out = tmp_path / "here", tmp_path / "out"
    here.mkdir()
    monkeypatch.chdir(here)
    make_trainer(out, make_quantized("vit"), report_to="tensorboard").evaluate()
    assert not list(here.iterdir())
    assert list(out.glob("runs/events*"))


def test_a_fixed_degree_leaves_the_adaptive_one_alone(tmp_path):
    model = make_quantized()
    make_trainer(tmp_path, model, make_full_precision(), max_steps=2, aux_weight=1.0, pnorm="2").train()
    assert (model.concentration_degree == 1).all()


def test_a_loss_that_needs_a_teacher_asks_for_one(tmp_path):
    with pytest.raises(ValueError, match="pass teacher="):
        make_trainer(tmp_path, make_quantized(), aux_weight=1.0).train()


def test_gradient_accumulation_gives_the_gradients_of_the_whole_batch(tmp_path):
    models = []
    for batch_size, steps in ((8, 1), (2, 4)):
        model = make_quantized("vit", "search")
        make_trainer(
            tmp_path,
            model,
            make_full_precision(),
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            # A fixed degree: the adaptive one is a mean over micro-batches.
            **ALL_LOSSES | {"pnorm": "2"},
        ).train()
        models.append(model)
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_terms(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.backbone.classifier.bias.data.fill_(float("nan"))

    trainer = make_trainer(
        tmp_path,
        make_quantized(),
        make_full_precision(),
        callbacks=[Poison()],
        save_strategy="steps",
        save_steps=1,
        distillation_weight=1.0,
    )
    with pytest.raises(FloatingPointError, match=r"the loss of step 3 is not finite \(task nan, distillation nan\)"):
        trainer.train()
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert all(parameter.isfinite().all() for parameter in saved.parameters())


@pytest.mark.parametrize("saves", ["steps", "no"])
def test_weights_that_are_not_finite_any_more_are_not_saved(saves, tmp_path):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.backbone.classifier.bias.data[0] = float("inf")

    saving = {"save_strategy": saves, "save_steps": 1, "max_steps": 2}
    trainer = make_trainer(tmp_path, make_quantized(), callbacks=[Poison()], **saving)
    with pytest.raises(
        FloatingPointError, match=r"classifier\.bias is not finite after step 2: lower the learning rate"
    ):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == (["checkpoint-1"] if saves == "steps" else [])


def test_a_loss_of_frozen_parameters_has_no_share_of_the_gradient(tmp_path):
    model = make_quantized().requires_grad_(False)
    model.backbone.classifier.requires_grad_(True)
    arguments = {"max_steps": 1, "feature_weight": 1.0, "gradient_share_steps": 1}
    trainer = make_trainer(tmp_path, model, make_full_precision(), **arguments)
    trainer.train()
    assert logged(trainer, "gradient_share_task") == [1.0]
    assert not logged(trainer, "gradient_share_features")


# The optimizer


def test_scales_offsets_and_logits_do_not_decay(tmp_path):
    model = make_quantized("vit", "search")
    trainer = make_trainer(tmp_path, model, weight_decay=0.05, assignment_learning_rate=0.02)
    groups = trainer.create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for group in groups if group["weight_decay"] > 0 for parameter in group["params"]}
    assert any(name.endswith("fc1.weight") for name in decayed)
    assert not any(word in name for name in decayed for word in ("scale", "offset", "assignment_logits", "bias"))
    logits = {names[id(parameter)] for parameter in groups[-1]["params"]}
    assert logits == {name for name in names.values() if name.endswith("assignment_logits")}
    assert groups[-1]["lr"] == 0.02
    assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(names.values())


def test_activation_checkpointing_changes_nothing(backbone, tmp_path):
    losses = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tmp_path,
            make_quantized(backbone, "search"),
            make_full_precision(backbone),
            max_steps=3,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            **ALL_LOSSES,
        )
        trainer.train()
        losses.append(logged(trainer))
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(*losses, strict=True))


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_mixed_precision_trains(kind, tmp_path):
    # What stochastic depth drops depends, in torch 2.11, on the dtype.
    arguments = {"max_steps": 4, "drop_path_rate": 0.0, **ALL_LOSSES}
    losses = {}
    for bf16 in (False, True):
        # At eight bits: with few levels, bfloat16 moves values to other ones, and a small untrained model shows it.
        model = make_quantized(kind, "search", bit_width=8)
        trainer = make_trainer(tmp_path, model, make_full_precision(kind), bf16=bf16, **arguments)
        trainer.train()
        losses[bf16] = logged(trainer)
    assert losses[True] == pytest.approx(losses[False], rel=0.1)
    assert losses[True] != losses[False]
