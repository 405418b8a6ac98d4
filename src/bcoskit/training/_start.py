"""What a training begins with: weights, and the images that the network is shown."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from bcoskit.models import ModelRow, Network, create_model, model_row


def weights_of(name: str, weights: str | None, usual: str) -> str:
    """What a network begins with, in a word, or the file."""
    if Path(name).suffix != ".safetensors":
        return usual if weights is None else weights
    if weights is not None:
        raise ValueError(f"`weights` (={weights!r}) must not be given: {name} is a file of weights itself")
    return name


def row_before(name: str, weights: bool | str) -> ModelRow:
    """What is known of a network before its weights are downloaded, if they have to be."""
    return model_row(name, weights if isinstance(weights, str) else False)


def shown(row: ModelRow, size: int | None, channels: Literal[1, 3] | None) -> ModelRow:
    """The row of a network that is shown images of another size, or of other colours."""
    if channels is not None:
        if channels not in (1, 3):
            raise ValueError(f"`channels` (={channels}) must be 1 for grey or 3 for colour images")
        row = row.with_channels(row.in_channels // row.transform.channels * channels)
    return row if size is None else replace(row, transform=replace(row.transform, size=size, resize=None))


def begin(name: str, weights: bool | str, row: ModelRow, classes: Sequence[str], fresh_head: bool) -> Network:
    """The network in the state in which training finds it: with its weights, classes and transform.

    Args:
        name: As of `create_model`.
        weights: As of `create_model`.
        row: What the network is shown.
        classes: Those of the data.
        fresh_head: Whether the classifier is fresh even if the number of classes is that of the weights.

    Raises:
        ValueError: If the network is fused, or does not take images of that size.
    """
    if row.fused:
        raise ValueError(f"{name}: holds a fused network, which is for use: train the original")
    network = create_model(name, weights, num_classes=len(classes), in_channels=row.in_channels)
    if fresh_head:
        network.reset_classifier(len(classes))
    elif row.num_classes == len(classes) and _begins_with_weights(name, weights) and network.classes != tuple(classes):
        warnings.warn(
            f"the classifier of {name} knows as many classes by other names; a new one is made with `fresh_head`",
            stacklevel=3,
        )
    if row.transform != network.transform:
        _check_size(network, row.transform.size)
        network.transform = row.transform
    return network


def _begins_with_weights(name: str, weights: bool | str) -> bool:
    return weights is not False or Path(name).suffix == ".safetensors"


def _check_size(network: Network, size: int) -> None:
    try:
        with torch.no_grad():
            network(torch.zeros(1, network.in_chans, size, size))
    except Exception as error:  # networks answer other sizes with nearly every kind of exception
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"`size` (={size}) does not suit {network.name!r}: {reason}") from error
