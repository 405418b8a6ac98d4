"""Random numbers that a seed determines, without a trace in torch's own sources."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CPU = torch.device("cpu")


@contextmanager
def random_from(seed: int, device: torch.device = _CPU) -> Iterator[None]:
    """What is drawn inside without a generator, on the CPU and on `device`, is determined by `seed`.

    Afterwards the sources are as they were. `torch.manual_seed` would seed those of all devices, which stay so.
    """
    is_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if is_gpu else []):
        torch.default_generator.manual_seed(seed)
        if is_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
