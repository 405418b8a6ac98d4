"""The walk that puts other layers in the place of an ordinary network's."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from timm.layers import GELU
from timm.layers.norm import LayerNorm2d
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from bcoskit.models._layers import LayerSet

Rules: TypeAlias = Mapping[type[nn.Module], Callable[[Any], nn.Module]]


def substitute(module: nn.Module, rules: Rules) -> None:
    """Replace every descendant for whose type, or the nearest base of it, there is a rule.

    Args:
        module: The network; it is changed.
        rules: From a type of layers to what makes the new layer out of the old one.
    """
    for name, child in list(module.named_children()):
        rule = next((rules[base] for base in type(child).__mro__ if base in rules), None)
        if rule is not None:
            setattr(module, name, rule(child))
        else:
            substitute(child, rules)


def rules_of(layers: LayerSet) -> Rules:
    """What a set makes of the convolutions, norms, activations and max poolings of an ordinary network."""
    return {
        nn.Conv2d: partial(_of_conv, layers),
        BatchNormAct2d: partial(_of_norm_with_activation, layers),
        nn.BatchNorm2d: lambda norm: layers.norm_of(norm.num_features),
        LayerNorm2d: lambda norm: layers.norm_of(norm.normalized_shape[0]),
        nn.MaxPool2d: lambda pool: nn.AvgPool2d(pool.kernel_size, pool.stride, pool.padding),
        **{kind: partial(_of_activation, layers) for kind in (nn.ReLU, nn.GELU, GELU)},
    }


def _of_conv(layers: LayerSet, conv: Any) -> nn.Module:
    assert conv.dilation == (1, 1)
    (rows, columns), (down, across), (above, beside) = conv.kernel_size, conv.stride, conv.padding
    return layers.conv(
        conv.in_channels, conv.out_channels, (rows, columns), (down, across), (above, beside), groups=conv.groups
    )


def _of_norm_with_activation(layers: LayerSet, norm: Any) -> nn.Module:
    plain = layers.norm_of(norm.num_features)
    return nn.Sequential(OrderedDict(norm=plain, act=norm.act)) if layers.activations else plain


def _of_activation(layers: LayerSet, activation: nn.Module) -> nn.Module:
    return activation if layers.activations else nn.Identity()
