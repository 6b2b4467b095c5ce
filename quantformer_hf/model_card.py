"""The model card, `README.md`, written from a model's config, its files and the history of its run.

What was not measured is not stated: a model without a run has no accuracy, and one that was trained on since has none that
is its own.
"""

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from .backbone_layers import describe_backbone, pair
from .checkpoint_files import first_sentence
from .checkpoint_reader import CheckpointReader
from .configuration_quantformer import QuantformerConfig
from .expected_tensors import layer_bits
from .grids import FULL_PRECISION_BITS
from .inspect_checkpoint import full_precision_bytes
from .layer_bits import attention_bits_by_name
from .report import megabytes, weights_on_disk
from .run_history import DIGITS, RECIPE_ARGUMENTS, UNRECORDED, hub_id, is_current, note_change


logger = logging.getLogger(__name__)

PAPER_TITLE = "Quantformer: Learning Extremely Low-Precision Vision Transformers"
PAPER_DOI = "10.1109/TPAMI.2022.3229313"
PAPER_URL = f"https://doi.org/{PAPER_DOI}"

#: In every card of this package. One without it is somebody's own.
MARK = "<!-- Written by quantformer_hf, and again at each save. Delete this line to keep what you change. -->"

#: In the cards that transformers writes where there is none.
MARK_OF_TRANSFORMERS = "This model card has been automatically generated"

#: Metadata that this package knows nothing of, and takes over from the card that it replaces.
KEPT_METADATA = ("license", "license_name", "license_link", "language")

ARCHITECTURES = {"vit": "ViT", "deit": "DeiT", "swin": "Swin"}

#: Results of a record, in order, and the words for them.
ACCURACIES = {
    "full_precision_accuracy": "full precision",
    "pretrain_accuracy": "pretrain: one quantizer a tensor",
    "search_accuracy": "search: soft groups",
    "frozen_accuracy": "freezing the groups",
    "finetune_accuracy": "finetune",
}

#: Kinds of layers (`backbone_layers.py`), in the order of the card's rows, and the words for them.
KINDS = {"block": "linears of the blocks", "embedding": "patch embedding", "classifier": "classifier"}

STAGE_TITLES = {UNRECORDED: "afterwards"}


def write_model_card(
    folder: str | Path,
    config: PreTrainedConfig,
    history: list[dict[str, Any]] | None = None,
    repo_id: str | None = None,
    replaces: str | Path | None = None,
) -> None:
    """Write `README.md` beside the weights in `folder`.

    Args:
        folder: where `config` and weights were saved.
        config: of the model; of this package, or a full-precision ViT, DeiT or Swin.
        history: records of its run (`run_history.record_of`); by default those in `config`.
        repo_id: of the hub, to load it from.
        replaces: the card that was there before, by default that in `folder`. A card that somebody wrote by hand, without
            `MARK`, is kept as it is; license, language and tags of another are taken over.
    """
    replaces = Path(folder) / REPOCARD_NAME if replaces is None else Path(replaces)
    if replaces.is_file():
        text = replaces.read_text(encoding="utf-8", errors="replace")
        if MARK not in text and MARK_OF_TRANSFORMERS not in text:
            return
    before = _card_in(replaces)
    card = make_model_card(folder, config, history, repo_id)
    if before is not None:
        kept = {name: before.data.get(name) for name in KEPT_METADATA}
        _add_metadata(card, tags=before.data.get("tags") or (), **kept)
    card.save(Path(folder) / REPOCARD_NAME)


def add_to_model_card(folder: str | Path, tags: str | Iterable[str] | None = None, **metadata: Any) -> None:
    """Add tags, and other metadata that is not None (`license`, `language`), to the card in `folder`, if there is one."""
    path = Path(folder) / REPOCARD_NAME
    card = _card_in(path)
    if card is not None:
        _add_metadata(card, [tags] if isinstance(tags, str) else tags or (), **metadata)
        card.save(path)


