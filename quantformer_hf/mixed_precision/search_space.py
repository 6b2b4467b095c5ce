"""What may be chosen: the width of each block linear's weight, and of each tensor that block linears read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from ..backbone_layers import describe_backbone
from ..configuration_quantformer import QuantformerConfig
from ..layer_bits import LayerBits


#: Candidate widths where nobody names others.
CANDIDATE_BITS = (2, 3, 4, 6, 8)

#: The bits of each layer by its name.
Widths = Mapping[str, LayerBits]


def check_candidates(candidates: Iterable[int]) -> tuple[int, ...]:
    """`candidates`, ascending.

    Raises:
        ValueError: one that is not 1 to 8, or none that activations may have (2 to 8).
    """
    candidates = tuple(candidates)
    for bits in candidates:
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
            raise ValueError(f"candidate_bits has {bits!r}: choose from 1 to 8 (1 bit is for weights only)")
    candidates = tuple(sorted(set(candidates)))
    if not any(bits >= 2 for bits in candidates):
        raise ValueError(f"candidate_bits is {list(candidates)}: activations need one of 2 to 8")
    return candidates


@dataclass(frozen=True)
class SearchSpace:
    """The choices, and which of them hang together.

    Attributes:
        inputs: by the name of each linear of a block, the quantizer of its input. Layers that read the same tensor (q, k
            and v) have the same one, and so the same activation bits.
        weight_bits, activation_bits: candidates, ascending.
    """

    inputs: dict[str, str]
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]

    @classmethod
    def of(cls, config: QuantformerConfig, candidates: Iterable[int] = CANDIDATE_BITS) -> Self:
        """All linears of the blocks of `config`'s backbone.

        Raises:
            ValueError: as `check_candidates`.
        """
        candidates = check_candidates(candidates)
        layers = describe_backbone(config.backbone_config).layers
        inputs = {name: layer.input_quantizer for name, layer in layers.items() if layer.kind == "block"}
        return cls(inputs, candidates, tuple(bits for bits in candidates if bits >= 2))

    @property
    def quantizers(self) -> tuple[str, ...]:
        """The input quantizers, each once."""
        return tuple(dict.fromkeys(self.inputs.values()))

    def uniform(self, weight_bits: int, activation_bits: int) -> dict[str, LayerBits]:
        """The same bits for every layer."""
        return dict.fromkeys(self.inputs, LayerBits(weight_bits, activation_bits))
