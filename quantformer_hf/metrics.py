"""Accuracy, as an `evaluate.Metric` that needs no hub."""

import datasets
import evaluate
import numpy as np
from torch import Tensor
from transformers import EvalPrediction


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


def most_probable_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """`(batch, classes)` logits to the indices that the metric needs, so that evaluation does not gather all logits."""
    return logits.topk(min(max(TOP_K), logits.shape[-1])).indices


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 (and with five or more classes top-5) accuracy of `most_probable_classes`."""
    return TopKAccuracy().compute(predictions=prediction.predictions, references=prediction.label_ids)
