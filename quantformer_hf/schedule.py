"""The learning rates of a run that freezes its groups on the way."""

import functools

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from .parameter_groups import OWN_RATE
from .training_args import QuantformerTrainingArguments


def schedule_with_freeze(
    optimizer: torch.optim.Optimizer, args: QuantformerTrainingArguments, num_training_steps: int
) -> LambdaLR:
    """One schedule of `lr_scheduler_type` up to the freeze, after `search_steps`, and a second one after it.

    The second begins at `finetune_learning_rate`, where it is given; groups with a rate of their own have it in both.

    Raises:
        ValueError: no step is left after the freeze.
    """
    search_steps = args.search_steps
    if search_steps >= num_training_steps:
        raise ValueError(
            f"search_steps is {search_steps}, and the training has {num_training_steps}: leave steps to finetune after"
            f" it, or set search_steps to -1"
        )
    before, after = args.learning_rate, args.finetune_learning_rate
    after = before if after is None else after
    factors = []
    for rate, steps in ((before, search_steps), (after, num_training_steps - search_steps)):
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            # The rate at which a schedule ends (min_lr) is counted in shares of that of its optimizer.
            optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=rate or 1.0),
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        factors.append(scheduler.lr_lambdas[0])

    def factor(step: int, ratio: float) -> float:
        return factors[0](step) if step < search_steps else ratio * factors[1](step - search_steps)

    ratios = [1.0 if group.get(OWN_RATE) else after / before for group in optimizer.param_groups]
    return LambdaLR(optimizer, [functools.partial(factor, ratio=ratio) for ratio in ratios])
