"""A pass of a backbone for its logits alone.

The classifier of a ViT or DeiT reads the class token alone: in the last block no other row is worked out, which is most of
the block. And nobody looks at what lies between two blocks, so that the first one may run them all (`packed_encoder.py`).

Whoever looks at the tokens that come out of a block (hooks, a `forward` in place of the class's own, `output_hidden_states`,
a call of the encoder by itself) gets all of them.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .class_token import CLASS_TOKENS
from .hooks import is_heard
from .layers import InferenceLayerNorm


@dataclass(eq=False)
class Pass:
    """One pass through a backbone: its blocks that follow one another, by the first one, and what is read of them."""

    chains: dict[nn.Module, nn.ModuleList]
    #: The block of whose output the first `tokens` are read.
    last: nn.Module | None = None
    tokens: int = 0
    #: What comes out of the last block of a chain, when the first one has run them all, and which these are.
    output: Tensor | None = None
    ran: frozenset[nn.Module] = frozenset()

    def read_of(self, block: nn.Module, tokens: int) -> int:
        """How many of `tokens`, the first ones, `block` is to put out."""
        return min(tokens, self.tokens) if block is self.last and not is_heard(block) else tokens


_pass: ContextVar[Pass | None] = ContextVar("pass", default=None)


@contextlib.contextmanager
def classes_only(backbone: PreTrainedModel) -> Iterator[None]:
    """Inside the `with` block, `backbone`, an image classifier, is run for its logits alone."""
    kind = backbone.config.model_type
    encoder = getattr(backbone, kind)
    lists = [encoder.layers] if kind in CLASS_TOKENS else [stage.blocks for stage in encoder.encoder.layers]
    made = Pass({blocks[0]: blocks for blocks in lists if blocks})
    if (
        kind in CLASS_TOKENS
        and encoder.layers
        # Another one may mix tokens.
        and type(encoder.layernorm) is InferenceLayerNorm
        and not any(map(is_heard, (encoder, *encoder.layernorm.modules())))
    ):
        *others, last = encoder.layers
        # One that is there twice is not the last one the first time.
        if all(block is not last for block in others):
            made.last, made.tokens = last, CLASS_TOKENS[kind]
    token = _pass.set(made)
    try:
        yield
    finally:
        _pass.reset(token)


def current_pass() -> Pass | None:
    """The pass that goes on in this thread; None where all that a block puts out is wanted."""
    # A traced graph has all tokens, and torch 2.11 cannot trace a context variable.
    return None if torch.compiler.is_compiling() else _pass.get()
