"""A run that was interrupted repeats one that was not, to the last bit."""

import functools

import pytest
import torch
from conftest import make_full_precision, make_quantized
from trainers import ALL_LOSSES, ONE_RUN, StopAt, logged, make_trainer


def run_kind(kind, folder, callbacks=(), resume=None, **arguments):
    """Search, freeze and finetune in one run, or a run of the stage `kind`."""
    stage = "search" if kind == "one run" else kind
    model = make_quantized("vit", stage, layer_bits={"vit.layers.0.mlp.fc1": 2})
    arguments["learning_rate_per_bit"] = 2.0
    arguments |= ONE_RUN if kind == "one run" else ALL_LOSSES
    trainer = make_trainer(folder, model, make_full_precision(), callbacks=list(callbacks), **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, model


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of each kind, when it is first asked for; it saves nothing."""
    return functools.cache(lambda kind: run_kind(kind, tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize(
    ("kind", "interrupted_at"),
    [
        *[(kind, step) for kind in ("pretrain", "search", "finetune") for step in (3, 8)],
        # Before the freeze, at its very step, and after it.
        *[("one run", step) for step in (3, 5, 8)],
    ],
)
def test_a_resumed_run_repeats_the_losses_and_weights_of_an_uninterrupted_one(
    kind, interrupted_at, uninterrupted, tmp_path
):
    whole, expected = uninterrupted(kind)
    saving = {"save_strategy": "steps", "save_steps": 1}
    run_kind(kind, tmp_path, [StopAt(interrupted_at)], **saving)
    resumed, model = run_kind(kind, tmp_path, resume=str(tmp_path / f"checkpoint-{interrupted_at}"), **saving)
    assert logged(resumed) == logged(whole)
    assert model.config.stage == expected.config.stage
    state = model.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())


def test_a_full_precision_run_resumes_exactly_too(backbone, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 1}

    def run(folder, callbacks=(), resume=None):
        model = make_full_precision(backbone)
        trainer = make_trainer(folder, model, callbacks=list(callbacks), label_smoothing_factor=0.1, **arguments)
        trainer.train(resume_from_checkpoint=resume)
        return model

    expected = run(tmp_path / "whole")
    run(tmp_path / "parts", [StopAt(4)])
    resumed = run(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-4"))
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), resumed.parameters(), strict=True))


def test_a_checkpoint_of_a_stage_that_the_model_does_not_lead_to_is_refused(tmp_path):
    make_trainer(tmp_path, make_quantized("vit", "search"), max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(RuntimeError, match="the checkpoint is in the stage 'search', and the model in 'pretrain'"):
        make_trainer(tmp_path, make_quantized()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
