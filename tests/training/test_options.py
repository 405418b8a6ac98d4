"""Optimisers, schedules, clipping, averages, losses and augmentation: numbers by hand, parity, runs that go on."""

import json
import math
import warnings
from importlib.resources import files

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import bcoskit
from bcoskit.training import (
    Augmentation,
    FineTuning,
    Hardware,
    Loading,
    Loss,
    Optimization,
    classification_loss,
    soft_targets,
    train,
)
from bcoskit.training._augment import augment, mixed
from bcoskit.training._module import seeded
from training_runs import break_off, same_weights, state_of, write_images


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_images(root, "train", 12)
    write_images(root, "test", 3)
    return root


def run(data, out, **arguments):
    return train(data, out=out, **{"epochs": 2, "batch_size": 8, "compile_step": False} | arguments)


def test_a_cosine_after_a_warm_up():
    options = Optimization(warmup_epochs=2, warmup_start=0.1, final=0.2)
    factors = [options.factor(step, 10, 12) for step in (0, 10, 20, 70, 120)]
    assert factors == pytest.approx([0.1, 0.55, 1.0, 0.6, 0.2])
    by_epoch = Optimization(per="epoch", warmup_epochs=2, warmup_start=0.1, final=0.2)
    assert [by_epoch.factor(step, 10, 12) for step in (0, 9, 19, 79)] == pytest.approx([0.1, 0.1, 0.55, 0.6])
    plain = [Optimization().factor(step, 3, 2) for step in range(7)]
    assert plain == pytest.approx([(1 + math.cos(math.pi * step / 6)) / 2 for step in range(7)])


def test_other_schedules():
    steps = Optimization(schedule="step", decay=0.1, decay_epochs=3)
    assert [steps.factor(step, 2, 9) for step in (0, 5, 6, 11, 12)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    quarter = Optimization(schedule="quarter_cosine", per="epoch", final=0.01)
    theirs = [math.cos(math.pi * epoch / 200) + 0.01 for epoch in range(100)]  # of the first paper, over 1e-3
    assert [quarter.factor(7 * epoch + 3, 7, 100) for epoch in range(100)] == pytest.approx(theirs)
    assert {Optimization(schedule="constant").factor(step, 2, 9) for step in range(18)} == {1.0}


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Optimization, {"optimizer": "lion"}, "`optimizer`"),
        (Optimization, {"weight_decay": "0.1"}, r"`weight_decay` \(='0.1'\) must be a number"),
        (Optimization, {"momentum": 0.5}, r"`momentum` \(=0.5\) needs `optimizer` 'sgd'"),
        (Optimization, {"final": 0.5, "schedule": "step"}, "`final`"),
        (Optimization, {"decay": 0.5}, "`decay`"),
        (Optimization, {"decay_epochs": 3}, "`decay_epochs`"),
        (Optimization, {"clip_at": 1.0}, "`clip_at`"),
        (Optimization, {"ema_every": 10}, "`ema_every`"),
        (Loss, {"smoothing": None}, r"`smoothing` \(=None\) must be a number"),
        (Loss, {"threshold": 1.0}, "`threshold`"),
        (Augmentation, {"smallest": 0.5}, "`smallest`"),
        (Augmentation, {"magnitude": 20}, "`magnitude`"),
        (Augmentation, {"flip": "no"}, r"`flip` \(='no'\) must be True or False"),
        (FineTuning, {"fresh_head": "no"}, "`fresh_head`"),
        (Hardware, {"recompute": "yes"}, "`recompute`"),
        (Optimization, {"clip": "all"}, "`clip`"),
        (Optimization, {"ema": 2.0}, "`ema`"),
        (Optimization, {"ema": 1.0}, "`ema`"),
        (Optimization, {"accumulate": 0}, "`accumulate`"),
        (Optimization, {"weight_decay": -1.0}, "`weight_decay`"),
        (Optimization, {"warmup_epochs": math.nan}, "`warmup_epochs`"),
        (Loss, {"kind": "mse"}, "`kind`"),
        (Loss, {"off_labels": "some"}, "`off_labels`"),
        (Loss, {"smoothing": 1.5}, "`smoothing`"),
        (Augmentation, {"crop": "centre"}, "`crop`"),
        (Augmentation, {"policy": "autoaugment"}, "`policy`"),
        (Augmentation, {"magnitude": 31}, "`magnitude`"),
        (Augmentation, {"repeats": 0}, "`repeats`"),
    ],
)
def test_wrong_options(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_targets():
    labels = torch.tensor([2, 0])
    assert soft_targets(labels, 4, Loss()).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert soft_targets(labels, 4, Loss(off_labels="uniform"))[0].tolist() == [0.25, 0.25, 1, 0.25]
    assert soft_targets(labels, 4, Loss(smoothing=0.4))[0].tolist() == pytest.approx([0.1, 0.1, 0.7, 0.1])
    half = torch.tensor([[0.3, 0.7, 0, 0]])
    assert soft_targets(half, 4, Loss(threshold=0.2)).tolist() == [[1, 1, 0, 0]]
    assert soft_targets(half, 4, Loss()).tolist() == half.tolist()
    with pytest.raises(ValueError, match="do not fit 4 classes"):
        soft_targets(torch.tensor([4]), 4, Loss())
    for kind in (torch.uint8, torch.int32):
        assert torch.equal(soft_targets(labels.to(kind), 4, Loss()), soft_targets(labels, 4, Loss()))
    with pytest.raises(TypeError, match="`labels`"):
        soft_targets(labels.float(), 4, Loss())
    with pytest.raises(ValueError, match="`labels` are none"):
        soft_targets(labels[:0], 4, Loss())
    with pytest.raises(ValueError, match="no model is known"):
        classification_loss(torch.zeros(1, 4), labels[:1], Loss())


def test_the_loss_of_the_authors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bcos.modules.losses import UniformOffLabelsBCEWithLogitsLoss

    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 3, 6, 2, 2])
    theirs = UniformOffLabelsBCEWithLogitsLoss()(logits, F.one_hot(labels, 7).float())
    ours = classification_loss(logits, labels, Loss("bce", off_labels="uniform"))
    torch.testing.assert_close(ours, theirs)
    plain = classification_loss(logits, labels, Loss("bce"))
    torch.testing.assert_close(plain, F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 7).float()))
    assert abs(float(plain - ours)) > 1e-3
    cross = classification_loss(logits, labels, Loss("cross_entropy", smoothing=0.1))
    torch.testing.assert_close(cross, F.cross_entropy(logits, labels, label_smoothing=0.1))


