import copy
import pickle
import re
import warnings
from dataclasses import dataclass, replace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import std_conv
from timm.layers.conv2d_same import Conv2dSame
from torch import nn
from torch.nn.utils import parametrizations, prune

import bcoskit
from bcoskit import BcosConfig, bcosify, set_b
from bcoskit.convert import Rule
from bcoskit.convert._input import PairedInput
from bcoskit.models import create_model
from bcoskit.nn import BatchNorm, BcosConv1d, BcosConv2d, BcosConv3d, BcosConvTranspose2d, BcosLinear

EXACT = BcosConfig.preset("exact")


def shaken(model, seed=0):
    """A network in evaluation mode whose norms and biases are not those of a fresh one."""
    torch.manual_seed(seed)
    for module in model.modules():
        for name in ("running_mean", "bias"):
            value = getattr(module, name, None)
            if isinstance(value, torch.Tensor):
                nn.init.normal_(value, std=0.3)
        if getattr(module, "running_var", None) is not None:
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def normalized(model, images):
    configuration = getattr(model, "pretrained_cfg", None)
    if not configuration:
        return images
    mean, std = (images.new_tensor(configuration[name]).reshape(-1, 1, 1) for name in ("mean", "std"))
    return (images - mean) / std


def pairs(x):
    return torch.cat([x, 1 - x], 1)


def relative(found, expected):
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


class Attending(nn.Module):
    """Patches, torch's encoder with its fast path, and a classifier."""

    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, 8)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu", **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x).flatten(2).mT).mean(1))


class Shared(nn.Module):
    """One layer in two places, of which one is an attribute of another module."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.one = nn.Conv2d(6, 6, 3, padding=1)
        self.block = nn.Sequential(nn.ReLU(), self.one)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.block(self.one(self.stem(x))).mean((2, 3)))


class Bypassing(nn.Module):
    """Uses the weight of a layer, which it does not call."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(F.linear(self.stem(x).mean((2, 3)), self.mix.weight, self.mix.bias))


class OwnForward(nn.Conv2d):
    """A convolution that does something else as well."""

    def forward(self, input):
        return 2 * super().forward(input)


class WithOwn(nn.Sequential):
    """A network with a layer that no rule knows."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), OwnForward(4, 4, 3), nn.Flatten(), nn.LazyLinear(3))


class Resizing(nn.Module):
    """No layer reads the image itself."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.stem(x * 2).mean((2, 3)))


def small(*layers):
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


PLAIN = {
    "batch norm": lambda: small(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
    "grouped": lambda: small(nn.Conv2d(3, 6, 3, padding="same"), nn.Conv2d(6, 8, 3, groups=2, dilation=2)),
    "reflecting": lambda: small(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")),
    "same": lambda: small(Conv2dSame(3, 8, 3, 2)),
    "standardized": lambda: small(std_conv.StdConv2d(3, 6, 3), std_conv.StdConv2dSame(6, 8, 3, 2)),
    "scaled": lambda: small(
        std_conv.ScaledStdConv2d(3, 6, 3, gamma=1.7), std_conv.ScaledStdConv2dSame(6, 8, 3, 2, gain_init=0.6)
    ),
    "transposed": lambda: small(nn.Conv2d(3, 6, 3, 2), nn.ConvTranspose2d(6, 8, 3, 2, 1, 1, groups=2)),
    "attention": Attending,
    "attention, norm first": lambda: Attending(norm_first=True),
    "shared": Shared,
    "bypassing": Bypassing,
    "resizing": Resizing,
}
TIMM = ["test_resnet", "test_efficientnet", "test_convnext2", "test_vit3", "test_nfnet", "test_mambaout"]


class TestExactStart:
    @pytest.mark.parametrize("name", PLAIN)
    def test_plain_modules(self, name):
        model = shaken(PLAIN[name]())
        x = torch.rand(2, 3, 32, 32)
        with torch.no_grad():
            expected = model(x)
            assert relative(bcosify(model, EXACT)(pairs(x)), expected) < 1e-5
            # The control: another exponent is another function.
            assert relative(bcosify(model, BcosConfig(b=2, biases="keep"))(pairs(x)), expected) > 1e-2

    @pytest.mark.parametrize("name", TIMM)
    def test_timm(self, name):
        model = shaken(timm.create_model(name, num_classes=5))
        images = torch.rand(2, *model.pretrained_cfg["input_size"])
        with torch.no_grad():
            expected = model(normalized(model, images))
            assert relative(bcosify(model, EXACT)(bcoskit.encode(images)), expected) < 1e-5

    def test_every_choice_that_changes_nothing_at_exponent_one(self):
        model = shaken(timm.create_model("resnet18", num_classes=5))
        images = torch.rand(2, 3, 64, 64)
        config = BcosConfig(
            b=1, learnable_b=True, max_out=2, biases="keep", norms="uncentered", max_pool="keep", projections="bcos"
        )
        converted = bcosify(model, config)
        assert any(isinstance(module, BatchNorm) for module in converted.modules())
        assert isinstance(converted.global_pool, nn.Identity)
        with torch.no_grad():
            found, expected = converted(bcoskit.encode(images)), model(normalized(model, images))
        assert relative(found, expected) < 1e-5

    def test_mean_and_std_of_the_caller(self):
        model = shaken(PLAIN["batch norm"]())
        x = torch.rand(2, 3, 32, 32)
        config = BcosConfig(b=1, biases="keep", norms="keep", max_pool="keep", mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 2))
        mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (config.mean, config.std))
        with torch.no_grad():
            assert relative(bcosify(model, config)(pairs(x)), model((x - mean) / std)) < 1e-5

    def test_inputs_that_are_not_encoded(self):
        model = shaken(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)))
        config = BcosConfig(b=1, biases="keep", norms="keep", encode=False)
        x = torch.rand(4, 5)
        with torch.no_grad():
            torch.testing.assert_close(bcosify(model, config)(x), model(x))


