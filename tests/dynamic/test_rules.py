"""Every rule: same values, an exact linear summary, frozen factors, and the same when it is compiled."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bcoskit

torch.manual_seed(0)
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MASK = torch.tensor([[True, False, True, True, True]] * 5)
torch.set_default_dtype(torch.float64)
LSTM = nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True, proj_size=3).eval()
GRU, RNN, RELU_RNN = nn.GRU(8, 4).eval(), nn.RNN(8, 4, bias=False).eval(), nn.RNN(8, 4, nonlinearity="relu").eval()
LSTM_CELL, GRU_CELL, RNN_CELL = nn.LSTMCell(8, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 4)
ATTENTION = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True).eval()
CROSS = nn.MultiheadAttention(8, 2, kdim=8, vdim=8).eval()
NORMS = nn.Sequential(nn.BatchNorm1d(5), nn.InstanceNorm1d(5, affine=True), nn.LayerNorm(8), nn.GroupNorm(5, 5)).eval()
CONVOLUTION = nn.Conv1d(5, 5, 3, padding=1, padding_mode="circular")
torch.set_default_dtype(torch.float32)
nn.init.normal_(NORMS[0].running_mean)


def cells(x: Tensor) -> Tensor:
    hidden, memory = LSTM_CELL(x[:, 0], (x[:, 1, :4], x[:, 2, :4]))
    return RNN_CELL(GRU_CELL(hidden, memory), hidden)


def statistics(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, keepdim=True)
    return (x - mean) * torch.rsqrt(var + 1e-5) + x / x.std(-1, keepdim=True)


OPERATIONS = {
    "softmax": lambda x: F.softmax(x, -1) * x + x.softmax(1) * x + torch.softmax(x, -1) * 2,
    "gates of torch": lambda x: F.gelu(x) + F.gelu(x, approximate="tanh") + F.silu(x) + F.mish(x) + F.softsign(x),
    "hard gates": lambda x: F.hardswish(x) + F.hardsigmoid(x) * x + F.hardtanh(x) + F.relu6(3 * x) + F.softshrink(x),
    "exponential gates": lambda x: F.elu(x) + F.selu(x) + F.celu(x, 0.7) + torch.expm1(x) + torch.tanh(x) + x.sin(),
    "in place": lambda x: F.silu(x * 1, inplace=True) + F.hardswish(x * 1, inplace=True) + x.clone().sigmoid_() * x,
    "functions in place": lambda x: torch.sigmoid_(x * 1) * x + torch.exp_(x * 1) * x + torch.tanh_(x * 1),
    "aliases": lambda x: F.sigmoid(x) * x + torch.special.expit(x) * x + F.tanh(x),
    "constants": lambda x: F.softplus(x) * x + F.logsigmoid(x) * x + torch.exp(x) * x + 1 / (1 + x.abs()) * x,
    "glu": lambda x: F.glu(x, -1),
    "powers": lambda x: x**2 + torch.pow(x, 3) + x.pow(2) + x.abs() ** 1.5 + x.square() + 2.0**x * x,
    "roots": lambda x: x * (x.square().mean(-1, keepdim=True) + 1) ** -0.5,
    "quotients": lambda x: x / (x.abs().sum(-1, keepdim=True) + 1) + torch.div(x, x.abs() + 1) + 1 / (x.abs() + 1) * x,
    "rms": lambda x: x * torch.rsqrt((x**2).mean(-1, keepdim=True) + 1e-6) + F.rms_norm(x, [8]),
    "unit norm": lambda x: F.normalize(x, dim=-1) + x / x.norm(dim=-1, keepdim=True) + x / torch.linalg.vector_norm(x),
    "statistics": statistics,
    "norms": lambda x: NORMS(x),
    "response norm": lambda x: F.local_response_norm(x, 3),
    "products": lambda x: x * x.flip(1) * torch.sigmoid(x) + x @ x.mT @ x + torch.matmul(x, x.mT).relu() @ x,
    "fused products": lambda x: torch.addcmul(x, x, x.flip(1)) + torch.baddbmm(x, x @ x.mT, x),
    "einsum": lambda x: torch.einsum("nij,nkj->nik", x, x.flip(1)),
    "products in place": lambda x: x.clone().mul_(x) + x.clone().mul_(torch.sigmoid(x)),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True).flip(1),
    "masked attention": lambda x: F.scaled_dot_product_attention(x, x, x, MASK) + ATTENTION(x, x, x)[0],
    "cross attention": lambda x: CROSS(x, x.flip(0), x)[0],
    "pooling": lambda x: F.max_pool1d(x, 2) + F.avg_pool1d(x, 2) + torch.maximum(x, x.flip(1))[..., :4],
    "circular padding": lambda x: F.pad(x, (1, -2, 2, 0), mode="circular"),
    "circular convolution": lambda x: CONVOLUTION(x),
    "recurrent cells": cells,
}
LINEAR = {"pooling", "circular padding", "circular convolution"}
# The compiler refuses networks that recur.
RECURRENT = {
    "lstm": lambda x: LSTM(x)[0],
    "lstm, states": lambda x: torch.cat([state.flatten() for state in LSTM(x)[1]])[None].expand(2, -1),
    "gru": lambda x: GRU(x, x[:1, :, :4].contiguous())[0],
    "rnn": lambda x: RNN(x)[0] + RELU_RNN(x)[0],
}


class Flat(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x).flatten(1)


def weights_by_func(network, x):
    with bcoskit.explanation_mode():
        return torch.func.grad(lambda x: network(x)[:, 1].sum())(x)


@pytest.mark.parametrize("name", [*OPERATIONS, *RECURRENT])
def test_a_rule_is_an_exact_summary(name):
    network = Flat((OPERATIONS | RECURRENT)[name]).eval()
    # Recurrence and attention along the first axis mix samples: the sum over them is explained by one.
    across = name in ("gru", "rnn", "cross attention", "lstm, states", "unit norm")
    x = X.transpose(0, 1).reshape(1, 5, 2, 8) if across else X
    mixed = Flat(lambda x: network(x[0].transpose(0, 1).contiguous()).reshape(1, -1)) if across else network
    e = bcoskit.explain(mixed.eval(), x, 1, shares=True)
    torch.testing.assert_close(e.logits, mixed(x.clone()).detach(), rtol=1e-12, atol=1e-12)
    assert e.residual.abs().max() <= 1e-12
    report = bcoskit.audit(mixed.eval(), x, 1)
    assert report.passed
    assert report.numeric == 0


@pytest.mark.parametrize("name", sorted({*OPERATIONS, *RECURRENT} - LINEAR))
def test_without_the_mode_it_is_another_map(name):
    network = Flat((OPERATIONS | RECURRENT)[name]).eval()
    leaf = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(leaf * 1)[:, 1].sum(), leaf)
    with bcoskit.explanation_mode():
        (weights,) = torch.autograd.grad(network(leaf * 1)[:, 1].sum(), leaf)
    assert (gradient - weights).abs().max() > 1e-4


@pytest.mark.parametrize("name", OPERATIONS)
def test_compiled_it_is_the_same(name):
    torch.compiler.reset()
    network = Flat(OPERATIONS[name]).eval()
    expected = weights_by_func(network, X)
    inside = torch.compile(weights_by_func, fullgraph=True, backend="eager")(network, X)
    torch.testing.assert_close(inside, expected, rtol=1e-12, atol=1e-12)
    compiled, leaf = torch.compile(network, fullgraph=True, backend="eager"), X.clone().requires_grad_()
    compiled(leaf)  # outside the mode it is compiled for itself
    with bcoskit.explanation_mode():
        (outside,) = torch.autograd.grad(compiled(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(outside, expected, rtol=1e-12, atol=1e-12)


def test_a_fresh_process_compiles_what_torch_hides_from_modes():
    # What makes the compiler show an operation is imported late: an earlier test may have done it.
    import subprocess
    import sys

    code = """
