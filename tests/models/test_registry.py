import json
import os
import pickle
import struct

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bcoskit import encode
from bcoskit.data import ImageTransform
from bcoskit.models import CIFAR10_CLASSES, WeightsError, create_model, list_models, model_row, save_model

BCOS, STANDARD = "resnet20.bcos_cifar10", "resnet20.standard_cifar10"
ANIMALS = ("cat", "dog", "fox")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return create_model(BCOS, num_classes=3)


@pytest.fixture
def described(tmp_path, network):
    path = tmp_path / "animals.safetensors"
    save_model(network, path, BCOS, classes=ANIMALS, transform=ImageTransform(32, resize=36))
    return path


def write(path, tensors, description=None):
    """A file as anyone may write it; the description is JSON, or text that is none."""
    text = description if isinstance(description, str) else json.dumps(description)
    save_file(tensors, path, None if description is None else {"bcoskit": text})
    return path


def description(**changes):
    transform = {"size": 32, "encoding": "bcos"} | changes.pop("transform_values", {})
    return {"model": BCOS, "classes": list(ANIMALS), "transform": transform} | changes


def assert_same_state(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype
        assert torch.equal(first[key], second[key]), key


def refused(error, *arguments, **keywords):
    """The message of a refusal, which is one line."""
    with pytest.raises(error) as caught:
        create_model(*arguments, **keywords)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1_200
    return message


class TestListModels:
    def test_all_names(self):
        names = list_models()
        assert names == sorted(names)
        assert {
            f"resnet{depth}.{tag}_cifar10" for depth in (20, 32, 44, 56, 110) for tag in ("bcos", "standard")
        } < set(names)

    def test_pattern(self):
        assert list_models("resnet20.[!b]*") == ["resnet20.he_cifar10", STANDARD]
        assert list_models("resnet20") == []

    def test_weights(self):
        names = list_models(weights=True)
        assert {BCOS, "resnet18.bcos_v2_in1k", "cnn9.bcos_v1_b2_cifar10"} < set(names)
        # Neither untrained networks, nor those whose files have no address.
        assert not {STANDARD, "resnet18.bcosification_in1k"} & set(names)


class TestModelRow:
    def test_rows(self):
        bcos, standard = model_row(BCOS), model_row(STANDARD)
        assert (bcos.loss, standard.loss) == ("bce", "cross_entropy")
        assert (bcos.transform.encoding, standard.transform.encoding) == ("bcos", "normalized")
        assert bcos.classes == standard.classes == CIFAR10_CLASSES

    def test_unknown_names_get_near_ones(self):
        with pytest.raises(ValueError, match=r"'resnet20\.bcos' is neither .*; near: .*resnet20\.bcos_cifar10"):
            model_row("resnet20.bcos")
        with pytest.raises(ValueError, match=r"'zzzz' is neither .*; `list_models\(\)` lists all"):
            model_row("zzzz")


class TestCreateModel:
    @pytest.mark.parametrize("name", [BCOS, STANDARD])
    def test_by_name(self, name):
        model, row = create_model(name), model_row(name)
        assert not any(module.training for module in model.modules())
        assert (model.transform, model.classes, model.loss) == (row.transform, row.classes, row.loss)
        assert model.transform(Image.new("RGB", (50, 40))).shape == (6 if name == BCOS else 3, 32, 32)

    def test_fresh_weights_depend_on_the_seed_alone(self):
        states = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            states.append(create_model(BCOS).state_dict())
        assert_same_state(states[0], states[1])
        assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])

    def test_num_classes(self):
        model = create_model(BCOS, num_classes=3)
        assert model.classes == ("0", "1", "2")
        assert model(torch.zeros(1, 6, 32, 32)).shape == (1, 3)
        assert create_model(BCOS, num_classes=10).classes == CIFAR10_CLASSES
        assert "`num_classes` (=0)" in refused(ValueError, BCOS, num_classes=0)

    def test_trained_weights(self):
        model = create_model(BCOS, weights=True)
        assert model.classes == CIFAR10_CLASSES
        assert model.transform == model_row(BCOS).transform
        torch.manual_seed(0)
        assert not torch.equal(model.conv1.weight, create_model(BCOS).conv1.weight)

    def test_names_without_trained_weights(self):
        message = refused(ValueError, "resnet110.bcos_cifar10", weights=True)
        assert "'resnet110.bcos_cifar10' has no trained weights" in message
        assert BCOS in message

    def test_trained_weights_with_another_number_of_classes(self):
        trained, model = create_model(BCOS, weights=True), create_model(BCOS, weights=True, num_classes=7)
        assert model.classes == tuple("0123456")
        assert model.fc.conv.weight.shape == (14, 64, 1, 1)
        assert torch.equal(model.layer3[2].conv2.weight, trained.layer3[2].conv2.weight)

    def test_weights_that_are_to_be_had_by_hand(self):
        message = refused(ValueError, "resnet18.bcosification_in1k", weights=True)
        assert "get their file from https://github.com/shrebox/B-cosification" in message


