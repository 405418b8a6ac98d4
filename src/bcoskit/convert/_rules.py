"""The ordered table of rules: from kinds of ordinary layers to what takes their place."""

import re
from abc import ABC
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers.activations import GELU
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.linear import Linear
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

from bcoskit.convert._config import BcosConfig
from bcoskit.convert._layers import ExplicitMultiheadAttention, StandardizedConv2d
from bcoskit.convert._modules import HOOKS
from bcoskit.nn import (
    BatchNorm,
    BcosConv1d,
    BcosConv2d,
    BcosConv3d,
    BcosConvTranspose1d,
    BcosConvTranspose2d,
    BcosConvTranspose3d,
    BcosLinear,
)

Make = Callable[[Any, BcosConfig, str], nn.Module | str]


@dataclass(frozen=True)
class Rule:
    """What takes the place of some kinds of modules.

    Attributes:
        kinds: The classes, with their subclasses.
        make: From the module, the configuration and the module's path to the new module, or to the module itself,
            changed, whose children are converted then; or to the reason why it is left as it is.
    """

    kinds: tuple[type[nn.Module], ...]
    make: Make

    def __post_init__(self) -> None:
        kinds: Any = self.kinds
        if not isinstance(kinds, tuple) or not all(isinstance(kind, type) for kind in kinds):
            raise TypeError(f"`kinds` (={kinds!r}) must be a tuple of classes")


def rule_for(module: nn.Module, rules: tuple[Rule, ...]) -> Rule | None:
    """The first rule of a module, None if there is none."""
    return next((rule for rule in rules if isinstance(module, rule.kinds)), None)


