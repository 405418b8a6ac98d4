"""The networks of the authors' package `bcos`, by our names: what ours are compared with."""

import math
import warnings
from functools import partial
from typing import Any

import torch
from bcos.models import convnext, densenet, resnet, vgg, vit
from bcos.modules import BcosConv2d, BcosLinear, DetachableGNLayerNorm2d, LogitLayer, norms
from bcos.modules.common import BcosSequential
from torch import Tensor, nn

from bcoskit.models import ModelRow

_CLASSES = {
    "an": (norms.AllNorm2d, norms.AllNormUncentered2d),
    "bn": (norms.BatchNorm2d, norms.BatchNormUncentered2d),
    "gn": (partial(norms.DetachableGroupNorm2d, 2), partial(norms.GroupNormUncentered2d, 2)),
    "in": (norms.DetachableGNInstanceNorm2d, norms.GNInstanceNormUncentered2d),
    "ln": (norms.DetachableGNLayerNorm2d, norms.GNLayerNormUncentered2d),
    "pn": (norms.DetachablePositionNorm2d, norms.PositionNormUncentered2d),
}
_AFFINE = {"": lambda norm: norm, "linear": norms.NoBias, "unaffine": norms.Unaffine}


def has_counterpart(row: ModelRow) -> bool:
    """Whether the package has the network."""
    return ".bcos_v2" in row.name or ".standard_v2" in row.name


def authors_network(row: ModelRow, seed: int = 0, *, calibrated: bool = False) -> nn.Module:
    """The authors' network of a row, in evaluation mode, with random weights.

    Args:
        row: The row.
        seed: Of the weights.
        calibrated: Whether running statistics are those of random images, so that activations keep their size through
            the network, and rounding errors grow; if not, they are random.

    Returns:
        The network.
    """
    torch.manual_seed(seed)
    network = _network(row)
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2 or name.endswith("layer_scale"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    running = [module for module in network.modules() if getattr(module, "running_var", None) is not None]
    for module in running:
        nn.init.uniform_(module.running_var, 0.5, 1.5)
        nn.init.uniform_(module.running_mean, -0.1, 0.1)
        module.momentum = 1.0
    if running and calibrated:
        size = min(row.transform.size, 96)  # as large as is needed for statistics
        with torch.no_grad():
            network.train()(torch.rand(4, row.in_channels, size, size))
    return network.eval()


def explanation(network: nn.Module, x: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """Logits and the row of W(x) of one class, by the authors' way."""
    if not isinstance(network, BcosSequential) and not hasattr(network, "explanation_mode"):
        with torch.no_grad():
            return network(x), torch.zeros_like(x)
    start = x.clone().requires_grad_()
    with network.explanation_mode():
        logits = network(start)
        # Not `backward`, which would compute gradients of all weights too.
        (weights,) = torch.autograd.grad(logits[:, target].sum(), start)
    return logits.detach(), weights


def _network(row: ModelRow) -> nn.Module:
    architecture, tag = row.name.split(".", 1)
    arguments = row.arguments
    if tag.endswith("_cifar10"):
        conv = partial(BcosConv2d, b=2, max_out=arguments["max_out"])
        build = getattr(resnet, f"cifar10_{architecture}")
        return build(in_chans=6, norm_layer=_norm(arguments["norm"]), conv_layer=conv)
    if "vit" in architecture:
        return _transformer(architecture, bcos=tag.startswith("bcos"))
    options: dict[str, Any] = {
        "in_chans": 6,
        "conv_layer": partial(BcosConv2d, b=2, max_out=1),
        "norm_layer": None if "_pn_" in tag else norms.NoBias(norms.BatchNormUncentered2d),
    }
    for module in (resnet, densenet, vgg, convnext):
        if hasattr(module, architecture):
            return getattr(module, architecture)(**options)
    raise ValueError(f"the authors have no {architecture}")


def _norm(name: str) -> Any:
    if name == "none":
        return nn.Identity
    kind, _, affine = name.partition("-")
    return _AFFINE[affine](_CLASSES[kind[:2]][kind.endswith("u")])


def _transformer(architecture: str, *, bcos: bool) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one should go another way, which cannot do without their configurations
        if not bcos:
            return getattr(vit, architecture)(
                linear_layer=nn.Linear,
                conv2d_layer=nn.Conv2d,
                norm_layer=nn.LayerNorm,
                norm2d_layer=DetachableGNLayerNorm2d,
                act_layer=nn.GELU,
                channels=3,
            )
        network = getattr(vit, architecture)(
            linear_layer=partial(BcosLinear, b=2, max_out=1),
            conv2d_layer=partial(BcosConv2d, b=2, max_out=1),
            norm_layer=norms.NoBias(norms.DetachableLayerNorm),
            norm2d_layer=norms.NoBias(DetachableGNLayerNorm2d),
            act_layer=nn.Identity,
            channels=6,
        )
    return BcosSequential(network, LogitLayer(logit_bias=-math.log(999)))
