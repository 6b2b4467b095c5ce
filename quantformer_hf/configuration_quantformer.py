"""Configuration of a quantized vision transformer."""

import difflib
from collections.abc import Iterable
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .attention import ATTENTION_IMPLEMENTATION
from .class_token import CLASS_TOKENS
from .grids import FULL_PRECISION_BITS
from .mixed_precision.allocation_file import read_layer_bits
from .packing import LAYOUT_VERSION
from .quantizers import WEIGHT_QUANTIZERS


#: Backbones by `model_type`.
BACKBONES = ("vit", "deit", "swin")

#: The stages of a model's life, in order.
STAGES = ("pretrain", "search", "finetune", "packed")

#: A file has the group of a channel in a byte.
MAX_GROUPS = 255


@strict
class QuantformerConfig(PreTrainedConfig):
    r"""
    Configuration of [`QuantformerForImageClassification`]: a stock ViT, DeiT or Swin and how it is quantized.

    Bit widths are 2 to 8 (weights also 1), or 32 for "leave in floating point". A "linear of a block" is one of q, k, v
    and output projection, fc1 and fc2, and Swin's patch-merging reduction.

    Args:
        backbone_config: configuration of the full-precision model (`vit`, `deit` or `swin`), or its dictionary.
        bit_width: sets `weight_bits` and `activation_bits` where those are not given.
        weight_bits: weights of the linears of the blocks. Default 4.
        activation_bits: inputs of the linears of the blocks. Default 4.
        class_token_bits: inputs of the linears of the blocks at the class token (and DeiT's distillation token), with scales
            and offsets of their own. None: quantized like all other tokens.
        attention_bits: q, k, v and probabilities, the operands of the two attention products. None leaves them alone.
        embedding_bits: weights and input of the patch embedding.
        classifier_bits: weights and input of the classifier.
        layer_bits: overrides by layer name, or by a pattern with `*`, of the backbone (`"vit.layers.0.*"`); later entries
            win. The value is a bit width for both, or a dictionary with `weight_bits`, `activation_bits` or both, and for
            the attention blocks of that name or pattern (`"vit.layers.0.attention"`) `attention_bits`. Or the path of a
            `bit_allocation.json`, whose bits are taken over.
        num_groups: groups of channels that share a scale and an offset, from the search on.
        weight_quantizer: `lsq`, `lsq_shifted`, `statsq`, `minmax`, or `lsq_by_width`, which is `lsq_shifted` up to three
            bits and `lsq` above, for the linears of the blocks. Patch embedding and classifier always use `lsq`, and 1-bit
            weights the binary quantizer. Older checkpoints name `auto`, which is `lsq_shifted` at two bits alone.
        twin_levels: whether levels of what GELU puts out, at 3 and 4 bits, have two step sizes (`ops/levels.py`), from the
            search on. None: `begin_search()` will have it so; in older checkpoints that are beyond it, levels are even.
        stage: `pretrain`, `search`, `finetune` or `packed`. The verbs of the model set it.
        packing_layout: version of the layout of packed weights (`packing.py`), in the stage `packed`. `pack()` sets it.
        calibrated: whether the quantizers hold calibrated values. `calibrate()` sets it.
        whole_multiples: whether scales of groups are small whole multiples of few units (`multiples.py`), so that
            kernels add up all groups as one. `begin_search()` sets it; older checkpoints have other scales.
        channels_rotated: whether hidden states are those of the full-precision model times `rotation.rotation`.
            `calibrate()` sets it.
        full_precision_name_or_path: the checkpoint that the model was made from, its default teacher.
        run_history: records of the stages that `run_quantformer.py` ran (`run_history.py`), for the model card.

    Raises:
        ValueError: a bit width, stage, layout, quantizer, number of groups, attention implementation or backbone that does
            not exist, or a bit allocation for another architecture.
        FileNotFoundError: no bit allocation of that name.
    """

    model_type = "quantformer"

    backbone_config: dict | PreTrainedConfig | None = None
    weight_bits: int | None = None
    activation_bits: int | None = None
    class_token_bits: int | None = None
    attention_bits: int | None = 8
    embedding_bits: int = 8
    classifier_bits: int = 8
    layer_bits: dict[str, Any] | list | str | None = None
    num_groups: int = 8
    weight_quantizer: str = "lsq_by_width"
    twin_levels: bool | None = None
    stage: str = "pretrain"
    packing_layout: int | None = None
    calibrated: bool = False
    whole_multiples: bool = False
    channels_rotated: bool = False
    full_precision_name_or_path: str | None = None
    run_history: list | None = None

    def __post_init__(self, **kwargs):
        # `bit_width` is a short form and no field of its own, so that a saved file says each width once.
        bit_width = kwargs.pop("bit_width", 4)
        check_attention_implementation(kwargs.pop("attn_implementation", None))
        self.weight_bits = bit_width if self.weight_bits is None else self.weight_bits
        self.activation_bits = bit_width if self.activation_bits is None else self.activation_bits
        if self.backbone_config is None:
            self.backbone_config = AutoConfig.for_model("vit")
        elif isinstance(self.backbone_config, dict):
            backbone = dict(self.backbone_config)
            model_type = backbone.pop("model_type", None)
            _check_choice("backbone_config.model_type", model_type, BACKBONES)
            self.backbone_config = AutoConfig.for_model(model_type, **backbone)
        _check_choice("backbone_config.model_type", self.backbone_config.model_type, BACKBONES)
        if sum(getattr(self.backbone_config, "depths", None) or [self.backbone_config.num_hidden_layers]) < 1:
            raise ValueError("backbone_config has no block to quantize: choose num_hidden_layers of 1 or more")
        _check_choice("stage", self.stage, STAGES)
        _check_choice("weight_quantizer", self.weight_quantizer, WEIGHT_QUANTIZERS)
        if self.stage == "packed" and self.packing_layout != LAYOUT_VERSION:
            raise ValueError(
                f"packing_layout is {self.packing_layout!r}, and this version of quantformer_hf reads {LAYOUT_VERSION}:"
                f" install the version that wrote the checkpoint, or a newer one"
            )
        check_weight_bits("weight_bits", self.weight_bits)
        check_activation_bits("activation_bits", self.activation_bits)
        check_activation_bits("embedding_bits", self.embedding_bits)
        check_activation_bits("classifier_bits", self.classifier_bits)
        if self.attention_bits is not None:
            check_activation_bits("attention_bits", self.attention_bits)
        if not 1 <= self.num_groups <= MAX_GROUPS:
            raise ValueError(f"num_groups is {self.num_groups}: choose 1 to {MAX_GROUPS}")
        if isinstance(self.layer_bits, str):
            self.layer_bits = read_layer_bits(self.layer_bits, self)
        if isinstance(self.layer_bits, list):
            # As in files, see `to_dict`.
            if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in self.layer_bits):
                raise ValueError(
                    f"layer_bits is {self.layer_bits}: give a dictionary, or pairs, of a pattern and its bits"
                )
            self.layer_bits = dict(self.layer_bits)
        for pattern, bits in (self.layer_bits or {}).items():
            _check_layer_bits(pattern, bits)
        self._check_class_token_bits()
        backbone = self.backbone_config
        if self.id2label is None and "num_labels" not in kwargs:
            self.id2label, self.label2id = backbone.id2label, backbone.label2id
        if self.problem_type is None:
            self.problem_type = backbone.problem_type
        super().__post_init__(**kwargs)
        self.tell_backbone()

    def tell_backbone(self) -> None:
        """Have the model inside agree with the wrapper on classes, and on what is asked of them."""
        for name in ("id2label", "label2id", "problem_type"):
            setattr(self.backbone_config, name, getattr(self, name))

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with `layer_bits` as a list of pairs: their order counts, and files sort the keys of
        dictionaries. Where the full-precision model came from is said once, by a name that `push_to_hub` knows."""
        told = super().to_dict()
        if isinstance(told.get("backbone_config"), dict):
            told["backbone_config"].pop("_name_or_path", None)
        if told.get("layer_bits") is not None:
            told["layer_bits"] = [list(pair) for pair in told["layer_bits"].items()]
        return told

    def _check_class_token_bits(self) -> None:
        bits, model_type = self.class_token_bits, self.backbone_config.model_type
        if bits is None:
            return
        if isinstance(bits, bool) or not 2 <= bits <= 8:
            raise ValueError(f"class_token_bits is {bits!r}: choose 2 to 8, or leave it out")
        if model_type not in CLASS_TOKENS:
            raise ValueError(f"class_token_bits is {bits}, and a {model_type} has no class token: leave it out")
        # Overrides of layers may quantize some inputs all the same.
        of_layers = [b if isinstance(b, int) else b.get("activation_bits") for b in (self.layer_bits or {}).values()]
        if not {self.activation_bits, *of_layers} - {FULL_PRECISION_BITS, None}:
            raise ValueError(
                f"class_token_bits is {bits}, and activation_bits {FULL_PRECISION_BITS} leaves the inputs in floating"
                f" point: choose activation_bits 2 to 8, or leave class_token_bits out"
            )


def check_attention_implementation(told: Any) -> None:
    """Raise ValueError for another one than there is: it would leave the operands of the attention products unquantized."""
    if told not in (None, ATTENTION_IMPLEMENTATION):
        raise ValueError(
            f"attn_implementation is {told!r}, and a quantized model has its own, {ATTENTION_IMPLEMENTATION!r}, which"
            f" quantizes the attention products: leave it out"
        )


def check_model_type(source: Any, config: dict[str, Any]) -> None:
    """Raise ValueError unless `config`, the content of a file in `source`, is of a quantized model."""
    found = config.get("model_type")
    if found != QuantformerConfig.model_type:
        raise ValueError(
            f"{source} is no quantformer checkpoint: its model_type is {found!r}, and not"
            f" '{QuantformerConfig.model_type}'. QuantformerForImageClassification.from_full_precision makes one of it"
        )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(choices)}")


def check_weight_bits(name: str, bits: Any) -> None:
    """Raise ValueError unless `bits` is 1 to 8, or 32."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not (1 <= bits <= 8 or bits == FULL_PRECISION_BITS):
        raise ValueError(f"{name} is {bits!r}: choose 1 to 8, or {FULL_PRECISION_BITS} to leave it in floating point")


