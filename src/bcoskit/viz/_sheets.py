"""Pages of pictures with captions: one image explained for several classes, or many images in rows."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from bcoskit.viz._pictures import (
    Array,
    as_colors,
    as_tensor,
    color_picture,
    contribution_map,
    on_white,
    percentile_of,
    require_shape,
    require_single,
    to_pil,
)

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

_MIN_CELL = 64
_FRAME = (200, 200, 200)
_INK = (32, 32, 32)


@dataclass(frozen=True, eq=False)
class SheetRow:
    r"""One explained class of a `sheet`: `contributions` `(H, W)` and `weights` `(2C, H, W)`.

    Without weights, as of a network whose input has no colour encoding, there is no colour picture.

    Each line of the caption is shortened on its own, so what must stay readable belongs on a line of its own,
    as in `"golden retriever\np = 0.93, logit 7.1"`. The font is Pillow's own, which draws
    letters beyond ASCII as boxes.
    """

    caption: str
    contributions: Array
    weights: Array | None


def sheet(
    image: Array | Image.Image,
    rows: Sequence[SheetRow],
    *,
    title: str | None = None,
    cell: int = 256,
    smooth: int = 15,
    rgb: tuple[int, int, int] | None = None,
) -> Image.Image:
    """Composes one image and its explanations: per class a row of contribution map and colour picture.

    The contribution maps share one limit, so that classes can be compared: the largest of the rows'
    99.5-percentiles of absolute contributions, or, if these are 0, the largest of all. The opacity of the
    colour pictures is each one's own.

    Args:
        image: `(H, W, 3)`.
        rows: The explained classes, from top to bottom.
        title: Stands above everything; any number of lines.
        cell: Pixels into which each picture is fitted, at least 64: small ones are enlarged by a whole
            factor, with their pixels kept sharp, large ones are reduced.
        smooth: Width of the mean filter of the colour pictures, see `color_picture`.
        rgb: Channels shown as red, green and blue, see `color_picture`.

    Returns:
        An RGB image on white. Lines of text that are too wide end in an ellipsis.

    Raises:
        ValueError: If `image` is not one picture in [0, 1] (or uint8), if there are no rows, if a row is not
            of the image's size, if `cell` is too small, or as in `color_picture`.
    """
    photograph = as_colors("image", image, (3,))
    require_single("image", photograph)
    if not rows:
        raise ValueError("`rows` must hold at least one class")
    if cell < _MIN_CELL:
        raise ValueError(f"`cell` (={cell}) must be at least {_MIN_CELL}")
    limit = _common_limit(rows, photograph.shape[:2])

    framed = _framed(photograph, cell)
    gap, (width, height) = cell // 16, framed.size
    placed: list[tuple[Image.Image, tuple[int, int]]] = []
    top = gap
    if title is not None:
        heading = _text(title, max(15, cell // 14), 3 * width + 2 * gap)
        placed.append((heading, (gap, top)))
        top += heading.height + gap // 2
    for index, row in enumerate(rows):
        caption = _text(row.caption, max(12, cell // 18), 2 * width + gap)
        placed.append((caption, (2 * gap + width, top)))
        top += caption.height + gap // 4
        map_picture = contribution_map(row.contributions, percentile=100, limit=limit)
        placed.append((_framed(map_picture, cell), (2 * gap + width, top)))
        if row.weights is not None:
            colors = on_white(color_picture(row.weights, row.contributions, smooth=smooth, rgb=rgb))
            placed.append((_framed(colors, cell), (3 * gap + 2 * width, top)))
        if index == 0:
            placed.append((framed, (gap, top)))
        top += height + gap

    page = Image.new("RGB", (3 * width + 4 * gap, top), "white")
    for piece, position in placed:
        page.paste(piece, position)
    return page


def montage(rows: Sequence[Sequence[tuple[Array | Image.Image, str]]], *, cell: int = 128) -> Image.Image:
    r"""Composes pictures with captions in rows, as a gallery.

    Args:
        rows: In each row pictures `(H, W, 3 or 4)`, those with transparency on white, and their captions, of any number
            of lines; an empty one takes no place if all of its row are.
        cell: Pixels into which each picture is fitted, at least 64: small ones are enlarged by a whole factor.

    Returns:
        An RGB image on white.

    Raises:
        ValueError: If there are no pictures, one is no picture in [0, 1] (or uint8), or `cell` is too small.
    """
    if not any(rows):
        raise ValueError("`rows` must hold at least one picture")
    if cell < _MIN_CELL:
        raise ValueError(f"`cell` (={cell}) must be at least {_MIN_CELL}")
    gap = cell // 12
    placed: list[tuple[Image.Image, tuple[int, int]]] = []
    top, right = gap, 0
    for row in rows:
        pieces = [(_framed(_opaque(picture), cell), caption) for picture, caption in row]
        left, height = gap, 0
        for picture, caption in pieces:
            placed.append((picture, (left, top)))
            bottom = picture.height
            if caption:
                text = _text(caption, max(11, cell // 12), picture.width)
                placed.append((text, (left, top + bottom + 2)))
                bottom += text.height + 2
            left, height = left + picture.width + gap, max(height, bottom)
        top, right = top + height + gap, max(right, left)
    page = Image.new("RGB", (right, top), "white")
    for piece, position in placed:
        page.paste(piece, position)
    return page


def _opaque(picture: Array | Image.Image) -> Array:
    return on_white(picture if isinstance(picture, Image.Image) else to_pil(picture))


def _common_limit(rows: Sequence[SheetRow], size: Sequence[int]) -> float | None:
    """Contribution that is drawn in full colour in all rows; None if all contributions are 0."""
    magnitudes: list[torch.Tensor] = []
    for index, row in enumerate(rows):
        contributions = as_tensor(f"rows[{index}].contributions", row.contributions)
        require_shape(f"rows[{index}].contributions", contributions, size, "as `image`")
        magnitudes.append(contributions.abs().to("cpu", torch.float64))
    together = torch.stack(magnitudes)
    limit = percentile_of(together, 99.5).max().item()
    if limit == 0:
        limit = together.max().item()
    return limit if limit > 0 else None


def _framed(picture: Array, cell: int) -> Image.Image:
    """The picture fitted into `cell` pixels, with a thin frame around it."""
    image = to_pil(picture)
    scale = cell / max(image.size)
    if scale >= 1:
        scale, resampling = math.floor(scale), Image.Resampling.NEAREST
    else:
        resampling = Image.Resampling.BOX
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return ImageOps.expand(image.resize(size, resampling), border=1, fill=_FRAME)


def _text(text: str, size: int, width: int) -> Image.Image:
    """The lines of the text, each shortened to the width, on white."""
    font = ImageFont.load_default(size)
    line_height = math.ceil(1.35 * size)
    lines = text.splitlines()
    block = Image.new("RGB", (width, line_height * len(lines)), "white")
    draw = ImageDraw.Draw(block)
    for index, line in enumerate(lines):
        shown = _shorten(line, width, font)
        draw.text((-font.getbbox(shown)[0], index * line_height), shown, fill=_INK, font=font)
    return block


def _shorten(line: str, width: int, font: Font) -> str:
    """The line, or as much of its beginning as fits into `width` pixels with an ellipsis."""
    if _ink_width(line, font) <= width:
        return line

    def shortened(length: int) -> str:
        return line[:length].rstrip() + "…"

    lengths = range(1, len(line))
    return shortened(bisect_right(lengths, width, key=lambda length: _ink_width(shortened(length), font)))


def _ink_width(text: str, font: Font) -> float:
    left, _, right, _ = font.getbbox(text)
    return right - left
