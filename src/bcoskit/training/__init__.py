"""Training on Lightning; the only part of the package that imports it."""

from bcoskit.training._align import align
from bcoskit.training._run import train

__all__ = ["align", "train"]
