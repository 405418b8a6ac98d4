"""Attribution methods: agreement with captum and with slow loops, many targets at once, nothing left behind."""

from functools import partial

import captum.attr
import numpy as np
import pytest
import timm
import torch

import bcoskit
from bcoskit.evaluation import METHODS, attribute, quantus_explain, randomization
from bcoskit.evaluation.captum import BcosAttribution
from evaluation_toys import images, noise, patches, small

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:captum", "ignore::UserWarning:torch")
FEW = {"rise": {"count": 20}, "lime": {"count": 20}, "kernel_shap": {"count": 20}}
X = torch.stack([x for x, _ in noise(2)])
TARGET = torch.tensor([[0, 3], [2, 1]])


def method(name):
    return partial(METHODS[name], **FEW[name]) if name in FEW else name


def of_captum(name, model, x, target):
    """As captum's documentation has it, for one target per sample."""
    model = small()  # captum sets hooks, which do not bear an activation in place
    model.act1.inplace = False
    x = x.clone().requires_grad_()
    if name == "gradient":
        return captum.attr.Saliency(model).attribute(x, target, abs=False)
    if name == "input_x_gradient":
        return captum.attr.InputXGradient(model).attribute(x, target)
    if name == "integrated_gradients":
        return captum.attr.IntegratedGradients(model).attribute(x, target=target, n_steps=50)
    if name == "deep_lift":
        return captum.attr.DeepLift(model).attribute(x, target=target)
    if name == "guided_backprop":
        return captum.attr.GuidedBackprop(model).attribute(x, target)
    if name == "occlusion":
        return captum.attr.Occlusion(model).attribute(x, (3, 5, 5), (3, 2, 2), target=target)
    if name == "guided_grad_cam":
        guided = captum.attr.GuidedGradCam(model, model.act2)
        return guided.attribute(x, target, interpolate_mode="nearest")
    layer = captum.attr.LayerGradCam(model, model.act2)
    return captum.attr.LayerAttribution.interpolate(layer.attribute(x, target, relu_attributions=True), (8, 8))


