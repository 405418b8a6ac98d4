"""Self-attention: an attention matrix that is frozen, and a B-cos projection after it."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from bcoskit.dynamic import explanation_mode
from bcoskit.nn import Attention, BcosLinear
from reference import Summary, assert_exact, gradient_rows, values


def attention_of(dim: int = 6, heads: int = 2, **arguments: Any) -> Attention:
    """An attention layer in float64, its parameters of unit size."""
    layer = Attention(dim, heads, **arguments).double()
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = values(*parameter.shape, seed=10 + seed)
    return layer


def expected_of(layer: Attention, x: Tensor, b: float, max_out: int, mask: Tensor | None = None) -> Summary:
    """The layer by the formulas: its values are linear in x, what follows is linear in the values."""
    dim, heads = x.shape[-1], layer.num_heads
    rows = layer.qkv.weight.detach().reshape(3, heads, dim // heads, dim)
    query, key, value = torch.einsum("ntc,qhdc->qnhtd", x, rows)
    attended = reference.attention(query, key, value, mask=mask)
    concatenated = attended.output.transpose(1, 2).flatten(2)
    projected = reference.linear(concatenated, layer.proj.weight.detach(), b=b, max_out=max_out)
    # Each of the three steps as a matrix: tokens to values, values to heads, concatenated heads to tokens.
    element = torch.arange(value.numel()).reshape(value.shape)
    to_values = value.new_zeros(value.numel(), x.numel())
    inputs = torch.arange(x.numel()).reshape(x.shape)
    for n, h, t in torch.cartesian_prod(*[torch.arange(size) for size in value.shape[:3]]).tolist():
        to_values[element[n, h, t].unsqueeze(1), inputs[n, t]] = rows[2, h]
    order = torch.arange(attended.output.numel()).reshape(attended.output.shape).transpose(1, 2).flatten()
    weights = projected.weights @ attended.weights[order] @ to_values
    return Summary(projected.output, weights, torch.zeros_like(projected.output))


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("b", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("max_out", [1, 2])
def test_output_and_weights(heads: int, b: float, max_out: int) -> None:
    layer, x = attention_of(6, heads, b=b, max_out=max_out), values(2, 4, 6)
    expected = expected_of(layer, x, b, max_out)
    assert_exact(layer(x).detach(), expected.output)
    with explanation_mode():
        assert_exact(layer(x).detach(), expected.output)
        weights = gradient_rows(layer, x)
    assert_exact(weights, expected.weights)
    assert_exact((weights @ x.flatten()).reshape(x.shape), expected.output)
    with pytest.raises(AssertionError):
        assert_exact(gradient_rows(layer, x), expected.weights)


@pytest.mark.parametrize("boolean", [False, True])
def test_mask(boolean: bool) -> None:
    layer, x = attention_of(), values(2, 4, 6)
    allowed = torch.ones(4, 4, dtype=torch.bool).tril()
    added = torch.zeros(4, 4, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
    mask = allowed if boolean else added
    expected = expected_of(layer, x, 2.0, 1, added)
    assert_exact(layer(x, mask).detach(), expected.output)
    with explanation_mode():
        weights = gradient_rows(lambda x: layer(x, mask), x)
    assert_exact(weights, expected.weights)
    # A token sees nothing of later ones.
    seen = weights.reshape(2, 4, 6, 2, 4, 6)
    assert torch.count_nonzero(seen[0, 1, :, 0, 2:]) == 0
    assert torch.count_nonzero(seen[0, 1, :, 0, :2]) > 0
    with pytest.raises(AssertionError):
        assert_exact(layer(x), layer(x, mask))


def test_tokens_may_be_permuted() -> None:
    layer, x = attention_of(), values(2, 4, 6)
    order = torch.tensor([2, 0, 3, 1])
    assert_exact(layer(x[:, order]), layer(x)[:, order])


def test_gradcheck() -> None:
    layer, x = attention_of(4, 2), values(1, 3, 4).requires_grad_()

    def run(x: Tensor, qkv: Tensor, proj: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"qkv.weight": qkv, "proj.weight": proj}, (x,))

    torch.autograd.gradcheck(run, (x, layer.qkv.weight, layer.proj.weight))


def test_layers() -> None:
    layer = Attention(6, 2, max_out=3, b=1.5)
    assert set(layer.state_dict()) == {"qkv.weight", "proj.weight"}
    assert type(layer.qkv) is nn.Linear
    assert isinstance(layer.proj, BcosLinear)
    assert (layer.proj.b, layer.proj.max_out) == (1.5, 3)
    assert layer.qkv.weight.shape == (18, 6)
    assert set(Attention(6, 2, qkv_bias=True).state_dict()) == {"qkv.weight", "qkv.bias", "proj.weight"}


def test_queries_keys_and_values_are_plain() -> None:
    """Neither of unit norm nor B-cos: the size of the values passes, that of the projection does not."""
    layer, x = attention_of(), values(2, 4, 6)
    before = layer(x)
    with torch.no_grad():
        layer.qkv.weight[12:] *= 3
    assert_exact(layer(x), 3 * before)
    with torch.no_grad():
        layer.proj.weight *= 3
    assert_exact(layer(x), 3 * before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    layer, x = attention_of().to(dtype), values(2, 4, 6).to(dtype)
    output = layer(x)
    assert output.dtype == dtype
    expected = expected_of(copy.deepcopy(layer).double(), x.double(), 2.0, 1).output
    torch.testing.assert_close(output.detach().double(), expected, rtol=0.1, atol=0.1)
    assert torch.count_nonzero(layer(torch.zeros_like(x))) == 0
    with explanation_mode():
        assert layer(x).dtype == dtype


def test_copies_and_empty_batch() -> None:
    layer, x = attention_of(), values(2, 4, 6)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert repr(twin) == repr(layer)
    assert layer(x[:0]).shape == (0, 4, 6)


@pytest.mark.parametrize("heads", [0, 4, -1])
def test_construction_errors(heads: int) -> None:
    with pytest.raises(ValueError, match=rf"`num_heads` \(={heads}\) must divide `dim` \(=6\)"):
        Attention(6, heads)
    with pytest.raises(ValueError, match="`b`"):
        Attention(6, 2, b=0.5)


def test_input_errors() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Attention(6, 2)(torch.zeros(2, 4, 5))


def test_a_mask_for_each_sample():
    """As many samples as heads, for which the mask could be taken."""
    torch.manual_seed(0)
    layer = Attention(6, 3)
    x = torch.randn(3, 4, 6)
    mask = torch.ones(3, 4, 4, dtype=torch.bool)
    mask[0, :, 1:] = False
    mask[1, :, :2] = False
    found = layer(x, mask)
    for sample in range(3):
        torch.testing.assert_close(found[sample : sample + 1], layer(x[sample : sample + 1], mask[sample]))
    torch.testing.assert_close(layer(x, mask.unsqueeze(1).expand(3, 3, 4, 4)), found)
    for shape in ((4,), (4, 5), (2, 4, 4), (3, 2, 4, 4)):
        with pytest.raises(ValueError, match="`mask` of shape"):
            layer(x, torch.ones(shape, dtype=torch.bool))
