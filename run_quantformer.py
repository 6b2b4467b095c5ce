#!/usr/bin/env python
"""Quantize a vision transformer: `python run_quantformer.py configs/quickstart.yaml`, or under `accelerate launch`.

Runs one stage or several; each leaves a loadable model in `<output_dir>/<stage>/`. The same command typed again after an
interruption goes on where it stopped.
"""

import json
import sys
from dataclasses import replace
from logging import INFO, basicConfig, getLogger
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForImageClassification, pipeline
from transformers.utils import logging

from quantformer_hf.arguments import PUSH_ARGUMENTS, RunArguments, StageArguments
from quantformer_hf.bad_images import decode
from quantformer_hf.checkpointing import check_writable, writing
from quantformer_hf.classifiers import is_quantized, load_classifier
from quantformer_hf.configuration_quantformer import QUANTIZATION_ARGUMENTS, QuantformerConfig
from quantformer_hf.data import first, load_image_data
from quantformer_hf.destination import Destination
from quantformer_hf.images import undecoded, with_crop
from quantformer_hf.layer_bits import check_same_quantization
from quantformer_hf.mixed_precision.allocation_file import ALLOCATION_FILE
from quantformer_hf.mixed_precision.budget import format_cost
from quantformer_hf.mixed_precision.stage import AllocationStage, check_later_stages
from quantformer_hf.modeling_quantformer import StageError, build_backbone
from quantformer_hf.pretrained import QuantformerPreTrainedModel
from quantformer_hf.report import format_table, megabytes, weights_on_disk
from quantformer_hf.run_history import history_in
from quantformer_hf.stage_folders import PACKED_FOLDER, check_nothing_needed_is_deleted
from quantformer_hf.stage_trainer import evaluating_trainer
from quantformer_hf.stages import StageRun


#: Held-out images that the end of a run classifies through `pipeline`.
SHOWN_IMAGES = 5

#: In the order of the table.
ACCURACIES = ("full_precision", "pretrain", "search", "frozen", "finetune", "reloaded")


def main() -> None:
    run_stages()
    # A process that leaves while the others still talk to it, or with its group open, may abort on its way out.
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def run_stages() -> None:
    """What the command line asks for."""
    run = RunArguments()
    arguments = run.for_stage(None)
    destination = Destination.of(arguments.training)
    # The last model is pushed, by this script: Trainer would push those of all stages, one over the other.
    run.common = {name: value for name, value in run.common.items() if name not in PUSH_ARGUMENTS}
    arguments = run.for_stage(None)
    if destination is not None and arguments.model.stages[-1:] in ([], ["allocate"]):
        raise ValueError("push_to_hub pushes the model of the last stage, and this run makes none: leave it out")
    output_dir = Path(arguments.training.output_dir)
    check_writable(output_dir)
    if arguments.training.disable_tqdm:
        logging.disable_progress_bar()
    # What a later stage cannot be told is known before the first one runs.
    for stage in arguments.model.stages:
        run.for_stage(stage).model.check_quantization()
    if not arguments.model.stages:
        evaluate_only(arguments)
        return
    for warning in without_effect(run, arguments.model.stages):
        getLogger("quantformer_hf").warning(warning)
    if arguments.model.overwrite_output_dir:
        check_nothing_needed_is_deleted(run, arguments.model.stages, output_dir)
    if "allocate" in arguments.model.stages:
        check_later_stages(run, arguments.model.stages)
    elif arguments.allocation.budget and arguments.model.layer_bits is None:
        raise ValueError(
            f"budget is {' '.join(arguments.allocation.budget)}, and the stage 'allocate', which keeps to it, is not among"
            f" the stages ({', '.join(arguments.model.stages)}): add it to --stages, or leave out --budget"
        )
    elif arguments.allocation.budget:
        getLogger("quantformer_hf").warning("--budget is for the stage 'allocate': --layer_bits is taken as it is")
    if destination is not None and PartialState().is_main_process:
        destination = destination.created()
    source = arguments.model.model_name_or_path
    # Of the stages that an earlier command ran.
    results = {name: value for record in history_in(source) for name, value in record["results"].items()}
    for stage in arguments.model.stages:
        kind = AllocationStage if stage == "allocate" else StageRun
        stage_run = kind(run.for_stage(stage), source, output_dir)
        results |= stage_run.run()
        if stage == "allocate":
            # The later stages start from the same checkpoint, with the bits that were found.
            run.common["layer_bits"] = str(stage_run.folder / ALLOCATION_FILE)
        else:
            source = str(stage_run.folder)
    if stage == "allocate":
        print_allocation(
            {name: cost for name, cost in results.items() if name.startswith("allocation_")}, stage_run.folder
        )
        return
    if stage == "finetune":
        source = write_packed(source, output_dir / PACKED_FOLDER)
    results["reloaded_accuracy"] = evaluate_checkpoint(source, run.for_stage(stage))["eval_accuracy"]
    if PartialState().is_main_process:
        (output_dir / "all_results.json").write_text(json.dumps(results, indent=1))
        print_report(results, output_dir, source)
        show_predictions(source, run.for_stage(stage))
        if destination is not None:
            destination.push(source)
            print(f"It is {destination.name} on the hub")


