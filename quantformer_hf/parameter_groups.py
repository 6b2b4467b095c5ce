"""Which parameters an optimizer moves at which rate."""

from collections.abc import Collection

import torch
from torch import nn

from .weight_quantizers import WeightQuantizer


#: Of a group: that its learning rate follows from no other.
OWN_RATE = "has_own_rate"

#: The fewest bits at which weights move at the learning rate itself.
FULL_RATE_BITS = 4


def move_to_own_group(
    optimizer: torch.optim.Optimizer, parameters: Collection[nn.Parameter], learning_rate: float
) -> None:
    """Give `parameters` a learning rate of their own, and no weight decay."""
    _take_out(optimizer, {id(parameter) for parameter in parameters})
    optimizer.add_param_group({"params": parameters, "lr": learning_rate, "weight_decay": 0.0, OWN_RATE: True})


def move_by_bits(optimizer: torch.optim.Optimizer, model: nn.Module, factor: float) -> None:
    """Multiply the learning rate of weights of b < 4 bits by `factor^(4 - b)`, in groups of their own.

    Adam moves a weight by about its learning rate a step, however small the gradient, and with fewer bits it is further to
    the next level.

    Args:
        optimizer: of the parameters of `model`, before a schedule is made for it.
        factor: above 0; 1 changes nothing.
    """
    if factor == 1:
        return
    bits = {
        id(module.weight): module.weight_quantizer.grid.bits
        for module in model.modules()
        if isinstance(getattr(module, "weight_quantizer", None), WeightQuantizer)
    }
    few = {parameter: width for parameter, width in bits.items() if width < FULL_RATE_BITS}
    added = []
    for group in optimizer.param_groups:
        # In one order on every process, and in a run that is resumed.
        for width in sorted(set(few.values())):
            chosen = [parameter for parameter in group["params"] if few.get(id(parameter)) == width]
            if chosen:
                added.append({**group, "params": chosen, "lr": group["lr"] * factor ** (FULL_RATE_BITS - width)})
    _take_out(optimizer, few.keys())
    for group in added:
        optimizer.add_param_group(group)


def _take_out(optimizer: torch.optim.Optimizer, ids: Collection[int]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
