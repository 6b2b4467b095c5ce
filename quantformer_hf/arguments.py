"""Arguments of `run_quantformer.py`: dataclasses, and how a YAML file and flags become them."""

import argparse
import dataclasses
import json
import sys
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from .configuration_quantformer import QUANTIZATION_ARGUMENTS, QuantformerConfig, nearest
from .data import DataArguments
from .grids import FULL_PRECISION_BITS
from .mixed_precision.arguments import AllocationArguments
from .training_args import QuantformerTrainingArguments


#: What `--stages` may name, in the order in which they follow each other.
RUN_STAGES = ("full_precision", "allocate", "pretrain", "search", "finetune")


#: Of a search alone: another stage has no use for them.
SEARCH_ARGUMENTS = {"search_steps", "finetune_learning_rate"}

#: Where the model of a run is pushed to.
PUSH_ARGUMENTS = {"push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_always_push"}

#: What no single stage can be told.
WHOLE_RUN = {"preset", "stages", "model_name_or_path", "output_dir", "overwrite_output_dir", *PUSH_ARGUMENTS}

#: Arguments of Trainer by which a run would end without its accuracy, and what they are otherwise.
EVALUATION = {"prediction_loss_only": False, "eval_do_concat_batches": True, "batch_eval_metrics": False}

#: What an evaluation measures.
METRICS = ("accuracy", "top5_accuracy", "loss")

#: What `--preset` may name: the files of `presets/`.
PRESETS = ("ptq", "lightning", "best")


