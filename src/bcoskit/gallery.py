"""The inner life of a network in pictures: what drives a neuron, why one class and not another, a video."""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageSequence
from torch import nn

from bcoskit import viz
from bcoskit._checks import check_evaluation_mode
from bcoskit._devices import device_of
from bcoskit._explain import explain
from bcoskit._files import whole_file
from bcoskit._layers import outputs_of
from bcoskit.data import ImageError, ImageTransform, find_images, read_image
from bcoskit.data._images import pixels
from bcoskit.evaluation._loop import item_of, labels_of
from bcoskit.viz._pictures import photograph, usual_picture

__all__ = ["Activation", "animate", "neuron_gallery", "strongest", "versus_gallery"]

_DURATION = 100  # of a frame, in milliseconds, where nothing tells it


@dataclass(frozen=True)
class Activation:
    """Where a channel responds most in an image.

    Attributes:
        channel: The channel.
        image: Number of the image in the dataset.
        position: Place in the output of the layer after the axis of channels, such as (row, column).
        value: The response.
    """

    channel: int
    image: int
    position: tuple[int, ...]
    value: float


def strongest(
    model: nn.Module,
    dataset: Any,
    layer: str,
    channels: Sequence[int],
    *,
    count: int = 6,
    batch_size: int = 64,
    progress: Callable[[int, int], object] | None = None,
) -> dict[int, list[Activation]]:
    """The images in which channels of a layer respond most, in one pass over a dataset.

    Args:
        model: A network in evaluation mode.
        dataset: A sequence of (encoded image, …).
        layer: Path of the layer; its output is (N, channels, …).
        channels: The channels.
        count: Images per channel.
        batch_size: Images at once.
        progress: Called as `progress(done, total)`.

    Returns:
        For each channel the activations, largest first; each image counts once.

    Raises:
        ValueError: If there is no such layer or channel, it does not run exactly once, its outputs are not finite, or
            the dataset is empty.
    """
    check_evaluation_mode(model)
    channels = list(dict.fromkeys(channels))
    if count < 1 or batch_size < 1:
        raise ValueError(f"`count` (={count}) and `batch_size` (={batch_size}) must be at least 1")
    if len(dataset) == 0:
        raise ValueError("`dataset` holds no images")
    found: dict[int, list[tuple[float, int, tuple[int, ...]]]] = {channel: [] for channel in channels}
    device = device_of(model)
    for begin in range(0, len(dataset), batch_size):
        numbers = range(begin, min(begin + batch_size, len(dataset)))
        with torch.no_grad():
            x = torch.stack([dataset[index][0] for index in numbers]).to(device)
            output = outputs_of(model, x, (layer,))[layer]
        if output.ndim < 2 or not all(0 <= channel < output.shape[1] for channel in channels):
            raise ValueError(
                f"`channels` (={list(channels)}) must be those of `layer` (={layer!r}), {output.shape[1:2]}"
            )
        values, places = output[:, list(channels)].unsqueeze(-1).flatten(2).max(2)
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"`layer` (={layer!r}) has outputs that are not finite for images {numbers[0]} to {numbers[-1]}"
            )
        for row, image in enumerate(numbers):
            for column, channel in enumerate(channels):
                place = _position(int(places[row, column]), output.shape[2:])
                # The earlier image first among equals.
                heapq.heappush(found[channel], (float(values[row, column]), -image, place))
                if len(found[channel]) > count:
                    heapq.heappop(found[channel])
        if progress is not None:
            progress(numbers.stop, len(dataset))
    return {
        channel: [Activation(channel, -image, place, value) for value, image, place in sorted(heap, reverse=True)]
        for channel, heap in found.items()
    }


def _position(index: int, shape: Sequence[int]) -> tuple[int, ...]:
    if not shape:
        return ()
    return tuple(int(place) for place in torch.unravel_index(torch.tensor(index), tuple(shape)))


