"""The pure functions against the papers' formulas written once more (`reference`)."""

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from bcoskit import functional as F
from bcoskit.dynamic import explanation_mode
from reference import assert_exact, combination, combined_gradient, gradient_rows, values

grid = settings(deadline=None, derandomize=True, database=None, max_examples=120)
exponents = st.sampled_from([1, 1.25, 1.5, 2, 2.5])
units = st.integers(1, 3)
scales = st.sampled_from([1.0, 0.0563, 1.7])


@st.composite
def geometries(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """The spatial sizes of an input, those of a kernel, and how it is moved over the input."""
    dims = draw(st.integers(1, 3))

    def sizes(low: int, high: int) -> st.SearchStrategy[int | tuple[int, ...]]:
        return st.integers(low, high) | st.tuples(*[st.integers(low, high)] * dims)

    kernel = draw(st.tuples(*[st.integers(1, 2 if dims == 3 else 3)] * dims))
    padding_mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(sizes(0, 2) | st.sampled_from(["same", "valid"]))
    dilation = draw(sizes(1, 2))
    stride = 1 if padding == "same" else draw(sizes(1, 3))
    spread = 2 * (max(kernel) - 1) + 1
    spatial = draw(st.tuples(*[st.integers(max(3, spread), max(4, spread))] * dims))
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": padding_mode}
    return spatial, kernel, geometry


@grid
@given(geometry=geometries(), groups=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_patch_norm(geometry: tuple[Any, ...], groups: int, seed: int) -> None:
    spatial, kernel, moves = geometry
    x = values(2, 4, *spatial, seed=seed)
    actual = F.patch_norm(x, kernel, groups=groups, **moves)
    assert_exact(actual, reference.patch_norm(x, kernel, groups=groups, **moves))


@grid
@given(
    geometry=geometries(),
    groups=st.sampled_from([1, 2, 4]),
    b=exponents,
    max_out=units,
    normalize_weight=st.booleans(),
    scale=scales,
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_bcos_conv(
    geometry: tuple[Any, ...],
    groups: int,
    b: float,
    max_out: int,
    normalize_weight: bool,
    scale: float,
    with_bias: bool,
    seed: int,
) -> None:
    spatial, kernel, moves = geometry
    x = values(2, 4, *spatial, seed=seed)
    weight = values(4 * max_out, 4 // groups, *kernel, seed=seed + 100)
    bias = values(4, seed=seed + 200) if with_bias else None
    transform: dict[str, Any] = {
        "b": b,
        "max_out": max_out,
        "normalize_weight": normalize_weight,
        "scale": scale,
    }

    def conv(x: Tensor) -> Tensor:
        return F.bcos_conv(x, weight, bias, groups=groups, **transform, **moves)

    expected = reference.conv(x, weight, bias, groups=groups, **transform, **moves)
    assert_exact(conv(x), expected.output)
    with explanation_mode():
        assert_exact(conv(x), expected.output)
        weights = combined_gradient(conv, x)
    coefficients = combination(expected.output)
    assert_exact(weights, coefficients @ expected.weights)
    assert_exact(weights @ x.flatten(), coefficients @ (expected.output - expected.constant).flatten())


@grid
@given(
    b=exponents,
    max_out=units,
    normalize_weight=st.booleans(),
    scale=scales,
    with_bias=st.booleans(),
    leading=st.sampled_from([(), (3,), (2, 3)]),
)
def test_bcos_linear(
    b: float, max_out: int, normalize_weight: bool, scale: float, with_bias: bool, leading: tuple[int, ...]
) -> None:
    x, weight = values(*leading, 5), values(4 * max_out, 5, seed=1)
    bias = values(4, seed=2) if with_bias else None
    transform: dict[str, Any] = {
        "b": b,
        "max_out": max_out,
        "normalize_weight": normalize_weight,
        "scale": scale,
    }

    def linear(x: Tensor) -> Tensor:
        return F.bcos_linear(x, weight, bias, **transform)

    expected = reference.linear(x, weight, bias, **transform)
    assert_exact(linear(x), expected.output)
    with explanation_mode():
        assert_exact(linear(x), expected.output)
        weights = gradient_rows(linear, x)
    assert_exact(weights, expected.weights)
    assert_exact((weights @ x.flatten()).reshape(expected.output.shape) + expected.constant, expected.output)


@pytest.mark.parametrize("b", [1.25, 1.5, 2, 2.5])
def test_the_ordinary_gradient_is_not_w(b: float) -> None:
    x, weight = values(2, 4, 5, 5), values(6, 4, 3, 3, seed=1)
    expected = reference.conv(x, weight, b=b)
    with pytest.raises(AssertionError):
        assert_exact(gradient_rows(lambda x: F.bcos_conv(x, weight, b=b), x), expected.weights)
    vectors, rows = values(3, 5), values(4, 5, seed=1)
    expected = reference.linear(vectors, rows, b=b)
    with pytest.raises(AssertionError):
        assert_exact(gradient_rows(lambda x: F.bcos_linear(x, rows, b=b), vectors), expected.weights)


def test_numbers_by_hand() -> None:
    x, weight = torch.tensor([3.0, 4.0]), torch.tensor([[2.0, 0.0], [0.0, -0.5], [0.0, 0.0]])
    assert F.bcos_linear(x, weight, b=1).tolist() == [3.0, -4.0, 0.0]
    torch.testing.assert_close(F.bcos_linear(x, weight), torch.tensor([9 / 5, -16 / 5, 0.0]))
    torch.testing.assert_close(F.bcos_linear(x, weight, b=3), torch.tensor([27 / 25, -64 / 25, 0.0]))
    torch.testing.assert_close(F.bcos_linear(x, weight, scale=0.5), torch.tensor([18 / 5, -32 / 5, 0.0]))
    raw = F.bcos_linear(x, weight, torch.tensor([1.0, 2.0, 3.0]), normalize_weight=False)
    torch.testing.assert_close(raw, torch.tensor([36 / 5 + 1, -4 / 5 + 2, 3.0]))
    # Norms 5 and sqrt(17) of the two patches, each with the unit filter (0.6, 0.8).
    sequence, filters = torch.tensor([[[3.0, 4.0, 1.0]]]), torch.tensor([[[3.0, 4.0]]])
    outputs = F.bcos_conv(sequence, filters)
    torch.testing.assert_close(outputs, torch.tensor([[[5.0, 3.2**2 / 17**0.5]]]))


@pytest.mark.parametrize("b", [1.5, 2])
@pytest.mark.parametrize("size", [1e-3, 1e-9, 1e-12, 1e-15])
def test_the_epsilons_decide_for_small_inputs(b: float, size: float) -> None:
    """1e-6 inside the root of a patch norm, 1e-12 beside that of a vector, 1e-6 beside |cos| unless b = 2."""
    x, weight = size * values(2, 5), values(4, 5, seed=1)
    weight[3] = weight[3] - (weight[3] @ x[0]) / (x[0] @ x[0]) * x[0]  # orthogonal: |cos| = 0
    for actual, expected in (
        (F.bcos_linear(x, weight, b=b), reference.linear(x, weight, b=b)),
        (
            F.bcos_conv(x[..., None], weight[..., None], b=b),
            reference.conv(x[..., None], weight[..., None], b=b),
        ),
    ):
        torch.testing.assert_close(actual, expected.output, rtol=1e-10, atol=1e-14 * size)


def test_patch_norm_by_hand() -> None:
    x = torch.tensor([[[3.0, 4.0, 0.0], [0.0, 0.0, 12.0]]])
    torch.testing.assert_close(F.patch_norm(x, 2, eps=0.0), torch.tensor([[[5.0, 160**0.5]]]))
    torch.testing.assert_close(F.patch_norm(x, 2, groups=2, eps=0.0), torch.tensor([[[5.0, 4.0], [0.0, 12.0]]]))
    torch.testing.assert_close(F.patch_norm(torch.zeros(1, 1, 2), 1), torch.full((1, 1, 2), 1e-3))
    edge = F.patch_norm(x, 2, padding=1, stride=3, eps=0.0, padding_mode="replicate")
    torch.testing.assert_close(edge, torch.tensor([[[18**0.5, 288**0.5]]]))


def test_each_group_has_its_own_norm() -> None:
    """Scaling the channels of one group leaves the cosines of the other alone."""
    x, weight = values(1, 4, 3), values(4, 2, 2, seed=1)
    scaled = torch.cat([x[:, :2], 100 * x[:, 2:]], dim=1)
    plain, grouped = F.bcos_conv(x, weight, groups=2), F.bcos_conv(scaled, weight, groups=2)
    assert_exact(grouped[:, :2], plain[:, :2])
    full = values(4, 4, 2, seed=1) * torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64).reshape(1, 4, 1)
    with pytest.raises(AssertionError):
        assert_exact(F.bcos_conv(scaled, full)[:, :2], F.bcos_conv(x, full)[:, :2])


@pytest.mark.parametrize(("kernel", "dilation"), [(2, 1), (2, 3), (4, 1), (4, 2), (3, 2), ((2, 3), (3, 1))])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_same_padding_keeps_the_size(
    kernel: int | tuple[int, int],
    dilation: int | tuple[int, int],
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"],
) -> None:
    sizes = (kernel, kernel) if isinstance(kernel, int) else kernel
    x, weight = values(1, 2, 7, 8), values(3, 2, *sizes, seed=1)
    actual = F.bcos_conv(x, weight, padding="same", dilation=dilation, padding_mode=padding_mode)
    assert actual.shape == (1, 3, 7, 8)
    expected = reference.conv(x, weight, padding="same", dilation=dilation, padding_mode=padding_mode)
    assert_exact(actual, expected.output)


def test_b_may_be_a_tensor() -> None:
    weight, exponent = values(4, 4, 3, 3, seed=1), torch.tensor([1.0, 1.7, 2.0, 2.5], dtype=torch.float64)
    x = values(2, 4, 5, 5)
    for groups in (1, 2, 4):
        filters = weight[:, : 4 // groups]
        actual = F.bcos_conv(x, filters, b=exponent, groups=groups)
        expected = [
            reference.conv(x, filters, b=b, groups=groups).output[:, o] for o, b in enumerate(exponent.tolist())
        ]
        # At 2 a tensor keeps the second epsilon that a number drops.
        assert_exact(actual[:, [0, 1, 3]], torch.stack([expected[o] for o in (0, 1, 3)], dim=1))
        torch.testing.assert_close(actual[:, 2], expected[2], rtol=0, atol=1e-5)
    vectors, rows = values(3, 5), values(4, 5, seed=1)
    actual = F.bcos_linear(vectors, rows, b=exponent)
    for o in (0, 1, 3):
        assert_exact(actual[:, o], reference.linear(vectors, rows, b=float(exponent[o])).output[:, o])


@pytest.mark.parametrize("b", [1, 1.5, 2, 2.5])
@pytest.mark.parametrize("max_out", [1, 2])
def test_a_zero_filter_gives_zero_and_learns_nothing(b: float, max_out: int) -> None:
    filters = values(3 * max_out, 4, 3, 3, seed=1)
    filters[max_out : 2 * max_out] = 0
    filters.requires_grad_()
    x = values(2, 4, 5, 5).requires_grad_()
    output = F.bcos_conv(x, filters, b=b, max_out=max_out)
    assert torch.count_nonzero(output[:, 1]) == 0
    assert torch.count_nonzero(output[:, 0]) == output[:, 0].numel()
    input_gradient, gradient = torch.autograd.grad(output.sum(), (x, filters))
    assert torch.count_nonzero(gradient[max_out : 2 * max_out]) == 0
    assert torch.count_nonzero(gradient[:max_out]) > 0
    assert input_gradient.isfinite().all()
    rows = filters.detach().flatten(1).requires_grad_()
    vectors = values(2, 36).requires_grad_()
    output = F.bcos_linear(vectors, rows, b=b, max_out=max_out)
    assert torch.count_nonzero(output[:, 1]) == 0
    input_gradient, gradient = torch.autograd.grad(output.sum(), (vectors, rows))
    assert torch.count_nonzero(gradient[max_out : 2 * max_out]) == 0
    assert gradient.isfinite().all()
    assert input_gradient.isfinite().all()


@pytest.mark.parametrize("b", [1, 1.5, 2, 2.5])
def test_a_zero_input_gives_zero_with_finite_gradients(b: float) -> None:
    x, weight = torch.zeros(2, 4, 5, 5, requires_grad=True), values(6, 4, 3, 3).float().requires_grad_()
    output = F.bcos_conv(x, weight, b=b)
    assert torch.count_nonzero(output) == 0
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.sum(), (x, weight)))
    vectors, rows = torch.zeros(2, 5, requires_grad=True), values(3, 5).float().requires_grad_()
    output = F.bcos_linear(vectors, rows, b=b)
    assert torch.count_nonzero(output) == 0
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.sum(), (vectors, rows)))


