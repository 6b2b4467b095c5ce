"""The stage `allocate` of a run: it leaves `bit_allocation.json` and pictures, and later stages use those bits."""

import json
import logging
from dataclasses import asdict

from accelerate import PartialState
from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import SaveStrategy

from ..augmentation import Collator
from ..checkpointing import write_durably, writing
from ..data import ImageData, load_image_data
from ..grids import FULL_PRECISION_BITS
from ..modeling_quantformer import QuantformerForImageClassification
from ..stages import StageRun, images_to_train_on, make_trainer
from .allocation import make_allocation, mean_bits, write_allocation
from .budget import BIT_OPERATIONS, format_cost
from .budget_search import BudgetSearch, check_budgets, check_refinement
from .cost import CostModel
from .latency_table import LatencyTable
from .pictures import BITS_PICTURE, FRONT_PICTURE, draw_bits, draw_front
from .search_space import SearchSpace, Widths
from .solver import AllocationProblem
from .width_mixture import WidthMixtures
from .width_search import WidthSearchTrainer


logger = logging.getLogger(__name__)

#: Beside the allocation: what was measured to find it.
MEASURED_FILE = "measured.json"


class AllocationStage(StageRun):
    """Gives each layer its bits, from a full-precision checkpoint. Interrupted, it begins anew.

    Arguments as in `StageRun`.
    """

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
            raise ValueError("the stage 'allocate' needs a budget: give --budget 2.5MB, 30ms, 20GBitOps, or several")
        check_refinement(told.refine)
        table = LatencyTable.read(told.latency_table) if told.latency_table else None
        training = self.arguments.training
        training.output_dir = str(self.folder)
        set_seed(training.seed)
        data = load_image_data(self.arguments.data, training.seed)
        if data.train is None:
            raise ValueError(f"the data set has no split {self.arguments.data.train_split!r}: name one by train_split")
        model, teacher, processor = self._build_model(data)
        space = SearchSpace.of(model.config, told.candidate_bits)
        costs = CostModel(model.config, space, table)
        check_budgets(costs, budgets)
        self._write(None)
        if told.allocation_method == "edmips":
            widths = self._search_by_gradient(model, teacher, processor, data, costs)
        else:
            widths = self._search_under_budget(model, processor, data, costs)
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

    def _search_under_budget(
        self, model: QuantformerForImageClassification, processor, data: ImageData, costs: CostModel
    ) -> Widths:
        told = self.arguments.allocation
        images = self._calibration_batches(data, processor)(samples=told.sensitivity_samples)
        search = BudgetSearch(model, images, costs)
        budgets = told.budgets()
        widths = search.solve(budgets, told.refine, self.arguments.training.seed)
        unit = budgets[0].unit
        chosen, front, uniform = search.point(widths), search.front(unit), search.uniform()
        if PartialState().is_main_process:
            measured = {"chosen": asdict(chosen), "front": [asdict(p) for p in front]}
            measured |= {"uniform": [asdict(p) for p in uniform], "losses": asdict(search.losses)}
            write_durably(self.folder / MEASURED_FILE, json.dumps(measured, indent=1))
            draw_front(front, uniform, chosen, unit, self.folder / FRONT_PICTURE)
        return widths

    def _search_by_gradient(
        self,
        model: QuantformerForImageClassification,
        teacher: PreTrainedModel,
        processor,
        data: ImageData,
        costs: CostModel,
    ) -> Widths:
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
        trainer = make_trainer(
            model,
            training,
            data,
            processor,
            kind=WidthSearchTrainer,
            teacher=teacher,
            train_dataset=images_to_train_on(data, processor, self.arguments),
            data_collator=Collator(
                model.config.num_labels,
                self.arguments.data.mixup,
                self.arguments.data.cutmix,
                training.label_smoothing_factor,
            ),
            mixtures=mixtures,
            cost=costs[budgets[0].unit if budgets else BIT_OPERATIONS],
            cost_weight=told.cost_weight,
            width_learning_rate=told.width_learning_rate,
        )
        self._announce(trainer, teacher)
        trainer.train()
        if PartialState().is_main_process:
            write_durably(self.folder / MEASURED_FILE, json.dumps({"losses": asdict(mixtures.losses())}, indent=1))
        # The most probable widths, and under a budget the most probable ones that keep it.
        return AllocationProblem(mixtures.losses(), costs).solve(budgets)
