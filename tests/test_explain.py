"""Completeness, targets, state and refusals of `explain`, and the audits."""

import concurrent.futures
import dataclasses

import numpy as np
import pytest
import timm
import torch
import torch.utils.checkpoint
from torch import nn

import bcoskit
from bcoskit import nn as bnn

torch.manual_seed(0)


def test_shares_go_with_the_weights_of_their_own_pass():
    # A ReLU near 0 may open in a batch and stay closed for its samples alone: one W(x) must serve both figures.
    for seed in range(5, 8):
        torch.manual_seed(seed)
        model = bcoskit.create_model("resnet20.standard_cifar10")
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                nn.init.normal_(parameter, std=0.1) if name.endswith("bias") else nn.init.uniform_(parameter, 0.5, 1.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            model.train()(torch.rand(4, 3, 32, 32))
        e = bcoskit.explain(model.eval(), torch.rand(2, 3, 32, 32), shares=True)
        assert float(e.residual.abs().max()) < 1e-5
        assert torch.equal(e.weights[:1], bcoskit.explain(model, e.x[:1], e.target[:1], shares=True).weights)


def bcos_network() -> nn.Module:
    torch.manual_seed(1)
    layers = [
        bnn.BcosConv2d(6, 8, 3, padding=1, max_out=2),
        bnn.BatchNorm(8, centered=True, bias=True),
        bnn.BcosConv2d(8, 8, 3, padding="same", groups=2, b=1.5, padding_mode="reflect"),
        bnn.GroupNorm(8, centered=True, bias=True),
        nn.GELU(),
        bnn.PositionNorm(8),
        bnn.ClassifierHead(8, 5, logit_bias=-1.5, temperature=0.5),
    ]
    network = nn.Sequential(*layers)
    network[1].running_mean.uniform_(-0.1, 0.1)
    for norm in (network[1], network[3]):
        nn.init.normal_(norm.bias)
    return network.eval()


def torch_network() -> nn.Module:
    torch.manual_seed(2)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
    network = nn.Sequential(
        nn.Conv2d(6, 8, 3, 2), nn.BatchNorm2d(8), nn.SiLU(inplace=True), nn.Hardtanh(-0.3, 0.3), nn.Flatten(2)
    )
    head = nn.Sequential(nn.LayerNorm(9), nn.Flatten(), nn.Linear(72, 5))
    return nn.Sequential(network, _Transposed(encoder), head).eval()


class _Transposed(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.position = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        x = x.transpose(1, 2)
        x[:, :4].add_(self.position)
        return self.module(x).transpose(1, 2)


def inputs(dtype=torch.float32, samples=3):
    return bcoskit.encode(torch.rand(samples, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype))


TARGETS = {
    "prediction": {},
    "class": {"target": 2},
    "list": {"target": [0, 4, 1]},
    "several": {"target": torch.tensor([[0, 1], [2, 3], [4, 0]])},
    "shared": {"target": [[3, 1, 2]]},
    "versus": {"target": 1, "versus": [0, 2, 3]},
    "several versus": {"target": [[0, 1], [2, 3], [4, 0]], "versus": 2},
    "slices": {"target": (3, slice(None), slice(1, 3)), "to_layer": "0"},
    "position": {"target": (3, 1, 1), "to_layer": "0"},
    "positions": {"target": [(3, 1, 1), (0, 0, 0)], "to_layer": "0"},
    "between layers": {"target": (1, 0, 0), "from_layer": "0", "to_layer": "2"},
    "from layer": {"from_layer": "2"},
}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("form", TARGETS)
def test_completeness_for_every_target(form, dtype, bound):
    network = bcos_network().to(dtype)
    e = bcoskit.explain(network, inputs(dtype), **TARGETS[form], shares=True)
    total = e.contributions.flatten(e.value.ndim).sum(-1) + sum(e.shares.values())
    scale = e.logits.abs().amax().clamp_min(1e-3)
    assert ((total - e.value).abs() / scale).max() <= bound
    assert e.residual.abs().max() <= bound
    assert e.weights.shape[: e.value.ndim] == e.value.shape


@pytest.mark.parametrize("make", [bcos_network, torch_network])
def test_completeness_and_its_control(make):
    network, x = make().double(), inputs(torch.float64)
    e = bcoskit.explain(network, x, shares=True)
    assert e.residual.abs().max() <= 1e-10
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(leaf.clone()).amax(1).sum(), leaf)
    plain = (gradient * x).flatten(1).sum(1) + sum(e.shares.values())
    assert ((plain - e.value) / e.value).abs().max() > 1e-3
    assert (gradient - e.weights).abs().max() > 1e-3


def test_shares_have_the_names_of_parameters_and_attributes():
    names = set(bcoskit.explain(bcos_network(), inputs(), shares=True).shares)
    assert names == {"1.running_mean", "1.bias", "3.bias", "6.logits.bias"}
    assert "1.position" in bcoskit.explain(torch_network(), inputs(), shares=True).shares


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext2", "test_efficientnet", "test_nfnet"])
def test_timm_networks(name):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=5).eval().double()
    e = bcoskit.explain(network, torch.rand(2, 3, 64, 64).double(), shares=True)
    assert e.residual.abs().max() <= 1e-10
    assert e.weights.any()


