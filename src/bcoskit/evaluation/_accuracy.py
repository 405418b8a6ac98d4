"""Accuracy, confidence and calibration: the predictions of all images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bcoskit.evaluation._loop import Expected, run_metric, stacked
from bcoskit.evaluation._probabilities import probabilities_of
from bcoskit.evaluation._result import Result, Row

_TOP = 5


@dataclass(frozen=True)
class Accuracy:
    """A row for each image: label, prediction, largest logit, its softmax and probability; `score` is 1 if right."""

    name = "accuracy"
    needs_method = False

    def units(self, model: nn.Module, dataset: Any, ranking: Sequence[Row]) -> Sequence[int]:
        """All images."""
        if len(dataset) == 0:
            raise ValueError("`dataset` holds no images")
        return range(len(dataset))

    def measure(self, model: nn.Module, dataset: Any, units: Sequence[int], method: Any) -> list[list[Row]]:
        """The predictions of some images."""
        items = [dataset[index] for index in units]
        x = stacked(model, [item[0] for item in items])
        with torch.no_grad():
            logits = model(x)
        if logits.ndim != 2 or not bool(logits.isfinite().all()):
            raise ValueError(f"the output has shape {tuple(logits.shape)}, must be finite logits (N, classes)")
        probabilities, shares = probabilities_of(model, logits), logits.softmax(1)
        best = logits.topk(min(_TOP, logits.shape[1]), dim=1).indices
        rows: list[list[Row]] = []
        for index, item in enumerate(items):
            label, predicted = int(item[1]), int(best[index, 0])
            if not 0 <= label < logits.shape[1]:
                raise ValueError(f"the label {label} of image {units[index]} is no class of the network")
            rows.append(
                [
                    {
                        "image": int(units[index]),
                        "label": label,
                        "predicted": predicted,
                        "logit": float(logits[index, predicted]),
                        "probability": float(probabilities[index, predicted]),
                        "softmax": float(shares[index, predicted]),
                        "top5": int(label in best[index].tolist()),
                        "score": float(label == predicted),
                    }
                ]
            )
        return rows


def accuracy(model: nn.Module, dataset: Any, *, batch_size: int = 64, progress: Any = None) -> Result:
    """The prediction of every image of a dataset.

    Args:
        model: A network in evaluation mode.
        dataset: A sequence of (encoded image, label).
        batch_size: Images at once.
        progress: Called as `progress(done, total)`.

    Returns:
        A row for each image; `.mean` is the top-1 accuracy, `accuracy_figures` gives top-5 and calibration.

    Raises:
        ValueError: If there are no images, or none can be read and classified.
    """
    if model.training:
        raise ValueError("`model` must be in evaluation mode: call `model.eval()` first")
    return run_metric(Accuracy(), model, dataset, batch_size=batch_size, progress=progress)


def accuracy_figures(rows: Sequence[Row], bins: int = 15) -> dict[str, float]:
    """Top-1, top-5, and the expected calibration error of the predicted class (Guo et al., ICML 2017).

    The calibration error is the mean over `bins` intervals of confidence of |accuracy - confidence|, weighted by how
    many images fall into each; `calibration_error_softmax` takes the softmax for the confidence, `calibration_error`
    the probability that goes with the network's loss.

    Args:
        rows: Of `accuracy`.
        bins: Number of intervals of confidence.
    """
    from torchmetrics.functional.classification import binary_calibration_error

    right = torch.tensor([row["score"] for row in rows])
    figures = {"top1": float(right.mean()), "top5": sum(row["top5"] for row in rows) / len(rows)}
    for name, column in (("calibration_error", "probability"), ("calibration_error_softmax", "softmax")):
        confidence = torch.tensor([row[column] for row in rows])
        figures[name] = float(binary_calibration_error(confidence, right.long(), n_bins=bins))
    return figures


__all__ = ["Accuracy", "Expected", "accuracy", "accuracy_figures"]
