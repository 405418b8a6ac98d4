"""The table of networks: a row for each, by paper. What a network consists of is in the module of its family."""

import math
from collections.abc import Iterator
from itertools import product

from bcoskit.data import ImageTransform
from bcoskit.data._transforms import IMAGENET_MEAN, IMAGENET_STD
from bcoskit.models._layers import LayerSet
from bcoskit.models._norms import NORMS
from bcoskit.models._row import Checkpoint, ModelRow
from bcoskit.models.cifar import DEPTHS

_CIFAR10_MEAN, _CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

_USUAL = ImageTransform(224, resize=256)
_LONG = ImageTransform(224, resize=232)  # networks that were trained at 176 pixels
_CIFAR = ImageTransform(32)

_FAMILIES = {
    "resne": ("resnet", "ResNet"),
    "wide_": ("resnet", "ResNet"),
    "dense": ("densenet", "DenseNet"),
    "vgg": ("vgg", "VGG"),
    "convn": ("convnext", "ConvNeXt"),
    "simpl": ("vit", "VisionTransformer"),
    "vitc_": ("vit", "VisionTransformer"),
}

# The files of the second paper: end of the URL, which has the first digits of the SHA-256, and top-1 accuracy.
_V2_RELEASE = "https://github.com/B-cos/B-cos-v2/releases/download/v0.0.1-weights/"
_V2_WEIGHTS: dict[str, tuple[str, float | None]] = {
    "resnet18.bcos_v2_in1k": ("resnet_18-68b4160fff", 68.736),
    "resnet34.bcos_v2_in1k": ("resnet_34-a63425a03e", 72.284),
    "resnet50.bcos_v2_in1k": ("resnet_50-ead259efe4", 75.882),
    "resnet101.bcos_v2_in1k": ("resnet_101-84c3658278", 76.532),
    "resnet152.bcos_v2_in1k": ("resnet_152-42051a77c1", 76.484),
    "resnext50_32x4d.bcos_v2_in1k": ("resnext_50_32x4d-57af241ab9", 75.820),
    "densenet121.bcos_v2_in1k": ("densenet_121-b8daf96afb", 73.612),
    "densenet161.bcos_v2_in1k": ("densenet_161-9e9ea51353", 76.622),
    "densenet169.bcos_v2_in1k": ("densenet_169-7037ee0604", 75.186),
    "densenet201.bcos_v2_in1k": ("densenet_201-00ac87066f", 75.480),
    "vgg11_bnu.bcos_v2_in1k": ("vgg_11_bnu-34036029f0", 69.310),
    "convnext_tiny.bcos_v2_pn_in1k": ("convnext_tiny_pn-539b1bfb37", 77.488),
    "convnext_base.bcos_v2_pn_in1k": ("convnext_base_pn-b0495852c6", 79.650),
    "convnext_tiny.bcos_v2_bnu_in1k": ("convnext_tiny_bnu-dbd7f5ef9d", 76.826),
    "convnext_base.bcos_v2_bnu_in1k": ("convnext_base_bnu-7c32a704b3", 80.142),
    "densenet121.bcos_v2_long_in1k": ("densenet_121_long-5175461597", 77.302),
    "resnet50.bcos_v2_long_in1k": ("resnet_50_long-ef38a88533", 79.468),
    "resnet152.bcos_v2_long_in1k": ("resnet_152_long-0b4b434939", 80.144),
    "simple_vit_ti_patch16_224.bcos_v2_in1k": ("bcos_simple_vit_ti_patch16_224-4b0824b1c1", 59.960),
    "simple_vit_s_patch16_224.bcos_v2_in1k": ("bcos_simple_vit_s_patch16_224-75e99d1f73", 69.246),
    "simple_vit_b_patch16_224.bcos_v2_in1k": ("bcos_simple_vit_b_patch16_224-1fc4750806", 74.408),
    "simple_vit_l_patch16_224.bcos_v2_in1k": ("bcos_simple_vit_l_patch16_224-9613b2ad0a", 75.060),
    "vitc_ti_patch1_14.bcos_v2_in1k": ("bcos_vitc_ti_patch1_14-ddd6193a77", 67.260),
    "vitc_s_patch1_14.bcos_v2_in1k": ("bcos_vitc_s_patch1_14-cf55c88f0c", 74.504),
    "vitc_b_patch1_14.bcos_v2_in1k": ("bcos_vitc_b_patch1_14-a13c46397b", 77.152),
    "vitc_l_patch1_14.bcos_v2_in1k": ("bcos_vitc_l_patch1_14-8739e18b8d", 77.782),
    "simple_vit_ti_patch16_224.standard_v2_in1k": ("standard_simple_vit_ti_patch16_224-2ae8c65a39", 70.230),
    "simple_vit_s_patch16_224.standard_v2_in1k": ("standard_simple_vit_s_patch16_224-f2934fcdcf", 74.470),
    "simple_vit_b_patch16_224.standard_v2_in1k": ("standard_simple_vit_b_patch16_224-87074200ed", 75.300),
    "simple_vit_l_patch16_224.standard_v2_in1k": ("standard_simple_vit_l_patch16_224-62dc536e03", 75.710),
    "vitc_ti_patch1_14.standard_v2_in1k": ("standard_vitc_ti_patch1_14-a5d6bded37", 72.590),
    "vitc_s_patch1_14.standard_v2_in1k": ("standard_vitc_s_patch1_14-34ecd7288e", 75.756),
    "vitc_b_patch1_14.standard_v2_in1k": ("standard_vitc_b_patch1_14-4d374b0220", 76.790),
    "vitc_l_patch1_14.standard_v2_in1k": ("standard_vitc_l_patch1_14-560e48f246", 77.866),
}

