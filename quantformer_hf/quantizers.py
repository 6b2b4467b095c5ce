"""Weight quantizers and group-wise activation quantizers."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .grids import Grid, fit_affine, fit_row_scales
from .groups import channel_mass, cluster_channels, initial_assignment_logits
from .kernels import ChannelPlan, Remembered, plan_channels
from .observers import QUANTILE_WEIGHTS, QUANTILES, Observer
from .ops import PRODUCERS, fake_quantize_groups, fake_quantize_mixture, fake_quantize_rows, positive, widest


class WeightQuantizer(nn.Module):
    """What the weight quantizers share: the grid, and the view of a weight as `(out, in)`.

    Args:
        bits: 1 to 8.
        out_channels: rows of the weight, one scale each.
    """

    #: 0 on a grid that holds zero, 0.5 on the half-shifted one.
    shift = 0.0

    #: Whether each weight has one level, as codes need.
    hard = True

    def __init__(self, bits: int, out_channels: int):
        super().__init__()
        self.grid = Grid(bits, signed=True, shift=self.shift)
        self.out_channels = out_channels
        self.enabled = True

    def forward(self, weight: Tensor) -> Tensor:
        """Fake-quantized weight, of the shape of `weight`: `(out, in)` or `(out, in, height, width)`."""
        if not self.enabled:
            return weight
        return self.quantize(weight)

    def quantize(self, weight: Tensor) -> Tensor:
        scale = self.step(weight)
        return fake_quantize_rows(
            weight, scale, self.grid.qmin, self.grid.qmax, shift=self.shift, gradient_scale=self.gradient_scale(weight)
        )

    def step(self, weight: Tensor) -> Tensor:
        """The scale of each row, `(out,)`, whose magnitude counts."""
        raise NotImplementedError(f"{type(self).__name__} must say what its scales are")

    def gradient_scale(self, weight: Tensor) -> float:
        """Factor on the gradient of the scales."""
        return 1.0

    @torch.no_grad()
    def integers(self, weight: Tensor) -> Tensor:
        """q of `ŵ = scale * (q + shift)`, `(out, in)`, int32: `in` counts everything but the output channels."""
        scale = positive(self.step(weight)).unsqueeze(1)
        position = weight.flatten(1).to(scale.dtype) / scale - self.shift
        return position.round().clamp(self.grid.qmin, self.grid.qmax).int()

    def calibrate(self, weight: Tensor) -> None:
        """Set what is learned from the full-precision weight. Nothing, for quantizers that compute their scale."""

    def extra_repr(self) -> str:
        return f"bits={self.grid.bits}"


class LSQWeightQuantizer(WeightQuantizer):
    """Learned step size, one scale an output channel (LSQ, arXiv 1902.08153).

    The gradient of a scale is scaled by `1 / sqrt(n * qmax)`, n the number of weights that share it.
    """

    def __init__(self, bits: int, out_channels: int):
        super().__init__(bits, out_channels)
        self.scale = nn.Parameter(torch.ones(out_channels))

    def step(self, weight: Tensor) -> Tensor:
        return self.scale

    def gradient_scale(self, weight: Tensor) -> float:
        return (weight[0].numel() * self.grid.qmax) ** -0.5

    @torch.no_grad()
    def calibrate(self, weight: Tensor) -> None:
        self.scale.copy_(fit_row_scales(weight.flatten(1), self.grid))


class ShiftedLSQWeightQuantizer(LSQWeightQuantizer):
    """Learned step size on the half-shifted grid of `StatsQWeightQuantizer`: one level more counts on the positive side."""

    shift = 0.5


class StatsQWeightQuantizer(WeightQuantizer):
    """Scale from the row's statistics on a half-shifted grid (StatsQ of OFQ, arXiv 2302.02210, section 4.1).

    `s = 2 mean|w|` a row, step `s / 2^(b-1)`, levels `(q + 1/2) * step`: symmetric and without zero, so that all `2^b`
    levels are used. At one bit this is `sign(w) * mean|w|`, the binary quantizer (XNOR-Net, arXiv 1603.05279).
    """

    shift = 0.5

    def step(self, weight: Tensor) -> Tensor:
        sizes = weight.detach().flatten(1).abs()
        return (2 * sizes.mean(1, dtype=widest(sizes)) / 2 ** (self.grid.bits - 1)).float()


class MinMaxWeightQuantizer(WeightQuantizer):
    """The smallest scale that clips no weight of the row."""

    def step(self, weight: Tensor) -> Tensor:
        rows = weight.detach().float().flatten(1)
        return torch.maximum(rows.amax(1) / self.grid.qmax, rows.amin(1) / self.grid.qmin)


_WEIGHT_QUANTIZERS = {
    "lsq": LSQWeightQuantizer,
    "lsq_shifted": ShiftedLSQWeightQuantizer,
    "statsq": StatsQWeightQuantizer,
    "minmax": MinMaxWeightQuantizer,
}

#: Choices of `QuantformerConfig.weight_quantizer`. `auto` is `lsq`, and at two bits `lsq_shifted`.
WEIGHT_QUANTIZERS = ("auto", *_WEIGHT_QUANTIZERS)


def weight_quantizer_kind(name: str, bits: int) -> type[WeightQuantizer]:
    """The class that `name`, one of `WEIGHT_QUANTIZERS`, stands for; at one bit always the binary one."""
    if name == "auto":
        name = "lsq_shifted" if bits == 2 else "lsq"
    return StatsQWeightQuantizer if bits == 1 else _WEIGHT_QUANTIZERS[name]


def build_weight_quantizer(name: str, bits: int, out_channels: int) -> WeightQuantizer:
    """A quantizer of that class."""
    return weight_quantizer_kind(name, bits)(bits, out_channels)


class ActivationQuantizer(nn.Module):
    """One learned scale and offset for a whole tensor: `x̂ = scale * clip(round((x - offset)/scale), 0, 2^b-1) + offset`.

    The gradients of both are scaled by `1 / sqrt(n * qmax)`, n the number of elements of one sample that share them
    (LSQ, arXiv 1902.08153; LSQ+, arXiv 2004.09576).

    Args:
        bits: 2 to 8.
        name: the layer that the tensor belongs to, for messages.
        calibrated: whether scale and offset hold (or are about to be loaded with) calibrated values.
        producer: elementwise function that makes the tensor, run inside the quantizer (`ops.PRODUCERS`).
        learned: whether training moves scale and offset; if not, they stay as calibrated.
    """

    def __init__(
        self, bits: int, name: str, calibrated: bool = False, producer: str = "identity", learned: bool = True
    ):
        super().__init__()
        self.grid = Grid(bits, signed=False)
        self.producer = producer
        self.name = name
        self.calibrated = calibrated
        self.enabled = True
        self.observer: Observer | None = None
        # In a packed model, whose tensors no optimizer moves: fused ones do so unseen, and plans are made anew till then.
        self.packed = False
        self._plan: Remembered[ChannelPlan] = Remembered()
        # Of what was last made to codes, which do not tell: what reads them answers in it.
        self.input_dtype = torch.float32
        if learned:
            self.scale = nn.Parameter(torch.ones(1))
            self.offset = nn.Parameter(torch.zeros(1))
        else:
            self.register_buffer("scale", torch.ones(1))
            self.register_buffer("offset", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized `producer(x)`, of any shape whose last dimension is the channels.

        Raises:
            RuntimeError: scale and offset were never calibrated.
        """
        if self.observer is not None:
            self.observer.add(self.produce(x))
        if not self.enabled:
            return self.produce(x)
        self.check_calibrated()
        gradient_scale = (x[0].numel() / self.scale.numel() * self.grid.qmax) ** -0.5
        return self.quantize(x, gradient_scale)

    def produce(self, x: Tensor) -> Tensor:
        """What is to be quantized, in full precision."""
        return PRODUCERS[self.producer][0](x)

    def check_calibrated(self) -> None:
        """Raise RuntimeError, with the layer's name, if scale and offset mean nothing yet."""
        if not self.calibrated:
            raise RuntimeError(f"layer '{self.name}' was not calibrated: run model.calibrate(batches) first")

    def quantize(self, x: Tensor, gradient_scale: float) -> Tensor:
        return fake_quantize_groups(x, self.scale, self.offset, None, self.grid.qmax, gradient_scale, self.producer)

    @property
    def hard(self) -> bool:
        """Whether each value has one level, as codes need."""
        return True

    def plan(self, channels: int) -> ChannelPlan:
        """How a tensor of `channels` lies as codes."""
        make = functools.partial(self._make_plan, channels)
        return self._plan.get((self,), make) if self.packed else make()

    def _make_plan(self, channels: int) -> ChannelPlan:
        gelu = self.producer == "gelu"
        return plan_channels(channels, positive(self.scale), self.offset, self.channel_groups(), self.grid.qmax, gelu)

    @property
    def plan_of_codes(self) -> ChannelPlan:
        """The plan of what `to_codes` of a packed model made last."""
        return self._plan.value

    def forget_plans(self) -> None:
        """After the tensors may have changed unseen."""
        self._plan.forget()

    def channel_groups(self) -> Tensor | None:
        """The group of each channel, `(channels,)`; None for one group."""
        return None

    def to_codes(self, x: Tensor, norm: tuple[Tensor | None, Tensor | None, float] | None = None) -> Tensor:
        """The integers of `forward`, `(..., positions)` uint8 in the order of `plan`, from `x` `(..., channels)`.

        Args:
            x: what `forward` takes, or, float32, what the LayerNorm takes that makes it.
            norm: weight, bias and epsilon of that LayerNorm.

        Raises:
            RuntimeError: scale and offset were never calibrated.
        """
        self.check_calibrated()
        if self.input_dtype != x.dtype:
            self.input_dtype = x.dtype
        plan = self.plan(x.shape[-1])
        return plan.quantize(x.float()) if norm is None else plan.quantize_norm(x, *norm)

    def make_observer(self) -> Observer:
        return Observer(channels=1)

    @torch.no_grad()
    def calibrate(self, quantiles: Tensor) -> None:
        """Fit scale and offset to the observed quantiles, `(channels, quantiles)`."""
        weights = QUANTILE_WEIGHTS.to(quantiles.device).expand_as(quantiles)
        scale, offset = fit_affine(quantiles.flatten(), weights.flatten(), self.grid)
        self.scale.fill_(scale.item())
        self.offset.fill_(offset.item())
        self.calibrated = True

    def extra_repr(self) -> str:
        return f"bits={self.grid.bits}, groups={self.scale.numel()}"


