"""What no graph shows, and what is only nearly linear: found by the audit, refused by `explain`, or let through."""

import numpy as np
import pytest
import torch
from torch import nn

import bcoskit
from bcoskit.dynamic import NotLinearError


class Coded(nn.Module):
    """A linear layer, and code of the caller's."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.with_forward = forward

    def forward(self, x):
        return self.with_forward(self.linear, x)


def audited(forward):
    return bcoskit.audit(Coded(forward).eval(), torch.rand(2, 4), 0)


TABLE = torch.rand(4, 4)


class Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 - ctx.saved_tensors[0].square())


def written(buffer, values):
    buffer[:, :2] = values[:, :2]
    return buffer


def by_out(x):
    squares = torch.empty_like(x)
    with torch.no_grad():
        torch.pow(x, 2, out=squares)
    return squares


def by_numpy(linear, x):
    return linear(x) if np.asarray(x.detach()).mean() > 0 else x


def by_membership(linear, x):
    return linear(x) if 0.5 in x else 2 * linear(x)


def by_assignment(linear, x):
    kept = torch.zeros(2)
    kept[0] = x.detach().mean()
    return linear(x) if kept[0] > 0 else x


def by_a_view(linear, x):
    kept = torch.zeros(2)
    kept[:1].copy_(x.detach().mean()[None])
    return linear(x) if kept.sum() > 0 else x


@pytest.mark.parametrize(
    ("forward", "operation"),
    [
        (by_numpy, "__array__"),
        (by_membership, "__contains__"),
        (by_assignment, "__bool__"),
        (by_a_view, "__bool__"),
        (lambda linear, x: linear(x) if len((x > 0.2).nonzero()) else x, "__len__"),
        (lambda linear, x: linear(x) if x[x > 0.2].shape[0] else x, "shape"),
        (lambda linear, x: linear(x) if TABLE[:2][x > 0.2].shape[0] else x, "shape"),
        (lambda linear, x: linear(x) if TABLE[:2].masked_select(x > 0.2).shape[0] else x, "shape"),
        (lambda linear, x: linear(x) if torch.where(x > 0.2)[0].numel() else x, "numel"),
        (lambda linear, x: linear(x) if (x > 0.2).nonzero()[:, 0].size(0) else x, "size"),
        (lambda linear, x: linear(x) * sum(1 for _ in torch.unique(x)), "unbind"),
        (lambda linear, x: linear(x) if x.detach().untyped_storage()[0] > 0 else x, "untyped_storage"),
    ],
)
def test_values_that_python_reads(forward, operation):
    report = audited(forward)
    assert not report.passed
    assert operation in report.offenders[0].operation
    assert report.offenders[0].location.startswith("test_audit.py:")


@pytest.mark.parametrize(
    "forward",
    [
        lambda linear, x: linear(x) if x.new_ones(3).sum() > 0 else x,
        lambda linear, x: linear(x) if torch.zeros_like(x).sum() == 0 else x,
        lambda linear, x: linear(x) if torch.ones(2).to(x).sum() > 0 else x,
        lambda linear, x: linear(x) if torch.ones(2).type_as(x).sum() > 0 else x,
        lambda linear, x: torch.ldexp(linear(x), torch.tensor([1, 2, 3, 1])),
        lambda linear, x: linear(x).abs(),
        lambda linear, x: torch.channel_shuffle(linear(x)[..., None, None], 2).flatten(1),
        lambda linear, x: torch.stack([torch.block_diag(row[:2], row[2:])[:, 0] for row in linear(x)]),
        lambda linear, x: torch.zeros(len(x), 4).index_copy(
            0, (x[:, 0] > 0.5).nonzero()[:, 0], linear(x[x[:, 0] > 0.5])
        ),
        lambda linear, x: linear(torch.cat([x, x.flip(1)])).unflatten(0, (2, -1)).sum(0),
        lambda linear, x: torch.stack([linear(row) for row in x]),
        lambda linear, x: linear(x) + linear(x).masked_fill(torch.eye(4)[:1] > 0, -torch.inf).relu(),
        lambda linear, x: linear(x)[:, TABLE[0] < 2].reshape(len(x), -1),
        lambda linear, x: linear(x).masked_select(TABLE[:1] < 2).reshape(len(x), -1),
        lambda linear, x: linear(x) * by_out(x),
    ],
)
def test_what_is_linear(forward):
    report = audited(forward)
    assert report.passed, report.offenders
    e = bcoskit.explain(Coded(forward).eval(), torch.rand(2, 4), 0, shares=True)
    assert float(e.residual.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda linear, x: (linear(x).bfloat16() @ torch.ones(4, 4).bfloat16()).float(), "half precision"),
        (lambda linear, x: torch.fft.fft(linear(x)).abs(), "Abs"),
        (lambda linear, x: torch.ldexp(linear(x), x), "divisor, weight or grid"),
    ],
)
def test_what_is_not(forward, message):
    with pytest.raises(NotLinearError, match=message):
        bcoskit.explain(Coded(forward).eval(), torch.rand(2, 4), 0)
    assert not audited(forward).passed


@pytest.mark.parametrize(
    ("forward", "operation"),
    [
        (lambda linear, x: linear(linear(x).sigmoid()), "sigmoid"),
        (lambda linear, x: nn.functional.softplus(linear(x).softmax(1) * linear(x)), "softplus"),
        (lambda linear, x: linear(linear(x).detach()), "detach"),
        (lambda linear, x: linear(x).log_softmax(1), "log_softmax"),
    ],
)
def test_where_nothing_is_left_to_explain(forward, operation):
    report = audited(forward)
    assert not report.passed
    (offender,) = report.offenders
    assert operation in offender.operation
    assert "nothing behind it depends on the input" in str(offender)
    assert "to_layer" in offender.suggestion
    assert offender.location.startswith("test_audit.py:")
    with pytest.raises(ValueError, match=r"no gradient path .* `bcoskit.audit` names"):
        bcoskit.explain(Coded(forward).eval(), torch.rand(2, 4), 0)


@pytest.mark.parametrize(
    ("forward", "operation"),
    [
        (lambda linear, x: linear(x).cumsum(0), "cumsum"),
        (lambda linear, x: linear(x).flip(0).cumsum(0), "flip"),
        (lambda linear, x: linear(x) * linear(x).softmax(0), "softmax"),
        (lambda linear, x: linear(x - x.mean(0)), "mean"),
        (lambda linear, x: (x @ x.T).softmax(1) @ linear(x), "matmul"),
        (lambda linear, x: linear(x) - linear(x)[:1].tanh() * 0.5, "__getitem__"),
    ],
)
@pytest.mark.parametrize("samples", [1, 2])
def test_samples_that_depend_on_each_other(forward, operation, samples):
    network = Coded(forward).eval()
    report = bcoskit.audit(network, torch.rand(1, 4).repeat(samples, 1), 0)
    assert not report.passed
    (offender,) = [each for each in report.offenders if "other samples" in each.reason]
    assert operation in offender.operation
    assert offender.location.startswith("test_audit.py:")
    assert "statistic" in offender.suggestion


def test_a_function_of_autograd_between_modules():
    report = audited(lambda linear, x: linear(Tanh.apply(linear(x))))
    (offender,) = report.offenders
    assert (offender.node, offender.operation, offender.module) == ("Tanh", "Tanh.apply", "")
    assert offender.location.startswith("test_audit.py:")


def test_a_function_of_autograd_is_where_it_is_called():
    def forward(linear, x):
        y = linear(x)
        y = Tanh.apply(y)
        return y + 1

    (offender,) = audited(forward).offenders
    assert offender.operation == "Tanh.apply"
    assert offender.location == f"test_audit.py:{forward.__code__.co_firstlineno + 2}"


def test_what_is_called_as_no_torch_function():
    def forward(linear, x):
        with torch._C.DisableTorchFunction():
            y = x.sigmoid()
        return linear(x) * y

    assert "Sigmoid" in audited(forward).offenders[0].operation


def test_statistics_of_the_batch_are_named_once_and_first():
    for network in (
        Coded(lambda linear, x: nn.functional.batch_norm(linear(x), None, None, training=True)),
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)),
    ):
        report = bcoskit.audit(network.eval(), torch.rand(2, 4), 0)
        assert [offender.node for offender in report.offenders] == ["refused", "batch"]
        assert {offender.operation for offender in report.offenders} == {"batch_norm"}


def hidden(linear, x):
    y = linear(x)
    y.data.mul_(y.data.abs())
    return y


@pytest.mark.parametrize("forward", [hidden, lambda linear, x: torch.vmap(linear)(x)])
def test_what_no_graph_shows_is_told(forward):
    report = audited(forward)
    assert not report.passed
    (offender,) = report.offenders
    assert "do not add up" in offender.reason
    assert "vmap" in offender.suggestion


def test_samples_that_depend_on_each_other_have_no_shares():
    network, x = Coded(lambda linear, x: linear(x).cumsum(0)).eval(), torch.rand(3, 4)
    with pytest.raises(ValueError, match=r"sample \d is another one in the batch than alone.*`bcoskit.audit` names"):
        bcoskit.explain(network, x, 0, shares=True)


def test_a_network_that_draws_random_numbers():
    network, x = Coded(lambda linear, x: linear(x) + torch.randn_like(x)).eval(), torch.rand(2, 4)
    state = torch.get_rng_state()
    report = bcoskit.audit(network, x, 0)
    assert torch.equal(torch.get_rng_state(), state)
    (offender,) = report.offenders
    assert "random numbers" in offender.reason
    assert "random" in offender.suggestion
    assert offender.location.startswith("test_audit.py:")


def test_a_network_that_counts_its_calls():
    calls = []

    def forward(linear, x):
        calls.append(x)
        return linear(x) * (1 + len(calls) % 2)

    (offender,) = audited(forward).offenders
    assert "keeps a state" in offender.reason
    assert offender.location.startswith("test_audit.py:")


@pytest.mark.parametrize(
    "forward",
    [
        lambda linear, x: linear(x) @ torch.eye(4),
        lambda linear, x: linear(x) @ TABLE,
        lambda linear, x: linear(x) @ torch.from_numpy(TABLE.numpy()),
        lambda linear, x: linear(x) * linear(x).softmax(1, dtype=torch.float32),
        lambda linear, x: linear(x).mean(1, dtype=torch.float32)[:, None] * torch.ones(4),
        lambda linear, x: linear(x).type("torch.FloatTensor").max(1, keepdim=True)[0] * torch.ones(4),
        lambda linear, x: linear(x) + nn.functional.one_hot(torch.arange(len(x)) * 0, 4).float() @ TABLE,
        lambda linear, x: written(torch.zeros(len(x), 4), linear(x)) + x,
    ],
)
def test_single_precision_that_code_makes_is_audited_in_double(forward):
    report = audited(forward)
    assert report.passed, report
    assert report.residual < 1e-14


@pytest.mark.parametrize("with_graph", [True, False])
def test_a_network_with_plain_tensors(with_graph):
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4, bias=False)
            self.table = torch.rand(4, 4)
            self.kept = {}

        def forward(self, x):
            if "doubled" not in self.kept:
                self.kept["doubled"] = 2 * self.linear.weight
            return x @ self.kept["doubled"] @ self.table

    network, x = Keeping().eval(), torch.rand(2, 4)
    with torch.set_grad_enabled(with_graph):
        network(x)
    kept, table = network.kept["doubled"], network.table
    report = bcoskit.audit(network, x)
    assert report.passed, report.offenders
    assert network.kept["doubled"] is kept
    assert network.table is table
    assert (kept.dtype, table.dtype, kept.requires_grad) == (torch.float32, torch.float32, with_graph)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_compiled_scripts():
    script = torch.jit.script(nn.Linear(4, 4, bias=False))
    for network in (script.eval(), nn.Sequential(script, nn.ReLU()).eval()):
        with pytest.raises(ValueError, match="has a compiled script"):
            bcoskit.audit(network, torch.rand(2, 4))


def test_autocast_within_the_network():
    def cast(linear, x):
        with torch.autocast("cpu", torch.bfloat16):
            return linear(x).float()

    with pytest.raises(NotLinearError, match="half precision"):
        bcoskit.explain(Coded(cast).eval(), torch.rand(2, 4), 0)
    assert ["half precision" in str(each) for each in audited(cast).offenders] == [True]


def test_the_share_of_a_threshold():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.Threshold(0.1, 0.3), nn.Linear(4, 2)).eval()
    e = bcoskit.explain(network, 3 * torch.rand(8, 4), 0, shares=True)
    assert float(e.residual.abs().max()) < 1e-5
    assert "1.threshold" in e.shares


def test_a_function_that_holds_a_batch():
    linear, factors = nn.Linear(4, 3), torch.rand(2, 3)
    with pytest.raises(TypeError, match="1 samples first"):
        bcoskit.explain(lambda x: linear(x) * factors, torch.rand(2, 4), 0, shares=True)


def test_faults_in_torchs_own_layers_are_where_these_are():
    network = nn.Sequential(nn.Linear(4, 4), nn.LPPool1d(2, 2), nn.Linear(2, 2)).eval()
    with pytest.raises(NotLinearError, match=r"in module '1' at pooling.py:\d+"):
        bcoskit.explain(network, torch.rand(2, 4), 0)


def test_casts_to_single_precision():
    class Norm(nn.Module):
        """As language models have it."""

        def forward(self, x):
            wide = x.to(torch.float32)
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            return wide.float().type(torch.float32).to(dtype=torch.float32).to(x.dtype)

    network = nn.Sequential(nn.Linear(4, 4), Norm(), nn.Linear(4, 2)).eval()
    report = bcoskit.audit(network, torch.rand(2, 4), 0)
    assert report.passed, report
