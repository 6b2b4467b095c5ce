"""Accuracy of the method, its parts and plain LSQ, all by `run_quantformer.py` from one full-precision checkpoint.

    python benchmarks/accuracy.py imagenet --shared ../shared --steps 100 [--bits 4 3 2] [--rows ours lsq_distilled]
    python benchmarks/accuracy.py cifar10 --shared ../shared --steps 300 [--seeds 0 1 2] [--backbone pretrained]

Subject `imagenet`: the ViT-Tiny of `models/`, calibrated and trained on `data/imagenet-sample` (with `imagenette` too from
1,000 steps on), evaluated on `data/imagenet-val650`. Subject `cifar10`: a small ViT or Swin that is trained here first, on
`--train_samples` images, or (`--backbone pretrained`) the same ViT-Tiny, finetuned on them at 96 px. Each row starts from
the same checkpoint, with the same images in the same order, the same augmentation and number of steps. Finished runs are
kept in `--output_dir` and not repeated, so that a longer list of rows can be typed later, nor taken for those of other
flags; the table holds all of this subject and number of steps that are there. Beside top-1 stand the share of full
precision's classes that are kept and the mean KL divergence from its predictions: both are paired, and tell rows apart that
top-1 cannot. Levels are those of all tokens but a class token with a quantizer of its own.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from _arguments import SHARED, positive, shared_folder
from _kept import by_name, keep_told, refuse_other
from _machine import describe_machine
from transformers import AutoModelForImageClassification, PreTrainedModel

from quantformer_hf.arguments import RunArguments
from quantformer_hf.attention import ATTENTION_IMPLEMENTATION
from quantformer_hf.classifiers import load_classifier
from quantformer_hf.data import load_image_data
from quantformer_hf.images import TransformedImages, with_crop
from quantformer_hf.losses import logit_distillation
from quantformer_hf.quantize import group_quantizers
from quantformer_hf.report import bit_operations, distinct_levels, format_table


ROOT = Path(__file__).parents[1]

#: What is measured of a finished run, in its folder.
RESULT = "measured.json"

#: Share of the steps that the search has.
SEARCH_SHARE = 0.3

#: From so many steps on, the training images are imagenette's too.
IMAGENETTE_STEPS = 1000

#: Smallest share of an image in a random crop, for every row. With so few steps, crops like the evaluation's teach most.
CROP_SCALE = "0.7"

#: LSQ, from the weights as they are, at the learning rate that suited it better than those of ours.
PLAIN = [
    *("--preset", "lightning", "--centre_channels", "False", "--rotate_channels", "False"),
    *("--reconstruction_samples", "0", "--feature_weight", "0", "--aux_weight", "0", "--block_gradient_scale", "1"),
    *("--learning_rate", "2e-4", "--scale_learning_rate", "2e-5", "--learning_rate_per_bit", "1"),
    *("--weight_quantizer", "lsq"),
]
ONE_GROUP = ["--stages", "pretrain"]
#: Inputs of the class token at the bits of patch embedding and classifier.
CLASS_TOKEN = ["--class_token_bits", "8"]
#: Attention maps held to the teacher's.
ATTENTION = ["--aux_weight", "1"]
SEARCHED = ["--preset", "lightning", "--stages", "search", "finetune", *ATTENTION]

#: For 1,000 steps on a thousand images, which the preset's rates learn by heart at four bits.
HALF_RATES = ["--learning_rate", "5e-5", "--scale_learning_rate", "5e-6", "--warmup_steps", "50"]

#: What each row tells `run_quantformer.py`.
ROWS = {
    "ptq_one_group": ["--preset", "ptq", "--stages", "pretrain"],
    "ptq": ["--preset", "ptq"],
    "ptq_class_token": ["--preset", "ptq", *CLASS_TOKEN],
    "lsq": [*PLAIN, *ONE_GROUP, "--task_weight", "1", "--distillation_weight", "0"],
    "lsq_distilled": [*PLAIN, *ONE_GROUP],
    "lsq_distilled_class_token": [*PLAIN, *ONE_GROUP, *CLASS_TOKEN],
    "ours": ["--preset", "lightning"],
    "ours_class_token": ["--preset", "lightning", *CLASS_TOKEN],
    "ours_half_rates": ["--preset", "lightning", *HALF_RATES],
    "ours_class_token_half_rates": ["--preset", "lightning", *HALF_RATES, *CLASS_TOKEN],
    "best": ["--preset", "best"],
    "best_class_token": ["--preset", "best", *CLASS_TOKEN],
    "ours_one_group": ["--preset", "lightning", *ONE_GROUP],
    "ours_attention": ["--preset", "lightning", *ATTENTION],
    "ours_fixed_degree": ["--preset", "lightning", *ATTENTION, "--pnorm", "2"],
    "ours_even_levels": ["--preset", "lightning", "--twin_levels", "False"],
    "ours_no_features": ["--preset", "lightning", "--feature_weight", "0"],
    "ours_not_centred": ["--preset", "lightning", "--centre_channels", "False"],
    "ours_rotated": ["--preset", "lightning", "--rotate_channels", "True"],
    "ours_not_rotated": ["--preset", "lightning", "--rotate_channels", "False"],
    "ours_not_reconstructed": ["--preset", "lightning", "--reconstruction_samples", "0"],
    "ours_not_damped": ["--preset", "lightning", "--block_gradient_scale", "1"],
    "ours_searched": [*SEARCHED],
    "ours_searched_no_attention": [*SEARCHED, "--aux_weight", "0"],
    "ours_searched_no_entropy": [*SEARCHED, "--search.dm_weight", "0"],
}

#: Architectures of subject `cifar10` that are trained from nothing: 32 px, for a run on two cores.
CIFAR_BACKBONES = {
    "vit": {
        "model_type": "vit",
        "image_size": 32,
        "patch_size": 4,
        "hidden_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "intermediate_size": 384,
    },
    "swin": {
        "model_type": "swin",
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 48,
        "depths": [2, 4],
        "num_heads": [3, 6],
        "window_size": 4,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=["imagenet", "cifar10"])
    parser.add_argument("--shared", type=shared_folder, default=SHARED)
    parser.add_argument("--steps", type=positive, default=100)
    parser.add_argument("--batch_size", type=positive, default=16)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--backbone", choices=[*CIFAR_BACKBONES, "pretrained"], default="vit", help="of subject cifar10"
    )
    parser.add_argument("--train_samples", type=positive, default=10_000, help="of subject cifar10")
    parser.add_argument("--full_precision_epochs", type=positive, default=20, help="of subject cifar10")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "accuracy")
    arguments = parser.parse_args()
    searched = [row for row in arguments.rows if "search" in ROWS[row]]
    if searched and search_steps(arguments) < 1:
        parser.error(f"--steps {arguments.steps} leaves row {searched[0]} none to search: give more, or leave it out")

    if arguments.subject == "imagenet":
        name, common = f"imagenet_{arguments.steps}", imagenet_flags(arguments)
    else:
        name, common = f"cifar10_{arguments.backbone}_{arguments.steps}", cifar_flags(arguments)
    folder = arguments.output_dir / name
    runs = {}
    for bits, row, seed in itertools.product(arguments.bits, arguments.rows, arguments.seeds):
        flags = [*ROWS[row], *budget_flags(row, arguments), *common, "--bit_width", str(bits), "--seed", str(seed)]
        path = folder / f"{row}_w{bits}a{bits}_seed{seed}"
        refuse_other(path / RESULT, by_name(flags))
        runs[path] = [*flags, "--output_dir", str(path)]
    for path, flags in runs.items():
        if not (path / RESULT).exists():
            print(path.name, flush=True)
            # Evaluated once, below, and not after each stage.
            run([*flags, "--max_eval_samples", "16"])
            keep_told(path / RESULT, by_name(flags))
            (path / RESULT).write_text(json.dumps(measure(path, flags)))
    print(f"\n{describe_machine()}\n{name}, batches of {arguments.batch_size}\n")
    print(table(folder))


def run(flags: list[str]) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "run_quantformer.py"), *flags], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"run_quantformer.py {' '.join(flags)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def imagenet_flags(arguments: argparse.Namespace) -> list[str]:
    """The model, and a folder with the links that make one data set of the training and the validation images."""
    data = arguments.shared / "data"
    parts = {"test-val650.parquet": data / "imagenet-val650" / "test-00000-of-00001.parquet"}
    parts["train-sample.parquet"] = data / "imagenet-sample" / "train-00000-of-00001.parquet"
    if arguments.steps >= IMAGENETTE_STEPS:
        parts["train-imagenette.parquet"] = data / "imagenette" / "train-00000-of-00001.parquet"
    # The images are crops already: a crop of 1.0 sees them whole.
    flags = ["--model_name_or_path", str(model_of(arguments)), "--crop_pct", "1.0"]
    # With imagenette, ten classes have 450 times as many images as the others.
    flags += ["--balance_classes", str(len(parts) > 2)]
    return [
        *flags,
        "--dataset_dir",
        str(link(arguments.output_dir / f"data_{len(parts)}", parts)),
        "--crop_scale",
        CROP_SCALE,
    ]


def cifar_flags(arguments: argparse.Namespace) -> list[str]:
    """The data, and a full-precision model that is trained on it here the first time."""
    data = arguments.shared / "data" / "cifar10"
    parts = {f"{split}.parquet": data / f"{split}-00000-of-00001.parquet" for split in ("train", "test")}
    flags = ["--dataset_dir", str(link(arguments.output_dir / "data_cifar10", parts)), "--crop_scale", CROP_SCALE]
    flags += ["--max_train_samples", str(arguments.train_samples)]
    folder = arguments.output_dir / f"cifar10_{arguments.backbone}_full_precision"
    training = [
        *flags,
        "--num_train_epochs",
        str(arguments.full_precision_epochs),
        "--per_device_train_batch_size",
        "64",
    ]
    training += ["--weight_decay", "0.05", "--warmup_steps", "100", "--lr_scheduler_type", "cosine"]
    training += ["--stages", "full_precision", "--output_dir", str(folder), "--save_strategy", "no"]
    if arguments.backbone == "pretrained":
        training += ["--model_name_or_path", str(model_of(arguments)), "--ignore_mismatched_sizes"]
        training += ["--learning_rate", "1e-4", "--image_size", "96", "--crop_pct", "1.0"]
    else:
        training += ["--backbone_config", json.dumps(CIFAR_BACKBONES[arguments.backbone]), "--learning_rate", "1e-3"]
    trained = folder / "all_results.json"
    refuse_other(trained, by_name(training))
    if not trained.exists():
        print("full precision", flush=True)
        keep_told(trained, by_name(training))
        run(training)
    return [*flags, "--model_name_or_path", str(folder / "full_precision")]


def model_of(arguments: argparse.Namespace) -> Path:
    """The ViT-Tiny of ImageNet."""
    return arguments.shared / "models" / "vit_tiny_patch16_224"


def link(folder: Path, parts: dict[str, Path]) -> Path:
    """`folder`, in which each name leads to its file, wherever it led before."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in parts.items():
        if not target.exists():
            raise FileNotFoundError(f"{target} is not there: give the folder that holds data/ by --shared")
        if (folder / name).resolve() != target.resolve():
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(target.resolve())
    return folder