# Half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("b", [1, 1.5, 2])
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_half_precision_agrees_with_float64(dtype: torch.dtype, b: float, size: float) -> None:
    """Also where squares overflow half precision (300² > 65504) and where they vanish in it (1e-8)."""
    x, weight = (size * values(2, 4, 6, 6)).to(dtype), values(6, 4, 3, 3, seed=1).to(dtype)
    output = F.bcos_conv(x, weight, b=b, padding=1, max_out=2)
    assert output.dtype == dtype
    expected = reference.conv(x.double(), weight.double(), b=b, padding=1, max_out=2).output
    tolerance = 0.02 * expected.abs().max().item()
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=tolerance)
    vectors, rows = (size * values(3, 40)).to(dtype), values(4, 40, seed=1).to(dtype)
    output = F.bcos_linear(vectors, rows, b=b)
    assert output.dtype == dtype
    expected = reference.linear(vectors.double(), rows.double(), b=b).output
    tolerance = 0.02 * expected.abs().max().item()
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("b", [1, 1.5, 2])
def test_half_precision_is_finite_at_zero(dtype: torch.dtype, b: float) -> None:
    x, weight = torch.zeros(1, 4, 5, 5, dtype=dtype, requires_grad=True), values(6, 4, 3, 3).to(dtype)
    weight[0] = 0
    weight.requires_grad_()
    output = F.bcos_conv(x, weight, b=b)
    assert torch.count_nonzero(output) == 0
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.sum(), (x, weight)))
    vectors, rows = torch.zeros(2, 5, dtype=dtype, requires_grad=True), values(3, 5).to(dtype)
    rows[0] = 0
    rows.requires_grad_()
    output = F.bcos_linear(vectors, rows, b=b)
    assert torch.count_nonzero(output) == 0
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.sum(), (vectors, rows)))


