"""Fused networks: the same logits and W(x), with what is multiplied folded into the filters."""

import math

import pytest
import torch
from timm.layers.std_conv import StdConv2d
from torch import nn

import bcoskit
from bcoskit import BcosConfig
from bcoskit.models import WeightsError, create_model, save_model
from bcoskit.nn import AllNorm, BatchNorm, BcosConv2d, BcosLinear, ClassifierHead

NAMES = {
    # and how many norms stay: those before a convolution, and those behind MaxOut
    "resnet18.bcos_v2_in1k": 0,
    "resnet18.bcosification_in1k": 0,
    "densenet121.bcos_v2_in1k": 62,
    "densenet121.bcos_v1_in1k": 0,
    "convnext_atto.bcos_v2_bnu_in1k": 4,
    "simple_vit_ti_patch16_224.bcos_v2_in1k": 0,
    "clip_resnet50.bcosification_in1k": 0,
    "resnet20.bcos_v2_bn_nomaxout_cifar10": 0,
    "resnet20.bcos_v2_anu_nomaxout_cifar10": 0,
    "resnet20.bcos_v2_bnu_linear_cifar10": 21,
    "cnn9.bcos_v1_b1_5_cifar10": 0,
}


def randomized(network):
    torch.manual_seed(0)
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if name.endswith(("bias", "running_mean")):
            nn.init.normal_(tensor, std=0.1)
        elif tensor.ndim < 2 and tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
            if name.endswith("weight"):  # some factors are negative
                with torch.no_grad():
                    tensor[::3] *= -1
    return network.double()


def norms(network):
    return [module for module in network.modules() if isinstance(module, (AllNorm, BatchNorm))]


@pytest.mark.parametrize("name", NAMES)
def test_named_networks(name, tmp_path):
    network = randomized(create_model(name))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    fused = bcoskit.fuse(network)
    x = bcoskit.encode(torch.rand(2, 3, 64, 64, dtype=torch.float64))
    expected, found = (bcoskit.explain(each, x, target=3, shares=True) for each in (network, fused))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-12)
    scale = float(expected.weights.abs().max())
    torch.testing.assert_close(found.weights / scale, expected.weights / scale, rtol=0, atol=1e-9)
    assert float(found.residual.abs().max()) < 1e-10
    torch.testing.assert_close(found.bias, expected.bias, rtol=1e-6, atol=1e-9)
    assert len(norms(fused)) == NAMES[name]
    layers = [module for module in fused.modules() if isinstance(module, (BcosConv2d, BcosLinear))]
    assert not any(layer.normalize_weight for layer in layers)
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    # The original is as it was.
    assert not network.fused
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    path = tmp_path / "fused.safetensors"
    save_model(fused, path)
    opened = create_model(path).double()
    assert opened.fused
    assert (opened.classes, opened.transform) == (network.classes, network.transform)
    torch.testing.assert_close(opened(x), found.logits.float().double(), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="a fused network has no classifier to reset"):
        opened.reset_classifier(2)


def test_the_formula():
    # One filter, written out: w' = w/‖w‖ · sign(s) |s|^(1/2), with s = γ / sqrt(v + ε) and the constant as bias.
    torch.manual_seed(0)
    layer, norm = BcosConv2d(2, 1, 1), BatchNorm(1, centered=True, bias=True)
    network = nn.Sequential(layer, norm).eval()
    with torch.no_grad():
        norm.weight.fill_(-0.7)
        norm.bias.fill_(0.2)
        norm.running_var.fill_(0.3)
        norm.running_mean.fill_(0.4)
    fused = bcoskit.fuse(network)
    s = -0.7 / math.sqrt(0.3 + 1e-5)
    weight = layer.weight.detach()
    torch.testing.assert_close(fused[0].weight, -weight / weight.norm() * math.sqrt(-s))
    assert float(fused[0].bias) == pytest.approx(0.2 - 0.4 * s)
    assert isinstance(fused[1], nn.Identity)


def test_norms_that_others_need_stay():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = BcosConv2d(4, 4, 1), BatchNorm(4)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y  # the convolution is read twice

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = BcosConv2d(4, 4, 1), BatchNorm(4)

        def forward(self, x):
            return self.norm(self.conv(self.norm(self.conv(x))))

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(BcosConv2d(4, 4, 1), BatchNorm(4))

        def forward(self, x):
            return self.inner(x) if float(x.sum()) > 0 else x

    x = torch.rand(1, 4, 3, 3)
    for make, stay in ((Branch, 1), (Twice, 1), (Branching, 0)):
        network = randomized(make()).float().eval()
        fused = bcoskit.fuse(network)
        assert len(norms(fused)) == stay
        torch.testing.assert_close(fused(x), network(x))


