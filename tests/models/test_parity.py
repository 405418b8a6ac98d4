"""The networks of the papers against those of the authors: their package, and stored outputs."""

import pytest
import torch
from torch import nn

import bcoskit
from bcoskit.models import create_model, list_models, model_row
from bcoskit.models._matching import authors_keys
from golden import NETWORKS, golden

authors = pytest.importorskip("authors", reason="needs the authors' package `bcos`")

# One of each shape; the rest of the list is measured by `benchmarks/networks.py`.
NAMES = [
    "resnet18.bcos_v2_in1k",
    "resnet50.bcos_v2_long_in1k",
    "resnext50_32x4d.bcos_v2_in1k",
    "densenet121.bcos_v2_in1k",
    "convnext_atto.bcos_v2_pn_in1k",
    "convnext_atto.bcos_v2_bnu_in1k",
    "simple_vit_ti_patch16_224.bcos_v2_in1k",
    "vitc_ti_patch1_14.bcos_v2_in1k",
    "resnet32.bcos_v2_cifar10",
    *list_models("resnet20.bcos_v2_*_linear_nomaxout_cifar10"),
    "resnet20.bcos_v2_lnu_unaffine_cifar10",
    "resnet20.bcos_v2_gn_cifar10",
]
STANDARD = ["simple_vit_ti_patch16_224.standard_v2_in1k", "vitc_ti_patch1_14.standard_v2_in1k"]
TARGET = 7


