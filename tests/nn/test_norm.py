"""The twelve norms: six sets of elements that share a statistic, each centred and uncentred."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from bcoskit.dynamic import NotLinearError, explanation_mode
from bcoskit.functional import patch_norm
from bcoskit.nn import AllNorm, BatchNorm, GroupNorm, InstanceNorm, LayerNorm, Normalize, PositionNorm
from reference import assert_exact, gradient_rows, values

NORMS: dict[reference.NormKind, Callable[..., Any]] = {
    "all": AllNorm,
    "batch": BatchNorm,
    "group": GroupNorm,
    "instance": InstanceNorm,
    "layer": LayerNorm,
    "position": PositionNorm,
}
RUNNING = ("all", "batch")
kinds = pytest.mark.parametrize("kind", NORMS)
running_kinds = pytest.mark.parametrize("kind", RUNNING)
sample_kinds = pytest.mark.parametrize("kind", [kind for kind in NORMS if kind not in RUNNING])
both = pytest.mark.parametrize("centered", [False, True])


def norm_of(kind: reference.NormKind, **arguments: Any) -> Any:
    """A norm of four channels whose parameters are not those it starts with."""
    norm = NORMS[kind](4, **arguments).double()
    for seed, parameter in enumerate(norm.parameters()):
        parameter.data = 1 + values(*parameter.shape, seed=10 + seed) / 4
    return norm


def maps(dims: int = 2) -> Tensor:
    """Two samples of four channels, with a mean that is not 0."""
    return 0.7 + 2 * values(2, 4, *(3, 2, 2)[:dims])


def affine(norm: Any) -> dict[str, Any]:
    """The parameters of a norm as arguments of the reference."""
    return {
        name: None if value is None else value.detach()
        for name, value in (("weight", norm.weight), ("bias", norm.bias))
    }


# One batch


@kinds
@both
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("scale", "bias"), [(True, False), (True, True), (False, False), (False, True)])
def test_output(kind: reference.NormKind, centered: bool, dims: int, scale: bool, bias: bool) -> None:
    norm, x = norm_of(kind, centered=centered, scale=scale, bias=bias, eps=0.01), maps(dims)
    expected = reference.norm(x, kind, centered=centered, eps=0.01, **affine(norm))
    assert_exact(norm(x).detach(), expected.output)
    for other in (set(NORMS) - {kind}) if dims > 1 else ():
        with pytest.raises(AssertionError):
            assert_exact(norm(x).detach(), reference.norm(x, other, centered=centered, eps=0.01, **affine(norm)).output)


@kinds
@both
def test_weights(kind: reference.NormKind, centered: bool) -> None:
    if kind in RUNNING and centered:
        pytest.skip("refused: test_batch_statistics_of_a_centered_norm")
    norm, x = norm_of(kind, centered=centered, bias=True), maps()
    expected = reference.norm(x, kind, centered=centered, **affine(norm))
    with explanation_mode():
        assert_exact(norm(x).detach(), expected.output)
        weights = gradient_rows(norm, x)
    assert_exact(weights, expected.weights)
    assert_exact((weights @ x.flatten()).reshape(x.shape) + expected.constant, expected.output)
    with pytest.raises(AssertionError):
        assert_exact(gradient_rows(norm, x), expected.weights)


@kinds
def test_uncentered_norms_divide_by_the_deviation_about_the_mean(kind: reference.NormKind) -> None:
    """A large constant offset does not change what an uncentred norm divides by."""
    norm, x = NORMS[kind](4, eps=0.0).double(), maps()
    torch.testing.assert_close(norm(x + 1000) - norm(x), norm(x + 2000) - norm(x + 1000))
    assert norm(x + 1000).abs().min() > 100


def test_numbers_by_hand() -> None:
    x = torch.tensor([[[1.0, 3.0], [5.0, 9.0]]])  # means 2 and 7, deviations 1 and 2
    assert InstanceNorm(2, eps=0.0)(x).tolist() == [[[1.0, 3.0], [2.5, 4.5]]]
    assert InstanceNorm(2, eps=0.0, centered=True)(x).tolist() == [[[-1.0, 1.0], [-1.0, 1.0]]]
    assert BatchNorm(2, eps=0.0)(x).tolist() == [[[1.0, 3.0], [2.5, 4.5]]]
    assert PositionNorm(2, eps=0.0)(x).tolist() == [[[0.5, 1.0], [2.5, 3.0]]]
    assert GroupNorm(2, 1, eps=0.0, centered=True)(x).mean().item() == pytest.approx(0, abs=1e-7)
    torch.testing.assert_close(LayerNorm(2, eps=0.0)(x), x / 8.75**0.5)
    torch.testing.assert_close(AllNorm(2, eps=0.0)(x), x / 8.75**0.5)


@pytest.mark.parametrize("groups", [1, 2, 4])
@both
def test_number_of_groups(groups: int, centered: bool) -> None:
    norm, x = GroupNorm(4, groups, centered=centered).double(), maps()
    assert_exact(norm(x).detach(), reference.norm(x, "group", groups=groups, centered=centered).output)


@pytest.mark.parametrize("kind", ["all", "batch", "layer", "position"])
@both
def test_vectors_have_no_spatial_axes(kind: reference.NormKind, centered: bool) -> None:
    norm, x = norm_of(kind, centered=centered), values(3, 4)
    assert_exact(norm(x), norm(x[..., None])[..., 0])


@kinds
@both
def test_gradcheck(kind: reference.NormKind, centered: bool) -> None:
    norm = norm_of(kind, centered=centered, bias=True)
    names = [name for name, _ in norm.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in norm.named_buffers()}
        return torch.func.functional_call(norm, {**dict(zip(names, parameters, strict=True)), **buffers}, (x,))

    for training in (True, False):
        norm.train(training)
        assert torch.autograd.gradcheck(run, (maps().requires_grad_(), *norm.parameters()))


# Running statistics


@running_kinds
@both
@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_running_statistics(kind: reference.NormKind, centered: bool, momentum: float | None) -> None:
    norm = norm_of(kind, centered=centered, momentum=momentum)
    size = 1 if kind == "all" else 4
    mean, var = torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
    for step in range(1, 4):
        x = step * maps()
        norm(x)
        rate = 1 / step if momentum is None else momentum
        members = x.movedim(1, 0).reshape(size, -1)
        count = members.shape[1]
        # The authors' uncentred norms track the population variance and leave the mean alone.
        mean = (1 - rate) * mean + rate * members.mean(1) * centered
        var = (1 - rate) * var + rate * members.var(1, correction=0) * (count / (count - 1) if centered else 1)
        assert norm.num_batches_tracked.item() == step
    assert_exact(norm.running_mean, mean)
    assert_exact(norm.running_var, var)
    norm.eval()
    x, shape = maps(), (1, size, 1, 1)
    offset = mean.reshape(shape) if centered else 0
    expected = norm.weight.reshape(shape) * (x - offset) / (var.reshape(shape) + 1e-5).sqrt()
    assert_exact(norm(x), expected)
    assert norm.num_batches_tracked.item() == 3


@running_kinds
@both
def test_evaluation_is_affine(kind: reference.NormKind, centered: bool) -> None:
    norm = norm_of(kind, centered=centered)
    norm(maps())
    norm.eval()
    x, y = maps(), values(2, 4, 3, 2, seed=5)
    constant = norm(torch.zeros_like(x))
    assert_exact(norm(x + y) + constant, norm(x) + norm(y))
    assert torch.count_nonzero(constant) == (constant.numel() if centered else 0)
    with explanation_mode():
        assert_exact(norm(x), norm(x))
        weights = gradient_rows(norm, x)
    assert_exact((weights @ x.flatten()).reshape(x.shape) + constant.detach(), norm(x).detach())
    # Frozen statistics leave nothing to freeze, so here the ordinary gradient is W too.
    assert_exact(weights, gradient_rows(norm, x))


@running_kinds
@both
def test_without_tracking_the_batch_serves_always(kind: reference.NormKind, centered: bool) -> None:
    norm, x = norm_of(kind, centered=centered, track_running_stats=False), maps()
    expected = reference.norm(x, kind, centered=centered, **affine(norm)).output
    assert_exact(norm(x).detach(), expected)
    assert_exact(norm.eval()(x).detach(), expected)
    assert set(norm.state_dict()) == {"weight"}


@running_kinds
def test_batch_statistics_of_a_centered_norm(kind: reference.NormKind) -> None:
    norm = norm_of(kind, centered=True)
    before = copy.deepcopy(norm.state_dict())
    with explanation_mode(), pytest.raises(NotLinearError, match=r"model.eval\(\)"):
        norm(maps())
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    norm.eval()
    with explanation_mode():
        norm(maps())


@running_kinds
def test_explaining_uncentered_batch_statistics(kind: reference.NormKind) -> None:
    """As in the authors' layers, the running variance moves on in the mode as well."""
    norm, twin = norm_of(kind), norm_of(kind)
    with explanation_mode():
        norm(maps())
    twin(maps())
    assert_exact(norm.running_var, twin.running_var)
    assert norm.num_batches_tracked == twin.num_batches_tracked == 1