class TestRoundTrip:
    @pytest.mark.parametrize("kind", [str, lambda path: path])
    def test_bitwise(self, kind, described, network):
        model = create_model(kind(described))
        assert_same_state(model.state_dict(), network.state_dict())
        assert (model.classes, model.transform, model.loss) == (ANIMALS, ImageTransform(32, resize=36), "bce")
        assert not model.training
        x = encode(torch.rand(2, 3, 32, 32))
        assert torch.equal(model(x), network(x))

    @pytest.mark.parametrize("name", [BCOS, STANDARD])
    def test_trained_state(self, name, tmp_path):
        model = create_model(name, num_classes=2).train()
        model(torch.rand(4, model.conv1.in_channels, 32, 32))
        path = tmp_path / "x.safetensors"
        save_model(
            model.to(memory_format=torch.channels_last), path, name, classes=["a", "b"], transform=model.transform
        )
        opened = create_model(path)
        assert_same_state(opened.state_dict(), model.state_dict())
        assert int(opened.bn1.num_batches_tracked) == 1
        assert opened.loss == model_row(name).loss

    def test_file_as_weights_of_a_name(self, described, network):
        for arguments in ({}, {"num_classes": 3}):
            model = create_model(BCOS, weights=described, **arguments)
            assert_same_state(model.state_dict(), network.state_dict())
            assert (model.classes, model.transform.resize) == (ANIMALS, 36)

    def test_bare_weights_need_a_name(self, tmp_path, network):
        path = write(tmp_path / "bare.safetensors", network.state_dict())
        model = create_model(BCOS, weights=str(path), num_classes=3)
        assert_same_state(model.state_dict(), network.state_dict())
        assert model.classes == ("0", "1", "2")
        assert "does not say which network it holds" in refused(WeightsError, path)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_other_precision_is_cast(self, dtype, tmp_path, network):
        state = {
            key: value.to(dtype) if value.is_floating_point() else value for key, value in network.state_dict().items()
        }
        model = create_model(write(tmp_path / "x.safetensors", state, description()))
        assert model.conv1.weight.dtype == torch.float32
        assert torch.equal(model.conv1.weight, state["conv1.weight"].float())

    def test_training_is_told(self, tmp_path, network):
        path = tmp_path / "x.safetensors"
        save_model(network, path, BCOS, classes=ANIMALS, transform=network.transform, training={"epochs": 3})
        header = path.read_bytes()[8 : 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]]
        assert json.loads(json.loads(header)["__metadata__"]["bcoskit"])["training"] == {"epochs": 3}


