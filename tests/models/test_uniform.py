"""What every network by name has: stages, heads, channels, sizes, copies, training."""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bcoskit
from bcoskit.models import create_model, list_models, model_row

# One of each family.
NAMES = [
    "resnet18.bcos_v2_in1k",
    "resnet18.bcos_v1_in1k",
    "resnet18.bcosification_in1k",
    "densenet121.bcos_v2_in1k",
    "densenet121.bcosification_in1k",
    "convnext_atto.bcos_v2_pn_in1k",
    "inception_v3.bcos_v1_in1k",
    "simple_vit_ti_patch16_224.bcos_v2_in1k",
    "simple_vit_ti_patch16_224.standard_v2_in1k",
    "vitc_ti_patch1_14.bcosification_in1k",
    "clip_resnet50.bcosification_in1k",
    "cnn9.bcos_v1_b1_5_cifar10",
    "resnet20.bcos_v2_gnu_linear_cifar10",
    "resnet20.standard_cifar10",
]
PHOTOGRAPH = Path(bcoskit.__file__).parent / "assets" / "photographs" / "cat.jpg"
TRANSFORMERS = [name for name in NAMES if "vit" in name]


def alive(name, **options):
    """A network whose norms are set so that the signal does not die out, with another constant for each bias."""
    torch.manual_seed(0)
    model = create_model(name, **options)
    running = [module for module in model.modules() if getattr(module, "running_var", None) is not None]
    for module in running:
        module.momentum = 1.0
    if running:
        with torch.no_grad():
            model.train()(inputs(model, 4))
    return model.eval()


def inputs(model, count=2, size=None):
    size = size or ((144, 160) if model.name.startswith("inception") else (96, 112))
    encoded = model.transform.encoding == "bcos"
    images = torch.rand(count, model.transform.channels, *size, generator=torch.Generator().manual_seed(1))
    return bcoskit.encode(images) if encoded else images


def saved(model, folder):
    bcoskit.save_model(model, folder / "x.safetensors")
    return folder / "x.safetensors"


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return alive(request.param)


class TestUse:
    def test_attributes(self, model):
        row = model_row(model.name)
        assert (model.transform, model.classes, model.loss) == (row.transform, row.classes, row.loss)
        assert model.num_classes == len(model.classes) == row.num_classes
        assert not any(module.training for module in model.modules())

    def test_features_and_head(self, model):
        x = inputs(model)
        with torch.no_grad():
            assert torch.equal(model.forward_head(model.forward_features(x)), model(x))

    def test_stages(self, model):
        x = inputs(model)
        before = {name: len(module._forward_hooks) for name, module in model.named_modules()}
        with torch.no_grad():
            stages = model.forward_stages(x)
            assert tuple(stages) == model.stage_names == tuple(info["module"] for info in model.feature_info)
            for info, output in zip(model.feature_info, stages.values(), strict=True):
                assert output.shape[2 if model.name in TRANSFORMERS else 1] == info["num_chs"]
            last = next(reversed(stages.values()))
            if model.name not in TRANSFORMERS:
                torch.testing.assert_close(last, model.forward_features(x))
        assert before == {name: len(module._forward_hooks) for name, module in model.named_modules()}
        first = stages[model.stage_names[0]][0]
        largest = tuple(int(index) for index in torch.unravel_index(first.argmax(), first.shape))
        e = bcoskit.explain(model, x[:1], to_layer=model.stage_names[0], target=largest)
        torch.testing.assert_close(e.value[0], first.max())
        assert bool(e.weights.any())

    def test_completeness(self, model):
        # Of a float64 copy, since the fixture is shared.
        network = copy.deepcopy(model).double()
        e = bcoskit.explain(network, inputs(model).double(), shares=True)
        assert float(e.residual.abs().max()) < 1e-10
        single = bcoskit.explain(model, inputs(model), shares=True)
        assert float(single.residual.abs().max()) < 1e-5
        assert bool(e.weights.any())

    def test_copies(self, model, tmp_path):
        x = inputs(model)
        whole = io.BytesIO()
        torch.save(model, whole)
        whole.seek(0)
        with torch.no_grad():
            expected = model(x)
            for other in (copy.deepcopy(model), torch.load(whole, weights_only=False)):
                assert torch.equal(other(x), expected)
                assert other.classes == model.classes
            assert torch.equal(create_model(model.name, weights=saved(model, tmp_path))(x), expected)

    def test_cut(self, model):
        before = [name for name, _ in model.named_modules()]
        with pytest.raises(NotImplementedError, match="cannot be cut"):
            model.prune_intermediate_layers([1])
        assert before == [name for name, _ in model.named_modules()]
        assert model.get_classifier() is model.get_submodule(model.get_classifier(name_only=True))

    def test_before_the_classifier(self, model):
        with torch.no_grad():
            features = model.forward_head(model.forward_features(inputs(model)), pre_logits=True)
        assert len(features) == 2
        assert model.num_features in features.shape[1:]


