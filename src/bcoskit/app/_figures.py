"""What the page tells of an explanation in numbers, as plain values."""

from typing import Any

from bcoskit._explain import Explanation
from bcoskit.app._service import ExplanationService

TOP = 10  # classes


def figures(service: ExplanationService, explanation: Explanation) -> dict[str, Any]:
    """The figures of an explanation of one image and one class, which JSON can hold.

    Args:
        service: What has explained it.
        explanation: A batch of one.

    Returns:
        `target` and `versus` (None without one), each with `class`, `index`, `logit` and `probability` (None of outputs
        that are no classes); `value`, the logit or the difference of logits; `contributions`, `Σ W(x)·x`; `bias`, what
        of the value does not pass through the image; `shares`, of that by parameter or operation, and `residual`,
        relative, both None without shares; `classes`, the ten with the largest logits.
    """
    assert explanation.target is not None
    logits = explanation.logits[0]
    probabilities = service.probabilities(logits)

    def of(index: int) -> dict[str, Any]:
        return {
            "class": service.classes[index],
            "index": index,
            "logit": float(logits[index]),
            "probability": None if probabilities is None else float(probabilities[index]),
        }

    shares, residual = explanation.shares, explanation.residual
    return {
        "target": of(int(explanation.target)),
        "versus": None if explanation.versus is None else of(int(explanation.versus)),
        "value": float(explanation.value),
        "contributions": float(explanation.value - explanation.bias),
        "bias": float(explanation.bias),
        "shares": None if shares is None else {name: float(share) for name, share in shares.items()},
        "residual": None if residual is None else float(residual),
        "classes": [of(int(index)) for index in logits.topk(min(TOP, len(logits))).indices],
    }


def place_figures(explanation: Explanation, row: int, column: int, side: int) -> dict[str, Any]:
    """What a place of the image, and the square around it, contribute.

    Args:
        explanation: A batch of one.
        row: Of the pixel, from the top.
        column: Of the pixel, from the left.
        side: Of the square around it, in pixels, odd; what lies beyond the border is left out.

    Returns:
        `contribution` of the pixel, `square` of all pixels around it, and what each is of the value: `share` and
        `square_share`, None of a value of 0. `against` and `for` are the negative and positive parts of the square.

    Raises:
        ValueError: If there is no such pixel.
    """
    contributions = explanation.contributions[0]
    height, width = contributions.shape
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"there is no pixel in row {row} and column {column} of an image of {width}x{height} pixels")
    reach = side // 2
    square = contributions[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1]
    value = float(explanation.value)

    def share(part: float) -> float | None:
        return part / value if value else None

    pixel, whole = float(contributions[row, column]), float(square.sum())
    return {
        "row": row,
        "column": column,
        "contribution": pixel,
        "share": share(pixel),
        "side": side,
        "square": whole,
        "square_share": share(whole),
        "for": float(square.clamp(min=0).sum()),
        "against": float(square.clamp(max=0).sum()),
    }
