"""Compiled explanations are those of `explain`."""

import pytest
import torch
from torch import nn

import bcoskit
from bcoskit.nn import BatchNorm, BcosConv2d, ClassifierHead


def network():
    torch.manual_seed(0)
    layers = [BcosConv2d(6, 4, 3, padding=1), BatchNorm(4), nn.GELU(), ClassifierHead(4, 5, logit_bias=-1.0)]
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def compiled():
    model = network()
    return model, bcoskit.compile_explain(model, backend="aot_eager")


@pytest.mark.parametrize("target", [None, 3, [1, 4], [[0, 1, 2], [4, 3, 2]]])
def test_as_explain(target, compiled):
    model, explain = compiled
    x = torch.rand(2, 6, 8, 7)
    found, expected = explain(x, target), bcoskit.explain(model, x, target)
    for name in ("logits", "value", "weights", "target", "contributions", "bias"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    start = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(start).amax(1).sum(), start)
    if target is None:
        assert not torch.allclose(found.weights, gradient, rtol=1e-2)
    assert not found.weights.requires_grad


def test_parameters_are_those_of_the_moment(compiled):
    model, explain = compiled
    x = torch.rand(2, 6, 8, 7)
    before = explain(x, 1).weights
    with torch.no_grad():
        model[1].weight.mul_(2)
    after = explain(x, 1).weights
    torch.testing.assert_close(after, bcoskit.explain(model, x, 1).weights)
    assert not torch.allclose(after, before, rtol=0.1)
    with torch.no_grad():
        model[1].weight.div_(2)


def test_refusals(compiled):
    _, explain = compiled
    x = torch.rand(2, 6, 8, 7)
    with pytest.raises(ValueError, match="target"):
        explain(x, 5)
    with pytest.raises(ValueError, match="evaluation mode"):
        bcoskit.compile_explain(network().train(), backend="aot_eager")(x)
    maps = nn.Sequential(BcosConv2d(6, 4, 3))
    with pytest.raises(ValueError, match=r"must have logits \(N, K\)"):
        bcoskit.compile_explain(maps.eval(), backend="aot_eager")(x, (0, 1, 1))
    with pytest.raises(ValueError, match="not finite"):
        explain(torch.full_like(x, torch.nan))
