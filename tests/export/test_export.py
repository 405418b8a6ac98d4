"""Exported explanations are those of `explain`, for any batch, or there is no file."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import timm
import torch
import torchvision
from torch import nn

import bcoskit
from bcoskit.data import ImageTransform
from bcoskit.dynamic import freeze
from bcoskit.export import _check, _export, _graph, export_onnx
from bcoskit.export._trace import SizesSeen, batch_size
from bcoskit.models import convnext, densenet, resnet, vit
from bcoskit.nn import BcosConv2d, ClassifierHead
from export_toys import CLASSES, small_network

SIZE = 32


def named(module, name, smaller):
    """A network by name with fewer blocks; norms are set so that the signal does not die out."""

    def make(monkeypatch):
        architecture = name.partition(".")[0]
        monkeypatch.setitem(module.ARCHITECTURES, architecture, smaller)
        return calibrated(bcoskit.create_model(name, num_classes=5)), "bcos"

    return make


def calibrated(network, channels=6):
    for part in network.modules():
        if hasattr(part, "momentum"):
            part.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.rand(8, channels, SIZE, SIZE))
    return network.eval()


def vgg(_monkeypatch):
    network = timm.models.vgg.VGG([8, 8, "M", 16, "M"], num_classes=5, mlp_ratio=0.01)
    return bcoskit.bcosify(network.eval(), bcoskit.BcosConfig.preset("exact")), "bcos"


def converted(_monkeypatch):
    options = {"channels": (8, 16, 16, 16), "stem_type": "deep", "avg_down": True}
    network = timm.models.resnet.ResNet(timm.models.resnet.Bottleneck, (1, 1, 0, 0), num_classes=5, **options)
    return bcoskit.bcosify(calibrated(network, 3), bcoskit.BcosConfig.preset("v1")), "bcos"


def channels_last(_monkeypatch):
    """Channels lie last in memory where they are pooled, as in the ConvNeXts of timm."""
    along, back = torchvision.ops.Permute([0, 2, 3, 1]), torchvision.ops.Permute([0, 3, 1, 2])
    layers = [nn.Conv2d(3, 8, 4, 4), along, nn.Linear(8, 8), nn.ReLU(), back, nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 5)).eval(), "normalized"


NETWORKS = {
    "resnet": named(resnet, "resnet18.bcos_v2_in1k", ((1, 1, 1, 1), 1, 64, timm.models.resnet.BasicBlock)),
    "densenet": named(densenet, "densenet121.bcos_v2_in1k", (8, (2, 1))),
    "convnext": named(convnext, "convnext_tiny.bcos_v2_bnu_in1k", ((1, 1, 0, 0), (8, 16, 24, 32), 0.0)),
    "vit": named(vit, "simple_vit_ti_patch16_224.bcos_v2_in1k", (32, 2, 1, ())),
    "vgg": vgg,
    "converted": converted,
    "channels_last": channels_last,
}


def outputs_of(path, images, target):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"image": images, "target": np.array(target)}), strict=True))


def relative(found, expected):
    return float((torch.from_numpy(found).double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", NETWORKS)
def test_as_explain(family, tmp_path, monkeypatch):
    torch.manual_seed(0)
    network, encoding = NETWORKS[family](monkeypatch)
    transform, path = ImageTransform(SIZE, encoding=encoding), tmp_path / "model.onnx"
    before = copy.deepcopy(network.state_dict())
    random = torch.get_rng_state()
    written = export_onnx(network, path, transform=transform, classes=list("abcde"), weights_output=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert written.path == path
    assert written.error < 1e-5
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert list(tmp_path.iterdir()) == [path]
    precise = copy.deepcopy(network).double()
    for target in ([3], [0, 4, 2, -1, 1]):
        pixels = torch.randint(256, (len(target), 3, SIZE, SIZE)).to(torch.uint8)
        found = outputs_of(path, pixels.numpy().astype(np.float32) / 255, target)
        classes = [
            index if index >= 0 else int(row.argmax()) for index, row in zip(target, found["logits"], strict=True)
        ]
        x = transform.encode_pixels(pixels).double()
        expected = bcoskit.explain(precise, x, classes)
        assert found["contributions"].shape == (len(target), SIZE, SIZE)
        for name, values in found.items():
            assert relative(values, getattr(expected, name)) < 1e-5
        other = bcoskit.explain(precise, x, [(index + 1) % 5 for index in classes])  # a control
        assert relative(found["contributions"], other.contributions) > 1e-2


def test_grey_images_normalized_and_not_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(_export, "_is_installed", lambda package: package != "onnxruntime")
    transform, path = (
        ImageTransform(12, channels=1, encoding="normalized", mean=(0.4,), std=(0.2,)),
        tmp_path / "m.onnx",
    )
    network = small_network(1)
    assert export_onnx(network, path, transform=transform).error is None
    images = torch.rand(2, 1, 12, 12)
    found = outputs_of(path, images.numpy(), [1, 2])
    expected = bcoskit.explain(network.double(), (images.double() - 0.4) / 0.2, [1, 2])
    assert list(found) == ["logits", "contributions"]
    assert relative(found["contributions"], expected.contributions) < 1e-5


def test_no_derivatives_at_run_time_and_no_batch_in_the_file(exported):
    _, _, path = exported
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*model.graph.input, *model.graph.output)}
    assert {name: dims[0].dim_param for name, dims in shapes.items()} == dict.fromkeys(shapes, "batch")
    assert [dim.dim_value for dim in shapes["image"][1:]] == [3, 16, 16]
    assert {node.domain for node in model.graph.node} == {""}


def test_metadata(exported):
    _, transform, path = exported
    facts = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert json.loads(facts.pop("classes")) == list(CLASSES)
    assert ImageTransform(**json.loads(facts.pop("transform"))) == transform
    assert facts == {
        "name": "Sequential",
        "architecture": "Sequential",
        "loss": "cross_entropy",
        "products": "split",
        "source": "here",
        "licence": "none",
        "bcoskit_version": bcoskit.__version__,
    }


@pytest.mark.parametrize("target", [5, -2, -5, 1000])
def test_no_answer_for_a_class_that_is_not_there(exported, target):
    _, _, path = exported
    images = np.zeros((2, 3, 16, 16), np.float32)
    with pytest.raises(Exception, match="out of data bounds"):
        outputs_of(path, images, [0, target])


class Numbers(nn.Module):
    """Has a size, a number, a sum of sizes, and logits that are multiples of whatever prime number is taken."""

    def __init__(self, size):
        super().__init__()
        self.first, self.last = BcosConv2d(6, 2 * size, 1), ClassifierHead(2 * size + 6, size, logit_bias=0.0)
        self.size = size

    def forward(self, x):
        return self.last(torch.cat([self.first(x)[:, : self.size].repeat(1, 2, 1, 1) * (2 * self.size), x], 1))


def test_sizes_that_would_be_taken_for_the_batch(tmp_path, monkeypatch):
    torch.manual_seed(0)
    network, transform, path = Numbers(1009).eval(), ImageTransform(4), tmp_path / "model.onnx"
    assert export_onnx(network, path, transform=transform).error < 1e-5
    monkeypatch.setattr(_export, "batch_size", lambda _: 1009)  # a control
    with pytest.raises(ValueError, match=r"cannot be run with 1 images|disagrees"):
        export_onnx(network, path, transform=transform)


def test_the_traced_batch_divides_no_number_of_the_network():
    assert batch_size([]) == 1009
    assert batch_size([0, -1, 1, 1008, 1010, 2017]) == 1009
    assert batch_size([3 * 1009, -1013, 1019]) == 1021
    with SizesSeen() as seen:
        torch.ones(3, 1013)[:, :7].sum(0) * 2018
    assert {3, 1013, 7, 2018} <= seen.found


class OfBatch(nn.Module):
    """Gives something else for a single image."""

    def __init__(self):
        super().__init__()
        self.network = small_network()

    def forward(self, x):
        return self.network(x) * min(len(x), 2)


class OnValues(OfBatch):
    def forward(self, x):
        return self.network(x if x.detach().sum() > 0 else -x)


class Bessel(OfBatch):
    def forward(self, x):
        return self.network(x * torch.special.bessel_j0(freeze(x)))


class Tokens(nn.Module):
    def forward(self, x):
        return x


def test_by_several_threads(tmp_path):
    def exported(index):
        return export_onnx(networks[index], tmp_path / f"{index}.onnx", transform=ImageTransform(size=16)).error

    networks = [small_network() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert max(pool.map(exported, range(3))) < 1e-5


REFUSED = [
    (OfBatch, ValueError, r"disagrees .* batch of 1"),
    (OnValues, ValueError, "decides by values of its input in Python"),
    (Bessel, ValueError, r"no counterpart of the operation prims.bessel_j0"),
    (Tokens, ValueError, r"must have logits \(N, K\)"),
    (lambda: nn.Sequential(small_network(), nn.Softmax(1)).eval(), ValueError, "no gradient path"),
    (lambda: small_network().train(), ValueError, "evaluation mode"),
    (lambda: lambda x: x, TypeError, "must be a torch.nn.Module"),
]


@pytest.mark.parametrize(("make", "kind", "message"), REFUSED)
def test_refused_networks(make, kind, message, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("what was there")
    network = make()
    if isinstance(network, OfBatch):
        network.eval()
    with pytest.raises(kind, match=message):
        export_onnx(network.eval() if isinstance(network, Tokens) else network, path, transform=ImageTransform(16))
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_a_network_in_training_mode_is_not_run(tmp_path):
    network, calls = small_network(), []
    network[1].train().register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match="its module '1' is in training mode"):
        export_onnx(network, tmp_path / "model.onnx", transform=ImageTransform(16))
    assert not calls
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    network(torch.rand(1, 6, 4, 4))  # a control
    assert calls


def test_a_file_is_held_to_single_precision(exported):
    network, transform, path = exported
    enter, shape = _export._entrance(transform), (3, 16, 16)
    assert _check.disagreement(path, network, enter, shape, "split") < 1e-5
    for part in (0, 2):
        other = copy.deepcopy(network)
        with torch.no_grad():
            next(other[part].parameters()).flatten()[0] += 1e-3
        with pytest.raises(ValueError, match="disagrees"):
            _check.disagreement(path, other, enter, shape, "split")


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"transform": None}, ValueError, "`transform` must be given"),
        ({"transform": 16}, TypeError, "`transform` must be an ImageTransform, got int"),
        (
            {"transform": ImageTransform(16, encoding="normalized")},
            ValueError,
            r"cannot be run with an input of shape \(1, 3, 16, 16\), which `transform` makes: RuntimeError: ",
        ),
        ({"classes": ["a"]}, ValueError, "`classes` has 1 names, the network has 5 logits"),
        ({"classes": "abcde"}, TypeError, "must be a list of names"),
        ({"classes": [0, 1, 2, 3, 4]}, TypeError, "`classes` must be names, got 0 of type int"),
        ({"classes": np.arange(5)}, TypeError, r"`classes` must be names, got .*0.* of type int64"),
        ({"card": {"year": 2024}}, TypeError, "'year' is 2024"),
        ({"card": {"source": "here", "loss": "bce"}}, ValueError, r"must not hold 'loss' \(='bce'\).* says 'none'"),
        ({"loss": "mse"}, ValueError, r"`loss` \(='mse'\) must be one of bce, cross_entropy, none"),
        ({"products": "both"}, ValueError, "`products`"),
        ({"path": "model.pt"}, ValueError, r"must end in \.onnx"),
        ({"path": "folder.onnx"}, IsADirectoryError, "is a folder"),
        ({"path": "nowhere/model.onnx"}, FileNotFoundError, "nowhere/model.onnx"),
    ],
)
def test_refused_arguments(arguments, kind, message, tmp_path):
    (tmp_path / "folder.onnx").mkdir()
    path = tmp_path / arguments.pop("path", "model.onnx")
    with pytest.raises(kind, match=message):
        export_onnx(small_network(), path, **{"transform": ImageTransform(16), **arguments})
    assert [file.name for file in tmp_path.iterdir()] == ["folder.onnx"]


def test_too_large_for_one_file(exported, tmp_path, monkeypatch):
    network, path = exported[0], tmp_path / "model.onnx"
    monkeypatch.setattr(_export, "trace_explanation", Mock())
    monkeypatch.setattr(_graph, "onnx_model", lambda *_: onnx_ir.load(exported[2]))
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    monkeypatch.setattr(_export, "_LARGEST", size)
    with pytest.raises(ValueError, match=r"the weights have 0\.0 GiB, an ONNX file holds less than 2"):
        export_onnx(network, path, transform=ImageTransform(16))
    # Filters of the way back are weights of the file alone.
    monkeypatch.setattr(_export, "_LARGEST", size + 1)
    with pytest.raises(ValueError, match=r"the weights have 0\.0 GiB, an ONNX file holds less than 2"):
        export_onnx(network, path, transform=ImageTransform(16))
    monkeypatch.setattr(_export, "_LARGEST", 3 * size)  # a control
    for raised, kind, message in (
        (RuntimeError("exceeds 2GB"), ValueError, "cannot be written, as one of 2 GiB .* RuntimeError: exceeds 2GB"),
        (OSError(28, "No space left"), OSError, "No space left"),
    ):
        monkeypatch.setattr(onnx_ir, "save", Mock(side_effect=raised))
        with pytest.raises(kind, match=message):
            export_onnx(network, path, transform=ImageTransform(16))
    assert not list(tmp_path.iterdir())


def test_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(_export, "_is_installed", lambda package: package != "onnxscript")
    with pytest.raises(ImportError, match=r'export needs onnxscript: pip install "bcoskit\[export\]"'):
        export_onnx(small_network(), tmp_path / "model.onnx", transform=ImageTransform(16))
