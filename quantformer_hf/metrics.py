"""Accuracy, as an `evaluate.Metric` that needs no hub."""

import datasets
import evaluate
import numpy as np
import torch.nn.functional as F
from torch import Tensor
from transformers import EvalPrediction

from .labels import IGNORED_LABEL


#: Ranks of which the top-k accuracies are reported.
TOP_K = (1, 5)


class TopKAccuracy(evaluate.Metric):
    """Share of images whose label is among the k most probable classes, for each k of `TOP_K` that the classes allow."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Top-k accuracy of image classification",
            citation="",
            inputs_description="predictions: class indices, most probable first; references: labels",
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        ranked, labels = np.asarray(predictions), np.asarray(references)
        hits = ranked == labels[:, None]
        names = {k: "accuracy" if k == 1 else f"top{k}_accuracy" for k in TOP_K if k <= ranked.shape[1]}
        return {name: float(hits[:, :k].any(1).mean()) for k, name in names.items()}


def rank_and_loss(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, Tensor]:
    """What `compute_metrics` needs of a batch, so that evaluation does not gather all logits.

    Args:
        logits: `(batch, classes)`, alone or first: a DeiT with two classifiers puts out those of each after their mean.
        labels: `(batch,)`.

    Returns:
        The most probable classes `(batch, 5)`, best first, and each image's cross-entropy `(batch,)`.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    ranked = logits.topk(min(max(TOP_K), logits.shape[-1])).indices
    return ranked, F.cross_entropy(logits.float(), labels, reduction="none")


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 (and with five or more classes top-5) accuracy, and the loss, of what `rank_and_loss` made.

    Rows with `IGNORED_LABEL` do not count. `loss` takes the place of Trainer's own, which is a mean over batches of means.

    Raises:
        ValueError: no row that counts.
    """
    ranked, losses = prediction.predictions
    counted = prediction.label_ids != IGNORED_LABEL
    if not counted.any():
        raise ValueError("there is no image to evaluate on")
    accuracies = TopKAccuracy().compute(predictions=ranked[counted], references=prediction.label_ids[counted])
    return accuracies | {"loss": float(losses[counted].mean())}