class TestClasses:
    @pytest.mark.parametrize("name", NAMES)
    def test_number(self, name):
        model = create_model(name, num_classes=3)
        assert model.classes == ("0", "1", "2")
        with torch.no_grad():
            assert model(inputs(model)).shape == (2, 3)

    @pytest.mark.parametrize("name", NAMES)
    def test_reset(self, name):
        model = create_model(name)
        other = {key: value for key, value in model.state_dict().items() if not key.startswith(model.classifier_path)}
        model.reset_classifier(5)
        with torch.no_grad():
            assert model(inputs(model)).shape == (2, 5)
        assert (model.num_classes, model.classes) == (5, ("0", "1", "2", "3", "4"))
        state = model.state_dict()
        assert all(
            value is state[key] or torch.equal(value, state[key])
            for key, value in other.items()
            if "AuxLogits" not in key
        )
        fresh = [module for module in model.modules() if isinstance(module, bcoskit.nn.LogitLayer)]
        constants = {module.bias for module in fresh if module.bias}
        expected = [
            module.bias
            for module in create_model(name, num_classes=5).modules()
            if isinstance(module, bcoskit.nn.LogitLayer) and module.bias
        ]
        assert constants == set(expected)

    def test_refusals(self):
        model = create_model(NAMES[-3])
        with pytest.raises(ValueError, match=r"`num_classes` \(=0\) must be an integer of at least 1"):
            model.reset_classifier(0)
        with pytest.raises(ValueError, match=r"`global_pool` \(='avg'\) must be None"):
            model.reset_classifier(3, "avg")
        with pytest.raises(ValueError, match=r"`num_classes` \(=0\)"):
            create_model(NAMES[-3], num_classes=0)


