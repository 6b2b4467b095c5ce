"""Mixed precision against uniform bits at equal cost, all finetuned alike by `run_quantformer.py`.

    OMP_NUM_THREADS=1 python benchmarks/mixed_precision.py --shared ../shared --steps 100 [--rows uniform_3 equal_bitops]
    OMP_NUM_THREADS=1 python benchmarks/mixed_precision.py --shared ../shared --preset ptq

Subject, images, seed 0 and finetuning are those of `accuracy.py imagenet`, row `ours` (with `--preset ptq` its row `ptq`,
without a training step). Budgets are what uniform 3 bits cost:

- `equal_bitops`, `equal_bytes`, `equal_both`, `equal_time`: the budgeted search under one budget, or under two at once;
  times are looked up in `latency.csv`, which is measured first;
- `refined`: the search under those BitOps, refined by `--refine` evaluations;
- `haq`: HAQ's agent under those BitOps, in `--episodes` evaluations (`pip install stable_baselines3`);
- `edmips`: the search by gradient descent in `--search_steps` steps, and its likeliest widths within those BitOps;
- `edmips_argmax`: the same search without a budget: the likeliest width of each tensor, at whatever cost that has.

Losses are measured once for all rows that search under budgets. Finished rows and allocations are kept in `--output_dir`
and not repeated, nor taken for those of other flags; an allocation is that of a preset, for any number of steps. The table
and the picture hold all of this preset and number of steps that are there. At the end the packed models of the
table are timed in turn, and beside each time is what the allocation stated.
"""

import argparse
import functools
import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from _arguments import SHARED, positive, shared_folder
from _kept import by_name, keep_told, refuse_other
from _machine import describe_machine, interleaved_medians
from accuracy import IMAGENETTE_STEPS, RESULT, ROOT, ROWS, budget_flags, imagenet_flags, measure, run
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

#: Searches by evaluating allocations, within those BitOps: the package that each needs.
EVALUATED = {"refined": "optuna", "haq": "stable_baselines3"}

#: Whether EdMIPS is held to those BitOps.
GRADIENT = {"edmips": True, "edmips_argmax": False}

ALL_ROWS = [*UNIFORM, *BUDGETED, *EVALUATED, *GRADIENT]

