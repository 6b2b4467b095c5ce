"""Attention and perceptrons of a packed model, each in one call of the kernels; whole blocks: `packed_encoder.py`.

What Python does between two kernels takes as long as a kernel of a small model. So where nobody looks at what lies between
them (no hook, no tracing, no attention map to return), and the model is on a CPU, the whole module is one job for the
compiled kernels. They compute what the layers compute one by one, bit for bit. In all other cases the layers are called.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .attention import ATTENTION_IMPLEMENTATION, AttentionOperands, attention_is_told
from .hooks import has_listener
from .kernels import ChannelPlan, Remembered, in_integers, operators
from .kernels.library import AttentionBlock, AttentionMix, AttentionProbabilities, Mlp, check, library
from .packed_layers import PackedLinear
from .quiet_modules import quiet_modules


#: A job of the kernels, prepared but for its tensors, and what it points into.
Prepared = tuple[ctypes.Structure, tuple]


class Job(Remembered[Prepared | None]):
    """What a module has prepared; None where its layers are of other kinds, and are to be called."""

    def __reduce__(self) -> tuple:
        # Addresses mean nothing to a copy, or in another process.
        return type(self), ()


class OneJob:
    """A module that may be one job."""

    _job: Job

    #: The `forward` that the job stands for: that of the form (`packed_forms.py`).
    _own_forward: Callable

    def is_itself(self) -> bool:
        """Whether a call does what the job does. Its class may be another's, with a `forward` that calls this one's."""
        return type(self).forward is type(self)._own_forward

    def prepare(self, channels: ChannelPlan | None) -> Prepared | None:
        """The job, or None where the module has layers that are not packed.

        Args:
            channels: of the codes that it takes; None where it makes them itself.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what its job is")

    def job(self, x: Tensor, channels: ChannelPlan | None = None) -> ctypes.Structure | None:
        """A copy of the job for `x`, since several threads may run it; None where the layers are to be called."""
        prepared = self.prepared(quiet_modules(self), channels) if kernels_take(x) else None
        if prepared is None:
            return None
        job = type(prepared[0]).from_buffer_copy(prepared[0])
        # Another thread may make it anew meanwhile.
        job.points_into = prepared
        return job

    def prepared(self, inside: list[nn.Module] | None, channels: ChannelPlan | None = None) -> Prepared | None:
        """What was prepared, or is now, of the `quiet_modules` inside this one."""
        if inside is None:
            return None
        of = channels, inside, list(map(type, inside)), self.looked_at()
        return self._job.get(inside, lambda: self.prepare(channels), of=of)

    def looked_at(self) -> tuple:
        """What the job is made from beside modules and their tensors."""
        return ()


class PackedMlp(OneJob):
    """`fc2(gelu(fc1(x)))` of codes."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(..., positions)` uint8 to `(..., out)`, or whatever the layers take."""
        channels = _channels_of_codes(hidden_states, self.fc1)
        job = None if channels is None else self.job(hidden_states, channels)
        if job is None:
            return super().forward(hidden_states)
        _check_positions(hidden_states, channels)
        output = _output(hidden_states, job.second.outputs)
        job.first.x, job.first.rows = hidden_states.data_ptr(), hidden_states.shape[:-1].numel()
        if job.first.first_rows:
            job.first.image_rows = hidden_states.shape[-2]
        job.second.y = output.data_ptr()
        kernels = library()
        check(kernels.quantformer_mlp(ctypes.byref(job), torch.get_num_threads(), kernels.parallel_for))
        return output

    def prepare(self, channels: ChannelPlan) -> Prepared | None:
        if not (type(self.activation_fn) is nn.Identity and _are_packed(self.fc1, self.fc2)):
            return None
        between = self.fc2.channel_plan()
        plans = self.fc1.plan(channels), self.fc2.plan(between)
        (first, *kept), (second, *more) = plans[0].ordered_job(between), plans[1].ordered_job()
        return Mlp(first, between.job, second), (*plans, between, *kept, *more)


