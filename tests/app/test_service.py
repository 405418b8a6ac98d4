"""Explanations for many users at once, their figures and pictures."""

import copy
import io
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import bcoskit
from bcoskit import viz
from bcoskit.data import ImageError
from bcoskit.evaluation import attribute
from bcoskit.models import create_model

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'bcoskit[app]'")
from bcoskit.app import ExplanationService, _html
from bcoskit.app._figures import figures, place_figures
from bcoskit.app._pictures import Controls, comparison_map, panels, sheet, usual_smooth

PHOTOGRAPHS = Path(bcoskit.__file__).parent / "assets" / "photographs"
CAT, SHIP = ((PHOTOGRAPHS / f"{name}.jpg").read_bytes() for name in ("cat", "ship"))


@pytest.fixture(scope="module")
def model():
    return create_model("resnet20.bcos_cifar10", weights=True)


@pytest.fixture(scope="module")
def ordinary():
    """An ordinary network that has the same classes in another order."""
    torch.manual_seed(0)
    network = create_model("resnet20.standard_cifar10")
    network.classes = tuple(reversed(network.classes))
    return network


@pytest.fixture(scope="module")
def service(model, ordinary):
    service = ExplanationService(model, ordinary, batch_size=4)
    yield service
    service.close()


def png(image, **options):
    stream = io.BytesIO()
    image.save(stream, format="PNG", **options)
    return stream.getvalue()


def close(found, expected):
    return float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


class TestExplain:
    @pytest.mark.parametrize(("target", "versus"), [(None, None), (5, None), (5, 3), (None, 8)])
    def test_it_is_that_of_the_library(self, service, model, target, versus):
        found = service.explain(service.read(CAT), target, versus, shares=versus is None)
        x = model.transform(CAT).unsqueeze(0)
        expected = bcoskit.explain(model, x, target, versus=versus)
        assert torch.equal(found.x, x)
        assert torch.equal(found.target, expected.target)
        assert close(found.weights, expected.weights)
        assert close(found.value, expected.value)
        assert (found.residual is None) == (versus is not None)
        if found.residual is not None:
            assert float(found.residual.abs().max()) < 1e-5

    def test_many_at_once(self, service, model):
        images = [CAT, SHIP]
        requests = [(images[index % 2], [None, 1, 7][index % 3], [None, 4][index % 5 == 0]) for index in range(24)]
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda r: service.explain(service.read(r[0]), r[1], r[2], shares=False), requests))
        for (data, target, versus), explanation in zip(requests, found, strict=True):
            expected = bcoskit.explain(model, model.transform(data).unsqueeze(0), target, versus=versus)
            assert torch.equal(explanation.target, expected.target)
            assert close(explanation.weights, expected.weights)
            # What one user keeps holds nothing of the others.
            assert explanation.weights.untyped_storage().nbytes() == explanation.weights.nbytes
            assert explanation.x.untyped_storage().nbytes() == explanation.x.nbytes

    def test_the_network_is_not_changed(self, service, model):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        service.explain(service.read(SHIP))
        service.attribute(service.read(SHIP), 8, "guided_backprop")
        with pytest.raises(ValueError, match="below 10"):
            service.explain(service.read(SHIP), 10)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())

    def test_classes_that_do_not_fit(self, service):
        photograph = service.read(CAT)
        for target, versus, message in (
            (10, None, r"`target` \(=10\)"),
            (-1, None, r"`target` \(=-1\)"),
            (0, 10, r"`versus` \(=10\)"),
            (3, 3, "'cat' cannot be explained against itself"),
            (None, 3, "'cat' cannot be explained against itself"),
        ):
            with pytest.raises(ValueError, match=message):
                service.explain(photograph, target, versus)

    def test_class_index(self, service):
        assert [service.class_index(given, "target") for given in (None, "", "cat", "3", 3)] == [None, None, 3, 3, 3]
        for given in ("cats", "10", "-1", "1.0", "٣", True):
            with pytest.raises(ValueError, match=f"`versus` .={re.escape(repr(given))}. is neither a class"):
                service.class_index(given, "versus")

    def test_two_classes_of_one_name(self, model):
        network = copy.deepcopy(model)
        network.classes = ("crane", "tern", "crane", *model.classes[3:])
        service = ExplanationService(network)
        assert (service.class_index("tern", "target"), service.class_index("2", "target")) == (1, 2)
        with pytest.raises(ValueError, match=r"'crane'. names several classes: give one of 0, 2"):
            service.class_index("crane", "target")


