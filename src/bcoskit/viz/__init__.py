"""Pictures of explanations: numpy arrays and PIL images out of weights and contributions.

A logit of a B-cos network is `sum(W(x) * x)`. Its `weights` W(x) have the shape of the input,
`(..., 2C, H, W)`, where channel `j + C` encodes the complement of channel `j` (`[x, 1 - x]`); its
`contributions` are the products summed over the channels, `(..., H, W)`. Batch dimensions stand in front, and
every image is scaled on its own.

Explanations are turned into pictures on their device, in float32, or float64 where they are. Pictures are
float32 arrays on the CPU with the colours last and in [0, 1]; one that is given to a function may also be
uint8 or a PIL image of 8 bits, whose transparency counts as white where a picture without transparency is asked for.
"""

from bcoskit.viz._pictures import color_picture, contribution_map, on_white, overlay, to_pil
from bcoskit.viz._sheets import SheetRow, montage, sheet

__all__ = [
    "SheetRow",
    "color_picture",
    "contribution_map",
    "montage",
    "on_white",
    "overlay",
    "sheet",
    "to_pil",
]
