"""The stage `allocate` of a run: it leaves `bit_allocation.json` and pictures, and later stages use those bits."""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import SaveStrategy

from ..arguments import RunArguments, StageArguments
from ..checkpointing import write_durably, writing
from ..configuration_quantformer import QuantformerConfig
from ..data import ImageData, load_image_data
from ..grids import FULL_PRECISION_BITS
from ..modeling_quantformer import QuantformerForImageClassification
from ..stage_trainer import training_trainer
from ..stages import StageRun
from .allocation import BACKBONE_SETTINGS, SETTINGS, make_allocation, mean_bits, write_allocation
from .budget import BIT_OPERATIONS, MILLISECONDS, UniformBudget, format_cost
from .budget_search import BudgetSearch, check_budgets, check_refinement
from .cost import CostModel, budget_in_numbers
from .latency_table import LatencyTable
from .measure_latency import TIMED_SETTINGS, measure_latency
from .pictures import BITS_PICTURE, FRONT_PICTURE, draw_bits, draw_front
from .search_space import SearchSpace, Widths
from .solver import Losses
from .width_mixture import WidthMixtures
from .width_search import WidthSearchTrainer


logger = logging.getLogger(__name__)

#: Beside the allocation: what was measured to find it.
MEASURED_FILE = "measured.json"

#: And the times, where a budget of time came without any.
LATENCY_FILE = "latency.csv"


