"""`bit_allocation.json`: the bit widths of each layer, what they cost, and the budget that they were found for."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedConfig

from ..backbone_layers import describe_backbone


#: Name of the file.
ALLOCATION_FILE = "bit_allocation.json"

#: Of the file's fields. One of another format is refused.
FORMAT = 1


@dataclass(frozen=True)
class AllocatedLayer:
    """A layer's bits.

    Attributes:
        weight_bits, activation_bits: of its weight and its input.
        shape: of the weight, by which an allocation for another architecture is found out.
        cost: its own share, by unit (`BitOps`, `bytes`, `ms`).
    """

    weight_bits: int
    activation_bits: int
    shape: tuple[int, ...]
    cost: dict[str, float]


@dataclass(frozen=True)
class AllocatedAttention:
    """The bits of an attention block's operands.

    Attributes:
        bits: of each of the four.
        cost: of its products, by unit.
    """

    bits: int
    cost: dict[str, float]


@dataclass(frozen=True)
class BitAllocation:
    """Bit widths by layer.

    Attributes:
        layers: by name in the backbone.
        attention: blocks by name in the backbone; empty where their bits were no choice.
        cost: of the whole packed model, by unit.
        budget: what `cost` was to stay within, by unit; empty where there was none.
        method: `budget` or `edmips`.
        settings: what was held fixed: candidates, groups, and the bits of everything that is not in `layers`.
    """

    layers: dict[str, AllocatedLayer]
    cost: dict[str, float]
    budget: dict[str, float]
    method: str
    settings: dict[str, Any]
    attention: dict[str, AllocatedAttention] = field(default_factory=dict)

    @property
    def layer_bits(self) -> dict[str, dict[str, int]]:
        """What `QuantformerConfig.layer_bits` takes."""
        layers = {
            name: {"weight_bits": layer.weight_bits, "activation_bits": layer.activation_bits}
            for name, layer in self.layers.items()
        }
        return layers | {name: {"attention_bits": block.bits} for name, block in self.attention.items()}

    def to_json(self) -> str:
        """The content of the file."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=1)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The allocation in the file `path`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else.
        """
        try:
            content = json.loads(Path(path).read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}, and this version reads {FORMAT}")
            layers = {name: AllocatedLayer(**layer) for name, layer in content.pop("layers").items()}
            attention = {name: AllocatedAttention(**block) for name, block in content.pop("attention", {}).items()}
            del content["format"]
            return cls(layers={n: _with_tuple(layer) for n, layer in layers.items()}, attention=attention, **content)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"there is no file {path}: name a bit allocation, or write layer_bits out"
            ) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is no bit allocation ({type(error).__name__}: {error}): make one by the stage 'allocate', or write"
                f" layer_bits out"
            ) from error

    def check_architecture(self, config: PreTrainedConfig, source: str | Path) -> None:
        """Raise ValueError, with the first layer that does not match, if this was made for another backbone.

        Args:
            config: of the backbone.
            source: where the allocation comes from, for the message.
        """
        backbone = describe_backbone(config)
        parts = backbone.layers
        way_out = "make one for this model by the stage 'allocate'"
        for name, layer in self.layers.items():
            if name not in parts:
                raise ValueError(
                    f"{source} is for another architecture: it names the layer '{name}', which this {config.model_type} does"
                    f" not have; {way_out}"
                )
            if parts[name].shape != layer.shape:
                raise ValueError(
                    f"{source} is for another architecture: the weight of '{name}' has the shape {layer.shape} in it and"
                    f" {parts[name].shape} in this {config.model_type}; {way_out}"
                )
        for name in self.attention:
            if name not in backbone.attention:
                raise ValueError(
                    f"{source} is for another architecture: it names the attention block '{name}', which this"
                    f" {config.model_type} does not have; {way_out}"
                )
        missing = [name for name, part in parts.items() if part.kind == "block" and name not in self.layers]
        if missing:
            raise ValueError(
                f"{source} is for another architecture: it says nothing of the layer '{missing[0]}'; {way_out}"
            )

    def check_settings(self, config: Any, source: str | Path) -> None:
        """Raise ValueError if this keeps a budget only with other settings than those of `config`."""
        # Older files do not say what they had no choice of.
        for name, value in ({"class_token_bits": None} | self.settings).items():
            now = getattr(config, name, getattr(config.backbone_config, name, value))
            if self.budget and _as_pair(now) != _as_pair(value):
                way_out = f"leave out {name}" if value is None else f"give --{name} {value}"
                raise ValueError(
                    f"{source} keeps its budget with {name} {value}, and not with {now}: {way_out}, or make another"
                    f" allocation by the stage 'allocate'"
                )


def _as_pair(value: Any) -> Any:
    """The same for one number and for two that are alike: a size may be written as either."""
    return [value, value] if isinstance(value, int) else list(value) if isinstance(value, tuple) else value


def _with_tuple(layer: AllocatedLayer) -> AllocatedLayer:
    return AllocatedLayer(layer.weight_bits, layer.activation_bits, tuple(layer.shape), layer.cost)


def read_layer_bits(path: str | Path, config: PreTrainedConfig) -> dict[str, dict[str, int]]:
    """The `layer_bits` of the file `path`, for a `QuantformerConfig` whose other fields are set.

    Raises:
        FileNotFoundError, ValueError: no file, no allocation, one for another architecture, or one that keeps its budget
            with other settings.
    """
    allocation = BitAllocation.read(path)
    allocation.check_architecture(config.backbone_config, path)
    allocation.check_settings(config, path)
    return allocation.layer_bits