class TestInputs:
    @pytest.mark.parametrize("name", NAMES)
    def test_grey(self, name, tmp_path):
        row = model_row(name)
        channels = row.in_channels // 3
        model = create_model(name, in_channels=channels)
        assert model.transform.channels == 1
        picture = model.transform(bcoskit.read_image(PHOTOGRAPH))
        assert picture.shape == (channels, row.transform.size, row.transform.size)
        with torch.no_grad():
            assert model(inputs(model)).shape == (2, row.num_classes)
        # The file knows it.
        opened = create_model(saved(model, tmp_path))
        assert opened.in_chans == channels

    def test_refusal(self):
        with pytest.raises(ValueError, match=r"`in_channels` \(=3\) must be 6 for RGB or 2 for grey images"):
            create_model(NAMES[0], in_channels=3)

    @pytest.mark.parametrize("size", [(97, 83), (96, 160)])
    @pytest.mark.parametrize("name", [name for name in NAMES if name not in TRANSFORMERS])
    def test_any_size(self, name, size):
        model = create_model(name)
        with torch.no_grad():
            logits = model(inputs(model, size=size))
        assert logits.shape == (2, model.num_classes)
        assert bool(logits.isfinite().all())

    @pytest.mark.parametrize("name", TRANSFORMERS)
    def test_grids_of_transformers(self, name):
        model = create_model(name)
        with torch.no_grad():
            assert model(inputs(model, size=(64, 160))).shape == (2, 1000)
        if name.startswith("simple"):
            with pytest.raises(ValueError, match="97x83 pixels must have sides that are multiples of 16"):
                model(inputs(model, size=(97, 83)))

    def test_maps_of_transformers_at_sides_that_strides_round_up(self):
        model = create_model("vitc_ti_patch1_14.bcos_v2_in1k", num_classes=3)
        x = inputs(model, size=(33, 47))
        with torch.no_grad():
            (maps,) = model.forward_intermediates(x, [-1], intermediates_only=True)
            tokens = list(model.forward_stages(x).values())[-1]
        assert maps.shape == (len(x), 192, 3, 3)
        assert torch.equal(maps.flatten(2).mT, tokens)

    def test_positions(self):
        # The table, entry by entry.
        module = create_model(TRANSFORMERS[0]).pos_embed
        table = module(torch.zeros(1, 3, 5, 192, dtype=torch.float64))[0]
        for i, j, m in ((0, 0, 0), (2, 4, 3), (1, 3, 47)):
            omega = 10_000 ** (-m / 47)
            position = torch.tensor([j * omega, i * omega])
            expected = torch.cat([position.sin(), position.cos()])[[0, 2, 1, 3]].double()
            torch.testing.assert_close(table[i, j, m::48], expected, rtol=1e-6, atol=1e-6)


class TestTraining:
    @pytest.mark.parametrize("name", NAMES)
    def test_every_weight_learns(self, name):
        model = alive(name).train()
        if name.startswith("inception"):
            with pytest.raises(ValueError, match="144x160 pixels is too small to train on: 299 are needed"):
                model(inputs(model))
        outputs = model(inputs(model, size=(299, 299) if name.startswith("inception") else None))
        loss = sum(output.square().mean() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))
        loss.backward()
        without = [key for key, value in model.named_parameters() if value.grad is None]
        assert not without

    def test_the_auxiliary_classifier(self):
        model = alive("inception_v3.bcos_v1_in1k", num_classes=4)
        x = inputs(model, size=(299, 310))
        with torch.no_grad():
            logits = model(x)
            outputs = model.train()(x)
        assert torch.equal(outputs.logits, logits)
        assert outputs.aux_logits.shape == (2, 4)
        # After Mixed_6e: average, two convolutions, and a classifier without temperature and constant.
        with torch.no_grad():
            maps = nn.functional.avg_pool2d(model.eval().forward_stages(x)["Mixed_6e"], 5, 3)
            head = model.AuxLogits
            expected = head.fc.conv(head.conv1.conv(head.conv0.conv(maps))).mean((2, 3))
        torch.testing.assert_close(outputs.aux_logits, expected)

    def test_the_first_paper_has_no_groups(self):
        with torch.device("meta"):
            model = model_row("resnext50_32x4d.bcos_v1_in1k").build()
        convolutions = [module for module in model.modules() if isinstance(module, bcoskit.nn.BcosConv2d)]
        assert {module.groups for module in convolutions} == {1}
        assert model.layer1[0].conv2.weight.shape == (256, 128, 3, 3)

    def test_stochastic_depth(self):
        # Rising from 0 to that of the last block.
        model = create_model("resnet50.bcos_v2_long_in1k")
        rates = [
            getattr(block.drop_path, "drop_prob", 0.0) or 0.0
            for stage in (model.layer1, model.layer2, model.layer3, model.layer4)
            for block in stage
        ]
        assert rates == pytest.approx([0.1 * index / 15 for index in range(16)])
        assert not [module for module in create_model("resnet50.bcos_v2_in1k").modules() if "Drop" in str(type(module))]

    @pytest.mark.parametrize(
        ("name", "path", "spread"),
        [
            ("resnet18.bcos_v2_in1k", "layer2.0.conv1", (2 / (128 * 9)) ** 0.5),
            ("densenet121.bcos_v2_in1k", "features.denseblock1.denselayer1.conv2", (2 / (128 * 9)) ** 0.5),
            ("convnext_atto.bcos_v2_pn_in1k", "stages.1.blocks.0.mlp.fc1", 0.02),
            ("inception_v3.bcos_v1_in1k", "Mixed_6b.branch1x1.conv", 0.088),
            ("simple_vit_ti_patch16_224.bcos_v2_in1k", "blocks.0.mlp.fc1", (1 / (3 * 192)) ** 0.5),
        ],
    )
    def test_fresh_weights(self, name, path, spread):
        torch.manual_seed(0)
        first, second = create_model(name).state_dict(), create_model(name).state_dict()
        assert float(first[f"{path}.weight"].std()) == pytest.approx(spread, rel=0.05)
        assert not torch.equal(first[f"{path}.weight"], second[f"{path}.weight"])
        assert all(bool(value.isfinite().all()) for value in first.values())
        if name.startswith("convnext"):
            assert bool((first["stages.0.blocks.0.gamma"] == 1e-6).all())