# The parts


def test_unit_norm() -> None:
    weight = values(4, 3, 2)
    weight[2] = 0
    weight.requires_grad_()
    unit = F.unit_norm(weight)
    assert_exact(unit.detach(), reference.unit_rows(weight.detach()))
    assert_exact(unit.detach().flatten(1).norm(dim=1), torch.tensor([1, 1, 0, 1], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(unit.sum(), weight)
    assert torch.count_nonzero(gradient[2]) == 0
    assert torch.count_nonzero(gradient[1]) > 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 1e-3, 4e-6, 1e-20, 1e-40])
@pytest.mark.parametrize("shape", [(3, 1), (3, 8)])
def test_unit_norm_of_dying_rows(dtype: torch.dtype, size: float, shape: tuple[int, int]) -> None:
    """Weight decay shrinks a row without limit: it has norm 1 or, where it has vanished, 0, never inf."""
    weight = (size * values(*shape).sign()).to(dtype).requires_grad_()
    unit = F.unit_norm(weight)
    norms = unit.detach().double().norm(dim=1)
    assert ((norms - 1).abs() < 0.02).all() or (norms == 0).all()
    (gradient,) = torch.autograd.grad(unit.sum(), weight)
    assert not gradient.isnan().any()
    if size >= 1e-3:
        assert gradient.isfinite().all()


