"""What the operators need beside codes, made once from a layer's tensors: the order of the channels, the folded bias."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cuda, operators
from .laid_out import ALIGNMENT, lay_out, merge_runs
from .library import Codes, Product, library
from .ordered_weights import order_weights
from .remembered import made_once


#: Positions of a group are padded to a multiple of this: what the kernels multiply in one step.
STEP = 4


class _Plan:
    """A plan whose copies, also in another process, make their jobs anew, which point into the tensors of this one, and do
    without weights that are there once more: a copied model makes its plans anew."""

    def __getstate__(self) -> dict:
        return {
            name: value for name, value in self.__dict__.items() if name not in ("job", "ordered_by_itself", "laid_out")
        }


@dataclass(frozen=True, eq=False)
class ChannelPlan(_Plan):
    """How a quantized tensor lies as codes: each group's channels side by side, padded with zeros.

    `source`, `group_ends` and `group_scales` as in `operators.multiply`, `offset`, `inverse`, `knee` and `gelu` as in
    `operators.quantize`; `group_offsets` is `(groups,)`.
    """

    offset: Tensor
    inverse: Tensor
    source: Tensor
    group_ends: tuple[int, ...]
    group_scales: Tensor
    group_offsets: Tensor
    largest: int
    knee: int | None
    gelu: bool

    @property
    def channels(self) -> int:
        return self.offset.numel()

    @property
    def parts(self) -> tuple["ChannelPlan", ...]:
        """The plans of which it consists: this one."""
        return (self,)

    @property
    def arguments(self) -> tuple:
        """Of `operators.quantize`, after x."""
        in_order = self.source.numel() == self.channels and len(self.group_ends) == 1
        return self.offset, self.inverse, None if in_order else self.source, self.largest, self.gelu, self.knee

    @made_once
    def job(self) -> Codes:
        """The same for the kernel."""
        return operators.prepare_quantize(*self.arguments)

    def quantize_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
        """`quantize(layer_norm(x, weight, bias, epsilon))`, in one kernel where nobody looks in between."""
        if operators.nobody_listens(x) and library() is not None:
            return operators.run_quantize(
                self.job, x, operators.prepare_layer_norm(self.channels, weight, bias, epsilon)
            )
        return self.quantize(operators.call(operators.layer_norm, x, weight, bias, epsilon))

    def quantize(self, x: Tensor) -> Tensor:
        """`(..., channels)` to codes `(..., positions)`."""
        if operators.nobody_listens(x) and library() is not None:
            return operators.run_quantize(self.job, x)
        return operators.call(operators.quantize, x, *self.arguments)


def plan_channels(
    channels: int,
    scale: Tensor,
    offset: Tensor,
    index: Tensor | None,
    largest: int,
    knee: int | None = None,
    gelu: bool = False,
    alignment: int | None = None,
) -> ChannelPlan:
    """The plan of a tensor of `channels`, quantized as `ops.fake_quantize_groups` does.

    Args:
        scale, offset: `(groups,)`, scales positive.
        index: `(channels,)`, the group of each; None for one group.
        largest: code.
        knee: of `ops.fake_quantize_groups`.
        gelu: whether GELU makes the tensor, on the way to codes.
        alignment: of which positions are a multiple; by default that of the device, which on a GPU is that of weights.
    """
    if alignment is None:
        alignment = ALIGNMENT if scale.is_cuda else STEP
    of_channel = torch.zeros(channels, dtype=torch.long, device="cpu") if index is None else index.long().cpu()
    source, ends = [], []
    for group in range(scale.numel()):
        members = (of_channel == group).nonzero().flatten().tolist()
        source += members + [channels] * (-len(members) % STEP)
        ends.append(len(source))
    source += [channels] * (-len(source) % alignment)
    ends[-1] = len(source)
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
        knee,
        gelu,
    )


@dataclass(frozen=True, eq=False)
class TokenPlan(_Plan):
    """How a tensor lies as codes whose first tokens have scales and offsets of their own, in the same groups."""

    first: ChannelPlan
    others: ChannelPlan
    tokens: int

    def __post_init__(self) -> None:
        if self.first.group_ends != self.others.group_ends:
            # The kernels read one order of channels for both.
            raise ValueError(
                f"the groups of the first tokens end at {self.first.group_ends}, and those of the others at"
                f" {self.others.group_ends}: both plans are to be made from one assignment"
            )

    @property
    def parts(self) -> tuple[ChannelPlan, ...]:
        """The plans of which it consists: of the first tokens, and of all others."""
        return self.first, self.others

    @property
    def source(self) -> Tensor:
        return self.others.source

    @made_once
    def job(self) -> Codes:
        """As `ChannelPlan.job`, of all tokens."""
        first = Codes.from_buffer_copy(self.first.job)
        # The same order, by which the kernels know that weights lie in it.
        first.source = self.others.job.source
        return _with_first(self.others.job, first, self.tokens)

    def quantize_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
        """As `ChannelPlan.quantize_norm`, of `(..., tokens, channels)`."""
        norm = weight, bias, epsilon
        if operators.nobody_listens(x) and library() is not None:
            return operators.run_quantize(self.job, x, operators.prepare_layer_norm(self.others.channels, *norm))
        return self.quantize(operators.call(operators.layer_norm, x, *norm))

    def quantize(self, x: Tensor) -> Tensor:
        """As `ChannelPlan.quantize`, of `(..., tokens, channels)`."""
        if operators.nobody_listens(x) and library() is not None:
            return operators.run_quantize(self.job, x)
        first, others = x[..., : self.tokens, :], x[..., self.tokens :, :]
        return torch.cat([self.first.quantize(first), self.others.quantize(others)], -2)


def _with_first(job: Codes | Product, first: Codes | Product, tokens: int) -> Codes | Product:
    """A copy of `job` that leaves the first tokens of each image to `first`. It points to what both do, which is kept."""
    both = type(job).from_buffer_copy(job)
    both.first, both.first_rows = ctypes.pointer(first), tokens
    return both


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


@dataclass(frozen=True, eq=False)
class LinearPlan(_Plan):
    """A linear layer: its weight's codes and their plan, that of its input, and the bias `(out,)` float32 with the
    input's offsets folded in.

    Attributes:
        laid_out: `arguments`, on a GPU, where weights lie otherwise (`laid_out.py`).
    """

    weight: WeightPlan
    packed: Tensor
    channels: ChannelPlan
    bias: Tensor
    laid_out: tuple | None = None

    @property
    def arguments(self) -> tuple:
        """Of `operators.multiply`, after the codes of the input."""
        if self.laid_out is not None:
            return self.laid_out
        scales = self.channels.group_scales, self.weight.scale, self.bias
        return _arguments(self.packed, self.weight, self.channels.source, self.channels, *scales)

    @made_once
    def job(self) -> Product:
        """The same for the kernel."""
        return operators.prepare_multiply(*self.arguments)

    def ordered_job(self, then: "ChannelPlan | TokenPlan | None" = None) -> tuple[Product, object]:
        """`job` with its weights in order too, for codes by `then`, and what has to be kept for it (`order_weights`)."""
        return self.ordered_by_itself if then is None else order_weights(self.job, then.job)

    @made_once
    def ordered_by_itself(self) -> tuple[Product, object]:
        """`ordered_job` for outputs that are read as they are."""
        return order_weights(self.job, None)

    def __call__(self, codes: Tensor) -> Tensor:
        """`(..., positions)` to `(..., out)`, float32."""
        if operators.nobody_listens(codes) and library() is not None:
            return operators.run_multiply(self.job, codes)
        return operators.call(operators.multiply, codes, *self.arguments)


@dataclass(frozen=True, eq=False)
class TokenLinearPlan(_Plan):
    """A linear layer whose input has a `TokenPlan`: the same codes of the weight, and offsets folded for each part."""

    first: LinearPlan
    others: LinearPlan
    tokens: int

    @made_once
    def job(self) -> Product:
        """As `LinearPlan.job`, of all tokens."""
        return _with_first(self.others.job, self.first.job, self.tokens)

    def ordered_job(self, then: ChannelPlan | TokenPlan | None = None) -> tuple[Product, object]:
        """As `LinearPlan.ordered_job`; the weights of all tokens are the same."""
        reader = None if then is None else then.job
        job, ordered = order_weights(self.others.job, reader)
        first, own = order_weights(self.first.job, reader, shared=(job, ordered))
        return _with_first(job, first, self.tokens), (ordered, own, first)

    def __call__(self, codes: Tensor) -> Tensor:
        """`(..., tokens, positions)` to `(..., tokens, out)`, float32."""
        if operators.nobody_listens(codes) and library() is not None:
            return operators.run_multiply(self.job, codes)
        first, others = codes[..., : self.tokens, :], codes[..., self.tokens :, :]
        return torch.cat([self.first(first), self.others(others)], -2)


def plan_linear(
    weight: WeightPlan, packed: Tensor, bias: Tensor | None, channels: ChannelPlan | TokenPlan
) -> LinearPlan | TokenLinearPlan:
    """The plan of a layer, whose input's offsets go into its bias."""
    served = packed.is_cuda and cuda.reason_against_device(packed.device) is None
    laid_out = lay_out(weight, packed, channels.source) if served else None
    plans = [plan_part(weight, packed, bias, part, laid_out) for part in channels.parts]
    return TokenLinearPlan(*plans, channels.tokens) if isinstance(channels, TokenPlan) else plans[0]


