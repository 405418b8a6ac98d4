"""Fine-tuning of converted networks, and alignment with a teacher."""

import csv
import json
import shutil

import pytest
import torch

import bcoskit
from bcoskit import cli
from bcoskit.convert import BcosConfig, bcosify
from bcoskit.data import ImageError
from bcoskit.models import create_model, save_model
from bcoskit.nn import BcosConv2d
from bcoskit.training import Hardware, Optimization, align, train
from bcoskit.training._align import Aligner, _splits, alignment_loss, augmentation
from bcoskit.training._augment import one_by_one
from bcoskit.training._loading import Unreadable
from bcoskit.training._module import seeded
from training_runs import break_off, same_weights, write_images

NAME = "resnet20.standard_cifar10"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An ordinary network of three classes, whose norms have statistics."""
    torch.manual_seed(0)
    network = create_model(NAME, num_classes=3).train()
    with torch.no_grad():
        for _ in range(5):
            network(torch.randn(8, 3, 32, 32))
    path = tmp_path_factory.mktemp("weights") / "ordinary.safetensors"
    save_model(network.eval(), path)
    return path


def tune(data, out, weights, **arguments):
    options = {"from_": NAME, "weights": str(weights), "epochs": 2, "batch_size": 8, "compile_step": False}
    return train(data, out=out, **options | arguments)


def teach(data, out, weights, **arguments):
    options = {"teacher": NAME, "weights": str(weights), "epochs": 2, "batch_size": 8, "compile_step": False}
    return align(data, out=out, **options | arguments)


class TestFineTuning:
    @pytest.mark.parametrize("gradual", [0.0, 0.5, 1.0])
    def test_what_comes_out_is_a_converted_network(self, data, tmp_path, weights, gradual):
        figures = tune(data, tmp_path / "run", weights, gradual=gradual)
        network = create_model(tmp_path / "run" / "model.safetensors")
        assert network.classes == ("green", "red")
        assert (network.transform.encoding, network.loss, network.name) == ("bcos", "bce", NAME)
        assert network.conversion is not None
        assert network.conversion.config.b == 2
        expected = bcosify(create_model(NAME, num_classes=2), BcosConfig.preset("bcosification"))
        assert network.state_dict().keys() == expected.state_dict().keys()
        x = torch.stack([network.transform(file) for file in sorted((data / "test").rglob("*.png"))])
        with torch.no_grad():
            right = (network(x).argmax(1) == torch.tensor([0] * 3 + [1] * 3)).float().mean()
        assert float(right) == pytest.approx(figures["test_accuracy"])
        assert float(bcoskit.explain(network, x, shares=True).residual.abs().max()) < 1e-5
        settings = json.loads((tmp_path / "run" / "settings.json").read_text())
        assert settings["gradual"] == gradual
        assert settings["learning_rate"] == 1e-4

    def test_learnable_exponents_are_at_least_1(self, data, tmp_path, weights):
        options = Optimization(optimizer="sgd", weight_decay=5.0)  # which pulls them down
        tune(data, tmp_path / "run", weights, b=1.0, learnable_b=True, learning_rate=0.01, optimization=options)
        state = create_model(tmp_path / "run" / "model.safetensors").state_dict()
        exponents = torch.stack([value for name, value in state.items() if name.endswith(".b")])
        assert bool((exponents >= 1).all())
        assert bool((exponents == 1).any())

    @pytest.mark.parametrize("gradual", [0.0, 0.5])
    def test_filters_that_compete(self, data, tmp_path, weights, gradual):
        tune(data, tmp_path / "run", weights, max_out=2, gradual=gradual, learning_rate=1e-3)
        network = create_model(tmp_path / "run" / "model.safetensors")
        layers = [module for module in network.modules() if isinstance(module, BcosConv2d)]
        assert {layer.max_out for layer in layers} == {2}
        first, second = layers[-1].weight.detach().unflatten(0, (-1, 2)).unbind(1)
        assert not torch.allclose(first, second)  # copies of one at first

    def test_it_begins_with_the_weights(self, data, tmp_path, weights):
        tune(data, tmp_path / "run", weights, learning_rate=1e-12, epochs=1)
        tuned, given = create_model(tmp_path / "run" / "model.safetensors"), create_model(weights)
        assert torch.allclose(tuned.layer1[0].conv1.weight, given.layer1[0].conv1.weight, atol=1e-6)
        tune(data, tmp_path / "fresh", "fresh", learning_rate=1e-12, epochs=1)
        fresh = create_model(tmp_path / "fresh" / "model.safetensors")
        assert not torch.allclose(fresh.layer1[0].conv1.weight, given.layer1[0].conv1.weight, atol=1e-2)

    def test_the_ordinary_network_alone(self, data, tmp_path, weights):
        tune(data, tmp_path / "run", weights, convert="none")
        network = create_model(tmp_path / "run" / "model.safetensors")
        assert (network.transform.encoding, network.loss) == ("normalized", "cross_entropy")
        assert network.conversion is None

    @pytest.mark.parametrize(("epoch", "batch"), [(0, 1), (1, 1), (2, 1)])
    def test_a_run_goes_on_within_an_epoch(self, epoch, batch, data, tmp_path, weights, monkeypatch):
        options = {"gradual": 0.5, "epochs": 3}
        tune(data, tmp_path / "whole", weights, **options)
        with monkeypatch.context() as patched:
            break_off(patched, epoch, batch)
            with pytest.raises(OSError, match="power cut"):
                tune(data, tmp_path / "cut", weights, checkpoint_every=1, **options)
        tune(data, tmp_path / "cut", weights, resume=True, **options)
        assert same_weights(tmp_path / "whole", tmp_path / "cut")

    @pytest.mark.parametrize("epoch", [1, 2])
    def test_a_run_that_was_cut_off_goes_on(self, data, tmp_path, weights, monkeypatch, epoch):
        options = {"gradual": 0.5, "epochs": 3}
        tune(data, tmp_path / "whole", weights, **options)
        with monkeypatch.context() as patched:
            break_off(patched, epoch)
            with pytest.raises(OSError, match="power cut"):
                tune(data, tmp_path / "cut", weights, **options)
        tune(data, tmp_path / "cut", weights, **options, resume=True)
        assert same_weights(tmp_path / "whole", tmp_path / "cut")
        with pytest.raises(ValueError, match="`gradual`"):
            tune(data, tmp_path / "cut", weights, **options | {"gradual": 0.4}, resume=True)

    def test_a_network_of_timm(self, data, tmp_path, capsys):
        arguments = ["train", "--from", "timm/test_resnet", "--weights=fresh", f"--data={data}", "--epochs=1"]
        assert cli.main([*arguments, "--batch-size=4", "--no-compile-step", f"--out={tmp_path / 'run'}"]) == 0
        assert "test_accuracy" in capsys.readouterr().out
        network = create_model(tmp_path / "run" / "model.safetensors")
        assert network.name == "timm/test_resnet"
        photographs = str(data / "test" / "red")
        model = f"--model={tmp_path / 'run' / 'model.safetensors'}"
        assert cli.main(["explain", photographs, model, f"--out={tmp_path / 'pictures'}"]) == 0
        assert len(list((tmp_path / "pictures").rglob("*.png"))) == 3

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"from_": "resnet20.bcos_cifar10", "weights": "fresh"}, "B-cos"),
            ({"from_": "timm/nothing"}, "timm has none"),
            ({"weights": "absent.safetensors"}, "absent.safetensors"),
            ({"from_": None, "weights": "pretrained", "gradual": 0.5}, "`from_`"),
            ({"from_": None, "weights": "pretrained", "convert": "none"}, "`from_`"),
            ({"gradual": 1.5}, "`gradual`"),
            ({"gradual": 0.5, "learnable_b": True}, "`gradual`"),
            ({"b": 0.5}, "`b`"),
            ({"learnable_b": True, "hardware": Hardware(strategy="fsdp")}, "`learnable_b` makes exponents numbers"),
            ({"gradual": 0.5, "hardware": Hardware(strategy="fsdp")}, "`gradual` makes exponents numbers"),
            ({"optimization": Optimization(ema=0.9, ema_every=9)}, "`ema_every`"),
            ({"convert": "none", "b": 2.0}, "`b`"),
            ({"convert": "none", "gradual": 0.5}, "`gradual`"),
            ({"convert": "none", "max_out": 2}, "`max_out`"),
            ({"from_": None, "weights": "pretrained", "max_out": 2}, "`from_`"),
            ({"max_out": 0}, "`max_out`"),
        ],
    )
    def test_what_cannot_be(self, data, tmp_path, weights, arguments, message):
        with pytest.raises(ValueError, match=message):
            tune(data, tmp_path / "run", **{"weights": weights} | arguments)
        assert not (tmp_path / "run").exists()

    def test_exponents_of_a_file_that_cannot_be_shared_out(self, data, tmp_path, weights):
        tune(data, tmp_path / "learnt", weights, learnable_b=True)
        file = str(tmp_path / "learnt" / "model.safetensors")
        again = {"model": file, "epochs": 1, "batch_size": 8, "compile_step": False}
        with pytest.raises(ValueError, match=r"'fsdp'\) cannot share out numbers such as '.*b': take 'ddp'"):
            train(data, out=tmp_path / "run", **again, hardware=Hardware(strategy="fsdp"))
        assert not (tmp_path / "run").exists()
        train(data, out=tmp_path / "run", **again)


class TestAlignment:
    def test_the_loss_is_0_for_the_teacher_itself(self, weights):
        teacher = create_model(weights)
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            outputs = (teacher(x), [teacher.forward_features(x)])
        assert float(alignment_loss(outputs, outputs)) == 0
        shifted = (outputs[0] + 3, outputs[1])  # of all logits
        assert float(alignment_loss(shifted, outputs)) < 1e-10
        nothing = (torch.zeros_like(outputs[0]), [torch.zeros_like(outputs[1][0])])
        assert float(alignment_loss(nothing, outputs)) == pytest.approx(1)

    def test_the_loss_of_half_precision(self):
        """Squares of what half precision holds leave its range, up and down."""
        for size in (400.0, 1e-4):
            theirs = size * torch.tensor([[1.0, -1.0], [0.5, 0.25]])
            logits = torch.tensor([[300.0, -300.0], [1.0, 2.0]])
            expected = alignment_loss((logits / 2, [theirs / 2]), (logits, [theirs]))
            half = alignment_loss(
                (logits.half() / 2, [theirs.half() / 2]),
                (logits.half(), [theirs.half()]),
            )
            assert float(expected) == pytest.approx(0.25)
            assert float(half) == pytest.approx(0.25, rel=1e-2)

    def test_the_teacher_goes_where_the_student_goes(self, weights):
        teacher = create_model(weights)
        student = bcosify(teacher)
        common = {"size": 32, "has_labels": False, "compile_step": False, "learning_rate": 1e-3, "seed": 0}
        aligner = Aligner(student, teacher, {"layer1": "layer1"}, **common).double()
        assert {each.dtype for each in teacher.parameters()} == {torch.float64}
        aligner.to("meta")
        assert all(each.is_meta for network in (student, teacher) for each in network.parameters())
        assert not any(each.requires_grad for each in teacher.parameters())

    def test_splits_without_labels(self, data, tmp_path, weights):
        for split in ("train", "test"):
            (tmp_path / "images" / split).mkdir(parents=True)
            for index, file in enumerate(sorted((data / split).rglob("*.png"))):
                shutil.copy(file, tmp_path / "images" / split / f"{index}.png")
        learnt, measured, has_labels = _splits(
            tmp_path / "images", create_model(weights).transform, (), Unreadable(0, tmp_path, False)
        )
        assert (len(learnt), len(measured)) == tuple(
            len(list((data / each).rglob("*.png"))) for each in ("train", "test")
        )
        assert not has_labels
        shutil.rmtree(tmp_path / "images" / "test")
        learnt, measured, _ = _splits(
            tmp_path / "images", create_model(weights).transform, (), Unreadable(0, tmp_path, False)
        )
        assert len(measured) == 2  # every tenth of 16

    def test_a_batch_of_two_processes_is_changed_as_one(self):
        images = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
        change = augmentation(32)
        whole = one_by_one(images, change, seeded(1))
        parts = [one_by_one(images[2 * part : 2 * part + 2], change, seeded(1), (part, 2)) for part in (0, 1)]
        assert torch.equal(torch.cat(parts), whole)
        assert not torch.equal(whole[:2], one_by_one(images[:2], change, seeded(1), (1, 2)))

    def test_another_precision_is_another_run(self, data, tmp_path, weights):
        teach(data, tmp_path / "run", weights, epochs=1)
        with pytest.raises(ValueError, match=r"`precision` \(=bf16\) was 32"):
            teach(data, tmp_path / "run", weights, epochs=1, resume=True, hardware=Hardware("cpu", precision="bf16"))

    def test_a_file_has_its_own_weights(self, data, tmp_path, weights):
        with pytest.raises(ValueError, match="is a file of weights itself"):
            teach(data, tmp_path / "run", "fresh", teacher=str(weights))
        align(data, out=tmp_path / "run", teacher=str(weights), epochs=1, batch_size=8, compile_step=False)
        assert json.loads((tmp_path / "run" / "settings.json").read_text())["weights"] == str(weights)

    def test_it_learns_without_labels(self, data, tmp_path, weights):
        figures = teach(data, tmp_path / "run", weights, epochs=6, gradual=0.0)
        with next((tmp_path / "run" / "csv").rglob("metrics.csv")).open() as file:
            losses = [float(row["test_loss"]) for row in csv.DictReader(file) if row["test_loss"]]
        assert len(losses) == 6
        assert losses[-1] < losses[0]
        assert set(figures) == {"test_loss", "test_agreement"}
        student = create_model(tmp_path / "run" / "model.safetensors")
        assert student.classes == create_model(weights).classes
        assert student.conversion.config.b == 2
        assert student.loss == "cross_entropy"  # its logits mean what the teacher's mean
        assert not any(module._forward_hooks for module in student.modules())

    def test_images_without_splits(self, data, tmp_path, weights):
        images = tmp_path / "images" / "deep"
        images.mkdir(parents=True)
        for index, file in enumerate(sorted((data / "train").rglob("*.png"))):
            shutil.copy(file, images / f"{index}.png")
        teach(tmp_path / "images", tmp_path / "run", weights, epochs=1)
        settings = json.loads((tmp_path / "run" / "settings.json").read_text())
        assert settings["data"] != settings["test_data"]
        assert (tmp_path / "run" / "model.safetensors").exists()

    def test_figures_are_the_same_however_rarely_they_are_measured(self, data, tmp_path, weights):
        always = teach(data, tmp_path / "always", weights, epochs=3)
        rarely = teach(data, tmp_path / "rarely", weights, epochs=3, measure_every=2)
        again = teach(data, tmp_path / "rarely", weights, epochs=3, measure_every=2, resume=True)
        assert rarely == always == again
        assert rarely != teach(data, tmp_path / "other", weights, epochs=2)

    def test_a_run_that_was_cut_off_goes_on(self, data, tmp_path, weights, monkeypatch):
        teach(data, tmp_path / "whole", weights, epochs=3)
        step = Aligner.training_step

        def broken(self, batch, index):
            if self.current_epoch == 2:
                raise OSError("power cut")
            return step(self, batch, index)

        with monkeypatch.context() as patched:
            patched.setattr(Aligner, "training_step", broken)
            with pytest.raises(OSError, match="power cut"):
                teach(data, tmp_path / "cut", weights, epochs=3)
        teach(data, tmp_path / "cut", weights, epochs=3, resume=True)
        assert same_weights(tmp_path / "whole", tmp_path / "cut")

    def test_labels_by_name(self, tmp_path):
        network = create_model(NAME, num_classes=3)
        save_model(network.eval(), tmp_path / "teacher.safetensors", classes=("green", "blue", "red"))
        write_images(tmp_path / "data", "train", 8)
        write_images(tmp_path / "data", "test", 3)
        figures = teach(tmp_path / "data", tmp_path / "run", tmp_path / "teacher.safetensors", epochs=1)
        student = create_model(tmp_path / "run" / "model.safetensors")
        right = [
            student.classes[int(student(student.transform(file)[None]).argmax())] == file.parent.name
            for file in sorted((tmp_path / "data" / "test").rglob("*.png"))
        ]
        assert figures["test_accuracy"] == pytest.approx(sum(right) / len(right))
        (tmp_path / "data" / "test" / "red").rename(tmp_path / "data" / "test" / "black")
        figures = teach(tmp_path / "data", tmp_path / "other", tmp_path / "teacher.safetensors", epochs=1)
        assert "test_accuracy" not in figures

    def test_splits_that_cannot_be_read_are_no_heap_of_images(self, data, tmp_path, weights):
        shutil.copytree(data, tmp_path / "data")
        (tmp_path / "data" / "train" / "empty").mkdir()
        with pytest.raises(ImageError, match="empty"):
            teach(tmp_path / "data", tmp_path / "run", weights, epochs=1)

    def test_from_the_command_line(self, data, tmp_path, weights, capsys):
        arguments = ["align", "--teacher", NAME, f"--weights={weights}", f"--data={data}", "--epochs=1"]
        assert cli.main([*arguments, "--batch-size=8", "--no-compile-step", f"--out={tmp_path / 'run'}"]) == 0
        assert "test_agreement" in capsys.readouterr().out
        for wrong in ("--convert=none", "--train-size=0", "--measure-every=0", "--gradual=2", "--teacher=timm/nothing"):
            assert cli.main([*arguments, wrong, f"--out={tmp_path / 'other'}"]) == 2
            assert capsys.readouterr().err.count("\n") == 1
        assert not (tmp_path / "other").exists()