class TestSaveModel:
    def test_half_the_bytes(self, tmp_path, network):
        whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
        for path in (whole, half):
            save_model(network, path, BCOS, classes=ANIMALS, transform=network.transform, half=path == half)
        assert half.stat().st_size < 0.55 * whole.stat().st_size
        loaded = create_model(half)
        for key, value in network.state_dict().items():
            expected = value.half().float() if value.ndim > 1 else value
            assert torch.equal(loaded.state_dict()[key], expected)
        # What does not fit into 11 bits is stored as it is.
        for factor in (1e7, 1e-8):
            other = create_model(BCOS, num_classes=3)
            with torch.no_grad():
                other.conv1.weight[0] *= factor
            save_model(other, half, BCOS, classes=ANIMALS, transform=network.transform, half=True)
            assert torch.equal(create_model(half).conv1.weight, other.conv1.weight)

    def test_refusals(self, tmp_path, network):
        path = tmp_path / "x.safetensors"

        def refused_to_save(error, model=network, path=path, name=BCOS, classes=ANIMALS):
            with pytest.raises(error) as caught:
                save_model(model, path, name, classes=classes, transform=ImageTransform(32))
            assert not list(tmp_path.iterdir())
            return str(caught.value)

        assert "must end in .safetensors" in refused_to_save(ValueError, path=tmp_path / "x.npz")
        assert "'nothing' is neither" in refused_to_save(ValueError, name="nothing")
        assert "`fc.conv.weight` of shape (6, 64, 1, 1)" in refused_to_save(ValueError, classes=("a", "b"))
        assert "needs encoding 'normalized'" in refused_to_save(ValueError, name=STANDARD)
        standard = create_model(STANDARD, num_classes=3)
        assert "is not resnet20.bcos" in refused_to_save(ValueError, model=standard)
        assert "must be a list of names" in refused_to_save(TypeError, classes="abc")
        assert "must be a list of names" in refused_to_save(ValueError, classes=range(3))
        assert "No such file" in refused_to_save(OSError, path=tmp_path / "absent" / "x.safetensors")
        ruined = create_model(BCOS, num_classes=3)
        with torch.no_grad():
            ruined.layer1[0].conv1.weight[0, 0, 0, 0] = float("nan")
        assert "values in `layer1.0.conv1.weight` that are not finite" in refused_to_save(ValueError, model=ruined)

    def test_random_state_is_left_alone(self, described, network):
        before = torch.get_rng_state()
        save_model(network, described, BCOS, classes=ANIMALS, transform=network.transform)
        assert torch.equal(torch.get_rng_state(), before)

    def test_failure_leaves_the_old_file(self, described, network, monkeypatch):
        before = described.read_bytes()

        def fail(*_arguments):
            raise OSError("disk full")

        monkeypatch.setattr("pathlib.Path.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            save_model(network, described, BCOS, classes=("x", "y", "z"), transform=network.transform)
        assert [path.name for path in described.parent.iterdir()] == [described.name]
        assert described.read_bytes() == before


class TestFilesThatAreNone:
    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "is no intact safetensors file"),
            (b"garbage, and more of it than a header needs", "is no intact safetensors file"),
            (struct.pack("<Q", 2**62) + b"{}", "is no intact safetensors file"),
            (struct.pack("<Q", 8) + b"not json", "is no intact safetensors file"),
            (struct.pack("<Q", 200_000) + b"[" * 200_000, "is no intact safetensors file"),
            (struct.pack("<Q", 2) + b"{}", "does not say which network it holds"),
        ],
    )
    def test_content(self, content, reason, tmp_path):
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        message = refused(WeightsError, path)
        assert message.startswith(f"{path}: {reason}")
        assert refused(WeightsError, BCOS, weights=path).startswith(f"{path}: ")

    def test_truncated(self, described):
        whole = described.read_bytes()
        for length in (4, 100, len(whole) // 2, len(whole) - 1):
            described.write_bytes(whole[:length])
            assert f"{described}: is no intact safetensors file" in refused(WeightsError, described)

    def test_pickle_is_not_run(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "exploded"),)

        path = tmp_path / "x.safetensors"
        path.write_bytes(pickle.dumps(Bomb()))
        assert "is no intact safetensors file" in refused(WeightsError, path)
        torch.save({"state_dict": Bomb()}, path)
        assert "is no intact safetensors file" in refused(WeightsError, path)
        assert not (tmp_path / "exploded").exists()
        pickle.loads(pickle.dumps(Bomb()))
        assert (tmp_path / "exploded").exists()

    def test_missing(self, tmp_path):
        path = tmp_path / "absent.safetensors"
        for arguments in ((path,), (str(path),), (BCOS, path), (BCOS, str(path))):
            assert refused(WeightsError, *arguments) == f"{path}: no such file"

    def test_other_places(self, tmp_path):
        folder = tmp_path / "folder.safetensors"
        folder.mkdir()
        pipe = tmp_path / "pipe.safetensors"
        os.mkfifo(pipe)
        for path in (folder, pipe):
            assert refused(WeightsError, path) == f"{path}: is no file"
        assert "File name too long" in refused(WeightsError, tmp_path / ("long" * 70 + ".safetensors"))
        with pytest.raises(WeightsError, match="embedded null"):
            create_model(BCOS, weights="null\0.safetensors")

    def test_other_suffixes(self, tmp_path, described):
        other = described.rename(tmp_path / "model.pth")
        assert "is no .safetensors file; give the name" in refused(WeightsError, other)
        other.write_bytes(b"garbage")
        assert refused(WeightsError, BCOS, weights=other).startswith(f"{other}: is no intact file of weights")
        assert "neither the name of a model nor a .safetensors file" in refused(ValueError, str(other))