class PackedAttention(OneJob):
    """Attention of codes, from q, k and v to the output projection."""

    #: Attributes that its job is made from.
    SIZED_BY = ("scaling", "num_attention_heads", "head_dim")

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """`(batch, tokens, positions)` uint8, or whatever the layers take, to `(batch, tokens, channels)` and, where the
        layers are called, the probabilities."""
        channels = _channels_of_codes(hidden_states, self.q_proj)
        wanted = channels is None or hidden_states.dim() != 3 or self.maps_are_wanted(kwargs)
        job = None if wanted else self.job(hidden_states, channels)
        if job is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        _check_positions(hidden_states, channels)
        output = _output(hidden_states, job.output.outputs)
        batch, tokens = hidden_states.shape[:2]
        job.query.x = hidden_states.data_ptr()
        set_sizes(job, batch, tokens)
        mask = self._mask(attention_mask, batch)
        if mask is not None:
            # The keys of a query lie side by side, whatever the mask is broadcast from.
            mask = operators.rows_of(mask.float().expand(batch, self.num_attention_heads, tokens, tokens))
            job.scores.mask, job.scores.mask_strides = mask.data_ptr(), mask.stride()[:3]
        job.output.y = output.data_ptr()
        kernels = library()
        check(kernels.quantformer_attention_block(ctypes.byref(job), torch.get_num_threads(), kernels.parallel_for))
        return output, None

    def _mask(self, attention_mask: Tensor | None, batch: int) -> Tensor | None:
        """What is added to the scores, to be expanded to `(batch, heads, tokens, tokens)`."""
        return attention_mask

    def maps_are_wanted(self, kwargs: dict) -> bool:
        """Whether somebody wants the probabilities. A hook on this module may be what records them for `transformers`."""
        return bool(
            has_listener(self)
            or attention_is_told(self, kwargs)
            or self.__dict__.get("captured_attention") is not None
            or self.config._attn_implementation != ATTENTION_IMPLEMENTATION
        )

    def looked_at(self) -> tuple:
        return tuple(getattr(self, name) for name in self.SIZED_BY)

    def prepare(self, channels: ChannelPlan) -> Prepared | None:
        operands = getattr(self, "operands", None)
        layers = self.q_proj, self.k_proj, self.v_proj, self.o_proj
        if type(operands) is not AttentionOperands or not operands.query.packed or not _are_packed(*layers):
            return None
        between = self.o_proj.channel_plan()
        plans = *(layer.plan(channels) for layer in layers[:3]), self.o_proj.plan(between)
        *inputs, output = (plan.ordered_job() for plan in plans)
        of_scores, of_value = operands.operands()
        sizes = {
            "heads": self.num_attention_heads,
            "head_size": self.head_dim,
            "largest": operands.query.grid.qmax,
        }
        job = AttentionBlock(
            *(job for job, _ in inputs),
            AttentionProbabilities(operands=of_scores.data_ptr(), scaling=self.scaling, **sizes),
            AttentionMix(operand=of_value.data_ptr(), **sizes),
            between.job,
            output[0],
        )
        return job, (*plans, between, *inputs, output, of_scores, of_value)


def set_sizes(job: AttentionBlock, batch: int, tokens: int, queries: int | None = None) -> None:
    """Tell the parts of `job` what it is run on, and of how many first tokens the output is wanted, by default of all."""
    job.query.rows = batch * tokens
    for part in (job.scores, job.mix):
        part.batch, part.queries, part.keys = batch, tokens if queries is None else queries, tokens


def kernels_take(x: Tensor) -> bool:
    """Whether the compiled kernels are there, and are to compute with `x`."""
    return operators.nobody_listens(x) and x.is_contiguous() and library() is not None and in_integers()


def _are_packed(*layers: nn.Module) -> bool:
    """Whether `layers` are packed, the first ones read codes that another module makes, and the last one makes its own."""
    return (
        all(type(layer) is PackedLinear for layer in layers)
        and all(layer.shared_quantizer for layer in layers[:-1])
        and layers[-1].input_quantizer is not None
    )


def _channels_of_codes(codes: Tensor, layer: nn.Module) -> ChannelPlan | None:
    """How the codes lie that `layer` is given; None where it is given none, or is to answer in another dtype."""
    if codes.dtype != torch.uint8 or not getattr(layer, "shared_quantizer", ()):
        return None
    return layer.reads.plan_of_codes if layer.reads.input_dtype == torch.float32 else None


def _check_positions(codes: Tensor, channels: ChannelPlan) -> None:
    if codes.shape[-1] != channels.source.numel():
        raise ValueError(f"the codes have {codes.shape[-1]} positions, and the layer {channels.source.numel()}")


def _output(codes: Tensor, outputs: int) -> Tensor:
    return torch.empty((*codes.shape[:-1], outputs), dtype=torch.float32, device="cpu")
