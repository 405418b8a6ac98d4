"""Networks of timm by name, and conversions by name: made, saved, opened, refused."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

import bcoskit
from bcoskit.convert import BcosConfig, Rule, bcosify
from bcoskit.models import WeightsError, create_model, model_row, save_model

NAME = "timm/test_resnet"


@pytest.fixture(scope="module")
def ordinary():
    torch.manual_seed(0)
    return create_model(NAME, num_classes=4)


@pytest.fixture(scope="module")
def converted(ordinary):
    return bcosify(ordinary, BcosConfig.preset("bcosification"), skip=["layer4.*"])


@pytest.fixture
def x():
    return bcoskit.encode(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))


def test_a_network_of_timm_is_a_network(ordinary, x):
    assert model_row(NAME).transform == model_row(f"{NAME}.r160_in1k").transform
    configuration = timm.get_pretrained_cfg("test_resnet")
    assert ordinary.transform.encoding == "normalized"
    assert (ordinary.transform.mean, ordinary.transform.size) == (tuple(configuration.mean), 160)
    assert (ordinary.num_classes, ordinary.in_chans, ordinary.loss) == (4, 3, "cross_entropy")
    maps = ordinary.forward_features(x[:, :3])
    assert torch.equal(ordinary.forward_head(maps), ordinary(x[:, :3]))
    stages = ordinary.forward_stages(x[:, :3])
    assert torch.equal(stages["model.layer4"], maps)
    expected = timm.create_model("test_resnet", num_classes=4).eval()
    expected.load_state_dict({key.removeprefix("model."): value for key, value in ordinary.state_dict().items()})
    assert torch.equal(expected(x[:, :3]), ordinary(x[:, :3]))


def test_weights_of_timm_from_a_file(tmp_path, x):
    torch.manual_seed(1)
    original = timm.create_model("test_resnet", num_classes=7).eval()
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    network = create_model(NAME, weights=tmp_path / "weights.pth", num_classes=7)
    assert torch.equal(network(x[:, :3]), original(x[:, :3]))
    fresh = create_model(NAME, weights=tmp_path / "weights.pth", num_classes=3)
    assert fresh(x[:, :3]).shape == (2, 3)
    assert torch.equal(fresh.model.conv1[0].weight, original.conv1[0].weight)
    with pytest.raises(WeightsError, match="shape"):
        create_model(NAME, weights=tmp_path / "weights.pth")


def test_weights_that_cannot_be_had(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConnectionError, match="give a file as `weights`") as caught:
        create_model("timm/resnet18", weights=True)
    assert str(caught.value).isprintable()
    with pytest.raises(ValueError, match="no trained weights"):
        create_model("timm/coatnet_0_224", weights=True)


def test_a_tag_that_timm_does_not_have():
    with pytest.raises(ValueError, match=r"'timm/resnet18.mine' is no network: .* there are: timm/resnet18\.a1_in1k"):
        create_model("timm/resnet18.mine")
    assert model_row("timm/resnet18.a1_in1k").num_classes == 1000


def test_a_conversion_is_saved_and_opened(ordinary, converted, tmp_path, x):
    assert (converted.transform.encoding, converted.in_chans, converted.loss) == ("bcos", 6, "bce")
    assert (ordinary.transform.encoding, ordinary.in_chans, ordinary.loss) == ("normalized", 3, "cross_entropy")
    save_model(converted, tmp_path / "x.safetensors", classes=list("abcd"))
    opened = create_model(tmp_path / "x.safetensors")
    assert torch.equal(opened(x), converted(x))
    assert opened.classes == tuple("abcd")
    assert opened.conversion == converted.conversion
    assert bcoskit.audit(opened, x).passed
    save_model(opened, tmp_path / "again.safetensors", half=True)
    assert torch.allclose(create_model(tmp_path / "again.safetensors")(x), converted(x), rtol=1e-1, atol=1e-2)
    fresh = create_model(tmp_path / "x.safetensors", num_classes=2)
    assert fresh(x).shape == (2, 2)
    opened.reset_classifier(5)
    assert opened(x).shape == (2, 5)


def test_a_network_of_few_classes_is_opened(tmp_path):
    """Most of the weights of the usual network are those of its 1,000 classes."""
    small = bcosify(create_model("timm/test_efficientnet", num_classes=2))
    save_model(small, tmp_path / "model.safetensors")
    assert create_model(tmp_path / "model.safetensors").num_classes == 2


def test_a_fused_conversion(converted, tmp_path, x):
    fused = bcoskit.fuse(converted)
    save_model(fused, tmp_path / "x.safetensors")
    assert torch.allclose(create_model(tmp_path / "x.safetensors")(x), converted(x), rtol=1e-4, atol=1e-6)


def test_what_timm_made_is_saved_under_its_name(tmp_path, x):
    network = bcosify(timm.create_model("test_resnet", num_classes=2).eval())
    transform = bcosify(create_model(NAME)).transform
    save_model(network, tmp_path / "x.safetensors", NAME, classes=["a", "b"], transform=transform)
    assert torch.equal(create_model(tmp_path / "x.safetensors")(x), network(x))


def test_grey_images(x):
    network = bcosify(create_model(NAME, in_channels=1))
    assert (network.transform.channels, network.in_chans) == (1, 2)
    assert network(torch.cat([x[:, :1], 1 - x[:, :1]], 1)).shape == (2, 1000)
    exact = bcosify(create_model(NAME, in_channels=1), BcosConfig.preset("exact"))
    assert exact.conversion.config.mean == exact.transform.mean


def test_what_a_file_cannot_hold(ordinary, tmp_path):
    def keep(_module, _config, _path):
        return "kept"

    network = bcosify(ordinary, rules=[Rule((torch.nn.MaxPool2d,), keep)])
    with pytest.raises(ValueError, match="`rules`"):
        save_model(network, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


class TestDescriptions:
    @pytest.fixture
    def message(self, converted, tmp_path):
        save_model(converted, tmp_path / "good.safetensors")
        description = {
            "model": NAME,
            "classes": list("abcd"),
            "transform": {"size": 160, "encoding": "bcos"},
            "conversion": {"skip": ["layer4.*"], "logit_bias": "uniform"},
        }
        state = {key: value.contiguous().clone() for key, value in converted.state_dict().items()}

        def refused(**changes):
            save_file(state, tmp_path / "x.safetensors", {"bcoskit": json.dumps(description | changes)})
            with pytest.raises(WeightsError) as caught:
                create_model(tmp_path / "x.safetensors")
            assert str(caught.value).isprintable()
            assert len(str(caught.value)) < 1_000
            return str(caught.value)

        save_file(state, tmp_path / "x.safetensors", {"bcoskit": json.dumps(description)})
        assert create_model(tmp_path / "x.safetensors").num_classes == 4
        return refused

    @pytest.mark.parametrize(
        "value",
        [
            *(3, "x", [1], {"b": 0}, {"b": "x"}, {"b": None}, {"evil": 1}, {"biases": "x"}, {"mean": 3}, {"skip": 3}),
            *({"mean": ["x"], "std": [1.0]}, {"mean": [0.5], "std": [0.5]}, {"max_out": "2"}, {"encode": False}),
            *({"logit_bias": []}, {"learnable_b": 3}, {"temperature": "x"}, {"temperature": 0}),
        ],
    )
    def test_conversion(self, value, message):
        assert "conversion" in message(conversion=value)

    def test_none(self, message):
        assert "encoding" in message(conversion=None)

    def test_loss(self, message):
        for value in (None, 3, "hinge", ["bce"], {}):
            assert "its `loss` (=" in message(loss=value)

    def test_model(self, message):
        assert "unknown network" in message(model="timm/nothing")
        assert "unknown network" in message(model="timm/")
        assert "far less" in message(model="timm/vit_giant_patch14_224")  # which is not built
        assert "far less" in message(conversion={"max_out": 10**9})