def _card_in(path: Path) -> ModelCard | None:
    """None where there is none, or one that nobody can read: no reason not to save a model."""
    if not path.is_file():
        return None
    try:
        return ModelCard.load(path, ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        logger.warning(
            f"{path} cannot be read as a model card ({first_sentence(error)}), and nothing is taken over from it"
        )
        return None


def _add_metadata(card: ModelCard, tags: Iterable[str], **metadata: Any) -> None:
    card.data.tags = list(dict.fromkeys([*(card.data.get("tags") or ()), *tags]))
    for name, value in metadata.items():
        if value is not None:
            card.data[name] = value


def make_model_card(
    folder: str | Path,
    config: PreTrainedConfig,
    history: list[dict[str, Any]] | None = None,
    repo_id: str | None = None,
) -> ModelCard:
    """The card of the model in `folder`; arguments as in `write_model_card`."""
    quantized = isinstance(config, QuantformerConfig)
    backbone = config.backbone_config if quantized else config
    records = (config.run_history if quantized else None) or [] if history is None else history
    current = is_current(records)
    results = {name: value for record in records for name, value in record.get("results", {}).items()}
    accuracies = [(words, f"{100 * results[name]:.2f} %") for name, words in ACCURACIES.items() if name in results]
    source = records[0].get("source") if records else None
    base_model = source or (hub_id(config.full_precision_name_or_path) if quantized else None)
    architecture = ARCHITECTURES[backbone.model_type]
    widths = _widths(config) if quantized else "full precision"
    name = repo_id.split("/")[-1] if repo_id else f"{architecture} {widths}"
    datasets = {record["dataset"]: None for record in records if record.get("dataset") not in (None, DIGITS)}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        base_model=base_model,
        base_model_relation="quantized" if quantized and base_model else None,
        datasets=list(datasets) or None,
        metrics=["accuracy"] if accuracies else None,
        tags=["image-classification", "vision", *(["quantformer", "quantization", "low-bit"] if quantized else [])],
        model_name=name if current else None,
        eval_results=[_evaluation_result(records[-1])] if current else None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card_template.md")),
        mark=MARK,
        title=name,
        architecture=architecture,
        num_labels=config.num_labels,
        quantization=_quantization_rows(config) if quantized else None,
        groups=_groups(config) if quantized else None,
        storage=_storage(config) if quantized else None,
        accuracies=accuracies,
        evaluation=_evaluation(records),
        size=_size(Path(folder), config),
        recipes=[_recipe(record) for record in records],
        load_from=repo_id or "path/to/this/folder",
        has_processor=(Path(folder) / IMAGE_PROCESSOR_NAME).is_file(),
        image_shape=", ".join(map(str, (backbone.num_channels, *pair(backbone.image_size)))),
        paper_title=PAPER_TITLE,
        paper_doi=PAPER_DOI,
        paper_url=PAPER_URL,
    )


def _bits(bits: int | None) -> str:
    return "floating point" if bits in (None, FULL_PRECISION_BITS) else f"{bits} bits" if bits > 1 else "1 bit"


def _widths_of(config: QuantformerConfig, what: str) -> dict[str, list[int]]:
    """The different bits of the layers of each kind, ascending.

    Args:
        what: `weight_bits` or `activation_bits`.
    """
    backbone = describe_backbone(config.backbone_config)
    widths: dict[str, set[int]] = {}
    for name, of_layer in layer_bits(backbone, config).items():
        widths.setdefault(backbone.layers[name].kind, set()).add(getattr(of_layer, what))
    return {kind: sorted(found) for kind, found in widths.items()}


def _widths(config: QuantformerConfig) -> str:
    weights, inputs = (_widths_of(config, what)["block"] for what in ("weight_bits", "activation_bits"))
    return f"W{weights[0]}A{inputs[0]}" if len(weights) == len(inputs) == 1 else "mixed precision"


def _quantization_rows(config: QuantformerConfig) -> list[tuple[str, str, str]]:
    weights, inputs = (_widths_of(config, what) for what in ("weight_bits", "activation_bits"))
    rows = [(words, _range(weights[kind]), _range(inputs[kind])) for kind, words in KINDS.items()]
    attention = attention_bits_by_name(describe_backbone(config.backbone_config).attention, config)
    between = [("attention products: q, k, v and probabilities", "", _range(sorted(set(attention.values()))))]
    if config.class_token_bits is not None:
        between.insert(0, ("their inputs at the class token, where quantized", "", _bits(config.class_token_bits)))
    return [rows[0], *between, *rows[1:]]


def _range(widths: list[int]) -> str:
    """`4 bits`, `2 to 6 bits, by layer` or `8 bits or floating point, by layer`."""
    if len(widths) == 1:
        return _bits(widths[0])
    quantized = [width for width in widths if width != FULL_PRECISION_BITS]
    text = _bits(quantized[-1]) if len(quantized) == 1 else f"{quantized[0]} to {_bits(quantized[-1])}"
    return f"{text}{' or floating point' if FULL_PRECISION_BITS in widths else ''}, by layer"


def _groups(config: QuantformerConfig) -> str:
    inputs = _widths_of(config, "activation_bits")["block"]
    if inputs == [FULL_PRECISION_BITS]:
        return ""
    quantized = "quantized linear" if FULL_PRECISION_BITS in inputs else "linear"
    if config.stage == "pretrain":
        return f"The input channels of a {quantized} share one scale and one offset."
    groups = "one group" if config.num_groups == 1 else f"{config.num_groups} groups"
    assigned = "softly assigned to" if config.stage == "search" else "assigned to"
    return (
        f"The input channels of each {quantized} of a block are {assigned} {groups}, each with a scale and an offset of"
        f" its own."
    )