def neuron_gallery(
    model: nn.Module,
    dataset: Any,
    layer: str,
    channels: Sequence[int],
    *,
    count: int = 6,
    batch_size: int = 64,
    cell: int = 96,
    progress: Callable[[int, int], object] | None = None,
) -> Image.Image:
    """What drives the channels of a layer: the images in which each responds most, and its own `W(x)` in them.

    The strongest response of a channel in an image is explained as a logit is, `value = Σ W(x)·x`, and its weights
    are shown in colours (Böhle et al., CVPR 2022, figure 8), or its contributions where the input has no encoding.

    Args:
        model: A network in evaluation mode.
        dataset: A sequence of (encoded image, …).
        layer: Path of the layer; its output is (N, channels, …).
        channels: The channels, two rows of pictures for each.
        count: Images per channel.
        batch_size: Images at once in the search.
        cell: Pixels of a picture.
        progress: Called as `progress(done, total)` of the search.

    Returns:
        An RGB image.

    Raises:
        ValueError: As `strongest`; as `explain`.
    """
    found = strongest(model, dataset, layer, channels, count=count, batch_size=batch_size, progress=progress)
    device = device_of(model)
    rows: list[list[tuple[Any, str]]] = []
    for channel, activations in found.items():
        above: list[tuple[Any, str]] = []
        below: list[tuple[Any, str]] = []
        for each in activations:
            x = dataset[each.image][0][None].to(device)
            explanation = explain(model, x, *_target_of(each), to_layer=layer)
            above.append((photograph(x[0]), f"{layer} {channel}\n{each.value:.3g}"))
            below.append((usual_picture(explanation.weights[0], explanation.contributions[0]), ""))
        rows += [above, below]
    return viz.montage(rows, cell=cell)


def _target_of(activation: Activation) -> tuple[Any]:
    if activation.position:
        return ((activation.channel, *activation.position),)
    return (activation.channel,)


def versus_gallery(
    model: nn.Module,
    dataset: Any,
    first: int,
    second: int,
    *,
    count: int = 6,
    classes: Sequence[str] | None = None,
    batch_size: int = 64,
    cell: int = 96,
) -> Image.Image:
    """Images of one class that are taken for another: why the one, why the other, why the one rather than the other.

    Per image a row: the image, the contributions to the logit of `first`, those to `second`, and those to their
    difference, red for `first` and blue for `second`. Those come first whose logits differ most in favour of `second`.

    Args:
        model: A network in evaluation mode.
        dataset: A sequence of (encoded image, label).
        first: The class that the images belong to.
        second: The class that they are taken for.
        count: Number of images.
        classes: Names of all classes; numbers if None.
        batch_size: Images at once in the search.
        cell: Pixels of a picture.

    Returns:
        An RGB image.

    Raises:
        ValueError: If the two are one class, or none of the network's, if no image of `first` is taken for `second`,
            or `count` or `batch_size` is out of range; as `explain`.
    """
    check_evaluation_mode(model)
    if count < 1 or batch_size < 1:
        raise ValueError(f"`count` (={count}) and `batch_size` (={batch_size}) must be at least 1")
    device = device_of(model)
    confused: list[tuple[float, int]] = []
    labels = labels_of(dataset)
    numbers = [
        index
        for index in range(len(dataset))
        if (item_of(dataset, index)[1] if labels is None else int(labels[index])) == first
    ]
    for begin in range(0, len(numbers), batch_size):
        part = numbers[begin : begin + batch_size]
        with torch.no_grad():
            logits = model(torch.stack([dataset[index][0] for index in part]).to(device))
        if first == second or not all(0 <= each < logits.shape[1] for each in (first, second)):
            raise ValueError(
                f"`first` (={first}) and `second` (={second}) must be two of the classes 0 to {logits.shape[1] - 1}"
            )
        difference = (logits[:, second] - logits[:, first]).tolist()
        confused += [(value, index) for value, index, named in zip(difference, part, logits.argmax(1), strict=True)
                     if int(named) == second]  # fmt: skip
    if classes is not None and not all(0 <= each < len(classes) for each in (first, second)):
        raise ValueError(f"`first` (={first}) and `second` (={second}) must be two of the {len(classes)} `classes`")
    names = [str(each) if classes is None else classes[each] for each in (first, second)]
    if not confused:
        raise ValueError(f"no image of class {names[0]!r} is taken for {names[1]!r}")
    rows: list[list[tuple[Any, str]]] = []
    for _, index in sorted(confused, key=lambda pair: (-pair[0], pair[1]))[:count]:
        x = dataset[index][0][None].to(device)
        both = explain(model, x, [[first, second]])
        between = explain(model, x, first, versus=second)
        row: list[tuple[Any, str]] = [(photograph(x[0]), f"image {index}")]
        row += [
            (viz.contribution_map(both.contributions[0, k]), f"{names[k]}\nlogit {float(both.value[0, k]):.2f}")
            for k in (0, 1)
        ]
        row.append(
            (viz.contribution_map(between.contributions[0]), f"{names[0]} - {names[1]}\n{float(between.value[0]):.2f}")
        )
        rows.append(row)
    return viz.montage(rows, cell=cell)


