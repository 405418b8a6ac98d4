"""The eager passes: the same derivatives as plain operations, to the second order, with as little kept in memory."""

import concurrent.futures

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bcoskit
from bcoskit import _trust
from bcoskit.dynamic import freeze, frozen, is_frozen
from bcoskit.dynamic._mode import RULES, rule_key
from bcoskit.nn import BatchNorm, BcosConv2d, BcosLinear, Gate


def seeded(make, *arguments, **options):
    torch.manual_seed(0)
    layer = make(*arguments, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


LAYERS = {
    "conv": (lambda: seeded(BcosConv2d, 4, 6, 3, padding=1), (2, 4, 5, 4)),
    "grouped": (lambda: seeded(BcosConv2d, 4, 6, (3, 2), stride=2, groups=2, dilation=(1, 2)), (2, 4, 6, 5)),
    "depthwise": (lambda: seeded(BcosConv2d, 4, 4, 3, padding=1, groups=4), (2, 4, 5, 4)),
    "max out": (lambda: seeded(BcosConv2d, 4, 3, 1, max_out=2, scale=0.1, bias=True), (2, 4, 3, 3)),
    "raw": (lambda: seeded(BcosConv2d, 4, 3, 3, normalize_weight=False), (2, 4, 4, 4)),
    "other exponent": (lambda: seeded(BcosConv2d, 4, 3, 3, b=1.5), (2, 4, 4, 4)),
    "linear": (lambda: seeded(BcosLinear, 5, 4), (3, 5)),
    "norm": (lambda: seeded(BatchNorm, 3, bias=True), (4, 3, 2, 3)),
    "norm without scale": (lambda: seeded(BatchNorm, 3, scale=False), (4, 3, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_derivatives(name):
    make, shape = LAYERS[name]
    layer = make()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True) if list(layer.parameters()) else ((), ())

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    values = tuple(parameter.detach().clone().requires_grad_() for parameter in parameters)
    assert torch.autograd.gradcheck(run, (x, *values))
    assert torch.autograd.gradgradcheck(run, (x, *values))


@pytest.mark.parametrize("name", LAYERS)
def test_as_plain_operations(name):
    # Function transforms see plain operations alone.
    make, shape = LAYERS[name]
    layer = make()
    x = torch.randn(shape, dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    mask = torch.randn_like(layer(x))

    def loss(parameters, x):
        buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        return (torch.func.functional_call(layer, parameters | buffers, x) * mask).sum()

    expected, expected_x = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    start = x.clone().requires_grad_()
    output = layer(start)
    assert "Backward" in type(output.grad_fn).__name__
    found = torch.autograd.grad((output * mask).sum(), (start, *parameters.values()))
    for ours, plain in zip(found, (expected_x, *expected.values()), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("layer", [BcosConv2d(2, 3, 1), BcosLinear(2, 3)])
def test_zeros_have_finite_derivatives_of_both_orders(layer):
    with torch.no_grad():
        layer.weight[0] = 0
    x = torch.zeros((1, 2) if isinstance(layer, BcosLinear) else (1, 2, 2, 2))
    x.view(-1)[:1] = 1
    x.requires_grad_()
    first = torch.autograd.grad(layer(x).sum(), (x, layer.weight), create_graph=True)
    second = torch.autograd.grad(sum(each.square().sum() for each in first), (x, layer.weight))
    assert all(bool(each.isfinite().all()) for each in (*first, *second))


class Gradients(TorchDispatchMode):
    """Which gradients of convolutions were computed: (of the input, of the weight) for each."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.computed.append(tuple(args[-1][:2]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("behind_a_leaf", [True, False])
def test_gradients_that_nobody_asks_for_are_not_computed(behind_a_leaf):
    layers = nn.Sequential(BcosConv2d(4, 4, 1), BcosConv2d(4, 4, 1))
    weights = [layer.weight for layer in layers]
    x = torch.rand(2, 4, 5, 5).requires_grad_()
    inputs = x if behind_a_leaf else x * 2
    expected = torch.autograd.grad(layers(inputs).square().sum(), [inputs, *weights])
    cases = {
        "input": ([inputs], [(True, False)] * 2),
        "first weight": ([weights[0]], [(True, False), (False, True)]),
        "last weight": ([weights[1]], [(False, True)]),
        "all": ([inputs, *weights], [(True, True)] * 2),
    }
    of = dict(zip(map(id, (inputs, *weights)), expected, strict=True))
    for name, (wanted, computed) in cases.items():
        loss = layers(inputs).square().sum()
        with Gradients() as gradients:
            found = torch.autograd.grad(loss, wanted)
        assert gradients.computed == computed, name
        for tensor, gradient in zip(wanted, found, strict=True):
            torch.testing.assert_close(gradient, of[id(tensor)])
    with Gradients() as gradients:
        layers(inputs).square().sum().backward()
    assert gradients.computed == [(True, True)] * 2
    torch.testing.assert_close(weights[0].grad, expected[1])


def kept_bytes(network, x):
    """What a forward pass keeps for the backward pass, beside parameters and the input."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(x)
    known = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers(), x)}
    return sum(size for place, size in storages.items() if place not in known), output


def test_training_keeps_no_more_than_an_ordinary_block():
    x = torch.rand(8, 16, 32, 32)
    layers = [BcosConv2d(16, 16, 3, padding=1), BatchNorm(16)]
    ours, _ = kept_bytes(nn.Sequential(*layers, *layers), x)
    plain = [nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    ordinary, _ = kept_bytes(nn.Sequential(*plain, *plain), x)
    assert ours < 1.1 * ordinary
    norm = bcoskit.functional.patch_norm(x, 3, padding=1)
    assert ours < 4 * x.nbytes + 8 * norm.nbytes


class TestFrozen:
    def test_it_ends(self):
        x = torch.ones(2, requires_grad=True)
        with frozen():
            assert is_frozen()
            assert not freeze(x).requires_grad
        with pytest.raises(RuntimeError, match="size"), frozen():
            torch.ones(2) @ torch.ones(3)
        assert not is_frozen()
        assert freeze(x) is x

    def test_other_threads_know_nothing_of_it(self):
        with frozen(), concurrent.futures.ThreadPoolExecutor(1) as pool:
            assert not pool.submit(is_frozen).result()

    @pytest.mark.parametrize(
        "name",
        [
            "resnet18.bcos_v2_in1k",
            "densenet121.bcos_v1_in1k",
            "convnext_atto.bcos_v2_pn_in1k",
            "resnet18.bcosification_in1k",
            "resnet20.bcos_v2_gn_cifar10",
            "cnn9.bcos_v1_b1_5_cifar10",
        ],
    )
    def test_known_networks_are_explained_as_others(self, name, monkeypatch):
        torch.manual_seed(0)
        model = bcoskit.create_model(name).double()
        x = bcoskit.encode(torch.rand(2, 3, 40, 48, dtype=torch.float64))
        assert _trust.is_known(model)
        quick = bcoskit.explain(model, x, target=[[1, 2], [3, 4]])
        monkeypatch.setattr("bcoskit._explain.is_known", lambda model: False)
        slow = bcoskit.explain(model, x, target=[[1, 2], [3, 4]])
        scale = float(slow.weights.abs().max())
        torch.testing.assert_close(quick.weights / scale, slow.weights / scale, rtol=0, atol=1e-10)
        torch.testing.assert_close(quick.logits, slow.logits)
        start = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(start)[:, 1].sum(), start)
        assert not torch.allclose(quick.weights[:, 0], gradient, rtol=1e-2)

    def test_what_the_graph_shows_is_looked_at_again(self, monkeypatch):
        torch.manual_seed(0)
        model = nn.Sequential(BcosConv2d(6, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(16, 3)).eval()
        x = torch.rand(2, 6, 4, 4)
        assert not _trust.is_known(model)
        slow = bcoskit.explain(model, x)
        monkeypatch.setattr("bcoskit._explain.is_known", lambda model: True)
        assert torch.equal(bcoskit.explain(model, x).weights, slow.weights)
        with pytest.raises(bcoskit.NotLinearError, match="digamma"):
            bcoskit.explain(nn.Sequential(model, Digamma()).eval(), x)

    def test_rules_of_users_are_applied(self, monkeypatch):
        torch.manual_seed(0)
        model = nn.Sequential(BcosConv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
        x = torch.rand(2, 6, 4, 4)
        before = bcoskit.explain(model, x, 1).weights
        key = rule_key(nn.functional.relu)
        monkeypatch.setitem(RULES, key, lambda mode, func, args, kwargs: 2 * args[0])
        assert not _trust.is_known(model)
        assert not torch.allclose(bcoskit.explain(model, x, 1).weights, before)

    def test_what_is_not_known(self):
        layers = [BcosConv2d(6, 4, 3), nn.ReLU(), nn.Flatten()]
        assert _trust.is_known(nn.Sequential(*layers))
        assert not _trust.is_known(nn.Sequential(*layers, Gate("gelu")))
        assert not _trust.is_known(nn.Sequential(*layers, Digamma()))
        assert not _trust.is_known(lambda x: x)
        hooked = nn.Sequential(*layers)
        handle = hooked[0].register_forward_hook(lambda *_arguments: None)
        assert not _trust.is_known(hooked)
        handle.remove()
        assert _trust.is_known(hooked)
        handle = nn.modules.module.register_module_forward_hook(lambda *_arguments: None)
        assert not _trust.is_known(hooked)
        handle.remove()
        hooked[1].forward = torch.tanh
        assert not _trust.is_known(hooked)


MAX_OUT = {
    "two units": ((2, 6, 4, 5), 2, 1),
    "three units": ((2, 6, 4), 3, 1),
    "of rows": ((3, 5, 8), 4, -1),
    "of one sample": ((6,), 2, 0),
    "of the middle": ((2, 3, 4, 5), 2, 2),
    "no samples": ((0, 6, 4, 5), 2, 1),
}


class TestMaxOut:
    """Against the largest entry as torch has it, whose gradient goes to the first of equals."""

    @staticmethod
    def plain(y, units, axis):
        axis %= y.ndim
        return y.unflatten(axis, (-1, units)).max(axis + 1).values

    @pytest.mark.parametrize("case", MAX_OUT)
    @pytest.mark.parametrize("is_last", [True, False])
    def test_values_and_derivatives(self, case, is_last):
        torch.manual_seed(0)
        shape, units, axis = MAX_OUT[case]
        y = torch.randint(-2, 3, shape).double()  # with equals
        if is_last:
            y = y.movedim(axis, -1).contiguous().movedim(-1, axis)
        y.requires_grad_()
        ours, expected = bcoskit.functional.max_out(y, units, axis), self.plain(y, units, axis)
        assert torch.equal(ours, expected)
        several = torch.randn(3, *ours.shape, dtype=torch.float64)
        (together,) = torch.autograd.grad(ours, y, several, is_grads_batched=True, retain_graph=True)
        for gradient, one in zip(several, together, strict=True):
            (wanted,) = torch.autograd.grad(expected, y, gradient, retain_graph=True)
            (found,) = torch.autograd.grad(ours, y, gradient, retain_graph=True)
            (with_graph,) = torch.autograd.grad(ours, y, gradient, create_graph=True)
            assert all(torch.equal(each, wanted) for each in (found, with_graph, one))

    def test_second_derivatives(self):
        y = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(lambda y: bcoskit.functional.max_out(y, 3, 1).square(), y)

    def test_what_is_no_number_is_not_lost(self):
        for place in range(2):
            y = torch.zeros(1, 2)
            y[0, place] = torch.nan
            assert bool(bcoskit.functional.max_out(y.requires_grad_(), 2, 1).isnan())

    def test_the_layout_stays(self):
        y = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
        output = bcoskit.functional.max_out(y, 2, 1)
        assert output.is_contiguous(memory_format=torch.channels_last)
        (gradient,) = torch.autograd.grad(output.sum(), y)
        assert gradient.is_contiguous(memory_format=torch.channels_last)
        assert not bcoskit.functional.max_out(y.detach().contiguous(), 2, 1).is_contiguous(
            memory_format=torch.channels_last
        )

    def test_it_keeps_a_byte_for_each_output(self):
        x = torch.rand(2, 4, 16, 16)
        layer = BcosConv2d(4, 32, 1, max_out=2)
        chosen = 2 * 32 * 16 * 16
        one_unit, _ = kept_bytes(BcosConv2d(4, 32, 1, scale=1.5), x)
        two_units, output = kept_bytes(layer, x)
        assert output.shape == (2, 32, 16, 16)
        assert two_units - one_unit < chosen + 2 * layer.weight.nbytes

    def test_audits_know_it(self):
        torch.manual_seed(0)
        layers = [BcosConv2d(6, 4, 3, max_out=2), nn.Flatten(), BcosLinear(16, 3, max_out=2)]
        x = torch.rand(2, 6, 4, 4)
        assert bcoskit.audit(nn.Sequential(*layers).eval(), x).passed
        assert not bcoskit.audit(nn.Sequential(*layers, Digamma()).eval(), x).passed


def test_several_gradients_at_once():
    """`is_grads_batched` and vectorised Jacobians are what a loop over the gradients gives."""
    x = torch.rand(2, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    vectors = torch.eye(6, dtype=torch.float64).reshape(6, 2, 3)
    layers = [seeded(BcosConv2d, 6, 6, 3, padding=1, groups=2), seeded(BatchNorm, 6), seeded(BcosConv2d, 6, 3, 3)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    inputs = [x, *network.parameters()]
    y = network(x)
    together = torch.autograd.grad(y, inputs, vectors, is_grads_batched=True, retain_graph=True)
    one_by_one = zip(*(torch.autograd.grad(y, inputs, vector, retain_graph=True) for vector in vectors), strict=True)
    for found, expected in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(found, torch.stack(expected))
        assert found.abs().max() > 1e-3
    network.eval()
    vectorized = torch.autograd.functional.jacobian(network, x, vectorize=True)
    torch.testing.assert_close(vectorized, torch.autograd.functional.jacobian(network, x))


def test_second_derivatives_at_the_edges():
    layer = seeded(BcosLinear, 6, 4)
    assert torch.autograd.gradgradcheck(layer, torch.rand(6, dtype=torch.float64, requires_grad=True))
    norm = seeded(BatchNorm, 3).train()
    x = torch.rand(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    norm.weight.requires_grad_(False)
    assert torch.autograd.gradgradcheck(norm, x)
    assert torch.autograd.gradgradcheck(lambda weight: torch.func.functional_call(norm, {"weight": weight}, x.detach()),
                                        torch.rand(3, dtype=torch.float64, requires_grad=True))  # fmt: skip


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:FutureWarning")
def test_a_trace_serves_batches_of_any_size():
    layer = BcosConv2d(3, 16, 3, padding=1).eval()
    few, many = torch.rand(4, 3, 96, 96), torch.rand(8, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(layer, few)(many), layer(many))
    torch.testing.assert_close(torch.jit.trace(layer, few)(many), layer(many))


class Digamma(nn.Module):
    """Not linear, and without a rule."""

    def forward(self, x):
        return torch.digamma(x + 2)