def _storage(config: QuantformerConfig) -> str:
    if all(widths == [FULL_PRECISION_BITS] for widths in _widths_of(config, "weight_bits").values()):
        return "The file holds the weights in floating point: none is quantized."
    if config.stage == "packed":
        return "The file holds the quantized weights as packed integer codes."
    return f"The file holds the weights in floating point, to be trained further (stage `{config.stage}`), not packed."


def _size(folder: Path, config: PreTrainedConfig) -> str:
    size = weights_on_disk(folder)
    if size == 0:
        return ""
    text = f"The weight files have {megabytes(size)}"
    if isinstance(config, QuantformerConfig) and config.stage == "packed":
        full = full_precision_bytes(CheckpointReader.open(folder), describe_backbone(config.backbone_config))
        text += f"; the parameters of the full-precision model in float32 have {megabytes(full)}"
    return f"{text}."


def _dataset(record: dict[str, Any]) -> tuple[str, str]:
    """The data set's id, and its name in words."""
    dataset = record.get("dataset")
    if dataset is None:
        return "custom", "a data set that is not on the hub"
    return dataset, "scikit-learn's handwritten digits" if dataset == DIGITS else dataset


def _evaluation_result(record: dict[str, Any]) -> EvalResult:
    dataset, words = _dataset(record)
    told = record["evaluation"]
    return EvalResult(
        task_type="image-classification",
        task_name="Image Classification",
        dataset_type=dataset,
        dataset_name=words,
        dataset_config=told.get("dataset_config_name"),
        dataset_split=told.get("eval_split"),
        dataset_args={"max_eval_samples": told["max_eval_samples"]} if "max_eval_samples" in told else None,
        metric_type="accuracy",
        metric_name="Top-1 accuracy",
        metric_value=round(record["results"][f"{record['stage']}_accuracy"], 4),
    )


def _evaluation(records: list[dict[str, Any]]) -> str:
    """What the accuracies were measured on, and whether they are this model's."""
    measured = [record for record in records if record.get("results")]
    if not measured:
        return ""
    told = measured[-1]["evaluation"]
    dataset, words = _dataset(measured[-1])
    text = "Held-out images of " + (words if dataset in ("custom", DIGITS) else f"`{words}`")
    if "eval_split" in told:
        text += f", split `{told['eval_split']}`"
    if "max_eval_samples" in told:
        text += f", at most {told['max_eval_samples']} of them"
    if "crop_pct" in told:
        text += f", centre crop of {told['crop_pct']:g} of the shorter edge"
    if len({_dataset(record) for record in measured}) > 1:
        text += " (in the last stage; earlier ones saw others)"
    if records[-1]["stage"] == UNRECORDED:
        text += ". The model was changed since, and has not been evaluated"
    return f"{text}."


def _recipe(record: dict[str, Any]) -> tuple[str, str]:
    stage = STAGE_TITLES.get(record["stage"], record["stage"].replace("_", " "))
    if record["stage"] == UNRECORDED:
        return stage, "changed outside of a run, of which there is no record"
    # In an order that reads well: a config's file has it in that of the alphabet.
    told = [f"{name} {record['recipe'][name]}" for name in RECIPE_ARGUMENTS if name in record["recipe"]]
    if record["source"]:
        told.insert(0, f"started from {record['source']}")
    return stage, ", ".join(told) or "none of them given"


@contextlib.contextmanager
def without_local_paths(path: Path) -> Iterator[None]:
    """Inside the `with` block, the config at `path` does not tell where on this machine the full-precision model lies."""
    before = path.read_text(encoding="utf-8")
    config = json.loads(before)
    name = "full_precision_name_or_path"
    if config.get(name) is None or hub_id(config[name], bare=True) is not None:
        yield
        return
    try:
        path.write_text(json.dumps(config | {name: None}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        yield
    finally:
        # A folder that was saved and pushed at once keeps it: it is the default teacher.
        path.write_text(before, encoding="utf-8")


class ModelCardMixin:
    """What a model does so that its card goes where it goes, and claims no result that is not its own."""

    def train(self, mode: bool = True) -> Self:
        """As in torch. What is put into training mode may change, and its card no longer gives its accuracy."""
        if mode:
            note_change(self.config)
        return super().train(mode)

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        # transformers has just put a card of its own, or the one on the hub, where ours was; and while saving, the
        # processor comes after the upload. The card says how to load what is there.
        if self.image_processor is not None:
            self.image_processor.save_pretrained(working_dir)
        write_model_card(working_dir, self.config, repo_id=repo_id)
        with without_local_paths(Path(working_dir) / CONFIG_NAME):
            return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)
