"""Mixed precision against uniform bits at equal cost, all finetuned alike by `run_quantformer.py`.

    OMP_NUM_THREADS=1 python benchmarks/mixed_precision.py --shared ../shared --steps 100 [--rows uniform_3 equal_bitops]
    OMP_NUM_THREADS=1 python benchmarks/mixed_precision.py --shared ../shared --preset ptq

Subject, images, seeds and finetuning are those of `accuracy.py imagenet`, row `ours` (with `--preset ptq` its row `ptq`,
without a training step). Budgets are what uniform 3 bits cost:

- `equal_bitops`, `equal_bytes`, `equal_both`: the budgeted search under one budget, or under both at once;
- `edmips`: the search by gradient descent in `--search_steps` steps, and its likeliest widths within those BitOps;
- `edmips_argmax`: the same search without a budget: the likeliest width of each tensor, at whatever cost that has.

The budgeted search measures its losses once for all budgets. Finished rows are kept in `--output_dir` and not repeated; the
table and the picture hold all of this preset and number of steps that are there.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from _machine import describe_machine
from accuracy import ROOT, ROWS, budget_flags, imagenet_flags, measure, run
from matplotlib.figure import Figure

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.arguments import RunArguments
from quantformer_hf.data import load_image_data
from quantformer_hf.images import calibration_batches, with_crop
from quantformer_hf.mixed_precision.allocation import make_allocation, write_allocation
from quantformer_hf.mixed_precision.allocation_file import ALLOCATION_FILE, BitAllocation
from quantformer_hf.mixed_precision.budget import BIT_OPERATIONS, BYTES, Budget
from quantformer_hf.mixed_precision.budget_search import BudgetSearch
from quantformer_hf.mixed_precision.cost import CostModel
from quantformer_hf.mixed_precision.pictures import draw_bits, draw_front
from quantformer_hf.mixed_precision.search_space import SearchSpace
from quantformer_hf.report import format_table
from quantformer_hf.stages import load_classifier


#: Bits whose costs are the budgets.
REFERENCE_BITS = 3

UNIFORM = {"uniform_2": 2, "uniform_3": 3, "uniform_4": 4}

#: Units in which a row of the budgeted search costs no more than uniform `REFERENCE_BITS`.
BUDGETED = {
    "equal_bitops": (BIT_OPERATIONS,),
    "equal_bytes": (BYTES,),
    "equal_both": (BIT_OPERATIONS, BYTES),
}

#: Whether EdMIPS is held to those BitOps.
GRADIENT = {"edmips": True, "edmips_argmax": False}


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
    parser.add_argument("--refine", type=int, default=0)
    parser.add_argument("--rows", nargs="+", choices=[*UNIFORM, *BUDGETED, *GRADIENT], default=None)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "mixed_precision")
    arguments = parser.parse_args()
    rows = arguments.rows or [*UNIFORM, *BUDGETED, *GRADIENT]
    folder = arguments.output_dir / (f"lightning_{arguments.steps}" if arguments.preset == "lightning" else "ptq")
    row_of_accuracy = "ours" if arguments.preset == "lightning" else "ptq"
    common = [*ROWS[row_of_accuracy], *budget_flags(row_of_accuracy, arguments), *imagenet_flags(arguments)]
    for row in rows:
        path = folder / row
        if (path / "measured.json").exists():
            continue
        print(row, flush=True)
        if row in UNIFORM:
            bits = ["--bit_width", str(UNIFORM[row])]
        else:
            bits = ["--layer_bits", str(allocation_of(row, arguments, common))]
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


def allocation_of(row: str, arguments: argparse.Namespace, common: list[str]) -> Path:
    """The allocation of a row; made, with its time in `seconds.json`, if it is not there."""
    path = arguments.output_dir / "allocations" / row / ALLOCATION_FILE
    if not path.exists():
        (allocate_under_budgets if row in BUDGETED else allocate_by_gradient)(row, arguments, common)
    return path


def allocate_under_budgets(row: str, arguments: argparse.Namespace, common: list[str]) -> None:
    """Measure once, and write the allocations of all rows of `BUDGETED`, with a picture of each and of the front."""
    start = time.monotonic()
    model, batches = subject(arguments, common)
    calibrated = time.monotonic()
    costs = CostModel(model.config, SearchSpace.of(model.config))
    search = BudgetSearch(model, batches(samples=arguments.sensitivity_samples), costs)
    measured = time.monotonic()
    uniform, front = search.uniform(), search.front(BIT_OPERATIONS)
    for name, units in BUDGETED.items():
        folder = arguments.output_dir / "allocations" / name
        budgets = reference_budgets(costs, units)
        begin = time.monotonic()
        widths = search.solve(budgets, arguments.refine)
        solved = time.monotonic()
        write_allocation(folder, make_allocation(model.config, widths, costs, budgets, "budget"))
        chosen = search.point(widths)
        draw_bits(widths, folder / "bits.png")
        draw_front(front, uniform, chosen, BIT_OPERATIONS, folder / "front.png")
        points = {
            "chosen": asdict(chosen),
            "uniform": [asdict(p) for p in uniform],
            "front": [asdict(p) for p in front],
        }
        (folder / "points.json").write_text(json.dumps(points, indent=1))
        seconds = {"calibrate": calibrated - start, "measure": measured - calibrated, "solve": solved - begin}
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
    lines = []
    for row in (*UNIFORM, *BUDGETED, *GRADIENT):
        path = folder / row / "measured.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        seconds = arguments.output_dir / "allocations" / row / "seconds.json"
        spent = sum(json.loads(seconds.read_text()).values()) if seconds.exists() else 0
        lines.append(
            [
                row,
                f"{found['accuracy']:.1f}",
                f"{found['agreement']:.1f}",
                f"{found['bit_operations'] / 1e9:.2f} G",
                f"{found['bytes'] / 1e6:.3f} MB",
                f"{spent:.0f} s" if spent else "",
            ]
        )
    return format_table(["", "top-1", "agreement", "BitOps", "bytes", "time of the search"], lines)


def draw(folder: Path) -> None:
    """The picture of accuracy over BitOps, `folder/front.png`."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axis = figure.subplots()
    for rows, style, label in (
        (UNIFORM, "s--", "the same bits everywhere"),
        (BUDGETED, "o", "budgeted search"),
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
