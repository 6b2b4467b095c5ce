"""Modules that nobody looks at: what they do may be done in one go, without a call of each."""

from collections.abc import Iterable
from itertools import chain, repeat
from operator import is_, itemgetter

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .hooks import has_listener
from .kernels import state_of
from .layers import quantize_first_argument
from .quantizers import ActivationQuantizer


#: What a module keeps in dictionaries of its own.
_DICTIONARIES = "_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"
_of_module = itemgetter("training", *_DICTIONARIES)
_of_quantizer = itemgetter("enabled", "calibrated", "observer")


def quiet_modules(module: nn.Module) -> list[nn.Module] | None:
    """All modules inside `module`, or None where one of them is to be called: it has a hook, is in training, or does
    something else than to quantize."""
    if _has_any_global_hook():
        return None
    # By the dictionaries themselves, for this is done in each call.
    found = [inner for inner in module._modules.values() if inner is not None]
    for inner in found:
        own = inner.__dict__
        if own["training"] or "forward" in own or (own["_forward_hooks"] and has_listener(inner)):
            return None
        if own["_forward_pre_hooks"] and list(own["_forward_pre_hooks"].values()) != [quantize_first_argument]:
            return None
        quantizes = not isinstance(inner, ActivationQuantizer) or (
            inner.enabled and inner.calibrated and inner.observer is None
        )
        if not quantizes:
            return None
        if own["_modules"]:
            # Which this loop then comes to.
            found += [part for part in own["_modules"].values() if part is not None]
    return found


class Quiet:
    """Modules that were found to be quiet, with their tensors, and whether all of it is what it was.

    This is asked in each call, and modules and tensors are scattered over the memory: after a model has run, no cache holds
    them. So the time is that of reading them, and less the more reads are under way at once: along lists that are made once,
    with no step of Python between two elements.

    Args:
        module: in which they are. It is not kept, but for what holds its parts, so that it can keep this.
        inside: what `quiet_modules` found there.
    """

    def __init__(self, module: nn.Module, inside: list[nn.Module]) -> None:
        self._top = module._modules
        self._inside = inside
        self._types = list(map(type, inside))
        self._own = list(map(vars, inside))
        self._attributes = list(_all(map(_of_module, self._own)))
        dictionaries = [self._top, *(own[name] for name in _DICTIONARIES for own in self._own)]
        self._empty = [dictionary for dictionary in dictionaries if not dictionary]
        self._full = [dictionary for dictionary in dictionaries if dictionary]
        self._sizes = list(map(len, self._full))
        self._held = list(_all(map(dict.values, self._full)))
        self._with_hooks = [part for part in inside if part._forward_hooks]
        self._quantizers = [vars(part) for part in inside if isinstance(part, ActivationQuantizer)]
        self._switches = list(_all(map(_of_quantizer, self._quantizers)))
        self._tensors = [held for held in self._held if isinstance(held, Tensor)]
        self._state = state_of(self._tensors)

    def holds(self, module: nn.Module) -> bool:
        """Whether `quiet_modules` would find the same in `module`, and the tensors are what they were."""
        return (
            module._modules is self._top
            and not _has_any_global_hook()
            and _are(map(type, self._inside), self._types)
            and _are(map(vars, self._inside), self._own)
            and _are(_all(map(_of_module, self._own)), self._attributes)
            and not any(map(dict.__contains__, self._own, repeat("forward")))
            and not any(self._empty)
            and list(map(len, self._full)) == self._sizes
            and _are(_all(map(dict.values, self._full)), self._held)
            and not any(map(has_listener, self._with_hooks))
            and _are(_all(map(_of_quantizer, self._quantizers)), self._switches)
            and state_of(self._tensors) == self._state
        )

    def has_those_of(self, other: "Quiet") -> bool:
        """Whether modules are the same and tensors lie where those of `other` do, and have not been written to since."""
        return self._inside == other._inside and self._types == other._types and self._state == other._state


_all = chain.from_iterable


def _are(found: Iterable, held: list) -> bool:
    """Whether they are the very same objects."""
    found = list(found)
    return len(found) == len(held) and all(map(is_, found, held))
