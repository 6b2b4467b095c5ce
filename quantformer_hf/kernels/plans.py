"""What the operators need beside codes, made once from a layer's tensors: the order of the channels, the folded bias."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from . import operators


T = TypeVar("T")

#: Positions of a group are padded to a multiple of this: what the kernels multiply in one step.
STEP = 4


@dataclass(frozen=True)
class ChannelPlan:
    """How a quantized tensor lies as codes: each group's channels side by side, padded with zeros.

    `source`, `group_ends` and `group_scales` as in `operators.multiply`, `offset` and `inverse` as in
    `operators.quantize`; `group_offsets` is `(groups,)`.
    """

    offset: Tensor
    inverse: Tensor
    source: Tensor
    group_ends: tuple[int, ...]
    group_scales: Tensor
    group_offsets: Tensor
    largest: int

    @property
    def channels(self) -> int:
        return self.offset.numel()

    def quantize(self, x: Tensor) -> Tensor:
        """`(..., channels)` to codes `(..., positions)`."""
        in_order = self.source.numel() == self.channels and len(self.group_ends) == 1
        source = None if in_order else self.source
        return operators.call(operators.quantize, x, self.offset, self.inverse, source, self.largest)


def plan_channels(channels: int, scale: Tensor, offset: Tensor, index: Tensor | None, largest: int) -> ChannelPlan:
    """The plan of a tensor of `channels`, quantized as `ops.fake_quantize_groups` does.

    Args:
        scale, offset: `(groups,)`, scales positive.
        index: `(channels,)`, the group of each; None for one group.
        largest: code.
    """
    of_channel = torch.zeros(channels, dtype=torch.long) if index is None else index.long().cpu()
    source, ends = [], []
    for group in range(scale.numel()):
        members = (of_channel == group).nonzero().flatten().tolist()
        source += members + [channels] * (-len(members) % STEP)
        ends.append(len(source))
    of_channel = of_channel.to(scale.device)
    # A model in another dtype computes here in float32 all the same.
    scale, offset = scale.detach().float(), offset.detach().float()
    return ChannelPlan(
        offset[of_channel].contiguous(),
        (1 / scale)[of_channel].contiguous(),
        torch.tensor(source, dtype=torch.int32, device=scale.device),
        tuple(ends),
        scale.clone(),
        offset.clone(),
        largest,
    )


@dataclass(frozen=True)
class WeightPlan:
    """A weight as the kernels take it: `scale * (code * multiplier + addend)`, codes packed in `bits` each."""

    columns: int
    bits: int
    largest_code: int
    multiplier: int
    addend: int
    scale: Tensor


def plan_weight(columns: int, bits: int, qmin: int, qmax: int, shift: float, scale: Tensor) -> WeightPlan:
    """The plan of a weight `scale * (q + shift)` whose codes `q - qmin` are packed in `bits` each.

    On the half-shifted grid the integers are `2 q + 1`, with half the scale: both exact.
    """
    scale = scale.detach().float()
    if shift == 0:
        return WeightPlan(columns, bits, qmax - qmin, 1, qmin, scale)
    return WeightPlan(columns, bits, qmax - qmin, 2, 2 * qmin + 1, scale / 2)


@dataclass(frozen=True)
class LinearPlan:
    """A linear layer: its weight's plan, and the bias `(out,)` float32 with the input's offsets folded in."""

    weight: WeightPlan
    bias: Tensor

    def __call__(self, codes: Tensor, packed: Tensor, channels: ChannelPlan) -> Tensor:
        """`(..., positions)` to `(..., out)`, float32. `packed` is the weight's codes."""
        return _multiply(codes, packed, self.weight, channels, channels.group_scales, self.weight.scale, self.bias)


def plan_linear(weight: WeightPlan, packed: Tensor, bias: Tensor | None, channels: ChannelPlan) -> LinearPlan:
    """Fold the offsets: `b'_o = b_o + s_o Σ_g β_g Σ_{c∈g} w_oc` (design: deployment form), in float64."""
    groups, positions = len(channels.group_ends), channels.source.numel()
    # The sums of the weights of each group, by the operator itself: row g of the input has ones in group g.
    ones = torch.zeros(groups, positions, dtype=torch.uint8, device=packed.device)
    start = 0
    for row, end in zip(ones, channels.group_ends, strict=True):
        row[start:end] = channels.source[start:end] < channels.channels
        start = end
    unit = torch.ones_like(weight.scale)
    sums = _multiply(
        ones, packed, weight, channels, torch.ones_like(channels.group_scales), unit, torch.zeros_like(unit)
    )
    folded = weight.scale.double() * (channels.group_offsets.double() @ sums.double())
    if bias is not None:
        folded = folded + bias.double()
    return LinearPlan(weight, folded.float())


def _multiply(codes, packed, weight: WeightPlan, channels: ChannelPlan, group_scales, scale, bias) -> Tensor:
    return operators.call(
        operators.multiply,
        codes,
        packed,
        weight.columns,
        weight.bits,
        weight.largest_code,
        weight.multiplier,
        weight.addend,
        channels.source,
        channels.group_ends,
        group_scales,
        channels.largest,
        scale,
        bias,
    )


class Remembered(Generic[T]):
    """A value made from tensors, and made anew when one of them was changed, moved or replaced."""

    def __init__(self) -> None:
        self._key: tuple | None = None
        self._value: T | None = None

    def get(self, tensors: Sequence[Tensor | None], make: Callable[[], T]) -> T:
        # A graph that is being traced takes what the last eager call, or loading, has left: a key is no tensor.
        if torch.compiler.is_compiling() and self._value is not None:
            return self._value
        key = tuple(None if t is None else (t.data_ptr(), t.device, _version(t)) for t in tensors)
        if key != self._key:
            # Also under inference_mode, made tensors must serve later calls outside it.
            with torch.inference_mode(False), torch.no_grad():
                value = make()
            self._value, self._key = value, key
            return value
        return self._value

    def forget(self) -> None:
        """Make it anew at the next call, whatever the tensors say."""
        self._key = self._value = None


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