@pytest.mark.parametrize(
    "name",
    [
        "gradient",
        "input_x_gradient",
        "integrated_gradients",
        "deep_lift",
        "guided_backprop",
        "grad_cam",
        "guided_grad_cam",
        "occlusion",
    ],
)
def test_agreement_with_captum(name):
    found = attribute(small(), X, TARGET, name)
    for k in range(2):
        expected = of_captum(name, small(), X, TARGET[:, k]).sum(1)
        torch.testing.assert_close(found[:, k], expected.detach(), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(found[:, 1 - k], expected)


def test_ours_is_explain():
    model = patches()
    x = torch.stack([x for x, _ in images(3)])
    assert torch.equal(attribute(model, x, [0, 1, 2]), bcoskit.explain(model, x, [0, 1, 2]).contributions)


@pytest.mark.parametrize("name", METHODS)
def test_several_targets_are_targets_one_by_one(name):
    model = small()
    together = attribute(model, X, TARGET, method(name))
    assert together.shape == (2, 2, 8, 8)
    for k in range(2):
        torch.testing.assert_close(attribute(model, X, TARGET[:, k], method(name)), together[:, k])
        for n in range(2):
            alone = attribute(model, X[n : n + 1], int(TARGET[n, k]), method(name))
            torch.testing.assert_close(alone[0], together[n, k], rtol=1e-4, atol=1e-6)


def state_of(model):
    return {
        "training": [module.training for module in model.modules()],
        "inplace": [getattr(module, "inplace", None) for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._backward_hooks) + len(module._forward_pre_hooks)
                  for module in model.modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "grads": [parameter.grad for parameter in model.parameters()],
        "requires": [parameter.requires_grad for parameter in model.parameters()],
        "values": [parameter.detach().clone() for parameter in model.parameters()],
    }  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_left_behind(name):
    model, x = small(), X.clone()
    before, random = state_of(model), torch.get_rng_state()
    attribute(model, x, TARGET, method(name))
    with pytest.raises((ValueError, IndexError, AssertionError)):
        attribute(model, x, [[7], [9]], method(name))
    after = state_of(model)
    for key in set(before) - {"values"}:
        assert before[key] == after[key], key
    assert all(torch.equal(a, b) for a, b in zip(before["values"], after["values"], strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, X)
    assert not x.requires_grad


def test_rise_is_a_slow_loop():
    model = patches()
    x = torch.stack([x for x, _ in images(2)])
    found = attribute(model, x, [[0, 1], [1, 2]], partial(METHODS["rise"], count=7, cells=2, batch_size=7))
    generator = torch.Generator().manual_seed(42)
    grids = (torch.rand(7, 1, 2, 2, generator=generator) < 0.1).float()
    tops = torch.randint(2, (7,), generator=generator)
    lefts = torch.randint(2, (7,), generator=generator)
    expected = torch.zeros(2, 2, 4, 4)
    for index in range(7):
        large = torch.nn.functional.interpolate(grids[index][None], (6, 6), mode="bilinear")[0, 0]
        mask = large[tops[index] : tops[index] + 4, lefts[index] : lefts[index] + 4]
        for n in range(2):
            p = torch.sigmoid(model((x[n] * mask)[None])[0])
            for k, target in enumerate([[0, 1], [1, 2]][n]):
                expected[n, k] += p[target] * mask / (7 * 0.1)
    torch.testing.assert_close(found, expected)


def bright_corner():
    """An image with a bright corner on a darker ground, two segments, and a network that looks at the corner only."""

    class Corner(torch.nn.Module):
        def forward(self, x):
            seen = x[:, 0, 4:8, 4:8].mean((1, 2))
            return torch.stack([8 * seen - 3, -8 * seen], 1)

    x = torch.full((1, 3, 48, 48), 0.2)
    x[:, :, :24, :24] = torch.tensor([0.9, 0.1, 0.1]).view(3, 1, 1)
    x[:, :, 4:8, 4:8] += 0.1  # so that the mean colour of the segment is another one
    return Corner().eval(), x


def test_lime_shows_the_segment_that_counts():
    model, x = bright_corner()
    shown = attribute(model, x, [[0, 1]], partial(METHODS["lime"], features=1))[0]
    assert shown[0, :24, :24].min() == 1
    assert shown[0].sum() == 24**2
    assert shown[1, :24, :24].max() == 0


def test_kernel_shap_has_shapley_values():
    """The network sees one segment alone, whose Shapley value is the whole difference, and 0 for the other."""
    model, x = bright_corner()
    hidden = x.clone()
    hidden[:, :, :24, :24] = x[:, :, :24, :24].mean((2, 3), keepdim=True)
    difference = (model(x).sigmoid() - model(hidden).sigmoid())[0]
    values = attribute(model, x, [[0, 1]], "kernel_shap")[0]
    assert values[:, 0, 0].tolist() == pytest.approx(difference.tolist(), abs=1e-4)
    assert values[:, 40, 40].tolist() == pytest.approx([0, 0], abs=1e-4)


def test_functions_and_attributions_of_captum_plug_in():
    model = small()
    seen = []

    def function(model, x, target):
        seen.append(target.tolist())
        return (x * x).requires_grad_()

    assert torch.equal(attribute(model, X, TARGET, function), (X * X).sum(1)[:, None].expand(2, 2, 8, 8))
    assert seen == [[0, 2], [3, 1]]
    expected = attribute(model, X, TARGET, "input_x_gradient")
    torch.testing.assert_close(attribute(model, X, TARGET, captum.attr.InputXGradient), expected)
    torch.testing.assert_close(attribute(model, X, TARGET, captum.attr.InputXGradient(model)), expected)
    assert not torch.allclose(attribute(model, X, TARGET, captum.attr.Saliency), expected)


def test_ours_plugs_into_captum():
    model = patches()
    x = torch.stack([x for x, _ in images(2)])
    found = BcosAttribution(model).attribute(x, target=torch.tensor([0, 1]))
    torch.testing.assert_close(found.sum((1, 2, 3)), model(x)[torch.arange(2), torch.tensor([0, 1])])
    assert not BcosAttribution(model).has_convergence_delta()
    tunnel = captum.attr.NoiseTunnel(BcosAttribution(model))
    smooth = tunnel.attribute(x, nt_samples=2, nt_type="smoothgrad", stdevs=0.0, target=torch.tensor([0, 1]))
    torch.testing.assert_close(smooth, found)


@pytest.mark.filterwarnings("ignore")
def test_ours_plugs_into_quantus():
    import quantus

    model = patches(scale=8)
    x = torch.stack([x for x, _ in images(4, strength=0.5)]).numpy()  # whose sums are exact, as Quantus wants them
    labels = np.arange(4)
    maps = quantus_explain(model, x, labels)
    assert np.allclose(maps.sum(1), x[np.arange(4), labels] * 8 / 16)
    complete = quantus.Completeness(output_func=lambda y: y, disable_warnings=True, abs=False, normalise=False)
    options = {"batch_size": 4, "channel_first": True}
    assert all(complete(model, x, labels, explain_func=quantus_explain, **options))
    wrong = complete(model, x, labels, explain_func=lambda **given: 2 * quantus_explain(**given), **options)
    assert not any(wrong)


def test_grad_cam_needs_maps():
    transformer = timm.create_model("test_vit", num_classes=4).eval()
    x = torch.rand(1, 3, 160, 160)
    with pytest.raises(ValueError, match=r"grad_cam.*needs a layer with maps"):
        attribute(transformer, x, 0, "grad_cam")
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4)).eval()
    with pytest.raises(ValueError, match="no layer returns maps"):
        attribute(flat, X, 0, "grad_cam")
    with pytest.raises(ValueError, match="no layer of the network"):
        attribute(small(), X, 0, partial(METHODS["grad_cam"], layer="nothing"))
    with pytest.raises(ValueError, match=r"returns no maps, but \(2, 4\)"):
        attribute(small(), X, 0, partial(METHODS["grad_cam"], layer=list(dict(small().named_modules()))[-1]))
    early = attribute(small(), X, 0, partial(METHODS["grad_cam"], layer="act1"))
    assert not torch.allclose(early, attribute(small(), X, 0, "grad_cam"))