OTHER_INPUTS = {
    "grey": (lambda: small(nn.Conv2d(1, 8, 3)), (1, 28, 28), BcosConv2d),
    "signal": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 8, 5, 2, 2), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(8 * 25, 3)
        ),
        (2, 100),
        BcosConv1d,
    ),
    "volume": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 4, 3, 2), nn.BatchNorm3d(4), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)
        ),
        (1, 12, 10, 8),
        BcosConv3d,
    ),
}


@pytest.mark.parametrize("name", OTHER_INPUTS)
def test_other_inputs(name):
    make, shape, kind = OTHER_INPUTS[name]
    model = shaken(make())
    x = torch.rand(2, *shape)
    with torch.no_grad():
        exact = bcosify(model, EXACT, example=x)
        assert relative(exact(pairs(x)), model(x)) < 1e-5
    converted = bcosify(model, example=x)
    assert any(isinstance(module, kind) for module in converted.modules())
    explanation = bcoskit.explain(converted, pairs(x), shares=True)
    assert float(explanation.residual.abs().max()) < 1e-5
    assert bcoskit.audit(converted, pairs(x)).passed


class TestResult:
    @pytest.mark.parametrize("name", PLAIN)
    def test_it_is_dynamic_linear(self, name):
        converted = bcosify(shaken(PLAIN[name]()), BcosConfig(projections="bcos", logit_bias="uniform"))
        assert bcoskit.audit(converted, pairs(torch.rand(2, 3, 32, 32))).passed

    @pytest.mark.parametrize("preset", ["bcosification", "v2", "v1"])
    @pytest.mark.parametrize("name", ["test_resnet", "test_vit3"])
    def test_presets(self, name, preset):
        model = shaken(timm.create_model(name, num_classes=5))
        converted = bcosify(model, BcosConfig.preset(preset))
        x = bcoskit.encode(torch.rand(2, *model.pretrained_cfg["input_size"]))
        assert bcoskit.audit(converted, x).passed
        activations = [module for module in converted.modules() if isinstance(module, (nn.ReLU, nn.GELU))]
        assert bool(activations) == (preset == "bcosification" and name == "test_resnet") or name == "test_vit3"
        assert {module.max_out for module in converted.modules() if isinstance(module, BcosConv2d)} == {
            2 if preset == "v1" else 1
        }

    def test_as_the_network_by_name(self):
        """The authors' converted network, of the same weights."""
        named = shaken(bcoskit.create_model("resnet18.bcosification_in1k"))
        plain = timm.create_model("resnet18").eval()
        weights = {}
        for path, value in named.state_dict().items():
            path = path.replace("conv1.conv.", "conv1.") if path.startswith("conv1") else path
            path = path.replace("fc.conv.", "fc.")
            weights[path] = value
        first = weights["conv1.weight"]
        weights["conv1.weight"] = first[:, :3] - first[:, 3:]
        weights["fc.weight"] = weights["fc.weight"].flatten(1)
        plain.load_state_dict(weights, strict=False)
        with torch.no_grad():
            named.conv1.conv.weight.copy_(torch.cat([weights["conv1.weight"], -weights["conv1.weight"]], 1) / 2)
        converted = bcosify(plain, BcosConfig.preset("bcosification"))
        x = bcoskit.encode(torch.rand(2, 3, 64, 64))
        ours, theirs = bcoskit.explain(converted, x), bcoskit.explain(named, x)
        assert relative(ours.logits, theirs.logits) < 1e-5
        assert relative(ours.weights, theirs.weights) < 1e-4

    def test_parameters_stay_the_same_objects(self):
        model = shaken(timm.create_model("test_resnet"))
        before = {id(parameter) for parameter in model.parameters()}
        bcosify(model, BcosConfig(classifier="keep"), inplace=True)
        new = [path for path, parameter in model.named_parameters() if id(parameter) not in before]
        assert new == ["conv1.0.layer.weight"]

    def test_a_copy_leaves_the_original(self):
        model = timm.create_model("test_resnet")
        state, text = copy.deepcopy(model.state_dict()), str(model)
        converted = bcosify(model)
        assert converted is not model
        assert str(model) == text
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(module.training for module in (*model.modules(), *converted.modules()))
        assert not any(module._forward_hooks for module in (*model.modules(), *converted.modules()))

    def test_random_state_and_modes_stay(self):
        model = small(nn.Conv2d(3, 8, 3), nn.Dropout(0.5))
        model[1].eval()
        torch.manual_seed(3)
        expected = torch.rand(3)
        torch.manual_seed(3)
        converted = bcosify(model)
        assert torch.equal(torch.rand(3), expected)
        assert [module.training for module in converted.children()] == [module.training for module in model.children()]

    def test_shared_modules_stay_shared(self):
        converted = bcosify(shaken(Shared()))
        assert converted.one is converted.block[1]
        assert isinstance(converted.one, BcosConv2d)

    def test_no_biases_remain(self):
        converted = bcosify(shaken(timm.create_model("test_vit3")))
        assert [path for path, _ in converted.named_parameters() if path.endswith("bias")] == []

    def test_float64_and_training(self):
        model = small(nn.Conv2d(3, 8, 3)).double()
        converted = bcosify(model, BcosConfig(learnable_b=True, max_out=2))
        assert {parameter.dtype for parameter in converted.parameters()} == {torch.float64}
        converted(pairs(torch.rand(2, 3, 16, 16, dtype=torch.float64))).sum().backward()
        assert all(parameter.grad is not None for parameter in converted.parameters())

    def test_constants_of_the_logits(self):
        model = shaken(Resizing())
        x = pairs(torch.rand(2, 3, 32, 32))
        plain = bcosify(model)
        with torch.no_grad():
            changed = bcosify(model, BcosConfig(logit_bias=0.5, temperature=2.0))(x)
            torch.testing.assert_close(changed, plain(x) / 2 + 0.5)

    def test_the_paired_input(self):
        assert isinstance(bcosify(shaken(Resizing())), PairedInput)

    def test_skip_and_rules(self):
        model = shaken(small(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)))
        skipped = bcosify(model, skip=["1"])
        assert type(skipped[1]) is nn.Conv2d
        assert [module.path for module in skipped.conversion.of("skipped")] == ["1"]
        own = bcosify(model, rules=[Rule((nn.ReLU,), lambda *_arguments: nn.Identity())])
        assert isinstance(own[2], nn.Identity)