def test_shipped_model_in_batches():
    model = bcoskit.create_model("resnet20.bcos_cifar10", weights=True)
    x = bcoskit.encode(torch.rand(4, 3, 32, 32))
    e = bcoskit.explain(model, x, shares=True)
    assert e.residual.abs().max() <= 1e-5
    assert set(e.shares) == {"fc.logits.bias"}
    torch.testing.assert_close(e[2].weights, bcoskit.explain(model, x[2:3]).weights, rtol=1e-3, atol=1e-5)
    assert bcoskit.audit(model, x).passed


def test_audit_names_what_is_not_linear():
    class Digamma(nn.Module):
        def forward(self, x):
            return torch.digamma(x + 2)

    network = nn.Sequential(nn.Flatten(), nn.Linear(384, 4), Digamma()).eval()
    with pytest.raises(bcoskit.NotLinearError, match=r"torch\.digamma .* in module '2' at test_explain\.py:\d+"):
        bcoskit.explain(network, inputs())
    report = bcoskit.audit(network, inputs())
    assert not report.passed
    assert report.offenders[0].module == "2"
    assert report.numeric > 0
    assert bcoskit.audit(bcos_network(), inputs()).passed


class Reading(nn.Module):
    def forward(self, x):
        return 2 * x if (x.detach().sum() > 0).item() else 3 * x


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh().square())


class HiddenTanh(nn.Module):
    def forward(self, x):
        return Custom.apply(x)


class Interacting(nn.Module):
    def forward(self, x):
        return x * torch.rsqrt(x.var(0, correction=0, keepdim=True) + 1)


class Unfrozen(nn.Module):
    def forward(self, x):
        return torch.lgamma(x + 3)


@pytest.mark.parametrize(
    ("fault", "operation", "reason", "suggestion"),
    [
        (Reading(), "Tensor.item", "read by Python", "torch.where"),
        (HiddenTanh(), "HiddenTanh.forward", "own backward", "torch's operations"),
        (Interacting(), "Tensor.var", "other samples", "eval"),
        (Unfrozen(), "torch.lgamma", "not known to be linear", "bcoskit.rule"),
        (nn.BatchNorm1d(4, track_running_stats=False), "batch_norm", "statistics of the batch", "eval"),
    ],
)
def test_audit_names_planted_faults(fault, operation, reason, suggestion):
    network = nn.Sequential(nn.Flatten(), nn.Linear(384, 4), fault, nn.Linear(4, 3)).eval()
    report = bcoskit.audit(network, inputs())
    assert not report.passed
    found = [offender for offender in report.offenders if offender.operation == operation]
    assert [offender.module for offender in found[:1]] == ["2"]
    assert reason in found[0].reason
    assert suggestion in found[0].suggestion
    assert all(offender.module == "2" for offender in report.offenders)
    assert not any(module._forward_hooks for module in network.modules())
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks
    # The control: the same network without the fault.
    network[2] = nn.GELU().eval()
    assert bcoskit.audit(network, inputs()).passed


def test_product_policies():
    class Gated(nn.Module):
        def forward(self, x):
            return (x * torch.sigmoid(x).cumsum(1) * x.flip(1)).flatten(1)[:, :5]

    x = inputs(torch.float64)
    split, first = (bcoskit.explain(Gated().eval(), x, 0, products=p, shares=True) for p in ("split", "first"))
    assert max(split.residual.abs().max(), first.residual.abs().max()) <= 1e-10
    assert (split.weights - first.weights).abs().max() > 1e-3
    with pytest.raises(bcoskit.NotLinearError, match="multiplies two tensors"):
        bcoskit.explain(Gated().eval(), x, 0, products="error")
    for network in (Gated().eval(), bcoskit.create_model("resnet20.bcos_cifar10").double()):
        with pytest.raises(ValueError, match=r"`products` \(='half'\) must be one of split, first, error"):
            bcoskit.explain(network, x, 0, products="half")


