"""Perturbation curves, sanity checks and accuracy: exact on toy models, and as captum's and Quantus' versions."""

import captum.metrics
import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import bcoskit
from bcoskit.evaluation import (
    Perturbation,
    Randomization,
    Stability,
    accuracy,
    accuracy_figures,
    area_under,
    attribute,
    completeness,
    deletion,
    evaluate,
    insertion,
    perturbation,
    perturbation_curve,
    randomization,
    randomized,
    spearman,
    stability,
    write_results,
)
from evaluation_toys import images, noise, patches, small


class Weighted(nn.Module):
    """Logit 0 is the sum of the pixels times 8, 4, 2, 1; so small that the probability stays near a half."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[8.0, 4.0], [2.0, 1.0]]))

    def forward(self, x):
        logit = (x[:, 0] * self.weight).sum((1, 2))
        return torch.stack([logit, torch.zeros_like(logit)], 1)


def sigmoid(values):
    return 1 / (1 + np.exp(-np.array(values, dtype=float)))


ONES = torch.ones(1, 1, 2, 2)
MAP = torch.tensor([[[8.0, 4.0], [2.0, 1.0]]])


@pytest.mark.parametrize(
    ("options", "logits"),
    [
        ({}, [15, 7, 3, 1, 0]),
        ({"least_first": True}, [15, 14, 12, 8, 0]),
        ({"insert": True}, [0, 8, 12, 14, 15]),
        ({"baseline": "mean"}, [15, 15, 15, 15, 15]),
        ({"patch": 2}, [15, 15, 15, 0, 0]),
    ],
)
def test_curves_of_a_network_that_is_known(options, logits):
    curve = perturbation_curve(Weighted().eval(), ONES / 4, torch.tensor([0]), MAP, steps=4, **options)
    np.testing.assert_allclose(curve[0].detach(), sigmoid(np.array(logits) / 4), rtol=1e-6)


def test_areas_are_trapezoids():
    assert area_under(torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]])).tolist() == [0.5, 1.0]


def reversed_map(model, x, target):
    return -attribute(model, x, target)


@pytest.mark.parametrize(("metric", "good_is_low"), [(deletion, True), (insertion, False), (perturbation, False)])
def test_the_right_map_is_better_than_the_reversed_one(metric, good_is_low):
    data = [(torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(i)), i % 5) for i in range(6)]
    model = patches(scale=20)
    right, wrong = metric(model, data, steps=8), metric(model, data, reversed_map, steps=8)
    assert (right.median < wrong.median) == good_is_low
    assert right.median != wrong.median
    assert {len(row["curve"]) for row in right.rows} == {9}


@pytest.mark.filterwarnings("ignore")
def test_deletion_is_pixel_flipping_of_quantus():
    import quantus

    model, data = (
        Weighted().eval(),
        [(torch.rand(1, 2, 2, generator=torch.Generator().manual_seed(i)), 0) for i in range(3)],
    )
    x = torch.stack([x for x, _ in data])
    curves = deletion(model, data, "input_x_gradient", steps=4, explained="label")
    flipping = quantus.PixelFlipping(
        features_in_step=1, perturb_baseline=0.0, abs=False, normalise=False, disable_warnings=True
    )  # fmt: skip
    theirs = flipping(
        model, x.numpy(), np.zeros(3, int), a_batch=(x * model.weight).detach().numpy(), channel_first=True
    )
    ours = np.array([row["curve"] for row in curves.rows])
    np.testing.assert_allclose(ours[:, 1:], np.array(theirs), rtol=1e-5)


def test_images_are_drawn_by_the_seed():
    data = noise(6)
    drawn = [row["image"] for row in deletion(small(), data, "gradient", count=3, steps=2).rows]
    again = [row["image"] for row in deletion(small(), data, "gradient", count=3, steps=2, batch_size=1).rows]
    other = [row["image"] for row in deletion(small(), data, "gradient", count=3, steps=2, seed=5).rows]
    assert drawn == again == sorted(drawn)
    assert drawn != other
    with pytest.raises(ValueError, match=r"`count` \(=7\)"):
        deletion(small(), data, count=7)


def test_rank_correlation_is_that_of_scipy():
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(5, (3, 4, 4), generator=generator).float()
    second = torch.randint(5, (3, 4, 4), generator=generator).float()
    expected = [scipy.stats.spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(spearman(first, second), expected)
    assert spearman(first, 2 * first + 1).tolist() == pytest.approx([1, 1, 1])
    assert spearman(first, torch.zeros(3, 4, 4)).tolist() == [0, 0, 0]


class Fixed(nn.Conv2d):
    """Its random weights are always the same, so that two libraries randomise it alike."""

    def reset_parameters(self):
        with torch.no_grad():
            self.weight.copy_(torch.linspace(-1, 1, self.weight.numel()).sin().view_as(self.weight))


def two_layers():
    torch.manual_seed(0)
    model = nn.Sequential(Fixed(3, 4, 3, padding=1, bias=False), nn.ReLU(), Fixed(4, 4, 3, bias=False), nn.AvgPool2d(6),
                          nn.Flatten()).eval()  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.mark.filterwarnings("ignore")
def test_randomization_is_that_of_quantus():
    import quantus

    model, data = two_layers(), noise(3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    ours = randomization(model, data, "input_x_gradient", explained="label")
    assert [row["layer"] for row in ours.rows] == ["2", "0"] * 3
    x = torch.stack([x for x, _ in data])
    labels = np.array([label for _, label in data])

    def theirs_explain(model, inputs, targets, **_):
        found = attribute(model, torch.as_tensor(inputs), torch.as_tensor(targets), "input_x_gradient")
        return found[:, None].numpy()

    check = quantus.MPRT(
        similarity_func=quantus.similarity_func.correlation_spearman, layer_order="top_down", abs=False,
        normalise=False, disable_warnings=True, return_aggregate=False, seed=42,
    )  # fmt: skip
    theirs = check(model, x.numpy(), labels, explain_func=theirs_explain, device="cpu")
    scores = {layer: [row["score"] for row in ours.rows if row["layer"] == layer] for layer in ("2", "0")}
    by_layer = {name: values for name, values in theirs.items() if name != "original"}
    np.testing.assert_allclose(by_layer["2"], scores["2"], atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_explanation_that_ignores_the_weights_does_not_change():
    result = randomization(two_layers(), noise(3), lambda model, x, target: x)
    assert result.scores.tolist() == pytest.approx([1] * 6)
    assert randomization(two_layers(), noise(3), "input_x_gradient").median < 0.9
    with pytest.raises(ValueError, match="no layer with `reset_parameters`"):
        randomization(nn.Flatten().eval(), noise(3))


def test_stability_is_the_max_sensitivity_of_captum():
    from bcoskit.evaluation._sanity import _noisy

    model, data = small(), noise(3)
    x = torch.stack([x for x, _ in data])
    target = torch.tensor([label for _, label in data])
    ours = stability(model, data, "gradient", draws=4, explained="label")
    draws = iter(range(4))

    def disturbed(inputs):
        return _noisy(x, range(3), 0.02, (42, next(draws)))

    def explained(inputs, target):
        if isinstance(inputs, tuple):
            return (explained(inputs[0], target),)
        return attribute(model, inputs.detach(), target, "gradient")

    theirs = captum.metrics.sensitivity_max(
        explained, x, perturb_func=disturbed, n_perturb_samples=4, max_examples_per_batch=3, target=target,
    )  # fmt: skip
    found = [row["score"] for row in ours.rows if row["kind"] == "noise"]
    np.testing.assert_allclose(found, theirs, rtol=1e-5)
    alone = stability(model, data, "gradient", draws=4, explained="label", batch_size=1)
    np.testing.assert_allclose(alone.scores, ours.scores, rtol=1e-4)


def test_stability_of_maps_that_are_known():
    data = [(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(i)), 0) for i in range(2)]
    moved = stability(small(), data, lambda model, x, target: x)
    assert {row["kind"]: row["score"] for row in moved.rows}["shift"] == 0  # it is shifted as the image is
    assert 0 < moved.rows[0]["score"] < 0.05
    fixed = stability(small(), data, lambda model, x, target: torch.arange(64.0).view(1, 8, 8).expand(len(x), 8, 8))
    assert {row["kind"]: row["score"] for row in fixed.rows if row["kind"] == "noise"}["noise"] == 0
    assert min(row["score"] for row in fixed.rows if row["kind"] == "shift") > 0


def test_noise_on_encoded_images_keeps_the_encoding():
    from bcoskit.evaluation._sanity import _noisy

    x = bcoskit.encode(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    noisy = _noisy(x, [4, 9], 0.1, (0, 0))
    torch.testing.assert_close(noisy[:, :3] + noisy[:, 3:], torch.ones(2, 3, 8, 8))
    assert 0 < (noisy - x).abs().max() <= 0.1 + 1e-6


def test_completeness():
    data = noise(3)
    assert completeness(small(), data).scores.max() < 1e-5
    assert completeness(small(), data, "deep_lift").scores.max() < 1e-5
    assert completeness(small(), data, "gradient").scores.min() > 1e-3
    row = completeness(small(), data).rows[0]
    assert row["logit"] == pytest.approx(row["constant"] + row["contributions"], rel=1e-5)


def test_accuracy_and_calibration_by_hand():
    data = images(10)
    data[3] = (data[3][0], 0)  # a wrong label
    result = accuracy(patches(), data)
    assert result.mean == 0.9
    figures = accuracy_figures(result.rows, bins=15)
    assert figures["top1"] == pytest.approx(0.9)
    assert figures["top5"] == 1.0
    confidence = np.array([row["probability"] for row in result.rows])
    right = result.scores
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert figures["calibration_error"] == pytest.approx(expected, abs=1e-6)
    assert figures["calibration_error"] != figures["calibration_error_softmax"]


def test_wrong_data():
    with pytest.raises(ValueError, match="holds no images"):
        accuracy(patches(), [])
    with pytest.raises(ValueError, match="is no class of the network"):
        accuracy(patches(), [(torch.rand(5, 4, 4), 5)])
    with pytest.raises(ValueError, match="evaluation mode"):
        accuracy(patches().train(), images())
    mixed = [(torch.rand(5, 4, 4), 0), (torch.rand(5, 6, 6), 1)]
    assert len(accuracy(patches(), mixed).rows) == 2  # together they do not fit, one by one they do
    with pytest.raises(ValueError, match="`baseline`"):
        deletion(patches(), images(), baseline="noise")
    with pytest.raises(ValueError, match="`explained`"):
        deletion(patches(), images(), explained="nothing")
    with pytest.raises(ValueError, match="`patch`"):
        deletion(patches(), images(), patch=3)


def test_predictions_are_the_first_of_equal_logits():
    class Constant(nn.Module):
        def forward(self, x):
            return x.new_zeros(len(x), 10)

    rows = accuracy(Constant().eval(), [(torch.rand(3, 4, 4), 0)]).rows
    assert rows[0]["predicted"] == 0
    assert rows[0]["score"] == 1


def test_full_confidence_is_in_the_last_interval():
    rows = [
        {"score": score, "top5": 1, "probability": confidence, "softmax": confidence}
        for confidence, score in ((1.0, 0.0), (0.95, 1.0))
    ]
    assert accuracy_figures(rows)["calibration_error"] == pytest.approx(abs(0.975 - 0.5), abs=1e-6)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((torch.rand(3, 8, 8), 1.9), "the label 1.9"),
        ((torch.rand(3, 8, 8), None), "the label None"),
        ((torch.rand(3, 8, 8), [0, 1]), "the label"),
        ((torch.rand(3, 8, 8), 9), "no class of the network, which has 4"),
        ((torch.rand(8, 8), 1), r"\(C, H, W\)"),
        (torch.rand(3, 8, 8)[0], "must be"),
    ],
)
def test_wrong_items(item, message):
    with pytest.raises(ValueError, match=message):
        accuracy(small(), [item])
    with pytest.raises(ValueError, match=message):
        deletion(small(), [item], "gradient", explained="label")


def test_items_of_numpy():
    data = [(x.numpy(), np.int64(label)) for x, label in noise(3)]
    assert accuracy(small(), data).rows == accuracy(small(), noise(3)).rows


def test_a_part_in_training_mode_is_refused_before_anything_changes():
    model = nn.Sequential(nn.BatchNorm2d(3), small()).eval()
    model[0].train()
    mean = model[0].running_mean.clone()
    for call in (accuracy, deletion, randomization):
        with pytest.raises(ValueError, match="its module '0' is in training mode"):
            call(model, noise(2))
    assert torch.equal(model[0].running_mean, mean)


def test_wrong_numbers():
    for wrong in ({"batch_size": 0}, {"batch_size": -1}, {"shift": 4}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
            stability(small(), noise(2), "gradient", **wrong)
    with pytest.raises(ValueError, match="0 everywhere"):
        stability(small(), noise(2), lambda model, x, target: 0 * x)
    with pytest.raises(ValueError, match="no images"):
        stability(small(), [])


def test_the_weights_of_attention_are_randomised_too():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 1, batch_first=True)

        def forward(self, x):
            tokens = x.flatten(2).transpose(1, 2)
            return self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1)

    from bcoskit.evaluation import randomized

    model = Attending().eval()
    before = model.attention.in_proj_weight.detach().clone()
    changed = [(path, copy.attention.in_proj_weight.detach().clone()) for path, copy in randomized(model)]
    assert [path for path, _ in changed] == ["attention.out_proj", "attention"]
    assert torch.equal(changed[0][1], before)
    assert not torch.equal(changed[1][1], before)


def test_functions_of_methods_are_methods_by_name():
    from bcoskit.evaluation import METHODS

    by_name, by_function = (completeness(small(), noise(2), method) for method in ("bcos", METHODS["bcos"]))
    assert by_name.rows == by_function.rows


def test_small_explanations_are_measured_too():
    """In single precision their squares are 0."""

    def scaled(factor):
        draws = torch.Generator().manual_seed(4)
        return lambda model, x, target: torch.rand(len(x), 4, 4, generator=draws) * factor

    plain, tiny = (stability(patches(), images(2), scaled(factor)).scores for factor in (1.0, 1e-25))
    assert tiny == pytest.approx(plain, rel=1e-5)
    assert plain.min() > 0.1


def test_random_weights_come_in_the_order_of_the_layers():
    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.unused, self.conv = nn.Linear(4, 3), nn.Linear(2, 2), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.head(self.conv(x).relu().mean((2, 3)))

    rows = randomization(HeadFirst().eval(), noise(2), "gradient").rows
    assert [row["layer"] for row in rows] == ["head", "conv", "unused"] * 2
    assert [path for path, _ in randomized(HeadFirst())] == ["conv", "unused", "head"]


def test_an_explanation_of_zeros_is_no_sane_one():
    with pytest.raises(ValueError, match="is 0 everywhere"):
        randomization(patches(), images(3), lambda model, x, target: torch.zeros(len(x), 4, 4))


def test_kinds_and_layers_have_summaries_of_their_own(tmp_path):
    metrics = (Stability(draws=2, count=3), Randomization(count=3), Perturbation("deletion", steps=2, count=3))
    results = evaluate(small(), noise(), metrics, ("gradient", "input_x_gradient"), out=tmp_path)
    lines = write_results(results, tmp_path)["results"]
    parts = [(line["metric"], line["part"], line["method"]) for line in lines]
    assert parts[:4] == [
        ("stability", kind, name) for name in ("gradient", "input_x_gradient") for kind in ("noise", "shift")
    ]
    assert [part[1] for part in parts[4:7]] == ["head", "conv2", "conv1"]
    assert parts[-1] == ("deletion", "", "input_x_gradient")
    stable = next(result for result in results if result.metric == "stability")
    for line in lines[:2]:
        scores = [row["score"] for row in stable.rows if row["kind"] == line["part"]]
        assert (line["count"], line["median"]) == (3, pytest.approx(np.median(scores)))
    assert "| stability, shift | gradient | 3 |" in (tmp_path / "summary.md").read_text()
    pictures = {file.name for file in tmp_path.glob("*.png")}
    assert pictures == {"stability.png", "randomization.png", "deletion.png", "deletion_curves.png"}


def test_insertion_blurs_as_rise():
    """By a Gaussian of 5 pixels on 11, for images of 224."""
    x = torch.zeros(1, 1, 224, 224)
    x[..., 112, 112] = 1

    class Middle(nn.Module):
        def forward(self, x):
            return x[:, :, 107:118, 112].flatten(1)

    maps = torch.rand(1, 224, 224)
    options = {"insert": True, "baseline": "blur", "steps": 1}
    logits = torch.logit(perturbation_curve(Middle().eval(), x, torch.tensor([5]), maps, **options))
    kernel = torch.exp(-(torch.arange(-5, 6.0) ** 2) / 50)
    kernel = kernel / kernel.sum()
    assert float(logits[0, 0]) == pytest.approx(float(kernel[5] ** 2), rel=1e-4)
    assert float(logits[0, 1]) == pytest.approx(1, rel=1e-4)


def test_curves_refuse_what_does_not_fit():
    x, maps = torch.rand(2, 5, 4, 4), torch.rand(2, 4, 4)
    network = nn.Sequential(nn.BatchNorm2d(5), patches()).train()
    before = network[0].running_mean.clone()
    with pytest.raises(ValueError, match="evaluation mode"):
        perturbation_curve(network, x, torch.tensor([0, 1]), maps)
    assert torch.equal(network[0].running_mean, before)
    for target, message in (([1], "one class per sample"), ([-1, 0], "is no class"), ([5, 0], "is no class")):
        with pytest.raises(ValueError, match=message):
            perturbation_curve(patches(), x, torch.tensor(target), maps)
    with pytest.raises(ValueError, match="not finite"):
        perturbation_curve(patches(), x, torch.tensor([0, 1]), maps * torch.nan)


def test_labels_of_a_dataset_may_be_names():
    class Named(list):
        labels = ("cat", "dog")

    assert accuracy(patches(), Named(images(4))).mean == 1.0
    with pytest.raises(ValueError, match=r"image 0: the label 'cat' must be the index of a class"):
        accuracy(patches(), [(images()[0][0], "cat")])
