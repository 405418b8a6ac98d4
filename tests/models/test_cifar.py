import math
from functools import partial

import pytest
import torch
from torch import nn

import bcoskit
from bcoskit.models import create_model, list_models
from bcoskit.models.cifar import DEPTHS, BasicBlock, CifarResNet, bcos_cifar_resnet, cifar_resnet

CHANNELS = (16, 32, 64)


def conv_weights(depth, in_channels):
    """The number of weights of all convolutions but the classifier, written out layer by layer."""
    blocks = (depth - 2) // 6
    total = in_channels * 16 * 9
    entry = 16
    for channels in CHANNELS:
        for _ in range(blocks):
            total += entry * channels * 9 + channels * channels * 9
            total += entry * channels if entry != channels else 0
            entry = channels
    return total


def normed_channels(depth):
    blocks = (depth - 2) // 6
    return 16 + sum(2 * blocks * channels for channels in CHANNELS) + 32 + 64


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def randomized(model, seed=0):
    """With running variances as no training leaves them, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(0.02 + 0.05 * torch.rand(buffer.shape, generator=generator))
        elif name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    for name, parameter in model.named_parameters():
        if "bn" in name or "downsample.1" in name:
            parameter.data.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model


class TestParameters:
    @pytest.mark.parametrize("depth", DEPTHS)
    def test_counts(self, depth):
        bcos, standard = bcos_cifar_resnet(depth, 10), cifar_resnet(depth, 10)
        assert count(bcos) == conv_weights(depth, 6) + normed_channels(depth) + 64 * 10
        assert count(standard) == conv_weights(depth, 3) + 2 * normed_channels(depth) + 64 * 10 + 10

    def test_published_counts(self):
        # He et al. give 0.27, 0.46, 0.66, 0.85 and 1.7 million, without the convolutions of the shortcuts.
        shortcuts = 16 * 32 + 32 * 64 + 2 * (32 + 64)
        counts = [round((count(cifar_resnet(depth, 10)) - shortcuts) / 1e6, 2) for depth in DEPTHS]
        assert counts == [0.27, 0.46, 0.66, 0.85, 1.73]

    def test_max_out_multiplies_the_filters(self):
        single, double = (bcos_cifar_resnet(20, 10, max_out=units) for units in (1, 2))
        assert count(double) - normed_channels(20) == 2 * (count(single) - normed_channels(20))

    def test_keys(self):
        keys = set(bcos_cifar_resnet(20, 10).state_dict())
        norm = ["weight", "running_mean", "running_var", "num_batches_tracked"]
        expected = {"conv1.weight", "fc.conv.weight", *(f"bn1.{name}" for name in norm)}
        for stage in (1, 2, 3):
            for block in range(3):
                place = f"layer{stage}.{block}"
                expected |= {f"{place}.conv{index}.weight" for index in (1, 2)}
                expected |= {f"{place}.bn{index}.{name}" for index in (1, 2) for name in norm}
            if stage > 1:
                place = f"layer{stage}.0.downsample"
                expected |= {f"{place}.0.weight", *(f"{place}.1.{name}" for name in norm)}
        assert keys == expected

    def test_initial_weights_have_the_spread_of_he(self):
        torch.manual_seed(0)
        model = cifar_resnet(20, 10)
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * math.prod(module.kernel_size)
                assert float(module.weight.detach().std()) == pytest.approx(math.sqrt(2 / fan_out), rel=0.15), name


class TestForward:
    @pytest.mark.parametrize("make", [bcos_cifar_resnet, cifar_resnet])
    def test_shapes(self, make):
        model = make(20, 7).eval()
        x = torch.rand(2, model.conv1.in_channels, 32, 40)
        features = model.forward_features(x)
        assert features.shape == (2, 64, 8, 10)
        assert model.forward_head(features).shape == (2, 7)
        assert torch.equal(model(x), model.forward_head(features))

    def test_constant_of_the_logits(self):
        model = bcos_cifar_resnet(20, 10).eval()
        logits = model(torch.zeros(1, 6, 32, 32))
        torch.testing.assert_close(logits, torch.full((1, 10), -math.log(9)))
        assert bcos_cifar_resnet(20, 1).fc.logits.bias == 0

    def test_arguments_reach_all_layers(self):
        model = bcos_cifar_resnet(20, 5, in_channels=2, b=1.5, max_out=3)
        layers = [module for module in model.modules() if isinstance(module, bcoskit.nn.BcosConv2d)]
        assert len(layers) == 1 + 2 * 9 + 2 + 1
        assert {(layer.b, layer.max_out) for layer in layers} == {(1.5, 3)}
        assert model(torch.rand(2, 2, 16, 16)).shape == (2, 5)

    def test_standard_block_against_its_formula(self):
        torch.manual_seed(0)
        block = BasicBlock(4, 6, 2, conv=partial(nn.Conv2d, bias=False), norm=nn.BatchNorm2d, activation=nn.ReLU)
        block = randomized(block.double().eval())
        x = torch.randn(2, 4, 8, 8, dtype=torch.float64)

        def step(value, conv, norm):
            value = nn.functional.conv2d(value, conv.weight, stride=conv.stride, padding=conv.padding)
            shape = (1, -1, 1, 1)
            value = (value - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + 1e-5).sqrt()
            return value * norm.weight.view(shape) + norm.bias.view(shape)

        inner = step(step(x, block.conv1, block.bn1).clamp_min(0), block.conv2, block.bn2)
        expected = (inner + step(x, *block.downsample)).clamp_min(0)
        torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("depth", [-4, 0, 2, 7, 21, 51])
    def test_depths_that_there_are_not(self, depth):
        for make in (bcos_cifar_resnet, cifar_resnet):
            with pytest.raises(ValueError, match=rf"`depth` \(={depth}\) must be 6n \+ 2"):
                make(depth, 10)

    def test_smallest_depth(self):
        assert len(bcos_cifar_resnet(8, 10).layer1) == 1
        assert isinstance(bcos_cifar_resnet(8, 10), CifarResNet)


class TestDynamicLinear:
    @pytest.mark.parametrize("name", ["resnet20.bcos_cifar10", "resnet20.standard_cifar10"])
    def test_audit(self, name):
        torch.manual_seed(0)
        model = randomized(create_model(name, num_classes=3))
        report = bcoskit.audit(model, torch.rand(2, model.conv1.in_channels, 16, 16))
        assert report.passed

    def test_all_that_does_not_pass_the_input_is_the_constant_of_the_logit(self):
        torch.manual_seed(0)
        model = randomized(create_model("resnet20.bcos_cifar10").double())
        explanation = bcoskit.explain(model, torch.rand(2, 6, 32, 32, dtype=torch.float64), shares=True)
        assert explanation.contributions.abs().sum() > 0.1
        torch.testing.assert_close(explanation.bias, torch.full((2,), -math.log(9), dtype=torch.float64))
        assert list(explanation.shares) == ["fc.logits.bias"]


@pytest.fixture(scope="module")
def networks():
    resnet = pytest.importorskip("bcos.models.resnet")
    modules = pytest.importorskip("bcos.modules")
    norm = modules.norms.NoBias(modules.norms.BatchNormUncentered2d)
    torch.manual_seed(0)
    conv = partial(modules.BcosConv2d, b=2, max_out=2)
    theirs = resnet.cifar10_resnet20(in_chans=6, norm_layer=norm, conv_layer=conv)
    theirs = randomized(theirs.double().eval())
    ours = create_model("resnet20.bcos_cifar10").double()
    state = {ours_key(key): value for key, value in theirs.state_dict().items()}
    ours.load_state_dict(state)
    return ours, theirs


@pytest.fixture(scope="module")
def x():
    generator = torch.Generator().manual_seed(1)
    return bcoskit.encode(torch.rand(3, 3, 32, 32, generator=generator, dtype=torch.float64))


class TestParityWithTheAuthors:
    def test_keys(self, networks):
        ours, theirs = networks
        theirs_keys = set(map(ours_key, theirs.state_dict()))
        assert set(ours.state_dict()) == theirs_keys
        assert len(theirs_keys) == len(theirs.state_dict())

    def test_logits(self, networks, x):
        ours, theirs = networks
        with torch.no_grad():
            expected = theirs(x)
            assert float((expected.amax(1) - expected.amin(1)).min()) > 0.01
            torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("target", [0, 7])
    def test_weights(self, target, networks, x):
        ours, theirs = networks
        with theirs.explanation_mode():
            start = x.clone().requires_grad_()
            theirs(start)[:, target].sum().backward()
        explanation = bcoskit.explain(ours, x, target)
        assert float(start.grad.abs().max()) > 1e-4
        scale = float(start.grad.abs().max())
        torch.testing.assert_close(explanation.weights / scale, start.grad / scale, rtol=1e-10, atol=1e-10)

    def test_the_gradient_is_another_one(self, networks, x):
        ours, theirs = networks
        start = x.clone().requires_grad_()
        theirs(start)[:, 0].sum().backward()
        explanation = bcoskit.explain(ours, x, 0)
        assert float((explanation.weights - start.grad).abs().max() / start.grad.abs().max()) > 0.1

    def test_running_variances_matter(self, networks, x):
        ours, theirs = networks
        with torch.no_grad():
            expected = theirs(x)
            variance = theirs.layer2[1].bn1.running_var
            variance *= 2
            changed = theirs(x)
            variance /= 2
            logits = ours(x)
        assert float((logits - expected).abs().max()) < 1e-10
        assert float((logits - changed).abs().max()) > 1e-3


def ours_key(key):
    return key.replace(".linear.", ".").replace("fc.", "fc.conv.")


@pytest.mark.parametrize(
    "name",
    [name for name in list_models() if "bcos" in name and name.startswith("cnn9") and name.endswith("cifar10")]
    + ["resnet20.bcos_v2_cifar10", "resnet20.bcos_v2_nomaxout_cifar10"],
)
def test_fresh_networks_tell_images_apart(name):
    """Each B-cos layer shrinks what it gets: without norms or a scale nothing would be left, nor learnt from."""
    torch.manual_seed(0)
    x = torch.rand(4, 3, 32, 32)
    model = create_model(name).train()
    assert (model(torch.cat([x, 1 - x], 1)).std(0) > 1e-5).all()