def test_grad_cam_of_maps_that_are_written_to_afterwards():
    class Following(torch.nn.Module):
        def __init__(self, in_place):
            super().__init__()
            self.in_place = in_place

        def forward(self, x):
            return x.mul_(x.sigmoid()) if self.in_place else x * x.sigmoid()

    torch.manual_seed(0)
    conv, head = torch.nn.Conv2d(3, 8, 3), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4))
    cam = partial(METHODS["grad_cam"], layer="0")
    found = [attribute(torch.nn.Sequential(conv, Following(way), head).eval(), X, TARGET, cam) for way in (True, False)]
    torch.testing.assert_close(*found)
    assert found[0].max() > 0


def test_grad_cam_of_a_network_by_name_reads_its_last_stage():
    from bcoskit.evaluation._gradients import last_map

    model = bcoskit.create_model("resnet20.bcos_cifar10")
    assert last_map(model.eval(), torch.rand(1, 6, 32, 32)) == model.stage_names[-1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "saliency"}, ValueError, "unknown; there are: bcos, gradient"),
        ({"method": 3}, TypeError, "must be a name, a function"),
        ({"method": lambda m, x, t: x[:, 0, :2]}, ValueError, "of shape"),
        ({"method": lambda m, x, t: None}, TypeError, "must return a tensor"),
        ({"method": lambda m, x, t: x[:, 0] * torch.nan}, ValueError, "not finite"),
        ({"target": 1.5}, TypeError, "class indices"),
        ({"target": [0, 1, 2]}, ValueError, "3 rows for 2 samples"),
        ({"target": -1}, ValueError, "negative"),
        ({"target": 9, "method": "gradient"}, ValueError, "is no class of the network"),
        ({"x": X[0]}, ValueError, "must be images"),
        ({"method": partial(METHODS["occlusion"], window=99)}, ValueError, "`window`"),
        ({"method": partial(METHODS["occlusion"], stride=9)}, ValueError, "`stride`"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    given = {"x": X, "target": 0, "method": "bcos"} | arguments
    with pytest.raises(error, match=message):
        attribute(small(), **given)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="evaluation mode"):
        attribute(small().train(), X, 0, "gradient")


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_functions_for_one_target_or_several(name):
    function = partial(METHODS[name], **FEW.get(name, {}))
    alone = function(small(), X, TARGET[:, 1])
    assert alone.shape == (2, 8, 8)
    torch.testing.assert_close(alone, function(small(), X, TARGET)[:, 1])
    torch.testing.assert_close(attribute(small(), X, TARGET, lambda m, x, t: function(m, x, t))[:, 1], alone)
    with pytest.raises(ValueError, match=r"no class of the network|out of range"):
        function(small(), X, torch.tensor([0, 4]))


def test_an_attribution_of_another_network_is_refused():
    with pytest.raises(ValueError, match="was made with another network"):
        attribute(small(), X, 0, captum.attr.Saliency(small()))
    with pytest.raises(ValueError, match="needs arguments"):
        attribute(small(), X, 0, captum.attr.Occlusion)


def test_grad_cam_where_maps_have_as_many_channels_as_there_are_classes():
    from bcoskit.evaluation._gradients import last_map

    assert last_map(small(classes=8), X) == "act2"
    assert last_map(patches(), images(1)[0][0][None]) == "conv"
    wide = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()
    assert last_map(wide, torch.rand(1, 3, 8, 16)) == "0"
    swin = timm.create_model("test_vit3", num_classes=4).eval()
    with pytest.raises(ValueError, match="grad_cam"):
        attribute(swin, torch.rand(1, 3, 160, 160), 0, "grad_cam")


