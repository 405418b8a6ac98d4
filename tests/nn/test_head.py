"""Logit layer and classifier head."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from bcoskit.dynamic import explanation_mode
from bcoskit.nn import BcosConv2d, ClassifierHead, LogitLayer
from reference import assert_exact, gradient_rows, values


def head_of(weight: Tensor, **arguments: Any) -> ClassifierHead:
    """A head with the given filters (classes · max_out, channels)."""
    classes = weight.shape[0] // arguments.get("max_out", 1)
    head = ClassifierHead(weight.shape[1], classes, **arguments).double()
    (convolution,) = [module for module in head.modules() if isinstance(module, BcosConv2d)]
    convolution.load_state_dict({"weight": weight[..., None, None]})
    return head


# Logit layer


def test_logits() -> None:
    x = torch.tensor([[1.0, -2.0]])
    assert LogitLayer()(x).tolist() == [[1.0, -2.0]]
    assert LogitLayer(temperature=0.5)(x).tolist() == [[2.0, -4.0]]
    assert LogitLayer(bias=-3.0)(x).tolist() == [[-2.0, -5.0]]
    assert LogitLayer(0.5, 1.0)(x).tolist() == [[3.0, -3.0]]


def test_a_bias_of_zero_stays_zero() -> None:
    x = torch.tensor([[1.0, -2.0]])
    assert LogitLayer(bias=0.0)(x).tolist() == x.tolist()
    assert ClassifierHead(4, 10, logit_bias=0.0)(torch.zeros(1, 4, 2, 2)).tolist() == [[0.0] * 10]


@pytest.mark.parametrize(("temperature", "bias"), [(None, -math.log(999)), (1e-3, math.log(0.01 / 0.99)), (10, None)])
def test_constants_in_every_precision(temperature: float | None, bias: float | None) -> None:
    """A constant is as precise as the activations, whatever the layer was converted to before."""
    x = values(2, 3)
    expected = x / (1 if temperature is None else temperature) + (0 if bias is None else bias)
    for layer in (LogitLayer(temperature, bias), LogitLayer(temperature, bias).double()):
        assert_exact(layer(x), expected)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for layer in (LogitLayer(temperature, bias), LogitLayer(temperature, bias).to(dtype)):
            output = layer((x / 10).to(dtype))
            assert output.dtype == dtype
            close = (x / 10).to(dtype).double() / (temperature or 1) + (bias or 0)
            torch.testing.assert_close(output.double(), close, rtol=0.02, atol=0.02)


def test_logit_layer_has_no_state() -> None:
    layer = LogitLayer(0.5, -3.0)
    assert layer.state_dict() == {}
    assert list(layer.parameters()) == []
    layer.load_state_dict({})
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_exact(twin(values(2, 3)), layer(values(2, 3)))
    assert "temperature=0.5" in repr(layer)
    assert "bias=-3.0" in repr(layer)
    assert "bias=None" in repr(LogitLayer())
    assert "bias=0.0" in repr(LogitLayer(bias=0.0))


def test_logits_in_mixed_precision_stay_apart() -> None:
    x = torch.linspace(0, 0.02, 10).bfloat16()
    layer = LogitLayer(bias=-6.9)
    with torch.autocast("cpu", torch.bfloat16):
        assert len(layer(x).unique()) == len(x.unique()) == 10
    assert len(layer(x).unique()) < 10


def test_a_constant_survives_the_meta_device() -> None:
    """A network may be made without memory and filled from a checkpoint, which holds no constants."""
    with torch.device("meta"):
        layer = LogitLayer(0.5, -3.0)
    assert_exact(layer.to_empty(device="cpu")(torch.zeros(2, dtype=torch.float64)), torch.full((2,), -3.0).double())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperature_out_of_range(temperature: float) -> None:
    with pytest.raises(ValueError, match=rf"`temperature` \(={temperature}\)"):
        LogitLayer(temperature)


@pytest.mark.parametrize("bias", [math.nan, math.inf, -math.inf])
def test_bias_out_of_range(bias: float) -> None:
    with pytest.raises(ValueError, match=rf"`bias` \(={bias}\)"):
        LogitLayer(bias=bias)


@pytest.mark.parametrize(("temperature", "bias"), [(None, None), (0.5, None), (None, -math.log(9)), (10.0, 1.5)])
def test_parity_with_the_authors(temperature: float | None, bias: float | None) -> None:
    official = pytest.importorskip("bcos.modules").LogitLayer(logit_temperature=temperature, logit_bias=bias)
    x = values(2, 3)
    torch.testing.assert_close(LogitLayer(temperature, bias).double()(x), official(x), rtol=0, atol=1e-10)


# Classifier head


@pytest.mark.parametrize("b", [1, 1.5, 2])
@pytest.mark.parametrize("max_out", [1, 2])
@pytest.mark.parametrize("normalize_weight", [True, False])
def test_head(b: float, max_out: int, normalize_weight: bool) -> None:
    x, weight = values(2, 4, 3, 2), values(3 * max_out, 4, seed=1)
    transform: dict[str, Any] = {
        "b": b,
        "max_out": max_out,
        "normalize_weight": normalize_weight,
        "scale": 0.3,
    }
    head = head_of(weight, temperature=10.0, logit_bias=-1.5, **transform)
    scores = reference.conv(x, weight[..., None, None], **transform)
    expected = scores.output.flatten(2).mean(2) / 10 - 1.5
    assert_exact(head(x).detach(), expected)
    rows = scores.weights.reshape(2, 3, 6, x.numel()).mean(2).flatten(0, 1) / 10
    with explanation_mode():
        assert_exact(head(x).detach(), expected)
        weights = gradient_rows(head, x)
    assert_exact(weights, rows)
    assert_exact((weights @ x.flatten()).reshape(2, 3) - 1.5, expected)
    if b != 1:
        with pytest.raises(AssertionError):
            assert_exact(gradient_rows(head, x), rows)


def test_the_classifier_comes_before_the_mean() -> None:
    x, weight = values(2, 4, 3, 2), values(3, 4, seed=1)
    swapped = reference.linear(x.mean((2, 3)), weight).output
    with pytest.raises(AssertionError):
        assert_exact(head_of(weight)(x).detach(), swapped)
    assert_exact(head_of(weight, b=1)(x).detach(), reference.linear(x.mean((2, 3)), weight, b=1).output)


def test_head_parity_with_the_authors() -> None:
    modules = pytest.importorskip("bcos.modules")
    official = modules.BcosConv2d(4, 3, 1, max_out=2, dtype=torch.float64)
    weight, x = values(6, 4, seed=1), values(2, 4, 3, 2)
    official.linear.load_state_dict({"weight": weight[..., None, None]})
    whole = nn.Sequential(official, nn.AdaptiveAvgPool2d(1), nn.Flatten(), modules.LogitLayer(2.0, -1.0))
    head = head_of(weight, max_out=2, temperature=2.0, logit_bias=-1.0)
    torch.testing.assert_close(head(x), whole(x), rtol=0, atol=1e-10)


def test_head_state() -> None:
    head = ClassifierHead(4, 3, max_out=2, temperature=2.0, logit_bias=-1.0)
    ((key, weight),) = head.state_dict().items()
    assert key.endswith("weight")
    assert weight.shape == (6, 4, 1, 1)
    x = values(2, 4, 3, 2).float()
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(twin(x), head(x))
    assert head(x[:0]).shape == (0, 3)
    assert head.half()(x.half()).isfinite().all()


def test_head_errors() -> None:
    with pytest.raises(ValueError, match=r"`temperature` \(=0.0\)"):
        ClassifierHead(4, 3, temperature=0.0)
    with pytest.raises(ValueError, match=r"`b` \(=0.5\)"):
        ClassifierHead(4, 3, b=0.5)
    with pytest.raises(ValueError, match=r"`max_out` \(=0\)"):
        ClassifierHead(4, 3, max_out=0)
    with pytest.raises(RuntimeError, match="4 channels"):
        ClassifierHead(4, 3)(torch.zeros(1, 5, 2, 2))