class TestWeightsThatDoNotFit:
    def changed(self, tmp_path, network, **changes):
        tensors = {key: value.clone() for key, value in network.state_dict().items()}
        for key, value in changes.items():
            name = key.replace("__", ".")
            if value is None:
                del tensors[name]
            else:
                tensors[name] = value
        path = write(tmp_path / "x.safetensors", tensors, description())
        message = refused(WeightsError, path)
        assert message.startswith(f"{path}: does not fit {BCOS} with 3 classes, it ")
        return message

    def test_keys(self, tmp_path, network):
        assert "it lacks weights: 'bn1.weight'" in self.changed(tmp_path, network, bn1__weight=None)
        added = self.changed(tmp_path, network, **{f"extra{index}": torch.zeros(1) for index in range(5)})
        assert added.endswith("it has unknown weights: 'extra0', 'extra1', 'extra2' and 2 more")
        hostile = self.changed(tmp_path, network, **{"x\n\x1b[31m" * 50: torch.zeros(1)})
        assert "has unknown weights: 'x\\n\\x1b" in hostile

    def test_shapes(self, tmp_path, network):
        message = self.changed(tmp_path, network, conv1__weight=torch.zeros(16, 3, 3, 3))
        assert message.endswith("`conv1.weight` of shape (16, 3, 3, 3) instead of (32, 6, 3, 3)")
        message = self.changed(tmp_path, network, bn1__weight=torch.ones(16, 1))
        assert message.endswith("`bn1.weight` of shape (16, 1) instead of (16,)")

    def test_dtypes(self, tmp_path, network):
        for dtype in (torch.int32, torch.bool, torch.complex64):
            message = self.changed(tmp_path, network, bn1__weight=torch.ones(16, dtype=dtype))
            assert f"`bn1.weight` of dtype {dtype} instead of torch.float32" in message
        message = self.changed(tmp_path, network, bn1__num_batches_tracked=torch.tensor(3.0))
        assert "`bn1.num_batches_tracked` of dtype torch.float32 instead of torch.int64" in message

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_values(self, value, tmp_path, network):
        weight = torch.ones(16)
        weight[3] = value
        message = self.changed(tmp_path, network, bn1__weight=weight)
        assert message.endswith("it has values in `bn1.weight` that are not finite")

    def test_values_beyond_the_precision_of_the_network(self, tmp_path, network):
        weight = torch.full((16,), 1e300, dtype=torch.float64)
        assert "not finite" in self.changed(tmp_path, network, bn1__weight=weight)

    def test_another_network(self, tmp_path, described):
        assert refused(WeightsError, "resnet32.bcos_cifar10", weights=described).endswith(
            "holds weights of resnet20.bcos_cifar10, not of resnet32.bcos_cifar10"
        )
        bare = write(tmp_path / "bare.safetensors", create_model(BCOS).state_dict())
        assert "it lacks weights" in refused(WeightsError, "resnet32.bcos_cifar10", weights=bare)
        assert "it lacks weights" in refused(WeightsError, STANDARD, weights=bare)

    def test_a_description_for_other_channels(self, tmp_path, network):
        path = write(tmp_path / "x.safetensors", network.state_dict(), description(transform_values={"channels": 1}))
        assert "has `conv1.weight` of shape (32, 6, 3, 3) instead of (32, 2, 3, 3)" in refused(WeightsError, path)

    def test_arguments_that_contradict_the_file(self, described):
        for arguments in ((described,), (BCOS, described)):
            message = refused(ValueError, *arguments, in_channels=2)
            assert message.startswith("`in_channels` (=2) contradicts the weights, which are for 6")
        assert "`weights` (=" in refused(ValueError, described, weights="other.safetensors")
        assert create_model(described, num_classes=3).classes == ANIMALS