class TestRead:
    def test_the_view_is_what_the_network_sees(self, service, model, ordinary):
        photograph = service.read((PHOTOGRAPHS / "chelsea.jpg").read_bytes())
        assert photograph.view.tobytes() == model.transform.view(PHOTOGRAPHS / "chelsea.jpg").tobytes()
        assert photograph.ordinary is not None
        assert photograph.ordinary.size == (ordinary.transform.size,) * 2

    def test_metadata_go_nowhere(self, service):
        information = PngInfo()
        information.add_text("Comment", "<script>alert(1)</script>")
        data = png(Image.new("RGB", (9, 9), "red"), pnginfo=information)
        assert b"script" in data
        assert service.read(data).view.info == {}

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "is empty"),
            (b"no image", "is no image of a known format"),
            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no image of a known format"),
            (CAT[: len(CAT) // 2], "damaged or truncated"),
            (png(Image.new("1", (10_000, 10_000))), "10000x10000 pixels"),
            (png(Image.new("1", (1, 20_000_000)).resize((1, 9_000_000))), "too elongated"),
            (bytes(20_000_001), r"20\.0 MB, more than the 20 allowed"),
        ],
    )
    def test_bad_images(self, service, data, message):
        with pytest.raises(ImageError, match=message) as caught:
            service.read(data)
        assert "bytes>" not in str(caught.value)
        assert service.read(CAT).view.size == (32, 32)

    def test_of_an_animation_the_first_image(self, service):
        stream = io.BytesIO()
        frames = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
        frames[0].save(stream, format="GIF", save_all=True, append_images=frames[1:])
        assert service.read(stream.getvalue()).view.getpixel((5, 5)) == (255, 0, 0)


class TestCompare:
    @pytest.mark.parametrize("method", ["bcos", "grad_cam"])
    def test_it_is_that_of_the_library(self, service, model, ordinary, method):
        photograph = service.read(CAT)
        x = model.transform(CAT).unsqueeze(0)
        assert close(service.attribute(photograph, 3, method), attribute(model, x, 3, method)[0])
        found = service.attribute(photograph, 3, method, ordinary=True)
        x = ordinary.transform(CAT).unsqueeze(0)
        place = ordinary.classes.index("cat")
        assert place != 3
        assert close(found, attribute(ordinary, x, place, method)[0])
        assert not close(found, attribute(ordinary, x, 3, method)[0])

    def test_what_cannot_be_compared(self, service, model):
        with pytest.raises(ValueError, match=r"`method` \(='nothing'\)"):
            service.attribute(service.read(CAT), 3, "nothing")
        alone = ExplanationService(model)
        with pytest.raises(ValueError, match="needs an ordinary network"):
            alone.attribute(alone.read(CAT), 3, "bcos", ordinary=True)
        alone.close()

    def test_networks_of_other_classes(self, model):
        other = create_model("resnet20.standard_cifar10")
        other.classes = ("cat", *map(str, range(9)))
        with pytest.raises(ValueError, match="there is no 'airplane' among its 10"):
            ExplanationService(model, other)


def test_arguments(model):
    for argument in ("max_bytes", "max_pixels", "batch_size"):
        with pytest.raises(ValueError, match=rf"`{argument}` \(=0\)"):
            ExplanationService(model, **{argument: 0})
    with pytest.raises(TypeError, match="`model` must be a network of `create_model`, not Linear"):
        ExplanationService(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="training mode"):
        ExplanationService(create_model("resnet20.bcos_cifar10").train())


class TestFigures:
    def test_they_add_up(self, service):
        told = figures(service, service.explain(service.read(CAT)))
        assert told["target"]["class"] == "cat"
        assert told["versus"] is None
        assert told["contributions"] + told["bias"] == pytest.approx(told["value"], abs=1e-5)
        assert sum(told["shares"].values()) == pytest.approx(told["bias"], abs=1e-4)
        logits = [row["logit"] for row in told["classes"]]
        assert logits == sorted(logits, reverse=True)
        assert told["target"]["probability"] == pytest.approx(1 / (1 + np.exp(-told["value"])), abs=1e-6)

    def test_outputs_that_are_no_classes_have_no_probabilities(self, model):
        other = create_model("resnet20.bcos_cifar10", weights=True)
        other.loss = "none"
        service = ExplanationService(other)
        told = figures(service, service.explain(service.read(CAT)))
        service.close()
        assert not service.has_classes
        assert {row["probability"] for row in told["classes"]} == {None}
        assert "probable" not in _html.subject(told)

    def test_a_place(self, service):
        explanation = service.explain(service.read(CAT))
        contributions = explanation.contributions[0]
        told = place_figures(explanation, 0, 31, 5)
        square = contributions[:3, 29:]
        assert told["contribution"] == float(contributions[0, 31])
        assert told["square"] == pytest.approx(float(square.sum()), abs=1e-6)
        assert told["for"] + told["against"] == pytest.approx(told["square"], abs=1e-6)
        assert told["for"] >= 0 >= told["against"]
        assert told["share"] == told["contribution"] / float(explanation.value)
        whole = place_figures(explanation, 16, 16, 99)
        assert whole["square"] == pytest.approx(float(explanation.value - explanation.bias), abs=1e-4)
        for row, column in ((-1, 0), (0, 32), (32, 0)):
            with pytest.raises(ValueError, match="there is no pixel"):
                place_figures(explanation, row, column, 1)