# State


@kinds
@pytest.mark.parametrize(("scale", "bias"), [(True, False), (True, True), (False, False)])
def test_state(kind: reference.NormKind, scale: bool, bias: bool) -> None:
    norm = NORMS[kind](4, scale=scale, bias=bias)
    size = 1 if kind == "all" else 4
    keys = {name for name, present in (("weight", scale), ("bias", bias)) if present}
    assert {name: tuple(value.shape) for name, value in norm.named_parameters()} == dict.fromkeys(keys, (size,))
    if kind in RUNNING:
        keys |= {"running_mean", "running_var", "num_batches_tracked"}
    assert set(norm.state_dict()) == keys
    if scale:
        assert norm.weight.eq(1).all()
    if bias:
        assert norm.bias.eq(0).all()
    if kind in RUNNING:
        assert norm.running_mean.tolist() == [0.0] * size
        assert norm.running_var.tolist() == [1.0] * size
        assert norm.num_batches_tracked.item() == 0
        assert norm.num_batches_tracked.dtype == torch.int64


@kinds
def test_copies_and_repr(kind: reference.NormKind) -> None:
    norm, x = norm_of(kind, bias=True, eps=0.125, centered=True), maps()
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(twin(x), norm(x))
        assert repr(twin) == repr(norm)
    assert all(part in repr(norm) for part in ("4", "centered=True", "scale=True", "bias=True", "eps=0.125"))
    if kind == "group":
        assert "num_groups=2" in repr(norm)
    if kind in RUNNING:
        assert "momentum=0.1" in repr(norm)


