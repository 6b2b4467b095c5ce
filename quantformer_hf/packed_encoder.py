"""Blocks of a packed transformer, one by one, or all that follow one another in one call of the kernels.

Between two calls of the kernels Python comes back to caches that hold weights and activations, and takes several times as
long as in a loop of its own. So where nobody looks at what lies between the blocks, the first one runs them all.
"""

import ctypes
import functools
import types
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.models.swin.modeling_swin import SwinDropPath, SwinLayer, window_partition

from .classes_only import current_pass
from .kernels import operators
from .kernels.library import Block, Blocks, check, library
from .layers import InferenceLayerNorm, QuantLayerNorm
from .packed_blocks import Job, OneJob, Prepared, kernels_take, set_sizes
from .quantizers import ActivationQuantizer
from .quiet_modules import quiet_modules


#: The modules of a block that its job stands for.
_PARTS = {"layernorm_before", "attention", "layernorm_after", "mlp"}

#: What does nothing but in training.
_IDLE = nn.Dropout, nn.Identity, SwinDropPath


class PackedBlock(OneJob):
    """`h = x + attention(LayerNorm(x))`, `y = h + mlp(LayerNorm(h))`, from floating point to floating point."""

    #: Jobs of all blocks of the chain that this one begins, and of this one by itself, for inputs of one size.
    _chain: Job
    _alone: Job

    #: Names of its own attributes that `place` looks at.
    PLACED_BY: tuple[str, ...] = ()

    def run(self, x: Tensor, kwargs: dict, *geometry) -> Tensor | None:
        """What comes out of this block, `(batch, tokens, channels)`, or of all in its chain; None where the layers are to be
        called.

        Args:
            x: `(batch, tokens, channels)`.
            kwargs: that transformers calls the block with.
            geometry: what else it is called with, see `place`.
        """
        current = current_pass()
        if current is not None and current.output is x and self in current.ran:
            # The first block of the chain has run this one too.
            return x
        # It begins with the first call of its first block, which may be there a second time.
        chain = None if current is None else current.chains.pop(self, None)
        if not (kernels_take(x) and self.has_own_parts() and self._takes(x)):
            return None
        if chain is not None and all(may_be_run(block) and block._takes(x) for block in chain):
            output = self._run(self._chain, list(chain), quiet_modules(chain), x, kwargs, geometry)
            if output is not None:
                current.output, current.ran = output, frozenset(chain)
                return output
        return self._run(self._alone, [self], quiet_modules(self), x, kwargs, geometry)

    def reads(self) -> ActivationQuantizer | None:
        """What quantizes the input of attention; None where it does not make codes."""
        raise NotImplementedError(f"{type(self).__name__} must say what quantizes the input of its attention")

    def place(self, *geometry) -> tuple:
        """All that says, beside the size of `x`, which rows attention reads."""
        return ()

    def fill(self, job: Block, batch: int, tokens: int, kept: int, *place) -> tuple | None:
        """Tell `job` what it is run on, of whose output the first `kept` tokens are read.

        Returns:
            Tensors that the job then points into; None where the layers are to be called.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what its attention reads")

    def prepare(self, channels: None = None) -> Prepared | None:
        norms, reads = (self.layernorm_before, self.layernorm_after), self.reads()
        tensors = [tensor for norm in norms for tensor in norm.parameters(recurse=False)]
        # All of them, since transformers may come to call one that is not known here.
        idle = all(type(part) in _IDLE for name, part in self.named_children() if name not in _PARTS)
        if reads is None or not idle or any(tensor.dtype != torch.float32 for tensor in tensors):
            return None
        (width,) = norms[0].normalized_shape
        before, after = reads.plan(width), norms[1].output_quantizer.plan(width)
        attention, mlp = self.attention.prepare(before), self.mlp.prepare(after)
        if attention is None or mlp is None:
            return None
        prepared = (operators.prepare_layer_norm(width, norm.weight, norm.bias, norm.eps) for norm in norms)
        job = Block(0, *prepared, 0, 0, 0, before.job, attention[0], after.job, mlp[0])
        return job, (before, after, attention[1], mlp[1])

    def looked_at(self) -> tuple:
        return self.layernorm_before.eps, self.layernorm_after.eps, *self.attention.looked_at()

    def has_own_parts(self) -> bool:
        """Whether nobody has put something else in the place of what its job stands for."""
        return (
            all(isinstance(part, OneJob) and part.is_itself() for part in (self.attention, self.mlp))
            and type(self.layernorm_before) in (InferenceLayerNorm, QuantLayerNorm)
            and type(self.layernorm_after) is QuantLayerNorm
        )

    def _takes(self, x: Tensor) -> bool:
        """Whether `x` is one that the kernels work on."""
        return (
            x.dtype == torch.float32
            and x.dim() == 3
            and x.shape[-1:] == self.layernorm_before.normalized_shape
            # Dropout, and gradients, are for the layers.
            and not self.training
            and not (x.requires_grad and torch.is_grad_enabled())
        )

    def _run(
        self,
        jobs: Job,
        blocks: list["PackedBlock"],
        inside: list[nn.Module] | None,
        x: Tensor,
        kwargs: dict,
        geometry: tuple,
    ) -> Tensor | None:
        """What comes out of the last one of `blocks`, in which are the modules `inside`, of which none is to be called."""
        if inside is None or any(block.attention.maps_are_wanted(kwargs) for block in blocks):
            return None
        current = current_pass()
        batch, tokens, channels = x.shape
        kept = current.read_of(blocks[-1], tokens) if current is not None and blocks[-1].is_itself() else tokens
        size = batch, tokens, kept, *(block.place(*geometry) for block in blocks)
        of = inside, list(map(type, inside)), size, [block.looked_at() for block in blocks]
        prepared = jobs.get(inside, lambda: prepare_chain(blocks, *size), of=of)
        if prepared is None:
            return None
        pointers, _ = prepared
        output = x.new_empty((batch, kept, channels))
        job = Blocks(pointers, len(pointers), x.data_ptr(), output.data_ptr())
        kernels = library()
        check(kernels.quantformer_blocks(ctypes.byref(job), torch.get_num_threads(), kernels.parallel_for))
        return output


class PackedPlainBlock(PackedBlock):
    """That of ViT and DeiT, whose attention is among all tokens."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """`(batch, tokens, channels)` in and out; of the last block's tokens, those that are read (`classes_only.py`)."""
        output = self.run(hidden_states, kwargs) if attention_mask is None else None
        return super().forward(hidden_states, attention_mask, **kwargs) if output is None else output

    def reads(self) -> ActivationQuantizer | None:
        norm = self.layernorm_before
        return norm.output_quantizer if type(norm) is QuantLayerNorm else None

    def fill(self, job: Block, batch: int, tokens: int, kept: int) -> tuple:
        set_sizes(job.attention, batch, tokens, kept)
        return ()


