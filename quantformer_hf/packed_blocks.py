"""Attention blocks and multilayer perceptrons of a packed model, each in one call of the kernels.

What Python does between two kernels takes as long as a kernel of a small model. So where nobody looks at what lies between
them (no hook, no tracing, no attention map to return), and the model is on a CPU, the whole module is one job for the
compiled kernels. They compute what the layers compute one by one, bit for bit. In all other cases the layers are called.
"""

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.models.deit.modeling_deit import DeiTAttention, DeiTMLP
from transformers.models.swin.modeling_swin import SwinAttention, SwinMLP
from transformers.models.vit.modeling_vit import ViTAttention, ViTMLP

from .attention import ATTENTION_IMPLEMENTATION
from .kernels import ChannelPlan, LinearPlan, in_integers, operators
from .kernels.library import AttentionBlock, AttentionMix, AttentionProbabilities, Mlp, check, library
from .packed_layers import PackedLinear


class _Job:
    """A job of the kernels, prepared but for its tensors. It points into plans: as long as these are the same, so is it."""

    def __init__(self) -> None:
        self._plans: tuple = ()
        self._prepared: Mlp | AttentionBlock | None = None

    def get(self, make: Callable[..., Mlp | AttentionBlock], *plans: object) -> Mlp | AttentionBlock:
        """A copy, since several threads may run it: of `make(*plans)`."""
        if len(plans) != len(self._plans) or any(new is not old for new, old in zip(plans, self._plans, strict=True)):
            self._prepared, self._plans = make(*plans), plans
        return type(self._prepared).from_buffer_copy(self._prepared)

    def __reduce__(self) -> tuple:
        # Addresses mean nothing to a copy, or in another process.
        return _Job, ()


