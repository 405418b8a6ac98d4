"""Training on several processes, in half precision, with recomputed stages, and after power cuts."""

import copy
import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bcoskit._files import whole_file
from bcoskit.data import open_dataset
from bcoskit.models import create_model
from bcoskit.nn import BatchNorm
from bcoskit.training import Augmentation, Hardware, Loading, Loss, Optimization, train
from bcoskit.training._loading import Batches
from bcoskit.training._module import Classifier
from training_runs import COLORS, break_off, same_weights, state_of, write_images

PLAIN = {"epochs": 1, "batch_size": 8, "compile_step": False, "hardware": Hardware("cpu")}
SGD = Optimization("sgd")
COMMAND = [sys.executable, "-m", "bcoskit", "train"]


@pytest.fixture
def one_thread():
    """As in the processes that are started here: sums over other numbers of threads are rounded otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def largest_difference(first, second):
    first, second = state_of(first), state_of(second)
    assert first.keys() == second.keys()
    return max(
        float(
            (first[key].double() - second[key].double()).abs().max() / second[key].double().abs().max().clamp_min(1e-9)
        )
        for key in first
    )


def start(data, out, *options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [*COMMAND, "--data", data, "--out", out, "--batch_size", "8", "--no_compile_step", *options]
    return subprocess.Popen(
        list(map(str, arguments)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_two_processes_train_what_one_trains(data, tmp_path):
    options = ["--epochs", "1", "--optimization.optimizer", "sgd", "--learning_rate", "1e-3"]
    data = shutil.copytree(data, tmp_path / "data")
    (data / "test" / "red" / "0.png").unlink()  # an odd number is shared out unevenly
    both = start(data, tmp_path / "two", *options, "--hardware.devices", "2", "--hardware.accelerator", "cpu")
    figures = train(data, out=tmp_path / "one", optimization=SGD, learning_rate=1e-3, **PLAIN)
    train(data, out=tmp_path / "half", optimization=SGD, learning_rate=1e-3, **PLAIN | {"batch_size": 4})
    said, _ = both.communicate()
    assert both.returncode == 0, said.decode()
    (line,) = [line for line in said.decode().splitlines() if line.startswith("test_loss: ")]
    assert float(line.removeprefix("test_loss: ")) == pytest.approx(figures["test_loss"], abs=1e-4)
    assert largest_difference(tmp_path / "two", tmp_path / "one") < 1e-5
    assert largest_difference(tmp_path / "half", tmp_path / "one") > 1e-3


NORMS = """
import sys, torch, torch.distributed as dist
from bcoskit.nn import BatchNorm
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
x, y = torch.randn(6, 3, 4, 4).double() + 1, torch.randn(6, 3, 4, 4).double()
mine = slice(0, 4) if rank == 0 else slice(4, 6)
found = []
for centered, synchronized in ((False, True), (True, True), (False, False)):
    norm = BatchNorm(3, centered=centered, bias=True).double().train()
    norm.synchronized = synchronized
    part = x[mine].clone().requires_grad_()
    (gradient,) = torch.autograd.grad((norm(part) * y[mine]).sum(), part, create_graph=True)
    gradient.square().sum().backward()
    (once,) = torch.autograd.grad((norm(part) * y[mine]).sum(), part)
    output = norm(part).detach()
    found.append((output, once, gradient.detach(), part.grad, norm.running_mean, norm.running_var))