# The shares of the first paper: of their file server, without hashes; its accuracies on CIFAR-10.
_V1_SHARE = "https://nextcloud.mpi-klsb.mpg.de/index.php/s/{}/download"
_V1_WEIGHTS: dict[str, tuple[str, float | None]] = {
    "densenet121.bcos_v1_in1k": ("LW2HsNDzAzaaaDH", None),
    "densenet121.bcos_v1_long_in1k": ("G8kdm73qWn4L8Lg", None),
    "resnet34.bcos_v1_in1k": ("mYe6TggQsDymZbk", None),
    "vgg11.bcos_v1_in1k": ("kEHgFSSKMEdeA5N", None),
    "inception_v3.bcos_v1_in1k": ("QSEo6QSNgPZqNfi", None),
    "cnn9.bcos_v1_b1_cifar10": ("q8cRRojXZ2WNWbS", 93.53),
    "cnn9.bcos_v1_b1_25_cifar10": ("oX6H7jQiSN2dfWJ", 93.81),
    "cnn9.bcos_v1_b1_5_cifar10": ("3LxnBCarS8Lpq5b", 93.69),
    "cnn9.bcos_v1_b1_75_cifar10": ("XLwEnaKr9bYQJaN", 93.69),
    "cnn9.bcos_v1_b2_cifar10": ("mksX2CJMCDQbMYb", 93.19),
    "cnn9.bcos_v1_b2_25_cifar10": ("qFsqLPdHLQyNHwH", 92.60),
    "cnn9.bcos_v1_b2_5_cifar10": ("XwEAFrPSEYJ2C79", 92.37),
}
_V1_LICENCE = "non-commercial research"

# Releases of the third paper, whose files have no published names: one downloads from the page.
_V3_PAGE = "https://github.com/shrebox/B-cosification/releases/tag/{}"
_V3_LICENCE = "Apache-2.0, derived from ImageNet: non-commercial"

_V1_DIVISORS = {"resnet": 100, "resnext": 100, "wide": 100, "densenet": 100, "vgg": 1000, "inception": 200}
_V1_TEMPERATURES = {"resnet": 10.0, "resnext": 10.0, "wide": 10.0, "densenet": 1e-3, "vgg": 0.1, "inception": 1.0}
_V1_CIFAR_TEMPERATURES = {1.0: 1e-3, 1.25: 1e-3, 1.5: 1e-2, 1.75: 10.0, 2.0: 100.0, 2.25: 100.0, 2.5: 1000.0}

_RESNETS = tuple(f"resnet{depth}" for depth in (18, 34, 50, 101, 152))
_RESNEXTS = ("resnext50_32x4d", "resnext101_32x8d")
_WIDE = ("wide_resnet50_2", "wide_resnet101_2")
_DENSENETS = tuple(f"densenet{depth}" for depth in (121, 161, 169, 201))
_VGGS = tuple(f"vgg{depth}" for depth in (11, 13, 16, 19))
_CONVNEXTS = tuple(f"convnext_{size}" for size in ("atto", "tiny", "small", "base", "large"))
_VITS = tuple(
    kind.format(size)
    for kind, size in product(("simple_vit_{}_patch16_224", "vitc_{}_patch1_14"), ("ti", "s", "b", "l"))
)


def _checkpoint(name: str) -> Checkpoint | None:
    if name in _V2_WEIGHTS:
        file, accuracy = _V2_WEIGHTS[name]
        return Checkpoint(f"{_V2_RELEASE}{file}.pth", file.rpartition("-")[2], accuracy)
    if name in _V1_WEIGHTS:
        share, accuracy = _V1_WEIGHTS[name]
        data = "CIFAR-10" if name.endswith("cifar10") else "ImageNet-1k"
        return Checkpoint(_V1_SHARE.format(share), None, accuracy, data, _V1_LICENCE)
    return None