def difference(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def image(row, size=64, dtype=torch.float64):
    pixels = torch.rand(2, 3, size, size + 16, generator=torch.Generator().manual_seed(3), dtype=dtype)
    return bcoskit.encode(pixels) if row.transform.encoding == "bcos" else pixels


def loaded(name, weights, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(weights, path)
    return create_model(name, weights=path)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_the_authors_give_their_logits_and_explanations(name, tmp_path):
    row = model_row(name)
    theirs = authors.authors_network(row, calibrated=True).double()
    ours = loaded(name, theirs.state_dict(), tmp_path).double()
    x = image(row)
    logits, weights = authors.explanation(theirs, x, TARGET)
    e = bcoskit.explain(ours, x, TARGET)
    assert difference(e.logits, logits) < 1e-10
    assert difference(e.weights, weights) < 1e-10
    start = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(theirs(start)[:, TARGET].sum(), start)
    assert difference(e.weights, gradient) > 1e-2  # which explains nothing


@pytest.mark.parametrize(
    "name", ["resnet18.bcos_v2_in1k", "simple_vit_ti_patch16_224.bcos_v2_in1k", "vgg11_bnu.bcos_v2_in1k"]
)
def test_in_single_precision(name, tmp_path):
    row = model_row(name)
    theirs = authors.authors_network(row, calibrated="vgg" in name)  # without, its signal dies out
    ours = loaded(name, theirs.state_dict(), tmp_path)
    x = image(row, dtype=torch.float32)
    logits, weights = authors.explanation(theirs, x, TARGET)
    e = bcoskit.explain(ours, x, TARGET)
    assert difference(e.logits, logits) < 1e-5
    assert difference(e.weights, weights) < 1e-5


@pytest.mark.parametrize("name", STANDARD)
def test_ordinary_transformers(name, tmp_path):
    row = model_row(name)
    theirs = authors.authors_network(row).double()
    ours = loaded(name, theirs.state_dict(), tmp_path).double()
    x = image(row)
    with torch.no_grad():
        assert difference(ours(x), theirs(x)) < 1e-10
        theirs.linear_head.norm.bias += 0.1
        assert difference(ours(x), theirs(x)) > 1e-3


@pytest.mark.parametrize("name", ["resnet18.bcos_v2_in1k", "resnet20.bcos_v2_bn_cifar10"])
def test_training_updates_the_same_statistics(name, tmp_path):
    row = model_row(name)
    theirs = authors.authors_network(row).double().train()
    ours = loaded(name, theirs.state_dict(), tmp_path).double().train()
    for module in theirs.modules():
        if hasattr(module, "momentum"):
            module.momentum = 0.1
    x = image(row)
    with torch.no_grad():
        assert difference(ours(x), theirs(x)) < 1e-10
    names, state = authors_keys(ours, row.prefix), ours.state_dict()
    before = theirs.bn1.running_var.clone()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(state[names[key]], value, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        theirs(x)
    assert difference(theirs.bn1.running_var, before) > 1e-3


@pytest.mark.parametrize("name", [name for name in NETWORKS if "vgg" not in name])
def test_stored_outputs(name, tmp_path):
    row = model_row(name)
    stored = golden(name, row.transform.size)
    network = loaded(name, stored.weights, tmp_path).double()
    e = bcoskit.explain(network, stored.image, shares=True)
    constants = [module.bias for module in network.modules() if isinstance(module, bcoskit.nn.LogitLayer)]
    constant = next((value for value in constants if value), 0.0)
    assert difference(e.logits[0] - constant, stored.logits) < 1e-6
    assert difference(stored.cells(e.contributions[0]), stored.contributions) < 1e-6
    assert float(e.contributions.sum()) == pytest.approx(stored.total, rel=1e-6)
    assert float(e.residual.abs()) < 1e-10
    # Not those of the most probable class alone: the next one has another map.
    other = bcoskit.explain(network, stored.image, int(e.logits[0].argsort()[-2]))
    assert difference(stored.cells(other.contributions[0]), stored.contributions) > 1e-3


def test_clip_position_by_position():
    torch.manual_seed(0)
    network = create_model("clip_resnet50.bcosification_in1k").double().requires_grad_(False)
    pool = network.head
    maps = torch.randn(2, 2048, 3, 2, dtype=torch.float64)
    assert not network.unpool
    by_attention = network.forward_head(maps)
    network.unpool = True
    # Written out: values, B-cos layer with weights as they are, unit norm, mean over the positions.
    total = torch.zeros(2, 1024, dtype=torch.float64)
    for row in range(3):
        for column in range(2):
            value = maps[:, :, row, column] @ pool.v.weight.T
            y = value @ pool.proj.weight.T
            y = y * y.abs() / (value.norm(dim=1, keepdim=True) + 1e-12)
            unit = y / y.norm(dim=1, keepdim=True)
            torch.testing.assert_close(pool.positions(maps)[:, :, row, column], unit)
            total += unit / 6
    torch.testing.assert_close(network.forward_head(maps), total)
    assert difference(by_attention, total) > 0.1
    e = bcoskit.explain(pool, maps, target=3, shares=True)
    assert float(e.residual.abs().max()) < 1e-10
    assert not e.shares


def test_constants_of_transformers_have_names():
    for name in ("simple_vit_ti_patch16_224.bcos_v2_in1k", "vitc_ti_patch1_14.bcosification_in1k"):
        network, x = create_model(name).double(), image(model_row(name))
        e = bcoskit.explain(network, x, shares=True)
        places = {share.partition(":")[0] for share in e.shares}
        normalize = {"patch_embed.stem.normalize"} if "bcosification" in name else set()
        assert places == {"pos_embed", "head.logits.bias"} | normalize
        assert float(e.residual.abs().max()) < 1e-10
        network.pos_embed = nn.Identity().eval()
        without = bcoskit.explain(network, x, shares=True)
        assert not any("pos_embed" in share for share in without.shares)


@pytest.mark.parametrize(
    ("name", "keys", "parameters"),
    [
        # as published
        ("resnet18.bcos_v2_in1k", 101, 11_693_120),
        ("resnet34.bcos_v2_in1k", 181, 21_797_568),
        ("resnet50.bcos_v2_in1k", 266, 25_538_880),
        ("resnet101.bcos_v2_in1k", 521, 44_504_896),
        ("resnet152.bcos_v2_long_in1k", 776, 60_125_504),
        ("resnext50_32x4d.bcos_v2_in1k", 266, 25_003_200),
        ("densenet121.bcos_v2_in1k", 605, 7_945_440),
        ("densenet161.bcos_v2_in1k", 805, 28_584_144),
        ("densenet169.bcos_v2_in1k", 845, 14_078_688),
        ("densenet201.bcos_v2_in1k", 1005, 19_907_808),
        ("vgg11_bnu.bcos_v2_in1k", 43, 132_855_872),
        ("convnext_tiny.bcos_v2_pn_in1k", 100, 28_543_392),
        ("convnext_tiny.bcos_v2_bnu_in1k", 169, 28_543_392),
        ("convnext_base.bcos_v2_pn_in1k", 190, 88_466_304),
        ("convnext_base.bcos_v2_bnu_in1k", 313, 88_466_304),
        ("simple_vit_ti_patch16_224.bcos_v2_in1k", 75, 5_800_128),
        ("simple_vit_s_patch16_224.bcos_v2_in1k", 75, 22_217_088),
        ("simple_vit_b_patch16_224.bcosification_in1k", 75, 86_901_504),
        ("simple_vit_l_patch16_224.bcos_v2_in1k", 87, 178_787_328),
        ("vitc_ti_patch1_14.bcos_v2_in1k", 77, 5_318_712),
        ("vitc_s_patch1_14.bcosification_in1k", 77, 20_878_704),
        ("vitc_b_patch1_14.bcos_v2_in1k", 81, 81_326_016),
        ("vitc_l_patch1_14.bcos_v2_in1k", 93, 167_444_160),
        ("simple_vit_ti_patch16_224.standard_v2_in1k", 126, 5_670_184),
        ("vitc_ti_patch1_14.standard_v2_in1k", 132, 5_334_952),
        ("clip_resnet50.bcosification_in1k", 279, 38_181_568),
        ("inception_v3.bcos_v1_in1k", 98, 54_247_808),
        ("resnet50.bcos_v1_in1k", 54, 51_024_640),
        ("resnet20.bcos_v2_nomaxout_cifar10", 22, 271_328),
        ("resnet20.bcos_v2_pn_linear_cifar10", 43, 543_440),
        ("resnet20.bcos_v2_anu_cifar10", 127, 542_698),
    ],
)
def test_published_sizes(name, keys, parameters):
    with torch.device("meta"):
        network = model_row(name).build()
    assert len(network.state_dict()) == keys
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("name", [name for name in list_models() if "cifar10" not in name or name.startswith("cnn9")])
def test_keys_are_one_to_one(name):
    row = model_row(name)
    with torch.device("meta"):
        network = row.build()
    keys = authors_keys(network, row.prefix)
    assert list(keys.values()) == list(network.state_dict())
    assert all(key.startswith(row.prefix) for key in keys)
    assert not [key for key in keys if ".linear.linear.linear." in key or ".conv.conv" in key]
