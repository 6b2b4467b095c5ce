"""The search, its annealing, and the freeze, in one run or in two."""

import pytest
import torch
from conftest import make_full_precision, make_quantized
from trainers import ONE_RUN, StopAt, dataset, logged, make_trainer
from transformers import AutoModelForImageClassification

from quantformer_hf import QuantformerCallback, QuantformerTrainer, QuantformerTrainingArguments
from quantformer_hf.quantize import group_quantizers


def test_a_search_that_would_last_to_the_end_is_refused(tmp_path):
    arguments = {"search_steps": 1000, "max_steps": -1, "num_train_epochs": 1}
    with pytest.raises(ValueError, match="search_steps is 1000, and the training has"):
        make_trainer(tmp_path, make_quantized("vit", "search"), **arguments).train()


def test_nothing_moves_after_a_freeze_with_a_learning_rate_of_zero(tmp_path):
    model = make_quantized("vit", "search")
    trainer = make_trainer(tmp_path, model, max_steps=4, search_steps=2, finetune_learning_rate=0.0)
    trainer.train()
    assert logged(trainer, "learning_rate")[-2:] == [0.0, 0.0]


class Recorder(QuantformerCallback):
    def __init__(self):
        self.switches, self.stages, self.rates = [], [], []

    def on_stage_switch(self, args, state, control, stage, **kwargs):
        self.switches.append((state.global_step, stage, kwargs["model"].config.stage))

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.stages.append(model.config.stage)
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def test_one_run_searches_freezes_and_finetunes(backbone, tmp_path):
    model, recorder = make_quantized(backbone, "search"), Recorder()
    logits_before = group_quantizers(model)[0].assignment_logits.clone()
    trainer = make_trainer(tmp_path, model, make_full_precision(backbone), callbacks=[recorder], **ONE_RUN)
    trainer.train()
    assert recorder.stages == ["search"] * 5 + ["finetune"] * 7
    assert recorder.switches == [(5, "finetune", "finetune")]
    assert model.config.stage == "finetune"
    # Two linear schedules, one after the other.
    weight_rates = [rates[0] for rates in recorder.rates]
    assert weight_rates[:5] == pytest.approx([1e-3 * (1 - step / 5) for step in range(5)])
    assert weight_rates[5:] == pytest.approx([2e-4 * (1 - step / 7) for step in range(7)])
    assert recorder.rates[0][-1] == pytest.approx(1e-2)
    # The assignment term ends with the search; an evaluation shows what freezing did.
    assert len(logged(trainer, "loss_assignment")) == 5
    assert 5 in [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    logits = trainer.optimizer.param_groups[-1]["params"][0]
    assert not torch.equal(logits, logits_before)
    assert torch.equal(group_quantizers(model)[0].group_index.long(), logits.argmax(0))


def test_both_schedules_warm_up_and_have_the_settings_of_the_run(tmp_path):
    recorder = Recorder()
    schedule = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}, "warmup_steps": 0.5}
    arguments = {"max_steps": 10, "search_steps": 4, "finetune_learning_rate": 5e-4} | schedule
    make_trainer(tmp_path, make_quantized("vit", "search"), callbacks=[recorder], **arguments).train()
    expected = [0, 1 / 2, 1, 1 / 4, *(rate / 2 for rate in (0, 1 / 3, 2 / 3, 1, 4 / 9, 1 / 9))]
    assert [1e3 * rates[0] for rates in recorder.rates] == pytest.approx(expected, abs=1e-3)