class TestPictures:
    def test_beside_and_over(self, service):
        photograph = service.read(CAT)
        explanation = service.explain(photograph)
        contributions = explanation.contributions[0]
        beside = panels(service, photograph, explanation, Controls(percentile=95))
        over = panels(service, photograph, explanation, Controls(over=True, opacity=0.4, smooth=3))
        assert list(beside) == list(over) == ["image", "map", "colors"]
        assert np.array_equal(beside["map"], viz.to_pil(viz.contribution_map(contributions, percentile=95)))
        picture = viz.color_picture(explanation.weights[0], contributions, smooth=3)
        expected = viz.to_pil(viz.overlay(photograph.view, picture, opacity=0.4, grey=True))
        assert np.array_equal(over["colors"], expected)
        assert not np.array_equal(over["colors"], beside["colors"])

    def test_controls_out_of_range(self, service):
        photograph = service.read(CAT)
        explanation = service.explain(photograph)
        with pytest.raises(ValueError, match=r"`opacity` \(=2\)"):
            Controls(opacity=2)
        for controls, message in ((Controls(smooth=4), "`smooth`"), (Controls(percentile=101), "`percentile`")):
            with pytest.raises(ValueError, match=message):
                panels(service, photograph, explanation, controls)

    def test_without_an_encoding_there_are_no_colours(self, ordinary):
        service = ExplanationService(ordinary)
        photograph = service.read(CAT)
        explanation = service.explain(photograph, 3)
        assert list(panels(service, photograph, explanation, Controls())) == ["image", "map"]
        assert sheet(service, photograph, explanation).mode == "RGB"
        service.close()

    def test_a_sheet_says_what_it_shows(self, service):
        photograph = service.read(CAT)
        one, two = (sheet(service, photograph, service.explain(photograph, 3, other)) for other in (None, 5))
        assert one.size == two.size
        assert not np.array_equal(one, two)

    def test_maps(self):
        found = comparison_map(torch.tensor([[1.0, -1.0], [0.0, 0.0]]), 1)
        assert [found.getpixel(place) for place in ((0, 0), (1, 0))] == [(255, 0, 0), (0, 0, 255)]
        assert [usual_smooth(size) for size in (32, 224)] == [1, 7]


class TestHtml:
    HOSTILE = '"><script>alert(1)</script>\x1b[31m'

    def test_names_are_escaped(self, service):
        told = figures(service, service.explain(service.read(CAT)))
        for row in (told["target"], *told["classes"]):
            row["class"] = self.HOSTILE
        told["versus"] = dict(told["target"])
        told["shares"] = {self.HOSTILE: 1.0}
        pages = [
            _html.class_list(told["classes"], 3, None),
            _html.subject(told),
            _html.numbers(told),
            _html.header(self.HOSTILE, 10, self.HOSTILE),
            _html.comparison({self.HOSTILE: [(self.HOSTILE, self.HOSTILE)]}, self.HOSTILE),
            _html.thumbnails([(self.HOSTILE, b"")]),
            _html.downloads([(self.HOSTILE, "image/png", b"")]),
        ]
        for page in pages:
            assert "&lt;script&gt;" in page
            assert "<script" not in page
            assert "\x1b" not in page

    def test_numbers(self):
        assert [_html.number(value, 2) for value in (None, -1.5, 2)] == ["\N{EN DASH}", "\N{MINUS SIGN}1.50", "2.00"]
        assert _html.percent(0.125, sign=True) == "+12.5 %"
        shares = {f"layer{index}": float(index) for index in range(20)}
        page = _html.numbers(
            {"versus": None, "value": 1.0, "contributions": 1.0, "bias": 0.0, "shares": shares, "residual": 0.0}
        )
        assert page.count("<tr>") == 13
        assert "8 others" in page
        assert "+28.0000" in page
