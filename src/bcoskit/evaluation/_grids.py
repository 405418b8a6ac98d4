"""Grids of images: which ones, in which order, and how they are laid side by side."""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
from torch import Tensor

from bcoskit.evaluation._result import Row

Protocol: TypeAlias = Literal["bcos", "rao"]
THRESHOLDS = {"bcos": 0.5, "rao": 0.99}


def check_grids(grid: int, count: int | None, protocol: str) -> None:
    """Refuse what makes no grids; raises as `choose_grids`."""
    if protocol not in THRESHOLDS:
        raise ValueError(f"`protocol` (={protocol!r}) must be 'bcos' or 'rao'")
    for name, value, lowest in (("grid", grid, 2), ("count", count, 1)):
        if value is not None and value < lowest:
            raise ValueError(f"`{name}` (={value}) must be at least {lowest}")


def choose_grids(
    ranking: Sequence[Row],
    *,
    grid: int = 3,
    count: int | None = 500,
    protocol: Protocol = "bcos",
    threshold: float | None = None,
    authors_offset: bool = False,
    seed: int = 42,
) -> list[tuple[int, ...]]:
    """The images of each grid: see `grid_pointing_game`.

    Args:
        ranking: Rows of `accuracy`.
        grid: Cells along each side.
        count: Number of grids; None for as many as there are images for.
        protocol: How images are chosen.
        threshold: Of confidence.
        authors_offset: As the authors' code.
        seed: Of the draws.

    Raises:
        ValueError: If an argument is out of its range, or there are too few confident images.
    """
    check_grids(grid, count, protocol)
    limit = THRESHOLDS[protocol] if threshold is None else threshold
    queues: dict[int, list[int]] = {}
    labels: dict[int, int] = {}
    by_logit = sorted(ranking, key=lambda row: -row["logit"])
    for row in by_logit:
        confident = _sigmoid(row["logit"]) > limit if protocol == "bcos" else row["softmax"] >= limit
        if row["predicted"] == row["label"] and confident:
            queues.setdefault(row["label"], []).append(row["image"])
            labels[row["image"]] = row["label"]
    size = grid**2
    available = {label: len(queue) for label, queue in queues.items()}
    random = np.random.RandomState(seed)  # the generator of the authors' code, whose draws numpy keeps
    if protocol == "bcos":
        sequence = _drawn(queues, size, random)
        found = _drifting(sequence, labels, size) if authors_offset else _blocks(sequence, size)
    else:
        found = _at_random(queues, size, random)
    if count is not None and len(found) < count:
        least = ", ".join(f"{label}: {available[label]}" for label in sorted(available, key=lambda k: available[k])[:3])
        raise ValueError(
            f"`count` (={count}) grids of {size} classes cannot be made: {len(available)} classes have images that are "
            f"classified rightly with enough confidence (fewest: {least or 'none'}), enough for {len(found)} grids; "
            "lower `count`, `grid` or `threshold`"
        )
    return found[:count]


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0


def _drawn(queues: dict[int, list[int]], size: int, random: np.random.RandomState) -> list[int]:
    """All images in the order in which grids take them."""
    left = {label: list(reversed(queue)) for label, queue in queues.items()}
    sequence: list[int] = []
    while len(usable := np.array(sorted(label for label, queue in left.items() if queue))) > size:
        sequence += [left[int(label)].pop() for label in random.choice(usable, size, replace=False)]
    return sequence


def _blocks(sequence: list[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(sequence[begin : begin + size]) for begin in range(0, len(sequence), size)]


def _drifting(sequence: list[int], labels: dict[int, int], size: int) -> list[tuple[int, ...]]:
    """As the authors' code: an image whose class is in the grid is passed over, and one is lost after each grid."""
    grids: list[tuple[int, ...]] = []
    offset = 0
    while offset < len(sequence):
        chosen: list[int] = []
        walked = 0
        for image in sequence[offset:]:
            if len(chosen) == size:
                break
            walked += 1
            if labels[image] not in {labels[other] for other in chosen}:
                chosen.append(image)
        if len(chosen) < size:
            break
        grids.append(tuple(chosen))
        offset += walked + 1
    return grids


def _at_random(queues: dict[int, list[int]], size: int, random: np.random.RandomState) -> list[tuple[int, ...]]:
    left = {label: [int(image) for image in random.permutation(queues[label])] for label in sorted(queues)}
    grids: list[tuple[int, ...]] = []
    while len(usable := np.array([label for label, queue in left.items() if queue])) >= size:
        grids.append(tuple(left[int(label)].pop() for label in random.choice(usable, size, replace=False)))
    return grids


def make_grid(cells: Tensor) -> Tensor:
    """Images side by side, column by column: (N, g², C, S, S) to (N, C, g·S, g·S).

    Raises:
        ValueError: If there is no square number of square images.
    """
    side = math.isqrt(cells.shape[1])
    if side * side != cells.shape[1] or cells.shape[-1] != cells.shape[-2]:
        raise ValueError(f"`cells` of shape {tuple(cells.shape)} must be a square number of square images")
    rows = cells.unflatten(1, (side, side)).permute(0, 3, 2, 4, 1, 5)  # N, C, row, S, column, S
    return rows.flatten(4, 5).flatten(2, 3).contiguous()