def test_masks_of_rise_do_not_depend_on_how_many_are_computed_at_once():
    found = [attribute(small(), X, 0, partial(METHODS["rise"], count=9, batch_size=size)) for size in (2, 9)]
    torch.testing.assert_close(*found)


def test_double_precision_stays():
    model = small().double()
    for name in METHODS:
        assert attribute(model, X.double(), 0, method(name)).dtype == torch.float64


@pytest.mark.parametrize("name", ["guided_backprop", "deep_lift"])
def test_activations_that_hooks_cannot_reach_are_refused(name):
    class Functional(torch.nn.Sequential):
        def forward(self, x):
            return self[1](torch.relu(self[0](x)).mean((2, 3)))

    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"needs each ReLU to be a module .*, 1 of 1 in the network are not"):
        attribute(Functional(*layers).eval(), X, 0, name)
    assert attribute(small(), X, 0, name).shape == (2, 8, 8)


@pytest.mark.parametrize("name", ["guided_backprop", "deep_lift"])
def test_bounded_relus_are_relus(name):
    torch.manual_seed(0)
    conv, head = torch.nn.Conv2d(3, 8, 3), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4))

    def found(activation, scale=1.0, method=name):
        return attribute(torch.nn.Sequential(conv, activation, head).eval(), X * scale, 0, method)

    bounded = torch.nn.ReLU6()
    torch.testing.assert_close(found(bounded), found(torch.nn.ReLU()))
    plain = "gradient" if name == "guided_backprop" else "input_x_gradient"
    assert not torch.allclose(found(bounded), found(bounded, method=plain))
    assert not torch.allclose(found(bounded, 100), found(torch.nn.ReLU(), 100))  # beyond the bound


def test_integrated_gradients_of_a_homogeneous_network_are_input_x_gradient():
    torch.manual_seed(0)
    first, second = bcoskit.nn.BcosConv2d(3, 8, 3, padding=1), bcoskit.nn.BcosConv2d(8, 4, 3)
    model = torch.nn.Sequential(first, second, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()
    expected = attribute(model, X, TARGET, "input_x_gradient")
    for steps in (2, 7):
        found = attribute(model, X, TARGET, partial(METHODS["integrated_gradients"], steps=steps))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    first.bias = torch.nn.Parameter(torch.ones(8))
    with_bias = attribute(model, X, TARGET, "integrated_gradients")
    assert not torch.allclose(with_bias, attribute(model, X, TARGET, "input_x_gradient"), rtol=0.1)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"deep_lift"}))  # captum's hooks live for one target
def test_all_targets_share_forward_passes(name):
    model = small()
    seen = []
    handle = model.register_forward_hook(lambda _module, args, _output: seen.append(len(args[0])))
    counts = []
    for target in (TARGET, TARGET[:, :1]):
        attribute(model, X, target, method(name))
        counts.append(sum(seen))
        seen.clear()
    handle.remove()
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", ["lime", "kernel_shap"])
def test_small_images_have_segments(name):
    """The papers' kernel makes one segment of most images of 32 pixels, and the same map for all of them."""
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(3, 3, 4, 4, generator=generator), 32, mode="bilinear")
    for found in attribute(small(), smooth, 1, partial(METHODS[name], count=30)):
        assert len(found.unique()) > 1


def test_random_numbers_of_other_devices_are_left_alone(monkeypatch):
    seeded, network = [], small()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(0)
    assert seeded == [0]  # the control
    for name in ("lime", "kernel_shap", "rise"):
        attribute(network, X, 0, method(name))
    randomization(network, noise(2), "gradient")
    assert seeded == [0]


def test_inputs_of_captum_are_a_tuple_too():
    attribution = BcosAttribution(patches())
    x = torch.rand(2, 5, 4, 4)
    (found,) = attribution.attribute((x,), target=1)
    assert torch.equal(found, attribution.attribute(x, target=1))
    with pytest.raises(ValueError, match="`inputs` holds 2 tensors"):
        attribution.attribute((x, x), target=1)


def test_a_network_without_weights():
    class Sums(torch.nn.Module):
        def forward(self, x):
            return x.sum((2, 3))

    x = torch.rand(2, 3, 4, 4)
    found = quantus_explain(Sums().eval(), x.numpy(), [0, 2]).sum((1, 2, 3))
    np.testing.assert_allclose(found, x.sum((2, 3))[[0, 1], [0, 2]], rtol=1e-6)