def test_threads_give_the_results_of_one():
    network, batches = bcos_network(), [inputs() * (0.5 + k / 20) for k in range(8)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = [bcoskit.explain(network, x).weights for x in batches]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda x: bcoskit.explain(network, x).weights, batches * 3))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone * 3, together, strict=True))
    t = torch.ones(1, requires_grad=True)
    assert bcoskit.freeze(t) is t


REFUSALS = {
    "training": (lambda n, x: bcoskit.explain(n.train(), x), ValueError, "call `model.eval"),
    "integer": (lambda n, x: bcoskit.explain(n, (x * 255).long()), TypeError, "encode the images first"),
    "half": (lambda n, x: bcoskit.explain(n, x.half()), TypeError, "x.float"),
    "nan": (lambda n, x: bcoskit.explain(n, x * float("nan")), ValueError, "not finite"),
    "empty": (lambda n, x: bcoskit.explain(n, x[:0]), ValueError, "at least one sample"),
    "target range": (lambda n, x: bcoskit.explain(n, x, 5), ValueError, r"`target` \(=5\) is out of range"),
    "negative": (lambda n, x: bcoskit.explain(n, x, -1), ValueError, "out of range"),
    "target type": (lambda n, x: bcoskit.explain(n, x, 1.5), TypeError, "class index"),
    "target function": (lambda n, x: bcoskit.explain(n, x, lambda logits: None), TypeError, "returned None"),
    "target shape": (lambda n, x: bcoskit.explain(n, x, [1, 2]), ValueError, "one per sample"),
    "no target": (lambda n, x: bcoskit.explain(n, x, []), ValueError, r"`target` of shape \(0,\) must be one class"),
    "target tuple": (lambda n, x: bcoskit.explain(n, x, (1, 2, 3)), ValueError, "a list or a tensor"),
    "empty slice": (lambda n, x: bcoskit.explain(n, x, (0, slice(9, 9), 0), to_layer="0"), ValueError, "nothing"),
    "channels": (lambda n, x: bcoskit.explain(n, x, channel_dim=4), ValueError, r"`channel_dim` \(=4\)"),
    "channel": (lambda n, x: bcoskit.explain(n, x, channel_dim=1.5), ValueError, r"`channel_dim` \(=1\.5\)"),
    "products": (lambda n, x: bcoskit.explain(n, x, products="third"), ValueError, r"`products` \(='third'\)"),
    "products of a known network": (
        lambda n, x: bcoskit.explain(nn.Sequential(n[0]).eval(), x, (0, 1, 1), products="third"),
        ValueError,
        r"`products` \(='third'\)",
    ),
    "no layer": (lambda n, x: bcoskit.explain(n, x, to_layer="nothing"), ValueError, "no layer of the network"),
    "map without position": (lambda n, x: bcoskit.explain(n, x, to_layer="0"), ValueError, "give a position"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_refusals_leave_everything_as_it_was(kind):
    call, error, message = REFUSALS[kind]
    network, x = bcos_network(), inputs()
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    random, before = torch.get_rng_state(), {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(error, match=message):
        call(network, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all((p.grad == 1).all() and p.requires_grad for p in network.parameters())
    assert not any(m._forward_hooks for m in network.modules())
    assert x.grad is None
    assert not x.requires_grad
    assert not torch.overrides._get_current_function_mode_stack()


def test_inference_mode_is_refused_and_no_grad_is_not():
    network, x = bcos_network(), inputs()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="outside"):
        bcoskit.explain(network, x)
    with torch.inference_mode():
        made_inside = x.clone()
    with pytest.raises(RuntimeError, match=r"`x` was made in .* give `x.clone\(\)`"):
        bcoskit.explain(network, made_inside)
    assert torch.equal(bcoskit.explain(network, made_inside.clone()).weights, bcoskit.explain(network, x).weights)
    with torch.no_grad():
        assert bcoskit.explain(network, x).weights.any()


def test_one_sample_by_an_integer_of_numpy():
    e = bcoskit.explain(bcos_network(), inputs())
    for index in (1, -1):
        one, expected = e[np.int64(index)], e[index]
        assert one.weights.shape == expected.weights.shape
        assert torch.equal(one.contributions, expected.contributions)
    with pytest.raises(IndexError, match="`index`"):
        e[np.int64(len(e))]


def test_targets_of_numpy_and_of_narrow_types():
    network, x = nn.Sequential(nn.Flatten(), nn.Linear(384, 300)).eval(), inputs()
    expected = bcoskit.explain(network, x, [232, 240, 100])
    for target in (np.array([232, 240, 100]), torch.tensor([232, 240, 100], dtype=torch.uint8)):
        e = bcoskit.explain(network, x, target)
        assert torch.equal(e.target, expected.target)
        assert torch.equal(e.weights, expected.weights)
    assert torch.equal(bcoskit.explain(network, x, np.int64(7)).value, expected.logits[:, 7])
    position = tuple(np.unravel_index(5, (8, 8, 8)))
    e = bcoskit.explain(bcos_network(), x, position, to_layer="0")
    assert torch.equal(e.value, e.logits.flatten(1)[:, 5])


@pytest.mark.parametrize("shares", [False, True])
def test_functions_of_the_output_may_write_to_it(shares):
    network, x = bcos_network(), inputs()

    def second_best(logits):
        logits.scatter_(1, logits.argmax(1, keepdim=True), -torch.inf)
        return logits.argmax(1)

    expected = bcoskit.explain(network, x, shares=shares)
    e = bcoskit.explain(network, x, second_best, shares=shares)
    assert torch.equal(e.logits, expected.logits)
    assert torch.equal(e.target, expected.logits.topk(2).indices[:, 1])
    assert torch.equal(e.value, expected.logits.gather(1, e.target[:, None])[:, 0])


def test_one_sample_of_several():
    e = bcoskit.explain(bcos_network(), inputs(), 1)
    for index in (1, -2, np.int64(1), torch.tensor(1)):
        one = e[index]
        assert one.weights.shape == (1, *e.weights.shape[1:])
        assert torch.equal(one.contributions, e.contributions[1:2])
    with pytest.raises(IndexError, match=r"`index` \(=3\)"):
        e[np.int64(3)]
    for index in ([0, 2], None, "a"):
        with pytest.raises(TypeError):
            e[index]


def test_pictures_of_targets():
    one, two = (bcoskit.explain(bcos_network(), inputs(), target) for target in (1, [[0, 1]]))
    assert one.to_image(2, target=-1).tobytes() == one.to_image(2).tobytes() == two.to_image(2, target=1).tobytes()
    for e, target in ((one, 1), (one, -2), (two, 2)):
        with pytest.raises(IndexError):
            e.to_image(target=target)


def test_inputs_are_left_alone_when_layers_write_to_them():
    network = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3), nn.Hardtanh(-0.1, 0.1, inplace=True)).eval()
    x = inputs() - 0.5
    before = x.clone()
    for leaf in (x, x.clone().requires_grad_()):
        for layers in ({"from_layer": "1"}, {"to_layer": "1"}, {}):
            e = bcoskit.explain(network, leaf, (0, 1, 1), shares=True, **layers)
            assert torch.equal(leaf, before)
            assert e.residual.abs().max() <= 1e-5
    with pytest.raises(ValueError, match="out of range"):
        bcoskit.explain(network, x, (9, 1, 1), from_layer="1")
    assert torch.equal(x, before)


def test_compiled_networks_and_layers_run_uncompiled():
    torch.compiler.reset()
    expected = bcoskit.explain(bcos_network(), inputs(), 1, shares=True)
    whole, itself, layer, twice = (bcos_network() for _ in range(4))
    itself.compile(backend="aot_eager")
    layer[2].compile(backend="aot_eager")
    twice[2] = torch.compile(twice[2], backend="aot_eager")
    reference = bcos_network()
    function = torch.compile(lambda x: reference(x), backend="aot_eager")
    for network in (torch.compile(whole, backend="aot_eager"), itself, layer, twice, function):
        with torch.no_grad():
            network(inputs())
        e = bcoskit.explain(network, inputs(), 1, shares=True)
        assert torch.equal(e.weights, expected.weights)
        assert e.residual.abs().max() <= 1e-5
    assert itself._compiled_call_impl is not None
    assert type(twice[2]).__name__ == "OptimizedModule"
    assert bcoskit.audit(layer, inputs()).passed


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_save_and_load_where_value_and_output_are_one_tensor(tmp_path, suffix):
    e = bcoskit.explain(lambda x: x.flatten(1).sum(1), inputs())
    e.save(tmp_path / f"e{suffix}")
    loaded = bcoskit.Explanation.load(tmp_path / f"e{suffix}")
    assert torch.equal(loaded.value, e.value)
    assert loaded.target is None


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_save_and_load_from_a_layer_of_one_number_per_sample(tmp_path, suffix):
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.head = nn.Flatten(0), nn.Unflatten(0, (-1, 1))

        def forward(self, x):
            return self.head(self.narrow(x.flatten(1).sum(1, keepdim=True)))

    e = bcoskit.explain(Narrow().eval(), inputs(), from_layer="narrow")
    assert e.x.shape == (3,)
    e.save(tmp_path / f"e{suffix}")
    loaded = bcoskit.Explanation.load(tmp_path / f"e{suffix}")
    assert torch.equal(loaded.contributions, e.contributions)
    assert torch.equal(loaded.bias, e.bias)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_save_and_load(tmp_path, suffix):
    e = bcoskit.explain(bcos_network(), inputs(), [[0, 1]], shares=True)
    path = tmp_path / f"e{suffix}"
    e.save(path)
    loaded = bcoskit.Explanation.load(path)
    assert torch.equal(loaded.weights, e.weights)
    assert all(torch.equal(loaded.shares[name], share) for name, share in e.shares.items())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="no intact"):
        bcoskit.Explanation.load(path)
    with pytest.raises(ValueError, match=r"\.safetensors or \.npz"):
        e.save(tmp_path / "e.pkl")
    missing = tmp_path / "none" / path.name
    with pytest.raises(FileNotFoundError) as caught:
        e.save(missing)
    assert caught.value.filename == str(missing)


