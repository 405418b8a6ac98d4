"""Pictures of explanations, against slow references and against matplotlib."""

import ast
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.colors
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from bcoskit import viz

Numbers = npt.NDArray[Any]

# ---------------------------------------------------------------------------------------------- references


def reference_mean_filter(values: Numbers, smooth: int, count_padding: bool = True) -> Numbers:
    """Mean filter of one image, pixel by pixel."""
    height, width = values.shape
    reach = (smooth - 1) // 2
    result = np.empty_like(values)
    for row in range(height):
        for column in range(width):
            window = [
                values[r, c]
                for r in range(row - reach, row + reach + 1)
                for c in range(column - reach, column + reach + 1)
                if 0 <= r < height and 0 <= c < width
            ]
            result[row, column] = sum(window) / (smooth**2 if count_padding else len(window))
    return result


def reference_color_picture(
    weights: Numbers,
    contributions: Numbers,
    smooth: int = 15,
    percentile: float = 99.5,
    rgb: tuple[int, int, int] = (0, 1, 2),
    order: int = 2,
    mask: bool = True,
    count_padding: bool = True,
) -> Numbers:
    """RGBA of one image, pixel by pixel in float64; the last three arguments are ways to get it wrong."""
    channels, height, width = weights.shape
    half = channels // 2
    colors = np.zeros((height, width, 3))
    strength = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            pixel = [float(value) for value in weights[:, row, column]]
            largest = max(abs(value) for value in pixel)
            clipped = [max(0.0, value / (largest + 1e-12)) for value in pixel]
            for place, j in enumerate(rgb):
                colors[row, column, place] = clipped[j] / (clipped[j] + clipped[j + half] + 1e-12)
            strength[row, column] = sum(abs(value) ** order for value in pixel) ** (1 / order)
            if mask and contributions[row, column] < 0:
                strength[row, column] = 1e-12
    if smooth != 0:
        strength = reference_mean_filter(strength, smooth, count_padding)
    alpha = np.clip(strength / np.percentile(strength, percentile), 0, 1)
    return np.concatenate([colors, alpha[..., None]], axis=-1)


def reference_contribution_map(
    contributions: Numbers, percentile: float = 99.5, limit: float | None = None, table: str = "bwr"
) -> Numbers:
    """The map as matplotlib colours it."""
    cut = np.percentile(np.abs(contributions), percentile)
    clipped = np.clip(contributions, -cut, cut)
    bound = np.max(np.abs(clipped)) if limit is None else limit
    return mpl.colormaps[table](matplotlib.colors.Normalize(-bound, bound)(clipped))[..., :3]


