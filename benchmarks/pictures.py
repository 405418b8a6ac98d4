"""The pictures of README and documentation, by the network that ships and its photographs.

    python benchmarks/pictures.py

Writes `docs/images/photographs.png`, `versus.png` and `methods.png`.
"""

from pathlib import Path
from typing import Any

import torch

import bcoskit
from bcoskit.evaluation import attribute
from bcoskit.viz import color_picture, contribution_map, montage

ROOT = Path(__file__).parent.parent
PHOTOGRAPHS = ROOT / "src" / "bcoskit" / "assets" / "photographs"
IMAGES = ROOT / "docs" / "images"
SHOWN = ("cat", "horse", "ship", "automobile", "deer", "airplane")
METHODS = {
    "W(x)·x": "bcos",
    "Grad-CAM": "grad_cam",
    "Integrated Gradients": "integrated_gradients",
    "Input x Gradient": "input_x_gradient",
    "Occlusion": "occlusion",
}


def explained(model: Any, names: tuple[str, ...]) -> tuple[list[Any], torch.Tensor]:
    """The photographs as the network sees them, and as its input."""
    files = [PHOTOGRAPHS / f"{name}.jpg" for name in names]
    return [model.transform.view(file) for file in files], torch.stack([model.transform(file) for file in files])


def photographs(model: Any) -> None:
    """Photographs, where the classes are seen, and the colours of W(x)."""
    views, x = explained(model, SHOWN)
    e = bcoskit.explain(model, x)
    assert e.target is not None
    captions = [f"{model.classes[int(t)]}, logit {float(v):.1f}" for t, v in zip(e.target, e.value, strict=True)]
    maps = contribution_map(e.contributions)
    colors = color_picture(e.weights, e.contributions, smooth=3)
    rows = [zip(views, captions, strict=True), ((each, "") for each in maps), ((each, "") for each in colors)]
    montage([list(row) for row in rows], cell=160).save(IMAGES / "photographs.png", optimize=True)


def versus(model: Any) -> None:
    """Why cat, why dog, and why cat and not dog."""
    views, x = explained(model, ("cat",))
    cat, dog = model.classes.index("cat"), model.classes.index("dog")
    found = [bcoskit.explain(model, x, cat), bcoskit.explain(model, x, dog), bcoskit.explain(model, x, cat, versus=dog)]
    captions = ["why cat", "why dog", "why cat and not dog"]
    limit = max(float(e.contributions.abs().max()) for e in found) / 2
    maps = [contribution_map(e.contributions[0], percentile=100, limit=limit) for e in found]
    shown = [(each, f"{text}\n{float(e.value):.2f}") for each, text, e in zip(maps, captions, found, strict=True)]
    montage([[(views[0], "what the network sees\n"), *shown]], cell=192).save(IMAGES / "versus.png", optimize=True)


def methods(model: Any) -> None:
    """The same two images by several methods."""
    names = ("horse", "ship")
    views, x = explained(model, names)
    targets = torch.tensor([model.classes.index(name) for name in names])
    found = {label: attribute(model, x, targets, method) for label, method in METHODS.items()}
    rows: list[list[Any]] = []
    for index, view in enumerate(views):
        maps = [(contribution_map(each[index]), label if index == 0 else "") for label, each in found.items()]
        rows.append([(view, names[index] if index == 0 else ""), *maps])
    montage(rows, cell=160).save(IMAGES / "methods.png", optimize=True)


def main() -> None:
    """Write all pictures."""
    torch.manual_seed(0)
    model = bcoskit.create_model("resnet20.bcos_cifar10", weights=True)
    for write in (photographs, versus, methods):
        write(model)


if __name__ == "__main__":
    main()
