"""The residual networks for CIFAR-sized images, which no library has: three stages of 16, 32 and 64 channels."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bcoskit.models._network import Network, Rename, by_fan_out
from bcoskit.models._norms import norm_layer
from bcoskit.nn import BcosConv2d, ClassifierHead

DEPTHS = (20, 32, 44, 56, 110)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which is a 1×1 convolution where the shape changes.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Of the first convolution.
        conv: Makes a convolution from (in_channels, out_channels, kernel_size, stride, padding).
        norm: Makes a norm from the number of channels.
        activation: Makes the activation.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        *,
        conv: Callable[..., nn.Module],
        norm: Callable[[int], nn.Module],
        activation: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride, 1)
        self.bn1 = norm(channels)
        self.act1 = activation()
        self.conv2 = conv(channels, channels, 3, 1, 1)
        self.bn2 = norm(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(conv(in_channels, channels, 1, stride, 0), norm(channels))
        self.act2 = activation()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(y + self.downsample(x))


class PaddedShortcut(nn.Module):
    """Every other position, between zeros for the channels that are new (He et al., CVPR 2016, option A).

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.padding = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, channels, ⌈H / 2⌉, ⌈W / 2⌉)."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class CifarResNet(Network):
    """Residual network for 32×32 images (He et al., CVPR 2016, section 4.2), with layers given by the caller.

    Args:
        depth: 6n + 2 layers.
        in_channels: Channels of the input.
        num_classes: Number of logits.
        conv: Makes a convolution from (in_channels, out_channels, kernel_size, stride, padding).
        norm: Makes a norm from the number of channels.
        activation: Makes the activation.
        head: Makes the head from the channels of the last map and the number of classes.

    Raises:
        ValueError: If `depth` is not 6n + 2.
    """

    initialize_filter = staticmethod(by_fan_out)
    classifier_path = "fc"

    def __init__(
        self,
        depth: int,
        in_channels: int,
        num_classes: int,
        *,
        conv: Callable[..., nn.Module],
        norm: Callable[[int], nn.Module],
        activation: Callable[[], nn.Module],
        head: Callable[[int, int], nn.Module],
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"`depth` (={depth}) must be 6n + 2, as in {', '.join(map(str, DEPTHS))}")
        blocks = (depth - 2) // 6
        block = partial(BasicBlock, conv=conv, norm=norm, activation=activation)

        def stage(entry: int, channels: int, stride: int) -> nn.Sequential:
            rest = [block(channels, channels, 1) for _ in range(blocks - 1)]
            return nn.Sequential(block(entry, channels, stride), *rest)

        self.conv1 = conv(in_channels, 16, 3, 1, 1)
        self.bn1 = norm(16)
        self.act1 = activation()
        self.layer1 = stage(16, 16, 1)
        self.layer2 = stage(16, 32, 2)
        self.layer3 = stage(32, 64, 2)
        self.fc = head(64, num_classes)
        self.num_features, self.num_classes, self.in_chans = 64, num_classes, in_channels
        self.feature_info = [
            {"num_chs": 16 * reduction, "reduction": reduction, "module": f"layer{index}"}
            for index, reduction in ((1, 1), (2, 2), (3, 4))
        ]
        self.reset_parameters()

    def authors_renames(self) -> Sequence[Rename]:
        """From our paths to the authors'."""
        return ((r"^fc\.conv", "fc"), (r"^fc\.2\.", "linear."))

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to the last map, (N, 64, H / 4, W / 4)."""
        return self.layer3(self.layer2(self.layer1(self.act1(self.bn1(self.conv1(x))))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits (N, num_classes), or itself, which is what is classified."""
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


def bcos_cifar_resnet(
    depth: int,
    num_classes: int,
    *,
    in_channels: int = 6,
    b: float = 2.0,
    max_out: int = 1,
    norm: str = "bnu-linear",
) -> CifarResNet:
    """B-cos ResNet, by default with uncentred batch norm without bias (Böhle et al., TPAMI 2024, CIFAR-10 experiments).

    Args:
        depth: 20, 32, 44, 56 or 110.
        num_classes: Number of logits; their constant is `-log(num_classes - 1)`.
        in_channels: Channels of the encoded image.
        b: Exponent of all layers.
        max_out: MaxOut units of all layers.
        norm: `"none"`, or one of an, bn, gn, in, ln, pn (over all, batch, group, instance, layer, position), with a u
            if it is uncentred, and with `-linear` if it has no bias, `-unaffine` if it has no scale either.

    Returns:
        The network, with fresh weights.
    """

    def head(channels: int, num_classes: int) -> nn.Module:
        constant = -math.log(max(num_classes - 1, 1))
        return ClassifierHead(channels, num_classes, b=b, max_out=max_out, logit_bias=constant)

    return CifarResNet(
        depth,
        in_channels,
        num_classes,
        conv=partial(BcosConv2d, b=b, max_out=max_out),
        norm=partial(norm_layer, norm),
        activation=nn.Identity,
        head=head,
    )


def cifar_resnet(depth: int, num_classes: int, *, in_channels: int = 3, padded_shortcuts: bool = False) -> CifarResNet:
    """The ordinary network of the same shape: convolution, batch norm, ReLU, and a linear classifier.

    Args:
        depth: 20, 32, 44, 56 or 110.
        num_classes: Number of logits.
        in_channels: Channels of the normalised image.
        padded_shortcuts: Whether shortcuts pad channels with zeros, as in the original, instead of convolving.

    Returns:
        The network, with fresh weights.
    """

    def head(channels: int, num_classes: int) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))

    network = CifarResNet(
        depth,
        in_channels,
        num_classes,
        conv=partial(nn.Conv2d, bias=False),
        norm=nn.BatchNorm2d,
        activation=nn.ReLU,
        head=head,
    )
    if padded_shortcuts:
        for path, module in list(network.named_modules()):
            if path.endswith("downsample") and isinstance(module, nn.Sequential):
                convolution: Any = module[0]
                network.set_submodule(path, PaddedShortcut(convolution.in_channels, convolution.out_channels))
    return network