def example(
    channels: int = 6, height: int = 9, width: int = 7, seed: int = 0, batch: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and input in float64, with pixels for and against the class."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(*batch, channels, height, width, generator=generator, dtype=torch.float64)
    half = torch.rand(*batch, channels // 2, height, width, generator=generator, dtype=torch.float64)
    return weights, torch.cat([half, 1 - half], dim=-3)


def example_map(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_picture(picture: viz._pictures.Picture, shape: tuple[int, ...]) -> None:
    assert isinstance(picture, np.ndarray)
    assert picture.dtype == np.float32
    assert picture.shape == shape
    assert picture.min() >= 0
    assert picture.max() <= 1


# ------------------------------------------------------------------------------------------- colour picture


@pytest.mark.parametrize("smooth", [0, 1, 3, 15])
@pytest.mark.parametrize("percentile", [0, 50, 99.5, 100])
def test_color_picture_follows_the_formula(smooth: int, percentile: float) -> None:
    weights, x = example()
    contributions = (weights * x).sum(0)
    picture = viz.color_picture(weights, contributions, smooth=smooth, percentile=percentile)
    assert_picture(picture, (9, 7, 4))
    expected = reference_color_picture(weights.numpy(), contributions.numpy(), smooth, percentile)
    np.testing.assert_allclose(picture, expected, atol=1e-6)


@pytest.mark.parametrize(
    "mistake",
    [
        {"order": 1},
        {"mask": False},
        {"count_padding": False},
        {"percentile": 100},
        {"smooth": 5},
        {"rgb": (2, 1, 0)},
    ],
)
def test_color_picture_differs_from_wrong_formulas(mistake: dict[str, Any]) -> None:
    weights, x = example()
    contributions = (weights * x).sum(0)
    right: dict[str, Any] = {"smooth": 3, "percentile": 90}
    wrong = reference_color_picture(weights.numpy(), contributions.numpy(), **{**right, **mistake})
    assert np.abs(viz.color_picture(weights, contributions, **right) - wrong).max() > 1e-2


def test_color_picture_exact_numbers() -> None:
    weights = torch.tensor([[3.0, 1.0], [0.0, 1.0], [-4.0, 1.0], [1.0, -1.0], [0.0, 3.0], [0.0, 0.0]])
    picture = viz.color_picture(weights[:, None], torch.tensor([[1.0, -1.0]]), smooth=0, percentile=100)
    np.testing.assert_allclose(picture[0, 0], [0.75, 0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(picture[0, 1], [1, 0.25, 1, 0], atol=1e-6)


def test_contributions_are_computed_from_the_input() -> None:
    weights, x = example()
    from_x = viz.color_picture(weights, x=x)
    np.testing.assert_array_equal(from_x, viz.color_picture(weights, (weights * x).sum(0)))
    assert not np.array_equal(from_x, viz.color_picture(weights, x=-x))


def test_grey_input_is_shown_grey() -> None:
    weights, x = example(channels=2)
    contributions = (weights * x).sum(0)
    picture = viz.color_picture(weights, contributions, smooth=3)
    expected = reference_color_picture(weights.numpy(), contributions.numpy(), 3, rgb=(0, 0, 0))
    np.testing.assert_allclose(picture, expected, atol=1e-6)
    np.testing.assert_array_equal(picture[..., 0], picture[..., 2])


def test_chosen_channels_are_shown_and_all_are_normalised() -> None:
    weights, x = example(channels=10)
    contributions = (weights * x).sum(0)
    picture = viz.color_picture(weights, contributions, smooth=3, rgb=(4, 0, 4))
    expected = reference_color_picture(weights.numpy(), contributions.numpy(), 3, rgb=(4, 0, 4))
    np.testing.assert_allclose(picture, expected, atol=1e-6)
    shown_only = weights[[4, 0, 4, 9, 5, 9]].numpy()
    wrong = reference_color_picture(shown_only, contributions.numpy(), 3)
    assert np.abs(picture - wrong).max() > 1e-2


@given(
    batch=st.lists(st.integers(1, 2), max_size=2),
    half=st.integers(1, 4),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    smooth=st.sampled_from([0, 1, 3, 7]),
    percentile=st.floats(0, 100),
)
@settings(max_examples=30, deadline=None)
def test_any_shape(batch: list[int], half: int, height: int, width: int, smooth: int, percentile: float) -> None:
    weights, x = example(2 * half, height, width, batch=batch)
    rgb = (0, half - 1, half // 2)
    picture = viz.color_picture(weights, x=x, smooth=smooth, percentile=percentile, rgb=rgb)
    assert_picture(picture, (*batch, height, width, 4))
    maps = viz.contribution_map((weights * x).sum(-3), percentile=percentile, smooth=smooth)
    assert_picture(maps, (*batch, height, width, 3))


def test_images_of_a_batch_are_independent() -> None:
    weights, x = example(batch=(2, 3))
    weights[1] *= 100
    contributions = (weights * x).sum(-3)
    pictures = viz.color_picture(weights, contributions, smooth=3)
    maps = viz.contribution_map(contributions, smooth=3)
    for i in range(2):
        for j in range(3):
            alone = viz.color_picture(weights[i, j], contributions[i, j], smooth=3)
            np.testing.assert_array_equal(pictures[i, j], alone)
            np.testing.assert_array_equal(maps[i, j], viz.contribution_map(contributions[i, j], smooth=3))
    # One percentile for all would leave the weaker images all but transparent.
    assert (pictures[..., 3].max(axis=(-2, -1)) == 1).all()


def test_input_kinds_agree() -> None:
    weights, x = example()
    picture = viz.color_picture(weights, x=x)
    np.testing.assert_array_equal(viz.color_picture(weights.numpy(), x=x.numpy()), picture)
    np.testing.assert_array_equal(viz.color_picture(weights.clone().requires_grad_(), x=x.numpy()), picture)
    np.testing.assert_allclose(viz.color_picture(weights.float(), x=x.float()), picture, atol=1e-5)
    np.testing.assert_allclose(viz.color_picture(weights.half(), x=x), picture, atol=1e-2)
    flipped = viz.color_picture(weights.numpy()[:, ::-1], x=x.numpy()[:, ::-1], smooth=0)
    np.testing.assert_array_equal(flipped, viz.color_picture(weights, x=x, smooth=0)[::-1])


def test_inputs_are_left_alone() -> None:
    weights, x = example()
    contributions = (weights * x).sum(0).numpy()
    contributions.flags.writeable = False
    before = weights.clone()
    viz.color_picture(weights, contributions)
    viz.contribution_map(contributions)
    assert torch.equal(weights, before)


def test_nothing_to_show_is_transparent() -> None:
    picture = viz.color_picture(torch.zeros(6, 4, 4), torch.zeros(4, 4))
    np.testing.assert_array_equal(picture, np.zeros((4, 4, 4)))


def test_a_lonely_pixel_is_opaque_where_the_percentile_is_zero() -> None:
    weights = torch.zeros(6, 20, 20)
    weights[1, 3, 5] = 1
    picture = viz.color_picture(weights, weights.sum(0), smooth=0)
    assert picture[3, 5].tolist() == [0, 1, 0, 1]
    assert np.count_nonzero(picture) == 2


@pytest.mark.parametrize("factor", [1e-8, 1e25])
def test_float32_weights_of_any_magnitude(factor: float) -> None:
    weights, x = example()
    tiny = viz.color_picture((weights * factor).float(), x=x)
    expected = reference_color_picture((weights * factor).numpy(), (weights * x).sum(0).numpy())
    np.testing.assert_allclose(tiny, expected, atol=1e-5)


def test_parity_with_the_authors_package() -> None:
    pytest.importorskip("bcos.common", reason="the authors' package `bcos` is not installed")
    from bcos.common import gradient_to_image

    weights, x = example(height=31, width=24)
    for smooth, percentile in [(15, 99.5), (0, 99.5), (5, 100)]:
        theirs = gradient_to_image(x, weights, smooth=smooth, alpha_percentile=percentile)
        ours = viz.color_picture(weights, x=x, smooth=smooth, percentile=percentile)
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert np.abs(viz.color_picture(weights, x=x, percentile=90) - theirs).max() > 1e-2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_color_picture_refuses_numbers_that_are_not_finite(bad: float) -> None:
    weights, x = example()
    contributions = (weights * x).sum(0)
    spoiled = weights.clone()
    spoiled[0, 0, 0] = bad
    with pytest.raises(ValueError, match="`weights` must be finite"):
        viz.color_picture(spoiled, contributions)
    with pytest.raises(ValueError, match="`x` must be finite"):
        viz.color_picture(weights, x=spoiled)
    with pytest.raises(ValueError, match="`contributions` must be finite"):
        viz.color_picture(weights, spoiled[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contributions": None}, "either `contributions` or `x`"),
        ({"x": torch.zeros(6, 4, 5)}, "either `contributions` or `x`"),
        ({"contributions": torch.zeros(5, 4)}, r"`contributions` \(shape \(5, 4\)\) must be \(4, 5\)"),
        ({"contributions": None, "x": torch.zeros(3, 4, 5)}, r"`x` .*\(3, 4, 5\)\) must be \(6, 4, 5\)"),
        ({"weights": torch.zeros(5, 4, 5)}, "even number of channels"),
        ({"weights": torch.zeros(4, 5)}, r"must be \(..., 2C, H, W\)"),
        ({"weights": torch.zeros(8, 4, 5)}, "8 channels have no colours.*`rgb`.*`contribution_map`"),
        ({"weights": torch.zeros(6, 0, 5)}, "not empty"),
        ({"weights": torch.zeros(6, 4, 5, dtype=torch.complex64)}, "must be real"),
        ({"smooth": 4}, r"`smooth` \(=4\)"),
        ({"smooth": -1}, r"`smooth` \(=-1\)"),
        ({"percentile": 100.5}, r"`percentile` \(=100.5\)"),
        ({"percentile": math.nan}, r"`percentile` \(=nan\)"),
        ({"rgb": (0, 1, 3)}, r"`rgb` \(=\(0, 1, 3\)\) must name three channels from 0 to 2"),
        ({"rgb": (0, 1, -1)}, "must name three channels"),
        ({"rgb": (0, 1)}, "must name three channels"),
    ],
)
def test_color_picture_refuses(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"weights": torch.ones(6, 4, 5), "contributions": torch.ones(4, 5)}
    viz.color_picture(**good)
    with pytest.raises(ValueError, match=message):
        viz.color_picture(**{**good, **arguments})


# ----------------------------------------------------------------------------------------- contribution map


@pytest.mark.parametrize("percentile", [0.5, 50, 99.5, 100])
@pytest.mark.parametrize("limit", [None, 0.1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contribution_map_is_matplotlibs(percentile: float, limit: float | None, dtype: torch.dtype) -> None:
    contributions = example_map(40, 30).to(dtype)
    picture = viz.contribution_map(contributions, percentile=percentile, limit=limit)
    assert_picture(picture, (40, 30, 3))
    # Percentiles of float32 are rounded differently, which may move a value across the border of two colours.
    tolerance = 1e-6 if dtype == torch.float64 else 2 / 255 + 1e-6
    expected = reference_contribution_map(contributions.double().numpy(), percentile, limit)
    np.testing.assert_allclose(picture, expected, atol=tolerance)


@pytest.mark.parametrize("mistake", [{"percentile": 100}, {"limit": 2.0}, {"table": "seismic"}, {"table": "bwr_r"}])
def test_contribution_map_differs_from_wrong_formulas(mistake: dict[str, Any]) -> None:
    contributions = example_map(40, 30)
    wrong = reference_contribution_map(contributions.numpy(), **mistake)
    assert np.abs(viz.contribution_map(contributions) - wrong).max() > 0.05


def test_all_256_colors() -> None:
    centres = (torch.arange(256, dtype=torch.float64) + 0.5) / 128 - 1
    picture = viz.contribution_map(centres[None], percentile=100, limit=1)[0]
    np.testing.assert_allclose(picture, mpl.colormaps["bwr"](np.arange(256))[:, :3], atol=1e-7)
    assert picture[0].tolist() == [0, 0, 1]
    assert picture[255].tolist() == [1, 0, 0]
    assert len(np.unique(picture, axis=0)) == 256


@pytest.mark.parametrize("limit", [None, 3.0])
def test_a_map_of_zeros_is_white(limit: float | None) -> None:
    maps = torch.zeros(2, 3, 3)
    maps[1, 1, 1] = 1
    picture = viz.contribution_map(maps, limit=limit, percentile=100)
    np.testing.assert_array_equal(picture[0], np.ones((3, 3, 3)))
    assert picture[1, 1, 1, 1] < 1


def test_contribution_map_is_smoothed_before_it_is_clipped() -> None:
    contributions = example_map(9, 8)
    smoothed = reference_mean_filter(contributions.numpy(), 3)
    picture = viz.contribution_map(contributions, smooth=3, percentile=80)
    np.testing.assert_allclose(picture, reference_contribution_map(smoothed, 80), atol=2 / 255 + 1e-6)
    cut = np.percentile(np.abs(contributions.numpy()), 80)
    clipped = np.clip(contributions.numpy(), -cut, cut)
    wrong = reference_contribution_map(reference_mean_filter(clipped, 3), 100)
    assert np.abs(picture - wrong).max() > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contributions": torch.ones(4)}, r"`contributions` \(shape \(4,\)\) must be \(..., H, W\)"),
        ({"contributions": torch.full((2, 2), math.nan)}, "`contributions` must be finite"),
        ({"contributions": np.full((2, 2), np.inf)}, "`contributions` must be finite"),
        ({"contributions": torch.ones(0, 4, 4)}, "not empty"),
        ({"percentile": -1}, r"`percentile` \(=-1\)"),
        ({"limit": 0}, r"`limit` \(=0\)"),
        ({"limit": math.inf}, r"`limit` \(=inf\)"),
        ({"limit": math.nan}, r"`limit` \(=nan\)"),
        ({"smooth": 2}, r"`smooth` \(=2\)"),
    ],
)
def test_contribution_map_refuses(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"contributions": torch.ones(4, 4)}
    viz.contribution_map(**good)
    with pytest.raises(ValueError, match=message):
        viz.contribution_map(**{**good, **arguments})


# ----------------------------------------------------------------------------------------------- percentile


@given(st.integers(1, 50), st.floats(0, 100), st.integers(0, 10))
@settings(max_examples=100, deadline=None)
def test_percentile_is_numpys(length: int, percentile: float, seed: int) -> None:
    values = example_map(2, 1, length, seed=seed)
    expected = np.percentile(values.numpy(), percentile, axis=(-2, -1))
    result = viz._pictures.percentile_of(values, percentile)
    assert result.shape == (2, 1, 1)
    np.testing.assert_allclose(result.flatten(), expected, rtol=1e-12, atol=1e-14)


def test_percentile_of_more_than_sixteen_million_elements() -> None:
    values = torch.arange(2**24 + 1, dtype=torch.float32)[None]
    assert viz._pictures.percentile_of(values, 50).item() == 2**23


# ------------------------------------------------------------------------------- overlay, white, PIL images


def test_overlay_of_colors() -> None:
    image = np.full((2, 3, 3), 0.5)
    picture = np.zeros((2, 3, 4))
    picture[0, 0] = (1, 0, 0, 1)
    picture[1, 2] = (0, 1, 0, 0.5)
    result = viz.overlay(image, picture, opacity=0.8)
    assert_picture(result, (2, 3, 3))
    np.testing.assert_allclose(result[0, 0], (0.9, 0.1, 0.1), atol=1e-6)
    np.testing.assert_allclose(result[1, 2], (0.3, 0.7, 0.3), atol=1e-6)
    np.testing.assert_array_equal(result[0, 1], (0.5, 0.5, 0.5))


def test_overlay_of_a_map_and_grey() -> None:
    image = torch.rand(2, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    maps = viz.contribution_map(example_map(2, 5, 4))
    plain = viz.overlay(image, maps)
    np.testing.assert_allclose(plain, 0.3 * image.numpy() + 0.7 * maps, atol=1e-6)
    grey = image.numpy() @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(viz.overlay(image, maps, grey=True), 0.3 * grey[..., None] + 0.7 * maps, atol=1e-6)
    np.testing.assert_allclose(viz.overlay(image, maps, opacity=0), image, atol=0)
    np.testing.assert_allclose(viz.overlay(image, maps, opacity=1), maps, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": np.zeros((4, 6, 3))}, r"`image` .*\(4, 6, 3\)\) and `picture` .*\(4, 5, 4\)\)"),
        ({"image": np.zeros((1, 4, 5, 3))}, "same size"),
        ({"image": np.zeros((3, 4, 5))}, "colours last"),
        ({"image": np.zeros((4, 5, 4))}, r"`image` .* must be \(..., H, W, 3\)"),
        ({"picture": np.zeros((4, 5, 2))}, r"`picture` .* must be \(..., H, W, 3 or 4\)"),
        ({"image": np.full((4, 5, 3), 200.0)}, r"`image` \(from 200 to 200\) must be in \[0, 1\]"),
        ({"picture": np.full((4, 5, 4), -0.1)}, r"`picture` .* must be in \[0, 1\]"),
        ({"picture": np.full((4, 5, 4), np.nan)}, "`picture` must be finite"),
        ({"opacity": 1.2}, r"`opacity` \(=1.2\)"),
        ({"opacity": math.nan}, r"`opacity` \(=nan\)"),
    ],
)
def test_overlay_refuses(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"image": np.zeros((4, 5, 3)), "picture": np.zeros((4, 5, 4))}
    viz.overlay(**good)
    with pytest.raises(ValueError, match=message):
        viz.overlay(**{**good, **arguments})


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_pil_images_of_more_than_eight_bits_are_refused(dtype: Any) -> None:
    rgba = np.zeros((3, 4, 4), np.float32)
    deep = Image.fromarray(np.full((3, 4), 300, dtype))
    for draw in (lambda: viz.overlay(deep, rgba), lambda: viz.montage([[(deep, "")]])):
        with pytest.raises(ValueError, match=rf"\(of mode {deep.mode!r}\) must have 8 bits"):
            draw()
    assert viz.overlay(deep.convert("L"), rgba).shape == (3, 4, 3)


def test_on_white() -> None:
    result = viz.on_white(np.array([[[0.2, 0.4, 1, 0.5], [0.3, 0.2, 0.1, 0], [0.3, 0.2, 0.1, 1]]]))
    np.testing.assert_allclose(result, [[[0.6, 0.7, 1], [1, 1, 1], [0.3, 0.2, 0.1]]], atol=1e-6)
    with pytest.raises(ValueError, match=r"`rgba` .* must be \(..., H, W, 4\)"):
        viz.on_white(np.zeros((2, 2, 3)))


def test_to_pil_rounds_to_the_nearest_level() -> None:
    levels = np.arange(256, dtype=np.float32)
    array = np.stack([levels, levels + 0.4, (levels - 0.4), levels], axis=-1).clip(0, 255)[None] / 255
    image = viz.to_pil(array)
    assert image.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(image), np.repeat(np.arange(256), 4).reshape(1, 256, 4))
    truncated = (array * 255).astype(np.uint8)
    assert not np.array_equal(np.asarray(image), truncated)


def test_to_pil_keeps_bytes_and_layout() -> None:
    array = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = viz.to_pil(array)
    assert (image.mode, image.size) == ("RGB", (5, 4))
    np.testing.assert_array_equal(np.asarray(image), array)
    channels_first = torch.from_numpy(array).permute(2, 0, 1).contiguous() / 255
    np.testing.assert_array_equal(np.asarray(viz.to_pil(channels_first.permute(1, 2, 0))), array)


def test_rounding_errors_of_colors_are_clipped() -> None:
    array = np.array([[[1.000001, -0.000001, 0.5]]])
    assert viz.to_pil(array).getpixel((0, 0)) == (255, 0, 128)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        viz.to_pil(array + 0.001)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 2), (1, 4, 5, 3), (3, 4, 5)])
