"""Group-wise activation quantizers; beside them, by name, the weight quantizers."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .grids import Grid, fit_affine, fit_offset, gelu_grid
from .groups import channel_mass, cluster_channels, initial_assignment_logits
from .kernels import ChannelPlan, Remembered, TokenPlan, plan_channels
from .multiples import learned_multiples
from .observers import QUANTILE_WEIGHTS, QUANTILES, Observer
from .ops import PRODUCERS, fake_quantize_groups, fake_quantize_mixture, positive
from .weight_quantizers import (
    WEIGHT_QUANTIZERS,
    LSQWeightQuantizer,
    MinMaxWeightQuantizer,
    ShiftedLSQWeightQuantizer,
    StatsQWeightQuantizer,
    WeightQuantizer,
    build_weight_quantizer,
    weight_quantizer_kind,
)


__all__ = [
    "WEIGHT_QUANTIZERS",
    "ActivationQuantizer",
    "GroupActivationQuantizer",
    "LSQWeightQuantizer",
    "MinMaxWeightQuantizer",
    "ShiftedLSQWeightQuantizer",
    "StatsQWeightQuantizer",
    "WeightQuantizer",
    "build_weight_quantizer",
    "weight_quantizer_kind",
]


class ActivationQuantizer(nn.Module):
    """One learned scale and offset for a whole tensor: `x̂ = scale * clip(round((x - offset)/scale), 0, 2^b-1) + offset`.

    Where the grid has a knee, the nearest of its levels is taken instead (`ops/levels.py`).

    The gradients of both are scaled by `1 / sqrt(n * qmax)`, n the number of elements of one sample that share them
    (LSQ, arXiv 1902.08153; LSQ+, arXiv 2004.09576); where Swin's blocks see windows one by one, each is a sample.

    Args:
        bits: 2 to 8.
        name: the layer that the tensor belongs to, for messages.
        calibrated: whether scale and offset hold (or are about to be loaded with) calibrated values.
        producer: elementwise function that makes the tensor, run inside the quantizer (`ops.PRODUCERS`).
        learned: whether training moves scale and offset; if not, they stay as calibrated.
        observed_channels: columns of the tensor that calibration keeps apart; 1 pools all of it.
    """

    def __init__(
        self,
        bits: int,
        name: str,
        calibrated: bool = False,
        producer: str = "identity",
        learned: bool = True,
        observed_channels: int = 1,
    ):
        super().__init__()
        self.grid = Grid(bits, signed=False)
        self.producer = producer
        self.name = name
        self.calibrated = calibrated
        self.enabled = True
        self.observer: Observer | None = None
        self.observed_channels = observed_channels
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
        arguments = self.grid.qmax, gradient_scale, self.producer, self.grid.knee
        return fake_quantize_groups(x, self.scale, self.offset, None, *arguments)

    def step(self) -> Tensor:
        """The scales that it quantizes with, positive, of the shape of `scale`."""
        return positive(self.scale)

    @property
    def hard(self) -> bool:
        """Whether each value has one level, as codes need."""
        return True

    def plan(self, channels: int) -> ChannelPlan:
        """How a tensor of `channels` lies as codes."""
        make = functools.partial(self._make_plan, channels)
        return self._plan.get(self._planned_from(), make) if self.packed else make()

    def _planned_from(self) -> tuple[nn.Module, ...]:
        """The modules whose tensors a plan is made from."""
        return (self,)

    def _make_plan(self, channels: int) -> ChannelPlan:
        levels, gelu = (self.grid.qmax, self.grid.knee), self.producer == "gelu"
        return plan_channels(channels, self.step(), self.offset, self.channel_groups(), *levels, gelu)

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
        return Observer(self.observed_channels)

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
        whole_multiples: whether it quantizes with multiples of one unit near its scales (`multiples.py`); where there is one
            group, it does not.
        twin_levels: whether its levels are those of `grids.gelu_grid` where GELU makes the tensor.
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
        whole_multiples: bool = False,
        twin_levels: bool = False,
    ):
        super().__init__(bits, name, calibrated, producer)
        self.channels = channels
        self.whole_multiples = whole_multiples
        self.set_levels(twin_levels)
        # The quantizer of the first tokens, where these have scales and offsets of their own (`class_token.py`).
        self.class_token: GroupActivationQuantizer | None = None
        self._token_plan: TokenPlan | None = None
        self.set_stage(stage, num_groups)

    def set_levels(self, twin: bool) -> None:
        """Have its levels lie as `twin_levels` says; what has been fitted to others is to be fitted anew."""
        self.twin_levels, bits = twin, self.grid.bits
        self.grid = gelu_grid(bits) if twin and self.producer == "gelu" else Grid(bits, signed=False)

    def set_stage(self, stage: str, num_groups: int) -> None:
        """Give the quantizer the tensors of `stage`, with nothing in them yet: the caller fills or loads them."""
        device = self.scale.device
        for name in ("channel_quantiles", "assignment_logits", "group_index"):
            if name in self._parameters or name in self._buffers:
                delattr(self, name)
        groups = 1 if stage == "pretrain" else num_groups
        if self.scale.numel() != groups:
            # What somebody has frozen stays so.
            trains = self.scale.requires_grad
            self.scale = nn.Parameter(torch.ones(groups, device=device), requires_grad=trains)
            self.offset = nn.Parameter(torch.zeros(groups, device=device), requires_grad=trains)
        self._make_assignment(stage, groups)
        self.stage = stage

    def _make_assignment(self, stage: str, groups: int) -> None:
        """The tensors by which channels belong to groups."""
        device = self.scale.device
        if stage == "pretrain":
            self.register_buffer("channel_quantiles", torch.zeros(self.channels, len(QUANTILES), device=device))
        elif stage == "search":
            logits = torch.zeros(groups, self.channels, device=device)
            self.assignment_logits = nn.Parameter(logits, requires_grad=self.scale.requires_grad)
        else:
            self.register_buffer("group_index", torch.zeros(self.channels, dtype=torch.uint8, device=device))

    def with_class_token(self) -> list["GroupActivationQuantizer"]:
        """This quantizer, and then that of the class token, if there is one."""
        return [self] if self.class_token is None else [self, self.class_token]

    def parts(self, x: Tensor) -> list[tuple["GroupActivationQuantizer", Tensor]]:
        """The quantizers of `x` `(..., tokens, channels)`, each with the tokens that it quantizes."""
        first = self.class_token
        if first is None:
            return [(self, x)]
        return [(first, x[..., : first.tokens, :]), (self, x[..., first.tokens :, :])]

    def forward(self, x: Tensor) -> Tensor:
        """As `ActivationQuantizer`; with a quantizer of the class token, `x` is `(..., tokens, channels)`."""
        if self.class_token is None:
            return super().forward(x)
        (first, of_class_token), (_, of_others) = self.parts(x)
        return torch.cat([first(of_class_token), super().forward(of_others)], -2)

    def plan(self, channels: int) -> ChannelPlan | TokenPlan:
        own = super().plan(channels)
        return own if self.class_token is None else self._plan_of_tokens(self.class_token.plan(channels), own)

    @property
    def plan_of_codes(self) -> ChannelPlan | TokenPlan:
        own = self._plan.value
        return own if self.class_token is None else self._plan_of_tokens(self.class_token.plan_of_codes, own)

    def _plan_of_tokens(self, first: ChannelPlan, others: ChannelPlan) -> TokenPlan:
        made = self._token_plan
        if made is None or made.first is not first or made.others is not others:
            # The same one each time, by which what is made of it is known.
            made = self._token_plan = TokenPlan(first, others, self.class_token.tokens)
        return made

    def quantize(self, x: Tensor, gradient_scale: float) -> Tensor:
        if self.stage == "pretrain":
            return super().quantize(x, gradient_scale)
        parameters = x, self.step() if self.in_multiples else self.scale, self.offset
        arguments = self.grid.qmax, gradient_scale, self.producer, self.grid.knee
        if self.stage == "search":
            return fake_quantize_mixture(*parameters, self.assignment_probabilities(), *arguments)
        return fake_quantize_groups(*parameters, self.group_index.long(), *arguments)

    @property
    def in_multiples(self) -> bool:
        """Whether it quantizes with multiples of a unit."""
        return self.whole_multiples and self.scale.numel() > 1

    def step(self) -> Tensor:
        return learned_multiples(self.scale) if self.in_multiples else super().step()

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
    def begin_search(self, num_groups: int, importance: Tensor | None = None, twin_levels: bool = False) -> None:
        """Split the channels into groups (`cluster_channels`), and start α from what each channel loses in each group.

        Args:
            num_groups: G.
            importance: `(channels,)`, what a squared error of each channel costs; by default the same for all.
            twin_levels: how its levels lie from now on.
        """
        self.set_levels(twin_levels)
        if importance is None:
            importance = torch.ones(self.channels, device=self.scale.device)
        scale, offset, errors = cluster_channels(self.channel_quantiles, importance, num_groups, self.grid)
        self.set_stage("search", num_groups)
        self.whole_multiples = True
        self.scale.copy_(scale)
        self.offset.copy_(offset)
        self.assignment_logits.copy_(initial_assignment_logits(errors))

    @torch.no_grad()
    def refit(self, quantiles: Tensor, importance: Tensor) -> None:
        """Fit scale and offset of each group anew. Channels stay in their groups, and an empty group as it is, unless its
        scale is larger than all others.

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
        self.fit(quantiles, importance, members)

    def fit(self, quantiles: Tensor, importance: Tensor, members: Tensor) -> None:
        """`refit` with `members` `(groups, channels)`: how much of each channel belongs to each group."""
        inhabited = members.sum(1) > 0
        mass = (members * channel_mass(importance)).unsqueeze(2) * QUANTILE_WEIGHTS.to(quantiles.device)
        values, mass = quantiles.float().flatten(), mass.flatten(1)
        # Whatever the model was cast to.
        scale, offset = self.scale.float().clone(), self.offset.float().clone()
        scale[inhabited], offset[inhabited] = fit_affine(values, mass[inhabited], self.grid)
        self.scale.copy_(scale)
        if self.in_multiples:
            self._bound_scales(inhabited)
            offset = fit_offset(values, mass, self.grid, self.step(), offset).where(inhabited, offset)
        self.offset.copy_(offset)

    @torch.no_grad()
    def freeze_groups(self) -> None:
        """Keep for each channel the group of its largest α."""
        index = self.assignment_logits.argmax(0)
        self.set_stage("finetune", self.scale.numel())
        self.group_index.copy_(index)
        if self.in_multiples:
            self._bound_scales(torch.bincount(index, minlength=self.scale.numel()) > 0)

    def _bound_scales(self, inhabited: Tensor) -> None:
        """Keep the scales of groups that are not `inhabited` `(groups,)` from asking for a larger unit."""
        scale = positive(self.scale)
        self.scale.copy_(scale.clamp(max=scale[inhabited].max()))