def test_files_whose_tensors_do_not_belong_together(tmp_path):
    e = bcoskit.explain(bcos_network(), inputs(), [[0, 1]], versus=2, shares=True)
    for name, wrong in (
        ("weights", e.weights[..., :1]),
        ("weights", e.weights[:1]),
        ("logits", e.logits[:1]),
        ("value", e.value[:, 0]),
        ("target", e.target + 99),
        ("target", e.target.float()),
        ("versus", e.versus[:1]),
        ("x", e.x[0, 0, 0, 0]),
        ("shares", {"bias": e.value[:1]}),
        ("channel_dim", "first"),
        ("products", "third"),
    ):
        dataclasses.replace(e, **{name: wrong}).save(tmp_path / "wrong.npz")
        with pytest.raises(ValueError, match=r"wrong\.npz: holds no explanation: "):
            bcoskit.Explanation.load(tmp_path / "wrong.npz")
    for whole in (e, e[1], e[:0], bcoskit.explain(bcos_network(), inputs(), (0, 1, 1), to_layer="0")):
        whole.save(tmp_path / "whole.npz")
        assert torch.equal(bcoskit.Explanation.load(tmp_path / "whole.npz").weights, whole.weights)


def test_gradients_of_explanations_are_complete():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Flatten(2), nn.Linear(16, 8), bnn.Attention(8, 2), nn.LayerNorm(8), nn.GELU(), nn.Flatten(), nn.Linear(16, 3)
    )
    network = network.double().eval()
    x, direction = torch.randn(2, 2, 4, 4).double(), torch.randn(2, 2, 4, 4).double()
    weight = network[1].weight

    def objective():
        return float((bcoskit.explain(network, x, 1).weights * direction).sum())

    e = bcoskit.explain(network, x, 1, create_graph=True)
    (gradient,) = torch.autograd.grad((e.weights * direction).sum(), weight, retain_graph=True)
    step = 1e-5 * torch.randn_like(weight)
    with torch.no_grad():
        weight += step
        above = objective()
        weight -= 2 * step
        below = objective()
        weight += step
    assert (above - below) / 2 == pytest.approx(float((gradient * step).sum()), rel=1e-5)
    (logits,) = torch.autograd.grad(e.logits.sum(), weight)
    (ordinary,) = torch.autograd.grad(network(x).sum(), weight)
    torch.testing.assert_close(logits, ordinary)


