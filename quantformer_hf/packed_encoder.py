"""Blocks of a packed ViT or DeiT, one by one, or all of them in one call of the kernels.

Between two calls of the kernels Python comes back to caches that hold weights and activations, and takes several times as
long as in a loop of its own. So where nobody looks at what lies between the blocks, the first one runs them all.
"""

import ctypes

import torch
from torch import Tensor, nn

from .classes_only import Pass, current_pass
from .kernels.library import Block, Blocks, check, library
from .layers import QuantLayerNorm
from .packed_blocks import Job, PackedBlock, Prepared, kernels_take, quiet_modules, set_sizes
from .quantizers import ActivationQuantizer


class PackedPlainBlock(PackedBlock):
    """A block whose attention is among all tokens."""

    #: What the first block has prepared of all of them.
    _all: Job

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """`(batch, tokens, channels)` in and out; of the last block's tokens, those that are read (`classes_only.py`)."""
        if attention_mask is not None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        current = current_pass()
        if current is not None:
            if current.output is hidden_states:
                # Of this block too.
                return hidden_states
            if current.first is self:
                current.output = self._run_all(current, hidden_states, kwargs)
                if current.output is not None:
                    return current.output
        job = self.block_job(hidden_states, kwargs)
        if job is None:
            return super().forward(hidden_states, None, **kwargs)
        batch, tokens = hidden_states.shape[:2]
        kept = tokens if current is None or current.last is not self else current.read_of(tokens)
        set_sizes(job.attention, batch, tokens, kept)
        return self.run(job, hidden_states, kept)

    def reads(self) -> ActivationQuantizer | None:
        norm = self.layernorm_before
        return norm.output_quantizer if type(norm) is QuantLayerNorm else None

    def _run_all(self, current: Pass, x: Tensor, kwargs: dict) -> Tensor | None:
        """What comes out of the last block; None where they are to be called one by one."""
        inside = quiet_modules(current.blocks) if kernels_take(x) and self.takes(x) else None
        if inside is None or any(block.attention.maps_are_wanted(kwargs) for block in current.blocks):
            return None
        prepared = self._all.get(inside, lambda: _prepare_all(current.blocks), of=inside)
        if prepared is None:
            return None
        blocks, _ = prepared
        batch, tokens, width = x.shape
        kept = current.read_of(tokens)
        output = x.new_empty((batch, kept, width))
        job = Blocks(blocks, len(blocks), x.data_ptr(), batch, tokens, kept, output.data_ptr())
        kernels = library()
        check(kernels.quantformer_blocks(ctypes.byref(job), torch.get_num_threads(), kernels.parallel_for))
        return output


def _prepare_all(blocks: nn.ModuleList) -> Prepared | None:
    """Pointers to the jobs of all blocks, and what they point into; None where one of them has none."""
    prepared = [
        block.prepared(quiet_modules(block)) if isinstance(block, PackedPlainBlock) else None for block in blocks
    ]
    if None in prepared:
        return None
    pointers = (ctypes.POINTER(Block) * len(prepared))(*(ctypes.pointer(job) for job, _ in prepared))
    return pointers, tuple(prepared)