class PackedMlp:
    """`fc2(gelu(fc1(x)))` of codes."""

    _job: _Job

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(..., positions)` uint8 to `(..., out)`, or whatever the layers take."""
        if not (isinstance(self.activation_fn, nn.Identity) and _one_job(hidden_states, (self.fc1, self.fc2))):
            return super().forward(hidden_states)
        first = self.fc1.plan(self.fc1.reads.plan_of_codes)
        between = self.fc2.channel_plan()
        second = self.fc2.plan(between)
        _check_positions(hidden_states, first)
        job = self._job.get(lambda *plans: Mlp(*(plan.job for plan in plans)), first, between, second)
        output = _output(hidden_states, second)
        job.first.x, job.first.rows = hidden_states.data_ptr(), hidden_states.shape[:-1].numel()
        job.second.y = output.data_ptr()
        kernels = library()
        check(kernels.quantformer_mlp(ctypes.byref(job), torch.get_num_threads(), kernels.parallel_for))
        return output


class PackedAttention:
    """Attention of codes, from q, k and v to the output projection."""

    _job: _Job

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """`(batch, tokens, positions)` uint8, or whatever the layers take, to `(batch, tokens, channels)` and, where the
        layers are called, the probabilities."""
        layers = self.q_proj, self.k_proj, self.v_proj, self.o_proj
        if not (_one_job(hidden_states, layers) and hidden_states.dim() == 3 and self._keeps_maps(kwargs)):
            return super().forward(hidden_states, attention_mask, **kwargs)
        channels = self.q_proj.reads.plan_of_codes
        readers = [layer.plan(channels) for layer in layers[:3]]
        between = self.o_proj.channel_plan()
        output_plan = self.o_proj.plan(between)
        _check_positions(hidden_states, readers[0])
        job = self._job.get(self._prepare, *readers, between, output_plan, *self.operands.operands())
        output = _output(hidden_states, output_plan)
        batch, tokens = hidden_states.shape[:2]
        job.query.x, job.query.rows = hidden_states.data_ptr(), batch * tokens
        for part in (job.scores, job.mix):
            part.batch, part.queries, part.keys = batch, tokens, tokens
        mask = self._mask(attention_mask, batch)
        if mask is not None:
            mask = mask.float().contiguous().expand(batch, self.num_attention_heads, tokens, tokens)
            job.scores.mask, job.scores.mask_strides = mask.data_ptr(), mask.stride()[:3]
        job.output.y = output.data_ptr()
        kernels = library()
        check(kernels.quantformer_attention_block(ctypes.byref(job), torch.get_num_threads(), kernels.parallel_for))
        return output, None

    def _mask(self, attention_mask: Tensor | None, batch: int) -> Tensor | None:
        """What is added to the scores, to be expanded to `(batch, heads, tokens, tokens)`."""
        return attention_mask

    def _keeps_maps(self, kwargs: dict) -> bool:
        """Whether nobody wants the probabilities. A hook on this module may be what records them for `transformers`."""
        operands = getattr(self, "operands", None)
        return (
            operands is not None
            and operands.query.packed
            and not self._forward_hooks
            and not kwargs.get("output_attentions")
            and getattr(self, "captured_attention", None) is None
            and self.config._attn_implementation == ATTENTION_IMPLEMENTATION
            and all(q.enabled and q.calibrated and q.observer is None for q in operands.children())
        )

    def _prepare(
        self,
        query: LinearPlan,
        key: LinearPlan,
        value: LinearPlan,
        between: ChannelPlan,
        output: LinearPlan,
        of_scores: Tensor,
        of_mix: Tensor,
    ) -> AttentionBlock:
        largest = self.operands.query.grid.qmax
        sizes = {"heads": self.num_attention_heads, "head_size": self.head_dim, "largest": largest}
        return AttentionBlock(
            query.job,
            key.job,
            value.job,
            AttentionProbabilities(operands=of_scores.data_ptr(), scaling=self.scaling, **sizes),
            AttentionMix(operands=of_mix.data_ptr(), **sizes),
            between.job,
            output.job,
        )


def _one_job(codes: Tensor, layers: Sequence[nn.Module]) -> bool:
    """Whether `layers`, of which the first one reads `codes`, need not be called one by one."""
    return (
        operators.nobody_listens(codes)
        and codes.dtype == torch.uint8
        and codes.is_contiguous()
        and library() is not None
        and in_integers()
        and all(
            type(layer) is PackedLinear and not layer._forward_hooks and not layer._forward_pre_hooks
            for layer in layers
        )
        and bool(layers[0].shared_quantizer)
        and layers[0].reads.input_dtype == torch.float32
        and layers[-1].input_quantizer is not None
        and layers[-1].input_quantizer.calibrated
    )


def _check_positions(codes: Tensor, plan: LinearPlan) -> None:
    if codes.shape[-1] != plan.channels.source.numel():
        raise ValueError(f"the codes have {codes.shape[-1]} positions, and the layer {plan.channels.source.numel()}")


def _output(codes: Tensor, plan: LinearPlan) -> Tensor:
    return torch.empty((*codes.shape[:-1], plan.packed.shape[0]), dtype=torch.float32)


class PackedViTMLP(PackedMlp, ViTMLP):
    pass


class PackedDeiTMLP(PackedMlp, DeiTMLP):
    pass


class PackedSwinMLP(PackedMlp, SwinMLP):
    pass


class PackedViTAttention(PackedAttention, ViTAttention):
    pass


class PackedDeiTAttention(PackedAttention, DeiTAttention):
    pass


class PackedSwinAttention(PackedAttention, SwinAttention):
    def _mask(self, attention_mask: Tensor | None, batch: int) -> Tensor:
        """The relative position bias, and what hides from each other tokens of a window that were shifted together."""
        bias = self.relative_position_bias()
        if attention_mask is None:
            return bias
        windows = bias + attention_mask.unsqueeze(1)
        return windows.repeat(batch // len(windows), 1, 1, 1)


#: The class that a module of each class has in a packed model: parameters and submodules are the same.
PACKED_FORMS = {
    ViTMLP: PackedViTMLP,
    DeiTMLP: PackedDeiTMLP,
    SwinMLP: PackedSwinMLP,
    ViTAttention: PackedViTAttention,
    DeiTAttention: PackedDeiTAttention,
    SwinAttention: PackedSwinAttention,
}
PLAIN_FORMS = {packed: plain for plain, packed in PACKED_FORMS.items()}


def choose_forms(backbone: nn.Module, packed: bool) -> None:
    """Give the modules of `backbone` their classes for a packed model, or those of transformers."""
    forms = PACKED_FORMS if packed else PLAIN_FORMS
    for module in backbone.modules():
        if type(module) in forms:
            module.__class__ = forms[type(module)]
            module._job = _Job()
