"""The pictures of the page, by `bcoskit.viz`, as data that a page can hold without a file."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from bcoskit import viz
from bcoskit._explain import Explanation
from bcoskit.app._figures import figures
from bcoskit.app._service import ExplanationService, Photograph
from bcoskit.viz._pictures import usual_smooth


@dataclass(frozen=True)
class Controls:
    """How explanations are drawn.

    Attributes:
        over: Whether over the image instead of beside it.
        opacity: Of what lies over the image, in [0, 1].
        smooth: Side of the mean filter, odd, or 0 for none.
        percentile: Of what is drawn in full colour.
    """

    over: bool = False
    opacity: float = 0.7
    smooth: int = 1
    percentile: float = 99.5

    def __post_init__(self) -> None:
        if not 0 <= self.opacity <= 1:
            raise ValueError(f"`opacity` (={self.opacity}) must be in [0, 1]")


def panels(
    service: ExplanationService, photograph: Photograph, explanation: Explanation, controls: Controls
) -> dict[str, Image.Image]:
    """Image, contribution map and, where the weights have colours, colour explanation."""
    contributions = explanation.contributions[0]
    smooth = 0 if controls.smooth == 1 else controls.smooth
    pictures = {"map": viz.contribution_map(contributions, percentile=controls.percentile, smooth=smooth)}
    if service.colored:
        pictures["colors"] = viz.color_picture(
            explanation.weights[0], contributions, smooth=smooth, percentile=controls.percentile
        )
    drawn = {
        name: viz.overlay(photograph.view, picture, opacity=controls.opacity, grey=True)
        if controls.over
        else (viz.on_white(picture) if picture.shape[-1] == 4 else picture)
        for name, picture in pictures.items()
    }
    return {"image": photograph.view, **{name: viz.to_pil(picture) for name, picture in drawn.items()}}


def sheet(service: ExplanationService, photograph: Photograph, explanation: Explanation) -> Image.Image:
    """The picture that one downloads: that of `bcoskit explain`, of one class."""
    told = figures(service, explanation)
    caption = told["target"]["class"] + (f" against {told['versus']['class']}" if told["versus"] else "")
    probability = told["target"]["probability"]
    numbers = f"logit {told['value']:.2f}" if told["versus"] is None else f"difference of logits {told['value']:.2f}"
    if probability is not None and told["versus"] is None:
        numbers = f"p = {probability:.3f}, {numbers}"
    row = viz.SheetRow(
        f"{caption}\n{numbers}",
        explanation.contributions[0],
        explanation.weights[0] if service.colored else None,
    )
    return viz.sheet(photograph.view, [row], smooth=usual_smooth(photograph.view.width))


def comparison_map(contributions: Tensor, smooth: int) -> Image.Image:
    """A contribution map of any method."""
    return viz.to_pil(viz.contribution_map(contributions, smooth=0 if smooth == 1 else smooth))


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    """Bytes as the address of themselves."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def packed(values: Tensor) -> str:
    """Numbers (H, W) as base64 of little-endian single precision, row by row."""
    return base64.b64encode(values.detach().cpu().numpy().astype(np.dtype("<f4")).tobytes()).decode("ascii")
