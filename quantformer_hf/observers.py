"""What calibration sees: quantiles of each channel, over a few batches."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .spaced import step_between


#: Probabilities of the quantiles that are kept, dense in the tails, where clipping is decided: 0.0003 to 0.9997.
QUANTILES = torch.linspace(-8, 8, 33).sigmoid()

#: Probability mass that each quantile stands for; sums to one.
QUANTILE_WEIGHTS = torch.diff(torch.cat([torch.zeros(1), (QUANTILES[1:] + QUANTILES[:-1]) / 2, torch.ones(1)]))


def channel_quantiles(rows: Tensor) -> Tensor:
    """Those of each column of `rows` at the probabilities `QUANTILES`, `(channels, quantiles)`, float32.

    Linear between neighbours, as `torch.quantile`, which sorts more slowly than NumPy.
    """
    ordered = torch.from_numpy(np.sort(rows.T.float().cpu().numpy(), axis=1))
    places = QUANTILES.double() * (len(rows) - 1)
    below, above = places.floor().long(), places.ceil().long()
    return torch.lerp(ordered[:, below], ordered[:, above], places.frac().float()).to(rows.device)


def weighted_sample(parts: Sequence[Tensor], weights: Tensor, most_rows: int = 4096) -> Tensor:
    """`most_rows` rows, evenly spaced in what they weigh together, so that each is there as often as it counts.

    Args:
        parts: `(rows, channels)` each.
        weights: of the rows of all parts, one part after the other, `(rows,)`; not negative, of a positive sum.
    """
    ends = weights.double().cumsum(0)
    places = (torch.arange(most_rows, dtype=torch.float64, device=weights.device) + 0.5) * (ends[-1] / most_rows)
    chosen = torch.searchsorted(ends, places).clamp_max(len(weights) - 1)
    drawn, first = [], 0
    for rows in parts:
        drawn.append(rows[chosen[(chosen >= first) & (chosen < first + len(rows))] - first])
        first += len(rows)
    return torch.cat(drawn)


class Observer:
    """Keeps evenly spaced rows of what it is shown, the same ones for the same batches on every machine.

    Args:
        channels: columns to keep apart; 1 pools the whole tensor.
        rows_per_batch: how many rows of each batch are kept.
        most_rows: when more have gathered, every other one is dropped, and of later batches half as many are taken.
    """

    def __init__(self, channels: int, rows_per_batch: int = 512, most_rows: int = 4096):
        self.channels = channels
        many = max(1, 64 // channels)
        self.rows_per_batch = rows_per_batch * many
        self.most_rows = most_rows * many
        self.batches: list[Tensor] = []
        self.thinned = 1

    def add(self, x: Tensor) -> None:
        """Take rows of `x`, of any shape whose last dimension is a multiple of `channels`."""
        rows = x.detach().reshape(-1, self.channels)
        # As many as are left of a batch that came before.
        most = max(1, min(len(rows), self.rows_per_batch) // self.thinned)
        self.batches.append(rows[:: step_between(len(rows), most)].float().clone())
        if sum(len(batch) for batch in self.batches) > self.most_rows:
            self.batches = [torch.cat(self.batches)[::2].clone()]
            self.thinned *= 2

    def quantiles(self) -> Tensor:
        """`(channels, quantiles)`, float32, at the probabilities `QUANTILES`.

        Raises:
            RuntimeError: nothing was observed, or something that is not finite.
        """
        if not self.batches:
            raise RuntimeError("no calibration batch reached it")
        rows = torch.cat(self.batches)
        if not rows.isfinite().all():
            raise RuntimeError("its input is not finite")
        return channel_quantiles(rows)