@kinds
@both
def test_memory_format_and_empty_batch(kind: reference.NormKind, centered: bool) -> None:
    norm, x = norm_of(kind, centered=centered).eval(), maps()
    assert_exact(norm(x.to(memory_format=torch.channels_last)), norm(x))
    assert norm(x[:0]).shape == x[:0].shape


@kinds
@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [0.01, 1.0, 300.0])
def test_half_precision(kind: reference.NormKind, centered: bool, dtype: torch.dtype, size: float) -> None:
    """Also where squares overflow half precision (300² > 65504) or fall below its smallest numbers."""
    x = (size * values(2, 4, 3, 2)).to(dtype)
    norm = NORMS[kind](4, centered=centered).to(dtype)
    output = norm(x)
    assert output.dtype == dtype
    expected = reference.norm(x.double(), kind, centered=centered).output
    torch.testing.assert_close(output.detach().double(), expected, rtol=0.03, atol=0.03)
    zero = torch.zeros_like(x)
    assert torch.count_nonzero(norm(zero)) == 0


# Errors


@kinds
def test_construction_errors(kind: reference.NormKind) -> None:
    with pytest.raises(ValueError, match=r"`eps` \(=-1.0\)"):
        NORMS[kind](4, eps=-1.0)
    with pytest.raises(ValueError, match=r"`eps` \(=nan\)"):
        NORMS[kind](4, eps=float("nan"))
    with pytest.raises(ValueError, match=r"`num_channels` \(=0\)"):
        NORMS[kind](0)


@running_kinds
def test_momentum_out_of_range(kind: reference.NormKind) -> None:
    for momentum in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"`momentum` \(={momentum}\)"):
            NORMS[kind](4, momentum=momentum)


@pytest.mark.parametrize("groups", [0, 3, -1])
def test_number_of_groups_out_of_range(groups: int) -> None:
    with pytest.raises(ValueError, match=rf"`num_groups` \(={groups}\) must divide `num_channels` \(=4\)"):
        GroupNorm(4, groups)


@kinds
def test_input_errors(kind: reference.NormKind) -> None:
    norm = NORMS[kind](4)
    with pytest.raises(ValueError, match=r"`x` has shape \(2, 3, 5, 5\)"):
        norm(torch.zeros(2, 3, 5, 5))
    with pytest.raises(ValueError, match=r"`x` has shape \(4,\)"):
        norm(torch.zeros(4))