class TestPlaces:
    def test_default_device_and_dtype(self):
        with torch.device("meta"):
            assert next(create_model(NAMES[-3]).parameters()).is_meta
        torch.set_default_dtype(torch.float64)
        try:
            model = create_model(NAMES[-3])
        finally:
            torch.set_default_dtype(torch.float32)
        assert model.head.conv.weight.dtype == torch.float64

    @pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs the peak of memory to be reset")
    def test_no_second_copy_of_the_weights(self):
        code = """
from pathlib import Path
import bcoskit

def peak():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

bcoskit.create_model("vgg11_bnu.bcos_v2_in1k", num_classes=2)
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = peak()
model = bcoskit.create_model("vgg11_bnu.bcos_v2_in1k")
print((peak() - before) / sum(value.nbytes for value in model.state_dict().values()))
"""
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert 0.5 < float(printed) < 1.1


def test_all_names_of_the_papers():
    names = set(list_models())
    resnets = [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)]
    more = ["resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"]
    densenets = [f"densenet{depth}" for depth in (121, 161, 169, 201)]
    vggs = [f"vgg{depth}" for depth in (11, 13, 16, 19)]
    vits = [
        f"{kind.format(size)}"
        for kind in ("simple_vit_{}_patch16_224", "vitc_{}_patch1_14")
        for size in ("ti", "s", "b", "l")
    ]
    assert {f"{arch}.bcos_v2_in1k" for arch in (*resnets, *more, *densenets, *vits)} <= names
    assert {f"{arch}_bnu.bcos_v2_in1k" for arch in vggs} <= names
    assert {f"{arch}.standard_v2_in1k" for arch in vits} <= names
    assert {
        f"{arch}.bcosification_in1k" for arch in (*vits, "resnet18", "resnet50", "densenet121", "clip_resnet50")
    } <= names
    assert {f"{arch}.bcos_v2_long_in1k" for arch in ("resnet50", "resnet152", "densenet121")} <= names
    assert {
        f"convnext_{size}.bcos_v2_{norm}_in1k"
        for size in ("atto", "tiny", "small", "base", "large")
        for norm in ("pn", "bnu")
    } <= names
    assert {f"{arch}.bcos_v1_in1k" for arch in (*resnets, *more, *densenets, *vggs, "inception_v3")} <= names
    assert {f"cnn9.bcos_v1_b{b}_cifar10" for b in ("1", "1_25", "1_5", "1_75", "2", "2_25", "2_5")} <= names
    norms = [kind + u for kind in ("an", "bn", "gn", "in", "ln", "pn") for u in ("", "u")]
    variants = {"", *(f"_{norm}{affine}" for norm in norms for affine in ("", "_linear", "_unaffine"))}
    assert {
        f"resnet{depth}.bcos_v2{variant}{max_out}_cifar10"
        for depth in (20, 32, 44, 56, 110)
        for variant in variants
        for max_out in ("", "_nomaxout")
    } <= names
    assert {"densenet121.bcos_v1_long_in1k", "clip_resnet50.bcosification_cc3m"} <= names