def weights_by_func(network, x):
    with bcoskit.explanation_mode():
        return torch.func.grad(lambda x: network(x)[:, 1].sum())(x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own forward mode
def test_func_transforms():
    network, x = bcos_network().double(), inputs(torch.float64)
    e = bcoskit.explain(network, x, 1)
    torch.testing.assert_close(weights_by_func(network, x), e.weights)
    with bcoskit.explanation_mode():
        _, tangent = torch.func.jvp(network, (x,), (x,))
    torch.testing.assert_close(tangent[:, 1], e.contributions.flatten(1).sum(1))


def test_compiled_inside_and_outside():
    torch.compiler.reset()
    network, x = bcos_network(), inputs()
    expected = bcoskit.explain(network, x, 1).weights
    torch.testing.assert_close(torch.compile(weights_by_func, fullgraph=True, backend="eager")(network, x), expected)
    compiled, leaf = torch.compile(network, fullgraph=True, backend="aot_eager"), x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(compiled(leaf)[:, 1].sum(), leaf)
    with bcoskit.explanation_mode():
        (frozen,) = torch.autograd.grad(compiled(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(frozen, expected)
    assert (plain - expected).abs().max() > 1e-3
    torch.testing.assert_close(bcoskit.explain(compiled, x, 1).weights, expected)


def test_autocast_does_not_reach_explanations():
    network, x = bcos_network(), inputs()
    expected = bcoskit.explain(network, x, 1).weights
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bcoskit.explain(network, x, 1).weights, expected)


class Written(nn.Module):
    """Writes to its input, and to views, by operations of every kind."""

    def __init__(self, write) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.write = write

    def forward(self, x):
        x.sub_(0.5).mul_(2)
        y = self.linear(x)
        self.write(y)
        return y


WRITES = {
    "add": lambda y: y[:, 1:].add_(1),
    "item": lambda y: y.__setitem__((slice(None), 0), 1),
    "power": lambda y: y[:, 1:].__ipow__(2),
    "sigmoid": lambda y: y[:, 1:].sigmoid_(),
    "silu": lambda y: nn.functional.silu(y, inplace=True),
    "hardsigmoid": lambda y: nn.functional.hardsigmoid(y, inplace=True),
    "square": lambda y: y.square_(),
    "product": lambda y: y.mul_(y.flip(1)),
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("kind", WRITES)
def test_networks_that_write_in_place(kind, create_graph):
    torch.manual_seed(0)
    network, x = Written(WRITES[kind]).double().eval(), torch.randn(3, 6).double()
    before = x.clone()
    e = bcoskit.explain(network, x, 2, shares=True, create_graph=create_graph)
    assert torch.equal(x, before)
    assert torch.equal(e.x, before)
    assert e.residual.abs().max() <= 1e-10
    torch.testing.assert_close(e.logits.detach(), network(x.clone()).detach())


def test_hidden_nonlinearities_are_refused():
    class Relu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, gradient):
            return 2 * ctx.saved_tensors[0] * gradient

    x = torch.randn(2, 6)
    with pytest.raises(bcoskit.NotLinearError, match="its own backward"):
        bcoskit.explain(lambda x: Relu.apply(x), x)
    with pytest.raises(bcoskit.NotLinearError, match="digamma"):
        bcoskit.explain(Written(lambda y: y[:, 1:].digamma_()).eval(), x, 2)
    with pytest.raises(RuntimeError, match="activation checkpointing"):
        bcoskit.explain(lambda x: torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False), x)


def test_parameters_stay_themselves_inside():
    network = nn.Linear(6, 6).eval()

    def renormed(x):
        network.weight.data = torch.renorm(network.weight.data, 2, 0, 0.5)
        assert network.weight.requires_grad
        return network(x)

    x = torch.randn(2, 6)
    torch.testing.assert_close(bcoskit.explain(renormed, x).logits, renormed(x).detach())


SATURATIONS = {
    "clamp": lambda x: x.clamp(0, 1),
    "clamp in place": lambda x: (x * 1).clamp_(0, 1),
    "relu6": lambda x: nn.functional.relu6(6 * x),
    "hardtanh": lambda x: nn.functional.hardtanh(x, 0, 1),
    "maximum": lambda x: torch.maximum(x, torch.ones(1, dtype=x.dtype)),
    "minimum": lambda x: torch.minimum(x, 1 - x.flip(1)),
}


@pytest.mark.parametrize("kind", SATURATIONS)
def test_saturation_at_the_bound_itself(kind):
    x = torch.tensor([[0.0, 1.0, 0.5, -1.0, 2.0, 1.0]], dtype=torch.float64)
    for target in range(6):
        e = bcoskit.explain(SATURATIONS[kind], x, target, shares=True)
        assert e.residual.abs().max() <= 1e-12


def test_names_of_shares_stay_short():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return x + self.b(torch.tanh(self.a(x)))

    network = nn.Sequential(*(Block() for _ in range(12))).double().eval()
    e = bcoskit.explain(network, torch.rand(1, 6).double(), 1, from_layer="11.a", shares=True)
    assert e.residual.abs().max() <= 1e-10
    assert max(len(name) for name in e.shares) < 100


def test_what_changes_gradients_behind_the_graph_is_refused():
    x = torch.rand(2, 6)

    def hooked(x):
        y = x * 1
        y.register_hook(lambda gradient: 3 * gradient)
        return y

    def ungraphed(x):
        y = x * 1
        with torch.no_grad():
            y.clamp_(0.3, 0.6)
        return y

    class _FreezeFunction(torch.autograd.Function):  # the name alone hides nothing
        @staticmethod
        def forward(ctx, x):
            return x.exp()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    for network, message in (
        (hooked, "remove the hook"),
        (ungraphed, "write to a copy"),
        (_FreezeFunction.apply, "its own backward"),
    ):
        with pytest.raises(bcoskit.NotLinearError, match=message):
            bcoskit.explain(network, x, 1)
    with pytest.raises(TypeError, match="let the network run in float32"):
        bcoskit.explain(lambda x: x.bfloat16(), x, 1)
    with pytest.raises(ValueError, match="Explain the logits"):
        bcoskit.explain(lambda x: x.softmax(1), x, 1)


def test_views_that_change_their_shape_in_place():
    def turned(x):
        y = (x * 1).view(-1, 2, 3)
        view = y[:, :2, :2]
        view.transpose_(1, 2)
        return view.reshape(-1, 4) + y[:, :, :2].reshape(-1, 4)

    def rounded(x):
        y = x * 1
        y.div_(0.1, rounding_mode="floor")
        return y + x

    x = torch.rand(2, 6).double()
    for network in (turned, rounded):
        e = bcoskit.explain(network, x, 1, shares=True)
        torch.testing.assert_close(e.logits, network(x))
        assert e.residual.abs().max() <= 1e-12


def test_dropout_that_never_ends_is_refused():
    x = torch.rand(2, 6)
    for network in (
        nn.functional.dropout,
        lambda x: torch.dropout(x, 0.5, True),
        lambda x: nn.functional.alpha_dropout(x, training=True),
    ):
        with pytest.raises(bcoskit.NotLinearError, match="is random"):
            bcoskit.explain(network, x, 1)
    for network in (nn.Dropout(0.5).eval(), lambda x: nn.functional.dropout(x, 0.5, False), lambda x: x * 1):
        assert torch.equal(bcoskit.explain(network, x, 1).value, x[:, 1])


def test_an_empty_network_that_was_compiled():
    x = torch.rand(2, 6)
    assert torch.equal(bcoskit.explain(torch.compile(nn.Sequential().eval(), backend="eager"), x, 1).value, x[:, 1])


def test_shares_complete_the_value_of_their_own_pass():
    class Uneven(nn.Module):
        """Stands for rounding, which is another one with another number of samples, where a network makes it large."""

        def forward(self, x):
            return x * (1 + 1e-3 * len(x))

    torch.manual_seed(0)
    network = nn.Sequential(bnn.BcosConv2d(6, 4, 3), Uneven(), nn.Flatten()).eval()
    found = bcoskit.explain(network, bcoskit.encode(torch.rand(3, 3, 6, 6)), shares=True)
    assert float(found.residual.abs().max()) < 1e-6
    assert torch.allclose(found.contributions.sum((1, 2)), found.value, rtol=1e-5)


def small():
    torch.manual_seed(3)
    layers = [bnn.BcosConv2d(6, 4, 3, padding=1), nn.SiLU(), bnn.BcosConv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten()).double().eval()


@pytest.mark.parametrize("outer", [{}, {"create_graph": True}, {"products": "first"}])
def test_modes_within_modes_have_complete_derivatives(outer):
    network, x = small(), torch.rand(2, 6, 8, 8, dtype=torch.float64)

    def derivative(explanation):
        return torch.autograd.grad(explanation.weights.square().sum(), network[0].weight)[0]

    expected = derivative(bcoskit.explain(network, x, 0, create_graph=True))
    with bcoskit.explanation_mode(**outer):
        explanation = bcoskit.explain(network, x, 0, create_graph=True)
    torch.testing.assert_close(derivative(explanation), expected)
    with bcoskit.explanation_mode(**outer):
        inside = bcoskit.explain(network, x, 0).weights  # a mode without a graph within is as before
    torch.testing.assert_close(inside, explanation.weights.detach())
    assert expected.abs().max() > 1e-6


def test_parameters_that_are_read_without_a_graph_keep_theirs():
    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 4, bias=False), bnn.BcosLinear(4, 2)

        def forward(self, x):
            with torch.no_grad():
                self.first.weight.norm()
            return self.second(self.first(x))

    network = Watched().eval()
    bcoskit.explain(network, torch.rand(2, 6), 0, create_graph=True).weights.square().sum().backward()
    assert network.first.weight.grad.abs().max() > 1e-3


