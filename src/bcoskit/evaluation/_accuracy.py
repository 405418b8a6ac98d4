"""Accuracy, confidence and calibration: the predictions of all images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bcoskit._probabilities import check_classes, probabilities_of
from bcoskit.evaluation._loop import item_of, run_metric, stacked
from bcoskit.evaluation._result import Result, Row

_TOP = 5
_AT_ONCE = 64


@dataclass(frozen=True)
class Accuracy:
    """A row for each image: label, prediction, largest logit, its softmax and probability; `score` is 1 if right."""

    name = "accuracy"
    needs_method = False

    def units(self, model: nn.Module, dataset: Any, ranking: Sequence[Row]) -> Sequence[int]:
        """All images."""
        return range(len(dataset))

    def measure(self, model: nn.Module, dataset: Any, units: Sequence[int], method: Any) -> list[list[Row]]:
        """The predictions of some images."""
        items = [item_of(dataset, index) for index in units]
        x = stacked(model, [item[0] for item in items])
        labels = [item[1] for item in items]
        with torch.no_grad():
            logits = torch.cat([model(part) for part in x.split(_AT_ONCE)])
        check_classes(labels, logits)
        probabilities, shares = probabilities_of(model, logits), logits.softmax(1)
        predicted = logits.argmax(1).tolist()
        before = _classes_before(logits, torch.tensor(labels, device=logits.device)).tolist()
        return [
            [
                {
                    "image": int(unit),
                    "label": labels[index],
                    "predicted": predicted[index],
                    "logit": float(logits[index, predicted[index]]),
                    "probability": float(probabilities[index, predicted[index]]),
                    "softmax": float(shares[index, predicted[index]]),
                    "top5": int(before[index] < _TOP),
                    "score": float(labels[index] == predicted[index]),
                }
            ]
            for index, unit in enumerate(units)
        ]


def _classes_before(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes rank before the label; of equal logits, as in `argmax`, the first class does."""
    own = logits.gather(1, labels[:, None])
    is_earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > own) | ((logits == own) & is_earlier)).sum(1)


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
        # In torchmetrics a confidence of exactly 1 has an interval of its own.
        confidence = torch.tensor([row[column] for row in rows], dtype=torch.float64).clamp_max(1 - 1e-12)
        figures[name] = float(binary_calibration_error(confidence, right.long(), n_bins=bins))
    return figures