def test_max_out() -> None:
    y = torch.tensor([[1.0, 5.0, -3.0, -2.0, 0.0, 0.0]])
    assert F.max_out(y, 2, 1).tolist() == [[5.0, -2.0, 0.0]]
    assert F.max_out(y, 3, -1).tolist() == [[5.0, 0.0]]
    assert F.max_out(y.T.reshape(6, 1), 2, 0).tolist() == [[5.0], [-2.0], [0.0]]
    assert F.max_out(y, 1, 1) is y


def test_max_out_chooses_one_of_equals() -> None:
    y = torch.zeros(1, 4, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(F.max_out(y, 2, 1).sum(), y)
    assert gradient.unflatten(1, (2, 2)).sum(2).eq(1).all()
    assert set(gradient.flatten().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(
    ("dims", "kind"),
    [
        ((0, 1, 2, 3), "all"),
        ((0, 2, 3), "batch"),
        ((1, 2, 3), "layer"),
        ((2, 3), "instance"),
        ((1,), "position"),
    ],
)
def test_normalize(center: bool, dims: tuple[int, ...], kind: reference.NormKind) -> None:
    x, weight, bias = 2 + values(2, 4, 3, 2), values(4, seed=1), values(4, seed=2)

    def normalize(x: Tensor) -> Tensor:
        shape = (1, 4, 1, 1)
        return F.normalize(x, dims, center=center, weight=weight.reshape(shape), bias=bias.reshape(shape), eps=0.1)

    expected = reference.norm(x, kind, centered=center, weight=weight, bias=bias, eps=0.1)
    assert_exact(normalize(x), expected.output)
    with explanation_mode():
        assert_exact(normalize(x), expected.output)
        weights = gradient_rows(normalize, x)
    assert_exact(weights, expected.weights)
    with pytest.raises(AssertionError):
        assert_exact(gradient_rows(normalize, x), expected.weights)


def test_normalize_by_given_statistics() -> None:
    x = torch.tensor([[1.0, 3.0]])
    mean, var = torch.tensor([[1.0, 1.0]]), torch.tensor([[4.0, 16.0]])
    centered = F.normalize(x, (0,), center=True, eps=0.0, mean=mean, var=var)
    assert centered.tolist() == [[0.0, 0.5]]
    assert F.normalize(x, (0,), center=False, eps=0.0, mean=mean, var=var).tolist() == [[0.5, 0.75]]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("mask", [None, "float", "bool"])
def test_attention(scale: float | None, mask: str | None) -> None:
    q, k, v = values(2, 2, 3, 4), values(2, 2, 5, 4, seed=1), values(2, 2, 5, 3, seed=2)
    allowed = values(3, 5, seed=3) > -0.5
    added = torch.zeros(3, 5, dtype=torch.float64).masked_fill(~allowed, -math.inf)
    masks = {None: (None, None), "float": (values(3, 5, seed=4),) * 2, "bool": (allowed, added)}
    given_mask, reference_mask = masks[mask]
    expected = reference.attention(q, k, v, mask=reference_mask, scale=scale)
    assert_exact(F.attention(q, k, v, mask=given_mask, scale=scale), expected.output)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    with explanation_mode():
        output = F.attention(*leaves, mask=given_mask, scale=scale)
        weights = gradient_rows(lambda v: F.attention(leaves[0], leaves[1], v, mask=given_mask, scale=scale), v)
    assert_exact(output.detach(), expected.output)
    assert_exact(weights, expected.weights)
    frozen = torch.autograd.grad(output.sum(), leaves, allow_unused=True)
    assert all(gradient is None or torch.count_nonzero(gradient) == 0 for gradient in frozen[:2])
    ordinary = torch.autograd.grad(F.attention(*leaves, mask=given_mask, scale=scale).sum(), leaves)
    assert all(torch.count_nonzero(gradient) > 0 for gradient in ordinary)


@pytest.mark.parametrize("boolean", [False, True])
def test_a_query_that_may_attend_to_nothing(boolean: bool) -> None:
    """Forward values are the same in both modes, here too: zeros, as of torch's kernel."""
    q, k, v = values(1, 1, 2, 3), values(1, 1, 4, 3, seed=1), values(1, 1, 4, 3, seed=2)
    allowed = torch.tensor([[True, True, False, False], [False] * 4])
    mask = allowed if boolean else torch.zeros(2, 4, dtype=torch.float64).masked_fill(~allowed, -math.inf)
    expected = F.attention(q, k, v, mask=mask)
    assert torch.count_nonzero(expected[..., 1, :]) == 0
    with explanation_mode():
        assert_exact(F.attention(q, k, v.requires_grad_(), mask=mask).detach(), expected)


def test_every_gate_has_a_reference() -> None:
    assert set(F.GATES) == set(reference.ACTIVATIONS)


@pytest.mark.parametrize("name", sorted(reference.ACTIVATIONS))
def test_gate(name: str) -> None:
    x = torch.tensor([-0.9, -0.2, -1e-9, 1e-9, 0.3, 1.1, 2.9, 7.0], dtype=torch.float64)
    if name != "log1p":
        x = torch.cat([x, torch.tensor([-6.0, -3.1, -1.5], dtype=torch.float64)])
    expected = reference.gate(x, name)
    assert_exact(F.gate(x, name), expected.output)
    with explanation_mode():
        assert_exact(F.gate(x, name), expected.output)
        weights = gradient_rows(lambda x: F.gate(x, name), x)
    assert_exact(weights, expected.weights)
    if name != "relu":  # piecewise linear: its gradient is W
        with pytest.raises(AssertionError):
            assert_exact(gradient_rows(lambda x: F.gate(x, name), x), expected.weights)


@pytest.mark.parametrize("name", sorted(reference.ACTIVATIONS))
def test_gate_at_zero(name: str) -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    assert F.gate(zero, name).item() == 0
    with explanation_mode():
        slope = gradient_rows(lambda x: F.gate(x, name), zero).item()
    f, h = reference.ACTIVATIONS[name], 1e-6
    expected = 0.0 if name == "relu" else (f(h) - f(-h)) / (2 * h)
    assert slope == pytest.approx(expected, abs=1e-5)


# Gradients


@pytest.mark.parametrize("b", [1, 1.5, 2, 2.5])
@pytest.mark.parametrize("normalize_weight", [True, False])
def test_gradients_of_all_arguments(b: float, normalize_weight: bool) -> None:
    exponent = torch.tensor(b, dtype=torch.float64, requires_grad=True) if b in (1.5, 2.5) else b
    x, weight, bias = values(2, 4, 4), values(4, 2, 2, seed=1), values(2, seed=2)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    transform: dict[str, Any] = {"max_out": 2, "normalize_weight": normalize_weight, "scale": 1.3}

    def conv(x: Tensor, weight: Tensor, bias: Tensor, b: float | Tensor) -> Tensor:
        return F.bcos_conv(x, weight, bias, b=b, groups=2, stride=2, padding=1, **transform)

    def linear(x: Tensor, weight: Tensor, bias: Tensor, b: float | Tensor) -> Tensor:
        return F.bcos_linear(x, weight.flatten(1), bias, b=b, **transform)

    arguments: Any = (*inputs, exponent)
    assert torch.autograd.gradcheck(conv, arguments)
    assert torch.autograd.gradcheck(linear, arguments)


# Errors


@pytest.mark.parametrize(
    ("x", "weight", "options", "message"),
    [
        ((1, 4, 5, 5), (4, 4), {}, "`weight` has 2 axes"),
        ((1, 1, 4, 5, 5), (4, 4, 3, 3), {}, "`x`"),
        ((5, 5), (4, 4, 3, 3), {}, "`x`"),
        ((1, 1, 4, 5, 5), (4, 4, 3, 3), {"padding": "same"}, "`x`"),
        ((1, 3, 5, 5), (4, 4, 3, 3), {}, "channels"),
        ((1, 4, 5, 5), (4, 2, 3, 3), {"groups": 3}, "groups=3"),
        ((1, 4, 5, 5), (5, 4, 3, 3), {"max_out": 2}, "`max_out`"),
        ((1, 4, 5, 5), (4, 4, 3, 3), {"stride": (1, 2, 3), "padding": "same"}, "`stride`"),
        ((1, 4, 5, 5), (4, 4, 3, 3), {"padding": (1, 1, 1)}, "`padding`"),
        ((1, 4, 5, 5), (4, 4, 3, 3), {"padding": -1, "padding_mode": "circular"}, r"`padding` \(=-1\)"),
        ((1, 4, 5, 5), (4, 4, 3, 3), {"padding": "full"}, r"`padding` \(='full'\)"),
        ((1, 4, 5, 5), (4, 4, 3, 3), {"padding": "same", "stride": 2}, "`stride` 1"),
        ((1, 4, 5, 5), (4, 4, 3, 3), {"padding_mode": "mirror"}, r"`padding_mode` \(='mirror'\)"),
    ],
)
def test_a_convolution_that_does_not_fit(
    x: tuple[int, ...], weight: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        F.bcos_conv(torch.zeros(x), torch.zeros(weight), **options)


def test_vectors_that_do_not_fit() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        F.bcos_linear(torch.zeros(2, 5), torch.zeros(4, 4))
    with pytest.raises((ValueError, RuntimeError), match="`max_out`"):
        F.bcos_linear(torch.zeros(2, 5), torch.zeros(5, 5), max_out=2)


@pytest.mark.parametrize(
    ("kernel", "options", "message"),
    [
        ((3, 3, 3), {}, "`kernel_size`"),
        (0, {}, r"`kernel_size` \(=\(0, 0\)\)"),
        (3, {"stride": 0}, r"`stride` \(=\(0, 0\)\)"),
        (3, {"dilation": -1}, r"`dilation` \(=\(-1, -1\)\)"),
        (3, {"padding": -1}, r"`padding` \(=-1\)"),
        (3, {"groups": 3}, "`groups`"),
        (3, {"padding": "full"}, r"`padding` \(='full'\)"),
        (3, {"padding_mode": "mirror"}, r"`padding_mode` \(='mirror'\)"),
    ],
)
def test_a_patch_norm_that_does_not_fit(kernel: int | tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        F.patch_norm(torch.zeros(1, 4, 5, 5), kernel, **options)


@pytest.mark.parametrize("options", [{"b": 0.5}, {"b": math.nan}, {"max_out": 0}, {"scale": 0.0}])
def test_arguments_out_of_range(options: dict[str, Any]) -> None:
    """What would be silently wrong raises: `|cos|^-0.5`, an empty maximum, a division by 0."""
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}`"):
        F.bcos_linear(torch.ones(2, 5), torch.ones(4, 5), **options)
    with pytest.raises(ValueError, match=f"`{name}`"):
        F.bcos_conv(torch.ones(1, 4, 5, 5), torch.ones(4, 4, 3, 3), **options)


@pytest.mark.parametrize(
    ("units", "dim", "message"),
    [(0, 1, r"`units` \(=0\)"), (-1, 1, r"`units` \(=-1\)"), (2, 3, r"`dim` \(=3\)"), (2, -3, r"`dim` \(=-3\)")],
)
def test_a_max_out_that_does_not_fit(units: int, dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        F.max_out(torch.zeros(1, 4), units, dim)


def test_gates_of_integers() -> None:
    with pytest.raises(TypeError, match=r"int64, must be of floating dtype"):
        F.gate(torch.ones(1, dtype=torch.int64), "silu")


def test_unknown_gate() -> None:
    with pytest.raises(ValueError, match=r"`name` \(='swish'\)"):
        F.gate(torch.zeros(1), "swish")


def test_patch_norms_of_half_precision_do_not_overflow() -> None:
    x = torch.full((1, 64, 4, 4), 300.0)
    found = F.patch_norm(x.half(), 3)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), F.patch_norm(x, 3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("b", [1.0, 2.0])
def test_groups_must_divide_outputs(b: float) -> None:
    with pytest.raises(ValueError, match=r"`groups` \(=2\) must divide the 3 outputs"):
        F.bcos_conv(torch.rand(1, 4, 5, 5), torch.rand(6, 2, 3, 3), b=b, max_out=2, groups=2)


@pytest.mark.parametrize(
    ("transform", "x", "weight"),
    [
        (F.bcos_linear, torch.ones(2, 3), torch.ones(4, 3)),
        (F.bcos_conv, torch.ones(2, 3, 5), torch.ones(4, 3, 1)),
        (F.bcos_conv_transpose, torch.ones(2, 3, 5), torch.ones(3, 4, 1)),
    ],
)
def test_what_would_give_the_output_another_shape(transform: Any, x: Tensor, weight: Tensor) -> None:
    shape = transform(x, weight).shape
    for fits in (torch.tensor(1.5), torch.full((1,), 1.5), torch.full((4,), 1.5)):
        assert transform(x, weight, torch.ones(4), b=fits).shape == shape
    with pytest.raises(ValueError, match=r"`b` of shape \(2, 1, 1, 4\) does not fit an output of \("):
        transform(x, weight, b=torch.full((2, 1, 1, 4), 1.5))
    with pytest.raises(ValueError, match=r"`b` of shape \(3,\) does not fit an output of \("):
        transform(x, weight, b=torch.full((3,), 1.5))
    with pytest.raises(ValueError, match=r"`bias` of shape \(8,\) does not fit an output of \(4,\)"):
        transform(x, weight, torch.ones(8))
    with pytest.raises(ValueError, match=r"`bias` of shape \(2, 4\) does not fit an output of \(4,\)"):
        transform(x, weight, torch.ones(2, 4))