def test_to_pil_refuses(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="`array`"):
        viz.to_pil(np.zeros(shape))


# ---------------------------------------------------------------------------------------------------- sheet


def example_rows(
    size: tuple[int, int], count: int = 2, caption: str = "frog\np = 0.93, logit 7.1"
) -> list[viz.SheetRow]:
    rows: list[viz.SheetRow] = []
    for seed in range(count):
        weights, x = example(6, *size, seed=seed)
        rows.append(viz.SheetRow(caption, (weights * x).sum(0) / 10**seed, weights))
    return rows


def find(page: Image.Image, piece: Numbers) -> list[tuple[int, int]]:
    """Left upper corners at which the piece stands in the page."""
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(page), piece.shape[:2], axis=(0, 1))
    candidates = np.argwhere((windows[..., 0, 0] == piece[0, 0]).all(-1))
    channels_first = np.moveaxis(piece, -1, 0)
    return [(int(x), int(y)) for y, x in candidates if np.array_equal(windows[y, x], channels_first)]


def enlarged(picture: viz._pictures.Array, factor: int) -> Numbers:
    return np.asarray(viz.to_pil(picture)).repeat(factor, 0).repeat(factor, 1)


def test_sheet_holds_the_pictures_at_even_distances() -> None:
    image = np.random.default_rng(0).random((16, 20, 3))
    rows = example_rows((16, 20))
    page = viz.sheet(image, rows, cell=64, smooth=3)
    limit = max(np.percentile(np.abs(np.asarray(row.contributions)), 99.5) for row in rows)
    [photograph] = find(page, enlarged(image, 3))
    places = []
    for row in rows:
        map_picture = viz.contribution_map(row.contributions, percentile=100, limit=limit)
        colors = viz.on_white(viz.color_picture(row.weights, row.contributions, smooth=3))
        places.append((*find(page, enlarged(map_picture, 3)), *find(page, enlarged(colors, 3))))
    (first_map, first_colors), (second_map, second_colors) = places
    gap, frame, width = 4, 1, 60
    step = width + 2 * frame + gap
    assert photograph == (gap + frame, first_map[1])
    assert first_map[0] == second_map[0] == photograph[0] + step
    assert first_colors == (first_map[0] + step, first_map[1])
    assert second_colors == (second_map[0] + step, second_map[1])
    assert page.size == (3 * step + gap, second_map[1] + 48 + frame + gap)


