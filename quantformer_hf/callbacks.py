"""Callbacks: the event that announces a new stage, and the one that brings it about."""

from collections.abc import Callable

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .quantize import searched_quantizers


class QuantformerCallback(TrainerCallback):
    """A `TrainerCallback` that is also told when the model enters another stage.

    An ordinary `TrainerCallback` may ask `model.config.stage` at any event.
    """

    def on_stage_switch(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, stage: str, **kwargs
    ) -> None:
        """Called after the model has gone to `stage`, before anything is evaluated or saved at this step.

        `control` may ask for an evaluation or a checkpoint as in any other event.
        """


class EpochCallback(TrainerCallback):
    """Tells the trainer where each epoch begins and ends.

    Args:
        begin: called with the number of the epoch, also where a run is resumed within it.
        end: called without arguments.
    """

    def __init__(self, begin: Callable[[int], None], end: Callable[[], None]):
        self.begin = begin
        self.end = end

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.begin(int(state.epoch or 0))

    def on_epoch_end(self, args, state, control, **kwargs):
        self.end()


class AnnealAssignmentCallback(TrainerCallback):
    """Sharpens the assignment in the search: α is divided by `args.assignment_temperature` in all, by as much each step.

    So the softmax of what α began with falls from temperature 1 to that. As α itself is divided, what a checkpoint computes
    does not depend on the step that it is of; and a step of the optimizer moves it the less, the colder it is.
    """

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if args.assignment_temperature < 1 and getattr(model.config, "stage", None) == "search":
            steps = args.search_steps if args.search_steps > 0 else state.max_steps
            for quantizer in searched_quantizers(model):
                quantizer.assignment_logits.mul_(args.assignment_temperature ** (-1 / steps))


class FreezeGroupsCallback(TrainerCallback):
    """Freezes the groups after `args.search_steps` optimizer steps.

    It keeps nothing: whether the freeze is due follows from the step, and whether it has happened from the model.

    Args:
        announce: called with the new stage.
    """

    def __init__(self, announce):
        self.announce = announce

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if model.config.stage == "search" and state.global_step >= args.search_steps:
            model.freeze_groups()
            self.announce("finetune")
            if args.eval_strategy != "no":
                control.should_evaluate = True
        return control