def plan_part(
    weight: WeightPlan,
    packed: Tensor,
    bias: Tensor | None,
    channels: ChannelPlan,
    laid_out: tuple[WeightPlan, Tensor] | None,
) -> LinearPlan:
    """The plan for some tokens, or all; `laid_out` by `lay_out`, or None where weights are taken as they are."""
    if laid_out is None:
        folded = _folded_bias(weight, packed, channels.source, bias, channels)
        return LinearPlan(weight, packed, channels, folded)
    in_order, rows = laid_out
    folded = _folded_bias(in_order, rows, None, bias, channels)
    ends, scales, multiples = merge_runs(channels, in_order, rows)
    of_runs = None, ends, scales, channels.largest, in_order.scale, folded, multiples
    return LinearPlan(weight, packed, channels, folded, (rows, *_integers(in_order), *of_runs))


def _folded_bias(
    weight: WeightPlan, packed: Tensor, source: Tensor | None, bias: Tensor | None, channels: ChannelPlan
) -> Tensor:
    """`b'_o = b_o + s_o Σ_g β_g Σ_{c∈g} w_oc` (design: deployment form), in float64."""
    groups, positions = len(channels.group_ends), channels.source.numel()
    # The sums of the weights of each group, by the operator itself: row g of the input has ones in group g.
    ones = torch.zeros(groups, positions, dtype=torch.uint8, device=packed.device)
    start = 0
    for row, end in zip(ones, channels.group_ends, strict=True):
        row[start:end] = channels.source[start:end] < channels.channels
        start = end
    unit = torch.ones_like(weight.scale)
    scales = torch.ones_like(channels.group_scales), unit, torch.zeros_like(unit)
    sums = operators.call(operators.multiply, ones, *_arguments(packed, weight, source, channels, *scales))
    folded = weight.scale.double() * (channels.group_offsets.double() @ sums.double())
    if bias is not None:
        folded = folded + bias.double()
    return folded.float()


def _integers(weight: WeightPlan) -> tuple[int, ...]:
    return weight.columns, weight.bits, weight.largest_code, weight.multiplier, weight.addend


def _arguments(packed, weight: WeightPlan, source, channels: ChannelPlan, group_scales, scale, bias) -> tuple:
    return packed, *_integers(weight), source, channels.group_ends, group_scales, channels.largest, scale, bias
