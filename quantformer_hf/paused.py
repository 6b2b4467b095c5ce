"""Runs of a model that stop on the way, and go on when they are told to.

What a layer is to become may depend on what all images bring to it, and what comes after depends on the layer. Runs of some
images each, which wait there for each other, hold less than one run of all images, and none has to begin anew.
"""

import contextvars
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Self

import greenlet
from torch import Tensor, nn


class Place(NamedTuple):
    """What enters `module`, or leaves it: of several tensors the first one."""

    module: nn.Module
    output: bool = False


class PausedRuns:
    """A run of `model(pixel_values=batch)` for each batch; all stop at the same places. A context manager.

    They are no threads: torch's modes (no gradients, no autocast) count for them as for who lets them go on, and context
    variables are those at the beginning of the `with` block. With that they end, wherever they are.

    Args:
        model: an image classifier.
        batches: `(batch, channels, height, width)` each.
        stops: where each run stops, each time that it comes there.
        watched: where it does not stop, and `seen` tells what was there.

    Attributes:
        seen: for each batch, the last tensor at each place that is watched. Who needs them no longer deletes them.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        stops: Collection[Place],
        watched: Collection[Place] = (),
    ):
        self._model, self._batches = model, batches
        self._stops, self._watched = set(stops), set(watched)
        self.seen: list[dict[Place, Tensor]] = [{} for _ in batches]

    def __enter__(self) -> Self:
        self._runs = [greenlet.greenlet(self._run) for _ in self._batches]
        for run in self._runs:
            # Without that, it would not know of any context manager around it.
            run.gr_context = contextvars.copy_context()
        self._number_of = {run: number for number, run in enumerate(self._runs)}
        self._hooks = [self._hook(place) for place in self._stops | self._watched]
        return self

    def __exit__(self, *_: Any) -> None:
        for run in self._runs:
            # The garbage collector would not find what they hold; and what they undo on their way out is undone here.
            run.throw()
        for hook in self._hooks:
            hook.remove()

    def go_on(self) -> tuple[Place, list[Tensor]]:
        """To the next stop: which it is, and the tensor of each batch.

        Raises:
            RuntimeError: there is no other stop.
        """
        reached = [run.switch(batch) for run, batch in zip(self._runs, self._batches, strict=True)]
        return reached[0][0], [tensor for _, tensor in reached]

    def _run(self, batch: Tensor) -> None:
        # Whatever the config says: what is asked for would be held from all blocks.
        self._model(pixel_values=batch, output_hidden_states=False, output_attentions=False)
        raise RuntimeError("the model has run to its end: there is no other stop")

    def _hook(self, place: Place) -> Any:
        def look(module: nn.Module, given: tuple, output: Any = None) -> None:
            number = self._number_of.get(greenlet.getcurrent())
            if number is None:
                return
            tensor = output if place.output else given
            tensor = tensor[0] if isinstance(tensor, tuple) else tensor
            if place in self._watched:
                self.seen[number][place] = tensor
            if place in self._stops:
                greenlet.getcurrent().parent.switch((place, tensor))

        register = place.module.register_forward_hook if place.output else place.module.register_forward_pre_hook
        return register(look)