def check_activation_bits(name: str, bits: Any) -> None:
    """Raise ValueError unless `bits` is 2 to 8, or 32."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not (2 <= bits <= 8 or bits == FULL_PRECISION_BITS):
        raise ValueError(
            f"{name} is {bits!r}: choose 2 to 8 (1 bit is for weights only), or {FULL_PRECISION_BITS} to leave it in"
            f" floating point"
        )


def _check_layer_bits(pattern: str, bits: Any) -> None:
    name = f"layer_bits[{pattern!r}]"
    if not isinstance(bits, dict):
        check_activation_bits(name, bits)
        return
    checks = {
        "weight_bits": check_weight_bits,
        "activation_bits": check_activation_bits,
        "attention_bits": check_activation_bits,
    }
    for key, value in bits.items():
        if key not in checks:
            raise ValueError(f"{name} has the key {key!r}: choose from {', '.join(checks)}")
        checks[key](f"{name}[{key!r}]", value)


#: What a user may choose: the fields of `QuantformerConfig` that mean the same in Python, YAML and flags.
QUANTIZATION_ARGUMENTS = (
    "bit_width",
    "weight_bits",
    "activation_bits",
    "class_token_bits",
    "attention_bits",
    "embedding_bits",
    "classifier_bits",
    "layer_bits",
    "num_groups",
    "weight_quantizer",
    "twin_levels",
)


def check_quantization_arguments(arguments: dict[str, Any]) -> None:
    """Raise TypeError for an unknown quantization argument, with the nearest known one."""
    for name in arguments:
        if name not in QUANTIZATION_ARGUMENTS:
            raise TypeError(f"unknown quantization argument {name!r}{nearest(name, QUANTIZATION_ARGUMENTS)}")


def check_no_misspelling(arguments: dict[str, Any]) -> None:
    """Raise TypeError for what looks like a quantization argument and is none, among arguments of other kinds."""
    for name in arguments:
        if difflib.get_close_matches(name, QUANTIZATION_ARGUMENTS, n=1, cutoff=0.85):
            raise TypeError(f"unknown argument {name!r}{nearest(name, QUANTIZATION_ARGUMENTS)}")


def nearest(name: str, choices: Iterable[str]) -> str:
    """`": did you mean 'x'?"`, or the list of the choices where none is near."""
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f": did you mean {close[0]!r}?" if close else f": choose from {', '.join(sorted(choices))}"