def test_parameters_may_be_changed_inside():
    layer = nn.Linear(3, 1)
    with bcoskit.explanation_mode(create_graph=True):
        nn.init.ones_(layer.weight)
        layer.bias.requires_grad_(False)
    with bcoskit.explanation_mode():
        layer.weight.requires_grad_(False)
    assert layer.weight.tolist() == [[1, 1, 1]]
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad


@pytest.mark.parametrize("normalize", [True, False])
def test_weights_that_depend_on_the_input_are_factors(normalize):
    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.made = nn.Linear(6, 24, bias=False)

        def forward(self, x):
            return bcoskit.functional.bcos_linear(x, self.made(x[0]).reshape(4, 6), normalize_weight=normalize)

    network, x = Hyper().eval(), torch.rand(1, 6)
    split, first = (bcoskit.explain(network, x, 0, products=products) for products in ("split", "first"))
    with_graph = bcoskit.explain(network, x, 0, create_graph=True).weights
    torch.testing.assert_close(split.weights, with_graph.detach())
    assert (split.weights - first.weights).abs().max() > 1e-3
    for each in (split, first):
        torch.testing.assert_close(each.contributions.sum(), each.value[0])
    with pytest.raises(bcoskit.NotLinearError, match="multiplies two"):
        bcoskit.explain(network, x, 0, products="error")


