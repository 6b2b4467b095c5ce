"""What may be chosen: the width of each block linear's weight, of each tensor that block linears read, and of each attention
block's operands."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Self

from ..backbone_layers import describe_backbone
from ..configuration_quantformer import QuantformerConfig
from ..grids import FULL_PRECISION_BITS
from ..layer_bits import LayerBits


#: Candidate widths where nobody names others.
CANDIDATE_BITS = (2, 3, 4, 6, 8)

#: And of attention products.
CANDIDATE_ATTENTION_BITS = (4, 5, 6, 8)

#: The bits of each layer by its name; where attention products are in play, of each attention block too: the same for weight
#: and activation, its operands.
Widths = Mapping[str, LayerBits]


def check_candidates(candidates: Iterable[int], name: str = "candidate_bits", least: int = 1) -> tuple[int, ...]:
    """`candidates`, ascending.

    Args:
        name: of the argument, for messages.
        least: that one may be.

    Raises:
        ValueError: one that is not `least` to 8, or none that activations may have (2 to 8).
    """
    candidates = tuple(candidates)
    for bits in candidates:
        if isinstance(bits, bool) or not isinstance(bits, int) or not least <= bits <= 8:
            why = " (1 bit is for weights only)" if least == 1 else ""
            raise ValueError(f"{name} has {bits!r}: choose from {least} to 8{why}")
    candidates = tuple(sorted(set(candidates)))
    if not any(bits >= 2 for bits in candidates):
        raise ValueError(f"{name} is {list(candidates)}: activations need one of 2 to 8")
    return candidates


@dataclass(frozen=True)
class SearchSpace:
    """The choices, and which of them hang together.

    Attributes:
        inputs: by the name of each linear of a block, the quantizer of its input. Layers that read the same tensor (q, k
            and v) have the same one, and so the same activation bits.
        weight_bits, activation_bits: candidates, ascending.
        attention: names of the attention blocks whose operands are in play.
        attention_bits: candidates for them, ascending.
        default_attention_bits: one of these, which they have where all layers have the same bits.
    """

    inputs: dict[str, str]
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    attention: tuple[str, ...] = ()
    attention_bits: tuple[int, ...] = ()
    default_attention_bits: int | None = None

    @classmethod
    def of(
        cls,
        config: QuantformerConfig,
        candidates: Iterable[int] = CANDIDATE_BITS,
        attention_candidates: Iterable[int] = (),
    ) -> Self:
        """All linears of the blocks of `config`'s backbone.

        Args:
            candidates: of weights and activations.
            attention_candidates: of attention products, beside `config.attention_bits`. None: they have those. They are not
                in play where `config` leaves them in floating point.

        Raises:
            ValueError: as `check_candidates`.
        """
        candidates, attention_candidates = check_candidates(candidates), tuple(attention_candidates)
        backbone = describe_backbone(config.backbone_config)
        inputs = {name: layer.input_quantizer for name, layer in backbone.layers.items() if layer.kind == "block"}
        space = cls(inputs, candidates, tuple(bits for bits in candidates if bits >= 2))
        default = config.attention_bits
        if not attention_candidates or default in (None, FULL_PRECISION_BITS):
            return space
        attention_bits = check_candidates((*attention_candidates, default), "attention_candidate_bits", least=2)
        return replace(
            space,
            attention=tuple(backbone.attention),
            attention_bits=attention_bits,
            default_attention_bits=default,
        )

    @property
    def quantizers(self) -> tuple[str, ...]:
        """The input quantizers, each once."""
        return tuple(dict.fromkeys(self.inputs.values()))

    def uniform(self, weight_bits: int, activation_bits: int) -> dict[str, LayerBits]:
        """The same bits for every layer, and the config's for attention products."""
        layers = dict.fromkeys(self.inputs, LayerBits(weight_bits, activation_bits))
        return layers | dict.fromkeys(self.attention, self.of_attention(self.default_attention_bits))

    @staticmethod
    def of_attention(bits: int | None) -> LayerBits:
        """How an attention block's bits stand among those of layers."""
        return LayerBits(bits, bits)