PIXELS = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "options",
    [
        Augmentation(),
        Augmentation(crop="resized", smallest=0.3),
        Augmentation(policy="randaugment", magnitude=10),
        Augmentation(crop="none", policy="trivialaugment"),
        Augmentation(crop="none", jitter=0.4),
        Augmentation(crop="none", lighting=0.5),
        Augmentation(crop="none", flip=False, erasing=1.0),
    ],
)
def test_augmentation_is_determined_by_its_source(options):
    before = torch.get_rng_state()
    first, again, other = (augment(PIXELS, options, seeded(key)) for key in (1, 1, 2))
    assert first.shape == PIXELS.shape
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, PIXELS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (Optimization, "accumulate"),
        (Optimization, "decay_epochs"),
        (Augmentation, "repeats"),
        (Augmentation, "magnitude"),
        (Loading, "max_unreadable"),
        (Hardware, "nodes"),
        (FineTuning, "frozen_epochs"),
    ],
)
def test_numbers_that_must_be_whole(options, name):
    for value in (1.5, 2.0, True, "3", math.nan):
        with pytest.raises(ValueError, match=rf"^`{name}` \(={value!r}\) must be a whole number$"):
            options(**{name: value})


def test_no_augmentation():
    assert torch.equal(augment(PIXELS, Augmentation(crop="none", flip=False), seeded(1)), PIXELS)
    with pytest.raises(ValueError, match="`flip`"):
        augment(PIXELS, Augmentation(flip=False), seeded(1))


