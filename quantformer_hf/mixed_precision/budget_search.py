"""The bits that lose least under hard budgets: HAQ's problem (arXiv 1811.08886), from measured losses, solved exactly."""

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..image_batches import pixel_values_of
from ..labels import one_class_an_image
from ..modeling_quantformer import QuantformerForImageClassification, StageError
from ..progress import progress
from .budget import Budget
from .candidates import Candidates
from .cost import CostModel
from .divergence import Divergence
from .search_space import Widths
from .sensitivity import measure_sensitivities
from .solver import AllocationProblem, Losses


#: Allocations between the cheapest and the dearest that the front shows.
FRONT_POINTS = 9


@dataclass
class FrontPoint:
    """The best allocation at some cost, or a uniform one.

    Attributes:
        label: `W3A3` for uniform bits; empty on the front.
        cost: by unit.
        predicted: sum of the losses of its choices.
        divergence: KL divergence from full precision with all of them, in nats.
        agreement: share of images that keep their class.
    """

    label: str
    cost: dict[str, float]
    predicted: float
    divergence: float
    agreement: float


class BudgetSearch:
    """Measures what each width of each tensor loses, and finds allocations that lose least within budgets.

    Args:
        model: calibrated, in the stage `pretrain`; it is not changed.
        batches: images, as for `calibrate`; a few dozen are enough.
        costs: of the model's configuration.
        losses: if they are known by other means than measuring.

    Raises:
        StageError: not calibrated, or in another stage.
        ValueError: no image, or a model whose logits no softmax makes probabilities of.
    """

    def __init__(
        self,
        model: QuantformerForImageClassification,
        batches: Iterable[Tensor | Mapping[str, Any]],
        costs: CostModel,
        losses: Losses | None = None,
    ):
        if model.config.stage != "pretrain" or not model.config.calibrated:
            raise StageError(
                "the search for bits needs a model in the stage 'pretrain': run model.calibrate(batches) first"
            )
        if not one_class_an_image(model.config):
            raise ValueError(
                f"the search for bits compares probabilities of classes, and this model, with num_labels"
                f" {model.config.num_labels} and problem_type {model.config.problem_type}, has none: choose layer_bits by"
                f" hand"
            )
        self.costs, self.space = costs, costs.space
        batches = [pixel_values_of(batch).to(model.device) for batch in batches]
        candidates = Candidates.of(model, self.space, batches)
        self.divergence = Divergence(model, candidates, self.space, batches)
        self.losses = losses or measure_sensitivities(model, candidates, self.space, batches)

    def solve(self, budgets: Sequence[Budget], trials: int = 0, seed: int = 0) -> Widths:
        """The allocation that loses least within all `budgets`.

        Args:
            trials: evaluations by which it is refined (`refine.py`).

        Raises:
            ValueError: budgets that no allocation keeps, or trials without Optuna.
        """
        if trials == 0:
            return AllocationProblem(self.losses, self.costs).solve(budgets)
        check_refinement(trials)
        # Optuna is an extra.
        from .refine import refine

        return refine(self.losses, self.costs, budgets, lambda w: self.divergence.of_widths(w)[0], trials, seed)

    def point(self, widths: Widths, label: str = "") -> FrontPoint:
        """What an allocation costs and loses."""
        predicted = self.losses.total(self.space, widths)
        return FrontPoint(label, self.costs.totals(widths), predicted, *self.divergence.of_widths(widths))

    def uniform(self) -> list[FrontPoint]:
        """The same bits for weights and inputs of all layers, at each candidate."""
        widths = [bits for bits in self.space.weight_bits if bits in self.space.activation_bits]
        return [self.point(self.space.uniform(bits, bits), f"W{bits}A{bits}") for bits in widths]

    def front(self, unit: str, points: int = FRONT_POINTS) -> list[FrontPoint]:
        """The best allocations at costs from the smallest to that of the widest bits."""
        problem = AllocationProblem(self.losses, self.costs)
        most = self.costs[unit].total(self.space.uniform(self.space.weight_bits[-1], self.space.activation_bits[-1]))
        at = np.geomspace(problem.smallest(unit), most, points)
        # Rounding must not put the first budget below the smallest cost.
        costs = progress(at, "Measuring the front, allocations")
        return [self.point(problem.solve([Budget(unit, cost * (1 + 1e-9))])) for cost in costs]


def check_refinement(trials: int) -> None:
    """Raise ValueError if `trials` evaluations are asked for and their library is not installed."""
    if trials > 0 and importlib.util.find_spec("optuna") is None:
        raise ValueError(
            f"refine is {trials}, which needs Optuna: pip install 'quantformer_hf[refine]', or leave it at 0"
        )


def check_budgets(costs: CostModel, budgets: Sequence[Budget]) -> None:
    """Raise ValueError for budgets that no allocation keeps, before anything is measured."""
    AllocationProblem(Losses.none(costs.space), costs).solve(budgets)
