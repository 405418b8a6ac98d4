"""Stored outputs of the authors' networks that are in no package, and the weights and images that go with them."""

import json
import math
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bcoskit import encode

FOLDER = Path(__file__).parent.parent / "tests" / "golden"

# From our names to the file and the name in it.
NETWORKS = {
    "densenet121.bcos_v1_in1k": ("v1", "v1/densenet_121"),
    "resnet34.bcos_v1_in1k": ("v1", "v1/resnet_34"),
    "vgg11.bcos_v1_in1k": ("v1", "v1/vgg_11"),
    "inception_v3.bcos_v1_in1k": ("v1", "v1/inception_v3"),
    "cnn9.bcos_v1_b1_cifar10": ("v1", "v1/cifar10_9L-M2-B1"),
    "cnn9.bcos_v1_b1_5_cifar10": ("v1", "v1/cifar10_9L-M2-B1.5"),
    "cnn9.bcos_v1_b2_cifar10": ("v1", "v1/cifar10_9L-M2-B2"),
    "cnn9.bcos_v1_b2_5_cifar10": ("v1", "v1/cifar10_9L-M2-B2.5"),
    "resnet18.bcosification_in1k": ("bcosified", "bcosification/resnet18"),
    "densenet121.bcosification_in1k": ("bcosified", "bcosification/densenet121"),
    "simple_vit_ti_patch16_224.bcosification_in1k": ("bcosified", "vit_bcosification/simple_vit_ti_patch16_224"),
    "vitc_ti_patch1_14.bcosification_in1k": ("bcosified", "vit_bcosification/vitc_ti_patch1_14"),
    "clip_resnet50.bcosification_in1k": ("bcosified", "clip_bcosification/resnet50"),
}


@dataclass(frozen=True)
class Golden:
    """What the authors' network computes.

    Attributes:
        logits: Without their constant, (K,).
        contributions: Of the largest logit, summed over cells.
        total: Sum of all contributions.
        cell: Side of a cell in pixels.
        weights: State dict in the authors' format.
        image: Encoded, (1, 6, H, W), in double precision.
    """

    logits: Tensor
    contributions: Tensor
    total: float
    cell: int
    weights: dict[str, Tensor]
    image: Tensor

    def cells(self, contributions: Tensor) -> Tensor:
        """A contribution map summed over cells."""
        side = self.contributions.shape[-1] * self.cell
        cut = contributions[:side, :side]
        return cut.unflatten(0, (-1, self.cell)).unflatten(2, (-1, self.cell)).sum((1, 3))


def golden(name: str, size: int) -> Golden:
    """The stored outputs of a network.

    Args:
        name: A key of `NETWORKS`.
        size: Side of its images.

    Returns:
        The outputs, and what they are outputs of.
    """
    file, network = NETWORKS[name]
    shapes = json.loads((FOLDER / f"{file}_keys.json").read_text())[network]
    arrays = _arrays(file)
    weights = {key: generated(key, shape) for key, shape in shapes.items()}
    start = f"{network}/buffer/"
    weights |= {key.removeprefix(start): torch.from_numpy(arrays[key]) for key in arrays if key.startswith(start)}
    pixels = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32)
    return Golden(
        torch.from_numpy(arrays[f"{network}/logits_without_bias"]).flatten(),
        torch.from_numpy(arrays[f"{network}/contribution_map"]).squeeze(),
        float(arrays[f"{network}/contribution_sum"]),
        2 if size == 32 else size // 28,
        weights,
        encode(torch.from_numpy(pixels).double()),
    )


def generated(key: str, shape: list[int]) -> Tensor:
    """The weight of a key, which the key alone determines."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if key.endswith(("running_mean", "running_var")):
        return torch.full(shape, float(key.endswith("var")))
    generator = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith("bias"):
        values = 0.1 * generator.standard_normal(shape)
    elif len(shape) == 1:
        values = 0.8 + 0.4 * generator.random(shape)
    else:
        values = generator.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32))


@cache
def _arrays(file: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{file}.npz", allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}
