"""EdMIPS (arXiv 2004.05795): the widths of all tensors searched by gradient descent, in one short training."""

import torch
from torch import Tensor, nn

from ..parameter_groups import move_to_own_group
from ..trainer import QuantformerTrainer
from .cost import Cost
from .width_mixture import WidthMixtures


class WidthSearchTrainer(QuantformerTrainer):
    """Trains a model whose quantizers are mixtures over widths, with their expected cost in the loss.

    `L = L_task + ... + cost_weight * E[cost] / cost of the first layer at its widest`, the losses before it as the training
    arguments weigh them.

    Args:
        mixtures: of the model.
        cost: that is to be small.
        cost_weight: its weight in the loss.
        width_learning_rate: of the mixtures' logits, which no weight decay pulls.
        kwargs: as for `QuantformerTrainer`.
    """

    #: The mixtures are not a model that anybody loads.
    saves_on_sigterm = False

    def __init__(
        self, *args, mixtures: WidthMixtures, cost: Cost, cost_weight: float, width_learning_rate: float, **kwargs
    ):
        self.mixtures = mixtures
        self.cost = cost
        self.cost_weight = cost_weight
        self.width_learning_rate = width_learning_rate
        super().__init__(*args, **kwargs)

    def _more_terms(self) -> dict[str, Tensor]:
        return {"cost": self.cost_weight * self.mixtures.expected_cost(self.cost)}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in `QuantformerTrainer`, with a group of their own for the logits, the last."""
        if self.optimizer is None:
            super().create_optimizer(model)
            move_to_own_group(self.optimizer, self.mixtures.logits(), self.width_learning_rate)
        return self.optimizer