def _family(architecture: str) -> tuple[str, str]:
    return next(family for start, family in _FAMILIES.items() if architecture.startswith(start))


def _in1k(
    architecture: str,
    tag: str,
    layers: LayerSet | None,
    *,
    transform: ImageTransform = _USUAL,
    prefix: str = "",
    named: str | None = None,
    checkpoint: Checkpoint | None = None,
    **arguments: float | bool,
) -> ModelRow:
    name = f"{named or architecture}.{tag}_in1k"
    return ModelRow(
        name,
        _family(architecture),
        {"architecture": architecture, "layers": layers, **arguments},
        transform,
        "in1k",
        "cross_entropy" if layers is None else "bce",
        prefix,
        checkpoint or _checkpoint(name),
    )


def _v2_rows() -> Iterator[ModelRow]:
    """Of "B-cos Alignment for Inherently Interpretable CNNs and Vision Transformers" (TPAMI 2024), on ImageNet."""
    layers = LayerSet()
    for architecture in (*_RESNETS, *_RESNEXTS, *_WIDE, *_DENSENETS):
        yield _in1k(architecture, "bcos_v2", layers)
    for architecture in _VGGS:
        yield _in1k(architecture, "bcos_v2", layers, named=f"{architecture}_bnu")
    for architecture in ("resnet50", "resnet152"):
        yield _in1k(architecture, "bcos_v2_long", layers, transform=_LONG, drop_path_rate=0.1)
    yield _in1k("densenet121", "bcos_v2_long", layers, transform=_LONG)
    for architecture in _CONVNEXTS:
        position = LayerSet(norm="pn-linear", norm_eps=1e-6)
        yield _in1k(architecture, "bcos_v2_pn", position, transform=_LONG)
        yield _in1k(architecture, "bcos_v2_bnu", layers, transform=_LONG)
    normalized = ImageTransform(224, resize=256, encoding="normalized")
    for architecture in _VITS:
        yield _in1k(architecture, "bcos_v2", layers, prefix="0.")
        yield _in1k(architecture, "standard_v2", None, transform=normalized)


def _tags(norm: str, max_out: int) -> list[str]:
    """Of a norm and of MaxOut, as names spell them."""
    return ([] if norm == "none" else norm.split("-")) + (["nomaxout"] if max_out == 1 else [])


def _v2_cifar_rows() -> Iterator[ModelRow]:
    """Of the same paper, on CIFAR-10: all norms, with MaxOut of 2 filters and without."""
    for depth, norm, max_out in product(DEPTHS, NORMS, (2, 1)):
        name = "_".join((f"resnet{depth}.bcos_v2", *_tags(norm, max_out), "cifar10"))
        arguments = {"depth": depth, "norm": norm, "max_out": max_out}
        yield ModelRow(name, ("cifar", "bcos_cifar_resnet"), arguments, _CIFAR, "cifar10", "bce")


def _v1_rows() -> Iterator[ModelRow]:
    """Of "B-cos Networks: Alignment is All We Need for Interpretability" (CVPR 2022)."""

    def layers(kind: str) -> LayerSet:
        return LayerSet(
            max_out=2,
            scale=1 / _V1_DIVISORS[kind],
            scale_by_patch=True,
            grouped=False,
            norm="none",
            temperature=_V1_TEMPERATURES[kind],
            logit_bias=math.log(0.01 / 0.99),
        )

    for kind, architectures in (
        ("resnet", _RESNETS),
        ("resnext", _RESNEXTS),
        ("wide", _WIDE),
        ("densenet", _DENSENETS),
        ("vgg", _VGGS),
    ):
        for architecture in architectures:
            yield _in1k(architecture, "bcos_v1", layers(kind), prefix="0.")
    yield _in1k("densenet121", "bcos_v1_long", layers("densenet"), prefix="0.")
    name = "inception_v3.bcos_v1_in1k"
    yield ModelRow(
        name,
        ("inception", "InceptionV3"),
        {"layers": layers("inception")},
        ImageTransform(299, resize=320),
        "in1k",
        "bce",
        "0.",
        _checkpoint(name),
    )
    for b in _V1_CIFAR_TEMPERATURES:
        nine = _without_norms(b, max_out=2)
        name = f"cnn9.bcos_v1_{_exponent(b)}_cifar10"
        checkpoint = _checkpoint(name)
        yield ModelRow(name, ("cnn9", "Cnn9"), {"layers": nine}, _CIFAR, "cifar10", "bce", checkpoint=checkpoint)