def test_exponents_and_divisors():
    x = torch.rand(2, 6, 5, 5, dtype=torch.float64)
    for b in (1, 1.5, 2):
        network = nn.Sequential(
            BcosConv2d(6, 4, 3, b=b, scale=0.1, bias=True),
            BatchNorm(4),
            ClassifierHead(4, 3, b=b, max_out=2, scale=0.2, temperature=10.0, logit_bias=-1.0),
        )
        network = randomized(network).eval()
        fused = bcoskit.fuse(network)
        assert len(norms(fused)) == (b == 1.5)  # |cos| + ε is not homogeneous
        torch.testing.assert_close(fused(x), network(x), rtol=1e-10, atol=1e-12)
        assert fused[2].logits.temperature == (10.0 if b == 1.5 else None)


def test_compiled():
    network = randomized(create_model("resnet20.bcos_v2_bnu_linear_nomaxout_cifar10")).float()
    fused = bcoskit.fuse(network)
    x = bcoskit.encode(torch.rand(2, 3, 32, 32))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fused, backend="aot_eager")(x), network(x), rtol=1e-4, atol=1e-5)


def test_refusals(tmp_path):
    network = create_model("cnn9.bcos_v1_b2_cifar10")
    network.layers[0].train()
    with pytest.raises(ValueError, match=r"must be in evaluation mode, its module 'layers\.0' is in training mode"):
        bcoskit.fuse(network)
    with pytest.raises(ValueError, match="`model` has a learnable exponent in '0'"):
        bcoskit.fuse(nn.Sequential(BcosLinear(2, 2, b=torch.tensor(1.5))).eval())
    # A fused file is none of the original, nor the other way round.
    fused = bcoskit.fuse(create_model("resnet20.bcos_v2_bn_nomaxout_cifar10"))
    save_model(fused, tmp_path / "fused.safetensors")
    bare = tmp_path / "bare.pth"
    torch.save(fused.state_dict(), bare)
    with pytest.raises(WeightsError, match=r"lacks weights: 'bn1\.bias'"):
        create_model("resnet20.bcos_v2_bn_nomaxout_cifar10", weights=bare)


class Twice(nn.Module):
    """One convolution with two norms, in modules below code that cannot be traced."""

    def __init__(self):
        super().__init__()
        shared = BcosConv2d(4, 4, 1)
        self.first = nn.Sequential(shared, BatchNorm(4))
        self.second = nn.Sequential(shared, BatchNorm(4))

    def forward(self, x):
        return self.first(x) + self.second(x) if float(x.sum()) > 0 else x


class Bypassing(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.mix, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(nn.functional.linear(self.patches(x).flatten(2).mT.mean(1), self.mix.weight))


def hooked():
    network = nn.Sequential(BcosConv2d(4, 6, 3), BatchNorm(6))
    network[0].register_forward_hook(lambda _module, _inputs, output: output + 1)
    return network


NOT_PLAIN = {
    "transposed": lambda: nn.Sequential(bcoskit.nn.BcosConvTranspose2d(4, 6, 3), BatchNorm(6)),
    "shared": Twice,
    "hooked": hooked,
    "standardised": lambda: bcoskit.bcosify(
        nn.Sequential(nn.Conv2d(2, 8, 3), StdConv2d(8, 8, 3), nn.ReLU()).eval(), BcosConfig(normalize_weight=True)
    ),
    "bypassed": lambda: bcoskit.bcosify(Bypassing().eval(), BcosConfig.preset("v2")),
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_cannot_be_folded_stays(name):
    torch.manual_seed(0)
    network = NOT_PLAIN[name]().eval()
    for norm in norms(network):
        nn.init.uniform_(norm.running_var, 0.3, 2)
    x = torch.rand(2, 6 if name == "bypassed" else 4, 16, 16)
    with torch.no_grad():
        expected, found = network(x), bcoskit.fuse(network)(x)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_arguments_that_may_be_left_out():
    """Traced, the optional branch would be taken."""

    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = bcoskit.nn.BcosConv2d(6, 4, 3), bcoskit.nn.BatchNorm(4)
            self.norm.running_var.fill_(0.04)

        def forward(self, x, skip=None):
            y = self.conv(x)
            return y if skip is None else self.norm(y) + skip

    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = Stem(), bcoskit.nn.ClassifierHead(4, 3)

        def forward(self, x):
            if x.shape[1] != 6:
                raise ValueError("channels")
            return self.head(self.stem(x))

    x = bcoskit.encode(torch.rand(2, 3, 8, 8))
    for model in (Stem().eval(), Untraceable().eval()):
        torch.testing.assert_close(bcoskit.fuse(model)(x), model(x), rtol=1e-5, atol=1e-6)