class GroupActivationQuantizer(ActivationQuantizer):
    """A scale and an offset for each group of channels; which channel belongs to which group is searched.

    - `pretrain`: one group. `channel_quantiles` `(channels, quantiles)` keeps what calibration saw.
    - `search`: `x̂_c = Σ_g softmax(α)_{g,c} Q_g(x_c)`, `assignment_logits` α `(groups, channels)` (Quantformer, section 3.2).
    - `finetune`: `x̂_c = Q_{g(c)}(x_c)`, `group_index` g `(channels,)`; α is gone.

    Args:
        channels: size of the last dimension of the input.
        bits, name, calibrated, producer: as in `ActivationQuantizer`.
        stage: `pretrain`, `search` or `finetune`.
        num_groups: G, of the last two stages.
    """

    def __init__(
        self,
        channels: int,
        bits: int,
        name: str,
        calibrated: bool = False,
        producer: str = "identity",
        stage: str = "pretrain",
        num_groups: int = 1,
    ):
        super().__init__(bits, name, calibrated, producer)
        self.channels = channels
        self.set_stage(stage, num_groups)

    def set_stage(self, stage: str, num_groups: int) -> None:
        """Give the quantizer the tensors of `stage`, with nothing in them yet: the caller fills or loads them."""
        device = self.scale.device
        for name in ("channel_quantiles", "assignment_logits", "group_index"):
            if hasattr(self, name):
                delattr(self, name)
        groups = 1 if stage == "pretrain" else num_groups
        if self.scale.numel() != groups:
            self.scale = nn.Parameter(torch.ones(groups, device=device))
            self.offset = nn.Parameter(torch.zeros(groups, device=device))
        if stage == "pretrain":
            self.register_buffer("channel_quantiles", torch.zeros(self.channels, len(QUANTILES), device=device))
        elif stage == "search":
            self.assignment_logits = nn.Parameter(torch.zeros(groups, self.channels, device=device))
        else:
            self.register_buffer("group_index", torch.zeros(self.channels, dtype=torch.uint8, device=device))
        self.stage = stage

    def quantize(self, x: Tensor, gradient_scale: float) -> Tensor:
        if self.stage == "pretrain":
            return super().quantize(x, gradient_scale)
        parameters = x, self.scale, self.offset
        arguments = self.grid.qmax, gradient_scale, self.producer
        if self.stage == "search":
            return fake_quantize_mixture(*parameters, self.assignment_probabilities(), *arguments)
        return fake_quantize_groups(*parameters, self.group_index.long(), *arguments)

    @property
    def hard(self) -> bool:
        return self.stage != "search"

    def channel_groups(self) -> Tensor | None:
        return None if self.stage == "pretrain" else self.group_index

    def assignment_probabilities(self) -> Tensor:
        """`softmax(α)` over the groups: `(groups, channels)`."""
        return self.assignment_logits.softmax(0)

    def make_observer(self) -> Observer:
        return Observer(self.channels)

    @torch.no_grad()
    def calibrate(self, quantiles: Tensor) -> None:
        super().calibrate(quantiles)
        self.channel_quantiles.copy_(quantiles)

    @torch.no_grad()
    def begin_search(self, num_groups: int, importance: Tensor | None = None) -> None:
        """Split the channels into groups (`cluster_channels`), and start α from what each channel loses in each group.

        Args:
            num_groups: G.
            importance: `(channels,)`, what a squared error of each channel costs; by default the same for all.
        """
        if importance is None:
            importance = torch.ones(self.channels, device=self.scale.device)
        scale, offset, errors = cluster_channels(self.channel_quantiles, importance, num_groups, self.grid)
        self.set_stage("search", num_groups)
        self.scale.copy_(scale)
        self.offset.copy_(offset)
        self.assignment_logits.copy_(initial_assignment_logits(errors))

    @torch.no_grad()
    def refit(self, quantiles: Tensor, importance: Tensor) -> None:
        """Fit scale and offset of each group anew. Channels stay in their groups, and an empty group as it is.

        Args:
            quantiles: `(channels, quantiles)`, of what the quantizer sees now.
            importance: as in `begin_search`.
        """
        if self.stage == "pretrain":
            members = torch.ones(1, self.channels, device=self.scale.device)
        elif self.stage == "search":
            members = self.assignment_probabilities()
        else:
            members = F.one_hot(self.group_index.long(), self.scale.numel()).T.float()
        inhabited = members.sum(1) > 0
        mass = (members * channel_mass(importance)).unsqueeze(2) * QUANTILE_WEIGHTS.to(quantiles.device)
        scale, offset = fit_affine(quantiles.flatten(), mass[inhabited].flatten(1), self.grid)
        self.scale[inhabited], self.offset[inhabited] = scale, offset

    @torch.no_grad()
    def freeze_groups(self) -> None:
        """Keep for each channel the group of its largest α."""
        index = self.assignment_logits.argmax(0)
        self.set_stage("finetune", self.scale.numel())
        self.group_index.copy_(index)
