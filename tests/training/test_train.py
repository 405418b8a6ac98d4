import csv
import json
import logging
import math
import os
import pickle
import random
import shutil
import signal
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bcoskit import BcosConfig, bcosify, cli
from bcoskit.data import ImageError, ImageTransform, folder, random_crop_flip
from bcoskit.models import create_model, model_row
from bcoskit.training import Augmentation, FineTuning, Loss, Optimization, _engine, train
from bcoskit.training._loading import shuffled
from bcoskit.training._module import Classifier, seeded
from training_runs import COLORS, break_off, same_weights, write_images

RECIPES = Path(__file__).parents[2] / "recipes"
BCOS, STANDARD = "resnet20.bcos_cifar10", "resnet20.standard_cifar10"


def run(data, out, **arguments):
    return train(data, out=out, **{"epochs": 2, "batch_size": 8, "compile_step": False} | arguments)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of three epochs that nothing has disturbed, and what it returned."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, run(data, out, epochs=3)


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished[0], tmp_path / "copied"))


def metrics(out, name, version=0):
    with (out / "csv" / f"version_{version}" / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def refused(error, *arguments, **keywords):
    with pytest.raises(error) as caught:
        run(*arguments, **keywords)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_the_loss_of_short_epochs_is_logged(data, tmp_path):
    run(str(data), str(tmp_path / "run"), epochs=3, batch_size=4, optimization=Optimization(accumulate=2))
    assert len(metrics(tmp_path / "run", "train_loss")) == 3


class TestAccumulation:
    def test_an_epoch_has_whole_groups_of_batches(self, data, tmp_path):
        options = {"epochs": 2, "batch_size": 2, "augmentation": Augmentation(crop="none", flip=False)}
        run(data, tmp_path / "groups", **options, optimization=Optimization("sgd", accumulate=3))
        checkpoint = torch.load(tmp_path / "groups" / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 2 * (16 // (2 * 3)) == 4  # of eight batches the last two are left out
        seen = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
        assert seen == 2 * 6

    def test_groups_are_batches_that_are_larger(self, data, tmp_path):
        """But for norms, which are those of layers here."""
        options = {
            "model": "cnn9_narrow.bcos_lnu_linear_nomaxout_cifar10",
            "epochs": 2,
            "augmentation": Augmentation(crop="none", flip=False),
        }
        whole = run(data, tmp_path / "whole", **options, batch_size=6, optimization=Optimization("sgd"))
        groups = run(data, tmp_path / "groups", **options, batch_size=2, optimization=Optimization("sgd", accumulate=3))
        assert groups["test_loss"] == pytest.approx(whole["test_loss"], rel=1e-4)
        other = run(data, tmp_path / "other", **options, batch_size=2, optimization=Optimization("sgd"))
        assert other["test_loss"] != pytest.approx(whole["test_loss"], rel=1e-4)

    def test_more_than_there_are(self, data, tmp_path):
        message = refused(ValueError, data, tmp_path / "run", batch_size=8, optimization=Optimization(accumulate=3))
        assert message == "`accumulate` (=3) is above the number of batches, 2"


class TestFiles:
    def test_what_is_written(self, finished):
        out, _ = finished
        assert sorted(entry.name for entry in out.iterdir()) == [
            "checkpoints",
            "csv",
            "model.safetensors",
            "settings.json",
            "tensorboard",
        ]
        assert [entry.name for entry in (out / "checkpoints").iterdir()] == ["last.ckpt"]
        assert len(list((out / "tensorboard").glob("events.*"))) == 1

    def test_settings(self, finished):
        out, _ = finished
        settings = json.loads((out / "settings.json").read_text())
        assert settings == {
            "model": BCOS,
            "weights": "fresh",
            "size": 32,
            "channels": 3,
            "epochs": 3,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "optimization": asdict(Optimization()),
            "loss": asdict(Loss()),
            "augmentation": asdict(Augmentation()),
            "fine_tuning": asdict(FineTuning()),
            "precision": "32",
            "images": "memory",
            "seed": 42,
            "classes": ["green", "red"],
            "data": settings["data"],
            "test_data": settings["test_data"],
        }
        assert len(settings["data"]) == len(settings["test_data"]) == 16
        assert settings["data"] != settings["test_data"]

    def test_model(self, finished):
        model = create_model(finished[0] / "model.safetensors")
        assert model.classes == ("green", "red")
        assert model(torch.zeros(1, 6, 32, 32)).shape == (1, 2)
        assert int(model.bn1.num_batches_tracked) == 3 * 2

    def test_logs(self, finished):
        out, figures = finished
        assert len(metrics(out, "train_loss")) == 3
        assert metrics(out, "test_loss")[-1] == pytest.approx(figures["test_loss"])
        assert metrics(out, "test_accuracy")[-1] == pytest.approx(figures["test_accuracy"])
        # A cosine over six steps, written down before each epoch's first step.
        expected = [5e-4 * (1 + math.cos(math.pi * step / 6)) for step in (0, 2, 4)]
        assert metrics(out, "lr-Adam") == pytest.approx(expected)


class TestFigures:
    @staticmethod
    def logits(out, data):
        model = create_model(out / "model.safetensors")
        images = folder(data / "test", model.transform)
        x, labels = torch.stack([image for image, _ in images]), images.labels.tolist()
        with torch.no_grad():
            return model.double()(x.double()).tolist(), labels

    def test_binary_cross_entropy(self, finished, data):
        out, figures = finished
        logits, labels = self.logits(out, data)
        terms = [
            -math.log(1 / (1 + math.exp(-value if index == label else value)))
            for row, label in zip(logits, labels, strict=True)
            for index, value in enumerate(row)
        ]
        assert len(terms) == 6 * 2
        assert figures["test_loss"] == pytest.approx(sum(terms) / len(terms), rel=1e-5)
        correct = [row.index(max(row)) == label for row, label in zip(logits, labels, strict=True)]
        assert figures["test_accuracy"] == pytest.approx(sum(correct) / 6)

    def test_cross_entropy_of_an_ordinary_network(self, data, tmp_path):
        figures = run(data, tmp_path / "run", model=STANDARD)
        logits, labels = self.logits(tmp_path / "run", data)
        terms = [math.log(sum(map(math.exp, row))) - row[label] for row, label in zip(logits, labels, strict=True)]
        assert figures["test_loss"] == pytest.approx(sum(terms) / len(terms), rel=1e-4)
        assert create_model(tmp_path / "run" / "model.safetensors").loss == "cross_entropy"

    @pytest.mark.parametrize(("model", "kind"), [(BCOS, "cross_entropy"), (STANDARD, "bce")])
    def test_the_file_says_by_which_loss_logits_are_probabilities(self, data, tmp_path, model, kind):
        run(data, tmp_path / "run", model=model, epochs=1, loss=Loss(kind))
        assert model_row(model).loss != kind
        assert create_model(tmp_path / "run" / "model.safetensors").loss == kind

    def test_first_training_loss(self, data, tmp_path):
        run(data, tmp_path / "run", epochs=1, batch_size=16, seed=3)
        torch.manual_seed(3)
        model = create_model(BCOS, num_classes=2).train().double()
        images = folder(data / "train", model.transform.view)
        order = shuffled(16, 3, 0).tolist()
        pixels = torch.stack([_pixels(images[index][0]) for index in order])
        augmented = random_crop_flip(pixels, generator=seeded(3, 0, 0))
        logits = model(model.transform.encode_pixels(augmented).double())
        targets = torch.eye(2, dtype=torch.float64)[images.labels[order]]
        probabilities = torch.where(targets == 1, logits.sigmoid(), (-logits).sigmoid())
        assert metrics(tmp_path / "run", "train_loss") == pytest.approx(
            [-float(probabilities.log().mean().detach())], rel=1e-5
        )

    def test_a_network_learns(self, data, tmp_path):
        figures = run(data, tmp_path / "run", epochs=14, learning_rate=3e-3)
        losses = metrics(tmp_path / "run", "train_loss")
        assert losses[-1] < losses[0] / 20
        assert figures["test_accuracy"] == 1


class TestReproducibility:
    def test_the_seed_determines_the_weights(self, finished, data, tmp_path):
        torch.manual_seed(12345)
        before = torch.get_rng_state()
        figures = run(data, tmp_path / "same", epochs=3)
        assert torch.equal(torch.get_rng_state(), before)
        assert same_weights(tmp_path / "same", finished[0])
        assert figures == finished[1]
        run(data, tmp_path / "other", epochs=3, seed=43)
        assert not same_weights(tmp_path / "other", finished[0])

    @pytest.mark.parametrize(("epoch", "batch"), [(0, 1), (1, 0), (2, 1)])
    def test_a_resumed_run_ends_where_an_unbroken_one_does(self, epoch, batch, finished, data, tmp_path, monkeypatch):
        out = tmp_path / "run"
        with monkeypatch.context() as patch:
            break_off(patch, epoch, batch)
            with pytest.raises(OSError, match="power cut"):
                run(data, out, epochs=3)
        assert not (out / "model.safetensors").exists()
        assert (out / "checkpoints" / "last.ckpt").exists() == (epoch > 0)
        torch.manual_seed(99)
        figures = run(data, out, epochs=3, resume=True)
        assert same_weights(out, finished[0])
        assert figures == finished[1]

    @pytest.mark.parametrize(
        ("every", "epoch", "batch", "repeated"), [(1, 0, 1, 0), (3, 1, 1, 0), (2, 1, 1, 1), (1, 2, 0, 0)]
    )
    def test_a_run_goes_on_within_an_epoch(self, every, epoch, batch, repeated, finished, data, tmp_path, monkeypatch):
        out = tmp_path / "run"
        with monkeypatch.context() as patch:
            break_off(patch, epoch, batch)
            with pytest.raises(OSError, match="power cut"):
                run(data, out, epochs=3, checkpoint_every=every)
        seen = []
        step = Classifier.training_step

        def counted(self, images_and_labels, index):
            seen.append((self.current_epoch, index))
            return step(self, images_and_labels, index)

        monkeypatch.setattr(Classifier, "training_step", counted)
        torch.manual_seed(99)
        figures = run(data, out, epochs=3, resume=True)
        assert same_weights(out, finished[0])
        assert figures == finished[1]
        assert seen[0] == (epoch, batch - repeated)
        assert len(seen) == len(set(seen)) == 2 * 3 - 2 * epoch - batch + repeated
        for name in ("train_loss", "test_loss"):
            assert metrics(out, name) + metrics(out, name, 1) == metrics(finished[0], name)

    def test_older_logs_are_kept(self, data, tmp_path, monkeypatch):
        out = tmp_path / "run"
        with monkeypatch.context() as patch:
            break_off(patch, 2)
            with pytest.raises(OSError, match="power cut"):
                run(data, out, epochs=3)
        older = (out / "csv" / "version_0" / "metrics.csv").read_bytes()
        events = {path: path.read_bytes() for path in (out / "tensorboard").glob("events.*")}
        run(data, out, epochs=3, resume=True)
        assert len(metrics(out, "test_loss", 0)) == 2
        assert len(metrics(out, "test_loss", 1)) == 1
        assert (out / "csv" / "version_0" / "metrics.csv").read_bytes() == older
        assert all(path.read_bytes() == content for path, content in events.items())
        assert len(list((out / "tensorboard").glob("events.*"))) == 2

    def test_resuming_a_finished_run_measures_it(self, copied, finished, data):
        (copied / "model.safetensors").unlink()
        logs = sorted(copied.glob("csv/*/metrics.csv"))
        figures = run(data, copied, epochs=3, resume=True)
        assert sorted(copied.glob("csv/*/metrics.csv")) == logs
        assert figures == pytest.approx(finished[1])
        assert same_weights(copied, finished[0])

    def test_resume_without_a_run_begins_one(self, finished, data, tmp_path):
        run(data, tmp_path / "run", epochs=3, resume=True)
        assert same_weights(tmp_path / "run", finished[0])

    def test_interruption(self, finished, data, tmp_path, monkeypatch):
        handler = signal.getsignal(signal.SIGINT)
        with monkeypatch.context() as patch:
            break_off(patch, 1, error=KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                run(data, tmp_path / "run", epochs=3)
        assert signal.getsignal(signal.SIGINT) is handler
        assert not (tmp_path / "run" / "model.safetensors").exists()
        run(data, tmp_path / "run", epochs=3, resume=True)
        assert same_weights(tmp_path / "run", finished[0])

    def test_order(self):
        orders = [shuffled(100, 7, epoch).tolist() for epoch in (0, 1, 0)]
        assert orders[0] == orders[2] != orders[1]
        assert sorted(orders[1]) == list(range(100))
        assert shuffled(100, 8, 0).tolist() != orders[0]

    def test_random_numbers_are_the_same_on_every_machine(self):
        # The first 63 bits of the Mersenne Twister that Python seeds with the text "(42, 0)".
        assert seeded(42, 0).initial_seed() == random.Random("(42, 0)").getrandbits(63) == 3264758402863443102
        assert seeded(4, 20).initial_seed() != seeded(42, 0).initial_seed()


class TestRefusals:
    @pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["epochs", "batch_size", "learning_rate"])
    def test_ranges(self, name, value, data, tmp_path):
        assert refused(ValueError, data, tmp_path / "run", **{name: value}).startswith(f"`{name}` (={value}) must be")
        assert not (tmp_path / "run").exists()

    def test_other_arguments(self, data, tmp_path):
        out = tmp_path / "run"
        for seed in (-1, 2**63):
            assert f"`seed` (={seed}) must be" in refused(ValueError, data, out, seed=seed)
        for name in ("epochs", "batch_size", "seed", "watch_every", "checkpoint_every"):
            assert refused(ValueError, data, out, **{name: 1.5}) == f"`{name}` (=1.5) must be a whole number"
        assert "'resnet21' is neither" in refused(ValueError, data, out, model="resnet21")
        message = refused(ValueError, data, out, model="clip_resnet50.bcosification_in1k")
        assert message.endswith("has embeddings for outputs, not classes that could be trained")
        assert refused(ValueError, data, out, batch_size=17) == "`batch_size` (=17) is above the number of images, 16"
        for mixture in (Augmentation(mixup=0.2), Augmentation(cutmix=1.0)):
            message = refused(ValueError, data, out, batch_size=7, augmentation=mixture)
            assert message.startswith("`batch_size` (=7) must be even for mixup and cutmix")
        assert not out.exists()

    def test_kinds(self, data, tmp_path):
        for arguments in ({"optimization": None}, {"loss": "bce"}, {"hardware": {}}, {"model": None}):
            (name,) = arguments
            assert refused(TypeError, data, tmp_path / "run", **arguments).startswith(f"`{name}` (=")

    def test_a_warm_up_without_end(self, data, tmp_path):
        message = refused(ValueError, data, tmp_path / "run", optimization=Optimization(warmup_epochs=3), epochs=3)
        assert message.startswith("`warmup_epochs` (=3) must be below `epochs` (=3)")
        assert not (tmp_path / "run").exists()

    def test_data(self, data, tmp_path):
        out = tmp_path / "run"
        assert "no such file or folder" in refused(ImageError, tmp_path / "absent", out)
        empty = tmp_path / "empty"
        empty.mkdir()
        assert "holds no train images" in refused(ImageError, empty, out)
        write_images(empty, "train", 1)
        assert "holds no test images" in refused(ImageError, empty, out, batch_size=1)
        write_images(empty, "test", 1, {"blue": (30, 30, 200), "red": COLORS["red"]})
        message = refused(ValueError, empty, out, batch_size=1)
        assert (
            message == f"`data` (={empty}) has other classes for testing than for training: 'blue' is in one split only"
        )
        (empty / "train" / "red" / "0.png").write_bytes(b"no image")
        assert "0.png: is no image" in refused(ImageError, empty, out, batch_size=1)
        assert not out.exists()

    def test_out_is_a_file(self, data, tmp_path):
        (tmp_path / "file").write_text("mine")
        assert "`out` (=" in refused(ValueError, data, tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.parametrize("removed", ["nothing", "model.safetensors", "checkpoints"])
    def test_existing_run(self, removed, copied, data):
        if removed == "checkpoints":
            shutil.rmtree(copied / removed)
        elif removed != "nothing":
            (copied / removed).unlink()
        before = contents(copied)
        assert "holds a run already; `resume` it" in refused(ValueError, data, copied, epochs=3)
        assert contents(copied) == before

    @pytest.mark.parametrize(
        ("name", "value", "old"),
        [
            ("epochs", 4, 3),
            ("batch_size", 4, 8),
            ("learning_rate", 2e-3, 1e-3),
            ("seed", 1, 42),
            ("model", STANDARD, BCOS),
        ],
    )
    def test_changed_settings(self, name, value, old, copied, data):
        before = contents(copied)
        message = refused(ValueError, data, copied, **{"epochs": 3, "resume": True, name: value})
        assert message.startswith(f"`{name}` (={value}) was {old} in the run in {copied}; resume it with the same")
        assert contents(copied) == before

    def test_changed_classes(self, copied, data, tmp_path):
        renamed = Path(shutil.copytree(data, tmp_path / "renamed"))
        for split in ("train", "test"):
            (renamed / split / "red").rename(renamed / split / "rouge")
        message = refused(ValueError, renamed, copied, epochs=3, resume=True)
        assert message.startswith("`classes` (=['green', 'rouge']) was ['green', 'red'] in the run")

    def test_settings_that_an_older_version_did_not_write(self, copied, data):
        settings = json.loads((copied / "settings.json").read_text())
        del settings["classes"]
        (copied / "settings.json").write_text(json.dumps(settings))
        run(data, copied, epochs=3, resume=True)
        assert "classes" in json.loads((copied / "settings.json").read_text())

    def test_other_images_are_noticed(self, copied, data, tmp_path):
        root = tmp_path / "other"
        write_images(root, "train", 8, {name: color[::-1] for name, color in COLORS.items()})
        write_images(root, "test", 3)
        assert "`data`" in refused(ValueError, root, copied, epochs=3, resume=True)

    @pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", "3"])
    def test_damaged_settings(self, text, copied, data):
        path = copied / "settings.json"
        path.unlink() if text is None else path.write_text(text)
        message = refused(ValueError, data, copied, epochs=3, resume=True)
        assert message.startswith(f"{path}: ")
        assert "cannot be resumed" in message

    def test_other_test_images_are_noticed(self, copied, data, tmp_path):
        shutil.copytree(data / "train", tmp_path / "data" / "train")
        write_images(tmp_path / "data", "test", 4)
        assert "`test_data`" in refused(ValueError, tmp_path / "data", copied, epochs=3, resume=True)

    def test_one_class(self, tmp_path):
        write_images(tmp_path / "data", "train", 8, {"red": COLORS["red"]})
        write_images(tmp_path / "data", "test", 2, {"red": COLORS["red"]})
        assert "one class, 'red'" in refused(ValueError, tmp_path / "data", tmp_path / "run")

    def test_what_lies_below_stays(self, data, tmp_path):
        other = tmp_path / "other" / ".mine.partial"
        other.parent.mkdir()
        other.write_text("of another run")
        (tmp_path / "unreadable.txt").write_text("train: of an attempt that was rejected\n")
        run(data, tmp_path, epochs=1)
        assert other.exists()
        assert not (tmp_path / "unreadable.txt").exists()

    def test_damaged_checkpoint(self, copied, data, tmp_path):
        class Bomb:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "exploded"),)

        path = copied / "checkpoints" / "last.ckpt"
        whole = path.read_bytes()
        for content in (b"", b"garbage", whole[: len(whole) // 2], pickle.dumps(Bomb())):
            path.write_bytes(content)
            message = refused(ValueError, data, copied, epochs=3, resume=True)
            assert message == f"{path}: is no intact checkpoint, the run cannot be resumed"
        for place in (len(whole) // 3, len(whole) // 2):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
            assert "is no intact checkpoint" in refused(ValueError, data, copied, epochs=3, resume=True)
        for content in (Bomb(), [1, 2], 3):
            torch.save(content, path)
            assert "is no intact checkpoint" in refused(ValueError, data, copied, epochs=3, resume=True)
        torch.save({"state_dict": {}}, path)
        assert "is no checkpoint of a training run" in refused(ValueError, data, copied, epochs=3, resume=True)
        path.write_bytes(whole)
        intact = torch.load(path, weights_only=True)
        for part, value in {
            "optimizer_states": [],
            "lr_schedulers": [],
            "loops": None,
            "global_step": "3",
            "epoch": None,
            "pytorch-lightning_version": None,
        }.items():
            torch.save(intact | {part: value}, path)
            assert "is no checkpoint of a training run" in refused(ValueError, data, copied, epochs=3, resume=True)
        first, *others = intact["state_dict"].items()
        for weights in (others, [*others, (first[0], first[1][:1])], [first, *others, ("more", first[1])]):
            torch.save(intact | {"state_dict": dict(weights)}, path)
            message = refused(ValueError, data, copied, epochs=3, resume=True)
            assert message.startswith(
                f"{path}: does not fit the network, {'more' if weights[0] is first else first[0]!r}"
            )
        assert not (tmp_path / "exploded").exists()
        path.write_bytes(whole)
        run(data, copied, epochs=3, resume=True)


class TestDivergence:
    def test_a_loss_that_is_not_finite_ends_the_run(self, data, tmp_path):
        out = tmp_path / "run"
        message = refused(RuntimeError, data, out, learning_rate=1e30, model=STANDARD)
        assert message.startswith("the loss is nan in epoch 1: `learning_rate` (=1e+30) is too high")
        assert not (out / "model.safetensors").exists()
        assert not (out / "checkpoints").exists()

    def test_the_last_checkpoint_is_from_before(self, data, tmp_path, monkeypatch):
        step = Classifier.training_step

        def poisoned(self, batch, index):
            if self.current_epoch == 1:
                with torch.no_grad():
                    self.model.conv1.weight[0, 0, 0, 0] = float("inf")
            return step(self, batch, index)

        monkeypatch.setattr(Classifier, "training_step", poisoned)
        assert "the loss is nan in epoch 2" in refused(RuntimeError, data, tmp_path / "run")
        checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
        assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
        assert not (tmp_path / "run" / "model.safetensors").exists()

    def test_on_the_test_images(self, data, tmp_path, monkeypatch):
        def nowhere(self, batch, index):
            self._loss(torch.full((1, 2), float("inf")), torch.tensor([0]))

        monkeypatch.setattr(Classifier, "validation_step", nowhere)
        assert "the loss is nan in epoch 1" in refused(RuntimeError, data, tmp_path / "run")


class TestCompilation:
    @pytest.mark.parametrize(("text", "reason"), [("no compiler\nand more", "no compiler"), ("", "RuntimeError")])
    def test_without_a_compiler_there_is_one_warning(self, text, reason, data, tmp_path, monkeypatch, finished):
        def fail(_function):
            raise RuntimeError(text)

        monkeypatch.setattr(torch, "compile", fail)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(data, tmp_path / "run", epochs=3, compile_step=True)
        told = [str(warning.message) for warning in caught if "compiled" in str(warning.message)]
        assert told == [f"the training step is not compiled: {reason}"]
        assert same_weights(tmp_path / "run", finished[0])

    @pytest.mark.parametrize("where", ["forward", "backward"])
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_a_compiler_that_fails_late_costs_its_speed_alone(self, where, accumulate, data, tmp_path, monkeypatch):
        from torch._dynamo.exc import TorchDynamoException

        class Failing(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, *gradients):
                raise TorchDynamoException("invalid ELF header")

        def compiled(function):
            def call(*arguments):
                outputs = function(*arguments)
                if function is torch.sin:
                    return outputs
                if where == "forward":
                    raise TorchDynamoException("invalid ELF header")
                return Failing.apply(outputs)

            return call

        # By plain descent, which shows how large each gradient is.
        options = {"epochs": 3, "batch_size": 4, "optimization": Optimization("sgd", accumulate=accumulate)}
        run(data, tmp_path / "usual", **options)
        monkeypatch.setattr(torch, "compile", compiled)
        with pytest.warns(UserWarning, match="the training step is not compiled: invalid ELF header"):
            run(data, tmp_path / "run", compile_step=True, **options)
        assert same_weights(tmp_path / "run", tmp_path / "usual")

    def test_the_network_is_compiled_for_training_alone(self, data, tmp_path, monkeypatch, finished):
        calls = []

        def compiled(function):
            def call(*arguments):
                calls.append((function, torch.is_grad_enabled()))
                return function(*arguments)

            return call

        monkeypatch.setattr(torch, "compile", compiled)
        run(data, tmp_path / "run", epochs=3, compile_step=True)
        assert calls[0][0] is torch.sin
        assert len(calls) == 1 + 3 * 2
        assert all(isinstance(function, torch.nn.Module) and gradients for function, gradients in calls[1:])
        assert same_weights(tmp_path / "run", finished[0])


class TestNoise:
    def said(self, data, out):
        """What Lightning logs, and what is warned of, in a run and its resumption."""
        records = []

        class Listener(logging.Handler):
            def emit(self, record):
                records.append(record.getMessage())

        listener = Listener()
        loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
        for logger in loggers:
            logger.addHandler(listener)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run(data, out)
                run(data, out, resume=True)
        finally:
            for logger in loggers:
                logger.removeHandler(listener)
        return records + [str(warning.message) for warning in caught]

    def test_lightning_is_silent(self, data, tmp_path, monkeypatch):
        levels = [logging.getLogger(f"lightning.{part}").level for part in ("pytorch", "fabric")]
        assert self.said(data, tmp_path / "quiet") == []
        assert [logging.getLogger(f"lightning.{part}").level for part in ("pytorch", "fabric")] == levels
        monkeypatch.setattr(_engine, "_quiet", nullcontext)
        loud = " ".join(self.said(data, tmp_path / "loud"))
        assert "GPU available" in loud
        assert "exists and is not empty" in loud


class TestCommandLine:
    def test_train(self, data, tmp_path, capsys, finished):
        out = tmp_path / "run"
        arguments = [
            "train",
            f"--data={data}",
            "--out",
            str(out),
            "--epochs",
            "3",
            "--batch-size=8",
            "--no-compile-step",
        ]
        assert cli.main(arguments) == 0
        printed = capsys.readouterr()
        figures = finished[1]
        assert printed.out.endswith(
            f"test_loss: {figures['test_loss']:.4f}\ntest_accuracy: {figures['test_accuracy']:.4f}\n"
        )
        assert printed.err == ""
        assert same_weights(out, finished[0])
        assert cli.main(arguments) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("bcoskit: error: `out` (=")
        assert printed.err.count("\n") == 1
        assert printed.out == ""

    def test_options_out_of_range(self, data, tmp_path, capsys):
        for option in ("--epochs=0", "--epochs=x", "--learning-rate=nan", "--batch-size=1.5", "--seed=-1", "--speed=3"):
            assert cli.main(["train", f"--data={data}", f"--out={tmp_path / 'run'}", option]) == 2
            printed = capsys.readouterr()
            assert printed.err.count("\n") == 1
            assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("tag", ["bcos", "standard"])
    def test_recipes(self, tag, tmp_path, capsys):
        recipe = RECIPES / f"cifar10_resnet20_{tag}.yaml"
        assert cli.main(["train", "--config", str(recipe), "--out", str(tmp_path / "run"), "--print_config"]) == 0
        lines = capsys.readouterr().out.splitlines()
        for line in (
            f"model: resnet20.{tag}_cifar10",
            "epochs: 100",
            "batch_size: 64",
            "learning_rate: 0.001",
            "seed: 42",
        ):
            assert line in lines
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda recipe: recipe.stem)
    def test_every_recipe_names_what_there_is(self, recipe, tmp_path, capsys):
        text = recipe.read_text()
        assert text.startswith("# ")
        assert max(map(len, text.splitlines())) <= 120
        arguments = ["train", "--config", str(recipe), "--data", str(tmp_path), "--out", str(tmp_path / "run")]
        assert cli.main([*arguments, "--print_config"]) == 0
        printed = capsys.readouterr().out
        settings = dict(line.split(": ", 1) for line in printed.splitlines() if ": " in line and line[0] != " ")
        model_row(settings["model"] if settings["from"] == "null" else settings["from"])
        if settings["from"] != "null" and settings["convert"] != "none":
            config = BcosConfig.preset(settings["convert"])
            converted = bcosify(create_model(settings["from"], num_classes=2), config, inplace=True)
            assert converted.transform.encoding == "bcos"
        # All its values are in their ranges: what is missing are the images.
        assert cli.main(arguments) == 2
        assert "holds no train images" in capsys.readouterr().err

    def test_averages_of_recipes_forget_the_beginning(self, tmp_path, capsys):
        """The long recipe's is that of the authors, who give it for other units, and rescale it."""
        recipe = RECIPES / "imagenet_v2_long.yaml"
        assert cli.main(["train", "--config", str(recipe), "--out", str(tmp_path / "run"), "--print_config"]) == 0
        lines = (line.strip().partition(": ") for line in capsys.readouterr().out.splitlines())
        value = {name: text for name, _, text in lines}
        batch, epochs, every = (int(value[name]) for name in ("batch_size", "epochs", "ema_every"))
        theirs = 1 - (1 - 0.99998) * batch * every / epochs
        assert float(value["ema"]) == pytest.approx(theirs, abs=1e-6)
        updates = epochs * 1_281_167 // batch // every
        assert float(value["ema"]) ** updates < 1e-6
        assert 0.99998**updates > 0.5  # which would leave half of what is saved to the first steps

    def test_a_recipe_trains(self, data, tmp_path, finished):
        recipe = RECIPES / "cifar10_resnet20_bcos.yaml"
        changes = ["--epochs=3", "--batch_size=8", "--no_compile_step", f"--data={data}", f"--out={tmp_path / 'run'}"]
        assert cli.main(["train", "--config", str(recipe), *changes]) == 0
        assert same_weights(tmp_path / "run", finished[0])

    def test_bad_recipes(self, data, tmp_path, capsys):
        recipe = tmp_path / "recipe.yaml"
        for text, said in {
            "epochs: many\n": "epochs",
            "speed: 3\n": "speed",
            "epochs: [1\n": "parsing config",
            "- 3\n": "",
            "": "recipe.yaml",
            "\xff": "recipe.yaml",
            "loss: null\n": "`loss`",
            "optimization: [1, 2]\n": "`optimization`",
            "epochs: 1\nmodel:\n": "`model`",
        }.items():
            recipe.write_bytes(text.encode("latin-1"))
            assert cli.main(["train", "--config", str(recipe), f"--data={data}", f"--out={tmp_path / 'run'}"]) == 2
            printed = capsys.readouterr().err
            assert printed.count("\n") == 1
            assert said in printed
            assert "0x" not in printed
        assert not (tmp_path / "run").exists()

    def test_divergence(self, data, tmp_path, capsys):
        arguments = ["train", f"--data={data}", f"--out={tmp_path / 'run'}", f"--model={STANDARD}"]
        options = ["--learning-rate=1e30", "--batch-size=8", "--no-compile-step"]
        assert cli.main([*arguments, *options]) == 2
        assert capsys.readouterr().err.startswith("bcoskit: error: the loss is nan in epoch 1")

    def test_without_the_extra(self, data, tmp_path, capsys, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "bcoskit.training", None)
        assert cli.main(["train", f"--data={data}", f"--out={tmp_path / 'run'}"]) == 2
        assert "pip install 'bcoskit[train]'" in capsys.readouterr().err


def contents(root):
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def _pixels(image):
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(32, 32, 3).permute(2, 0, 1)


def test_a_trained_model_without_checkpoint_is_not_overwritten(data, tmp_path, finished):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "checkpoints")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a trained model, and no checkpoint"):
        run(data, out, epochs=3, resume=True)
    assert (out / "model.safetensors").read_bytes() == before


def test_auxiliary_logits_are_trained_too(monkeypatch):
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(2))

        def forward(self, x):
            pooled = x.mean((2, 3))[:, :3]
            return (pooled * self.scale[0], -pooled * self.scale[1]) if self.training else pooled * self.scale[0]

    module = Classifier(
        Both(),
        ImageTransform(8),
        3,
        loss=Loss("bce"),
        augmentation=Augmentation(),
        learning_rate=1e-3,
        seed=0,
        compile_step=False,
    ).train()
    monkeypatch.setattr(module, "log", lambda *_arguments, **_keywords: None)
    images, labels = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    loss = module.training_step((images, labels), 0)
    loss.backward()
    assert bool((module.model.scale.grad != 0).all())
