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


def second_best(logits):
    """Writes to what it is given."""
    logits.scatter_(1, logits.argmax(1, keepdim=True), -torch.inf)
    return logits.argmax(1)


@pytest.mark.parametrize(
    "target",
    [lambda logits: logits.topk(2).indices, second_best, lambda logits: torch.tensor([[1, 4]]), lambda logits: [3, 0]],
)
def test_targets_that_are_functions(target, compiled):
    model, explain = compiled
    x = torch.rand(2, 6, 8, 7)
    found, expected = explain(x, target), bcoskit.explain(model, x, target)
    for name in ("logits", "value", "weights", "target"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert found.weights.flatten(1).any(1).all()


def test_inputs_may_be_written_to_afterwards(compiled):
    model, explain = compiled
    x = torch.rand(2, 6, 8, 7)
    expected = bcoskit.explain(model, x, 1).contributions
    start = x.clone().requires_grad_()
    found = explain(start, 1)
    start.data.zero_()
    torch.testing.assert_close(found.contributions, expected)
    assert not found.contributions.requires_grad
    writing = nn.Sequential(nn.ReLU(inplace=True), *network()).eval()
    found = bcoskit.compile_explain(writing, backend="aot_eager")(x - 0.5, 1)
    assert torch.equal(found.x, x - 0.5)
    torch.testing.assert_close(found.weights, bcoskit.explain(writing, x - 0.5, 1).weights)


def test_refusals_come_before_the_compiler(compiled):
    _, explain = compiled
    x = torch.rand(2, 6, 6, 5)

    def failing(logits):
        raise ArithmeticError("of the caller")

    with pytest.raises(ValueError, match=r"`products` \(='third'\)"):
        bcoskit.compile_explain(network(), products="third", backend="aot_eager")(x)
    with pytest.raises(ArithmeticError, match="of the caller"):
        explain(x, failing)
    with pytest.raises(ValueError, match=r"`target` \(=\(1,\)\) must be a class"):
        explain(x, (1,))
    with pytest.raises(ValueError, match="outputs of shape tuple"):
        bcoskit.compile_explain(lambda x: (x, x), backend="aot_eager")(x)
    assert explain(x, 1).weights.any()  # what failed has left nothing behind


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (lambda logits: logits.argmax(1) + 5, ValueError, "is out of range, the output has the classes 0 to 4"),
        (lambda logits: logits.argmax(1) - 5, ValueError, "is out of range"),
        (lambda logits: logits.argmax(1).float(), TypeError, "class indices must be integers"),
        (lambda logits: logits.argmax(1)[:2], ValueError, r"`target` of shape \(2,\)"),
        (lambda logits: None, TypeError, "returned None"),
    ],
)
def test_functions_that_give_no_classes_of_a_later_batch(target, error, message, compiled):
    _, explain = compiled
    x = torch.rand(3, 6, 5, 6)
    expected = explain(x, 1).weights
    with pytest.raises(error, match=message):
        explain(x, target)
    torch.testing.assert_close(explain(x, 1).weights, expected)
