"""The B-cos linear layer: what it computes, and that it is a `torch.nn.Linear` in every other respect."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from bcoskit.dynamic import explanation_mode
from bcoskit.nn import BcosLinear
from reference import assert_exact, gradient_rows, values


def layer_of(weight: Tensor, **arguments: Any) -> BcosLinear:
    """A layer with the given rows."""
    outputs = weight.shape[0] // arguments.get("max_out", 1)
    layer = BcosLinear(weight.shape[1], outputs, dtype=weight.dtype, **arguments)
    layer.load_state_dict({"weight": weight}, strict=False)
    return layer


@pytest.mark.parametrize("b", [1, 1.25, 1.5, 2, 2.5])
@pytest.mark.parametrize("max_out", [1, 2])
def test_output_and_weights(b: float, max_out: int) -> None:
    x, weight = values(3, 5), values(4 * max_out, 5, seed=1)
    layer = layer_of(weight, b=b, max_out=max_out, scale=1.7)
    expected = reference.linear(x, weight, b=b, max_out=max_out, scale=1.7)
    assert_exact(layer(x).detach(), expected.output)
    with explanation_mode():
        assert_exact(layer(x).detach(), expected.output)
        weights = gradient_rows(layer, x)
    assert_exact(weights, expected.weights)
    assert_exact((weights @ x.flatten()).reshape(3, 4), expected.output)
    if b != 1:
        with pytest.raises(AssertionError):
            assert_exact(gradient_rows(layer, x), expected.weights)


def test_b_of_1_is_the_linear_layer() -> None:
    x, weight, bias = values(3, 5), values(4, 5, seed=1), values(4, seed=2)
    plain = nn.Linear(5, 4, dtype=torch.float64)
    plain.load_state_dict({"weight": weight, "bias": bias})
    layer = layer_of(weight, b=1, bias=True, normalize_weight=False)
    layer.load_state_dict({"weight": weight, "bias": bias})
    assert_exact(layer(x), plain(x))
    unit = layer_of(weight, b=1)
    assert_exact(unit(x).detach(), x @ (weight / weight.norm(dim=1, keepdim=True)).T)
    with pytest.raises(AssertionError):
        assert_exact(unit(x), plain(x))


def test_bias_is_added_at_the_end() -> None:
    x, weight, bias = values(3, 5), values(8, 5, seed=1), values(4, seed=2)
    layer = layer_of(weight, bias=True, max_out=2, scale=0.3)
    layer.load_state_dict({"weight": weight, "bias": bias})
    assert_exact(layer(x).detach(), reference.linear(x, weight, max_out=2, scale=0.3).output + bias)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
def test_any_leading_axes(leading: tuple[int, ...]) -> None:
    x, layer = values(*leading, 5), layer_of(values(4, 5, seed=1))
    assert layer(x).shape == (*leading, 4)
    assert_exact(layer(x).reshape(-1, 4), layer(x.reshape(-1, 5)))


def test_empty_batch() -> None:
    layer = layer_of(values(4, 5), max_out=2, b=1.5)
    x = torch.empty(0, 5, dtype=torch.float64, requires_grad=True)
    output = layer(x)
    assert output.shape == (0, 2)
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("b", [1, 1.5, 2])
def test_half_precision(dtype: torch.dtype, b: float) -> None:
    layer = BcosLinear(40, 4, b=b, dtype=dtype)
    x = torch.stack([values(40), torch.zeros(40, dtype=torch.float64)]).to(dtype)
    output = layer(x)
    assert output.dtype == dtype
    expected = reference.linear(x.double(), layer.weight.detach().double(), b=b).output
    torch.testing.assert_close(output.detach().double(), expected, rtol=0.02, atol=0.02)
    assert torch.count_nonzero(output[1]) == 0


@pytest.mark.parametrize("b", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("max_out", [1, 2])
def test_gradcheck(b: float, max_out: int) -> None:
    layer = layer_of(values(4, 5, seed=1), b=b, max_out=max_out)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    torch.autograd.gradcheck(run, (values(3, 5).requires_grad_(), layer.weight))


@pytest.mark.parametrize("b", [torch.tensor(1.7), torch.tensor([1.2, 1.7, 2.3, 2.9])])
def test_learnable_b(b: Tensor) -> None:
    x, weight = values(3, 5), values(4, 5, seed=1)
    layer = layer_of(weight, b=b.double())
    assert isinstance(layer.b, nn.Parameter)
    assert set(layer.state_dict()) == {"weight", "b"}
    exponents = b.double().expand(4).tolist()
    expected = torch.cat(
        [reference.linear(x, row[None], b=e).output for row, e in zip(weight, exponents, strict=True)], 1
    )
    assert_exact(layer(x).detach(), expected)
    layer(x).sum().backward()
    assert layer.b.grad is not None
    step, numeric = 1e-6, torch.zeros_like(layer.b)
    for index in range(layer.b.numel()):
        change = torch.zeros(layer.b.numel(), dtype=torch.float64)
        change[index] = step
        change = change.reshape(layer.b.shape)
        up, down = (torch.func.functional_call(layer, {"b": layer.b + sign * change}, (x,)).sum() for sign in (1, -1))
        numeric.data.view(-1)[index] = (up - down).detach() / (2 * step)
    torch.testing.assert_close(layer.b.grad, numeric.detach(), rtol=1e-7, atol=1e-9)
    assert torch.count_nonzero(layer.b.grad) == layer.b.numel()
    with explanation_mode():
        weights = gradient_rows(layer, x)
    assert_exact((weights @ x.flatten()).reshape(3, 4), layer(x).detach())


def test_a_learnable_b_is_a_copy() -> None:
    start = torch.tensor(1.5)
    layer = BcosLinear(5, 4, b=start)
    assert isinstance(layer.b, nn.Parameter)
    with torch.no_grad():
        layer.b += 1
    assert start.item() == 1.5


def test_it_is_a_linear_layer() -> None:
    layer = BcosLinear(5, 4, max_out=3)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (5, 4)
    assert layer.weight.shape == (12, 5)
    assert layer.bias is None
    assert set(layer.state_dict()) == set(nn.Linear(5, 4, bias=False).state_dict())
    biased = BcosLinear(5, 4, bias=True, max_out=3)
    assert set(biased.state_dict()) == set(nn.Linear(5, 4).state_dict())
    assert biased.bias is not None
    assert biased.bias.shape == (4,)
    plain = nn.Linear(5, 4)
    BcosLinear(5, 4, bias=True).load_state_dict(plain.state_dict())
    meta = BcosLinear(5, 4, bias=True, device="meta", dtype=torch.bfloat16)
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in meta.parameters())
    learnable = BcosLinear(5, 4, device="meta", b=torch.tensor(1.5))  # all parameters are where the layer is
    assert dict(learnable.named_parameters()).keys() == {"weight", "b"}
    assert learnable.b.is_meta
    with pytest.raises(ValueError, match="must be a finite exponent"):
        BcosLinear(5, 4, device="meta", b=torch.tensor(0.5))


def test_it_starts_as_the_torch_layer_does() -> None:
    torch.manual_seed(0)
    expected = nn.Linear(5, 4, bias=False).weight
    torch.manual_seed(0)
    assert torch.equal(BcosLinear(5, 4).weight, expected)
    layer = BcosLinear(5, 4, bias=True, max_out=2, b=torch.tensor(1.5))
    layer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("b", [1.5, torch.tensor(1.5)])
def test_copies(b: float | Tensor) -> None:
    layer = BcosLinear(5, 4, bias=True, b=b, max_out=2, normalize_weight=False, scale=0.3)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert repr(twin) == repr(layer)
        twin.weight.data.zero_()
        assert torch.count_nonzero(layer.weight) > 0


def test_repr() -> None:
    text = repr(BcosLinear(5, 4, b=2.5, max_out=3))
    assert all(part in text for part in ("in_features=5", "out_features=4", "bias=False", "b=2.5", "max_out=3"))
    assert "scale" not in text
    text = repr(BcosLinear(5, 4, b=torch.tensor(2.0), normalize_weight=False, scale=0.5))
    assert all(part in text for part in ("b=learnable", "normalize_weight=False", "scale=0.5"))


def test_other_modes_are_left_alone() -> None:
    layer, x = layer_of(values(4, 5)), values(3, 5, seed=1)
    before = gradient_rows(layer, x)
    with explanation_mode():
        layer(x)
    assert_exact(gradient_rows(layer, x), before)
    assert x.grad is None
    assert layer.weight.grad is None


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b": 0.99}, r"`b` \(=0.99\)"),
        ({"b": float("nan")}, r"`b` \(=nan\)"),
        ({"b": float("inf")}, r"`b` \(=inf\)"),
        ({"b": torch.tensor(0.5)}, "`b`"),
        ({"b": torch.tensor([2.0, 2.0, 0.5, 2.0])}, "`b`"),
        ({"b": torch.tensor([2.0, 2.0])}, "`b`"),
        ({"b": torch.tensor(2)}, "`b`"),
        ({"max_out": 0}, r"`max_out` \(=0\)"),
        ({"max_out": -1}, r"`max_out` \(=-1\)"),
        ({"scale": 0.0}, r"`scale` \(=0.0\)"),
        ({"scale": -1.0}, r"`scale` \(=-1.0\)"),
        ({"scale": float("nan")}, r"`scale` \(=nan\)"),
    ],
)
def test_construction_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BcosLinear(5, 4, **arguments)


def test_input_errors() -> None:
    layer = BcosLinear(5, 4)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.zeros(2, 6))
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.zeros(2, 5, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.zeros(2, 5, dtype=torch.long))


# The authors' layer


@pytest.mark.parametrize("b", [1, 1.5, 2, 2.5])
@pytest.mark.parametrize("max_out", [1, 2])
def test_parity_with_the_authors(b: float, max_out: int) -> None:
    official = pytest.importorskip("bcos.modules").BcosLinear(5, 4, b=b, max_out=max_out, dtype=torch.float64)
    weight, x = values(4 * max_out, 5), values(3, 5, seed=1)
    official.linear.load_state_dict({"weight": weight})
    layer = layer_of(weight, b=b, max_out=max_out)

    def gradients(module: nn.Module) -> Tensor:
        return gradient_rows(module, x)

    torch.testing.assert_close(layer(x), official(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients(layer), gradients(official), rtol=0, atol=1e-10)
    official.set_explanation_mode(True)
    with explanation_mode():
        weights = gradients(layer)
    torch.testing.assert_close(weights, gradients(official), rtol=0, atol=1e-10)