def _without_norms(b: float, max_out: int) -> LayerSet:
    """Nine layers of the first paper, whose scale takes the place of norms: without either nothing reaches the end."""
    scale = 10 ** (-2 + 1.5 * (2.5 - b))
    constant = math.log(0.1 / 0.9)
    temperature = _V1_CIFAR_TEMPERATURES[b]
    return LayerSet(b, max_out=max_out, scale=scale, norm="none", temperature=temperature, logit_bias=constant)


def _bcosification_rows() -> Iterator[ModelRow]:
    """Of "B-cosification: Transforming Deep Neural Networks to be Inherently Interpretable" (NeurIPS 2024)."""

    def layers(mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD) -> LayerSet:
        return LayerSet(normalize_weight=False, activations=True, mean=mean, std=std)

    def released(release: str) -> Checkpoint:
        return Checkpoint(_V3_PAGE.format(release), licence=_V3_LICENCE, by_hand=True)

    ordinary = released("v0.0.1-checkpoints")
    for architecture, tag in (
        ("resnet18", "bcosification"),
        ("resnet50", "bcosification"),
        ("resnet50", "bcosification_v1"),  # from the first of torchvision's two sets of weights
        ("densenet121", "bcosification"),
    ):
        yield _in1k(architecture, tag, layers(), prefix="model.", checkpoint=ordinary)
    for architecture in _VITS:
        yield _in1k(architecture, "bcosification", layers(), prefix="model.", checkpoint=ordinary, classify_tokens=True)
    clip = LayerSet(normalize_weight=False, activations=True, mean=_CLIP_MEAN, std=_CLIP_STD)
    for data in ("in1k", "cc3m"):
        yield ModelRow(
            f"clip_resnet50.bcosification_{data}",
            ("clip", "ClipResNet"),
            {"layers": clip},
            ImageTransform(224, interpolation="bicubic"),
            "embedding",
            "none",
            "model.",
            released("v0.0.2-CLIP-checkpoints"),
        )


def _exponent(b: float) -> str:
    """As names spell it: b1, b1_25."""
    return f"b{b:g}".replace(".", "_")


def _own_rows() -> Iterator[ModelRow]:
    """Trained by this package, on CIFAR-10."""
    normalized = ImageTransform(32, encoding="normalized", mean=_CIFAR10_MEAN, std=_CIFAR10_STD)
    carried = Checkpoint("resnet20.bcos_cifar10.safetensors", None, 85.9, "CIFAR-10 (JPEG q75)")
    for depth in DEPTHS:
        name = f"resnet{depth}.bcos_cifar10"
        yield ModelRow(
            name,
            ("cifar", "bcos_cifar_resnet"),
            {"depth": depth, "max_out": 2},
            _CIFAR,
            "cifar10",
            "bce",
            checkpoint=carried if name in carried.location else None,
        )
        name = f"resnet{depth}.standard_cifar10"
        yield ModelRow(name, ("cifar", "cifar_resnet"), {"depth": depth}, normalized, "cifar10", "cross_entropy")
        arguments = {"depth": depth, "padded_shortcuts": True}
        # As others have trained it; weights that are on offer go with the constants of ImageNet.
        imagenet = ImageTransform(32, encoding="normalized")
        name = f"resnet{depth}.he_cifar10"
        yield ModelRow(name, ("cifar", "cifar_resnet"), arguments, imagenet, "cifar10", "cross_entropy")
    # The nine layers of the first paper, a quarter as wide, most with norms: trained in minutes, for ablations.
    layers: dict[str, LayerSet | None] = {"standard": None}
    layers |= {f"bcos_{_exponent(b)}": LayerSet(b, activations=True) for b in _V1_CIFAR_TEMPERATURES}
    layers |= {
        "_".join(("bcos", *_tags(norm, max_out))): LayerSet(norm=norm, max_out=max_out)
        for norm, max_out in product(("bnu", "bnu-linear", "lnu-linear", "pnu-linear"), (2, 1))
    }
    layers |= {"_".join(("bcos", *_tags("none", max_out))): _without_norms(2.0, max_out) for max_out in (2, 1)}
    for tag, chosen in layers.items():
        yield ModelRow(
            f"cnn9_narrow.{tag}_cifar10",
            ("cnn9", "Cnn9"),
            {"layers": chosen, "width": 16},
            normalized if chosen is None else _CIFAR,
            "cifar10",
            "cross_entropy" if chosen is None else "bce",
        )


ROWS = {
    row.name: row for rows in (_own_rows, _v2_rows, _v2_cifar_rows, _v1_rows, _bcosification_rows) for row in rows()
}
