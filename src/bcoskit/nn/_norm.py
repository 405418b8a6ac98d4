"""The twelve normalisations: six sets of axes that share a statistic, each uncentred or centred.

All compute `weight · (x - m) / sqrt(v + eps) + bias` on maps (N, C, *spatial) by `bcoskit.functional.normalize`,
with `m = 0` unless `centered`; `v` is always the population variance. Without a bias, and uncentred where the
statistic is a running one, a network stays free of constants, so that contributions alone sum to the logit
(Böhle et al., TPAMI 2024, section on normalisation).
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bcoskit import _passes
from bcoskit.dynamic import NotLinearError, freeze, is_frozen
from bcoskit.dynamic._formulas import in_single_precision
from bcoskit.functional import normalize


class _Norm(nn.Module):
    """The parameters of a norm; `features` is how many factors and biases it has."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, num_channels: int, features: int, *, centered: bool, scale: bool, bias: bool, eps: float
    ) -> None:
        super().__init__()
        if num_channels < 1:
            raise ValueError(f"`num_channels` (={num_channels}) must be at least 1")
        if not eps >= 0:
            raise ValueError(f"`eps` (={eps}) must be at least 0")
        self.num_channels = num_channels
        self.centered = centered
        self.eps = eps
        self.register_parameter("weight", nn.Parameter(torch.ones(features)) if scale else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(features)) if bias else None)

    def reset_parameters(self) -> None:
        """Weights of 1, biases of 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _check(self, x: Tensor) -> None:
        if x.ndim < 2 or x.shape[1] != self.num_channels:
            raise ValueError(f"`x` has shape {tuple(x.shape)}, must be (N, {self.num_channels}, *spatial)")

    def extra_repr(self) -> str:
        """The arguments that differ between norms of one class."""
        scale, bias = self.weight is not None, self.bias is not None
        return f"{self.num_channels}, centered={self.centered}, scale={scale}, bias={bias}, eps={self.eps:g}"


def _shaped(values: Tensor | None, *shape: int) -> Tensor | None:
    return None if values is None else values.reshape(shape)


class _SampleNorm(_Norm):
    """A norm with one statistic per sample and group of channels."""

    num_groups: int

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to the same shape."""
        self._check(x)
        grouped = x.unflatten(1, (self.num_groups, -1))
        shape = (*grouped.shape[1:3], *[1] * (grouped.ndim - 3))
        return normalize(
            grouped,
            range(2, grouped.ndim),
            center=self.centered,
            weight=_shaped(self.weight, *shape),
            bias=_shaped(self.bias, *shape),
            eps=self.eps,
        ).flatten(1, 2)


class GroupNorm(_SampleNorm):
    """One statistic per sample and group of consecutive channels; keys `weight`, `bias` (num_channels,).

    Args:
        num_channels: Channels of the input.
        num_groups: Groups of channels; must divide `num_channels`.
        centered: Whether the mean is subtracted.
        scale: Whether there is a learnable `weight`.
        bias: Whether there is a learnable `bias`.
        eps: Added to the variance.

    Raises:
        ValueError: If `num_groups` does not divide `num_channels`, or an argument is out of its range.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int = 2,
        *,
        centered: bool = False,
        scale: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(num_channels, num_channels, centered=centered, scale=scale, bias=bias, eps=eps)
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"`num_groups` (={num_groups}) must divide `num_channels` (={num_channels})")
        self.num_groups = num_groups

    def extra_repr(self) -> str:
        """The arguments that differ between norms of one class."""
        return f"{super().extra_repr()}, num_groups={self.num_groups}"


class InstanceNorm(_SampleNorm):
    """One statistic per sample and channel; arguments and keys as of `GroupNorm`."""

    def __init__(
        self,
        num_channels: int,
        *,
        centered: bool = False,
        scale: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(num_channels, num_channels, centered=centered, scale=scale, bias=bias, eps=eps)
        self.num_groups = num_channels


class LayerNorm(_SampleNorm):
    """One statistic per sample, over channels and positions; arguments and keys as of `GroupNorm`.

    Transformers normalise over the last axis instead: that is `torch.nn.LayerNorm`, which needs no replacement.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        centered: bool = False,
        scale: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(num_channels, num_channels, centered=centered, scale=scale, bias=bias, eps=eps)
        self.num_groups = 1


