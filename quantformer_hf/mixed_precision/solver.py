"""The best allocation under hard budgets, by integer programming: exact, and never above a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from ..layer_bits import LayerBits
from .budget import Budget, format_least
from .cost import Cost, CostModel
from .search_space import SearchSpace


#: What `milp` reports.
OPTIMAL, INFEASIBLE = 0, 2


@dataclass
class Losses:
    """What each choice loses, in any unit; the sum over all choices is to be small.

    Attributes:
        weights: by layer, then bits.
        inputs: by input quantizer, then bits.
        attention: by attention block, then bits of its operands.
    """

    weights: Mapping[str, Mapping[int, float]]
    inputs: Mapping[str, Mapping[int, float]]
    attention: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    @classmethod
    def none(cls, space: SearchSpace) -> Self:
        """Nothing is lost anywhere: to ask whether there is an allocation at all."""
        return cls(
            {name: dict.fromkeys(space.weight_bits, 0.0) for name in space.inputs},
            {quantizer: dict.fromkeys(space.activation_bits, 0.0) for quantizer in space.quantizers},
            {name: dict.fromkeys(space.attention_bits, 0.0) for name in space.attention},
        )

    def total(self, space: SearchSpace, widths: Mapping[str, LayerBits]) -> float:
        """Of an allocation."""
        inputs = {quantizer: widths[name].activation_bits for name, quantizer in space.inputs.items()}
        of_weights = sum(self.weights[name][widths[name].weight_bits] for name in space.inputs)
        of_inputs = sum(self.inputs[quantizer][bits] for quantizer, bits in inputs.items())
        return of_weights + of_inputs + sum(self.attention[n][widths[n].activation_bits] for n in space.attention)


class AllocationProblem:
    """`min Σ losses` such that each layer has one pair of bits, readers of one tensor agree, and no budget is exceeded.

    Variables are `z[layer, w, a]` and `y[quantizer, a]`, all 0 or 1, with `Σ_w z[layer, w, a] = y[quantizer, a]` and
    `Σ_a y[quantizer, a] = 1`, and `z[attention, b, b]` with `Σ_b z[attention, b, b] = 1`. Costs are linear in z, also where
    they hang on the product of both widths.

    Args:
        losses: of the choices.
        costs: of the choices; those of the budgets are looked at.
    """

    def __init__(self, losses: Losses, costs: CostModel):
        self.space = costs.space
        self.costs = costs
        self.choices = [(name, w, a) for name in self.space.inputs for w, a in costs.pairs()]
        self.attention_choices = [(name, b, b) for name in self.space.attention for b in self.space.attention_bits]
        self.input_choices = [(q, a) for q in self.space.quantizers for a in self.space.activation_bits]
        self.objective = np.array(
            [losses.weights[name][w] for name, w, _ in self.choices]
            + [losses.attention[name][b] for name, b, _ in self.attention_choices]
            + [losses.inputs[quantizer][a] for quantizer, a in self.input_choices]
        )
        self.structure = self._structure()

    def _structure(self) -> LinearConstraint:
        """One pair of bits a layer, the same activation bits for all readers of a tensor, one width an attention block."""
        before = len(self.choices)
        of_attention = {choice: before + i for i, choice in enumerate(self.attention_choices)}
        before += len(of_attention)
        column = {choice: before + i for i, choice in enumerate(self.input_choices)}
        agree = {
            key: row for row, key in enumerate((n, a) for n in self.space.inputs for a in self.space.activation_bits)
        }
        one = {name: len(agree) + i for i, name in enumerate((*self.space.quantizers, *self.space.attention))}
        entries = [(agree[name, a], i, 1.0) for i, (name, _, a) in enumerate(self.choices)]
        entries += [(row, column[self.space.inputs[name], a], -1.0) for (name, a), row in agree.items()]
        entries += [(one[quantizer], column[quantizer, a], 1.0) for quantizer, a in self.input_choices]
        entries += [(one[choice[0]], at, 1.0) for choice, at in of_attention.items()]
        rows, columns, values = zip(*entries, strict=True)
        sides = np.array([0.0] * len(agree) + [1.0] * len(one))
        matrix = coo_array((values, (rows, columns)), shape=(len(sides), len(self.objective)))
        return LinearConstraint(matrix.tocsr(), sides, sides)

    def solve(self, budgets: Sequence[Budget] = ()) -> dict[str, LayerBits]:
        """The best allocation within all `budgets`.

        Raises:
            ValueError: a budget below the smallest possible cost, or budgets that no allocation meets together.
        """
        room = {}
        for budget in budgets:
            smallest = self.smallest(budget.unit)
            if budget.most < smallest:
                raise ValueError(
                    f"the budget of {budget} is below the smallest possible cost, {format_least(budget.unit, smallest)} with"
                    f" these candidates: raise it, or allow fewer bits in candidate_bits"
                )
            room[budget.unit] = budget.most
        found: list[dict[str, LayerBits]] = []
        while True:
            widths = self._solve(self.objective, room)
            if widths is None:
                raise ValueError(
                    f"no allocation keeps {' and '.join(map(str, budgets))} together: raise one of them, or allow fewer bits"
                    f" in candidate_bits"
                )
            exceeded = [b.unit for b in budgets if self.costs[b.unit].total(widths) > b.most]
            if not exceeded:
                return widths
            # By a header a few bytes longer than planned, or by the solver's tolerance: such allocations are out, and where
            # the solver comes back with one that it was told to leave, by more than its tolerance.
            less = 1e-9 if widths not in found else 1e-5
            found.append(widths)
            for unit in exceeded:
                room[unit] = self.costs[unit].linear(widths) * (1 - less)

    def smallest(self, unit: str) -> float:
        """The least that any allocation costs. Every cost grows with both widths, unless a table of times says otherwise."""
        cost = self.costs[unit]
        return cost.total(self._solve(self._coefficients(cost), {}))

    def _coefficients(self, cost: Cost) -> np.ndarray:
        shares = [cost.shares[name][w, a] for name, w, a in (*self.choices, *self.attention_choices)]
        return np.array(shares + [0.0] * len(self.input_choices))

    def _solve(self, objective: np.ndarray, room: Mapping[str, float]) -> dict[str, LayerBits] | None:
        constraints = [self.structure]
        for unit, most in room.items():
            cost = self.costs[unit]
            left = most - cost.fixed
            if left < 0:
                return None
            # Relative to the budget: the solver's tolerance is absolute.
            constraints.append(LinearConstraint(self._coefficients(cost) / max(left, 1e-12), -np.inf, 1.0))
        result = milp(
            objective / (np.abs(objective).max() or 1.0),
            integrality=np.ones(len(objective)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0},
        )
        if result.status == INFEASIBLE:
            return None
        if result.status != OPTIMAL:
            raise RuntimeError(f"the integer programme was not solved: {result.message}")
        choices = *self.choices, *self.attention_choices
        return {name: LayerBits(w, a) for (name, w, a), value in zip(choices, result.x, strict=False) if value > 0.5}
