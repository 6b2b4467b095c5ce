"""Who looks at what a module puts out."""

from torch import nn
from transformers.utils import output_capturing


def has_listener(module: nn.Module) -> bool:
    """Whether a forward hook of `module` sees what it puts out.

    Those by which transformers captures hidden states and attention maps stay where they were installed, and see nothing
    in the passes where nobody asks for any.
    """
    hooks = module._forward_hooks
    if not hooks:
        return False
    return bool(output_capturing._active_collector.get()) or any(
        getattr(hook, "__module__", None) != output_capturing.__name__ for hook in hooks.values()
    )


def is_heard(module: nn.Module) -> bool:
    """Whether somebody sees what `module` is given or puts out, or does something else in its place."""
    return has_listener(module) or bool(module._forward_pre_hooks) or "forward" in module.__dict__
