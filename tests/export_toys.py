"""What the tests of exports share: a network so small that it is exported in no time."""

import torch
from torch import nn

from bcoskit.nn import BatchNorm, BcosConv2d, ClassifierHead

CLASSES = ("<b>cat</b>", "dog", "fox", "owl", "elk")


def small_network(channels=6):
    torch.manual_seed(0)
    layers = [BcosConv2d(channels, 8, 3, stride=2, padding=1), BatchNorm(8), ClassifierHead(8, 5, logit_bias=-1.0)]
    return nn.Sequential(*layers).eval()