def search_steps(arguments: argparse.Namespace) -> int:
    """Those of a searched row before its finetuning."""
    return round(SEARCH_SHARE * arguments.steps)


def budget_flags(row: str, arguments: argparse.Namespace) -> list[str]:
    """The steps of a row, all in one stage or split between search and finetuning."""
    flags = ["--save_strategy", "no", "--report_to", "none", "--per_device_train_batch_size", str(arguments.batch_size)]
    # Workers draw crops of their own: none, for the same images in each row.
    flags += ["--dataloader_num_workers", "0"]
    if "ptq" in ROWS[row]:
        return flags
    if "search" not in ROWS[row]:
        return [*flags, "--max_steps", str(arguments.steps)]
    search = search_steps(arguments)
    return [*flags, "--search.max_steps", str(search), "--finetune.max_steps", str(arguments.steps - search)]


@torch.no_grad()
def measure(folder: Path, flags: list[str]) -> dict:
    """What the table says of a finished run, from the models that it saved."""
    told = RunArguments(flags).for_stage(None)
    data = load_image_data(told.data, told.training.seed)
    teacher, processor, data = load_classifier(told.model.model_name_or_path, data, told.model)
    teacher.set_attn_implementation(ATTENTION_IMPLEMENTATION)
    images = TransformedImages(data.validation, data, with_crop(processor, told.data.crop_pct))
    labels = torch.tensor(images.labels)

    # All runs of a folder have the same teacher and images.
    remembered = folder.parent / "full_precision_logits.pt"
    if not remembered.exists():
        torch.save(logits_of(teacher, images), remembered)
    taught = torch.load(remembered)
    taught_classes = taught.argmax(1)

    model = AutoModelForImageClassification.from_pretrained(folder / told.model.stages[-1]).eval()
    logits = logits_of(model, images)
    classes = logits.argmax(1)
    some = torch.stack([row["pixel_values"] for row in images.__getitems__(range(16))])
    in_use = [len(q.group_index.unique()) if model.config.stage == "finetune" else 1 for q in group_quantizers(model)]
    measured = {
        "accuracy": percent(classes == labels),
        "full_precision": percent(taught_classes == labels),
        "agreement": percent(classes == taught_classes),
        "divergence": logit_distillation(logits, taught).item(),
        "levels": distinct_levels(model, some),
        "bit_operations": bit_operations(model, some[:1]),
        "full_precision_bit_operations": bit_operations(teacher.eval(), some[:1]),
        "groups_in_use": statistics.median(in_use),
    }
    if "search" in told.model.stages:
        searched = AutoModelForImageClassification.from_pretrained(folder / "search").eval()
        before = percent(logits_of(searched, images).argmax(1) == labels)
        after = percent(logits_of(searched.freeze_groups(), images).argmax(1) == labels)
        measured["freezing"] = after - before
    return measured


