"""Arguments of the stage `allocate` of `run_quantformer.py`."""

from dataclasses import dataclass, field

from .budget import Budget, UniformBudget, parse_budgets
from .search_space import CANDIDATE_ATTENTION_BITS, CANDIDATE_BITS, check_candidates


#: What `--allocation_method` may name.
METHODS = ("budget", "edmips")


@dataclass
class AllocationArguments:
    """How the stage `allocate` gives bits to layers.

    Raises:
        ValueError: a budget that cannot be read, or another value out of its range.
    """

    budget: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What the packed model may cost at most: 2.5MB, 30ms, 20GBitOps, or several that hold together; W3A3 is"
            " as many BitOps as with three bits everywhere, W3A3bytes and W3A3ms its bytes and time."
        },
    )
    allocation_method: str = field(
        default="budget",
        metadata={"help": "budget: measured losses and integer programming. edmips: a search by gradient descent."},
    )
    candidate_bits: list[int] = field(
        default_factory=lambda: list(CANDIDATE_BITS), metadata={"help": "Widths to choose from, 1 to 8."}
    )
    attention_candidate_bits: list[int] = field(
        default_factory=lambda: list(CANDIDATE_ATTENTION_BITS),
        metadata={
            "help": "Widths to choose from for the products of each attention block, 2 to 8, beside attention_bits, which"
            " all have where this is that alone, or with edmips."
        },
    )
    latency_table: str | None = field(
        default=None,
        metadata={
            "help": "CSV file of `python -m quantformer_hf measure-latency`, for budgets of time; this CPU without one."
        },
    )
    sensitivity_samples: int = field(
        default=64, metadata={"help": "Training images on which the losses of the choices are measured."}
    )
    refine: int = field(
        default=0, metadata={"help": "Evaluations by which the allocation is refined. Needs quantformer_hf[refine]."}
    )
    width_learning_rate: float = field(
        default=1e-2, metadata={"help": "edmips: learning rate of the logits of the widths."}
    )
    cost_weight: float = field(default=1e-3, metadata={"help": "edmips: weight of the expected cost in the loss."})

    def __post_init__(self):
        # In a file, one budget or one width is written without brackets.
        if not isinstance(self.budget, list):
            self.budget = [str(self.budget)]
        if not isinstance(self.candidate_bits, list):
            self.candidate_bits = [self.candidate_bits]
        self.budgets()
        if not isinstance(self.attention_candidate_bits, list):
            self.attention_candidate_bits = [self.attention_candidate_bits]
        self.candidate_bits = list(check_candidates(self.candidate_bits))
        check_candidates(self.attention_candidate_bits, "attention_candidate_bits", least=2)
        if self.allocation_method not in METHODS:
            raise ValueError(f"allocation_method is {self.allocation_method!r}: choose one of {', '.join(METHODS)}")
        if self.refine and self.allocation_method == "edmips":
            raise ValueError("refine evaluates the allocations of the method 'budget': leave it at 0 with edmips")
        for name, least in (("sensitivity_samples", 1), ("refine", 0), ("width_learning_rate", 0), ("cost_weight", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: choose {least} or more")

    def budgets(self) -> list[Budget | UniformBudget]:
        """`budget`, read."""
        return parse_budgets(self.budget)