def test_sheet_maps_share_one_limit() -> None:
    image = np.zeros((16, 20, 3))
    strong, weak = example_rows((16, 20))
    own = enlarged(viz.contribution_map(weak.contributions), 3)
    assert len(find(viz.sheet(image, [weak], cell=64), own)) == 1
    assert find(viz.sheet(image, [strong, weak], cell=64), own) == []


def test_sheet_of_zeros_and_of_sparse_contributions() -> None:
    image = np.ones((16, 16, 3))
    nothing = viz.SheetRow("", torch.zeros(16, 16), torch.zeros(6, 16, 16))
    page = viz.sheet(image, [nothing], cell=64)
    assert set(np.unique(np.asarray(page))) == {200, 255}
    sparse = torch.zeros(16, 16)
    sparse[8, 8] = 1
    page = np.asarray(viz.sheet(image, [viz.SheetRow("", sparse, torch.zeros(6, 16, 16))], cell=64))
    assert (page == (255, 0, 0)).all(-1).sum() == 16


def test_sheet_takes_pil_images_and_lays_transparency_on_white() -> None:
    rows = example_rows((16, 20))
    bytes_ = np.random.default_rng(0).integers(0, 256, (16, 20, 4), dtype=np.uint8)
    on_white = np.asarray(viz.to_pil(viz.on_white(bytes_)))
    expected = np.asarray(viz.sheet(on_white, rows, cell=64))
    np.testing.assert_array_equal(np.asarray(viz.sheet(Image.fromarray(bytes_), rows, cell=64)), expected)
    np.testing.assert_array_equal(np.asarray(viz.sheet(Image.fromarray(on_white), rows, cell=64)), expected)
    assert not np.array_equal(np.asarray(viz.sheet(bytes_[..., :3], rows, cell=64)), expected)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((32, 32), (256, 256)),
        ((100, 80), (200, 160)),
        ((224, 224), (224, 224)),
        ((300, 150), (256, 128)),
        ((1, 600), (1, 256)),
    ],
)
def test_pictures_are_fitted_into_cells(size: tuple[int, int], shown: tuple[int, int]) -> None:
    framed = viz._sheets._framed(np.zeros((*size, 3)), 256)
    assert framed.size == (shown[1] + 2, shown[0] + 2)
    assert framed.getpixel((0, 0)) == (200, 200, 200)
    assert framed.getpixel((1, 1)) == (0, 0, 0)


