"""The B-cos convolutions: what they compute, and that they are torch's layers in every other respect."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from bcoskit.dynamic import explanation_mode
from bcoskit.nn import BcosConv1d, BcosConv2d, BcosConv3d
from reference import assert_exact, combination, combined_gradient, values

Layer = BcosConv1d | BcosConv2d | BcosConv3d
LAYERS: tuple[type[Layer], ...] = (BcosConv1d, BcosConv2d, BcosConv3d)
TORCH_LAYERS: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def layer_of(weight: Tensor, **arguments: Any) -> Layer:
    """A layer with the given filters."""
    outputs = weight.shape[0] // arguments.get("max_out", 1)
    inputs = weight.shape[1] * arguments.get("groups", 1)
    layer = LAYERS[weight.ndim - 3](inputs, outputs, tuple(weight.shape[2:]), dtype=weight.dtype, **arguments)
    layer.load_state_dict({"weight": weight}, strict=False)
    return layer


def image(dims: int, seed: int = 0) -> Tensor:
    """Two samples of four channels with some spatial axes."""
    return values(2, 4, *(5, 4, 3)[:dims], seed=seed)


def filters(dims: int, rows: int, channels: int = 4) -> Tensor:
    """Filters of different sizes along different axes."""
    return values(rows, channels, *(3, 2, 2)[:dims], seed=1)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("b", [1, 1.25, 1.5, 2, 2.5])
@pytest.mark.parametrize(
    "arguments",
    [
        {"max_out": 2},
        {"groups": 2, "stride": 2, "padding": 1},
        {"groups": 4, "max_out": 2, "padding": "same", "padding_mode": "circular"},
        {"dilation": 2, "padding": "same", "padding_mode": "reflect", "scale": 0.1},
        {"padding": 2, "padding_mode": "replicate", "normalize_weight": False},
        {"dilation": 2, "max_out": 3, "padding": "valid"},
    ],
)
def test_output_and_weights(dims: int, b: float, arguments: dict[str, Any]) -> None:
    x = image(dims)
    if arguments.get("padding") == "valid":
        x = values(1, 4, *(6, 4, 3)[:dims])
    rows = 4 * arguments.get("max_out", 1)
    weight = filters(dims, rows, 4 // arguments.get("groups", 1))
    layer = layer_of(weight, b=b, **arguments)
    expected = reference.conv(x, weight, b=b, **arguments)
    assert_exact(layer(x).detach(), expected.output)
    with explanation_mode():
        assert_exact(layer(x).detach(), expected.output)
        weights = combined_gradient(layer, x)
    coefficients = combination(expected.output)
    assert_exact(weights, coefficients @ expected.weights)
    assert_exact(weights @ x.flatten(), coefficients @ expected.output.flatten())
    if b != 1:
        with pytest.raises(AssertionError):
            assert_exact(combined_gradient(layer, x), coefficients @ expected.weights)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("padding", [0, 1, "same", "valid"])
def test_b_of_1_is_the_convolution(dims: int, padding_mode: Any, padding: int | str) -> None:
    x, weight, bias = image(dims), filters(dims, 6, 2), values(6, seed=2)
    moves: dict[str, Any] = {"padding": padding, "padding_mode": padding_mode, "groups": 2}
    plain = TORCH_LAYERS[dims - 1](4, 6, tuple(weight.shape[2:]), dtype=torch.float64, **moves)
    plain.load_state_dict({"weight": weight, "bias": bias})
    layer = layer_of(weight, b=1, bias=True, normalize_weight=False, **moves)
    layer.load_state_dict({"weight": weight, "bias": bias})
    assert_exact(layer(x), plain(x))
    plain.load_state_dict({"weight": reference.unit_rows(weight), "bias": torch.zeros(6)})
    unit = layer_of(weight, b=1, **moves)
    assert_exact(unit(x), plain(x))
    with pytest.raises(AssertionError):
        assert_exact(unit(x), layer(x))


def test_bias_is_added_at_the_end() -> None:
    x, weight, bias = image(2), filters(2, 8), values(4, seed=2)
    layer = layer_of(weight, bias=True, max_out=2, scale=0.3)
    layer.load_state_dict({"weight": weight, "bias": bias})
    expected = reference.conv(x, weight, max_out=2, scale=0.3).output + bias.reshape(4, 1, 1)
    assert_exact(layer(x).detach(), expected)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_unbatched_input(dims: int, padding_mode: str) -> None:
    layer = layer_of(filters(dims, 4, 2), groups=2, padding=1, padding_mode=padding_mode, b=1.5)
    x = image(dims)
    assert_exact(layer(x[0]), layer(x)[0])


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_empty_batch(dims: int, padding_mode: str) -> None:
    layer = layer_of(filters(dims, 8, 2), groups=2, padding=1, padding_mode=padding_mode, b=1.5, max_out=2)
    x = image(dims)[:0].requires_grad_()
    output = layer(x)
    assert output.shape == (0, *layer(image(dims)).shape[1:])
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_memory_format_changes_nothing() -> None:
    x, layer = image(2), layer_of(filters(2, 8, 2), groups=2, padding=1, max_out=2)
    moved = copy.deepcopy(layer).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    assert_exact(moved(x.to(memory_format=torch.channels_last)), layer(x))
    volume, layer = image(3), layer_of(filters(3, 8, 2), groups=2, padding=1, max_out=2)
    assert_exact(layer(volume.to(memory_format=torch.channels_last_3d)), layer(volume))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_half_precision(dtype: torch.dtype, dims: int, padding_mode: str) -> None:
    weight, x = filters(dims, 8, 2).to(dtype), image(dims).to(dtype)
    x[1] = 0
    moves: dict[str, Any] = {"groups": 2, "padding": 1, "padding_mode": padding_mode}
    for b in (1, 1.5, 2):
        output = layer_of(weight, b=b, max_out=2, **moves)(x)
        assert output.dtype == dtype
        assert torch.count_nonzero(output[1]) == 0
        expected = reference.conv(x.double(), weight.double(), b=b, max_out=2, **moves).output
        torch.testing.assert_close(output.detach().double(), expected, rtol=0.03, atol=0.03)


def test_autocast_keeps_the_norm_precise() -> None:
    """300² overflows float16, which would make every cosine 0; bfloat16 has no such limit but 3 digits."""
    layer = BcosConv2d(4, 4, 3, bias=True)
    x = 300 * image(2).float()
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype):
            output = layer(x)
        torch.testing.assert_close(output.float(), layer(x), rtol=0.03, atol=0.01 * layer(x).abs().max().item())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("b", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("max_out", [1, 2])
def test_gradcheck(dims: int, b: float, max_out: int) -> None:
    moves: dict[str, Any] = {"groups": 2, "stride": 2, "padding": 1}
    layer = layer_of(filters(dims, 2 * max_out, 2), b=b, max_out=max_out, **moves)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    x = image(dims)[:1].requires_grad_()
    assert torch.autograd.gradcheck(run, (x, layer.weight), fast_mode=dims == 3)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("b", [torch.tensor(1.7), torch.tensor([1.2, 1.7, 2.3, 2.9])])
def test_learnable_b(groups: int, b: Tensor) -> None:
    x, weight = image(2), filters(2, 8, 4 // groups)
    layer = layer_of(weight, b=b.double(), max_out=2, groups=groups)
    assert isinstance(layer.b, nn.Parameter)
    assert set(layer.state_dict()) == {"weight", "b"}
    exponents = b.double().expand(4).tolist()
    outputs = [reference.conv(x, weight, b=e, max_out=2, groups=groups).output for e in exponents]
    expected = torch.stack([output[:, o] for o, output in enumerate(outputs)], dim=1)
    assert_exact(layer(x).detach(), expected)
    layer(x).sum().backward()
    assert layer.b.grad is not None
    step, numeric = 1e-6, torch.zeros(layer.b.numel(), dtype=torch.float64)
    for index in range(layer.b.numel()):
        change = torch.zeros_like(numeric)
        change[index] = step
        change = change.reshape(layer.b.shape)
        up, down = (torch.func.functional_call(layer, {"b": layer.b + sign * change}, (x,)).sum() for sign in (1, -1))
        numeric[index] = (up - down).detach() / (2 * step)
    torch.testing.assert_close(layer.b.grad.reshape(-1), numeric, rtol=1e-7, atol=1e-8)
    assert torch.count_nonzero(numeric) == layer.b.numel()
    with explanation_mode():
        weights = combined_gradient(layer, x)
    assert_exact(weights @ x.flatten(), combination(expected) @ expected.flatten())


def test_a_zero_filter_learns_nothing() -> None:
    weight = filters(2, 6)
    weight[2:4] = 0
    layer = layer_of(weight, max_out=2)
    output = layer(image(2))
    assert torch.count_nonzero(output[:, 1]) == 0
    output.sum().backward()
    assert layer.weight.grad is not None
    assert torch.count_nonzero(layer.weight.grad[2:4]) == 0
    assert (layer.weight.grad[[0, 1, 4, 5]] != 0).any()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_it_is_a_torch_layer(dims: int) -> None:
    cls, plain = LAYERS[dims - 1], TORCH_LAYERS[dims - 1]
    layer = cls(4, 6, 3, max_out=2, groups=2)
    assert isinstance(layer, plain)
    assert (layer.in_channels, layer.out_channels, layer.kernel_size) == (4, 6, (3,) * dims)
    assert layer.weight.shape == (12, 2, *(3,) * dims)
    assert layer.bias is None
    assert set(layer.state_dict()) == set(plain(4, 6, 3, bias=False).state_dict())
    biased = cls(4, 6, 3, bias=True, max_out=2)
    assert set(biased.state_dict()) == set(plain(4, 6, 3).state_dict())
    assert biased.bias is not None
    assert biased.bias.shape == (6,)
    cls(4, 6, 3, bias=True).load_state_dict(plain(4, 6, 3).state_dict())
    meta = cls(4, 6, 3, bias=True, device="meta", dtype=torch.bfloat16)
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in meta.parameters())


def test_it_starts_as_the_torch_layer_does() -> None:
    torch.manual_seed(0)
    expected = nn.Conv2d(4, 6, 3, bias=False).weight
    torch.manual_seed(0)
    assert torch.equal(BcosConv2d(4, 6, 3).weight, expected)
    layer = BcosConv2d(4, 6, 3, bias=True, max_out=2, b=torch.tensor(1.5))
    layer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


def test_arguments_have_the_order_of_torch() -> None:
    layer = BcosConv2d(4, 6, 3, 2, 1, 2, 2, True, "reflect", "cpu", torch.float64)
    plain = nn.Conv2d(4, 6, 3, 2, 1, 2, 2, True, "reflect", "cpu", torch.float64)
    for name in ("stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(layer, name) == getattr(plain, name)
    assert layer.weight.dtype == torch.float64
    assert layer.bias is not None


@pytest.mark.parametrize("b", [1.5, torch.tensor(1.5)])
def test_copies(b: float | Tensor) -> None:
    layer = BcosConv2d(4, 6, 3, bias=True, b=b, max_out=2, normalize_weight=False, scale=0.3, padding="same")
    x = image(2).float()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert repr(twin) == repr(layer)
        twin.weight.data.zero_()
        assert torch.count_nonzero(layer.weight) > 0


def test_repr() -> None:
    text = repr(BcosConv2d(4, 6, 3, b=2.5, max_out=3, groups=2, padding=1, padding_mode="reflect"))
    assert text.startswith("BcosConv2d(4, 6, kernel_size=(3, 3)")
    assert all(part in text for part in ("b=2.5", "max_out=3", "groups=2", "bias=False", "padding_mode=reflect"))
    assert "scale" not in text
    text = repr(BcosConv1d(4, 6, 3, b=torch.tensor(2.0), normalize_weight=False, scale=0.5))
    assert all(part in text for part in ("b=learnable", "normalize_weight=False", "scale=0.5"))


# Errors


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b": 0.99}, r"`b` \(=0.99\)"),
        ({"b": float("nan")}, r"`b` \(=nan\)"),
        ({"b": torch.tensor(0.5)}, "`b`"),
        ({"b": torch.tensor([2.0, 2.0])}, "`b`"),
        ({"max_out": 0}, r"`max_out` \(=0\)"),
        ({"scale": 0.0}, r"`scale` \(=0.0\)"),
        ({"scale": float("inf")}, r"`scale` \(=inf\)"),
        ({"groups": 3}, r"`groups` \(=3\) must divide `in_channels` \(=4\)"),
        ({"groups": 4}, r"`groups` \(=4\) must divide .* `out_channels` \(=6\)"),
        ({"groups": 4, "max_out": 2}, r"`groups` \(=4\) must divide .* `out_channels` \(=6\)"),
        ({"groups": 0}, r"`groups` \(=0\)"),
        ({"padding_mode": "mirror"}, "padding_mode"),
        ({"padding": "full"}, "padding"),
        ({"padding": "same", "stride": 2}, "padding='same'"),
    ],
)
def test_construction_errors(cls: type[Layer], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(4, 6, 3, **arguments)


def test_input_errors() -> None:
    layer = BcosConv2d(4, 6, 3)
    with pytest.raises(RuntimeError, match="to have 4 channels, but got 3 channels"):
        layer(torch.zeros(2, 3, 5, 5))
    with pytest.raises((ValueError, RuntimeError), match=r"`x`|`input`|Expected 3D"):
        layer(torch.zeros(2, 4))
    with pytest.raises((ValueError, RuntimeError), match=r"`x`|`input`|Expected 3D"):
        layer(torch.zeros(1, 2, 4, 5, 5))
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        layer(torch.zeros(2, 4, 2, 2))
    with pytest.raises(RuntimeError, match="type"):
        layer(torch.zeros(2, 4, 5, 5, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="type"):
        layer(torch.zeros(2, 4, 5, 5, dtype=torch.long))


# The authors' layer, where it is right: zero padding, and with dilation a number, no MaxOut and no groups


@pytest.mark.parametrize("b", [1, 1.5, 2, 2.5])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"max_out": 2},
        {"stride": 2, "padding": 1},
        {"stride": (2, 1), "padding": (0, 1), "max_out": 3},
        {"groups": 2, "padding": 1},
        {"groups": 4, "max_out": 2},
        {"dilation": 2},
        {"dilation": 2, "padding": 1, "stride": 2},
    ],
)
def test_parity_with_the_authors(b: float, arguments: dict[str, Any]) -> None:
    modules = pytest.importorskip("bcos.modules")

    def build() -> Any:
        return modules.BcosConv2d(4, 4, 3, b=b, dtype=torch.float64, **arguments)

    if "dilation" in arguments:
        with pytest.warns(UserWarning, match="dilation > 1 is much slower"):
            official = build()
    else:
        official = build()
    weight = values(4 * arguments.get("max_out", 1), 4 // arguments.get("groups", 1), 3, 3, seed=1)
    official.linear.load_state_dict({"weight": weight})
    layer, x = layer_of(weight, b=b, **arguments), values(2, 4, 6, 5)
    torch.testing.assert_close(layer(x), official(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(combined_gradient(layer, x), combined_gradient(official, x), rtol=0, atol=1e-10)
    official.set_explanation_mode(True)
    with explanation_mode():
        weights = combined_gradient(layer, x)
    torch.testing.assert_close(weights, combined_gradient(official, x), rtol=0, atol=1e-10)


def test_parity_of_the_scaled_layer() -> None:
    modules = pytest.importorskip("bcos.modules")
    with pytest.warns(DeprecationWarning, match="BcosConv2dWithScale is deprecated"):
        official = modules.BcosConv2dWithScale(4, 4, 3, max_out=2, dtype=torch.float64)
    weight, x = values(8, 4, 3, 3, seed=1), values(2, 4, 6, 5)
    official.linear.load_state_dict({"weight": weight})
    layer = layer_of(weight, max_out=2, scale=(3 * 3 * 4) ** 0.5 / 100)
    torch.testing.assert_close(layer(x), official(x), rtol=0, atol=1e-10)


def test_meta_device() -> None:
    with torch.device("meta"):
        layer = BcosConv2d(3, 4, 3)
    assert layer.weight.is_meta
    assert layer(torch.empty(1, 3, 5, 5, device="meta")).shape == (1, 4, 3, 3)