class Reading(nn.Module):
    """A network whose image is read by more than a convolution."""

    def __init__(self, forward):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.rest = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        self.with_forward = forward

    def forward(self, x):
        return self.with_forward(self, x)


class Normalizing(nn.Conv2d):
    """A convolution with filters of its own making."""

    def forward(self, input):
        centred = self.weight - self.weight.mean((1, 2, 3), True)
        return F.conv2d(input, centred / self.weight.std((1, 2, 3), keepdim=True), self.bias)


READING = {
    "nothing else": (lambda m, x: m.rest(m.conv(x)), Reading),
    "the mean": (lambda m, x: m.rest(m.conv(x)) + x.mean(), PairedInput),
    "a channel": (lambda m, x: m.rest(m.conv(x) + x[:, -1:]), PairedInput),
    "a flip": (lambda m, x: m.rest(m.conv(x) + m.conv(x.flip(1))), PairedInput),
    "a write": (lambda m, x: m.rest(m.conv(x.sub_(0.5))), PairedInput),
}


class TestWhatWouldBeSilentlyWrong:
    @pytest.mark.parametrize("name", READING)
    def test_who_reads_the_image(self, name):
        forward, kind = READING[name]
        model, x = shaken(Reading(forward)), torch.rand(2, 3, 16, 16)
        converted = bcosify(model, EXACT)
        assert type(converted) is kind
        assert relative(converted(pairs(x)), model(x.clone())) < 1e-5

    def test_several_outputs(self):
        model = shaken(Reading(lambda m, x: {"logits": [m.rest(m.conv(x)), x.mean()]}))
        assert isinstance(bcosify(model, EXACT), PairedInput)

    def test_a_last_layer_of_zeros_hides_nothing(self):
        model = shaken(Reading(lambda m, x: m.rest(m.conv(x) + x[:, -1:])))
        nn.init.zeros_(model.rest[-1].weight)
        assert isinstance(bcosify(model, EXACT), PairedInput)
        model = shaken(Reading(lambda m, x: m.rest(m.conv(x))))
        nn.init.zeros_(model.rest[-1].weight)
        assert isinstance(bcosify(model, EXACT), Reading)

    def test_hooks_of_a_layer_that_a_rule_puts_into_another(self):
        model, x = shaken(small(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1))), torch.rand(2, 3, 16, 16)
        calls = []
        model[2].register_forward_hook(lambda *_: calls.append(None))
        rule = Rule((nn.ReLU,), lambda old, *_: nn.Sequential(old))
        converted = bcosify(model, EXACT, rules=[rule])
        calls.clear()
        converted(pairs(x))
        assert len(calls) == 1

    def test_buffers_that_cannot_be_written(self):
        model = small(nn.Conv2d(3, 8, 3))
        model.register_buffer("wide", torch.zeros(1).expand(4))
        assert isinstance(bcosify(model.eval()), nn.Sequential)

    @pytest.mark.parametrize("skip", [(), ("0",)])
    def test_first_layers_that_no_rule_knows(self, skip):
        first = std_conv.StdConv2d(3, 8, 3) if skip else Normalizing(3, 8, 3)
        model, x = shaken(small(first, nn.Conv2d(8, 8, 1))), torch.rand(2, 3, 16, 16)
        assert relative(bcosify(model, EXACT, skip=skip)(pairs(x)), model(x)) < 1e-5

    def test_hooks_go_with_the_place(self):
        model, x = shaken(small(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))), torch.rand(2, 3, 16, 16)
        seen = []
        model[1].register_forward_pre_hook(lambda _module, inputs: (2 * inputs[0],))
        handle = model[1].register_forward_hook(lambda module, _inputs, _output: seen.append(type(module)))
        bcosify(model, EXACT, inplace=True)
        seen.clear()
        with_hook = model(pairs(x))
        assert seen == [BcosConv2d]
        handle.remove()
        assert torch.equal(model(pairs(x)), with_hook)
        assert seen == [BcosConv2d]

    def test_layers_that_compute_something_else(self):
        class Doubling(nn.Conv2d):
            def _conv_forward(self, input, weight, bias):
                return 2 * super()._conv_forward(input, weight, bias)

        model, x = shaken(small(nn.Conv2d(3, 8, 3), Doubling(8, 8, 3), nn.Conv2d(8, 8, 1))), torch.rand(2, 3, 16, 16)
        model[2].forward = lambda input: 3 * nn.Conv2d.forward(model[2], input)
        converted = bcosify(model, EXACT)
        assert [note.path for note in converted.conversion.modules if note.outcome == "left"] == ["1", "2"]
        assert relative(converted(pairs(x)), model(x)) < 1e-5

    def test_modes(self):
        model = small(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3)).train()
        model[0].eval()
        converted = bcosify(model)
        assert isinstance(converted, PairedInput)
        assert [module.training for module in converted.model.children()][:2] == [False, True]

    def test_dropout_of_attention(self):
        class Tokens(nn.Module):
            def __init__(self, dropout):
                super().__init__()
                self.attend = nn.MultiheadAttention(16, 4, dropout=dropout, batch_first=True)
                self.head = nn.Linear(16, 4)

            def forward(self, x):
                return self.head(self.attend(x, x, x)[0].mean(1))

        x = torch.rand(2, 5, 16)
        for dropout in (0.0, 0.5):
            converted = bcosify(Tokens(dropout), BcosConfig(encode=False), example=x).train()
            assert torch.equal(converted(x), converted(x)) == (dropout == 0)
            assert torch.equal(converted.eval()(x), converted(x))

    def test_attention_without_a_batch(self):
        class Single(nn.Module):
            def __init__(self):
                super().__init__()
                self.attend = nn.MultiheadAttention(8, 2)
                self.head = nn.Linear(8, 3)

            def forward(self, x):
                mask = torch.tensor([False, True, False, False])
                return self.head(torch.stack([self.attend(u, u, u, key_padding_mask=mask)[0].mean(0) for u in x]))

        model, x = shaken(Single()), torch.rand(2, 4, 8)
        converted = bcosify(model, replace(EXACT, encode=False), example=x)
        assert relative(converted(x), model(x)) < 1e-5

    def test_a_classifier_that_is_skipped(self):
        model = timm.create_model("test_resnet").eval()
        converted = bcosify(model, skip=["fc"])
        assert type(converted.fc) is nn.Linear
        assert [note.outcome for note in converted.conversion.modules if note.path == "fc"] == ["skipped"]

    def test_buffers_that_count(self):
        class Counting(nn.Sequential):
            def __init__(self):
                super().__init__(*small(nn.Conv2d(3, 8, 3)))
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, x):
                self.calls += 1
                return super().forward(x)

        assert float(bcosify(Counting().eval()).calls) == 0

    def test_what_norms_know(self):
        model = small(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        model[1].num_batches_tracked += 7
        model[1].bias.requires_grad_(False)
        norm = bcosify(model, EXACT)[1]
        assert (int(norm.num_batches_tracked), norm.bias.requires_grad) == (7, False)

    def test_biases_of_projections(self):
        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.qkv, self.mix = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)

            def forward(self, x):
                return self.mix(self.qkv(x)).mean((2, 3))

        converted = bcosify(Named().eval(), BcosConfig(projections="linear", biases="drop"))
        assert not [name for name, _ in converted.named_parameters() if name.endswith("bias")]

    @pytest.mark.parametrize("name", ["levit_128s", "mobilenetv4_hybrid_medium"])
    def test_projections_with_a_norm_or_a_convolution_around_them(self, name):
        model = timm.create_model(name).eval()
        within = re.compile(r"(^|[.])(qkv|kv|q|query|key|value)[.]")
        paths = {
            path
            for path, layer in model.named_modules()
            if within.search(path) and isinstance(layer, (nn.Conv2d, nn.Linear))
        }
        for projections in ("linear", "bcos"):
            report = bcosify(model, BcosConfig(projections=projections)).conversion
            replaced = {module.path for module in report.of("replaced")}
            assert len(paths) > 5
            assert paths & replaced == (paths if projections == "bcos" else set())

    def test_names_that_only_begin_like_those_of_projections(self):
        model = nn.Sequential()
        model.add_module("keys_of_houses", nn.Conv2d(3, 8, 3))
        model.add_module("value_head", nn.Conv2d(8, 8, 1))
        report = bcosify(model.append(nn.Flatten()).eval()).conversion
        assert {module.path for module in report.of("replaced")} == {"keys_of_houses", "value_head"}

    def test_weights_of_attention_are_no_products(self):
        class Tokens(nn.Module):
            def __init__(self):
                super().__init__()
                self.attend = nn.MultiheadAttention(16, 4, batch_first=True)

            def forward(self, x):
                return self.attend(x, x, x)[0].mean(1)

        x = torch.rand(2, 5, 16)
        converted = bcosify(Tokens().eval(), BcosConfig(encode=False), example=x)
        expected = bcoskit.explain(converted, x)
        assert torch.equal(bcoskit.explain(converted, x, products="error").weights, expected.weights)
        weights = converted.attend(x, x, x)[1]
        assert weights.sum(-1).allclose(torch.ones(2, 5))
        assert torch.autograd.grad(weights.square().sum(), converted.attend.in_proj_weight)[0].abs().max() > 0

    @pytest.mark.parametrize("way", ["linear", "convolution", "attention"])
    def test_weights_that_the_network_uses_itself_are_not_repeated(self, way):
        class Using(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
                self.attend = nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True)
                self.head = nn.Linear(8, 4, bias=False)

            def forward(self, x):
                x = self.stem(x)
                x = F.conv2d(x, self.conv.weight) if way == "convolution" else self.conv(x)
                tokens = x.flatten(2).mT
                x = (self.attend(tokens, tokens, tokens)[0] if way == "attention" else tokens).mean(1)
                return F.linear(F.normalize(x), F.normalize(self.head.weight)) if way == "linear" else self.head(x)

        converted = bcosify(Using().eval(), BcosConfig.preset("v1"), example=torch.rand(1, 3, 12, 12))
        assert converted(torch.rand(2, 6, 12, 12)).shape == (2, 4)
        bypassed = {module.path for module in converted.conversion.of("bypassed")}
        assert {"linear": "head", "convolution": "conv", "attention": "attend.out_proj"}[way] in bypassed
        assert len(converted.stem.layer.weight) == 2 * 8

    @pytest.mark.parametrize("config", [BcosConfig(), BcosConfig.preset("v1")], ids=["b = 2", "v1"])
    def test_networks_that_write_to_what_a_layer_gives_can_be_trained(self, config):
        class Writing(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

            def forward(self, x):
                x = self.second(F.relu(self.first(x), inplace=True))
                x += 1
                x[:, 0] = 0
                return self.head(F.relu_(x).mean((2, 3)))

        ordinary = Writing()
        converted = bcosify(ordinary, config).train()
        x = torch.rand(2, 6, 12, 12)
        converted(x).square().sum().backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in converted.parameters())
        assert not any(module._forward_hooks for module in ordinary.modules())
        again = pickle.loads(pickle.dumps(converted.second))
        assert torch.equal(again(converted.first(x)), converted.second(converted.first(x)))
        assert bcoskit.audit(converted.eval(), x).passed

    def test_an_exact_start_by_exponent_and_biases_alone(self):
        model = shaken(timm.create_model("resnet10t"))
        images = torch.rand(2, 3, 64, 64)
        exact = bcosify(model, BcosConfig(b=1, biases="keep"))
        assert relative(exact(pairs(images)), model(normalized(model, images))) < 1e-5
        averaged = bcosify(model, BcosConfig(b=1, biases="keep", max_pool="average"))
        assert relative(averaged(pairs(images)), model(normalized(model, images))) > 1e-3

    def test_modules_that_cut_the_image_up_themselves(self):
        model = create_model("simple_vit_ti_patch16_224.standard_v2_in1k", num_classes=4)
        images = torch.rand(2, 3, 32, 48)
        mean, std = (torch.tensor(value)[:, None, None] for value in (model.transform.mean, model.transform.std))
        nn.init.normal_(model.head.weight)
        exact = bcosify(model, EXACT)
        assert isinstance(exact, type(model))
        assert exact.patch_embed.proj.weight.shape == (192, 16 * 16 * 6)
        assert relative(exact(pairs(images)), model((images - mean) / std)) < 1e-5
        skipped = bcosify(model, EXACT, skip=["patch_embed.proj"])
        assert isinstance(skipped, PairedInput)
        assert relative(skipped(pairs(images)), model((images - mean) / std)) < 1e-5

    def test_networks_without_values(self):
        with torch.device("meta"):
            model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        with pytest.raises(ValueError, match="'0' is on the device 'meta'"):
            bcosify(model)

    def test_norms_of_single_images(self):
        model = small(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.Tanh())
        converted = bcosify(model)
        assert converted[1].bias is None
        assert converted[1].weight is not None
        assert [module.path for module in converted.conversion.of("kept") if module.kind == "Tanh"] == ["2"]