@given(st.text(st.characters(codec="utf-8"), max_size=80), st.integers(20, 300), st.integers(12, 20))
@settings(max_examples=25, deadline=None)
def test_text_is_never_cut(text: str, width: int, size: int) -> None:
    font = ImageFont.load_default(size)
    shortened = "".join(viz._sheets._shorten(line, width, font) + "\n" for line in text.splitlines())
    block, roomy = viz._sheets._text(text, size, width), viz._sheets._text(shortened, size, 2 * width)
    assert block.size == (width, roomy.height)
    if block.height > 0:
        np.testing.assert_array_equal(np.asarray(roomy)[:, :width], np.asarray(block))
        assert np.asarray(roomy)[:, width:].min() == 255


def test_text_that_is_not_shortened_would_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viz._sheets, "_shorten", lambda line, _width, _font: line)
    assert np.asarray(viz._sheets._text("a long class name", 14, 200))[:, 50:].min() < 255


def test_text_is_shortened_no_more_than_needed() -> None:
    font = ImageFont.load_default(14)
    name = "black-and-tan coonhound " * 4
    full = viz._sheets._ink_width(name, font)
    assert viz._sheets._shorten(name, math.ceil(full), font) == name
    shortened = viz._sheets._shorten(name, 300, font)
    assert shortened.endswith("…")
    assert name.startswith(shortened[:-1])
    assert viz._sheets._ink_width(shortened, font) <= 300
    assert viz._sheets._ink_width(name[: len(shortened)] + "…", font) > 300
    assert viz._sheets._shorten("W" * 50, 1, font) == "…"