#: The flags on which the allocation of a row depends.
SEARCH_FLAGS = {
    **dict.fromkeys(BUDGETED, ("sensitivity_samples",)),
    "refined": ("sensitivity_samples", "refine"),
    "haq": ("sensitivity_samples", "episodes"),
    **dict.fromkeys(GRADIENT, ("batch_size", "search_steps", "cost_weight", "width_learning_rate")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=shared_folder, default=SHARED)
    parser.add_argument("--preset", choices=["lightning", "ptq"], default="lightning")
    parser.add_argument("--steps", type=positive, default=100, help="of the finetuning")
    parser.add_argument("--batch_size", type=positive, default=16)
    parser.add_argument("--search_steps", type=positive, default=30, help="of EdMIPS")
    parser.add_argument("--cost_weight", default="1e-3", help="of EdMIPS")
    parser.add_argument("--width_learning_rate", default="3e-2", help="of EdMIPS")
    parser.add_argument("--sensitivity_samples", type=positive, default=32)
    parser.add_argument("--refine", type=positive, default=100, help="evaluations of the row refined")
    parser.add_argument("--episodes", type=positive, default=600, help="of HAQ's agent")
    parser.add_argument("--rows", nargs="+", choices=ALL_ROWS, default=ALL_ROWS)
    parser.add_argument(
        "--rounds", type=positive, default=30, help="runs of each packed model, of which the median counts"
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "mixed_precision")
    arguments = parser.parse_args()
    folder = arguments.output_dir / (f"lightning_{arguments.steps}" if arguments.preset == "lightning" else "ptq")
    row_of_accuracy = "ours" if arguments.preset == "lightning" else "ptq"
    common = [*ROWS[row_of_accuracy], *budget_flags(row_of_accuracy, arguments), *imagenet_flags(arguments)]
    common += ["--seed", "0"]
    search = functools.cache(partial(Search.measured, arguments, common))
    bits = {row: ["--bit_width", str(width)] for row, width in UNIFORM.items()}
    told = {row: told_to_search(row, arguments) | by_name([*common, *bits.get(row, [])]) for row in arguments.rows}
    left = [row for row in arguments.rows if not (folder / row / RESULT).exists()]
    # Before the first row: it may take an hour.
    for row in arguments.rows:
        allocation, package = allocation_file(row, arguments), EVALUATED.get(row)
        refuse_other(folder / row / RESULT, told[row])
        refuse_other(allocation, told_to_search(row, arguments))
        if package and row in left and not allocation.exists() and importlib.util.find_spec(package) is None:
            parser.error(f"row {row} needs {package}: pip install {package}, or leave the row out by --rows")
    for row in left:
        path = folder / row
        print(row, flush=True)
        if row not in UNIFORM:
            bits[row] = ["--layer_bits", str(allocation_of(row, arguments, common, search))]
        flags = [*common, *bits[row], "--output_dir", str(path)]
        # Evaluated once, by measure(), and not after each stage.
        run([*flags, "--max_eval_samples", "16"])
        keep_told(path / RESULT, told[row])
        measured = measure(path, flags)
        measured["bytes"] = sum(file.stat().st_size for file in (path / "packed").glob("*.safetensors"))
        (path / RESULT).write_text(json.dumps(measured))
    print(f"\n{describe_machine()}\n{folder.name}, batches of {arguments.batch_size}\n")
    print(table(folder, arguments))
    draw(folder)


def subject(arguments: argparse.Namespace, common: list[str]) -> tuple[QuantformerForImageClassification, Callable]:
    """The calibrated model, as a run makes it, and what gives calibration images."""
    told = RunArguments([*common, "--output_dir", "unused"]).for_stage("finetune")
    data = load_image_data(told.data, told.training.seed)
    full_precision, processor, data = load_classifier(told.model.model_name_or_path, data, told.model)
    batches = partial(
        calibration_batches,
        data,
        with_crop(processor, told.data.crop_pct),
        samples=told.data.calibration_samples,
        batch_size=told.training.per_device_eval_batch_size,
        seed=told.training.seed,
        balance_classes=told.training.balance_classes,
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


def allocation_file(row: str, arguments: argparse.Namespace) -> Path:
    """One of the preset, whatever number of steps it is then finetuned for."""
    return arguments.output_dir / "allocations" / arguments.preset / row / ALLOCATION_FILE


def told_to_search(row: str, arguments: argparse.Namespace) -> dict[str, str]:
    """The flags on which the allocation of a row depends; of the steps, whether they bring imagenette with them."""
    if row in UNIFORM:
        return {}
    told = {f"--{name}": str(getattr(arguments, name)) for name in SEARCH_FLAGS[row]}
    return told | {"--steps": f"{'from' if arguments.steps >= IMAGENETTE_STEPS else 'below'} {IMAGENETTE_STEPS}"}


def allocation_of(row: str, arguments: argparse.Namespace, common: list[str], search: Callable[[], Search]) -> Path:
    """The allocation of a row; made, with its time in `seconds.json`, if it is not there."""
    path = allocation_file(row, arguments)
    if not path.exists():
        keep_told(path, told_to_search(row, arguments))
        if row in GRADIENT:
            allocate_by_gradient(row, arguments, common, path.parent)
        else:
            allocate_within_budgets(row, arguments, search(), path.parent)
    return path


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


def allocate_by_gradient(row: str, arguments: argparse.Namespace, common: list[str], folder: Path) -> None:
    """EdMIPS by `run_quantformer.py --stages allocate`."""
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
    rows = [row for row in ALL_ROWS if (folder / row / RESULT).exists()]
    timed = milliseconds([folder / row / "packed" for row in rows], arguments.rounds)
    lines = []
    for row, taken in zip(rows, timed, strict=True):
        found = json.loads((folder / row / RESULT).read_text())
        allocation = allocation_file(row, arguments)
        seconds, stated = 0, None
        if allocation.exists():
            seconds = sum(json.loads((allocation.parent / "seconds.json").read_text()).values())
            stated = BitAllocation.read(allocation).cost.get(MILLISECONDS)
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
        paths = [(row, folder / row / RESULT) for row in rows]
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