class PackedWindowBlock(PackedBlock):
    """That of Swin, whose attention is within windows of the image, shifted in every other block."""

    PLACED_BY = ("window_size", "shift_size")

    def forward(
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """`(batch, height * width, channels)` in and out, and, where the layers are called, the probabilities."""
        output = self.run(hidden_states, kwargs, input_dimensions, always_partition)
        if output is None:
            return super().forward(hidden_states, input_dimensions, always_partition, **kwargs)
        return output, None

    def reads(self) -> ActivationQuantizer | None:
        attention = self.attention
        return attention.input_quantizer if getattr(attention, "gives_codes", False) else None

    def place(self, input_dimensions: tuple[int, int], always_partition: bool) -> tuple:
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        return *input_dimensions, self.window_size, self.shift_size

    def fill(
        self, job: Block, batch: int, tokens: int, kept: int, height: int, width: int, window_size: int, shift_size: int
    ) -> tuple | None:
        area = window_size**2
        if area != self.attention.relative_position_bias.window_area or height * width != tokens:
            return None
        order, hidden = _windows(height, width, window_size, shift_size)
        job.order, job.image_tokens, job.image_rows = order.data_ptr(), len(order), tokens
        set_sizes(job.attention, batch * len(order) // area, area)
        if hidden is not None:
            job.attention.scores.hidden, job.attention.scores.windows = hidden.data_ptr(), len(hidden)
        return order, hidden

    def prepare(self, channels: None = None) -> Prepared | None:
        prepared = super().prepare()
        if prepared is None:
            return None
        job, tensors = prepared
        bias = self.attention.relative_position_bias().float().contiguous()
        job.attention.scores.mask, job.attention.scores.mask_strides = bias.data_ptr(), (0, *bias.stride()[1:3])
        return job, (*tensors, bias)


def may_be_run(block: nn.Module) -> bool:
    """Whether `block` may be run without being called: it and its parts are of no class of somebody else."""
    return isinstance(block, PackedBlock) and block.is_itself() and block.has_own_parts()


def prepare_chain(blocks: Sequence[PackedBlock], batch: int, tokens: int, kept: int, *places: tuple) -> Prepared | None:
    """Pointers to the jobs of `blocks` for inputs of one size, and what they point into; None where one of them has none."""
    jobs, points_into = [], []
    for position, (block, place) in enumerate(zip(blocks, places, strict=True), 1):
        prepared = block.prepared(quiet_modules(block))
        if prepared is None:
            return None
        job = Block.from_buffer_copy(prepared[0])
        # One block may be there twice.
        filled = block.fill(job, batch, tokens, kept if position == len(blocks) else tokens, *place)
        if filled is None:
            return None
        jobs.append(job)
        points_into += [prepared, filled]
    pointers = (ctypes.POINTER(Block) * len(jobs))(*map(ctypes.pointer, jobs))
    return pointers, (jobs, points_into)


@functools.lru_cache(maxsize=64)
def _windows(height: int, width: int, window_size: int, shift_size: int) -> tuple[Tensor, Tensor | None]:
    """The row of each token of an image cut into windows, -1 for padding, `(tokens,)` int32, and what hides from each other
    the tokens of a window that were shifted together, `(windows, area, area)` float32, where there is a shift."""
    # The methods of the layer ask it for these two alone.
    sizes = types.SimpleNamespace(window_size=window_size, shift_size=shift_size)
    with torch.inference_mode(False), torch.device("cpu"):
        # Rows from 1, for padding is 0.
        image = torch.arange(1.0, height * width + 1, dtype=torch.float64).view(1, height, width, 1)
        image, _ = SwinLayer.maybe_pad(sizes, image, height, width)
        windows = window_partition(SwinLayer.cyclic_shift(sizes, image), window_size)
        hidden = SwinLayer.get_attn_mask(sizes, *image.shape[1:3], dtype=torch.float32, device=image.device)
        return windows.flatten().int() - 1, hidden
