"""Networks and images whose explanations are known by hand."""

import torch
from torch import nn


class Patches(nn.Module):
    """Logit of class k: mean over the positions of channel k of the image; of a linear network W(x) is the weight."""

    loss = "bce"

    def __init__(self, classes=5, scale=6.0):
        super().__init__()
        self.conv = nn.Conv2d(classes, classes, 1, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(scale * torch.eye(classes)[:, :, None, None])

    def forward(self, x):
        return self.conv(x).mean((2, 3))


class Small(nn.Module):
    """A ReLU network with maps, max pooling and a linear classifier."""

    def __init__(self, inputs=3, classes=4):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, 6, 3, padding=1)
        self.act1 = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.act2 = nn.ReLU()
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = self.pool(self.act1(self.conv1(x)))
        return self.head(self.act2(self.conv2(x)).mean((2, 3)))


def small(inputs=3, classes=4):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small(inputs, classes).eval()


def patches(classes=5, scale=6.0):
    return Patches(classes, scale).eval()


def images(count=20, classes=5, side=4, strength=None):
    """Image i shows its class, i modulo the classes, in that channel alone; later ones are weaker."""
    items = []
    for index in range(count):
        x = torch.zeros(classes, side, side)
        x[index % classes] = 1 - 0.01 * index if strength is None else strength
        items.append((x, index % classes))
    return items


def noise(count=6, channels=3, side=8, classes=4):
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(channels, side, side, generator=generator), index % classes) for index in range(count)]
