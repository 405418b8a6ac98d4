"""Pointing games: how much of the positive contributions lies where the class is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcoskit.evaluation._accuracy import accuracy
from bcoskit.evaluation._grids import Protocol, check_grids, choose_grids, make_grid
from bcoskit.evaluation._loop import item_of, run_metric, stacked
from bcoskit.evaluation._methods import attribute
from bcoskit.evaluation._result import Result, Row
from bcoskit.viz._pictures import mean_filter

_LARGE = 64  # side of images from which the papers smooth the contributions
_SMALLEST_MASS = {"bcos": 0.0, "rao": 1e-7}


@dataclass(frozen=True)
class GridPointing:
    """The grid pointing game: see `grid_pointing_game`."""

    grid: int = 3
    count: int = 500
    protocol: Protocol = "bcos"
    threshold: float | None = None
    smooth: int | None = None
    window: int | None = None
    stride: int | None = None
    rescale: bool = False
    authors_offset: bool = False
    seed: int = 42

    name = "grid_pointing"
    needs_method = True

    def __post_init__(self) -> None:
        check_grids(self.grid, self.count, self.protocol)
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise ValueError(f"`threshold` (={self.threshold}) must be a probability below 1")
        check_smooth(self.smooth)
        if self.window is None and self.stride is not None:
            raise ValueError(f"`stride` (={self.stride}) needs a `window`")
        for name in ("window", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` (={value}) must be at least 1")

    def units(self, model: nn.Module, dataset: Any, ranking: Sequence[Row]) -> Sequence[tuple[int, ...]]:
        """Images of each grid, chosen by the predictions of all images."""
        return choose_grids(
            ranking,
            grid=self.grid,
            count=self.count,
            protocol=self.protocol,
            threshold=self.threshold,
            authors_offset=self.authors_offset,
            seed=self.seed,
        )

    def measure(self, model: nn.Module, dataset: Any, units: Sequence[tuple[int, ...]], method: Any) -> list[list[Row]]:
        """The scores of the cells of some grids."""
        items = [[item_of(dataset, index) for index in unit] for unit in units]
        cells = torch.stack([stacked(model, [item[0] for item in grid]) for grid in items])
        side = cells.shape[-1]
        if self.rescale and side % self.grid == 0:
            cells = _resized(cells.flatten(0, 1), side // self.grid).unflatten(0, cells.shape[:2])
        target = torch.tensor([[item[1] for item in grid] for grid in items], device=cells.device)
        images, smooth = make_grid(cells), self._smooth(side // self.grid if self.rescale else side)
        if self.rescale and side % self.grid:
            # Cells end within pixels, whose contributions are shared out by area.
            small = self._contributions(model, _resized(images, side), target, method)
            shares = mean_filter(small, smooth) / self.grid**2
            maps, smooth = shares.repeat_interleave(self.grid, -1).repeat_interleave(self.grid, -2), 1
        else:
            maps = self._contributions(model, images, target, method)
        scores = grid_scores(maps, self.grid, smooth, _SMALLEST_MASS[self.protocol]).tolist()
        return [
            [
                {"cell": cell, "image": int(unit[cell]), "target": int(target[index, cell]), "score": score}
                for cell, score in enumerate(scores[index])
            ]
            for index, unit in enumerate(units)
        ]

    def _smooth(self, side: int) -> int:
        if self.smooth is not None:
            return self.smooth
        return 15 if side >= _LARGE else 1

    def _contributions(self, model: nn.Module, images: Tensor, target: Tensor, method: Any) -> Tensor:
        if self.window is None:
            return attribute(model, images, target, method)
        stride = max(self.window // 2, 1) if self.stride is None else self.stride
        return sliding(lambda x, classes: attribute(model, x, classes, method), images, target, self.window, stride)


def grid_pointing_game(
    model: nn.Module,
    dataset: Any,
    method: Any = "bcos",
    *,
    grid: int = 3,
    count: int = 500,
    protocol: Protocol = "bcos",
    threshold: float | None = None,
    smooth: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    rescale: bool = False,
    authors_offset: bool = False,
    seed: int = 42,
    batch_size: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> Result:
    """How much of the positive contributions of a class lies in its own cell of a grid of images.

    Images of different classes stand side by side, in full size; the network runs on the whole grid and is explained
    for the class of each cell. With `c` the contributions, smoothed, and `c⁺ = max(c, 0)`:

        score of a cell = Σ_cell c⁺ / Σ_grid c⁺        (0 if there is nothing positive)

    1 is perfect, 1 / grid² is what a constant map gets (Böhle et al., CVPR 2021, section 4; CVPR 2022, section 4).

    The protocol `"bcos"` takes of each class the images that are classified rightly, most confident first, as long as
    the sigmoid of their logit is above the threshold. While more than grid² classes have such an image left, grid² of
    them are drawn at random. Images are not used twice. The authors' code loses an image after each grid, so that
    grids drift across these draws; `authors_offset=True` does the same. The protocol `"rao"` (Rao et al., CVPR 2022)
    draws classes and images at random, among those classified rightly with a softmax of at least 0.99.

    Cells are filled column by column: image k is in column `k // grid`, row `k % grid`.

    Args:
        model: A network in evaluation mode that takes images of other sizes.
        dataset: A sequence of (encoded image (C, S, S), label).
        method: Attribution method, see `attribute`.
        grid: Cells along each side.
        count: Number of grids.
        protocol: How images are chosen.
        threshold: Of confidence; by default 0.5, with `"rao"` 0.99.
        smooth: Side of the mean filter on the contributions, odd; by default that of the papers: 15 for images of at
            least 64 pixels, 1 (none) for smaller ones.
        window: Side of a window that slides over the grid, for networks that see one size only, such as ViTs: each
            window is explained by itself, contributions are added (Arya et al., NeurIPS 2024, with half a window of
            zeros around the grid).
        stride: Step of the window; by default half its side.
        rescale: Shrink the grid to the size of one image; where its cells then end within pixels, these belong to each
            cell by their area.
        authors_offset: Lose an image after each grid, as the authors' code does.
        seed: Of the draws.
        batch_size: Grids at once.
        progress: Called as `progress(done, total)`, in grids.

    Returns:
        A row for each cell, with the number of the grid in `unit`.

    Raises:
        ValueError: If an argument is out of its range, too few images are classified with enough confidence, or the
            method does not fit the network.
    """
    metric = GridPointing(grid, count, protocol, threshold, smooth, window, stride, rescale, authors_offset, seed)
    ranking = accuracy(model, dataset)
    options: Any = {"batch_size": batch_size, "progress": progress, "ranking": ranking.rows}
    found = run_metric(metric, model, dataset, method, **options)
    return replace(found, failures=(*ranking.failures, *found.failures))


def grid_scores(maps: Tensor, grid: int, smooth: int = 1, smallest_mass: float = 0.0) -> Tensor:
    """Share of the positive contributions of target k in cell k: (N, g², g·S, g·S) to (N, g²).

    Args:
        maps: Contributions of the targets, in the order of their cells.
        grid: Cells along each side.
        smooth: Side of the mean filter, odd.
        smallest_mass: At or below it the score is 0.

    Raises:
        ValueError: If `maps` are not those of a grid, or `smooth` is even.
    """
    check_smooth(smooth)
    if maps.ndim != 4 or maps.shape[1] != grid**2 or maps.shape[-1] % grid or maps.shape[-2] % grid:
        raise ValueError(f"`maps` of shape {tuple(maps.shape)} must be (N, {grid**2}, H, W) in {grid} x {grid} cells")
    positive = mean_filter(maps, smooth).clamp_min(0).double()  # sums of large contributions overflow otherwise
    cells = positive.unflatten(3, (grid, -1)).unflatten(2, (grid, -1)).sum((3, 5))  # N, target, row, column
    shares = cells.transpose(2, 3).flatten(2)
    total = shares.sum(2)
    own = shares.diagonal(dim1=1, dim2=2)
    return torch.where(total > smallest_mass, own / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0).to(maps.dtype)


def _resized(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def check_smooth(smooth: int | None) -> None:
    """Refuse an even mean filter; raises as `grid_pointing_game`."""
    if smooth is not None and (smooth < 1 or smooth % 2 == 0):
        raise ValueError(f"`smooth` (={smooth}) must be odd and positive")


def sliding(
    explained: Callable[[Tensor, Tensor], Tensor], x: Tensor, target: Tensor, window: int, stride: int
) -> Tensor:
    """The sum of the contributions of all windows, half a window of zeros around the image.

    Args:
        explained: From windows (M, C, S, S) and classes (M, K) to contributions (M, K, S, S).
        x: Inputs (N, C, H, W).
        target: Classes (N, K).
        window: Side of a window.
        stride: Step of the windows.

    Raises:
        ValueError: If the windows do not cover the image evenly.
    """
    padding = window // 2
    height, width = x.shape[-2:]
    for side in (height, width):
        if (side + 2 * padding - window) % stride or stride > window:
            raise ValueError(f"`stride` (={stride}) does not fit windows of {window} pixels on {side} pixels")
    columns = F.unfold(x, window, padding=padding, stride=stride)  # N, C·S·S, L
    count = columns.shape[-1]
    windows = columns.transpose(1, 2).reshape(-1, x.shape[1], window, window)
    pairs = zip(windows.split(1), target.repeat_interleave(count, 0).split(1), strict=True)
    found = torch.cat([explained(one, classes) for one, classes in pairs])
    per_image = found.unflatten(0, (len(x), count)).flatten(3).permute(0, 2, 3, 1)  # N, K, S·S, L
    folded = F.fold(per_image.flatten(0, 1), (height, width), window, padding=padding, stride=stride)
    return folded.view(*target.shape, height, width)


@dataclass(frozen=True)
class EnergyPointing:
    """The energy pointing game: see `energy_pointing_game`."""

    smooth: int = 1

    name = "energy_pointing"
    needs_method = True

    def __post_init__(self) -> None:
        check_smooth(self.smooth)

    def units(self, model: nn.Module, dataset: Any, ranking: Sequence[Row]) -> Sequence[int]:
        """All images."""
        return range(len(dataset))

    def measure(self, model: nn.Module, dataset: Any, units: Sequence[int], method: Any) -> list[list[Row]]:
        """The scores of some images."""
        items = [item_of(dataset, index) for index in units]
        x = stacked(model, [item[0] for item in items])
        if any(len(item) < 3 for item in items):
            raise ValueError(
                "an item of `dataset` must be (encoded image, label, region): boxes (M, 4) or a mask (H, W)"
            )
        masks = stacked(model, [region_mask(item[2], x.shape[-2:]) for item in items])
        target = torch.tensor([item[1] for item in items], device=x.device)
        positive = mean_filter(attribute(model, x, target, method)[:, None], self.smooth).clamp_min(0)[:, 0].double()
        total, inside = positive.sum((1, 2)), (positive * masks).sum((1, 2))
        scores = torch.where(total > 0, inside / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0).tolist()
        return [
            [{"image": int(units[index]), "target": int(target[index]), "score": score}]
            for index, score in enumerate(scores)
        ]


def energy_pointing_game(
    model: nn.Module,
    dataset: Any,
    method: Any = "bcos",
    *,
    smooth: int = 1,
    batch_size: int = 16,
    progress: Callable[[int, int], object] | None = None,
) -> Result:
    """How much of the positive contributions of a class lies inside its boxes or its mask.

    `Σ_inside c⁺ / Σ c⁺`, 0 if there is nothing positive (Wang et al., Score-CAM, 2020).

    Args:
        model: A network in evaluation mode.
        dataset: A sequence of (encoded image (C, H, W), label, region). A region is a mask (H, W) of zeros and ones or
            truth values, or boxes (M, 4) of pixels: left, top, right, bottom, of which the last two are not inside; a
            pixel that a box touches belongs to it.
        method: Attribution method, see `attribute`.
        smooth: Side of the mean filter on the contributions, odd.
        batch_size: Images at once.
        progress: Called as `progress(done, total)`.

    Returns:
        A row for each image; those whose region does not fit are in `failures`.

    Raises:
        ValueError: If no image can be measured, or the method does not fit the network.
    """
    return run_metric(EnergyPointing(smooth), model, dataset, method, batch_size=batch_size, progress=progress)


def region_mask(region: Any, size: Sequence[int]) -> Tensor:
    """Boxes or a mask as a mask (H, W) of 0 and 1.

    Raises:
        ValueError: If a box is empty or reaches beyond the image, or a mask has another size or is empty.
    """
    height, width = size
    values = torch.as_tensor(region)
    # On images of 4 columns boxes may have the shape of a mask: integers are boxes then.
    boxes = values.ndim == 2 and values.shape[1] == 4 and values.dtype in (torch.int64, torch.int32)
    if tuple(values.shape) == (height, width) and not boxes:
        mask = values.float()
        if not bool(((mask == 0) | (mask == 1)).all()) or not bool(mask.any()):
            raise ValueError("a mask must hold zeros and ones, and not zeros alone")
        return mask
    if values.ndim == 1:
        values = values[None]
    if values.ndim != 2 or values.shape[1] != 4 or not len(values):
        raise ValueError(f"a region of shape {tuple(values.shape)} is neither a mask {tuple(size)} nor boxes (M, 4)")
    mask = torch.zeros(height, width)
    for left, top, right, bottom in values.tolist():
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(
                f"the box {(left, top, right, bottom)} is empty or outside of the image of {width}x{height} pixels"
            )
        mask[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)] = 1
    return mask