def animate(
    model: nn.Module,
    frames: str | Path | Iterable[Image.Image],
    out: str | Path,
    transform: ImageTransform,
    *,
    target: int | None = None,
    milliseconds: int | None = None,
    smooth: int = 5,
    batch_size: int = 16,
) -> int:
    """Explain a video frame by frame, and write it beside its colour explanation as an animated file.

    The opacity of a frame's picture is multiplied by the probability of the class, `sigmoid(logit)`, so that it fades
    where the class is not seen (as the videos of Böhle et al., CVPR 2022).

    Args:
        model: A network in evaluation mode with encoded inputs.
        frames: An animated GIF, WebP or PNG file, a folder of images in the order of their names, or images. They are
            read as by `read_image`: transparent pixels are white.
        out: The file that is written: .gif, .webp or .png.
        transform: From an image to the network's input, such as `model.transform`.
        target: The class that is explained; by default the one with the largest logit over all frames.
        milliseconds: Duration of a frame; by default that which each has in the file, or 100.
        smooth: Side of the mean filter of the opacity, odd.
        batch_size: Frames at once.

    Returns:
        The class that was explained.

    Raises:
        ValueError: If `out` has another suffix, `milliseconds` or `batch_size` is out of range, or there are no frames;
            as `explain`.
        ImageError: If a file cannot be read.
    """
    check_evaluation_mode(model)
    out = Path(out)
    if out.suffix not in (".gif", ".webp", ".png"):
        raise ValueError(f"`out` (={str(out)!r}) must end in .gif, .webp or .png")
    if batch_size < 1 or (milliseconds is not None and milliseconds < 1):
        raise ValueError(f"`batch_size` (={batch_size}) and `milliseconds` (={milliseconds}) must be at least 1")
    pictures, durations = _frames(frames)
    views = [transform.view(frame) for frame in pictures]
    if not views:
        raise ValueError("`frames` holds no images")
    device = device_of(model)
    x = transform.encode_pixels(torch.stack([pixels(view) for view in views])).to(device)
    if x.shape[1] not in (2, 6):
        raise ValueError("`transform` must encode images as [x, 1 - x]: a video shows the colours of W(x)")
    if target is None:
        with torch.no_grad():
            target = int(torch.cat([model(part) for part in x.split(batch_size)]).amax(0).argmax())
    pages: list[Image.Image] = []
    for begin in range(0, len(views), batch_size):
        explanation = explain(model, x[begin : begin + batch_size], target)
        colors = viz.color_picture(explanation.weights, explanation.contributions, smooth=smooth, percentile=100)
        colors[..., 3] *= explanation.value.sigmoid().cpu().numpy()[:, None, None]
        pages += [
            viz.montage([[(view, ""), (picture, "")]], cell=max(128, view.width))
            for view, picture in zip(views[begin:], colors, strict=False)
        ]
    kind = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG"}[out.suffix]
    with whole_file(out) as unfinished:
        pages[0].save(
            unfinished,
            format=kind,
            save_all=True,
            append_images=pages[1:],
            duration=durations if milliseconds is None else milliseconds,
            loop=0,
        )
    return target


def _frames(source: str | Path | Iterable[Image.Image]) -> tuple[list[Image.Image], int | list[int]]:
    """The frames, and how long they last in milliseconds, each or all."""
    if not isinstance(source, (str, Path)):
        return list(source), _DURATION
    path = Path(source)
    if path.is_dir():
        return [read_image(file) for file in find_images([path])], _DURATION
    read_image(path)  # which refuses what is no image, or too large
    pictures: list[Image.Image] = []
    durations: list[int] = []
    try:
        with Image.open(path) as video:
            for frame in ImageSequence.Iterator(video):
                pictures.append(read_image(frame))  # first, since some files tell of a frame as it is read
                durations.append(int(frame.info.get("duration", _DURATION)))
    except (OSError, ValueError, EOFError) as error:
        raise ImageError(f"{path}: is damaged ({error})") from error
    return pictures, durations