@running_kinds
def test_one_value_per_statistic(kind: reference.NormKind) -> None:
    norm = NORMS[kind](1)
    with pytest.raises(ValueError, match="one value per statistic"):
        norm(torch.zeros(1, 1, 1, 1))
    assert norm.num_batches_tracked == 0
    norm.eval()
    norm(torch.zeros(1, 1, 1, 1))


def test_one_value_per_statistic_of_a_sample() -> None:
    x = torch.full((2, 3, 1, 1), 5.0)
    with pytest.raises(ValueError, match=r"`x` of shape .* has one value per statistic"):
        InstanceNorm(3)(x)
    assert not InstanceNorm(3, centered=True)(x).any()  # as torch's


# The authors' norms, and torch's


def official_norm(kind: reference.NormKind, centered: bool) -> Any:
    """The authors' norm of four channels."""
    norms = pytest.importorskip("bcos.modules.norms")
    names = {
        "all": ("AllNormUncentered2d", "AllNorm2d"),
        "batch": ("BatchNormUncentered2d", "BatchNorm2d"),
        "group": ("GroupNormUncentered2d", "DetachableGroupNorm2d"),
        "instance": ("GNInstanceNormUncentered2d", "DetachableGNInstanceNorm2d"),
        "layer": ("GNLayerNormUncentered2d", "DetachableGNLayerNorm2d"),
        "position": ("PositionNormUncentered2d", "DetachablePositionNorm2d"),
    }
    cls = getattr(norms, names[kind][centered])
    return (cls(2, 4) if kind == "group" else cls(4)).double()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@kinds
@both
def test_parity_with_the_authors(kind: reference.NormKind, centered: bool) -> None:
    official, norm = official_norm(kind, centered), norm_of(kind, centered=centered, bias=True)
    official.load_state_dict(norm.state_dict())
    for step in range(1, 3):
        x = step * maps()
        assert_near(norm(x), official(x))
    assert set(norm.state_dict()) == set(official.state_dict())
    for name, value in official.state_dict().items():
        assert_near(norm.state_dict()[name], value)
    x = maps()
    assert_near(gradient_rows(norm, x), gradient_rows(official, x))
    norm.eval()
    official.eval()
    assert_near(norm(x), official(x))
    assert_near(gradient_rows(norm, x), gradient_rows(official, x))


@kinds
@both
@pytest.mark.parametrize("training", [False, True])
def test_parity_of_explanations_with_the_authors(kind: reference.NormKind, centered: bool, training: bool) -> None:
    if kind in RUNNING and centered and training:
        pytest.skip("refused by both")
    official, norm = official_norm(kind, centered), norm_of(kind, centered=centered, bias=True)
    x = maps()
    norm(x)
    official.load_state_dict(norm.state_dict())
    norm.train(training)
    official.train(training)
    official.set_explanation_mode(True)
    with explanation_mode():
        assert_near(norm(x), official(x))
        weights = gradient_rows(norm, x)
    assert_near(weights, gradient_rows(official, x))
    for name, value in official.state_dict().items():
        assert_near(norm.state_dict()[name], value)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_centered_norms_are_those_of_torch(dims: int) -> None:
    x = maps(dims)
    batch: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](4).double()
    norm: Any = BatchNorm(4, centered=True, bias=True).double()
    assert_near(norm(x), batch(x))
    assert_near(norm.running_var, batch.running_var)
    assert_near(norm.eval()(x), batch.eval()(x))
    for cls, groups in ((GroupNorm, 2), (InstanceNorm, 4), (LayerNorm, 1)):
        assert_near(cls(4, centered=True).double()(x), nn.GroupNorm(groups, 4).double()(x))


def test_shapes_without_values() -> None:
    norm = BatchNorm(6).to("meta").train()
    assert norm(torch.rand(2, 6, 4, 4, device="meta")).shape == (2, 6, 4, 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_integers_are_refused(dtype):
    x = torch.full((2, 3, 4, 4), 20, dtype=dtype)
    norms = [kind(3).eval() for kind in (BatchNorm, AllNorm, PositionNorm)]
    for layer in (*norms, Normalize([0.5] * 3, [0.2] * 3), lambda x: patch_norm(x, 3)):
        with pytest.raises(TypeError, match="must be of floating dtype"):
            layer(x)
