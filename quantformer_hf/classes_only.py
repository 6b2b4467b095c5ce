"""The last block of a ViT or DeiT, of which the classifier reads the class token alone: no other row is worked out there.

That is most of the block. Whoever looks at the tokens that come out of it (hooks, a `forward` in place of the class's own,
`output_hidden_states`, a call of the encoder by itself) gets all of them.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from torch import nn
from transformers import PreTrainedModel

from .class_token import CLASS_TOKENS
from .hooks import has_listener


#: The block, and how many of its first tokens are read.
_last: ContextVar[tuple[nn.Module, int] | None] = ContextVar("last", default=None)


@contextlib.contextmanager
def classes_only(backbone: PreTrainedModel) -> Iterator[None]:
    """Inside the `with` block, `backbone`, an image classifier, is run for its logits alone."""
    kind = backbone.config.model_type
    encoder = getattr(backbone, kind)
    last = None
    if kind in CLASS_TOKENS and encoder.layers and not any(map(_is_heard, (encoder, *encoder.layernorm.modules()))):
        last = encoder.layers[-1], CLASS_TOKENS[kind]
    token = _last.set(last)
    try:
        yield
    finally:
        _last.reset(token)


def tokens_read(block: nn.Module, tokens: int) -> int:
    """How many of its `tokens`, the first ones, `block` is to put out."""
    last = _last.get()
    return tokens if last is None or last[0] is not block or _is_heard(block) else min(tokens, last[1])


def _is_heard(module: nn.Module) -> bool:
    return has_listener(module) or bool(module._forward_pre_hooks) or "forward" in module.__dict__
