"""Mixed precision against uniform bits at equal cost, all finetuned alike by `run_quantformer.py`.

    OMP_NUM_THREADS=1 python benchmarks/mixed_precision.py --shared ../shared --steps 100 [--rows uniform_3 equal_bitops]
    OMP_NUM_THREADS=1 python benchmarks/mixed_precision.py --shared ../shared --preset ptq

Subject, images, seeds and finetuning are those of `accuracy.py imagenet`, row `ours` (with `--preset ptq` its row `ptq`,
without a training step). Budgets are what uniform 3 bits cost:

- `equal_bitops`, `equal_bytes`, `equal_both`, `equal_time`: the budgeted search under one budget, or under two at once;
  times are looked up in `latency.csv`, which is measured first;
- `refined`: the search under those BitOps, refined by `--refine` evaluations;
- `haq`: HAQ's agent under those BitOps, in `--episodes` evaluations (`pip install stable-baselines3`);
- `edmips`: the search by gradient descent in `--search_steps` steps, and its likeliest widths within those BitOps;
- `edmips_argmax`: the same search without a budget: the likeliest width of each tensor, at whatever cost that has.

Losses are measured once for all rows that search under budgets. Finished rows are kept in `--output_dir` and not repeated;
the table and the picture hold all of this preset and number of steps that are there. At the end the packed models of the
table are timed in turn, and beside each time is what the allocation stated.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from _machine import describe_machine, interleaved_medians
from accuracy import ROOT, ROWS, budget_flags, imagenet_flags, measure, run
from matplotlib.figure import Figure

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.arguments import RunArguments
from quantformer_hf.checkpoints import load_full_precision
from quantformer_hf.classifiers import load_classifier
from quantformer_hf.data import load_image_data
from quantformer_hf.images import calibration_batches, with_crop
from quantformer_hf.mixed_precision.allocation import make_allocation, write_allocation
from quantformer_hf.mixed_precision.allocation_file import ALLOCATION_FILE, BitAllocation
from quantformer_hf.mixed_precision.budget import BIT_OPERATIONS, BYTES, MILLISECONDS, Budget
from quantformer_hf.mixed_precision.budget_search import BudgetSearch
from quantformer_hf.mixed_precision.cost import CostModel, one_image
from quantformer_hf.mixed_precision.latency_table import LatencyTable
from quantformer_hf.mixed_precision.measure_latency import measure_latency
from quantformer_hf.mixed_precision.pictures import draw_bits, draw_front
from quantformer_hf.mixed_precision.search_space import SearchSpace
from quantformer_hf.report import format_table


#: Bits whose costs are the budgets.
REFERENCE_BITS = 3

UNIFORM = {"uniform_2": 2, "uniform_3": 3, "uniform_4": 4}

#: Units in which a row of the budgeted search costs no more than uniform `REFERENCE_BITS`.
BUDGETED = {
    "equal_bitops": (BIT_OPERATIONS,),
    "equal_bytes": (BYTES,),
    "equal_both": (BIT_OPERATIONS, BYTES),
    "equal_time": (MILLISECONDS,),
}

#: Searches by evaluating allocations, within those BitOps.
EVALUATED = ("refined", "haq")

#: Whether EdMIPS is held to those BitOps.
GRADIENT = {"edmips": True, "edmips_argmax": False}

ALL_ROWS = [*UNIFORM, *BUDGETED, *EVALUATED, *GRADIENT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--preset", choices=["lightning", "ptq"], default="lightning")
    parser.add_argument("--steps", type=int, default=100, help="of the finetuning")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--search_steps", type=int, default=30, help="of EdMIPS")
    parser.add_argument("--cost_weight", default="1e-3", help="of EdMIPS")
    parser.add_argument("--width_learning_rate", default="3e-2", help="of EdMIPS")
    parser.add_argument("--sensitivity_samples", type=int, default=32)
    parser.add_argument("--refine", type=int, default=100, help="evaluations of the row refined")
    parser.add_argument("--episodes", type=int, default=600, help="of HAQ's agent")
    parser.add_argument("--rows", nargs="+", choices=ALL_ROWS, default=ALL_ROWS)
    parser.add_argument("--rounds", type=int, default=30, help="runs of each packed model, of which the median counts")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "mixed_precision")
    arguments = parser.parse_args()
    folder = arguments.output_dir / (f"lightning_{arguments.steps}" if arguments.preset == "lightning" else "ptq")
    row_of_accuracy = "ours" if arguments.preset == "lightning" else "ptq"
    common = [*ROWS[row_of_accuracy], *budget_flags(row_of_accuracy, arguments), *imagenet_flags(arguments)]
    search = functools.cache(partial(Search.measured, arguments, common))
    for row in arguments.rows:
        path = folder / row
        if (path / "measured.json").exists():
            continue
        print(row, flush=True)
        if row in UNIFORM:
            bits = ["--bit_width", str(UNIFORM[row])]
        else:
            bits = ["--layer_bits", str(allocation_of(row, arguments, common, search))]
        flags = [*common, *bits, "--output_dir", str(path)]
        # Evaluated once, by measure(), and not after each stage.
        run([*flags, "--max_eval_samples", "16"])
        measured = measure(path, flags)
        measured["bytes"] = sum(file.stat().st_size for file in (path / "packed").glob("*.safetensors"))
        (path / "measured.json").write_text(json.dumps(measured))
    print(f"\n{describe_machine()}\n{folder.name}, batches of {arguments.batch_size}\n")
    print(table(folder, arguments))
    draw(folder)


def subject(arguments: argparse.Namespace, common: list[str]) -> tuple[QuantformerForImageClassification, Callable]:
    """The calibrated model, as a run makes it, and what gives calibration images."""
    told = RunArguments([*common, "--output_dir", "unused"]).for_stage("finetune")
    data = load_image_data(told.data, told.training.seed)
    full_precision, processor = load_classifier(told.model.model_name_or_path, data, told.model)
    batches = partial(
        calibration_batches,
        data,
        with_crop(processor, told.data.crop_pct),
        samples=told.data.calibration_samples,
        batch_size=told.training.per_device_eval_batch_size,
        seed=told.training.seed,
    )
    model = QuantformerForImageClassification.from_full_precision(full_precision, **told.model.quantization_arguments())
    return model.calibrate(batches(), told.model.centre_channels, told.model.rotate_channels), batches


def reference_budgets(costs: CostModel, units: tuple[str, ...]) -> list[Budget]:
    """What uniform `REFERENCE_BITS` cost."""
    uniform = costs.space.uniform(REFERENCE_BITS, REFERENCE_BITS)
    return [Budget(unit, costs[unit].total(uniform)) for unit in units]


@dataclass
class Search:
    """The budgeted search, with its losses measured.

    Attributes:
        seconds: spent on calibrating and measuring.
    """

    budgeted: BudgetSearch
    model: QuantformerForImageClassification
    seconds: dict[str, float]

    @classmethod
    def measured(cls, arguments: argparse.Namespace, common: list[str]) -> "Search":
        start = time.monotonic()
        model, batches = subject(arguments, common)
        calibrated = time.monotonic()
        costs = CostModel(model.config, SearchSpace.of(model.config), latencies(arguments))
        begin = time.monotonic()
        budgeted = BudgetSearch(model, batches(samples=arguments.sensitivity_samples), costs)
        return cls(budgeted, model, {"calibrate": calibrated - start, "measure": time.monotonic() - begin})


def latencies(arguments: argparse.Namespace) -> LatencyTable:
    """Times on this machine; measured if they are not there."""
    path = arguments.output_dir / "latency.csv"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        subject = arguments.shared / "models" / "vit_tiny_patch16_224"
        measure_latency(load_full_precision(str(subject)).model).write(path)
    return LatencyTable.read(path)


def allocation_of(row: str, arguments: argparse.Namespace, common: list[str], search: Callable[[], Search]) -> Path:
    """The allocation of a row; made, with its time in `seconds.json`, if it is not there."""
    folder = arguments.output_dir / "allocations" / row
    if not (folder / ALLOCATION_FILE).exists():
        if row in GRADIENT:
            allocate_by_gradient(row, arguments, common)
        else:
            allocate_within_budgets(row, arguments, search(), folder)
    return folder / ALLOCATION_FILE


def allocate_within_budgets(row: str, arguments: argparse.Namespace, search: Search, folder: Path) -> None:
    """Write the allocation, a picture of it and of the front, what it loses, and the time that it took."""
    budgeted = search.budgeted
    budgets = reference_budgets(budgeted.costs, BUDGETED.get(row, (BIT_OPERATIONS,)))
    begin = time.monotonic()
    seconds = dict(search.seconds)
    tried: list[float] = []
    if row == "haq":
        # An extra, of this row alone.
        from haq_agent import search_by_agent

        found = search_by_agent(
            budgeted.costs, budgets[0], lambda w: budgeted.divergence.of_widths(w)[0], arguments.episodes
        )
        widths, tried = found.best, found.losses
        # It needs no losses of single tensors.
        del seconds["measure"]
    else:
        widths = budgeted.solve(budgets, arguments.refine if row == "refined" else 0)
    seconds["solve"] = time.monotonic() - begin
    write_allocation(folder, make_allocation(search.model.config, widths, budgeted.costs, budgets, "budget"))
    chosen, uniform, front = budgeted.point(widths), budgeted.uniform(), budgeted.front(BIT_OPERATIONS)
    draw_bits(widths, folder / "bits.png")
    draw_front(front, uniform, chosen, BIT_OPERATIONS, folder / "front.png")
    points = {"chosen": asdict(chosen), "tried": tried}
    points |= {"uniform": [asdict(p) for p in uniform], "front": [asdict(p) for p in front]}
    (folder / "points.json").write_text(json.dumps(points, indent=1))
    (folder / "seconds.json").write_text(json.dumps(seconds))


def allocate_by_gradient(row: str, arguments: argparse.Namespace, common: list[str]) -> None:
    """EdMIPS by `run_quantformer.py --stages allocate`."""
    folder = arguments.output_dir / "allocations" / row
    flags = [*common, "--stages", "allocate", "--allocation_method", "edmips", "--output_dir", str(folder / "run")]
    flags += ["--allocate.max_steps", str(arguments.search_steps), "--cost_weight", arguments.cost_weight]
    flags += ["--width_learning_rate", arguments.width_learning_rate]
    if GRADIENT[row]:
        config = subject(arguments, common)[0].config
        (budget,) = reference_budgets(CostModel(config, SearchSpace.of(config)), (BIT_OPERATIONS,))
        flags += ["--budget", f"{budget.most:.0f}BitOps"]
    start = time.monotonic()
    run(flags)
    write_allocation(folder, BitAllocation.read(folder / "run" / "allocate" / ALLOCATION_FILE))
    (folder / "seconds.json").write_text(json.dumps({"search": time.monotonic() - start}))


def table(folder: Path, arguments: argparse.Namespace) -> str:
    """All rows of `folder`."""
    rows = [row for row in ALL_ROWS if (folder / row / "measured.json").exists()]
    timed = milliseconds([folder / row / "packed" for row in rows], arguments.rounds)
    lines = []
    for row, taken in zip(rows, timed, strict=True):
        found = json.loads((folder / row / "measured.json").read_text())
        allocation = arguments.output_dir / "allocations" / row
        seconds, stated = 0, None
        if (allocation / ALLOCATION_FILE).exists():
            seconds = sum(json.loads((allocation / "seconds.json").read_text()).values())
            stated = BitAllocation.read(allocation / ALLOCATION_FILE).cost.get(MILLISECONDS)
        lines.append(
            [
                row,
                f"{found['accuracy']:.1f}",
                f"{found['agreement']:.1f}",
                f"{found['bit_operations'] / 1e9:.2f} G",
                f"{found['bytes'] / 1e6:.3f} MB",
                f"{taken:.1f} ms",
                f"{stated:.1f} ms" if stated else "",
                f"{seconds:.0f} s" if seconds else "",
            ]
        )
    return format_table(["", "top-1", "agreement", "BitOps", "bytes", "timed", "stated", "time of the search"], lines)


@torch.inference_mode()
def milliseconds(folders: list[Path], rounds: int) -> list[float]:
    """Of each packed model, for one image."""
    models = {str(folder): QuantformerForImageClassification.from_pretrained(folder) for folder in folders}
    timed = {name: partial(model, one_image(model.config, "cpu")) for name, model in models.items()}
    return [1e3 * seconds for seconds in interleaved_medians(timed, rounds).values()]


def draw(folder: Path) -> None:
    """The picture of accuracy over BitOps, `folder/front.png`."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axis = figure.subplots()
    for rows, style, label in (
        (UNIFORM, "s--", "the same bits everywhere"),
        (BUDGETED, "o", "budgeted search"),
        (EVALUATED, "d", "by evaluations"),
        (GRADIENT, "^", "EdMIPS"),
    ):
        paths = [(row, folder / row / "measured.json") for row in rows]
        found = [(row, json.loads(path.read_text())) for row, path in paths if path.exists()]
        if not found:
            continue
        axis.plot([m["bit_operations"] / 1e9 for _, m in found], [m["accuracy"] for _, m in found], style, label=label)
        for row, measured in found:
            at = measured["bit_operations"] / 1e9, measured["accuracy"]
            axis.annotate(row, at, textcoords="offset points", xytext=(5, -12))
    axis.set_xlabel("effort, GBitOps")
    axis.set_ylabel("top-1 accuracy, %")
    if axis.lines:
        axis.legend()
        figure.savefig(folder / "front.png", dpi=150)


if __name__ == "__main__":
    main()
