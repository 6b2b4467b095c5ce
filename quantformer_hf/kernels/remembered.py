"""Values that are made from tensors once, and anew when these have changed."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn


T = TypeVar("T")

_version_of = operator.attrgetter("_version")


def state_of(tensors: list[Tensor]) -> tuple[list[int], list[int]]:
    """Where `tensors` lie, and how often each was written to: it differs when one was changed, moved or replaced."""
    try:
        versions = list(map(_version_of, tensors))
    except RuntimeError:
        # Inference tensors have none.
        versions = [tensor.is_inference() or tensor._version for tensor in tensors]
    return list(map(Tensor.data_ptr, tensors)), versions


class made_once(Generic[T]):
    """A property that is made when it is first read, and then the same object for all threads.

    From `functools.cached_property`, since Python 3.12, threads that read it at once get one each, of which the last stays.
    But a copy of a job points into arrays that the job alone holds, and a plan holds its job: the first has to stay.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self.__doc__ = make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        # Only the first time: what lies in the instance's dictionary is found before this.
        return vars(instance).setdefault(self._name, self._make(instance))


class Remembered(Generic[T]):
    """A value made from the tensors of modules, and made anew when one of them was changed, moved or replaced.

    Several threads may ask. Each gets a value of the tensors that it saw, and keeps it alive as long as it uses it.
    """

    def __init__(self) -> None:
        # The key and what it stands for, which are replaced together.
        self._made: tuple[list, T] | None = None

    @property
    def value(self) -> T | None:
        """What was made last."""
        return None if self._made is None else self._made[1]

    def get(self, modules: Sequence[nn.Module], make: Callable[[], T], of: object = None) -> T:
        """The value: of the modules' own parameters and buffers, not of those in their submodules, and of an object."""
        # A graph that is being traced takes what the last eager call, or loading, has left: a key is no tensor.
        made = self._made
        if made is not None and torch.compiler.is_compiling():
            return made[1]
        # By the dictionaries themselves, for this is done in each call of each layer.
        tensors = [
            tensor
            for module in modules
            for own in (module._parameters, module._buffers)
            if own
            for tensor in own.values()
            if tensor is not None
        ]
        key = [state_of(tensors), of]
        if made is None or key != made[0]:
            # Also under inference_mode, made tensors must serve later calls outside it.
            with torch.inference_mode(False), torch.no_grad():
                made = self._made = key, make()
        return made[1]

    def forget(self) -> None:
        """Make it anew at the next call, whatever the tensors say."""
        self._made = None