def test_lighting_shifts_colours_along_the_principal_axes_of_imagenet():
    grey = torch.full((4000, 3, 1, 1), 128, dtype=torch.uint8)
    options = Augmentation(crop="none", flip=False, lighting=0.1)
    shifts = (augment(grey, options, seeded(0)).double() - 128).flatten(1) / 255
    # Of the covariance of ImageNet's colours: the squares of the deviations along the axes, by Krizhevsky et al.
    axes = torch.tensor(((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))).double()
    expected = axes @ torch.diag(0.1 * torch.tensor((0.2175, 0.0188, 0.0045)).double()).square() @ axes.T
    rounding = 1 / 255**2 / 12
    torch.testing.assert_close(torch.cov(shifts.T), expected + rounding * torch.eye(3).double(), rtol=0.1, atol=1e-6)
    assert shifts.mean(0).abs().max() < 2e-3
    images = augment(PIXELS, Augmentation(crop="none", flip=False, lighting=1.0), seeded(0))
    assert int(images.min()) == 0
    assert int(images.max()) == 255
    for image, pixels in zip(images.int(), PIXELS.int(), strict=True):
        inside = ((image > 0) & (image < 255)).all(0)  # where nothing is cut off, all pixels move alike
        difference = (image - pixels)[:, inside]
        assert int((difference.amax(1) - difference.amin(1)).max()) == 0


@pytest.mark.parametrize("options", [Augmentation(mixup=0.4), Augmentation(cutmix=1.0)])
def test_mixtures_of_encoded_images_are_encoded(options):
    x, labels = bcoskit.encode(PIXELS / 255), torch.tensor([0, 1, 2, 0, 1, 2])
    before = x.clone()
    found, targets = mixed(x, labels, 3, options, seed=5)
    assert torch.equal(x, before)
    assert not torch.equal(found, x)
    torch.testing.assert_close(found[:, :3] + found[:, 3:], torch.ones(6, 3, 32, 32))
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    again, _ = mixed(x, labels, 3, options, seed=5)
    assert torch.equal(found, again)
    assert not torch.equal(found, mixed(x, labels, 3, options, seed=6)[0])
    with pytest.raises(ValueError, match="even number"):
        mixed(x[:5], labels[:5], 3, options, seed=5)


@pytest.mark.parametrize("half", [False, True])
def test_targets_are_mixed_as_their_images_are(half):
    """Of black and white images, whose mixture tells the shares; also where products are in half precision."""
    white = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    x = white[:, None, None, None].expand(6, 1, 8, 8)
    several = torch.stack((white, torch.ones(6), torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 0.0])), 1)
    for labels in (several, (1 - white).long()):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found, targets = mixed(x, labels, 3, Augmentation(mixup=1.0), seed=5)
        torch.testing.assert_close(targets[:, 0], found[:, 0, 0, 0], rtol=0, atol=1e-6)
        assert 0.01 < float(targets[0, 0]) < 0.99
        torch.testing.assert_close(targets[:, 1], torch.ones(6) if labels is several else 1 - targets[:, 0])
        torch.testing.assert_close(targets[2:4, 2], several[2:4, 2] if labels is several else torch.zeros(2))


def test_images_that_are_not_mixed():
    x, labels = torch.rand(3, 6, 8, 8), torch.tensor([0, 1, 2])
    assert mixed(x, labels, 3, Augmentation(), seed=5)[1] is labels


EVERYTHING = {
    "batch_size": 4,
    "optimization": Optimization(
        optimizer="adamw", weight_decay=0.01, warmup_epochs=1, clip="agc", accumulate=2, ema=0.9, final=0.1
    ),
    "loss": Loss(off_labels="uniform", smoothing=0.1),
    "augmentation": Augmentation(
        crop="resized", smallest=0.5, policy="trivialaugment", erasing=0.2, mixup=0.2, cutmix=1.0, repeats=2
    ),
}


