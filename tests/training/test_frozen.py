"""Fine-tuning of networks that have weights: frozen stages, learning rates by layer, fresh heads, other images."""

import csv
import json
from contextlib import nullcontext
from dataclasses import asdict

import pytest
import torch

import bcoskit
from bcoskit import cli
from bcoskit.convert import BcosConfig, bcosify
from bcoskit.models import create_model, model_row, save_model
from bcoskit.training import FineTuning, Optimization, train
from bcoskit.training._finetune import Freezing, parameter_groups
from training_runs import break_off, same_weights, state_of

NAME = "cnn9_narrow.bcos_bnu_linear_nomaxout_cifar10"
STAGES = tuple(f"layers.{index}" for index in (1, 3, 5, 7, 9, 11, 13, 15))
EARLY = tuple(f"layers.{index}." for index in range(6))  # what the first three stages hold


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network of three classes, whose norms have statistics."""
    torch.manual_seed(0)
    network = create_model(NAME, num_classes=3).train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(8, 6, 32, 32))
    path = tmp_path_factory.mktemp("weights") / "trained.safetensors"
    save_model(network.eval(), path, classes=("a", "b", "c"))
    return path


def tune(data, out, start, **arguments):
    options = {"model": str(start), "epochs": 2, "batch_size": 8, "learning_rate": 0.01, "compile_step": False}
    return train(data, out=out, **options | arguments)


def moving(weights):
    """The names of weights and statistics that training moves; those of the head left out, and means of 0."""
    state = create_model(weights).state_dict()
    return {key for key in state if key.endswith(("weight", "running_var")) and not key.startswith("head.")}


def moved(out, weights):
    """The names of weights, statistics and counters that are not what they were; those of the head left out."""
    before, after = create_model(weights).state_dict(), state_of(out)
    changed = {key for key in after if not key.startswith("head.") and not torch.equal(after[key], before[key])}
    assert {key.replace("num_batches_tracked", "running_var") for key in changed} <= changed
    return {key for key in changed if not key.endswith("num_batches_tracked")}


def logged(out, name):
    with next((out / "csv").rglob("metrics.csv")).open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


class TestFrozen:
    @pytest.mark.parametrize(
        "options", [{}, {"fine_tuning": {"frozen": "layers.5"}}, {"ema": 0.5}], ids=["number", "path", "average"]
    )
    def test_what_is_frozen_does_not_move_and_the_rest_does(self, data, tmp_path, weights, options):
        tuning = FineTuning(**options.get("fine_tuning", {"frozen": 3}))
        tune(data, tmp_path / "run", weights, fine_tuning=tuning, optimization=Optimization(ema=options.get("ema")))
        expected = {key for key in moving(weights) if not key.startswith(EARLY)}
        assert moved(tmp_path / "run", weights) == expected

    def test_without_it_all_moves(self, data, tmp_path, weights):
        tune(data, tmp_path / "run", weights)
        assert moved(tmp_path / "run", weights) == moving(weights)

    def test_for_some_epochs_and_a_run_that_was_cut_off(self, data, tmp_path, weights, monkeypatch):
        options = {"fine_tuning": FineTuning(frozen=3, frozen_epochs=2, layer_decay=0.5), "epochs": 4}
        tune(data, tmp_path / "whole", weights, **options)
        for epoch in (2, 3):
            out = tmp_path / f"cut{epoch}"
            with monkeypatch.context() as patched:
                break_off(patched, epoch)
                with pytest.raises(OSError, match="power cut"):
                    tune(data, out, weights, **options)
            state = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
            before = create_model(weights).state_dict()
            same = [torch.equal(state[f"model.{key}"], before[key]) for key in before if key.startswith(EARLY)]
            assert all(same) == (epoch == 2)
            assert any(same)  # counters
            tune(data, out, weights, **options, resume=True)
            assert same_weights(tmp_path / "whole", out)
        assert {key for key in moved(tmp_path / "whole", weights) if key.startswith(EARLY)}
        with pytest.raises(ValueError, match="`fine_tuning`"):
            tune(data, tmp_path / "cut2", weights, **options | {"fine_tuning": FineTuning(frozen=3)}, resume=True)

    @pytest.mark.parametrize(
        ("name", "size"),
        [
            (NAME, 32),
            ("resnet20.bcos_cifar10", 32),
            ("resnet18.bcos_v2_in1k", 64),
            ("densenet121.bcos_v2_in1k", 64),
            ("convnext_atto.bcos_v2_bnu_in1k", 64),
            ("simple_vit_ti_patch16_224.bcos_v2_in1k", 224),
            ("timm/test_efficientnet", 64),
            ("timm/test_vit", 160),
            ("timm/test_nfnet", 64),
        ],
    )
    def test_a_stage_holds_what_its_output_depends_on(self, name, size):
        network = create_model(name, num_classes=3)
        count = len(network.stage_names)
        place = count - 2
        output = network.forward_stages(torch.rand(1, network.in_chans, size, size))[network.stage_names[place]]
        output.square().sum().backward()
        touched = {path for path, parameter in network.named_parameters() if parameter.grad is not None}
        network.zero_grad()
        network.train()
        Freezing(network, FineTuning(frozen=place + 1))
        frozen = {path for path, parameter in network.named_parameters() if not parameter.requires_grad}
        assert touched == frozen
        assert 0 < len(frozen) < len(list(network.parameters()))
        owners = {path.rpartition(".")[0] for path in frozen} - {"", "model"}
        assert not any(network.get_submodule(path).training for path in owners)
        assert network.training
        assert network.get_classifier().training

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"fine_tuning": FineTuning(frozen=9)}, "above the number of stages"),
            ({"fine_tuning": FineTuning(frozen="layer1")}, "no module of .*layers.1, layers.3"),
            ({"fine_tuning": FineTuning(frozen="head")}, "leaves nothing"),
            ({"model": NAME, "fine_tuning": FineTuning(frozen=1)}, "give `weights`"),
            ({"weights": "fresh"}, "`weights`"),
            ({"size": 0}, "`size`"),
            ({"channels": 2}, "`channels`"),
            ({"channels": 1}, "`in_channels`"),
            ({"model": "absent.safetensors"}, "absent.safetensors: no such file"),
        ],
    )
    def test_what_cannot_be(self, data, tmp_path, weights, arguments, message):
        with pytest.raises(ValueError, match=message):
            tune(data, tmp_path / "run", weights, **arguments)
        assert not (tmp_path / "run").exists()

    def test_not_while_a_conversion_moves_all(self, data, tmp_path):
        save_model(create_model("resnet20.standard_cifar10"), tmp_path / "ordinary.safetensors")
        options = {"from_": str(tmp_path / "ordinary.safetensors"), "fine_tuning": FineTuning(frozen=1)}
        with pytest.raises(ValueError, match="`gradual`"):
            tune(data, tmp_path / "run", NAME, **options, gradual=0.5)

    @pytest.mark.parametrize(
        "values",
        [
            {"frozen": -1},
            {"frozen": True},
            {"frozen": ""},
            {"frozen": 1.5},
            {"frozen_epochs": 1},
            {"frozen": 1, "frozen_epochs": 0},
            {"layer_decay": 0.0},
            {"layer_decay": 1.1},
            {"layer_decay": float("nan")},
            {"head": 0.0},
            {"head": float("inf")},
        ],
    )
    def test_values(self, values):
        with pytest.raises(ValueError, match=f"`{list(values)[-1]}`"):
            FineTuning(**values)


class TestRates:
    def test_by_the_formula(self, weights):
        network = create_model(weights)
        groups = parameter_groups(network, FineTuning(layer_decay=0.5, head=3.0), 0.1)
        rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        assert len(rates) == sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
        for path, parameter in network.named_parameters():
            stage = next((index for index, end in enumerate(STAGES) if _layer(path) <= _layer(end)), None)
            expected = 0.3 if stage is None else 0.1 * 0.5 ** (8 - stage)
            assert rates[id(parameter)] == pytest.approx(expected)

    def test_what_lies_between_the_stages_and_the_classifier(self):
        network = create_model("timm/test_vit", num_classes=3)
        groups = parameter_groups(network, FineTuning(layer_decay=0.5), 0.1)
        rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        assert rates[id(network.model.pos_embed)] == pytest.approx(0.1 * 0.5**6)
        assert rates[id(network.model.blocks[5].mlp.fc1.weight)] == pytest.approx(0.1 * 0.5)
        assert rates[id(network.model.norm.weight)] == rates[id(network.model.head.weight)] == 0.1

    def test_in_a_run(self, data, tmp_path, weights):
        tuning = FineTuning(frozen=2, layer_decay=0.5, head=3.0)
        tune(data, tmp_path / "run", weights, epochs=1, fine_tuning=tuning, learning_rate=1e-3)
        assert logged(tmp_path / "run", "lr-Adam/head") == pytest.approx([3e-3])
        assert logged(tmp_path / "run", f"lr-Adam/{STAGES[2]}") == pytest.approx([1e-3 / 64])
        assert not logged(tmp_path / "run", f"lr-Adam/{STAGES[1]}")


def _layer(path):
    return int(path.split(".")[1]) if path.startswith("layers.") else 100


class TestStart:
    @pytest.mark.parametrize("way", ["file", "weights"])
    def test_the_head_is_fresh_and_the_rest_is_loaded(self, data, tmp_path, weights, way):
        start, options = {"file": (weights, {}), "weights": (NAME, {"weights": str(weights)})}[way]
        tune(data, tmp_path / "run", start, **options, epochs=1, learning_rate=1e-12)
        tuned, before = state_of(tmp_path / "run"), create_model(weights).state_dict()
        parameters = {key for key in before if key.endswith("weight")}
        assert all(torch.allclose(tuned[key], before[key], atol=1e-6) for key in parameters - {"head.conv.weight"})
        assert tuned["head.conv.weight"].shape == (2, *before["head.conv.weight"].shape[1:])
        assert create_model(tmp_path / "run" / "model.safetensors").classes == ("green", "red")
        settings = json.loads((tmp_path / "run" / "settings.json").read_text())
        assert (settings["model"], settings["weights"]) == (NAME, str(weights))
        assert settings["fine_tuning"] == asdict(FineTuning())

    @pytest.mark.parametrize("fresh", [False, True])
    def test_the_same_number_of_classes_keeps_the_head_if_it_is_not_to_be_fresh(self, data, tmp_path, weights, fresh):
        network = create_model(weights, num_classes=2)
        save_model(network, tmp_path / "two.safetensors", classes=("x", "y"))
        tuning = FineTuning(fresh_head=fresh)
        with nullcontext() if fresh else pytest.warns(UserWarning, match="`fresh_head`"):
            tune(
                data, tmp_path / "run", tmp_path / "two.safetensors", epochs=1, learning_rate=1e-12, fine_tuning=tuning
            )
        tuned, before = state_of(tmp_path / "run"), network.state_dict()
        same = [
            key
            for key in moving(weights)
            if "running" not in key and torch.allclose(tuned[key], before[key], atol=1e-6)
        ]
        assert len(same) == 16
        assert torch.allclose(tuned["head.conv.weight"], before["head.conv.weight"], atol=1e-6) != fresh
        assert create_model(tmp_path / "run" / "model.safetensors").classes == ("green", "red")

    def test_a_fused_network_is_not_trained(self, data, tmp_path, weights):
        save_model(bcoskit.fuse(create_model(weights)), tmp_path / "fused.safetensors")
        with pytest.raises(ValueError, match="holds a fused network"):
            tune(data, tmp_path / "run", tmp_path / "fused.safetensors")

    def test_weights_that_go_with_a_name(self, data, tmp_path):
        name = "resnet20.bcos_cifar10"
        tune(data, tmp_path / "run", name, weights="pretrained", epochs=1, fine_tuning=FineTuning(frozen="layer3"))
        tuned, before = state_of(tmp_path / "run"), create_model(name, weights=True).state_dict()
        assert all(torch.equal(tuned[key], before[key]) for key in before if not key.startswith("fc."))
        settings = json.loads((tmp_path / "run" / "settings.json").read_text())
        assert settings["weights"] == "pretrained"

    def test_a_converted_network_and_a_conversion_of_a_file(self, data, tmp_path):
        ordinary = create_model("timm/test_resnet", num_classes=3)
        save_model(ordinary, tmp_path / "ordinary.safetensors")
        small = {"epochs": 1, "batch_size": 4, "size": 64}
        tune(data, tmp_path / "first", NAME, from_=str(tmp_path / "ordinary.safetensors"), **small)
        first = create_model(tmp_path / "first" / "model.safetensors")
        assert (first.conversion.config.b, first.transform.size, first.transform.resize) == (2.0, 64, None)
        tuning = FineTuning(frozen="model.layer3", layer_decay=0.9)
        tune(data, tmp_path / "second", tmp_path / "first" / "model.safetensors", **small, fine_tuning=tuning)
        second = create_model(tmp_path / "second" / "model.safetensors")
        assert second.conversion.config == first.conversion.config
        assert torch.equal(second.model.layer3[0].conv1.weight, first.model.layer3[0].conv1.weight)
        assert not torch.equal(second.model.layer4[0].conv1.weight, first.model.layer4[0].conv1.weight)

    def test_from_the_command_line(self, data, tmp_path, weights, capsys):
        arguments = ["train", f"--model={weights}", f"--data={data}", "--epochs=1", "--batch-size=8"]
        arguments += ["--no-compile-step", "--fine_tuning.frozen=3", "--fine_tuning.head=10"]
        assert cli.main([*arguments, f"--out={tmp_path / 'run'}"]) == 0
        assert "test_accuracy" in capsys.readouterr().out
        assert not {key for key in moved(tmp_path / "run", weights) if key.startswith(EARLY)}
        for wrong in ("--fine_tuning.frozen=20", "--fine_tuning.layer_decay=2", "--fine_tuning.frozen=none"):
            assert cli.main([*arguments, wrong, f"--out={tmp_path / 'other'}"]) == 2
            assert capsys.readouterr().err.count("\n") == 1
        assert not (tmp_path / "other").exists()


class TestImages:
    def test_grey_ones_of_another_size(self, data, tmp_path):
        tune(data, tmp_path / "run", NAME, size=20, channels=1, epochs=1)
        network = create_model(tmp_path / "run" / "model.safetensors")
        assert (network.transform.size, network.transform.channels, network.in_chans) == (20, 1, 2)
        settings = json.loads((tmp_path / "run" / "settings.json").read_text())
        assert (settings["size"], settings["channels"]) == (20, 1)

    def test_a_size_that_does_not_suit(self, data, tmp_path):
        with pytest.raises(ValueError, match=r"`size` \(=100\) does not suit 'simple_vit_ti"):
            tune(data, tmp_path / "run", "simple_vit_ti_patch16_224.bcos_v2_in1k", size=100)
        assert not (tmp_path / "run").exists()

    def test_rows_of_files(self, tmp_path, weights):
        row = model_row(weights)
        assert (row.name, row.classes) == (NAME, ("a", "b", "c"))
        assert model_row(NAME, weights) == row != model_row(NAME)
        ordinary = create_model("resnet20.standard_cifar10", num_classes=3)
        converted = bcosify(ordinary, BcosConfig.preset("bcosification"))
        save_model(converted, tmp_path / "converted.safetensors")
        assert model_row(tmp_path / "converted.safetensors").transform.encoding == "bcos"
        with pytest.raises(ValueError, match=f"holds weights of {NAME}"):
            model_row("resnet20.standard_cifar10", weights)
