"""The gradual conversion: where it begins, how it moves, and what it ends as."""

import copy

import pytest
import torch
from torch import nn

import bcoskit
from bcoskit.convert import BcosConfig, GradualConversion, bcosify

CONFIG = BcosConfig(b=2.0, max_pool="keep", classifier="keep")


def ordinary():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.bias)
    return network.eval()


@pytest.fixture
def images():
    return torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def test_it_begins_as_the_ordinary_network(images):
    network = ordinary()
    before = copy.deepcopy(network.state_dict())
    gradual = GradualConversion(network, CONFIG)
    expected = network(images)
    assert torch.allclose(gradual.model(bcoskit.encode(images)), expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    gradual.set(0.5)
    assert not torch.allclose(gradual.model(bcoskit.encode(images)), expected, rtol=1e-2)


def test_exponents_and_biases_move_linearly():
    gradual = GradualConversion(ordinary(), BcosConfig(b=3.0, max_pool="keep", classifier="keep"))
    first = gradual.model[-1].bias.detach().clone()
    norm = gradual.model[1].bias.detach().clone()
    weight = gradual.model[-1].weight.detach().clone()
    for progress in (0.25, 0.25, 0.6, 0.9):
        gradual.set(progress)
        assert torch.allclose(gradual.model[-1].bias, (1 - progress) * first, rtol=1e-6)
        assert torch.allclose(gradual.model[1].bias, (1 - progress) * norm, rtol=1e-6)
        assert float(gradual.model[-1].b) == pytest.approx(1 + 2 * progress, rel=1e-6)
    assert torch.equal(gradual.model[-1].weight, weight)
    trained = {name for name, parameter in gradual.model.named_parameters() if parameter.requires_grad}
    assert not any(name.endswith((".b", ".bias")) for name in trained)
    assert "8.weight" in trained


def test_it_ends_as_what_bcosify_makes(images):
    network = ordinary()
    gradual = GradualConversion(network, CONFIG)
    for progress in (0.3, 1.0):
        gradual.set(progress)
    assert gradual.finish() is gradual.model
    assert gradual.finish() is gradual.model
    expected = bcosify(network, CONFIG)
    x = bcoskit.encode(images)
    assert torch.allclose(gradual.model(x), expected(x), rtol=1e-6)
    assert gradual.model.state_dict().keys() == expected.state_dict().keys()
    assert gradual.model.conversion == expected.conversion
    assert bcoskit.audit(gradual.model, x[:1]).passed


def test_it_only_goes_forward():
    gradual = GradualConversion(ordinary(), CONFIG)
    gradual.set(0.5)
    for progress in (0.4, 1.1, float("nan"), "a"):
        with pytest.raises(ValueError, match="`progress`"):
            gradual.set(progress)
    gradual.finish()
    with pytest.raises(ValueError, match="finished"):
        gradual.set(1.0)


def test_the_whole_network_by_name_is_told():
    network = bcoskit.create_model("resnet20.standard_cifar10")
    gradual = GradualConversion(network)
    converted = gradual.finish()
    assert (converted.transform.encoding, converted.loss, converted.in_chans) == ("bcos", "bce", 6)
    assert (network.transform.encoding, network.loss, network.in_chans) == ("normalized", "cross_entropy", 3)
    converted.reset_classifier(3)
    assert converted(torch.rand(1, 6, 32, 32)).shape == (1, 3)


def test_layers_that_are_skipped_keep_their_exponents(images):
    network = ordinary()
    network[3] = bcoskit.nn.BcosConv2d(8, 8, 3, padding=1, b=3.0)
    gradual = GradualConversion(network, CONFIG, skip=(path for path in ["3"]))
    expected = network(images)
    assert torch.allclose(gradual.model(bcoskit.encode(images)), expected, rtol=1e-5, atol=1e-6)
    for progress in (0.5, 1.0):
        gradual.set(progress)
        assert gradual.model[3].b == 3
    finished = gradual.finish()
    assert (finished[3].b, finished[0].layer.b, finished[-1].b) == (3, 2, 2)


def test_signals_by_an_example():
    network = nn.Sequential(nn.Conv1d(2, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    x = torch.rand(2, 2, 20)
    gradual = GradualConversion(network, CONFIG, example=x)
    assert torch.allclose(gradual.model(torch.cat([x, 1 - x], 1)), network(x), rtol=1e-5, atol=1e-6)


def test_a_bias_of_two_layers():
    network = ordinary()
    network[3].bias = network[0].bias
    gradual = GradualConversion(network, CONFIG)
    first = gradual.model[3].bias.detach().clone()
    gradual.set(0.5)
    assert torch.allclose(gradual.model[3].bias, first / 2)
    finished = gradual.finish()
    assert finished[3].bias is None
    assert finished[0].layer.bias is None
