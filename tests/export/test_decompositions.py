"""Backward operations by forward ones are those of torch."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from bcoskit.export._decompositions import decompositions

TABLE = decompositions()
aten = torch.ops.aten

CONVOLUTIONS = [
    # dims, size, kernel, stride, padding, dilation, groups
    *(
        (2, size, kernel, stride, padding, 1, 1)
        for size, kernel, stride, padding in product((9, 10), (1, 2, 3, 7), (1, 2, 3), (0, 1))
    ),
    (2, 12, 4, 4, 0, 1, 1),
    (2, 9, 3, 1, 2, 2, 2),
    (2, 9, 3, 1, 4, 1, 1),
    (2, 9, 3, 2, 1, 1, 4),
    (2, 9, 1, 2, 0, 1, 2),
    (2, 11, 3, 2, 2, 2, 1),
    (1, 9, 3, 2, 1, 1, 1),
    (3, 6, 3, 2, 1, 1, 2),
]


CASES = [(case, False) for case in CONVOLUTIONS]
CASES += [(case, True) for case in CONVOLUTIONS if case[4] <= case[5] * (case[2] - 1)]  # others have no output


@pytest.mark.parametrize(("case", "transposed"), CASES, ids=str)
def test_convolution(case, transposed):
    dims, size, kernel, stride, padding, dilation, groups = case
    torch.manual_seed(0)
    inputs, outputs = 4, 8
    shape = (inputs, outputs // groups) if transposed else (outputs, inputs // groups)
    weight = torch.randn(*shape, *[kernel] * dims, dtype=torch.float64)
    x = torch.randn(2, inputs, *[size] * dims, dtype=torch.float64)
    options = [[value] * dims for value in (stride, padding, dilation)]
    rest = [transposed, [0] * dims, groups]
    y = torch.convolution(x, weight, None, *options, *rest)
    gradient = torch.randn_like(y)
    expected = aten.convolution_backward(gradient, x, weight, None, *options, *rest, [True, False, False])[0]
    found = TABLE[aten.convolution_backward.default](gradient, x, weight, None, *options, *rest, [True, False, False])
    assert found[1:] == (None, None)
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "divisor"),
    [([2], [], [0], None), ([3, 2], [2, 1], [1, 0], None), ([3], [2], [1], 5), ([3], [3], [0], None)],
)
def test_average_pool(kernel, stride, padding, divisor, ceil_mode, count_include_pad):
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    arguments = (kernel, stride, padding, ceil_mode, count_include_pad, divisor)
    gradient = torch.randn_like(aten.avg_pool2d(x, *arguments))
    expected = aten.avg_pool2d_backward(gradient, x, *arguments)
    torch.testing.assert_close(TABLE[aten.avg_pool2d_backward.default](gradient, x, *arguments), expected)


def test_max_pool():
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    arguments = ([3], [2], [1], [1], False)
    y, indices = aten.max_pool2d_with_indices(x, *arguments)
    gradient = torch.randn_like(y)
    expected = aten.max_pool2d_with_indices_backward(gradient, x, *arguments, indices)
    found = TABLE[aten.max_pool2d_with_indices_backward.default](gradient, x, *arguments, indices)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [1, -1])
def test_selection(dim, keepdim):
    x = torch.randint(3, (2, 5, 4)).double().requires_grad_()  # with ties
    values, indices = x.max(dim, keepdim=keepdim)
    gradient = torch.randn_like(values)
    (expected,) = torch.autograd.grad(values, x, gradient)
    found = TABLE[aten.value_selecting_reduction_backward.default](gradient, dim, indices, list(x.shape), keepdim)
    torch.testing.assert_close(found, expected)


def test_vector_norm():
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    norm = TABLE[aten.linalg_vector_norm.default]
    torch.testing.assert_close(norm(x, 2, [-1], True), torch.linalg.vector_norm(x, dim=-1, keepdim=True))
    torch.testing.assert_close(norm(x), torch.linalg.vector_norm(x))
    torch.testing.assert_close(F.normalize(x, dim=1), x / norm(x, 2, [1], True))