def test_scales_keep_a_rate_of_their_own_and_both_schedules_end_at_the_rate_that_is_told(tmp_path):
    recorder = Recorder()
    schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}}
    arguments = {"max_steps": 1000, "search_steps": 400, "finetune_learning_rate": 5e-4, "scale_learning_rate": 1e-5}
    trainer = make_trainer(tmp_path, make_quantized("vit", "search"), callbacks=[recorder], **arguments, **schedule)
    trainer.create_optimizer_and_scheduler(1000)
    rates = []
    for _ in range(1000):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    weights, scales = ([row[index] for row in rates] for index in (0, -2))
    assert [weights[step] for step in (0, 399, 400, 999)] == pytest.approx([1e-3, 1e-4, 5e-4, 1e-4], rel=1e-2)
    assert [scales[step] for step in (0, 400)] == pytest.approx([1e-5, 1e-5])


def test_processes_do_not_wait_for_gradients_that_a_freeze_takes_away(tmp_path):
    for steps in (-1, 2):
        trainer = make_trainer(tmp_path, make_quantized("vit", "search"), max_steps=4, search_steps=steps)
        assert bool(trainer.args.ddp_find_unused_parameters) == (steps > 0)


@pytest.mark.parametrize("arguments", [{"max_steps": 4}, {"max_steps": 6, "search_steps": 4}])
def test_the_assignment_is_annealed_step_by_step(arguments, tmp_path):
    """A sixteenth after four steps is a quarter after two, and the checkpoint of the second one computes with it."""
    model = make_quantized("vit", "search")
    before = [quantizer.assignment_logits.clone() for quantizer in group_quantizers(model)]
    arguments |= {"assignment_temperature": 1 / 16, "assignment_learning_rate": 0.0, "callbacks": [StopAt(2)]}
    make_trainer(tmp_path, model, save_strategy="steps", save_steps=2, **arguments).train()
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-2")
    for quantizer, logits in zip(group_quantizers(saved), before, strict=True):
        torch.testing.assert_close(quantizer.assignment_logits, 4 * logits)


def test_a_model_that_is_made_later_is_annealed_as_well(tmp_path):
    made = []

    def model_init():
        made.append(make_quantized("vit", "search"))
        return made[-1]

    arguments = QuantformerTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        assignment_temperature=1 / 16,
        assignment_learning_rate=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    QuantformerTrainer(None, arguments, model_init=model_init, train_dataset=dataset()).train()
    before = group_quantizers(make_quantized("vit", "search"))[0].assignment_logits
    torch.testing.assert_close(group_quantizers(made[-1])[0].assignment_logits, 16 * before)


def test_deepspeed_holds_an_assignment_that_cannot_be_annealed(tmp_path):
    """DeepSpeed is not installed here: the trainer is told that it is there."""
    trainer = make_trainer(tmp_path, make_quantized("vit", "search"), max_steps=1, assignment_temperature=0.5)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match=r"DeepSpeed holds the assignment where it cannot be annealed: set it to 1"):
        trainer.train()


def test_freezing_after_annealing_changes_next_to_nothing(tmp_path):
    """As much as the codes of some values that are next to halves."""
    images = torch.stack([row["pixel_values"] for row in dataset(1)])
    distances = []
    for temperature in (1.0, 1e-3):
        model = make_quantized("vit", "search")
        make_trainer(tmp_path, model, max_steps=4, assignment_temperature=temperature).train()
        model.eval()
        with torch.no_grad():
            searched = model(pixel_values=images).logits
            frozen = model.freeze_groups()(pixel_values=images).logits
        distances.append((frozen - searched).norm() / searched.norm())
    assert distances[1] < 0.1 * distances[0]


def test_search_steps_needs_a_model_that_searches(tmp_path):
    with pytest.raises(ValueError, match=r"run model\.begin_search\(\) first"):
        make_trainer(tmp_path, make_quantized(), search_steps=2).train()


def test_a_freeze_under_way_is_refused_where_parameters_are_sharded(tmp_path, monkeypatch):
    monkeypatch.setattr(QuantformerTrainer, "_is_sharded", lambda self: True)
    with pytest.raises(ValueError, match="search_steps is 2, and FSDP or DeepSpeed"):
        make_trainer(tmp_path, make_quantized(stage="search"), max_steps=4, search_steps=2)