@torch.no_grad()
def logits_of(model: PreTrainedModel, images: TransformedImages, batch_size: int = 50) -> torch.Tensor:
    """Those of each image, `(images, classes)`."""
    model.eval()
    logits = []
    for start in range(0, len(images), batch_size):
        rows = images.__getitems__(range(start, min(start + batch_size, len(images))))
        logits.append(model(pixel_values=torch.stack([row["pixel_values"] for row in rows])).logits)
    return torch.cat(logits)


def percent(hits: torch.Tensor) -> float:
    return 100 * hits.float().mean().item()


def table(folder: Path) -> str:
    """All rows of `folder`, mean ± standard deviation over the seeds that are there; those of other names come last."""
    order = {name: number for number, name in enumerate(ROWS)}
    found: dict[tuple[int, int, str], list[dict]] = {}
    for path in folder.glob(f"*_w*a*_seed*/{RESULT}"):
        name, width, _ = path.parent.name.rsplit("_", 2)
        bits = int(width[1:].partition("a")[0])
        found.setdefault((-bits, order.get(name, len(order)), name), []).append(json.loads(path.read_text()))
    lines = []
    for (bits, _, name), runs in sorted(found.items()):
        first = runs[0]
        lines.append(
            [
                f"W{-bits}A{-bits} {name}",
                spread(runs, "accuracy"),
                spread(runs, "agreement"),
                spread(runs, "divergence", digits=3),
                "/".join(map(str, first["levels"])),
                giga(first["bit_operations"]),
                f"{first['groups_in_use']:g}",
                spread(runs, "freezing"),
            ]
        )
    if lines:
        operations = giga(first["full_precision_bit_operations"])
        lines.insert(0, ["full precision", f"{first['full_precision']:.1f}", "100.0", "0", "", operations, "", ""])
    return format_table(
        ["", "top-1", "agreement", "KL, nats", "levels w/a", "BitOps", "groups in use", "freezing"], lines
    )


def giga(operations: int) -> str:
    return f"{operations / 1e9:.1f} G"


def spread(runs: list[dict], name: str, digits: int = 1) -> str:
    """Mean ± standard deviation of what `name` is in `runs`, of those that have it."""
    values = [measured[name] for measured in runs if name in measured]
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