class PositionNorm(_Norm):
    """One statistic per sample and position, over the channels; arguments and keys as of `GroupNorm`."""

    def __init__(
        self,
        num_channels: int,
        *,
        centered: bool = False,
        scale: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(num_channels, num_channels, centered=centered, scale=scale, bias=bias, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to the same shape."""
        self._check(x)
        shape = (-1, *[1] * (x.ndim - 2))
        weight, bias = _shaped(self.weight, *shape), _shaped(self.bias, *shape)
        return normalize(x, (1,), center=self.centered, weight=weight, bias=bias, eps=self.eps)


class RunningNorm(_Norm):
    """A norm with a statistic over the batch, and a running one for evaluation.

    Attributes:
        synchronized: Whether the statistics of a batch are those of all processes together, as those of
            `torch.nn.SyncBatchNorm` are; off at first.
    """

    synchronized: bool

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_channels: int,
        features: int,
        *,
        centered: bool,
        scale: bool,
        bias: bool,
        eps: float,
        momentum: float | None,
        track_running_stats: bool,
    ) -> None:
        super().__init__(num_channels, features, centered=centered, scale=scale, bias=bias, eps=eps)
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"`momentum` (={momentum}) must be in [0, 1], or None for a plain average")
        self.momentum = momentum
        self.synchronized = False
        self.register_buffer("running_mean", torch.zeros(features) if track_running_stats else None)
        self.register_buffer("running_var", torch.ones(features) if track_running_stats else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0) if track_running_stats else None)

    def reset_running_stats(self) -> None:
        """Running means of 0, running variances of 1, and no batch seen."""
        for statistic, value in ((self.running_mean, 0), (self.running_var, 1), (self.num_batches_tracked, 0)):
            if statistic is not None:
                statistic.fill_(value)

    def reset_parameters(self) -> None:
        """As when it was made, running statistics included."""
        super().reset_parameters()
        self.reset_running_stats()

    def _forward(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        self._check(x)
        shape = (-1, *[1] * (x.ndim - 2))
        if self.training or self.running_var is None or self.running_mean is None:
            in_one_pass = self._in_one_pass(x, dims)
            mean, var, count = self._batch_statistics(x, dims, in_one_pass)
            if in_one_pass:
                y = _passes.uncentered(x, self.weight, mean, var, self.eps, count, self._summed())
                return y if self.bias is None else y + self.bias.reshape(shape)
        elif not torch.is_grad_enabled() and self._fits_kernel(x, dims) and _passes.way(x) is not None:
            mean = self.running_mean if self.centered else torch.zeros_like(self.running_mean)
            return F.batch_norm(x, mean, self.running_var, self.weight, self.bias, eps=self.eps)
        else:
            mean, var = self.running_mean.reshape(shape), self.running_var.reshape(shape)
        return normalize(
            x,
            dims,
            center=self.centered,
            weight=_shaped(self.weight, *shape),
            bias=_shaped(self.bias, *shape),
            eps=self.eps,
            mean=mean,
            var=var,
        )

    def extra_repr(self) -> str:
        """The arguments that differ between norms of one class."""
        return f"{super().extra_repr()}, momentum={self.momentum}"

    def _in_one_pass(self, x: Tensor, dims: tuple[int, ...]) -> bool:
        """Whether one kernel has the statistics, and one backward pass their gradient."""
        return not self.centered and self._fits_kernel(x, dims) and _passes.way(x) == "derivatives"

    def _is_shared(self) -> bool:
        return self.synchronized and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def _summed(self) -> _passes.Summed | None:
        """The sum over all processes, if their statistics are one."""
        if not self._is_shared():
            return None
        from bcoskit.nn import _exchange

        return _exchange.summed

    def _fits_kernel(self, x: Tensor, dims: tuple[int, ...]) -> bool:
        """Whether torch's batch norm has these statistics, in the precision of `x`."""
        parameters = (self.weight, self.bias, self.running_mean, self.running_var)
        same = all(values is None or values.dtype == x.dtype for values in parameters)
        return same and len(dims) == x.ndim - 1 and not x.is_meta

    def _batch_statistics(self, x: Tensor, dims: tuple[int, ...], in_one_pass: bool) -> tuple[Tensor, Tensor, int]:
        count = math.prod([x.shape[dim] for dim in dims])
        if count < 2 and not self._is_shared():
            raise ValueError(f"`x` of shape {tuple(x.shape)} has one value per statistic, training needs more")
        if self.centered and is_frozen():
            raise NotLinearError(
                "a centred norm with the statistics of the batch makes each output depend on all images; "
                "call `model.eval()` first"
            )
        if in_one_pass:
            mean, var = _passes.batch_statistics(x)
        else:
            var, mean = torch.var_mean(freeze(in_single_precision(x)), dims, correction=0, keepdim=True)
        if self._is_shared():
            from bcoskit.nn import _exchange

            var, mean, count = _exchange.statistics(var, mean, count)
        if self.training and self.running_var is not None:
            self._track(mean.detach(), var.detach(), count)
        return mean, var, count

    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Update the running statistics: of an uncentred norm the population variance alone, as the authors do."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        if self.centered:
            var = var * (count / (count - 1))
            self.running_mean.lerp_(mean.flatten().to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(var.flatten().to(self.running_var.dtype), momentum)


class BatchNorm(RunningNorm):
    """One statistic per channel, over samples and positions; in evaluation a running one.

    Keys: `weight`, `bias`, `running_mean`, `running_var` (num_channels,) and `num_batches_tracked`. Centred, it is
    `torch.nn.BatchNorm2d`; uncentred, `running_mean` stays 0 and is not used.

    Args:
        num_channels: Channels of the input.
        centered: Whether the mean is subtracted.
        scale: Whether there is a learnable `weight`.
        bias: Whether there is a learnable `bias`.
        eps: Added to the variance.
        momentum: Weight of a new batch in the running statistics, or None for their plain average.
        track_running_stats: Whether there are running statistics; if not, those of the batch serve always.

    Raises:
        ValueError: If an argument is out of its range.
        NotLinearError: In the forward pass, if it is centred and its batch statistics would be explained.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        centered: bool = False,
        scale: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(
            num_channels,
            num_channels,
            centered=centered,
            scale=scale,
            bias=bias,
            eps=eps,
            momentum=momentum,
            track_running_stats=track_running_stats,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to the same shape."""
        return self._forward(x, (0, *range(2, x.ndim)))


class AllNorm(RunningNorm):
    """One statistic for everything, samples, channels and positions; in evaluation a running one.

    Arguments as of `BatchNorm`; every key has shape (1,).
    """

    def __init__(
        self,
        num_channels: int,
        *,
        centered: bool = False,
        scale: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(
            num_channels,
            1,
            centered=centered,
            scale=scale,
            bias=bias,
            eps=eps,
            momentum=momentum,
            track_running_stats=track_running_stats,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to the same shape."""
        return self._forward(x, tuple(range(x.ndim)))