def without_effect(run: RunArguments, stages: list[str]) -> list[str]:
    """Warnings of flags that say nothing to any of `stages`, which are to run."""
    warnings = [
        f"flags that begin with --{stage}. are without effect: the stage is not among those that run ({', '.join(stages)})"
        for stage in run.flagged
        if stage not in stages
    ]
    if "allocate" in stages:
        told = [name for name in ("bit_width", "weight_bits", "activation_bits") if name in run.typed["allocate"]]
        warnings += [f"--{name} is not what the blocks get: the stage 'allocate' chooses their bits" for name in told]
    return warnings


def print_allocation(costs: dict[str, float], folder: Path) -> None:
    """What an allocation costs, where nothing follows it."""
    if PartialState().is_main_process:
        rows = [[format_cost(name.removeprefix("allocation_"), cost)] for name, cost in costs.items()]
        print("\n" + format_table(["the packed model will cost"], rows))
        print(f"\nThe bits are in {folder / ALLOCATION_FILE}: --layer_bits takes it")


def write_packed(source: str, folder: Path) -> str:
    """The model of `source` as integer codes in `folder`: what is shared and run. Returns `folder`."""
    if PartialState().is_main_process:
        model = AutoModelForImageClassification.from_pretrained(source)
        with writing("the packed model", folder):
            model.pack().save_pretrained(folder)
    PartialState().wait_for_everyone()
    return str(folder)


def evaluate_only(arguments: StageArguments) -> None:
    """`--stages` without a stage and `--do_eval`: the accuracy of `--model_name_or_path`, written and printed."""
    if not arguments.training.do_eval or arguments.model.model_name_or_path is None:
        raise ValueError("no stage to run: name some in --stages, or give --do_eval with --model_name_or_path")
    name, asked = arguments.model.model_name_or_path, sorted(arguments.typed & set(QUANTIZATION_ARGUMENTS))
    results = evaluate_checkpoint(name, arguments)
    if asked and not is_quantized(name):
        getLogger("quantformer_hf").warning(
            f"{name} was evaluated as it is, in full precision, without {', '.join(asked)}"
        )
    if PartialState().is_main_process:
        output_dir = Path(arguments.training.output_dir)
        (output_dir / "eval_results.json").write_text(json.dumps(results, indent=1))
        for name, value in results.items():
            print(f"{name.removeprefix('eval_').replace('_', ' ')} {100 * value:.2f} %")


def evaluate_checkpoint(name: str, arguments: StageArguments) -> dict[str, float]:
    """Load `name` as any user would and return its top-1 and top-5 accuracy on the validation images."""
    data = load_image_data(arguments.data, arguments.training.seed)
    # A new classifier would have learnt nothing.
    model, processor, data = load_classifier(name, data, replace(arguments.model, ignore_mismatched_sizes=False))
    if isinstance(model, QuantformerPreTrainedModel):
        check_same_quantization(model.backbone, model.config, arguments.typed_quantization(), name)
    trainer = evaluating_trainer(model, arguments.training, data, with_crop(processor, arguments.data.crop_pct))
    return {name: value for name, value in trainer.evaluate().items() if name.endswith("accuracy")}


def print_report(results: dict[str, float], output_dir: Path, final: str) -> None:
    """A table of the accuracy after each stage, and the sizes."""
    rows = []
    for name in ACCURACIES:
        if f"{name}_accuracy" in results:
            folder = Path(final) if name == "reloaded" else output_dir / name
            size = megabytes(weights_on_disk(folder)) if folder.exists() else ""
            rows.append([name.replace("_", " "), f"{100 * results[f'{name}_accuracy']:.2f} %", size])
    print("\n" + format_table(["after stage", "accuracy", "on disk"], rows))
    config = AutoConfig.from_pretrained(final)
    if isinstance(config, QuantformerConfig):
        with torch.device("meta"):
            full = 4 * sum(parameter.numel() for parameter in build_backbone(config.backbone_config).parameters())
        size = weights_on_disk(Path(final))
        bits = "mixed precision" if config.layer_bits else f"W{config.weight_bits}A{config.activation_bits}"
        print(
            f"\n{bits}, {config.stage}: {megabytes(size)} on disk, and"
            f" {megabytes(full)} in float32: 1/{full / size:.1f}"
        )


def show_predictions(name: str, arguments: StageArguments) -> None:
    """Classify a few held-out images the way a user of transformers does."""
    data = load_image_data(arguments.data, arguments.training.seed)
    classify = pipeline("image-classification", model=name)
    examples = [
        (image, row[data.label_column])
        for row in first(undecoded(data.validation, data), SHOWN_IMAGES)
        if (image := decode(row[data.image_column])) is not None
    ]
    rows = [
        [str(i), data.label_names[label], f"{best[0]['label']} ({100 * best[0]['score']:.0f} %)"]
        for i, ((_, label), best) in enumerate(
            zip(examples, classify([image for image, _ in examples], top_k=1), strict=True)
        )
    ]
    print("\n" + format_table(["held-out image", "label", "pipeline says"], rows))
    print(f"\nThe model is in {name}")


if __name__ == "__main__":
    # The bars of the training stay; those of saving and loading files would tear them.
    logging.disable_progress_bar()
    if PartialState().is_main_process:
        basicConfig(format="%(message)s")
        getLogger("quantformer_hf").setLevel(INFO)
    try:
        main()
    except (ValueError, OSError, ImportError, FloatingPointError, StageError) as error:
        # Bad input: the message says the way out, and a traceback would bury it.
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the newest checkpoint of its stage", file=sys.stderr)
        # As shells tell of SIGINT.
        sys.exit(130)
