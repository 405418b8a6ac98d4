"""A single B-cos unit on two-dimensional data: what growing B does to the direction that it learns.

    python benchmarks/toy_unit.py

Writes `docs/images/toy_unit.png`. The data are points near a direction, the class, and points everywhere else. The
unit `(ŵ·x) |cos(x, ŵ)|^(B-1)`, scaled by a fixed factor, is trained by binary cross-entropy for each B, from the same
start. The higher B, the more a wrong direction costs, so that the weight must point where the class is
(Böhle et al., CVPR 2022, section 3.1 and figure 2).
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from bcoskit.functional import bcos_linear

EXPONENTS = (1.0, 2.0, 8.0, 32.0)
SCALE = 4.0
FILE = Path(__file__).parent.parent / "docs" / "images" / "toy_unit.png"


def data(count: int = 400) -> tuple[Tensor, Tensor]:
    """Points of unit length (2·count, 2): half of them within 12 degrees of 60 degrees, which are the class."""
    generator = torch.Generator().manual_seed(0)
    near = torch.deg2rad(60 + 6 * torch.randn(count, generator=generator))
    far = torch.deg2rad(-80 + 125 * torch.rand(count, generator=generator))
    angles = torch.cat([near, far])
    return torch.stack([angles.cos(), angles.sin()], 1), torch.cat([torch.ones(count), torch.zeros(count)])


def response(x: Tensor, angle: Tensor, b: float) -> Tensor:
    """Of the unit whose weight has that angle, with 0 where it is worth a half."""
    weight = torch.stack([angle.cos(), angle.sin()])[None]
    return SCALE * (2 * bcos_linear(x, weight, b=b)[:, 0] - 1)


def learnt(x: Tensor, y: Tensor, b: float) -> float:
    """The angle, in degrees, after training from 90 degrees."""
    angle = torch.tensor(torch.pi / 2, requires_grad=True)
    optimizer = torch.optim.Adam([angle], lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(response(x, angle, b), y).backward()
        optimizer.step()
    return float(torch.rad2deg(angle.detach()))


def draw() -> None:
    """Loss over the angle of the weight, and the response in the plane with what was learnt, for each B."""
    x, y = data()
    figure = Figure(figsize=(11, 2.7), layout="constrained")
    axes: Any = figure.subplots(1, len(EXPONENTS) + 1)
    angles = torch.linspace(-90, 180, 271)
    grid = torch.linspace(-1.2, 1.2, 121)
    plane = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1).flatten(0, 1)
    for b, axis in zip(EXPONENTS, axes[1:], strict=True):
        losses = [F.binary_cross_entropy_with_logits(response(x, torch.deg2rad(a), b), y).item() for a in angles]
        axes[0].plot(angles, losses, label=f"B = {b:g}")
        found = learnt(x, y, b)
        shown = response(plane, torch.deg2rad(torch.tensor(found)), b).sigmoid().view(121, 121)
        axis.imshow(shown, extent=(-1.2, 1.2, -1.2, 1.2), origin="lower", cmap="Greys", vmin=0, vmax=1.6)
        for label, color in ((0, "#3b6ea8"), (1, "#e8603c")):
            axis.plot(*x[y == label].T, ".", color=color, markersize=2)
        radians = torch.deg2rad(torch.tensor(found))
        axis.annotate("", (float(radians.cos()), float(radians.sin())), (0, 0), arrowprops={"arrowstyle": "->"})
        axis.set(title=f"B = {b:g}: learnt {found:.0f}°, class at 60°", xticks=[], yticks=[])
        axis.title.set_fontsize(8)
    axes[0].set(xlabel="angle of the weight, degrees", ylabel="binary cross-entropy", ylim=(0, 3))
    axes[0].legend(fontsize=7)
    FILE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FILE, dpi=120)


if __name__ == "__main__":
    draw()
