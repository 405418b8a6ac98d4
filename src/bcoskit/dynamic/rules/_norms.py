"""Normalisers: the statistic is frozen, the centring stays linear."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bcoskit.dynamic._formulas import normalize
from bcoskit.dynamic._mode import NotLinearError, freeze
from bcoskit.dynamic.rules._table import rule


@rule(F.layer_norm, torch.layer_norm)
def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return normalize(x, range(-len(normalized_shape), 0), center=True, weight=weight, bias=bias, eps=eps)


@rule("rms_norm")
def _rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    epsilon = torch.finfo(x.dtype).eps if eps is None else eps
    y = x * torch.rsqrt(freeze(x).square().mean(dims, keepdim=True) + epsilon)
    return y if weight is None else y * weight


@rule(F.group_norm, torch.group_norm)
def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    grouped = x.unflatten(1, (num_groups, -1))
    y = normalize(grouped, range(2, grouped.ndim), center=True, eps=eps).reshape(x.shape)
    return _affine(y, weight, bias)


@rule(F.instance_norm)
def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return _batch_norm(x, running_mean, running_var, weight, bias, eps=eps)
    return _affine(normalize(x, range(2, x.ndim), center=True, eps=eps), weight, bias)


@rule(F.batch_norm)
def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    # The explicit form: the gradient of torch's CPU kernel is wrong at batch size 1 for some memory layouts.
    if training or running_mean is None or running_var is None:
        raise NotLinearError(
            "batch norm with the statistics of the batch makes each output depend on all images; "
            "call `model.eval()` first (and keep running statistics)"
        )
    mean, var = _per_channel(running_mean, x), _per_channel(running_var, x)
    return _affine(normalize(x, (), center=True, mean=mean, var=var, eps=eps), weight, bias)


@rule(torch.batch_norm)
def _native_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    return _batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)


@rule(torch.instance_norm)
def _native_instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    return _instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 2))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = x if weight is None else x * _per_channel(weight, x)
    return y if bias is None else y + _per_channel(bias, x)


@rule("normalize")
def _unit_norm(x: Tensor, p: float = 2.0, dim: int | Sequence[int] = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    return x / torch.linalg.vector_norm(freeze(x), p, dim, keepdim=True).clamp_min(eps)


@rule("local_response_norm")
def _local_response_norm(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    squares = freeze(x).square().movedim(1, -1)
    windows = F.pad(squares, (size // 2, (size - 1) // 2)).unfold(-1, size, 1).sum(-1) / size
    return x / torch.pow(k + alpha * windows.movedim(-1, 1), beta)
