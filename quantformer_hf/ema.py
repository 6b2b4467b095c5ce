"""An exponential moving average of the weights, as a callback."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import nn

from .callbacks import QuantformerCallback


#: In each checkpoint, beside the trained weights.
EMA_FILE = "ema.safetensors"


class EmaCallback(QuantformerCallback):
    """Keeps timm's `ModelEmaV3` of the model: `ema = decay * ema + (1 - decay) * weights` after each optimizer step.

    Of scales magnitudes are averaged, which alone count: the sign of one may change while it is trained. Evaluations see
    the average, and so does whoever gets the model after training. Checkpoints hold the trained weights, from which
    training goes on, and the average in a file of its own. Frozen groups make another function of the same numbers, so
    that the average starts anew there.

    Args:
        decay: in (0, 1), 0.99996 in DeiT.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.average: ModelEmaV3 | None = None

    def start(self, model: nn.Module) -> None:
        """Begin with the weights as they are."""
        with _magnitudes(model):
            self.average = ModelEmaV3(model, decay=self.decay)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # A resumed run has loaded its average already. One that begins again may find that of a run that broke off.
        if self.average is None or state.global_step == 0:
            self.start(model)

    def on_stage_switch(self, args, state, control, stage, model=None, **kwargs):
        self.start(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with _magnitudes(model):
            self.average.update(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        model.load_state_dict(self.average.module.state_dict())
        self.average = None

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside the `with` block, `model` has the averaged weights, if there are any."""
        if self.average is None:
            yield
            return
        trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.average.module.state_dict())
        try:
            yield
        finally:
            model.load_state_dict(trained)

    def save(self, folder: str) -> None:
        """Write the average into the checkpoint in `folder`."""
        state = {name: tensor.contiguous() for name, tensor in self.average.module.state_dict().items()}
        save_file(state, Path(folder) / EMA_FILE)

    def load(self, folder: str, model: nn.Module) -> None:
        """Go on with the average of the checkpoint in `folder`, which `model` has been loaded from.

        Raises:
            ValueError: the checkpoint has none.
        """
        path = Path(folder) / EMA_FILE
        if not path.exists():
            raise ValueError(f"{folder} has no {EMA_FILE}: resume without ema_decay, or from another checkpoint")
        self.start(model)
        with torch.no_grad():
            self.average.module.load_state_dict(load_file(path, device=str(next(model.parameters()).device)))


@contextlib.contextmanager
def _magnitudes(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block, no scale of a quantizer is negative."""
    with torch.no_grad():
        scales = [tensor for name, tensor in model.named_parameters() if name.endswith(".scale")]
        signs = [tensor.sign() for tensor in scales]
        for tensor, sign in zip(scales, signs, strict=True):
            tensor.mul_(sign)
        try:
            yield
        finally:
            for tensor, sign in zip(scales, signs, strict=True):
                tensor.mul_(sign)