class TestHostileDescriptions:
    @pytest.fixture
    def message(self, tmp_path, network):
        def message(text):
            path = write(tmp_path / "x.safetensors", network.state_dict(), text)
            reason = refused(WeightsError, path)
            assert reason.startswith(f"{path}: ")
            return reason

        return message

    def test_the_control_is_accepted(self, tmp_path, network):
        path = write(tmp_path / "x.safetensors", network.state_dict(), description())
        assert create_model(path).classes == ANIMALS

    @pytest.mark.parametrize(
        "text",
        ["", "no json", "{", "[" * 100_000, '{"model":' * 50_000, "1" * 5_000, "\ud7ff" * 10],
    )
    def test_text(self, text, message):
        assert "is no intact safetensors file" in message(text)

    @pytest.mark.parametrize("value", ["[]", "3", "null", '"text"', "{}", '{"format": "pt"}'])
    def test_other_values(self, value, message):
        assert "does not say which network it holds" in message(value)

    @pytest.mark.parametrize(
        "value", [3, [], {}, {"a": {}}, True, "", "../../x", "resnet20\n", "x" * 10_000, "os.system"]
    )
    def test_model(self, value, message):
        assert "holds weights of an unknown network" in message(description(model=value))

    @pytest.mark.parametrize("value", [None, [], {}, "cat", 3, ["cat", 3], [["cat"]], {"cat": 0}])
    def test_classes(self, value, message):
        assert "its `classes` (=" in message(description(classes=value))

    def test_number_of_classes(self, message):
        assert "of shape (6, 64, 1, 1) instead of (4, 64, 1, 1)" in message(description(classes=["a", "b"]))
        # No network with a million classes is built, only to be thrown away.
        many = message(description(classes=["x"] * 1_000_000))
        assert many.endswith("names 1000000 classes, but no weight has as many rows")

    @pytest.mark.parametrize("value", [None, [], 3, "x", {}, {"size": 32, "evil": 1}, {"resize": 3}])
    def test_transform(self, value, message):
        assert "its `transform` is of no use (" in message(description(transform=value))

    @pytest.mark.parametrize(
        "values",
        [
            {"size": 0},
            {"size": -1},
            {"size": "32"},
            {"size": 32.5},
            {"size": True},
            {"size": None},
            {"size": float("nan")},
            {"size": 10_001},
            {"size": 10**400},
            {"resize": 31},
            {"resize": "x"},
            {"resize": 10**9},
            {"channels": 2},
            {"channels": 3.0},
            {"channels": []},
            {"interpolation": "nearest"},
            {"interpolation": ["bilinear"]},
            {"encoding": "normalized"},
            {"encoding": "none"},
            {"encoding": {}},
            {"mean": "abc"},
            {"mean": [0, 0, float("nan")]},
            {"mean": [0, 0, 10**400]},
            {"std": [[1], [1], [1]]},
            {"std": 3},
        ],
    )
    def test_values_of_the_transform(self, values, message):
        assert "its `transform` is of no use (" in message(description(transform_values=values))

    def test_an_explanation_is_no_network(self, message):
        assert "does not say which network it holds" in message({"format": "bcoskit-explanation-1"})


@pytest.mark.parametrize(
    ("path", "attribute", "value"),
    [("conv1", "b", 1.5), ("layer1.0.conv1", "normalize_weight", False), ("bn1", "eps", 1e-3)],
)
def test_constants_that_a_file_does_not_hold(tmp_path, path, attribute, value):
    network = create_model("resnet20.bcos_cifar10")
    setattr(network.get_submodule(path), attribute, value)
    with pytest.raises(ValueError, match=rf"in {path}\.{attribute} \(={value}, not"):
        save_model(network, tmp_path / "model.safetensors")
    assert not any(tmp_path.iterdir())


def test_another_network_of_the_same_shapes(tmp_path):
    network = create_model("cnn9_narrow.bcos_b1_25_cifar10")
    with pytest.raises(ValueError, match=r"\.b \(=1\.25, not 1\.5\)"):
        save_model(network, tmp_path / "model.safetensors", "cnn9_narrow.bcos_b1_5_cifar10")


def test_figures_of_a_training_are_a_mapping(tmp_path):
    with pytest.raises(TypeError, match="`training`"):
        save_model(create_model("resnet20.bcos_cifar10"), tmp_path / "model.safetensors", training=[1, 2])
