"""The gated activations as layers."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import reference
from bcoskit.dynamic import explanation_mode
from bcoskit.functional import GATES
from bcoskit.nn import GELU, Gate, Hardswish, Mish, SigmoidGate, SiLU
from reference import assert_exact, gradient_rows, values

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "gelu": (GELU, nn.GELU),
    "gelu_tanh": (lambda: GELU("tanh"), lambda: nn.GELU("tanh")),
    "silu": (SiLU, nn.SiLU),
    "hardswish": (Hardswish, nn.Hardswish),
    "mish": (Mish, nn.Mish),
    "tanh": (lambda: Gate("tanh"), nn.Tanh),
    "softsign": (lambda: Gate("softsign"), nn.Softsign),
    "tanhshrink": (lambda: Gate("tanhshrink"), nn.Tanhshrink),
    "relu": (lambda: Gate("relu"), nn.ReLU),
}


@pytest.mark.parametrize("name", LAYERS)
def test_output_and_weights(name: str) -> None:
    layer, plain = (build() for build in LAYERS[name])
    x = 3 * values(2, 4, 3)
    expected = reference.gate(x, name)
    assert_exact(layer(x), expected.output)
    assert_exact(layer(x), plain(x))
    with explanation_mode():
        assert_exact(layer(x), expected.output)
        weights = gradient_rows(layer, x)
    assert_exact(weights, expected.weights)
    assert_exact((weights @ x.flatten()).reshape(x.shape), expected.output)
    # Outside, it has the derivative of torch's layer, which is W for the piecewise linear one only.
    assert_exact(gradient_rows(layer, x), gradient_rows(plain, x))
    if name != "relu":
        with pytest.raises(AssertionError):
            assert_exact(gradient_rows(layer, x), expected.weights)


@pytest.mark.parametrize("name", sorted(GATES))
def test_gradcheck(name: str) -> None:
    x = torch.tensor([-0.7, -0.1, 0.2, 0.9, 2.5], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(Gate(name), x)


@pytest.mark.parametrize("name", sorted(GATES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_precision(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor([-0.9, -0.1, 0.0, 0.2, 0.9, 2.5]).to(dtype)
    output = Gate(name)(x)
    assert output.dtype == dtype
    expected = reference.gate(x[x != 0].double(), name).output
    torch.testing.assert_close(output[x != 0].double(), expected, rtol=0.02, atol=0.02)
    assert output[2] == 0


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "hardswish", "mish", "tanh", "softsign", "relu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_large_inputs(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor([-1000.0, -60.0, 60.0, 1000.0], dtype=dtype, requires_grad=True)
    layer, plain = (build() for build in LAYERS[name])
    few: dict[str, Any] = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(layer(x), plain(x), **few)
    gradient, expected = (torch.autograd.grad(module(x).sum(), x)[0] for module in (layer, plain))
    torch.testing.assert_close(gradient, expected, **few)


def test_sigmoid_gate() -> None:
    layer, x, gate = SigmoidGate(), values(2, 4, 3), values(2, 4, 1, seed=1)
    assert_exact(layer(x, gate), x / (1 + (-gate).exp()))
    x.requires_grad_()
    gate.requires_grad_()
    with explanation_mode():
        output = layer(x, gate)
        weights, nothing = torch.autograd.grad(output.sum(), (x, gate), allow_unused=True)
    assert_exact(weights, torch.sigmoid(gate.detach()).expand_as(x))
    assert nothing is None
    (ordinary,) = torch.autograd.grad(layer(x, gate).sum(), gate)
    assert torch.count_nonzero(ordinary) > 0


def test_sigmoid_gate_of_its_own_input() -> None:
    """As in squeeze-and-excitation: the gate is computed from x, and still passes no gradient."""
    layer, x = SigmoidGate(), values(2, 4, 3)

    def squeeze(x: torch.Tensor) -> torch.Tensor:
        return layer(x, x.mean(-1, keepdim=True))

    with explanation_mode():
        weights = gradient_rows(squeeze, x)
    assert_exact(weights, torch.diag(torch.sigmoid(x.mean(-1, keepdim=True)).expand_as(x).flatten()))
    with pytest.raises(AssertionError):
        assert_exact(gradient_rows(squeeze, x), weights)


@pytest.mark.parametrize("layer", [GELU(), GELU("tanh"), SiLU(), Hardswish(), Mish(), Gate("tanh"), SigmoidGate()])
def test_state(layer: nn.Module) -> None:
    assert layer.state_dict() == {}
    x = (values(2, 3),) * (2 if isinstance(layer, SigmoidGate) else 1)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(*x), layer(*x))
        assert repr(twin) == repr(layer)


def test_repr() -> None:
    assert repr(Gate("tanh")) == "Gate(tanh)"
    assert repr(GELU("tanh")) == "GELU(gelu_tanh)"


def test_construction_errors() -> None:
    with pytest.raises(ValueError, match=r"`name` \(='swish'\) must be one of gelu"):
        Gate("swish")
    with pytest.raises(ValueError, match=r"`approximate` \(='sigmoid'\)"):
        GELU("sigmoid")