# Layers that go by these names, or whose container does, make queries, keys and values.
_PROJECTIONS = re.compile(
    r"(^|[._])(to_|[wW])?(qkvs?|kv|qk|q|k|v|query|key|value|in_proj|c_attn|q_attn)(_proj|_proj_weight|_lin)?(\.|$)"
)
_CONVOLUTIONS: dict[type[nn.Module], type[Any]] = {
    nn.Conv1d: BcosConv1d,
    nn.Conv2d: BcosConv2d,
    nn.Conv3d: BcosConv3d,
}
_TRANSPOSED: dict[type[nn.Module], type[Any]] = {
    nn.ConvTranspose1d: BcosConvTranspose1d,
    nn.ConvTranspose2d: BcosConvTranspose2d,
    nn.ConvTranspose3d: BcosConvTranspose3d,
}
_STANDARDIZED = (
    StdConv2d,
    StdConv2dSame,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_OWN_FORWARD = "has a forward pass of its own that no rule knows"
_OWN_TOKENS = "has tokens of its own (`add_bias_kv` or `add_zero_attn`)"
UNKNOWN = (_OWN_FORWARD, _OWN_TOKENS)
"""The reasons that tell of a module which no rule knows."""


def _exponent(config: BcosConfig, weight: Tensor) -> float | Tensor:
    if not config.learnable_b:
        return config.b
    return nn.Parameter(torch.tensor(config.b, dtype=weight.dtype, device=weight.device))


def _repeated(parameter: nn.Parameter, config: BcosConfig) -> nn.Parameter:
    """One row for each unit of a MaxOut; with a single one the parameter itself."""
    if config.max_out == 1:
        return parameter
    return nn.Parameter(parameter.detach().repeat_interleave(config.max_out, 0), parameter.requires_grad)


def _taken_over(new: Any, old: Any, config: BcosConfig) -> Any:
    """The new layer with the parameters of the old one."""
    new.weight = _repeated(old.weight, config)
    new.bias = old.bias if config.biases == "keep" else None
    return new


def _plain(module: nn.Module, *owners: type[Any]) -> bool:
    """Whether a module computes what one of the classes does: no subclass, or object, has a way of its own."""
    return not {"forward", "_conv_forward"} & set(vars(module)) and any(
        type(module).forward is owner.forward and _inner(type(module)) is _inner(owner) for owner in owners
    )


def _inner(kind: type[Any]) -> Any:
    return getattr(kind, "_conv_forward", None)  # what the forward pass of convolutions calls


def _convolution(old: Any, config: BcosConfig, kind: type[Any], padding: tuple[int, ...] | str | None = None) -> Any:
    return kind(
        old.in_channels,
        old.out_channels,
        old.kernel_size,
        old.stride,
        old.padding if padding is None else padding,
        old.dilation,
        old.groups,
        False,
        old.padding_mode,
        device="meta",
        b=_exponent(config, old.weight),
        max_out=config.max_out,
        normalize_weight=config.normalize_weight,
    )


def _stays_projection(path: str, config: BcosConfig) -> bool:
    return config.projections == "linear" and _PROJECTIONS.search(path) is not None


def _as_projection(old: Any, config: BcosConfig) -> str:
    if config.biases == "drop" and old.bias is not None:
        old.bias = None
    return "makes queries, keys or values"


def _of_conv(old: Any, config: BcosConfig, path: str) -> nn.Module | str:
    base = next(base for base in _CONVOLUTIONS if base in type(old).__mro__)
    if not _plain(old, base):
        return _OWN_FORWARD
    if _stays_projection(path, config):
        return _as_projection(old, config)
    return _taken_over(_convolution(old, config, _CONVOLUTIONS[base]), old, config)


def _of_timm_conv(old: Any, config: BcosConfig, path: str) -> nn.Module | str:
    if not _plain(old, Conv2dSame, *_STANDARDIZED):
        return _OWN_FORWARD
    if _stays_projection(path, config):
        return _as_projection(old, config)
    same = Conv2dSame in type(old).__mro__
    new = _taken_over(_convolution(old, config, StandardizedConv2d), old, config)
    new.same_pad = same or bool(getattr(old, "same_pad", False))
    new.standardize = not same
    new.eps = getattr(old, "eps", 0.0)
    gain: nn.Parameter | None = getattr(old, "gain", None)
    if gain is not None:
        new.gain, new.gain_scale = _repeated(gain, config), old.scale
    return new


def _of_transposed(old: Any, config: BcosConfig, _path: str) -> nn.Module | str:
    base = next(base for base in _TRANSPOSED if base in type(old).__mro__)
    if not _plain(old, base):
        return _OWN_FORWARD
    kind: Any = _TRANSPOSED[base]
    new = kind(
        old.in_channels,
        old.out_channels,
        old.kernel_size,
        old.stride,
        old.padding,
        old.output_padding,
        old.groups,
        False,
        old.dilation,
        device="meta",
        b=_exponent(config, old.weight),
        normalize_weight=config.normalize_weight,
    )
    new.weight = old.weight
    new.bias = old.bias if config.biases == "keep" else None
    return new


def _of_linear(old: Any, config: BcosConfig, path: str) -> nn.Module | str:
    if not _plain(old, nn.Linear, Linear):
        return _OWN_FORWARD
    if _stays_projection(path, config):
        return _as_projection(old, config)
    new = BcosLinear(
        old.in_features,
        old.out_features,
        device="meta",
        b=_exponent(config, old.weight),
        max_out=config.max_out,
        normalize_weight=config.normalize_weight,
    )
    return _taken_over(new, old, config)


class _TransposedLinear(ABC):  # noqa: B024 - its subclasses are told by name
    """The linear layers of GPT, whose weight is (inputs, outputs), known by name: transformers need not be there."""

    @classmethod
    def __subclasshook__(cls, kind: type) -> bool:
        return any(
            (base.__module__, base.__name__) == ("transformers.pytorch_utils", "Conv1D") for base in kind.__mro__
        )


def _of_transposed_linear(old: Any, config: BcosConfig, path: str) -> nn.Module | str:
    if "forward" in vars(old):
        return _OWN_FORWARD
    ordinary = nn.Linear(*old.weight.shape, device="meta")
    ordinary.weight = nn.Parameter(old.weight.detach().T.contiguous(), old.weight.requires_grad)
    ordinary.bias = old.bias
    made = _of_linear(ordinary, config, path)
    return ordinary if isinstance(made, str) else made


def _of_attention(old: Any, config: BcosConfig, _path: str) -> nn.Module | str:
    if not _plain(old, nn.MultiheadAttention):
        return _OWN_FORWARD
    if old.bias_k is not None or old.bias_v is not None or old.add_zero_attn:
        return _OWN_TOKENS
    new: Any = ExplicitMultiheadAttention.__new__(ExplicitMultiheadAttention)
    # Hooks stay in the tables of which the handles know that remove them.
    own = {name: value for name, value in vars(old).items() if isinstance(value, dict) and name not in HOOKS}
    new.__dict__ = vars(old) | {name: value.copy() for name, value in own.items()}
    projection = BcosLinear(
        old.embed_dim,
        old.embed_dim,
        device="meta",
        b=_exponent(config, old.out_proj.weight),
        max_out=config.max_out,
        normalize_weight=config.normalize_weight,
    )
    new.out_proj = _taken_over(projection, old.out_proj, config)
    if config.biases == "drop":
        new.in_proj_bias = None
    return new


def _of_encoder_layer(old: Any, _config: BcosConfig, _path: str) -> nn.Module | str:
    old.activation_relu_or_gelu = 0  # torch's fast path, which calls no layer, is for these activations alone
    return old


def _of_encoder(old: Any, _config: BcosConfig, _path: str) -> nn.Module | str:
    old.enable_nested_tensor = old.use_nested_tensor = False
    return old


def _batch_norm(old: Any, config: BcosConfig) -> nn.Module:
    new = BatchNorm(
        old.num_features,
        scale=old.weight is not None,
        bias=config.biases == "keep",
        eps=old.eps,
        momentum=old.momentum,
    )
    # The statistics are copies, since uncentred ones are other figures; the weights go on being the same parameters.
    new.weight = old.weight
    assert new.running_mean is not None
    new.running_mean.zero_()
    new.running_var = old.running_var.clone()
    if config.biases == "keep":
        factor = torch.rsqrt(old.running_var + old.eps)
        factor = factor if old.weight is None else factor * old.weight.detach()
        shift = -old.running_mean * factor
        learns = old.bias is None or old.bias.requires_grad
        new.bias = nn.Parameter(shift if old.bias is None else shift + old.bias.detach(), learns)
    if new.num_batches_tracked is not None and old.num_batches_tracked is not None:
        new.num_batches_tracked.copy_(old.num_batches_tracked)
    new.synchronized = isinstance(old, nn.SyncBatchNorm)
    return new.to(old.running_var.device, old.running_var.dtype)


def _of_batch_norm(old: Any, config: BcosConfig, _path: str) -> nn.Module | str:
    known = _plain(old, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    if not known or config.norms == "keep" or old.running_var is None:
        return _without_bias(old, config, "")
    return _batch_norm(old, config)


def _of_norm_with_activation(old: Any, config: BcosConfig, path: str) -> nn.Module | str:
    if config.norms == "keep" or old.running_var is None or not _plain(old, BatchNormAct2d):
        if config.activations == "drop":
            old.act = nn.Identity().train(old.training)
        return _without_bias(old, config, path)
    act = old.act if config.activations == "keep" else nn.Identity()
    parts = OrderedDict(norm=_batch_norm(old, config), drop=old.drop, act=act)
    return nn.Sequential(parts)


def _without_bias(old: Any, config: BcosConfig, _path: str) -> nn.Module | str:
    if config.biases == "drop" and getattr(old, "bias", None) is not None:
        old.bias = None
        return old
    return "a norm as it is"


def _of_embedding(_old: Any, _config: BcosConfig, _path: str) -> nn.Module | str:
    return "a table of embeddings, from which explanations start"


def _of_max_pool(old: Any, config: BcosConfig, _path: str) -> nn.Module | str:
    if config.max_pool == "keep":
        return "a max pool"
    averages = {nn.MaxPool1d: nn.AvgPool1d, nn.MaxPool2d: nn.AvgPool2d, nn.MaxPool3d: nn.AvgPool3d}
    average = averages.get(type(old))
    if average is None or old.dilation not in (1, (1,), (1, 1), (1, 1, 1)) or old.return_indices:
        return "a max pool for which there is no average"
    return average(old.kernel_size, old.stride, old.padding, ceil_mode=old.ceil_mode)


_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish, nn.ELU, nn.CELU, GELU)


class _OtherActivation(ABC):  # noqa: B024 - its subclasses are told by name
    """The activations of transformers, known by where they are written."""

    @classmethod
    def __subclasshook__(cls, kind: type) -> bool:
        return kind.__module__ == "transformers.activations"


def _of_activation(old: Any, config: BcosConfig, _path: str) -> nn.Module | str:
    if config.activations == "keep":
        return "an activation"
    if issubclass(type(old), _OtherActivation) and not list(old.parameters()):
        return nn.Identity()
    return nn.Identity() if _plain(old, *_ACTIVATIONS) else _OWN_FORWARD


_GATES = (
    *(nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softmax, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink),
    *(nn.Hardtanh, nn.SELU, nn.RReLU, nn.Threshold, nn.Hardshrink, nn.Softshrink, nn.GLU),
)


def _of_gate(_old: Any, _config: BcosConfig, _path: str) -> nn.Module | str:
    return "an activation, which no preset drops"


RULES: tuple[Rule, ...] = (
    Rule((nn.TransformerEncoderLayer,), _of_encoder_layer),
    Rule((nn.TransformerEncoder,), _of_encoder),
    Rule((nn.MultiheadAttention,), _of_attention),
    Rule((Conv2dSame, *_STANDARDIZED), _of_timm_conv),
    Rule(tuple(_TRANSPOSED), _of_transposed),
    Rule(tuple(_CONVOLUTIONS), _of_conv),
    Rule((nn.Linear,), _of_linear),
    Rule((cast("type[nn.Module]", _TransposedLinear),), _of_transposed_linear),
    Rule((BatchNormAct2d,), _of_norm_with_activation),
    Rule((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _of_batch_norm),
    Rule((nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, *_INSTANCE_NORMS), _without_bias),
    Rule((nn.Embedding,), _of_embedding),
    Rule((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _of_max_pool),
    Rule((*_ACTIVATIONS, cast("type[nn.Module]", _OtherActivation)), _of_activation),
    Rule(_GATES, _of_gate),
)
"""The rules, of which the first that knows a module counts."""
