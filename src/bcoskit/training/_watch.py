"""Explanations while a network is trained: how good they are, and pictures in which one sees alignment grow."""

from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from bcoskit import viz
from bcoskit._explain import explain
from bcoskit._files import whole_file
from bcoskit.data import ImageTransform
from bcoskit.evaluation import GridPointing, accuracy, choose_grids
from bcoskit.evaluation._loop import run_metric
from bcoskit.training._loading import Images
from bcoskit.viz._pictures import usual_picture

_PICTURES, _MEASURED, _GRIDS = 8, 256, 16  # images in a sheet, images that are measured on, and grids of them


class Watch(lightning.Callback):
    """After a measurement: figures of explanations of fixed test images, and a sheet of some of them.

    `test_pointing` is the median of the grid pointing game on up to 16 grids of 3 × 3 images (2 × 2 with fewer than ten
    classes; none with fewer than five, where images may be of several classes, and while too few images are classified
    with confidence), `test_alignment` the mean cosine of `W(x)` with `x`, and `test_residual` the largest part of a
    logit that contributions and constants leave over, relative. An image of several classes is explained for the first
    of them, and one of none is left out.

    Args:
        images: Test images, of which the first ones are watched.
        transform: Of the network.
        folder: For the sheets, `epoch-0001.png` and so on: images above, their explanations below.
        every: Epochs from one look to the next.
    """

    def __init__(self, images: Images, transform: ImageTransform, folder: Path, every: int) -> None:
        self.images, self.transform, self.folder, self.every = images, transform, folder, every

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Look, if it is time to, and log what was seen."""
        epoch = min(trainer.current_epoch + 1, trainer.max_epochs or 1)
        if epoch % self.every and epoch != trainer.max_epochs:
            return
        model: Any = pl_module.model
        chosen = self._chosen()
        pixels, labels = self.images.__getitems__(chosen.tolist())[:2]  # without those that cannot be read
        labels = _first_classes(labels)
        if not len(labels):
            return
        x = self.transform.encode_pixels(pixels).to(pl_module.device)
        for name, value in self._figures(model, x, labels).items():
            pl_module.log(f"test_{name}", value)
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        few = slice(_PICTURES)
        self._draw(model, x[few], labels[few], pixels[few], self.folder / f"epoch-{epoch:04d}.png")

    def _chosen(self) -> Tensor:
        """The first images of each class in turn, so that all classes are there."""
        labels = _first_classes(self.images.labels)
        rank = torch.zeros_like(labels)
        for label in labels.unique():
            mine = labels == label
            rank[mine] = torch.arange(int(mine.sum()))
        order = (rank * (int(labels.max()) + 1) + labels).argsort(stable=True)
        return order[labels[order] >= 0][:_MEASURED]

    def _figures(self, model: Any, x: Tensor, labels: Tensor) -> dict[str, float]:
        few = explain(model, x[:_PICTURES], labels[:_PICTURES], shares=True)
        assert few.residual is not None
        found = [explain(model, part) for part in x.split(32)]
        cosines = torch.cat([torch.cosine_similarity(e.weights.flatten(1), e.x.flatten(1), dim=1) for e in found])
        figures = {"alignment": float(cosines.mean()), "residual": float(few.residual.abs().max())}
        grid = 3 if len(self.images.classes) > 9 else 2
        if len(self.images.classes) > grid**2 and not self.images.multi_label:
            dataset = list(zip(x.cpu(), labels.tolist(), strict=True))
            ranking = accuracy(model, dataset).rows
            grids = min(_GRIDS, len(choose_grids(ranking, grid=grid, count=None)))
            if grids:
                metric = GridPointing(grid, grids)
                figures["pointing"] = run_metric(metric, model, dataset, "bcos", ranking=ranking).median
        return figures

    def _draw(self, model: Any, x: Tensor, labels: Tensor, pixels: Tensor, file: Path) -> None:
        e = explain(model, x, labels)
        above: list[tuple[Any, str]] = []
        below: list[tuple[Any, str]] = []
        for index, label in enumerate(labels.tolist()):
            above.append(
                (pixels[index].movedim(0, -1), f"{self.images.classes[label]}\nlogit {float(e.value[index]):.2f}")
            )
            below.append((usual_picture(e.weights[index], e.contributions[index]), ""))
        with whole_file(file) as unfinished:
            viz.montage([above, below], cell=96).save(unfinished, format="PNG")


def _first_classes(labels: Tensor) -> Tensor:
    """A class index (N,) for each label: itself, or the first class of a row of zeros and ones, -1 if there is none."""
    if labels.ndim == 1:
        return labels
    of_one = labels > 0
    return torch.where(of_one.any(1), of_one.int().argmax(1), -1)
