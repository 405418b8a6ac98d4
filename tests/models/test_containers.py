"""Files of weights as the authors and others write them, and those that are refused."""

import argparse
import os
import pathlib
import pickle
import subprocess
import threading
from collections import OrderedDict, defaultdict, deque
from functools import partial

import pytest
import torch
from lightning.pytorch.utilities.parsing import AttributeDict

from bcoskit.models import WeightsError, create_model, model_row, save_model
from bcoskit.models._matching import authors_keys

NAME = "cnn9.bcos_v1_b2_cifar10"
CLIP = "clip_resnet50.bcosification_in1k"


def in_their_format(model, row):
    state = model.state_dict()
    return OrderedDict((theirs, state[ours]) for theirs, ours in authors_keys(model, row.prefix).items())


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return create_model(NAME)


@pytest.fixture
def theirs(network):
    return in_their_format(network, model_row(NAME))


@pytest.fixture
def stored(tmp_path):
    def stored(content, **options):
        path = tmp_path / "weights.pth"
        torch.save(content, path, **options)
        return path

    return stored


def assert_loaded(path, expected, name=NAME):
    state = create_model(name, weights=path).state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


def refused(path, name=NAME, **options):
    with pytest.raises(WeightsError) as caught:
        create_model(name, weights=path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < 600
    return message.removeprefix(f"{path}: ")


def prefixed(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


class Settings:
    """What authors put into the configuration of a run."""


class TestContainers:
    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model."])
    @pytest.mark.parametrize("nested", [None, "state_dict", "model_state_dict", "the_model", "model"])
    def test_state_dicts(self, prefix, nested, stored, theirs, network):
        state = prefixed(prefix, theirs)
        assert_loaded(stored(state if nested is None else {nested: state, "epoch": 3}), network.state_dict())

    def test_our_own_keys(self, stored, network):
        assert_loaded(stored(network.state_dict()), network.state_dict())
        assert_loaded(stored(network.double().state_dict()), network.float().state_dict())

    def test_training_checkpoint(self, stored, theirs, network):
        path = stored(
            {
                "state_dict": prefixed("model.", theirs) | {"criterion.weight": torch.ones(10)},
                "epoch": 7,
                "pytorch-lightning_version": "1.9.4",
                "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}],
                "hyper_parameters": {
                    "namespace": argparse.Namespace(batch_size=64),
                    "path": pathlib.PurePosixPath("/data"),
                    "norm": partial(torch.nn.BatchNorm2d, eps=1e-5),
                    "activation": torch.nn.ReLU(),
                    "function": torch.nn.functional.relu,
                    "sizes": defaultdict(list, {3: [range(3), deque([1, 2])]}),
                    "ordered": AttributeDict(width=64),
                },
            }
        )
        assert_loaded(path, network.state_dict())

    def test_an_averaged_copy_comes_first(self, stored, theirs, network):
        averaged = {key: value + 1 for key, value in theirs.items()}
        both = prefixed("model.", theirs) | prefixed("ema.module.", averaged) | {"ema.n_averaged": torch.tensor(9)}
        path = stored({"state_dict": both})
        expected = {key: value + 1 for key, value in network.state_dict().items()}
        assert_loaded(path, expected)
        assert_loaded(stored({"state_dict": prefixed("ema.module.", averaged)}), expected)
        # An averaged copy that is not whole is no reason to take the other one without a word.
        del both["ema.module.3.linear.weight"]
        assert "lacks weights: '3.linear.weight'" in refused(stored({"state_dict": both}))

    def test_older_format(self, stored, theirs, network):
        assert_loaded(stored(theirs, _use_new_zipfile_serialization=False), network.state_dict())

    def test_converted_network_beside_its_teacher(self, stored):
        model = create_model("resnet18.bcosification_in1k")
        state = in_their_format(model, model_row("resnet18.bcosification_in1k"))
        assert next(iter(state)) == "model.conv1.linear.weight"
        teacher = {f"clip_model.visual.{key}": value for key, value in state.items()}
        path = stored({"state_dict": prefixed("model.", state) | teacher})
        assert_loaded(path, model.state_dict(), "resnet18.bcosification_in1k")
        assert_loaded(stored(state), model.state_dict(), "resnet18.bcosification_in1k")

    def test_layouts(self, stored):
        name = "convnext_atto.bcos_v2_pn_in1k"
        model = create_model(name)
        state = in_their_format(model, model_row(name))
        scales = [key for key in state if key.endswith("layer_scale")]
        assert len(scales) == 12
        for key in scales:
            state[key] = torch.rand(state[key].numel(), 1, 1)
        opened = create_model(name, weights=stored(state))
        assert torch.equal(opened.stages[0].blocks[0].gamma, state[scales[0]].flatten())
        state[scales[0]] = torch.rand(40, 2, 1)
        assert f"has `{scales[0]}` of shape (40, 2, 1) instead of (40,)" in refused(stored(state), name)

    def test_the_auxiliary_classifier_is_optional(self, stored):
        name = "inception_v3.bcos_v1_in1k"
        model = create_model(name)
        state = in_their_format(model, model_row(name))
        whole = create_model(name, weights=stored(state))
        assert torch.equal(whole.AuxLogits.conv0.conv.weight, model.AuxLogits.conv0.conv.weight)
        without = {key: value for key, value in state.items() if "AuxLogits" not in key}
        assert len(without) == len(state) - 3
        opened = create_model(name, weights=stored(without))
        assert torch.equal(opened.fc.conv.weight, model.fc.conv.weight)
        assert not torch.equal(opened.AuxLogits.conv0.conv.weight, model.AuxLogits.conv0.conv.weight)
        assert bool(opened.AuxLogits.conv0.conv.weight.isfinite().all())
        del without["0.fc.linear.weight"]
        assert "lacks weights: '0.fc.linear.weight'" in refused(stored(without), name)

    def test_weights_have_memory_of_their_own(self, stored, theirs, network):
        whole = torch.cat([value.flatten() for value in theirs.values()])
        views, start = {}, 0
        for key, value in theirs.items():
            views[key] = whole[start : start + value.numel()].view_as(value)
            start += value.numel()
        path = stored(views)
        assert_loaded(path, network.state_dict())
        weight = create_model(NAME, weights=path).layers[0].weight
        assert weight.untyped_storage().nbytes() == weight.nbytes
        assert weight.requires_grad

    def test_tied_weights_are_untied(self, stored, theirs):
        theirs["7.linear.weight"] = theirs["6.linear.weight"]
        model = create_model(NAME, weights=stored(theirs))
        with torch.no_grad():
            model.layers[6].weight.zero_()
        assert bool((model.layers[7].weight != 0).any())

    def test_safetensors_under_another_name(self, tmp_path, network):
        path = tmp_path / "x.safetensors"
        save_model(network, path)
        assert_loaded(path.rename(tmp_path / "x.pth"), network.state_dict())

    def test_safetensors_are_read_not_mapped(self, tmp_path, network):
        path = tmp_path / "x.safetensors"
        save_model(network, path)
        opened = create_model(path)
        path.write_bytes(b"\0" * path.stat().st_size)
        assert torch.equal(opened.layers[0].weight, network.layers[0].weight)


class TestFineTuning:
    def test_another_number_of_classes(self, stored, theirs, network):
        path = stored(theirs)
        model = create_model(NAME, weights=path, num_classes=3)
        assert model(torch.rand(1, 6, 32, 32)).shape == (1, 3)
        assert model.classes == ("0", "1", "2")
        for ours, original in zip(model.layers, network.layers, strict=True):
            assert torch.equal(ours.weight, original.weight)

    def test_as_many_classes_as_the_file_has(self, stored):
        model = create_model(NAME, num_classes=3)
        path = stored(in_their_format(model, model_row(NAME)))
        assert_loaded_head = create_model(NAME, weights=path, num_classes=3).head.conv.weight
        assert torch.equal(assert_loaded_head, model.head.conv.weight)
        # Without the number, nothing is thrown away without a word.
        assert refused(path).endswith("it has `8.linear.weight` of shape (6, 256, 1, 1) instead of (20, 256, 1, 1)")

    def test_both_classifiers_are_fresh(self, stored):
        name = "inception_v3.bcos_v1_in1k"
        model = create_model(name, num_classes=5)
        path = stored(in_their_format(model, model_row(name)))
        opened = create_model(name, weights=path, num_classes=2)
        assert opened.fc.conv.weight.shape[0] == opened.AuxLogits.fc.conv.weight.shape[0] == 4

    def test_the_rest_must_fit(self, stored, theirs):
        del theirs["0.linear.weight"]
        assert "lacks weights: '0.linear.weight'" in refused(stored(theirs), num_classes=3)


class TestFaults:
    def test_keys_and_shapes_are_named_together(self, stored, theirs):
        del theirs["3.linear.weight"]
        theirs["extra.weight"] = torch.ones(1)
        theirs["5.linear.weight"] = torch.ones(2, 3)
        message = refused(stored(theirs))
        assert "does not fit cnn9.bcos_v1_b2_cifar10 with 10 classes" in message
        assert "it lacks weights: '3.linear.weight'" in message
        assert "it has unknown weights: 'extra.weight'" in message
        assert "it has `5.linear.weight` of shape (2, 3) instead of (512, 128, 3, 3)" in message

    @pytest.mark.filterwarnings("ignore:Validating sparse tensor")
    def test_values(self, stored, theirs):
        theirs["3.linear.weight"] = torch.full_like(theirs["3.linear.weight"], torch.nan)
        assert "has values in `3.linear.weight` that are not finite" in refused(stored(theirs))
        theirs["3.linear.weight"] = torch.zeros_like(theirs["3.linear.weight"], dtype=torch.int64)
        assert "has `3.linear.weight` of dtype torch.int64" in refused(stored(theirs))
        theirs["3.linear.weight"] = torch.rand(256, 128, 3, 3).to_sparse()
        assert "has `3.linear.weight` as a tensor of another kind" in refused(stored(theirs))
        theirs["3.linear.weight"] = torch.empty(256, 128, 3, 3, device="meta")
        assert "has `3.linear.weight` as a tensor of another kind" in refused(stored(theirs))

    def test_weights_of_another_network(self, stored, theirs):
        message = refused(stored(theirs), "simple_vit_ti_patch16_224.bcos_v2_in1k")
        assert "it has no weights of this network (its first key is '0.linear.weight')" in message

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ([1, 2], "holds a list instead of weights by name"),
            (torch.ones(3), "holds a Tensor instead"),
            ({}, "holds no state dict, whose values are tensors by name"),
            ({"state_dict": {}}, "holds no state dict"),
            (
                {"weight": 3.0},
                "neither itself nor under state_dict, model_state_dict, the_model, model, 'weight' is none",
            ),
            ({1: torch.ones(1)}, "neither itself nor under state_dict, model_state_dict, the_model, model, 1 is none"),
        ],
    )
    def test_no_state_dict(self, content, reason, stored):
        assert reason in refused(stored(content))

    def test_damaged(self, stored, theirs):
        path = stored(theirs)
        whole = path.read_bytes()
        for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            assert refused(path).startswith("is no intact file of weights")

    def test_a_flipped_bit(self, stored, theirs):
        path = stored(theirs)
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole)
        assert "is no intact file of weights (the checksum of" in refused(path)

    def test_whole_networks(self, stored, network):
        assert refused(stored(torch.nn.ReLU())) == "holds another object instead of weights by name"
        assert "is refused" in refused(stored(network))

    def test_no_file(self, tmp_path):
        assert refused(tmp_path / "absent.pth") == "no such file"
        assert refused(tmp_path) == "is no file"
        os.mkfifo(tmp_path / "pipe")
        assert refused(tmp_path / "pipe") == "is no file"
        for weights in (None, 3, ""):
            with pytest.raises(TypeError, match="`weights`"):
                create_model(NAME, weights=weights)


