"""What processes that train together tell each other of a batch: sums and statistics, with gradients to all.

Imported by the first norm that needs it, since what keeps it out of compiled graphs takes seconds to import. Torch has
such gathers and sums with derivatives too, deprecated since 2.14, and their successors are not in older releases.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


# Processes that compile the exchange have been seen to wait for each other without end.
@cast("Any", torch.compiler.disable)
def statistics(var: Tensor, mean: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
    """Variance, mean and count of the values of all processes, with gradients to each, by one exchange."""
    own = torch.cat([var.flatten().double(), mean.flatten().double(), var.new_full((1,), count, dtype=torch.float64)])
    variances, means, counts = _Gathered.apply(own).split([var.numel(), mean.numel(), 1], 1)
    shares = counts / counts.sum()
    common = (means * shares).sum(0)
    whole = ((variances + (means - common).square()) * shares).sum(0)
    return whole.to(var.dtype).view_as(var), common.to(mean.dtype).view_as(mean), int(counts.sum())


def summed(x: Tensor) -> Tensor:
    """The sum of one value per channel over all processes: by a gather, which is five times as fast as gloo's sum."""
    return _Gathered.apply(x).sum(0)


class _Gathered(torch.autograd.Function):
    """The tensors of all processes, stacked."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, own)
        return torch.stack(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Summed.apply(*gradients)[dist.get_rank()]


class _Summed(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Summed.apply(*gradients)