def test_statistics_of_the_batch_are_refused_by_the_fast_way_too():
    norm = bnn.BatchNorm(6, centered=True, track_running_stats=False)
    network = nn.Sequential(norm, bnn.BcosConv2d(6, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    for options in ({}, {"create_graph": True}, {"shares": True}):
        with pytest.raises(bcoskit.NotLinearError, match="statistics of the batch"):
            bcoskit.explain(network, torch.rand(3, 6, 5, 5), 0, **options)


def test_functions_are_asked_of_the_whole_batch():
    network, x = nn.Sequential(bnn.BcosConv2d(6, 3, 3, padding=1)).eval(), torch.rand(3, 6, 5, 5)
    asked = []

    def where(output):
        asked.append(len(output))
        return (0, *divmod(int(output[0, 0].argmax()), 5))

    plain, completed = (bcoskit.explain(network, x, where, shares=shares) for shares in (False, True))
    torch.testing.assert_close(plain.value, completed.value)
    assert completed.residual.abs().max() < 1e-5
    assert set(asked) == {3}


def test_what_comes_before_the_input_is_not_audited():
    network = small().float()
    patch = torch.rand(2, 6, 2, 2, requires_grad=True)
    x = torch.rand(2, 6, 8, 8)
    x[:, :, 2:4, 2:4] = patch
    first = bcoskit.explain(network, x, 0, create_graph=True)
    second = bcoskit.explain(network, x + (first.weights / first.weights.norm()).exp(), 0, create_graph=True)
    second.weights.square().sum().backward()
    assert patch.grad.abs().max() > 0
    with pytest.raises(bcoskit.NotLinearError, match="digamma"):  # the control: behind the input it is
        bcoskit.explain(lambda x: network(torch.digamma(x + 2)), x.detach(), 0, create_graph=True)


def test_weights_of_attention_need_be_no_parameters():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(4, 2, batch_first=True), bnn.BcosLinear(4, 2)

        def forward(self, x):
            return self.last(self.attention(x, x, x)[0].mean(1))

    network, x = Attention().eval(), torch.rand(2, 5, 4)
    fast = {name: values.detach().clone().requires_grad_() for name, values in network.named_parameters()}
    found = bcoskit.explain(lambda x: torch.func.functional_call(network, fast, (x,)), x, 0)
    torch.testing.assert_close(found.weights, bcoskit.explain(network, x, 0).weights)


@pytest.mark.parametrize("way", ["copy", "add", "narrow"])
def test_shares_of_constants_around_a_view_that_is_written_to(way):
    class Padded(nn.Module):
        def forward(self, x):
            whole = torch.arange(1, 7).to(x.dtype).expand(len(x), 6).clone()
            if way == "copy":
                whole[:, :4].copy_(x)
            elif way == "add":
                whole[:, :4] += x
            else:
                whole.narrow(1, 0, 4).add_(x)
            return whole.cumsum(1)

    x = torch.rand(2, 4)
    found = bcoskit.explain(Padded().eval(), x, 5, shares=True)
    torch.testing.assert_close(sum(found.shares.values()), torch.full((2,), 11.0 if way == "copy" else 21.0))
    assert found.residual.abs().max() < 1e-5
    assert bcoskit.audit(Padded().eval(), x, 5).passed


def test_a_layer_with_one_number_per_sample():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.squeeze = nn.Linear(4, 1), nn.Flatten(0)

        def forward(self, x):
            return torch.stack([self.squeeze(self.first(x)), torch.ones(len(x))], 1)

    found = bcoskit.explain(Single().eval(), torch.rand(3, 4), 0, from_layer="squeeze")
    torch.testing.assert_close(found.contributions, found.value)
    torch.testing.assert_close(found.bias, torch.zeros(3))
