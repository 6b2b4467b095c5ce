"""What calibration sees: quantiles of each channel, over a few batches."""

import torch
from torch import Tensor


#: Probabilities of the quantiles that are kept, dense in the tails, where clipping is decided: 0.0003 to 0.9997.
QUANTILES = torch.linspace(-8, 8, 33).sigmoid()

#: Probability mass that each quantile stands for; sums to one.
QUANTILE_WEIGHTS = torch.diff(torch.cat([torch.zeros(1), (QUANTILES[1:] + QUANTILES[:-1]) / 2, torch.ones(1)]))


class Observer:
    """Keeps some rows of what it is shown, the same ones for the same batches on every machine: evenly spaced ones, or, with
    weights, each in proportion to its weight.

    Args:
        channels: columns to keep apart; 1 pools the whole tensor.
        rows_per_batch: how many rows of each batch are kept.
        most_rows: when more have gathered, every other one is dropped.
    """

    def __init__(self, channels: int, rows_per_batch: int = 512, most_rows: int = 4096):
        self.channels = channels
        many = max(1, 64 // channels)
        self.rows_per_batch = rows_per_batch * many
        self.most_rows = most_rows * many
        self.batches: list[Tensor] = []
        #: Of the rows of the next batch, `(rows,)`, not negative; None for all the same.
        self.row_weights: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take rows of `x`, of any shape whose last dimension is a multiple of `channels`."""
        rows = x.detach().reshape(-1, self.channels)
        self.batches.append(self._some(rows).float().clone())
        if sum(len(batch) for batch in self.batches) > self.most_rows:
            self.batches = [batch[::2].clone() for batch in self.batches]

    def _some(self, rows: Tensor) -> Tensor:
        if self.row_weights is not None and self.row_weights.sum() > 0:
            # Evenly spaced in what the rows weigh together.
            ends = self.row_weights.double().cumsum(0)
            count = min(self.rows_per_batch, len(rows))
            places = (torch.arange(count, dtype=torch.float64, device=rows.device) + 0.5) * (ends[-1] / count)
            return rows[torch.searchsorted(ends, places).clamp_max(len(rows) - 1)]
        step = max(1, rows.shape[0] // self.rows_per_batch)
        # An odd step does not fall in with the (even or square) number of tokens.
        step += step > 1 and step % 2 == 0
        return rows[::step]

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
        return torch.quantile(rows, QUANTILES.to(rows.device), dim=0).T.contiguous()