def test_sheet_grows_with_its_text() -> None:
    image, rows = np.zeros((8, 8, 3)), example_rows((8, 8), count=1, caption="frog")
    plain = viz.sheet(image, rows)
    titled = viz.sheet(image, rows, title="a title")
    two_lines = viz.sheet(image, example_rows((8, 8), count=1))
    assert plain.width == titled.width == two_lines.width
    assert plain.height < two_lines.height
    assert plain.height < titled.height
    assert viz.sheet(image, example_rows((8, 8), count=1, caption="frog " * 200)).size == plain.size


def test_sheet_of_channels_without_colors() -> None:
    weights, x = example(8, 8, 8)
    rows = [viz.SheetRow("class", (weights * x).sum(0), weights)]
    viz.sheet(np.zeros((8, 8, 3)), rows, rgb=(3, 1, 0))
    with pytest.raises(ValueError, match="choose channels with `rgb`"):
        viz.sheet(np.zeros((8, 8, 3)), rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": []}, "`rows` must hold"),
        ({"image": np.zeros((8, 9, 3))}, r"`rows\[0\].contributions` .*\(8, 8\)\) must be \(8, 9\)"),
        ({"image": np.zeros((1, 8, 8, 3))}, "`image` .* not a batch"),
        ({"image": np.zeros((8, 8))}, "`image`"),
        ({"cell": 63}, r"`cell` \(=63\)"),
        ({"smooth": 2}, r"`smooth` \(=2\)"),
    ],
)
def test_sheet_refuses(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"image": np.zeros((8, 8, 3)), "rows": example_rows((8, 8))}
    viz.sheet(**good)
    with pytest.raises(ValueError, match=message):
        viz.sheet(**{**good, **arguments})


# ------------------------------------------------------------------------------------------------- manners


def imported_packages(source: str) -> set[str]:
    packages: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            packages.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            packages.add(node.module.split(".")[0])
    return packages


def test_matplotlib_is_never_imported() -> None:
    spec = importlib.util.find_spec("bcoskit.viz")
    assert spec is not None
    assert spec.origin is not None
    assert "matplotlib" not in imported_packages(Path(spec.origin).read_text(encoding="utf-8"))
    assert "matplotlib" in imported_packages("def f():\n    import matplotlib.pyplot")