class Bomb:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class TestHostileFiles:
    def test_the_control(self, tmp_path):
        target = tmp_path / "exploded"
        pickle.loads(pickle.dumps(Bomb(os.mkdir, str(target))))
        assert target.exists()

    @pytest.mark.parametrize("older", [False, True])
    @pytest.mark.parametrize("place", ["alone", "beside", "in the configuration"])
    def test_code_is_not_run(self, older, place, stored, theirs, tmp_path):
        target = tmp_path / "exploded"
        for function, arguments in (
            (os.mkdir, (str(target),)),
            (exec, (f"import os; os.mkdir({str(target)!r})",)),
            (subprocess.call, (["mkdir", str(target)],)),
            (partial(os.mkdir, str(target)), ()),
        ):
            bomb = Bomb(function, *arguments)
            content = {
                "alone": bomb,
                "beside": theirs | {"bomb": bomb},
                "in the configuration": {"state_dict": theirs, "hyper_parameters": {"bomb": bomb}},
            }[place]
            path = stored(content, _use_new_zipfile_serialization=not older)
            assert refused(path).startswith("is refused, since it would run code when it is loaded: ")
            assert not target.exists()

    def test_classes_of_anyone_are_refused(self, stored, theirs):
        path = stored({"state_dict": theirs, "settings": Settings()})
        assert refused(path).endswith(f"when it is loaded: {Settings.__module__}.Settings")

    def test_nothing_is_allowed_afterwards(self, stored, theirs, network):
        before = torch.serialization.get_safe_globals()
        content = {"state_dict": theirs, "path": pathlib.PurePosixPath("/data")}
        assert_loaded(stored(content), network.state_dict())
        assert torch.serialization.get_safe_globals() == before
        with pytest.raises(pickle.UnpicklingError):
            torch.load(stored(content), weights_only=True)

    def test_threads(self, stored, theirs, network):
        path = stored({"state_dict": theirs, "path": pathlib.PurePosixPath("/data")})
        failures = []

        def load():
            try:
                for _ in range(5):
                    assert_loaded(path, network.state_dict())
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