class AllocationStage(StageRun):
    """Gives each layer its bits, from a full-precision checkpoint. Interrupted, it begins anew.

    Arguments as in `StageRun`.
    """

    def __init__(self, arguments: StageArguments, source: str | None, output_dir: Path):
        super().__init__(arguments, source, output_dir)
        table = arguments.allocation.latency_table
        if table and Path(table).is_file():
            # Another measurement in a file of the same name is another run.
            self.told["latency_table"] = f"{table} ({hashlib.sha256(Path(table).read_bytes()).hexdigest()[:12]})"

    def run(self) -> dict[str, float]:
        """Run the stage, and return what the allocation costs, by unit.

        Raises:
            ValueError: no budget for the method that needs one, one that cannot be kept, or a latency table that lacks a
                shape; `layer_bits`, which the stage is to choose.
        """
        results = self.earlier_results()
        if results is not None:
            logger.info(f"the stage '{self.stage}' is complete in {self.folder}")
            return results
        told = self.arguments.allocation
        budgets = told.budgets()
        if self.arguments.model.layer_bits:
            raise ValueError("the stage 'allocate' chooses layer_bits: leave out either")
        for name in ("weight_bits", "activation_bits"):
            if getattr(self.arguments.model, name) == FULL_PRECISION_BITS:
                raise ValueError(f"{name} is 32, and the stage 'allocate' chooses it from candidate_bits: leave it out")
        if told.allocation_method == "budget" and not budgets:
            raise ValueError(
                "the stage 'allocate' needs a budget: give --budget 2.5MB, 30ms, 20GBitOps, W3A3, or several"
            )
        check_refinement(told.refine)
        table = LatencyTable.read(told.latency_table) if told.latency_table else None
        training = self.arguments.training
        training.output_dir = str(self.folder)
        set_seed(training.seed)
        data = load_image_data(self.arguments.data, training.seed)
        if data.train is None:
            raise ValueError(f"the data set has no split {self.arguments.data.train_split!r}: name one by train_split")
        built = self._build_model(data)
        model, processor, data, teacher = built.model, built.processor, built.data, built.teacher
        self._begin()
        # The mixtures of edmips are of linears.
        of_attention = () if told.allocation_method == "edmips" else told.attention_candidate_bits
        space = SearchSpace.of(model.config, told.candidate_bits, of_attention)
        if table is None and any(budget.unit == MILLISECONDS for budget in budgets):
            table = self._measured_latency(built.full_precision, model.config)
        costs = CostModel(model.config, space, table)
        budgets = [budget_in_numbers(budget, model.config, table) for budget in budgets]
        check_budgets(costs, budgets)
        losses = None
        if told.allocation_method == "edmips":
            losses = self._losses_by_gradient(model, teacher, processor, data, costs)
            # That one's quantizers have become mixtures.
            model = self._build_model(data).model
        images = self._calibration_batches(data, processor)(samples=told.sensitivity_samples)
        search = BudgetSearch(model, images, costs, losses)
        widths = search.solve(budgets, told.refine, training.seed)
        self._describe(search, widths, budgets[0].unit if budgets else BIT_OPERATIONS)
        allocation = make_allocation(model.config, widths, costs, budgets, told.allocation_method)
        weights, activations = mean_bits(widths, costs)
        logger.info(f"{weights:.2f} bits a weight, {activations:.2f} bits an activation, in the mean:")
        for unit, cost in allocation.cost.items():
            logger.info(f"  {format_cost(unit, cost)}")
        results = {f"allocation_{unit}": cost for unit, cost in allocation.cost.items()}
        with writing("the bit allocation", self.folder):
            if PartialState().is_main_process:
                write_allocation(self.folder, allocation)
                draw_bits(widths, self.folder / BITS_PICTURE)
            self._write(results)
        return results

    def _measured_latency(self, full_precision: PreTrainedModel, config: QuantformerConfig) -> LatencyTable:
        """Times on this CPU, which are left in the folder."""
        told = self.arguments.allocation
        logger.info("measuring linears on this machine's CPU; --latency_table takes the table of another one")
        table = None
        if PartialState().is_main_process:
            settings = {name: getattr(config, name) for name in TIMED_SETTINGS}
            named = [budget for budget in told.budgets() if isinstance(budget, UniformBudget)]
            bits = {bits for b in named if b.unit == MILLISECONDS for bits in (b.weight_bits, b.activation_bits)}
            table = measure_latency(full_precision, tuple(sorted(bits.union(told.candidate_bits))), **settings)
            self.folder.mkdir(parents=True, exist_ok=True)
            table.write(self.folder / LATENCY_FILE)
        return broadcast_object_list([table])[0]

    def _describe(self, search: BudgetSearch, widths: Widths, unit: str) -> None:
        """Write what was measured, and the picture of the front."""
        chosen, front, uniform = search.point(widths), search.front(unit), search.uniform()
        if PartialState().is_main_process:
            measured = {"chosen": asdict(chosen), "front": [asdict(p) for p in front]}
            measured |= {"uniform": [asdict(p) for p in uniform], "losses": asdict(search.losses)}
            write_durably(self.folder / MEASURED_FILE, json.dumps(measured, indent=1))
            draw_front(front, uniform, chosen, unit, self.folder / FRONT_PICTURE)

    def _losses_by_gradient(
        self,
        model: QuantformerForImageClassification,
        teacher: PreTrainedModel,
        processor,
        data: ImageData,
        costs: CostModel,
    ) -> Losses:
        """How unlikely the mixtures of EdMIPS hold each width: the least sum has the likeliest ones."""
        told, training = self.arguments.allocation, self.arguments.training
        if training.max_steps <= 0:
            training.num_train_epochs = min(training.num_train_epochs, 1)
        if training.max_steps <= 0 and training.num_train_epochs <= 0:
            raise ValueError("edmips searches by training: give --allocate.max_steps, or --allocate.num_train_epochs 1")
        # The mixtures are not a model that anybody loads.
        training.save_strategy = SaveStrategy.NO
        training.load_best_model_at_end = False
        budgets = told.budgets()
        mixtures = WidthMixtures(model, costs.space)
        trainer = training_trainer(
            model,
            self.arguments,
            data,
            processor,
            kind=WidthSearchTrainer,
            teacher=teacher,
            mixtures=mixtures,
            cost=costs[budgets[0].unit if budgets else BIT_OPERATIONS],
            cost_weight=told.cost_weight,
            width_learning_rate=told.width_learning_rate,
        )
        epoch = math.ceil(trainer.images_per_epoch() / self.told["global_batch"])
        if training.max_steps > epoch:
            logger.warning(f"edmips searches for one epoch at most: {epoch} steps, and not {training.max_steps}")
            training.max_steps = epoch
        self._announce(trainer, teacher)
        trainer.train()
        return mixtures.losses()


def check_later_stages(run: RunArguments, stages: Sequence[str]) -> None:
    """Raise ValueError where a stage after `allocate` is told what would make another model of the allocation's.

    Args:
        run: what all stages are told.
        stages: that are to run, in order.
    """
    allocates = run.for_stage("allocate").model
    for stage in stages[stages.index("allocate") + 1 :]:
        told = run.for_stage(stage).model
        if told.layer_bits:
            raise ValueError(f"the stage 'allocate' chooses layer_bits: leave it out of the stage '{stage}'")
        for name in (*SETTINGS, *BACKBONE_SETTINGS):
            if getattr(told, name) != getattr(allocates, name):
                raise ValueError(
                    f"{name} is {getattr(told, name)} in the stage '{stage}' and {getattr(allocates, name)} in the stage"
                    f" 'allocate', whose budget would not hold: give it to all stages alike"
                )