import torch, bcoskit
network, x = torch.nn.Hardswish().eval(), torch.randn(4, 3)
expected = bcoskit.explain(network, x, 1).weights
compiled, leaf = torch.compile(network, fullgraph=True, backend="eager"), x.clone().requires_grad_()
with bcoskit.explanation_mode():
    (weights,) = torch.autograd.grad(compiled(leaf)[:, 1].sum(), leaf)
torch.testing.assert_close(weights, expected)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_random_and_packed_recurrence_are_refused():
    packed = nn.utils.rnn.pack_padded_sequence(X, torch.tensor([5, 3]), batch_first=True)

    def run(x):
        return LSTM(packed._replace(data=x))[0].data

    with pytest.raises(bcoskit.NotLinearError, match="packed"):
        bcoskit.explain(run, packed.data, 0)
    random = nn.LSTM(8, 4, 2, dropout=0.5).double()
    with pytest.raises(bcoskit.NotLinearError, match=r"`dropout` \(=0.5\)"):
        bcoskit.explain(lambda x: random(x)[0][0], X, 0)
    with pytest.raises(ValueError, match="wider than axis"):
        bcoskit.explain(lambda x: F.pad(x, (9, 0), mode="circular").flatten(1), X, 0)


def test_rules_of_a_user():
    @bcoskit.rule("digamma")
    def digamma(x):
        return x * (torch.digamma(bcoskit.freeze(x)) / bcoskit.freeze(x))

    from bcoskit.dynamic._mode import RULES, rule_key

    try:
        x = torch.rand(2, 4).double() + 1
        e = bcoskit.explain(lambda x: torch.digamma(x) + x.digamma() + (x * 1).digamma_(), x, 1, shares=True)
        assert e.residual.abs().max() <= 1e-12
        torch.testing.assert_close(e.value, 3 * torch.digamma(x)[:, 1])
    finally:
        for operation in (torch.digamma, torch.Tensor.digamma, torch.Tensor.digamma_, torch.special.digamma):
            RULES.pop(rule_key(operation), None)
    with pytest.raises(ValueError, match="'nothing', which is no function of torch"):
        bcoskit.rule("nothing")