class TestReport:
    def test_what_is_bypassed(self):
        report = bcosify(shaken(Bypassing())).conversion
        assert [module.path for module in report.of("bypassed")] == ["mix"]
        assert "stays linear" in str(report)

    def test_what_is_called_and_used_without_a_call(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.words, self.twice, self.once = nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 8)

            def forward(self, x):
                x = self.once(F.linear(self.twice(self.words(x)), self.twice.weight))
                return F.linear(x.mean(1), self.words.weight)

        report = bcosify(Tied().eval(), BcosConfig(encode=False), example=torch.randint(5, (2, 4))).conversion
        assert sorted(module.path for module in report.of("bypassed")) == ["twice", "words"]
        assert [module.path for module in report.of("replaced")] == ["once"]

    def test_what_is_called_in_training_alone(self):
        class Auxiliary(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.head, self.aux = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Linear(8, 4)

            def forward(self, x):
                x = self.conv(x).mean((2, 3))
                return (self.head(x), self.aux(x)) if self.training else self.head(x)

        report = bcosify(Auxiliary()).conversion
        assert not report.of("bypassed")
        assert [module.path for module in report.of("replaced") if "not called" in module.detail] == ["aux"]

    def test_what_is_left(self):
        model = WithOwn()
        model(torch.rand(1, 3, 32, 32))
        report = bcosify(model.eval(), example=torch.rand(1, 3, 32, 32)).conversion
        assert [(module.path, module.outcome) for module in report.modules if module.kind == "OwnForward"] == [
            ("1", "left")
        ]

    def test_the_table(self):
        text = str(bcosify(timm.create_model("test_resnet")).conversion)
        assert "BcosConv2d" in text
        assert "classifies positions" in text
        assert "reads 6 channels" in text


def scripted(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch advise against it
        return torch.jit.script(module)


class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "options", "message"),
        [
            (lambda: bcosify(small(nn.Conv2d(3, 8, 3))), {}, "B-cos layer already"),
            (lambda: small(parametrizations.weight_norm(nn.Conv2d(3, 8, 3))), {}, "remove the parametrisation"),
            (lambda: small(nn.utils.spectral_norm(nn.Conv2d(3, 8, 3))), {}, "makes its weight anew"),
            (lambda: small(prune.identity(nn.Conv2d(3, 8, 3), "weight")), {}, "makes its weight anew"),
            (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), {}, "no weights yet"),
            (lambda: small(scripted(nn.ReLU())), {}, "is a compiled script"),
            (lambda: scripted(nn.Conv2d(3, 8, 3)), {}, "is a compiled script"),
            (lambda: small(nn.Conv2d(3, 8, 3)), {"example": torch.rand(3)}, "must be samples"),
            (lambda: nn.Sequential(nn.ReLU()), {}, "no module that a rule converts"),
            (lambda: nn.Sequential(nn.Linear(5, 3)), {}, "give an `example`"),
            (lambda: small(nn.Conv2d(3, 8, 3)), {"skip": ["nothing.*"]}, "names no module"),
            (lambda: small(nn.Conv2d(3, 8, 3)), {"example": torch.rand(1, 4, 9, 9)}, "is no input of the network"),
            (
                lambda: small(nn.Conv2d(3, 8, 3)),
                {"config": BcosConfig(mean=(0.5,), std=(0.5,))},
                "must have one value for each",
            ),
        ],
    )
    def test_values(self, make, options, message):
        model = make()
        text = str(model)
        with pytest.raises(ValueError, match=message):
            bcosify(model, inplace=True, **options)
        assert str(model) == text

    def test_what_is_no_module(self):
        with pytest.raises(TypeError, match="`model`"):
            bcosify(torch.relu)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("config", "exact"),
            ("rules", [nn.Conv2d]),
            ("rules", Rule((nn.ReLU,), lambda *_: "as it is")),
            ("skip", "10"),
            ("example", (1, 3)),
        ],
    )
    def test_types(self, name, value):
        with pytest.raises(TypeError, match=f"`{name}`"):
            bcosify(small(nn.Conv2d(3, 8, 3)), **{name: value})

    def test_a_rule_that_makes_nothing(self):
        with pytest.raises(TypeError, match="must return a module, or the reason"):
            bcosify(small(nn.Conv2d(3, 8, 3)), rules=[Rule((nn.ReLU,), lambda *_: None)])

    def test_what_cannot_be_copied(self):
        model = small(prune.l1_unstructured(nn.Conv2d(3, 8, 3), "weight", 0.3))
        with pytest.raises(ValueError, match="makes its weight anew"):
            bcosify(model)
        model = small(nn.Conv2d(3, 8, 3))
        model.kept = 2 * model[0].weight
        with pytest.raises(ValueError, match="cannot be copied"):
            bcosify(model)

    @pytest.mark.parametrize(
        "options",
        [
            {"b": 0.5},
            {"b": float("nan")},
            {"max_out": 0},
            {"biases": "some"},
            {"logit_bias": "large"},
            {"temperature": 0},
            {"mean": (0.5,)},
            {"mean": (0.5,), "std": (0.0,)},
            {"encode": False, "mean": (0.5,), "std": (1.0,)},
        ],
    )
    def test_configurations(self, options):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}`|`std`|`mean`"):
            BcosConfig(**options)
        with pytest.raises(ValueError, match="bcosification"):
            BcosConfig.preset("v3")

    @pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Hardswish])
    def test_activations_that_write_to_their_input_can_be_trained(self, activation):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), activation(inplace=True), nn.Conv2d(8, 4, 3)).eval()
        converted = bcosify(model, BcosConfig.preset("bcosification")).train()
        (writing,) = (module for module in converted.modules() if isinstance(module, activation))
        x = pairs(torch.rand(2, 3, 8, 8))
        converted(x).sum().backward()
        assert all(parameter.grad is not None for parameter in converted.parameters())
        assert model[1].inplace
        writing.inplace = True
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            converted(x).sum().backward()

    def test_a_failure_in_place_changes_nothing(self):
        model = shaken(timm.create_model("test_resnet"))
        text, state = str(model), copy.deepcopy(model.state_dict())

        def fail(module, _config, path):
            if path.startswith("layer3"):
                raise RuntimeError("on purpose")
            return nn.Identity()

        with pytest.raises(RuntimeError, match="on purpose"):
            bcosify(model, rules=[Rule((nn.ReLU,), fail)], inplace=True)
        assert str(model) == text
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class TestSetB:
    def test_values(self):
        model = shaken(Attending())
        x = pairs(torch.rand(2, 3, 32, 32))
        config = BcosConfig(b=1, biases="keep", norms="keep")
        gradual = bcosify(model, config)
        with torch.no_grad():
            at_two = set_b(gradual, 2.0)(x)
            torch.testing.assert_close(at_two, bcosify(model, BcosConfig(biases="keep", norms="keep"))(x))
            learnable = bcosify(model, BcosConfig(b=1, learnable_b=True, biases="keep", norms="keep"))
            assert all(float(layer.b) == 1.5 for layer in set_b(learnable, 1.5).modules() if hasattr(layer, "b"))

    def test_refusals(self):
        with pytest.raises(ValueError, match="`b`"):
            set_b(bcosify(small(nn.Conv2d(3, 8, 3))), 0.5)
        with pytest.raises(ValueError, match="no B-cos layer"):
            set_b(nn.ReLU(), 2.0)


def transposed_by_hand(x, weight, groups, stride, padding, b):
    """Every output as the sum over what the kernel lays on it, in float64."""
    rows = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    norms = rows.flatten(1).norm(dim=1)
    y = F.conv_transpose2d(x, weight, None, stride, padding, 0, groups) / norms[:, None, None]
    energy = x.square().unflatten(1, (groups, -1)).sum(2)
    ones = torch.ones(1, 1, *weight.shape[2:], dtype=x.dtype)
    per_group = [F.conv_transpose2d(energy[:, [index]], ones, None, stride, padding) for index in range(groups)]
    patch = torch.cat(per_group, 1).add(1e-6).sqrt().repeat_interleave(len(rows) // groups, 1)
    return y * (y / patch).abs() ** (b - 1)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("b", [1, 2])
def test_transposed_convolution(groups, b):
    torch.manual_seed(0)
    layer = BcosConvTranspose2d(4, 6, 3, 2, 1, groups=groups, b=b).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    expected = transposed_by_hand(x, layer.weight, groups, 2, 1, b)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer(x[0]), expected[0], rtol=1e-9, atol=1e-12)
    assert layer(x, output_size=[10, 12]).shape == (2, 6, 10, 12)
    assert "b=" in repr(layer)


def test_linear_layers_between():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4))
    converted = bcosify(model, BcosConfig(encode=False))
    assert isinstance(converted[1], BcosLinear)


class Pooled(nn.Module):
    """A convolution, a pool over all positions, and a classifier that may have a second name."""

    def __init__(self, pool, head=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.pool = pool
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(8, 5)
        self.classifier = nn.Sequential(nn.Dropout(), self.fc) if head is None else head

    def forward(self, x):
        return self.classifier(self.flatten(self.pool(self.conv(x))))


class TestConstantsOfLogits:
    @pytest.mark.parametrize("classifier", ["keep", "before pooling"])
    def test_a_classifier_of_two_names(self, classifier):
        model = shaken(Pooled(nn.AdaptiveAvgPool2d(1)))
        config = replace(EXACT, logit_bias=-3.0, temperature=2.0, classifier=classifier)
        converted = bcosify(model, config)
        x = torch.rand(2, 3, 32, 32)
        assert relative(converted(pairs(x)), model(x) / 2 - 3) < 1e-5
        assert converted.fc is converted.classifier[1]

    def test_logits_of_no_linear_layer(self):
        model = shaken(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
        report = bcosify(model, BcosConfig.preset("bcosification")).conversion
        assert [module.detail for module in report.modules if module.kind == "logits"] == [
            "without a bias: they are not seen to come from a linear layer"
        ]
        assert not any(module.kind == "logits" for module in bcosify(model).conversion.modules)
        for name, value in {"logit_bias": 0.5, "temperature": 2.0}.items():
            with pytest.raises(ValueError, match=rf"`{name}` \(={value}\)"):
                bcosify(model, BcosConfig(**{name: value}))


def test_a_classifier_of_zeros_is_moved_as_another_one():
    for pool, moved in {nn.AdaptiveMaxPool2d(1): False, nn.AdaptiveAvgPool2d(1): True}.items():
        for zeros in (True, False):
            model = Pooled(pool, nn.Identity())
            model.classifier = model.fc
            del model.fc
            if zeros:
                nn.init.zeros_(model.classifier.weight)
                nn.init.zeros_(model.classifier.bias)
            before = copy.deepcopy(model.state_dict())
            converted = bcosify(model.eval())
            assert bool(converted.conversion.of("changed")[0].kind == "classifier") == moved
            assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
            assert not zeros or not converted(pairs(torch.rand(1, 3, 16, 16))).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_makes_no_other_network(dtype):
    model = nn.Sequential()
    model.conv, model.pool, model.flatten = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model.fc = nn.Linear(8, 5)
    usual = bcosify(model.eval()).state_dict()
    half = bcosify(copy.deepcopy(model).to(dtype)).state_dict()
    assert half.keys() == usual.keys()
    assert "fc.conv.weight" in usual
    assert all(half[key].dtype == dtype for key in half)


class TestPatterns:
    def test_of_generators(self):
        model = small(nn.Conv2d(3, 8, 3))
        path = next(path for path, module in model.named_modules() if isinstance(module, nn.Linear))
        converted = bcosify(model, skip=(each for each in [path]))
        assert type(converted.get_submodule(path)) is nn.Linear
        assert converted.conversion.skip == (path,)
        own = Rule((nn.Linear,), lambda *_: "is known to be fine")
        converted = bcosify(model, rules=(rule for rule in [own]))
        assert {module.outcome for module in converted.conversion.modules if module.path == path} == {"kept"}
        assert converted.conversion.has_own_rules


class TestWhatIsNoLayerOfTorch:
    def test_activations(self):
        class Squared(nn.ReLU):
            def forward(self, x):
                return x * x

        model = nn.Sequential(nn.Conv2d(3, 8, 3), Squared(), nn.ReLU())
        converted = bcosify(model, BcosConfig(activations="drop"))
        assert [type(module) for module in converted[1:]] == [Squared, nn.Identity]
        assert [module.path for module in converted.conversion.of("left")] == ["1"]

    def test_an_object_with_a_way_of_its_own(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
        layer = model[1]
        layer._conv_forward = lambda x, weight, bias: 2 * F.conv2d(x, weight, bias)
        converted = bcosify(model, EXACT, inplace=True)
        assert type(converted[1]) is nn.Conv2d
        assert [module.path for module in converted.conversion.of("left")] == ["1"]

    def test_values_that_are_no_parameters(self):
        from torchvision.ops import FrozenBatchNorm2d

        model = nn.Sequential(nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8))
        assert [module.path for module in bcosify(model).conversion.of("left")] == ["1"]

    def test_norms_of_all_processes_stay_so(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SyncBatchNorm(8), nn.BatchNorm2d(8))
        assert [norm.synchronized for norm in bcosify(model.eval())[1:]] == [True, False]


@dataclass
class Scores:
    scores: torch.Tensor


class Opaque:
    def __init__(self, scores):
        self.scores = scores


class TestOutputsThatAreObjects:
    @pytest.mark.parametrize("kind", [Scores, Opaque])
    def test_who_reads_the_image_is_seen_by_what_is_in_them(self, kind):
        class Reading(nn.Module):
            def __init__(self, reads):
                super().__init__()
                self.conv, self.head, self.reads = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), reads

            def forward(self, x):
                scores = self.head(self.conv(x).relu().mean((2, 3)))
                return kind(scores * x.mean((1, 2, 3))[:, None] if self.reads else scores)

        x = torch.rand(2, 3, 16, 16)
        for reads in (True, False):
            model = Reading(reads).eval()
            converted = bcosify(model, EXACT)
            assert isinstance(converted, PairedInput) == (reads or kind is Opaque)
            assert relative(converted(pairs(x)).scores, model(x).scores) < 1e-6


class TestPairedInput:
    def test_arguments_of_the_network(self):
        class Masked(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(192, 4)

            def forward(self, pixels, mask=None, *, scale=1.0):
                pixels = pixels if mask is None else pixels * mask
                return scale * self.linear(pixels.flatten(1))

        model, x = Masked().eval(), torch.rand(2, 3, 8, 8)
        converted, mask = bcosify(model, EXACT, example=x), torch.rand(8, 8)
        assert isinstance(converted, PairedInput)
        expected = model(x, mask, scale=2.0)
        for given in (
            converted(pairs(x), mask, scale=2.0),
            converted(pixels=pairs(x), mask=mask, scale=2.0),
            converted(x=pairs(x), mask=mask, scale=2.0),
        ):
            assert relative(given, expected) < 1e-6
        with pytest.raises(TypeError, match="`pixels` is missing"):
            converted(mask=mask)


class TestWhatIsNoUsualNetwork:
    def test_one_layer(self):
        linear, x = nn.Linear(8, 3), torch.rand(2, 8)
        converted = bcosify(linear, replace(EXACT, encode=False), example=x)
        assert isinstance(converted, BcosLinear)
        assert relative(converted(x), linear(x)) < 1e-6
        conv, image = nn.Conv2d(3, 4, 3), torch.rand(1, 3, 8, 8)
        assert relative(bcosify(conv, EXACT)(pairs(image)), conv(image)) < 1e-6

    def test_a_first_layer_that_is_skipped(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).eval()
        converted, x = bcosify(model, EXACT, skip=["0"], example=torch.rand(1, 3, 8, 8)), torch.rand(2, 3, 8, 8)
        assert isinstance(converted, PairedInput)
        assert type(converted.model[0]) is nn.Conv2d
        assert relative(converted(pairs(x)), model(x)) < 1e-6

    def test_layers_in_a_map(self):
        class Mapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(8, 3)

            def forward(self, x):
                return torch.vmap(self.linear)(x)

        model, x = Mapped().eval(), torch.rand(2, 8)
        assert relative(bcosify(model, replace(EXACT, encode=False), example=x)(x), model(x)) < 1e-6

    def test_lazy_layers(self):
        model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3)).eval()
        with pytest.raises(ValueError, match="the lazy module '0' has no weights yet"):
            bcosify(model)
        with pytest.raises(ValueError, match="the lazy module '0' has no weights yet"):
            bcoskit.audit(model, torch.rand(2, 8))

    def test_two_inputs(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3)

            def forward(self, a, b):
                return self.conv(a + b)

        with pytest.raises(ValueError, match="missing 1 required positional argument: 'b'"):
            bcosify(Two())

    def test_a_size_that_was_asked_for(self):
        model = shaken(timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), num_heads=(3, 3)))
        x = torch.rand(1, 3, 56, 56)
        assert relative(bcosify(model, EXACT)(pairs(x)), model(normalized(model, x))) < 1e-5


class TestLayersThatAreNotCalled:
    def test_behind_another_input(self):
        class Own(Bypassing):
            def forward(self, x):
                return super().forward((x - 0.5) / 0.25)

        converted = bcosify(shaken(Own()))
        assert isinstance(converted, PairedInput)
        assert [module.path for module in converted.conversion.of("bypassed")] == ["mix"]

    def test_a_list_that_is_no_module(self):
        class Listed(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
                self.layers = [self.a, self.b]

            def forward(self, x):
                for layer in self.layers:
                    x = layer(x)
                return x.mean((2, 3))

        with pytest.raises(ValueError, match=r"plain list, where `nn\.ModuleList`"):
            bcosify(Listed())


def test_hooks_of_attention_can_be_removed():
    model = Attending().eval()
    attention = model.encoder.layers[0].self_attn
    calls = []
    handle = attention.register_forward_hook(lambda *_: calls.append(1))
    converted = bcosify(model, inplace=True)
    calls.clear()
    converted(pairs(torch.rand(1, 3, 32, 32)))
    assert calls == [1]
    handle.remove()
    converted(pairs(torch.rand(1, 3, 32, 32)))
    assert calls == [1]


class TestWrongArguments:
    def test_of_the_configuration(self):
        with pytest.raises(ValueError, match=r"`mean` \(=0\.5\) must be a tuple"):
            BcosConfig(mean=0.5, std=0.5)
        with pytest.raises(ValueError, match="as a number of Python"):
            BcosConfig(b=torch.tensor(2.0))
        with pytest.raises(TypeError, match="`kinds`"):
            Rule([nn.Conv2d], lambda *_: "stays")

    def test_tokens_as_an_image(self):
        model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4))
        tokens = torch.zeros(1, 5, dtype=torch.long)
        with pytest.raises(ValueError, match=r"torch\.int64 is no image: give `encode=False`"):
            bcosify(model, example=tokens)
        assert isinstance(bcosify(model, BcosConfig(encode=False), example=tokens)[1], BcosLinear)

    def test_a_bias_that_is_pruned(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        prune.random_unstructured(model[0], "bias", 1)
        with pytest.raises(ValueError, match="makes its weight anew"):
            bcosify(model, inplace=True)
        with pytest.raises(TypeError, match="`skip`"):
            bcosify(model, skip=5)
        with pytest.raises(TypeError, match="`rules`"):
            bcosify(model, rules=5)
