"""A found allocation made better by evaluating others, with Optuna (arXiv 1907.10902)."""

import logging
from collections.abc import Callable

import optuna

from .budget import Budget
from .cost import CostModel
from .search_space import SearchSpace, Widths
from .solver import AllocationProblem, Losses


logger = logging.getLogger(__name__)

#: Losses of a kind of tensor are multiplied by factors between the inverse of this and itself.
LARGEST_FACTOR = 4.0


def kinds(space: SearchSpace) -> dict[str, str]:
    """The kind of each tensor, by the name of layer or quantizer: `weights of fc1`, `inputs of q_proj`."""
    found = {name: f"weights of {name.rpartition('.')[2]}" for name in space.inputs}
    for name, quantizer in space.inputs.items():
        # Of the layers that read one tensor, the first names it.
        found.setdefault(quantizer, f"inputs of {name.rpartition('.')[2]}")
    return found | dict.fromkeys(space.attention, "attention products")


def scaled(losses: Losses, factors: dict[str, float], kind_of: dict[str, str]) -> Losses:
    """`losses`, each multiplied by the factor of its kind."""

    def of(table):
        return {name: {b: loss * factors[kind_of[name]] for b, loss in row.items()} for name, row in table.items()}

    return Losses(of(losses.weights), of(losses.inputs), of(losses.attention))


def refine(
    losses: Losses,
    costs: CostModel,
    budgets: list[Budget],
    evaluate: Callable[[Widths], float],
    trials: int,
    seed: int = 0,
) -> Widths:
    """The best of `trials` allocations, all of which keep the budgets; the first is the integer programme's own.

    Losses measured one tensor at a time do not know how errors of many add up. The trials multiply the losses of each kind
    of tensor by a factor and solve the integer programme again: a dozen numbers to search instead of hundreds.

    Args:
        evaluate: what an allocation really loses.
        trials: evaluations.
    """
    kind_of = kinds(costs.space)
    names = sorted(set(kind_of.values()))
    found: dict[tuple, tuple[float, Widths]] = {}

    def objective(trial: optuna.Trial) -> float:
        factors = {n: trial.suggest_float(n, 1 / LARGEST_FACTOR, LARGEST_FACTOR, log=True) for n in names}
        widths = AllocationProblem(scaled(losses, factors, kind_of), costs).solve(budgets)
        key = tuple(widths.items())
        if key not in found:
            found[key] = evaluate(widths), widths
            logger.info(f"refinement {trial.number + 1} of {trials}: {found[key][0]:.4f}")
        return found[key][0]

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True))
    study.enqueue_trial(dict.fromkeys(names, 1.0))
    study.optimize(objective, n_trials=trials)
    return min(found.values(), key=lambda pair: pair[0])[1]
