"""Does an exported file compute what `explain` does?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bcoskit._explain import Explanation, explain
from bcoskit._layers import in_double_precision
from bcoskit.dynamic import ProductPolicy

_TOLERANCE = 1e-5  # of the largest entry
_ROUNDING = 4  # how many times as far from double precision as `explain` in single precision a file may be


def disagreement(
    path: Path,
    network: nn.Module,
    enter: Callable[[Tensor], Tensor],
    shape: tuple[int, int, int],
    products: ProductPolicy,
) -> float:
    """Run a file with noise, in batches of 1 and of 3 images, and compare it with `explain` in double precision.

    Args:
        path: The file.
        network: What it was made of, in single precision.
        enter: Makes the network's input of images.
        shape: Of one image.
        products: As of `explain`.

    Returns:
        The largest difference, relative to the largest entry of the output that it is in.

    Raises:
        ValueError: If the file cannot be run, or differs by more than 1e-5 and more than rounding explains.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # of its own kinds, which are no subclasses of one
        raise ValueError(f"the file cannot be opened by onnxruntime: {_first_line(error)}") from error
    precise = in_double_precision(network)
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for samples in (1, 3):
        images = torch.rand(samples, *shape, generator=generator)
        target = torch.tensor([-1, 0, -1][:samples])
        try:
            found = dict(zip(_outputs(session), session.run(None, _feed(images, target)), strict=True))
        except Exception as error:
            raise ValueError(f"the file cannot be run with {samples} images: {_first_line(error)}") from error
        found = {name: torch.from_numpy(values) for name, values in found.items()}
        # Between two largest logits rounding decides: the prediction that is compared is that of the file.
        classes = torch.where(target < 0, found["logits"].argmax(1), target)
        x = enter(images)
        expected = explain(precise, x.double(), classes, products=products)
        rounded = explain(network, x, classes, products=products)
        for name, values in found.items():
            error = _relative(values, expected, name)
            bound = max(_TOLERANCE, _ROUNDING * _relative(getattr(rounded, name), expected, name))
            if not error <= bound:
                raise ValueError(
                    f"the file disagrees with `explain` about the {name} of a batch of {samples}, by {error:.0e} of "
                    f"the largest entry (at most {bound:.0e} is rounding): does the network depend on the batch size?"
                )
            largest = max(largest, error)
    return largest


def _outputs(session: Any) -> list[str]:
    return [output.name for output in session.get_outputs()]


def _feed(images: Tensor, target: Tensor) -> dict[str, Any]:
    return {"image": images.numpy(), "target": target.numpy()}


def _relative(values: Tensor, expected: Explanation, name: str) -> float:
    wanted: Tensor = getattr(expected, name)
    scale = wanted.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((values.double() - wanted).abs().max() / scale)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