torch.save(found, sys.argv[1] + str(rank))
"""


def test_statistics_of_all_processes(tmp_path):
    script = tmp_path / "norms.py"
    script.write_text(NORMS)
    both = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "found")],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611"},
        )
        for rank in (0, 1)
    ]
    assert [process.wait() for process in both] == [0, 0]
    first, second = (torch.load(f"{tmp_path}/found{rank}", weights_only=True) for rank in (0, 1))
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, 4, 4).double() + 1, torch.randn(6, 3, 4, 4).double()
    for index, (centered, equal) in enumerate(((False, True), (True, True), (False, False))):
        norm = BatchNorm(3, centered=centered, bias=True).double().train()
        whole = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((norm(whole) * y).sum(), whole, create_graph=True)
        gradient.square().sum().backward()
        of_one = [torch.cat([ours, theirs]) for ours, theirs in zip(first[index][:4], second[index][:4], strict=True)]
        norm(x)
        expected = (norm(x), gradient, gradient, whole.grad)  # as many calls as in the processes
        assert all(torch.allclose(*pair, rtol=1e-6, atol=1e-9) == equal for pair in zip(of_one, expected, strict=True))
        for found in (first[index], second[index]):
            assert torch.allclose(found[4], norm.running_mean, rtol=1e-6, atol=1e-9)
            assert torch.allclose(found[5], norm.running_var, rtol=1e-6, atol=1e-9) == equal


@pytest.mark.parametrize("precision", ["bf16", "16"])
def test_half_precision_is_near_single_precision(data, tmp_path, precision):
    model = create_model("resnet20.bcos_cifar10", weights=True).train()
    x = torch.rand(2, 3, 16, 16)
    x = torch.cat([x, 1 - x], 1)
    exact = copy.deepcopy(model)(x)
    with torch.autocast("cpu", {"bf16": torch.bfloat16, "16": torch.float16}[precision]):
        rough = copy.deepcopy(model)(x)
        # Squares of these are above the largest number of half precision.
        large = copy.deepcopy(model)(x * 1000)
        features = copy.deepcopy(model).forward_features(x)
    assert features.dtype != torch.float32
    assert rough.dtype == torch.float32  # of the constant that comes last, where classes have to stay apart
    assert torch.isfinite(large).all()
    assert (rough.float() - exact).abs().max() < 0.05 * (exact - exact.mean()).abs().max()


def test_recomputed_stages_change_nothing(data, tmp_path):
    for recompute in (False, True):
        hardware = Hardware("cpu", recompute=recompute)
        train(data, out=tmp_path / str(recompute), **PLAIN | {"hardware": hardware})
    assert largest_difference(tmp_path / "True", tmp_path / "False") < 1e-5
    assert int(create_model(tmp_path / "True" / "model.safetensors").bn1.num_batches_tracked) == 2


@pytest.mark.parametrize("convert", ["none", "bcosification"])
def test_recomputed_networks_that_write_in_place(data, tmp_path, convert):
    """The first stage of a ResNet of timm is an activation that writes into its input."""
    start = {"from_": "timm/test_resnet", "weights": "fresh", "convert": convert, "size": 32}
    for recompute in (False, True):
        hardware = Hardware("cpu", recompute=recompute)
        train(data, out=tmp_path / str(recompute), **PLAIN | start | {"hardware": hardware})
    assert largest_difference(tmp_path / "True", tmp_path / "False") < 1e-5


def test_recomputed_stages_are_not_kept(data):
    from bcoskit.training._recompute import keep_stages, recompute_stages

    model = create_model("resnet20.bcos_cifar10").train()
    keys, x = list(model.state_dict()), torch.rand(4, 6, 32, 32)

    def kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda saved: (sizes.append(saved.numel()), saved)[1], lambda s: s
        ):
            model(x)
        return sum(sizes)

    usual = kept()
    recompute_stages(model)
    assert list(model.state_dict()) == keys
    assert kept() < usual / 3
    keep_stages(model)
    assert kept() == usual


def test_recomputed_stages_of_a_network_that_is_converted(data, tmp_path):
    start = {"from_": "resnet20.standard_cifar10", "weights": "fresh", "gradual": 0.5, "learning_rate": 1e-3}
    for recompute in (False, True):
        hardware = Hardware("cpu", recompute=recompute)
        train(data, out=tmp_path / str(recompute), **PLAIN | start | {"hardware": hardware, "epochs": 2})
    assert largest_difference(tmp_path / "True", tmp_path / "False") < 1e-5


def test_half_precision_of_16_bits_needs_a_gpu(data, tmp_path):
    with pytest.raises(ValueError, match=r"`precision` \(='16'\) needs a GPU: take 'bf16'"):
        train(data, out=tmp_path / "run", **PLAIN | {"hardware": Hardware("cpu", precision="16")})


@pytest.mark.usefixtures("one_thread")
def test_a_process_that_is_killed(data, tmp_path):
    train(data, out=tmp_path / "whole", **PLAIN | {"epochs": 4})
    process = start(data, tmp_path / "killed", "--epochs", "4", "--hardware.accelerator", "cpu")
    checkpoint = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    while not checkpoint.exists():
        with suppress(subprocess.TimeoutExpired):
            pytest.fail(f"ended by itself: {process.wait(0.02)}")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (tmp_path / "killed" / "checkpoints" / ".0.partial").write_bytes(b"half of a checkpoint")
    train(data, out=tmp_path / "killed", resume=True, **PLAIN | {"epochs": 4})
    assert same_weights(tmp_path / "killed", tmp_path / "whole")
    assert [file.name for file in checkpoint.parent.iterdir()] == ["last.ckpt"]


def test_a_full_disk_that_nobody_names(data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    break_off(monkeypatch, 1, error=lambda _: OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match=r"No space left on device\); the last checkpoint stays, `resume`") as caught:
        train(data, out=out, **PLAIN | {"epochs": 2})
    assert caught.value.filename == str(out)
    with pytest.raises(OSError, match="No space left on device") as caught, whole_file(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "file")


def test_a_full_disk(data, tmp_path):
    out = tmp_path / "run"
    train(data, out=out, **PLAIN | {"epochs": 1})
    (out / "model.safetensors").unlink()
    before = (out / "checkpoints" / "last.ckpt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"last\.ckpt: the checkpoint cannot be written") as caught:
            train(data, out=tmp_path / "other", **PLAIN)
        assert "(File too large)" in str(caught.value)
        assert "resume" not in str(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list((tmp_path / "other" / "checkpoints").iterdir())
    assert (out / "checkpoints" / "last.ckpt").read_bytes() == before
    assert train(data, out=out, resume=True, **PLAIN | {"epochs": 1})


def test_images_on_disk_train_what_images_in_memory_train(data, tmp_path):
    for where in ("memory", "disk"):
        train(data, out=tmp_path / where, loading=Loading(where, workers=0), **PLAIN)
    assert same_weights(tmp_path / "disk", tmp_path / "memory")


def test_crops_of_images_on_disk_are_those_of_a_run_that_was_not_cut_off(data, tmp_path, monkeypatch):
    options = PLAIN | {
        "epochs": 2,
        "loading": Loading("disk", workers=1),
        "augmentation": Augmentation("resized", size=16),
    }
    train(data, out=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        break_off(patch, 1)
        with pytest.raises(OSError, match="power cut"):
            train(data, out=tmp_path / "broken", **options)
    train(data, out=tmp_path / "broken", resume=True, **options)
    assert same_weights(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_each_epoch_has_an_order_and_crops_of_its_own(tmp_path, where, monkeypatch):
    seen = []
    data = tmp_path / "data"
    noise = np.random.default_rng(0)
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (data / place).mkdir(parents=True)
        for index in range(8):
            pixels = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data / place / f"{index}.png")
    batch_loss = Classifier.batch_loss

    def noted(self, batch, index):
        seen.append(batch[0].clone())
        return batch_loss(self, batch, index)

    monkeypatch.setattr(Classifier, "batch_loss", noted)
    options = PLAIN | {
        "epochs": 2,
        "loading": Loading(where, workers=1),
        "augmentation": Augmentation("resized", smallest=0.1),
    }
    train(data, out=tmp_path / "run", **options)
    first, second = torch.cat(seen[:2]), torch.cat(seen[2:])
    assert not torch.equal(first, second)
    images = [set(map(bytes, part.flatten(1).numpy())) for part in (first, second)]
    assert (images[0] == images[1]) == (where == "memory")  # the same images, or other parts of them


def test_shares_of_the_test_images():
    for length in (33, 16, 3):
        shares = [list(Batches(length, 32, (rank, 2))) for rank in (0, 1)]
        assert len(shares[0]) == len(shares[1]) == len(Batches(length, 32, (0, 2)))
        assert sorted(index for share in shares for batch in share for index in batch) == list(range(length))
    with pytest.raises(ValueError, match="too few for 2"):
        Batches(1, 32, (0, 2))


def test_shares_of_a_batch():
    whole = list(Batches(20, 8, (0, 1), (3, 1), repeats=2))
    assert [len(set(batch)) for batch in whole] == [4, 4]
    assert not set(whole[0]) & set(whole[1])
    shares = zip(*(Batches(20, 8, (rank, 2), (3, 1), repeats=2) for rank in (0, 1)), strict=True)
    assert [first + second for first, second in shares] == whole
    with pytest.raises(ValueError, match=r"`batch_size` \(=6\)"):
        Batches(20, 6, (0, 2), (3, 1), repeats=2)


def test_processes_that_do_not_know_of_each_other(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"4 processes were started, .* `hardware.devices`"):
        train(data, out=tmp_path / "run", **PLAIN)


def test_a_finished_run_with_averages_is_left_as_it_is(data, tmp_path):
    options = PLAIN | {"epochs": 2, "optimization": Optimization(ema=0.5)}
    train(data, out=tmp_path / "run", **options)
    before = state_of(tmp_path / "run")
    train(data, out=tmp_path / "run", resume=True, **options)
    after = state_of(tmp_path / "run")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_dropout_is_determined_by_the_seed(data, tmp_path, monkeypatch):
    forward = BatchNorm.forward
    monkeypatch.setattr(BatchNorm, "forward", lambda self, x: torch.dropout(forward(self, x), 0.2, self.training))
    for name, rest in (("first", 1), ("second", 2)):
        torch.manual_seed(rest)
        train(data, out=tmp_path / name, **PLAIN)
    assert same_weights(tmp_path / "first", tmp_path / "second")


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_images_that_cannot_be_read(tmp_path, where):
    write_images(tmp_path / "data", "train", 6)
    write_images(tmp_path / "data", "test", 3)
    broken = tmp_path / "data" / "train" / "red" / "3.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"3\.png.*max_unreadable"):
        train(tmp_path / "data", out=tmp_path / "none", loading=Loading(where, workers=0), **PLAIN | {"batch_size": 6})
    loading = Loading(where, workers=0, max_unreadable=1)
    train(tmp_path / "data", out=tmp_path / "one", loading=loading, **PLAIN | {"batch_size": 6})
    (line,) = (tmp_path / "one" / "unreadable.txt").read_text().splitlines()
    assert str(broken) in line
    assert line.startswith("train: image ")
    (tmp_path / "data" / "test" / "green" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match="1 more are named in"):
        train(tmp_path / "data", out=tmp_path / "two", loading=loading, **PLAIN | {"batch_size": 6})


def test_unreadable_images_whose_names_are_no_text(tmp_path):
    write_images(tmp_path / "data", "train", 5)
    write_images(tmp_path / "data", "test", 3)
    nameless = tmp_path / "data" / "train" / "red" / os.fsdecode(b"\xff.png")
    try:
        nameless.write_bytes(b"no image")
    except OSError:
        pytest.skip("the disk takes no such names")
    options = PLAIN | {"loading": Loading(max_unreadable=1)}
    train(tmp_path / "data", out=tmp_path / "run", **options)
    assert os.fsencode(nameless) in (tmp_path / "run" / "unreadable.txt").read_bytes()
    (tmp_path / "run" / "model.safetensors").unlink()
    train(tmp_path / "data", out=tmp_path / "run", resume=True, **options)  # knows it by that name


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Hardware, {"devices": 0}, "`devices`"),
        (Hardware, {"precision": "8"}, "`precision`"),
        (Hardware, {"strategy": "dp"}, "`strategy`"),
        (Loading, {"images": "cloud"}, "`images`"),
        (Loading, {"workers": -1}, "`workers`"),
        (Loading, {"max_unreadable": -1}, "`max_unreadable`"),
    ],
)
def test_wrong_options(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_devices_that_are_not_there(data, tmp_path):
    with pytest.raises(ValueError, match=r"`hardware`.*is not to be had"):
        train(data, out=tmp_path / "run", **PLAIN | {"hardware": Hardware("tpu")})
    assert not (Path(tmp_path) / "run" / "checkpoints").exists()


def write_several(folder):
    """Images with a red half, a green half, both or none, and the names of these."""
    folder.mkdir()
    for split, count in (("train", 16), ("test", 8)):
        rows = {"image": [], "labels": []}
        for index in range(count):
            pixels = np.full((32, 32, 3), 40 + index, np.uint8)
            names = [name for bit, name in enumerate(("red", "green")) if index >> bit & 1]
            for name in names:
                half = slice(0, 16) if name == "red" else slice(16, 32)
                pixels[:, half] = COLORS[name]
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            rows["image"].append(buffer.getvalue())
            rows["labels"].append(names)
        pq.write_table(pa.table(rows), folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_images_of_several_classes(tmp_path):
    data = write_several(tmp_path / "data")
    figures = train(data, out=tmp_path / "run", **PLAIN | {"epochs": 12})
    assert figures["test_mean_average_precision"] > 0.8
    model = create_model(tmp_path / "run" / "model.safetensors")
    assert model.classes == ("green", "red")
    images = open_dataset(data, "test", model.transform)
    with torch.no_grad():
        decisions = model(torch.stack([x for x, _ in images])) > 0
    assert figures["test_accuracy"] == pytest.approx(float((decisions == images.labels).double().mean()), abs=1e-6)


def test_images_of_several_classes_and_an_ordinary_network(tmp_path):
    data = write_several(tmp_path / "data")
    train(data, out=tmp_path / "run", **PLAIN | {"model": "resnet20.standard_cifar10", "epochs": 1})
    assert create_model(tmp_path / "run" / "model.safetensors").loss == "bce"


def test_images_of_several_classes_are_watched(tmp_path):
    data = write_several(tmp_path / "data")
    figures = train(data, out=tmp_path / "run", **PLAIN | {"watch_every": 1})
    assert -1 <= figures["test_alignment"] <= 1
    assert figures["test_residual"] < 1e-4
    assert "test_pointing" not in figures  # a cell of a grid has one class
    with Image.open(tmp_path / "run" / "explanations" / "epoch-0001.png") as sheet:
        assert 5 * 96 < sheet.width < 8 * 96  # of the eight test images two are of no class


@pytest.mark.filterwarnings("ignore:No positive samples found")
def test_images_of_no_class_are_not_watched(tmp_path):
    data = write_several(tmp_path / "data")
    names = {"info": {"features": {"labels": {"feature": {"names": ["green", "red"]}}}}}
    for path in data.iterdir():
        table = pq.read_table(path)
        rows = [[index % 2] if path.name.startswith("train") else [] for index in range(len(table))]
        table = pa.table({"image": table["image"], "labels": pa.array(rows, pa.list_(pa.int64()))})
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), path)
    figures = train(data, out=tmp_path / "run", **PLAIN | {"watch_every": 1})
    assert "test_alignment" not in figures
    assert not (tmp_path / "run" / "explanations").exists()


@pytest.mark.parametrize("options", [Augmentation(mixup=0.2), Augmentation(cutmix=1.0)])
def test_images_of_several_classes_are_mixed(tmp_path, options):
    data = write_several(tmp_path / "data")
    for name, augmentation in {"plain": Augmentation(), "mixed": options}.items():
        train(data, out=tmp_path / name, augmentation=augmentation, **PLAIN)
    assert not same_weights(tmp_path / "plain", tmp_path / "mixed")


def test_what_images_of_several_classes_do_not_allow(tmp_path):
    with pytest.raises(ValueError, match=r"`loss\.kind`"):
        train(write_several(tmp_path / "data"), out=tmp_path / "run", **PLAIN | {"loss": Loss("cross_entropy")})