@pytest.fixture(scope="module")
def everything(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "everything"
    return out, run(data, out, epochs=3, **EVERYTHING)


def test_a_run_with_everything_goes_on_where_it_was_cut_off(everything, data, tmp_path, monkeypatch):
    out, figures = everything
    for epoch, batch, every in ((1, 2, 0), (2, 0, 0), (1, 2, 1), (1, 3, 1)):
        broken = tmp_path / f"{epoch}{batch}{every}"
        with monkeypatch.context() as patch:
            break_off(patch, epoch, batch)
            with pytest.raises(OSError, match="power cut"):
                run(data, broken, epochs=3, checkpoint_every=every, **EVERYTHING)
        assert run(data, broken, epochs=3, resume=True, **EVERYTHING) == figures
        assert same_weights(broken, out)


def test_settings_say_everything(everything):
    settings = json.loads((everything[0] / "settings.json").read_text())
    assert settings["optimization"]["clip"] == "agc"
    assert settings["loss"]["off_labels"] == "uniform"
    assert settings["augmentation"]["mixup"] == 0.2


@pytest.mark.parametrize(
    "changed",
    [
        {"optimization": Optimization(optimizer="sgd")},
        {"optimization": Optimization(clip="agc", clip_at=1e-4)},
        {"optimization": Optimization(clip="norm", clip_at=1e-4)},
        {"optimization": Optimization(accumulate=3)},
        {"optimization": Optimization(ema=0.5)},
        {"optimization": Optimization(schedule="constant")},
        {"loss": Loss(smoothing=0.2)},
        {"augmentation": Augmentation(crop="none")},
        {"augmentation": Augmentation(cutmix=1.0)},
        {"augmentation": Augmentation(lighting=0.1)},
    ],
    ids=str,
)
def test_every_option_changes_the_weights(changed, data, tmp_path, usual):
    run(data, tmp_path / "run", epochs=1, **changed)
    assert not same_weights(tmp_path / "run", usual)


@pytest.fixture(scope="module")
def usual(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("usual") / "run"
    run(data, out, epochs=1)
    return out


def test_an_average_of_weights_is_what_is_saved(data, tmp_path, usual):
    """It begins with the weights after the first step, where it stays with a decay of 1, to rounding."""
    still = Optimization(ema=1 - 2**-53, schedule="constant")
    for epochs in (1, 2):
        run(data, tmp_path / f"{epochs}", epochs=epochs, optimization=still)
    first, second = state_of(tmp_path / "1"), state_of(tmp_path / "2")
    assert all(torch.equal(first[name], second[name]) for name in first if name.endswith("weight"))
    assert not same_weights(tmp_path / "1", usual)


def test_lighting_is_for_images_in_colour(data, tmp_path):
    with pytest.raises(ValueError, match=r"`augmentation.lighting` \(=0.1\) is for images in colour"):
        run(data, tmp_path / "run", channels=1, weights="fresh", augmentation=Augmentation(lighting=0.1))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"`lighting` \(=-1\)"):
        Augmentation(lighting=-1)


def test_a_gradual_conversion_has_no_average(data, tmp_path):
    with pytest.raises(ValueError, match="`ema`"):
        run(data, tmp_path, from_="timm/test_resnet", weights="fresh", gradual=0.5, optimization=Optimization(ema=0.9))


def test_explanations_are_watched_while_a_network_is_trained(data, tmp_path):
    figures = run(data, tmp_path / "run", epochs=3, watch_every=2)
    shown = sorted(path.name for path in (tmp_path / "run" / "explanations").iterdir())
    assert shown == ["epoch-0002.png", "epoch-0003.png"]
    with Image.open(tmp_path / "run" / "explanations" / shown[0]) as sheet:
        assert sheet.width > 400
    assert -1 <= figures["test_alignment"] <= 1
    assert figures["test_residual"] < 1e-4
    assert "test_pointing" not in figures  # two classes make no grid
    run(data, tmp_path / "plain", epochs=3)
    assert same_weights(tmp_path / "plain", tmp_path / "run")  # looking changes nothing
    with pytest.raises(ValueError, match="`watch_every`"):
        run(data, tmp_path / "never", watch_every=-1)


def test_the_pointing_game_is_watched(tmp_path):
    """Of a network that knows the photographs that ship already."""
    for path in (files("bcoskit.assets") / "photographs").iterdir():
        name = path.name.partition(".")[0]
        if path.name.endswith(".jpg") and name != "chelsea":
            for split in ("train", "test"):
                folder = tmp_path / "data" / split / name
                folder.mkdir(parents=True)
                for copy in range(2):
                    (folder / f"{copy}.jpg").write_bytes(path.read_bytes())
    tuned = {"from_": "resnet20.bcos_cifar10", "convert": "none", "epochs": 1, "learning_rate": 1e-12}
    figures = run(tmp_path / "data", tmp_path / "run", watch_every=1, **tuned)
    assert figures["test_pointing"] > 0.5  # a constant map has 0.11
    assert figures["test_alignment"] > 0.05