class _UniqueKeys(yaml.SafeLoader):
    """Of a key that is there twice, YAML would take the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep) for key, _ in node.value]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


@dataclass
class ModelArguments:
    """Which model, quantized how, through which stages."""

    preset: str | None = field(
        default=None,
        metadata={"help": f"Defaults of a budget, under the file and the flags: {', '.join(PRESETS)}."},
    )
    stages: list[str] = field(
        default_factory=lambda: ["pretrain", "search", "finetune"],
        metadata={"help": f"Stages to run, of {', '.join(RUN_STAGES)}. None: only --do_eval."},
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "What the first stage starts from: a hub id or folder, of full precision or an earlier stage."
        },
    )
    architecture: str | None = field(
        default=None, metadata={"help": "timm's name of the model in a single weight file whose name does not hold it."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Other image size than the checkpoint's: position embeddings are interpolated."}
    )
    window_size: int | None = field(default=None, metadata={"help": "Other window size than the Swin checkpoint's."})
    teacher_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Full-precision model to learn from. Default: the one that the model was made of."},
    )
    backbone_config: dict | str | None = field(
        default=None,
        metadata={"help": "Model to train in the stage full_precision without model_name_or_path, as in config.json."},
    )
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={
            "help": "Start with a new classifier where the checkpoint has none, or another number of classes than the data"
            " set. One with as many is kept, and where its class names are others, gets those of the data set."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete what earlier runs left of these stages."}
    )
    centre_channels: bool = field(
        default=True, metadata={"help": "Shift channels towards each other before they are calibrated (folding.py)."}
    )
    rotate_channels: bool | None = field(
        default=None,
        metadata={
            "help": "Spread outlying channels of a ViT or DeiT over all others before that (rotation.py). Default: unless"
            " all inputs of block linears have two bits, where training does better without."
        },
    )
    reconstruction_samples: int = field(
        default=0,
        metadata={
            "help": "Training images to which scales and weights are refitted, before any training (reconstruction.py)."
        },
    )
    bit_width: int | None = field(default=None, metadata={"help": "Sets weight_bits and activation_bits."})
    weight_bits: int | None = field(default=None, metadata={"help": "Weights of the linears of the blocks."})
    activation_bits: int | None = field(default=None, metadata={"help": "Inputs of the linears of the blocks."})
    class_token_bits: int | None = field(
        default=None,
        metadata={"help": "The same at the class token, with scales of its own. Default: quantized like other tokens."},
    )
    attention_bits: int | None = field(
        default=8, metadata={"help": "Operands of the attention products; 32 leaves them in floating point."}
    )
    embedding_bits: int = field(default=8, metadata={"help": "Patch embedding."})
    classifier_bits: int = field(default=8, metadata={"help": "Classifier."})
    layer_bits: dict | str | None = field(
        default=None,
        metadata={"help": 'Overrides by layer name or pattern, {"vit.layers.0.*": 8}, or a bit_allocation.json.'},
    )
    num_groups: int = field(default=8, metadata={"help": "Groups of channels that share a scale and an offset."})
    weight_quantizer: str = field(
        default="lsq_by_width",
        metadata={"help": "lsq, lsq_shifted, statsq, minmax, or lsq_by_width: lsq_shifted up to three bits, else lsq."},
    )
    twin_levels: bool | None = field(
        default=None,
        metadata={"help": "Levels of what GELU puts out, at 3 and 4 bits, have two step sizes. Default: with groups."},
    )

    def __post_init__(self):
        for name in ("backbone_config", "layer_bits"):
            value = getattr(self, name)
            # What is no JSON object is the path of a bit allocation.
            if isinstance(value, str) and (name != "layer_bits" or value.lstrip().startswith("{")):
                try:
                    setattr(self, name, json.loads(value))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{name} is not JSON ({error}): {value}") from error
        if not isinstance(self.backbone_config, dict | None):
            raise ValueError(
                f"backbone_config is {self.backbone_config!r}: write the fields of a config, as a dictionary"
            )
        if self.reconstruction_samples < 0:
            raise ValueError(f"reconstruction_samples is {self.reconstruction_samples}: choose 0 (off) or more")
        if isinstance(self.stages, str):
            # One in a file, without brackets.
            self.stages = [self.stages]
        for stage in self.stages:
            if stage not in RUN_STAGES:
                raise ValueError(f"unknown stage {stage!r}{nearest(stage, RUN_STAGES)}")
        if self.stages != sorted(set(self.stages), key=RUN_STAGES.index):
            raise ValueError(f"stages are {self.stages}: name each once, in the order {', '.join(RUN_STAGES)}")
        if self.attention_bits is None:
            # As in a config. What is None here was not given.
            self.attention_bits = FULL_PRECISION_BITS

    def check_quantization(self) -> None:
        """Raise ValueError for bits, groups or quantizers that no model has, as far as can be told without it."""
        # Those of layers by name are looked at where the layers are made.
        told = {name: value for name, value in self.quantization_arguments().items() if name != "layer_bits"}
        backbone = self.backbone_config and {"model_type": "vit"} | self.backbone_config
        QuantformerConfig(backbone_config=backbone, **told)

    def quantization_arguments(self) -> dict[str, Any]:
        """The fields of `QuantformerConfig` that were given."""
        return {name: getattr(self, name) for name in QUANTIZATION_ARGUMENTS if getattr(self, name) is not None}


@dataclass
class StageArguments:
    """Everything that one stage is told.

    Attributes:
        given: what was said, by the user or a preset.
        typed: the names of what the user said.

    Raises:
        ValueError: an argument of Trainer that means nothing here, or with which a run could not go on.
    """

    stage: str
    model: ModelArguments
    data: DataArguments
    training: QuantformerTrainingArguments
    allocation: AllocationArguments
    given: dict[str, Any]
    typed: frozenset[str]

    def __post_init__(self):
        training = self.training
        if training.resume_from_checkpoint is not None:
            raise ValueError(
                f"resume_from_checkpoint is {training.resume_from_checkpoint!r}: the same command goes on by itself, from"
                f" the newest whole checkpoint of its stage; leave it out"
            )
        if self.model.stages and training.do_train is False and "do_train" in self.typed:
            raise ValueError(
                "do_train is False, and stages train: leave it out, and give --stages --do_eval to evaluate alone, or"
                " --num_train_epochs 0 for stages without a step"
            )
        if training.do_predict:
            raise ValueError("do_predict has nothing to predict here: leave it out, and give --do_eval to evaluate")
        metric = training.metric_for_best_model
        if metric is not None and metric.removeprefix("eval_") not in METRICS:
            raise ValueError(f"metric_for_best_model is {metric!r}: choose one of {', '.join(METRICS)}")
        for name, needed in EVALUATION.items():
            if getattr(training, name) != needed:
                raise ValueError(f"{name} is {not needed}, and a run measures accuracy after each stage: leave it out")

    @property
    def trains(self) -> bool:
        """Whether the stage has any step."""
        return self.training.max_steps > 0 or self.training.num_train_epochs > 0

    def trains_classifier(self, quantized: bool) -> bool:
        """Whether a new classifier would learn from labels, and nothing from it.

        Args:
            quantized: whether the stage starts from a quantized model: one in full precision is its own teacher.
        """
        learns = self.training.task_weight > 0 and (quantized or self.training.distillation_weight == 0)
        return self.trains and (self.stage == "full_precision" or (self.stage != "allocate" and learns))

    def typed_quantization(self) -> dict[str, Any]:
        """What the user, and no preset, said of how the model is quantized, and `layer_bits` wherever they come from."""
        names = {*self.typed, "layer_bits"} & {*QUANTIZATION_ARGUMENTS, "image_size", "window_size"}
        return {name: getattr(self.model, name) for name in names if getattr(self.model, name) is not None}


ARGUMENT_CLASSES = (ModelArguments, DataArguments, QuantformerTrainingArguments, AllocationArguments)


class RunArguments:
    """What the user typed: a YAML file, flags that override it, and both again for single stages.

    A preset lies under both. In the file, a section with the name of a stage holds what differs in that stage; as a flag,
    `--search.learning_rate 1e-5` is the same. A flag wins over the file, and what is said of one stage
    wins over what is said of all.

    Args:
        arguments: the command line without the program's name; by default that of this process. A first argument that
            ends in `.yaml` or `.yml` is the file.

    Attributes:
        flagged: the stages of which a flag says something. A file may hold more than one command needs.

    Raises:
        ValueError: an unknown key in the file, a value of the wrong type, or something said of one stage that holds for the
            whole run.
        SystemExit: an unknown flag, as argparse does.
    """

    def __init__(self, arguments: list[str] | None = None):
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        self.common: dict[str, Any] = {}
        self.by_stage: dict[str, dict[str, Any]] = {stage: {} for stage in RUN_STAGES}
        if arguments and arguments[0].endswith((".yaml", ".yml")):
            self._read_file(Path(arguments.pop(0)))
        flags = {None: []} | {stage: [] for stage in RUN_STAGES}
        target = None
        for argument in arguments:
            if argument.startswith("--"):
                prefix, dot, rest = argument[2:].partition(".")
                target = prefix if dot and prefix in RUN_STAGES else None
                argument = f"--{rest}" if target else argument
            flags[target].append(argument)
        given = _given_flags(flags.pop(None))
        self.common.update(given)
        self.flagged = [stage for stage, said in flags.items() if said]
        for stage, stage_flags in flags.items():
            # A flag for all stages wins over the file's word on one.
            self.by_stage[stage] = {k: v for k, v in self.by_stage[stage].items() if k not in given}
            self.by_stage[stage].update(_given_flags(stage_flags))
        for stage, values in self.by_stage.items():
            for name in WHOLE_RUN & values.keys():
                raise ValueError(f"{name} holds for the whole run: say it without '{stage}'")
        self.typed = {stage: frozenset({*self.common, *values}) for stage, values in self.by_stage.items()}
        self.typed[None] = frozenset(self.common)
        if self.common.get("preset") is not None:
            self._lay_under(self.common["preset"])

    def _lay_under(self, preset: str) -> None:
        """Fill in from `preset` what neither the file nor a flag has said."""
        if preset not in PRESETS:
            raise ValueError(f"preset is {preset!r}: choose one of {', '.join(PRESETS)}")
        said_for_all = set(self.common)
        for key, value in yaml.safe_load((files(__package__) / "presets" / f"{preset}.yaml").read_text()).items():
            if key in RUN_STAGES:
                said = said_for_all | set(self.by_stage[key])
                # Trainer lets max_steps win over epochs: it must not win over epochs that somebody asked for.
                said |= {"max_steps"} if "num_train_epochs" in said else set()
                self.by_stage[key] |= {name: v for name, v in value.items() if name not in said}
            else:
                self.common.setdefault(key, value)

    def _read_file(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        try:
            content = yaml.load(path.read_text(), _UniqueKeys) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}: write 'key: value' lines")
        for key, value in content.items():
            if key in RUN_STAGES:
                if not isinstance(value, dict | None):
                    raise ValueError(
                        f"{path}: {key} is {value!r}: write what holds in that stage as 'key: value' lines"
                    )
                _check_values(value or {}, f"{path}, section {key}")
                self.by_stage[key] = dict(value or {})
            else:
                _check_values({key: value}, str(path))
                self.common[key] = value

    def model_arguments(self) -> ModelArguments:
        """Those that hold for all stages."""
        return self.for_stage(None).model

    def for_stage(self, stage: str | None) -> StageArguments:
        """The arguments of one stage, or with None those common to all."""
        values = self.common | (self.by_stage[stage] if stage else {})
        if stage not in (None, "search"):
            values = {name: value for name, value in values.items() if name not in SEARCH_ARGUMENTS}
        parsed = HfArgumentParser(ARGUMENT_CLASSES).parse_dict(values)
        return StageArguments(stage, *parsed, values, self.typed[stage])


def _fields() -> dict[str, Any]:
    hints = {}
    for argument_class in ARGUMENT_CLASSES:
        types_of_class = typing.get_type_hints(argument_class)
        hints.update({f.name: types_of_class[f.name] for f in dataclasses.fields(argument_class) if f.init})
    return hints


def defaults() -> dict[str, Any]:
    """What holds for each argument of which neither a preset, nor the file, nor a flag says anything."""
    values = {}
    for argument in (f for argument_class in ARGUMENT_CLASSES for f in dataclasses.fields(argument_class) if f.init):
        made = argument.default_factory is not dataclasses.MISSING
        values[argument.name] = argument.default_factory() if made else argument.default
    return values


def _check_values(values: dict[str, Any], source: str) -> None:
    hints = _fields()
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"{source}: unknown key {key!r}{nearest(key, [*hints, *RUN_STAGES])}")
        kinds = [typing.get_origin(hint) or hint for hint in _alternatives(hints[key])]
        if value is None and type(None) not in kinds:
            raise ValueError(f"{source}: {key} has no value: write one, or leave the line out")
        if value is None or type(value) in kinds or str in kinds or (type(value) is int and float in kinds):
            continue
        ways = {
            bool: "true or false, without quotes",
            int: "a whole number",
            float: "a number, with a point (2.0e-4, not 2e-4)",
        }
        for kind in ways.keys() & set(kinds):
            is_string = "the string " if isinstance(value, str) else ""
            raise ValueError(f"{source}: {key} is {is_string}{value!r}: write {ways[kind]}")


def _alternatives(hint: Any) -> Iterable[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _given_flags(flags: list[str]) -> dict[str, Any]:
    """Only what was typed, converted by argparse; without the defaults."""
    parser = HfArgumentParser(ARGUMENT_CLASSES, usage="run_quantformer.py [recipe.yaml] [--name value ...]")
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        if action.dest == "stages":
            action.nargs = "*"
    return vars(parser.parse_args(flags))
