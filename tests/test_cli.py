import gc
import json
import os
import pty
import re
import subprocess
import sys
import weakref
from itertools import count, islice
from pathlib import Path

import onnxruntime
import pytest
import torch
from PIL import Image

import bcoskit
from bcoskit import Explanation, _command_explain, _command_export, _command_pictures, cli
from bcoskit._command_pictures import count_images, with_pictures
from bcoskit.data import ImageError, ImageTransform
from bcoskit.export import OnnxExport
from bcoskit.models import CIFAR10_CLASSES, create_model, list_models, save_model, vit

PHOTOGRAPHS = Path(bcoskit.__file__).parent / "assets" / "photographs"
SCRIPT = Path(sys.executable).with_name("bcoskit")
BCOS, STANDARD = "resnet20.bcos_cifar10", "resnet20.standard_cifar10"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Files of networks with random weights, whose norms are set so that the signal does not die out."""
    folder = tmp_path_factory.mktemp("models")
    for name in (BCOS, STANDARD):
        torch.manual_seed(0)
        model = create_model(name)
        for module in model.modules():
            if hasattr(module, "momentum"):
                module.momentum = 1.0
        model.train()(torch.rand(8, model.conv1.in_channels, 32, 32))
        save_model(model, folder / f"{name}.safetensors", name, classes=CIFAR10_CLASSES, transform=model.transform)
    return folder


@pytest.fixture
def model(models):
    return models / f"{BCOS}.safetensors"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def explain(model, capsys):
    """`bcoskit explain`, fast: its exit code, and the lines of its output and errors."""

    def explain(*arguments, fast=True):
        options = ["--top=1", "--no-shares"] if fast else []
        code = cli.main(["explain", *map(str, arguments), f"--model={model}", *options])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return explain


def write_image(path, color=(200, 60, 30), size=(40, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path)
    return path


def write_photograph(path, name="cat"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(PHOTOGRAPHS / f"{name}.jpg") as photograph:
        photograph.save(path)
    return path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class TestCommands:
    def test_overview(self, capsys):
        for arguments in ([], ["--help"], ["-h"]):
            assert cli.main(arguments) == 0
            printed = capsys.readouterr()
            assert printed.out.startswith("usage: bcoskit COMMAND")
            assert all(f"  {name} " in printed.out for name in cli.COMMANDS)
            assert printed.err == ""

    def test_version(self, capsys):
        assert cli.main(["--version"]) == 0
        assert re.fullmatch(r"bcoskit \d+\.\d+\.\d+\n", capsys.readouterr().out)

    @pytest.mark.parametrize("name", cli.COMMANDS)
    def test_help_describes_every_option(self, name, capsys):
        assert cli.main([name, "--help"]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert printed.startswith(f"usage: bcoskit {name} ")
        assert cli.COMMANDS[name].summary in printed

    def test_arguments_of_the_process(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["bcoskit", "--version"])
        assert cli.main() == 0
        assert capsys.readouterr().out.startswith("bcoskit ")


class TestExport:
    def test_writes_a_file_that_runs(self, place, monkeypatch, capsys):
        monkeypatch.setitem(vit.ARCHITECTURES, "simple_vit_ti_patch16_224", (8, 1, 1, ()))
        network = create_model("simple_vit_ti_patch16_224.bcos_v2_in1k", num_classes=3)
        save_model(network, "vit.safetensors", classes=("cat", "dog", "owl"))
        assert cli.main(["export", "vit.safetensors", "--out=vit.onnx"]) == 0
        printed = capsys.readouterr()
        assert re.fullmatch(r"vit\.onnx: 0\.\d MB, agrees with `explain` to \de-0\d\n", printed.out)
        session = onnxruntime.InferenceSession("vit.onnx")
        facts = session.get_modelmeta().custom_metadata_map
        assert (facts["name"], facts["source"]) == (network.name, "vit.safetensors")
        assert json.loads(facts["classes"]) == ["cat", "dog", "owl"]
        x = torch.rand(1, 3, 224, 224)
        logits, contributions = session.run(None, {"image": x.numpy(), "target": torch.tensor([1]).numpy()})
        expected = bcoskit.explain(network, bcoskit.encode(x), 1)
        torch.testing.assert_close(torch.from_numpy(logits), expected.logits)
        torch.testing.assert_close(torch.from_numpy(contributions), expected.contributions)
        assert files(place) == ["vit.onnx", "vit.safetensors"]

    @pytest.mark.parametrize(
        ("weights", "source"),
        [
            (
                "https://me:token@host.org:8443/a/w.safetensors?X-Amz-Signature=abc#part",
                "https://host.org:8443/a/w.safetensors",
            ),
            ("HTTP://host.org/w.safetensors", "http://host.org/w.safetensors"),
            ("/home/me/w.safetensors", "w.safetensors"),
            ("~/https:/w.safetensors", "w.safetensors"),
            ("caf\udce9/w\udce9.safetensors", "w\N{REPLACEMENT CHARACTER}.safetensors"),  # as Linux lets files be named
        ],
    )
    def test_secrets_stay_out_of_the_file(self, weights, source, place, monkeypatch):
        asked, cards = [], []

        def export(_network, path, *, card, **_options):
            cards.append(card)
            path.touch()
            return OnnxExport(path, None)

        monkeypatch.setattr(_command_export, "create_model", lambda _name, weights: asked.append(weights))
        monkeypatch.setattr(_command_export, "export_onnx", export)
        assert cli.main(["export", BCOS, f"--weights={weights}"]) == 0
        assert asked == [weights]
        assert cards == [{"source": source}]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nothing"], "'nothing' is neither the name of a model"),
            (["resnet18.bcos_v2_in1k", "--weights=missing.safetensors"], "missing.safetensors: no such file"),
            ([BCOS, "--out=model.pt"], "`path` (='model.pt') must end in .onnx"),
            ([BCOS, "--out=nowhere/model.onnx"], "nowhere/model.onnx: No such file or directory"),
            ([BCOS, "--products=both"], 'Parser key "products"'),
        ],
    )
    def test_failures(self, arguments, message, place, capsys):
        assert cli.main(["export", *arguments]) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.err.count("\n") == 1
        assert not files(place)

    def test_missing_packages(self, place, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        assert cli.main(["export", BCOS]) == 2
        assert capsys.readouterr().err == ('bcoskit: error: export needs onnxscript: pip install "bcoskit[export]"\n')
        assert not files(place)


class TestModels:
    def test_table(self, capsys):
        assert cli.main(["models"]) == 0
        printed = capsys.readouterr().out
        assert all(name in printed for name in list_models())
        row = next(line for line in printed.splitlines() if BCOS in line)
        cells = [BCOS, "543,440", "6x32x32", "85.9 % (CIFAR-10 (JPEG q75))", "in the package"]
        assert [cell.strip() for cell in row.split("│")[1:6]] == cells

    def test_pattern_and_json(self, capsys):
        assert cli.main(["models", "vgg11_bnu.*", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == [
            {
                "model": "vgg11_bnu.bcos_v2_in1k",
                "parameters": 132_855_872,
                "input": "6x224x224",
                "accuracy": 69.31,
                "measured_on": "ImageNet-1k",
                "weights": "github.com/B-cos/B-cos-v2",
                "licence": "Apache-2.0",
                "sha256": "34036029f0",
            }
        ]


class TestTable:
    def test_figures(self, explain, place, model):
        network = create_model(model)
        image = write_photograph(place / "a cat.png")
        code, lines, errors = explain(image, fast=False)
        assert (code, errors, len(lines)) == (0, [], 4)
        assert lines[0].split() == "image class probability logit W(x)·x constants residual".split()
        with torch.no_grad():
            logits = network(network.transform(image).unsqueeze(0))[0]
        values, classes = logits.topk(3)
        for rank, line in enumerate(lines[1:]):
            assert line[:28].strip() == ("a cat.png" if rank == 0 else "")
            name, *numbers = line[28:].split()
            probability, logit, contributions, constants, residual = map(float, numbers)
            assert name == CIFAR10_CLASSES[int(classes[rank])]
            assert logit == pytest.approx(float(values[rank]), abs=1e-4)
            assert probability == pytest.approx(float(values[rank].sigmoid()), abs=1e-4)
            assert constants == pytest.approx(-2.1972, abs=1e-4)
            assert contributions + constants == pytest.approx(logit, abs=3e-4)
            assert 0 <= residual < 1e-4
        assert float(values[0] - values[2]) > 1e-3

    def test_ordinary_networks_have_softmax_probabilities(self, models, place, capsys):
        image = write_photograph(place / "cat.png")
        path = models / f"{STANDARD}.safetensors"
        assert cli.main(["explain", str(image), f"--model={path}", "--top=10", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["classes"]
        assert sum(row["probability"] for row in rows) == pytest.approx(1, abs=1e-5)
        assert len({row["class"] for row in rows}) == 10
        assert (place / "explanations" / "cat.png").is_file()

    def test_without_shares_there_is_no_residual(self, explain, place):
        _, lines, _ = explain(write_image(place / "x.png"))
        assert lines[1].split()[-1] == "-"

    def test_the_picture_shows_the_image_that_the_network_sees(self, place, model, capsys):
        # Resized to 40, of which the middle 32 are seen: once, and not twice.
        transform = ImageTransform(32, resize=40)
        path = place / "cropping.safetensors"
        save_model(create_model(model), path, BCOS, classes=CIFAR10_CLASSES, transform=transform)
        image = write_photograph(place / "cat.png")
        assert cli.main(["explain", str(image), f"--model={path}", "--save", "--no-shares"]) == 0
        explanation = Explanation.load(place / "explanations" / "cat.safetensors")
        assert torch.equal(explanation.x[0], transform(image))
        with Image.open(place / "explanations" / "cat.png") as sheet:
            assert sheet.format == "PNG"
            assert sheet.mode == "RGB"

    def test_long_and_strange_class_names(self, place, model, capsys):
        names = ("x" * 1_000, "[bold]", ":cat:", "a\nb", "\x1b[31m", "猫", "g", "h", "i", "j")
        path = place / "strange.safetensors"
        save_model(create_model(model), path, BCOS, classes=names, transform=ImageTransform(32))
        image = write_image(place / "x.png")
        assert cli.main(["explain", str(image), f"--model={path}", "--top=10", "--no-shares"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 11
        assert all(line.isprintable() for line in lines)
        shown = {line[28:].split()[0] for line in lines[1:]}
        assert {"[bold]", ":cat:", "a b", "�[31m", "猫", "x" * 27 + "…"} <= shown | {
            line[30:58].strip() for line in lines
        }


class TestTarget:
    def test_it_comes_first(self, explain, place):
        image = write_photograph(place / "x.png")

        def classes(*arguments):
            _, lines, _ = explain(image, "--no-shares", *arguments, fast=False)
            return [line[28:].split()[0] for line in lines[1:]]

        ranked = classes("--top=10")
        assert sorted(ranked) == sorted(CIFAR10_CLASSES)
        for name in (ranked[0], ranked[1], ranked[-1]):
            expected = [name, *(other for other in ranked if other != name)][:3]
            assert classes(f"--target={name}") == expected
            assert classes("--target", CIFAR10_CLASSES.index(name)) == expected
        assert classes("--target=cat", "--top=1") == ["cat"]

    def test_a_class_whose_name_is_a_number(self, place, model, capsys):
        path = place / "numbers.safetensors"
        names = tuple(str(9 - index) for index in range(10))
        save_model(create_model(model), path, BCOS, classes=names, transform=ImageTransform(32))
        image = write_image(place / "x.png")
        assert cli.main(["explain", str(image), f"--model={path}", "--target=2", "--top=1", "--json"]) == 0
        row = json.loads(capsys.readouterr().out)["classes"][0]
        assert (row["class"], row["index"]) == ("2", 7)


class TestJson:
    def test_lines(self, explain, place, model):
        for name in ("cat", "ship"):
            write_photograph(place / "photographs" / f"{name}.png", name)
        code, lines, errors = explain("photographs", "--json", "--top=2", fast=False)
        assert (code, errors) == (0, [])
        told = [json.loads(line) for line in lines]
        assert [entry["image"] for entry in told] == ["photographs/cat.png", "photographs/ship.png"]
        network = create_model(model)
        for entry in told:
            assert entry.keys() == {"image", "picture", "classes"}
            assert Path(entry["picture"]).is_file()
            x = network.transform(entry["image"]).unsqueeze(0)
            expected = bcoskit.explain(network, x, [[row["index"] for row in entry["classes"]]])
            for rank, row in enumerate(entry["classes"]):
                assert row["class"] == CIFAR10_CLASSES[row["index"]]
                assert row["logit"] == pytest.approx(float(expected.value[0, rank]), abs=1e-5)
                assert row["probability"] == pytest.approx(float(expected.value[0, rank].sigmoid()), abs=1e-5)
                assert row["contributions"] == pytest.approx(float(expected.contributions[0, rank].sum()), abs=1e-5)
                assert row["contributions"] + row["bias"] == pytest.approx(row["logit"], abs=1e-6)
                assert 0 <= row["residual"] < 1e-4

    def test_failures_are_lines_too(self, explain, place):
        write_image(place / "in" / "b.png")
        (place / "in" / "a.png").write_bytes(b"no image")
        code, lines, errors = explain("in", "--json")
        assert code == 1
        first, second = map(json.loads, lines)
        assert first == {"image": "in/a.png", "error": first["error"]}
        assert first["error"].startswith("in/a.png: is no image")
        assert second["classes"][0]["residual"] is None
        assert len(errors) == 2

    def test_strange_names(self, explain, place):
        names = [":cat:.png", "[red]x.png", "new\nline.png", "\x1b[31m.png", "猫.png", os.fsdecode(b"\xff.png")]
        for name in names:
            write_image(place / "in" / name)
        code, lines, _ = explain("in", "--json")
        assert code == 0
        assert {json.loads(line)["image"] for line in lines} == {f"in/{name}" for name in names}
        assert sorted(files(place / "explanations")) == sorted(names)
        code, lines, _ = explain("in")
        assert code == 0
        assert len(lines) == 1 + len(names)
        assert all(line.isprintable() for line in lines)
        assert {":cat:.png", "[red]x.png", "new line.png", "�[31m.png", "猫.png", "�.png"} == {
            line[:28].strip() for line in lines[1:]
        }


@pytest.fixture
def quick_collection():
    """Searches for garbage are among what appears from now on."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class TestBatches:
    def test_the_size_of_batches_changes_nothing(self, explain, place):
        for name in ("cat", "ship", "dog", "frog", "bird"):
            write_photograph(place / "in" / f"{name}.png", name)
        results = []
        for size in (1, 2, 5, 100):
            code, lines, _ = explain("in", "--json", f"--batch-size={size}", f"--out=out{size}")
            assert code == 0
            results.append([(row["class"], row["logit"]) for line in lines for row in json.loads(line)["classes"]])
        for result in results[1:]:
            assert [name for name, _ in result] == [name for name, _ in results[0]]
            assert [logit for _, logit in result] == pytest.approx([logit for _, logit in results[0]], abs=1e-5)
        assert (
            files(place / "out1")
            == files(place / "out100")
            == sorted(f"{path.stem}.png" for path in Path("in").iterdir())
        )

    def test_some_of_many_are_bad(self, explain, place):
        for index in range(100):
            write_image(place / "in" / f"{index:03}.png", color=(2 * index, 100, 0), size=(8, 8))
        bad = {"007.png": b"", "050.png": b"no image", "099.png": (place / "in" / "098.png").read_bytes()[:50]}
        for name, content in bad.items():
            (place / "in" / name).write_bytes(content)
        code, lines, errors = explain("in")
        assert code == 1
        assert len(lines) == 1 + 97
        assert errors[0] == "3 of 100 images could not be explained:"
        assert [line.split(":")[0].strip() for line in errors[1:]] == [f"in/{name}" for name in sorted(bad)]
        assert files(place / "explanations") == [f"{index:03}.png" for index in range(99) if index not in (7, 50)]

    def test_the_list_of_failures_has_an_end(self, explain, place):
        write_image(place / "in" / "good.png")
        for index in range(30):
            (place / "in" / f"{index}.png").write_bytes(b"")
        code, _, errors = explain("in")
        assert code == 1
        assert errors[0] == "30 of 31 images could not be explained:"
        assert len(errors) == 1 + 20 + 1
        assert errors[-1] == "  and 10 more"

    def test_nothing_but_failures(self, explain, place):
        for index in range(3):
            write_image(place / "in" / f"{index}.png").write_bytes(b"")
        code, lines, errors = explain("in")
        assert (code, lines) == (2, [])
        assert errors == ["bcoskit: error: in/0.png: is empty (and 2 more)"]
        assert not (place / "explanations").exists()

    @pytest.mark.usefixtures("quick_collection")
    def test_images_are_read_when_their_turn_comes(self, explain, place, monkeypatch):
        total, size = 30, 3
        for index in range(total):
            write_image(place / "in" / f"{index:02}.png")
        read, alive, ahead = _command_explain.read_image, [], []
        images = []

        def watched(path):
            gc.collect()
            alive.append(sum(image() is not None for image in images))
            ahead.append(len(alive) - 1 - len(list((place / "explanations").glob("*.png"))))
            image = read(path)
            images.append(weakref.ref(image))
            return image

        monkeypatch.setattr(_command_explain, "read_image", watched)
        assert explain("in", f"--batch-size={size}")[0] == 0
        assert len(alive) == total
        assert max(alive) <= torch.get_num_threads()  # each thread reads one
        assert max(ahead) <= 4 * size  # two batches read, one explained, one written

    @pytest.mark.usefixtures("quick_collection")
    def test_what_the_network_sees_is_let_go(self, explain, place, monkeypatch):
        total, size = 30, 3
        for index in range(total):
            write_image(place / "in" / f"{index:02}.png")
        views, alive, view = [], [], ImageTransform.view

        def watched(self, image):
            gc.collect()
            alive.append(sum(image() is not None for image in views))
            seen = view(self, image)
            views.append(weakref.ref(seen))
            return seen

        monkeypatch.setattr(ImageTransform, "view", watched)
        assert explain("in", f"--batch-size={size}")[0] == 0
        assert len(alive) == total
        assert max(alive) <= 4 * size + torch.get_num_threads()


class TestImages:
    @pytest.mark.parametrize("size", [(1, 1), (1, 300), (500, 2), (31, 33), (32, 32), (1200, 900)])
    def test_sizes(self, size, explain, place):
        code, lines, _ = explain(write_image(place / "x.png", size=size))
        assert (code, len(lines)) == (0, 2)

    def test_kinds(self, explain, place):
        kinds = [("L", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "png"), ("1", "png"), ("CMYK", "jpg")]
        kinds += [("CMYK", "tiff"), ("YCbCr", "jpg"), ("F", "tiff"), ("RGB", "webp"), ("RGB", "bmp"), ("P", "gif")]
        for index, (mode, suffix) in enumerate(kinds):
            path = place / "in" / f"{index:02}-{mode}.{suffix}"
            write_image(path, color=(1, 1, 1) if mode == "F" else (200, 60, 30), mode=mode)
        Image.new("I;16", (40, 30), 40_000).save(place / "in" / "I16.png")
        code, lines, errors = explain("in")
        assert (code, errors) == (0, [])
        assert len(lines) == 1 + len(kinds) + 1
        for path in (place / "explanations").iterdir():
            with Image.open(path) as sheet:
                assert sheet.width > 3 * 200

    def test_a_file_of_any_name(self, explain, place):
        for name in ("image", "1", "null", "{a", "x.png.bak", "a=b", "[1].jpg"):
            write_photograph(place / "x.png").rename(place / name)
            assert explain(name)[0] == 0
            assert (place / "explanations" / f"{Path(name).stem}.png").is_file()
        write_image(place / "x.png").rename(place / "--an-option.png")
        assert cli.main(["explain", "--top=1", "--no-shares", "--", "--an-option.png"]) == 0
        assert (place / "explanations" / "--an-option.png").is_file()


class TestPictures:
    """Where the pictures go."""

    @staticmethod
    def tree(*names):
        for name in names:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).touch()

    @staticmethod
    def pictures(*given, out="out"):
        placed = [(str(image), str(picture)) for image, picture in with_pictures(given, Path(out))]
        assert len({picture.casefold() for _, picture in placed}) == len(placed)
        return dict(placed)

    def test_the_structure_of_a_folder_is_kept(self, place):
        self.tree("in/b.jpg", "in/a/b.jpg", "in/a/c/b.jpg", "in/z.png")
        assert self.pictures("in") == {
            "in/b.jpg": "out/b.png",
            "in/a/b.jpg": "out/a/b.png",
            "in/a/c/b.jpg": "out/a/c/b.png",
            "in/z.png": "out/z.png",
        }

    def test_same_stem_in_one_folder(self, place):
        self.tree("in/a.gif", "in/a.jpg", "in/a.png", "in/sub/a.jpg", "in/sub/a.png")
        assert self.pictures("in") == {
            "in/a.gif": "out/a.png",
            "in/a.jpg": "out/a.jpg.png",
            "in/a.png": "out/a.png.png",
            "in/sub/a.jpg": "out/sub/a.png",
            "in/sub/a.png": "out/sub/a.png.png",
        }

    def test_a_folder_between_images_of_one_stem(self, place):
        self.tree("in/a.jpg", "in/a.k/x.png", "in/a.png", "in/b/a.jpg", "in/b.jpg", "in/b.png")
        pictures = self.pictures("in")
        assert list(pictures) == ["in/a.jpg", "in/a.k/x.png", "in/a.png", "in/b/a.jpg", "in/b.jpg", "in/b.png"]
        assert pictures["in/a.png"] == "out/a.png.png"
        assert pictures["in/b.png"] == "out/b.png.png"

    def test_names_that_look_like_made_ones(self, place):
        self.tree("in/a.gif", "in/a.jpg", "in/a.jpg.jpg", "in/a.jpg.png", "in/A.bmp", "in/a.jpg-2.png")
        assert len({picture.casefold() for picture in self.pictures("in").values()}) == 6

    def test_upper_and_lower_case(self, place):
        self.tree("in/IMAGE.JPG", "in/image.jpg", "in/Image.png")
        assert len({picture.casefold() for picture in self.pictures("in").values()}) == 3

    def test_equal_names_from_different_folders(self, place):
        self.tree("a/x.png", "b/x.png", "c/x.png", "c/y.png")
        assert self.pictures("a/x.png", "b/x.png", "c/x.png", "c/y.png") == {
            "a/x.png": "out/x.png",
            "b/x.png": "out/x.png.png",
            "c/x.png": "out/x.png-2.png",
            "c/y.png": "out/y.png",
        }

    def test_several_folders(self, place):
        self.tree("a/x.png", "a/sub/x.png", "b/x.png", "deep/a/x.png", "x.png", "a.png")
        assert self.pictures("a", "b", "deep/a", "x.png", "a.png") == {
            "a/x.png": "out/a/x.png",
            "a/sub/x.png": "out/a/sub/x.png",
            "b/x.png": "out/b/x.png",
            "deep/a/x.png": "out/a-2/x.png",
            "x.png": "out/x.png",
            "a.png": "out/a.png",
        }

    def test_the_same_image_several_times(self, place):
        self.tree("in/x.png", "in/sub/x.png")
        placed = list(with_pictures(["in", "in", "in/sub", "in/x.png", "in/x.png", "./in"], Path("out")))
        assert len(placed) == 2 + 2 + 1 + 1 + 1 + 2
        assert len({picture for _, picture in placed}) == len(placed)

    def test_patterns(self, place):
        self.tree("in/x.jpg", "in/x.png", "in/a/x.jpg", "in/b/x.jpg")
        assert self.pictures("in/*.jpg") == {"in/x.jpg": "out/x.png"}
        assert self.pictures("in/*/*.jpg") == {"in/a/x.jpg": "out/a/x.png", "in/b/x.jpg": "out/b/x.png"}
        assert self.pictures("in/**/x.*") == {
            "in/x.jpg": "out/x.png",
            "in/x.png": "out/x.png.png",
            "in/a/x.jpg": "out/a/x.png",
            "in/b/x.jpg": "out/b/x.png",
        }
        assert self.pictures("in/a/*", "in/b/*") == {"in/a/x.jpg": "out/a/x.png", "in/b/x.jpg": "out/b/x.png"}
        os.chdir("in")
        assert self.pictures("*.png") == {"x.png": "out/x.png"}

    def test_places_with_dots(self, place):
        self.tree("in/x.png", "in/a/y.png")
        os.chdir("in/a")
        assert self.pictures("..") == {"../x.png": "out/x.png", "../a/y.png": "out/a/y.png"}
        assert self.pictures(".") == {"y.png": "out/y.png"}
        assert self.pictures(".", "..")["../x.png"] == "out/in/x.png"

    def test_many_of_one_name(self, place):
        names = [f"{index}/x.png" for index in range(2_000)]
        self.tree(*names)
        assert len(self.pictures(*names)) == 2_000

    def test_earlier_pictures_are_no_images(self, place):
        self.tree("in/x.png", "in/out/x.png", "in/out/sub/y.png", "in/other/z.png")
        assert list(self.pictures("in", out="in/out")) == ["in/other/z.png", "in/x.png"]
        assert list(self.pictures("in/**/*.png", out="in/out")) == ["in/x.png", "in/other/z.png"]
        assert list(self.pictures(".", out="in/out")) == ["in/other/z.png", "in/x.png"]
        assert list(self.pictures("in/out", out="elsewhere")) == ["in/out/sub/y.png", "in/out/x.png"]
        assert list(self.pictures("in/out/x.png", out="in/out")) == ["in/out/x.png"]
        assert count_images(["in"], Path("in/out")) == 2
        with pytest.raises(ImageError, match="no images but those in `out`"):
            count_images(["in/out/sub/.."], Path("in/out/sub")) if False else count_images(["only"], self.only_out())

    @staticmethod
    def only_out():
        TestPictures.tree("only/out/x.png")
        return Path("only/out")

    def test_no_image_is_overwritten(self, place):
        self.tree("in/a.jpg", "in/a.png", "in/sub/b.jpg", "alone/c.jpg")
        for given, out in (
            (["in"], "in"),
            (["in/a.png"], "in"),
            (["in/a.jpg", "in/a.png"], "in"),
            (["in/*"], "in"),
            (["in/a.jpg", "in"], "in"),
            (["in"], "alone/../in"),
        ):
            with pytest.raises(
                ValueError, match=r"lies among the images: the picture of in/a\.(jpg|png) would overwrite"
            ):
                count_images(given, Path(out))
        assert count_images(["in"], Path("out")) == 3
        assert count_images(["in"], Path("alone")) == 3
        assert count_images(["alone"], Path("alone")) == 1
        assert count_images(["in/sub"], Path("in")) == 1
        Path("link").symlink_to("in")
        with pytest.raises(ValueError, match="would overwrite"):
            count_images(["in"], Path("link"))

    def test_missing(self, place):
        self.tree("in/x.png")
        Path("empty").mkdir()
        for given in ("absent", "absent.png", "absent/*.png", "in/*.jpg", "empty"):
            with pytest.raises(ImageError, match=re.escape(given)):
                count_images(["in", given], Path("out"))

    def test_files_are_found_when_their_turn_comes(self, monkeypatch):
        monkeypatch.setattr(_command_pictures, "find_images", lambda _: (Path(f"in/{index}.png") for index in count()))
        placed = list(islice(with_pictures(["in/*"], Path("out")), 3))
        assert [str(picture) for _, picture in placed] == ["out/0.png", "out/1.png", "out/2.png"]


class TestWriting:
    def test_names_as_planned(self, explain, place):
        for name in ("in/a.jpg", "in/a.png", "in/sub/a.png"):
            write_image(place / name)
        write_image(place / "other" / "a.png")
        before = contents(place)
        assert explain("in", "other", "in/a.png", "--out=deep/out")[0] == 0
        expected = ["a.png", "in/a.png", "in/a.png.png", "in/sub/a.png", "other/a.png"]
        assert files(place / "deep" / "out") == expected
        assert all(path.read_bytes() == content for path, content in before.items())

    def test_a_second_run(self, explain, place):
        write_image(place / "in" / "a.png")
        for _ in range(2):
            code, lines, _ = explain("in", "--out=in/explained")
            assert (code, len(lines)) == (0, 2)
        assert files(place / "in") == ["a.png", "explained/a.png"]

    def test_among_the_images(self, explain, place):
        write_image(place / "a.jpg")
        write_image(place / "a.png")
        before = contents(place)
        for given in (["a.jpg"], ["a.png"], ["."], ["*"], ["a.jpg", "a.png"]):
            code, lines, errors = explain(*given, "--out=.")
            if given == ["a.jpg"]:
                # Not an image of this run, but it lies where they do.
                assert "would overwrite" in errors[0]
            assert (code, lines, len(errors)) == (2, [], 1)
            assert "would overwrite a.png" in errors[0]
        assert contents(place) == before

    def test_save(self, explain, place, model):
        for name in ("cat", "dog"):
            write_photograph(place / "in" / f"{name}.png", name)
        assert explain("in", "--save", "--top=2", fast=False)[0] == 0
        assert files(place / "explanations") == ["cat.png", "cat.safetensors", "dog.png", "dog.safetensors"]
        network = create_model(model)
        both = [Explanation.load(place / "explanations" / f"{name}.safetensors") for name in ("cat", "dog")]
        x, target = torch.cat([saved.x for saved in both]), torch.cat([saved.target for saved in both])
        # In one batch as well: where two units of a MaxOut are nearly equal, rounding decides between them.
        expected = bcoskit.explain(network, x, target, shares=True)
        for index, saved in enumerate(both):
            assert torch.equal(saved.x[0], network.transform(place / "in" / f"{('cat', 'dog')[index]}.png"))
            torch.testing.assert_close(saved.weights, expected[index].weights, rtol=1e-4, atol=1e-6)
            assert saved.shares.keys() == expected.shares.keys() == {"fc.logits.bias"}

    def test_what_is_no_explanation_is_kept(self, explain, place, model):
        write_image(place / "in" / "x.png")
        (place / "out").mkdir()
        weights = place / "out" / "x.safetensors"
        weights.write_bytes(model.read_bytes())
        code, lines, errors = explain("in", "--out=out", "--save")
        assert (code, lines) == (2, [])
        assert errors[-1].endswith("would be overwritten, and is no explanation: choose another `out`")
        assert weights.read_bytes() == model.read_bytes()
        assert files(place / "out") == ["x.safetensors"]
        weights.unlink()
        for _ in range(2):  # what the command has written it writes anew
            assert explain("in", "--out=out", "--save")[0] == 0

    def test_two_classes_of_one_name(self, place, model, capsys):
        write_image(place / "x.png")
        network = create_model(model)
        save_model(network, place / "twice.safetensors", classes=["cat", "dog", "cat", *map(str, range(10, 17))])
        command = ["explain", "x.png", "--model=twice.safetensors", "--no-shares"]
        assert cli.main([*command, "--target=cat"]) == 2
        assert "names several classes: give one of 0, 2" in capsys.readouterr().err
        assert cli.main([*command, "--target=2"]) == 0

    def test_a_name_too_long_for_its_picture(self, explain, place):
        name = "n" * 251
        for image in (f"{name}.jpg", f"{name}.png", "other.png"):
            write_image(place / "in" / image)
        code, lines, errors = explain("in", "--out=out")
        assert (code, len(lines)) == (1, 3)
        assert errors[1].strip() == f"in/{name}.png: the name of its picture is too long"
        assert files(place / "out") == [f"{name}.png", "other.png"]
        assert explain("in", "--out=tensors", "--save")[0] == 1
        assert files(place / "tensors") == ["other.png", "other.safetensors"]
        assert explain("in", "--out=tensors", "--save", "--resume")[0] == 1

    def test_failure_of_writing(self, explain, place, monkeypatch):
        write_image(place / "x.png")

        def fail(self, path, *_arguments, **_keywords):
            Path(path).write_bytes(b"half a picture")
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr(Image.Image, "save", fail)
        code, _, errors = explain("x.png", "--save")
        assert code == 2
        (error,) = errors
        assert error == "bcoskit: error: explanations/x.png: No space left on device"
        assert files(place) == ["x.png"]

    def test_failure_keeps_the_earlier_picture(self, explain, place, monkeypatch):
        write_image(place / "x.png")
        assert explain("x.png")[0] == 0
        before = contents(place)

        def fail(*_arguments):
            raise PermissionError(13, "Permission denied", "explanations/x.png")

        monkeypatch.setattr(Path, "replace", fail)
        code, _, errors = explain("x.png")
        assert (code, errors) == (2, ["bcoskit: error: explanations/x.png: Permission denied"])
        assert contents(place) == before

    def test_a_folder_in_the_place_of_a_picture(self, explain, place):
        write_image(place / "x.png")
        (place / "explanations" / "x.png").mkdir(parents=True)
        code, _, errors = explain("x.png")
        assert code == 2
        assert len(errors) == 1
        assert files(place) == ["x.png"]

    def test_a_file_in_the_place_of_a_folder(self, explain, place):
        write_image(place / "in" / "sub" / "x.png")
        write_image(place / "out" / "sub") if False else (place / "out").mkdir()
        (place / "out" / "sub").write_text("mine")
        code, _, errors = explain("in", "--out=out")
        assert (code, len(errors)) == (2, 1)
        assert (place / "out" / "sub").read_text() == "mine"


class TestResume:
    @pytest.fixture
    def explained(self, explain, place):
        """Three images that are explained, the lines that were told, and when the pictures were written."""
        for name in ("cat", "dog", "frog"):
            write_photograph(place / "in" / f"{name}.png", name)
        code, lines, _ = explain("in", "--json")
        assert code == 0
        return lines, self.written(place)

    @staticmethod
    def written(place):
        return {path.name: path.stat().st_mtime_ns for path in (place / "explanations").glob("*.png")}

    @staticmethod
    def assert_same(lines, expected):
        """The same classes of the same images; numbers are rounded otherwise in batches of another size."""
        for line, other in zip(map(json.loads, lines), map(json.loads, expected), strict=True):
            assert line["image"] == other["image"]
            for row, row_of_other in zip(line["classes"], other["classes"], strict=True):
                assert row["class"] == row_of_other["class"]
                assert row["logit"] == pytest.approx(row_of_other["logit"], abs=1e-5)

    def test_what_is_there_is_told_and_left(self, explain, place, explained):
        lines, written = explained
        assert explain("in", "--json", "--resume") == (0, lines, [])
        assert self.written(place) == written
        assert explain("in", "--json")[0] == 0
        assert all(self.written(place)[name] > before for name, before in written.items())

    @pytest.mark.parametrize("option", ["--top=2", "--target=cat", "--shares", "--save"])
    def test_other_options_are_another_result(self, option, explain, place, explained):
        _, written = explained
        assert explain("in", "--resume", "--top=1", "--no-shares", option, fast=False)[0] == 0
        assert all(self.written(place)[name] > before for name, before in written.items())

    def test_other_weights_are_another_result(self, place, explained):
        _, written = explained
        assert cli.main(["explain", "in", "--resume", "--top=1", "--no-shares"]) == 0
        assert all(self.written(place)[name] > before for name, before in written.items())

    def test_a_changed_image_is_explained_again(self, explain, place, explained):
        _, written = explained
        write_photograph(place / "in" / "dog.png", "ship")
        assert explain("in", "--resume")[0] == 0
        changed = {name for name, before in written.items() if self.written(place)[name] > before}
        assert changed == {"dog.png"}

    def test_equal_names_sizes_and_times_in_two_folders(self, explain, place):
        for name, color in (("a", (255, 0, 0)), ("b", (0, 0, 255))):
            os.utime(write_image(place / name / "x.bmp", color), (1e9, 1e9))
        explain("a", "--json")
        code, lines, _ = explain("b", "--json", "--resume")
        assert code == 0
        self.assert_same(lines, explain("b", "--json", "--out=fresh")[1])
        written = self.written(place)
        assert explain("b", "--json", "--resume")[1] == lines
        assert self.written(place) == written

    @pytest.mark.parametrize("content", [b"", b"no picture", None])
    def test_what_is_no_picture_of_ours_is_made_again(self, content, explain, place, explained):
        _, written = explained
        if content is None:
            write_image(place / "explanations" / "dog.png")
        else:
            (place / "explanations" / "dog.png").write_bytes(content)
        code, lines, _ = explain("in", "--resume", "--json")
        assert code == 0
        self.assert_same(lines, explained[0])
        changed = {name for name, before in written.items() if self.written(place)[name] > before}
        assert changed == {"dog.png"}

    def test_missing_tensors_are_made_again(self, explain, place):
        write_image(place / "x.png")
        assert explain("x.png", "--save")[0] == 0
        (place / "explanations" / "x.safetensors").unlink()
        assert explain("x.png", "--save", "--resume")[0] == 0
        assert (place / "explanations" / "x.safetensors").exists()

    def test_it_goes_on_where_it_stopped(self, explain, place, monkeypatch):
        for index in range(20):
            write_image(place / "in" / f"{index:02}.png", color=(index, 100, 0))
        read, seen = _command_explain.read_image, []

        def interrupted(path):
            seen.append(path.name)
            if path.name == "15.png":
                raise KeyboardInterrupt
            return read(path)

        monkeypatch.setattr(_command_explain, "read_image", interrupted)
        assert explain("in", "--batch-size=2")[0] == 130
        there = self.written(place)
        assert 0 < len(there) < 20
        assert all(not path.name.endswith(".partial") for path in (place / "explanations").iterdir())
        seen.clear()
        monkeypatch.setattr(_command_explain, "read_image", lambda path: (seen.append(path.name), read(path))[1])
        code, lines, _ = explain("in", "--batch-size=2", "--resume", "--json")
        assert (code, len(lines)) == (0, 20)
        assert sorted(seen) == sorted({f"{index:02}.png" for index in range(20)} - there.keys())
        monkeypatch.setattr(_command_explain, "read_image", read)
        self.assert_same(explain("in", "--json", "--out=fresh")[1], lines)


class TestSeveralProcesses:
    def test_each_takes_its_share(self, explain, place, monkeypatch):
        for index in range(5):
            write_image(place / "in" / f"{index}.png", color=(40 * index, 100, 0))
        (place / "in" / "4.png").write_bytes(b"")
        told = []
        for rank in range(3):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", "3")
            code, lines, _ = explain("in", "--json")
            assert code == (1 if rank == 1 else 0)
            told.append([Path(json.loads(line)["image"]).name for line in lines])
        assert told == [["0.png", "3.png"], ["1.png", "4.png"], ["2.png"]]
        assert files(place / "explanations") == ["0.png", "1.png", "2.png", "3.png"]

    def test_pictures_are_not_written_among_the_images(self, explain, place, monkeypatch):
        for name in ("in/a.jpg", "in/sub/b.jpg"):
            write_image(place / name)
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        code, _, (error,) = explain("in", "--out=in")
        assert code == 2
        assert "`out` (='in') lies among the images" in error
        assert files(place) == ["in/a.jpg", "in/sub/b.jpg"]
        assert explain("in", "--out=elsewhere")[0] == 0
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert explain("in", "--out=in")[0] == 0

    def test_a_bad_image_of_one_costs_the_others_nothing(self, place):
        (place / "in").mkdir()
        large = place / "large.jpg"
        Image.effect_noise((3000, 3000), 50).save(large)
        for index in range(0, 24, 2):
            (place / "in" / f"{index:02}.jpg").write_bytes(b"")
            os.link(large, place / "in" / f"{index + 1:02}.jpg")
        command = [SCRIPT.with_name("torchrun"), "--nproc-per-node=2", "--no-python", SCRIPT, "explain", "in"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "--no-shares", "--top=1", "--out=out"], env=environment, capture_output=True, check=False
        )
        assert done.returncode == 1
        assert b"00.jpg: is empty (and 11 more)" in done.stderr
        assert len(files(place / "out")) == 12

    def test_more_processes_than_images(self, explain, place, monkeypatch):
        write_image(place / "x.png")
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert explain("x.png") == (0, [], [])


class TestCompile:
    def test_as_without(self, explain, place, monkeypatch):
        for name in ("cat", "dog", "frog"):
            write_photograph(place / "in" / f"{name}.png", name)
        calls = []

        def eagerly(network):
            program = bcoskit.compile_explain(network, backend="eager")

            def called(x, target):
                calls.append(len(x))
                return program(x, target)

            return called

        monkeypatch.setattr(_command_explain, "compile_explain", eagerly)
        options = ["in", "--json", "--top=2", "--no-shares", "--target=ship", "--batch-size=2"]
        plain = [json.loads(line)["classes"] for line in explain(*options, fast=False)[1]]
        assert calls == []
        code, lines, _ = explain(*options, "--compile", fast=False)
        assert (code, calls) == (0, [2, 2])
        for line, expected in zip(lines, plain, strict=True):
            for row, other in zip(json.loads(line)["classes"], expected, strict=True):
                assert row["class"] == other["class"]
                assert row["logit"] == pytest.approx(other["logit"], abs=1e-5)
                assert row["contributions"] == pytest.approx(other["contributions"], abs=1e-4)

    def test_constants_cannot_be_compiled(self, explain, place):
        write_image(place / "x.png")
        code, _, errors = explain("x.png", "--compile", fast=False)
        assert code == 2
        assert "--no-shares" in errors[0]


class TestAudit:
    def test_a_network_that_passes(self, capsys):
        assert cli.main(["audit", BCOS]) == 0
        printed = capsys.readouterr().out
        assert printed.splitlines()[-1] == "passed"
        assert "fc.logits.bias" in printed

    def test_an_ordinary_network_and_its_conversion(self, capsys):
        for arguments in (["timm/test_resnet"], ["timm/test_vit3", "--convert", "exact", "--products=first"]):
            assert cli.main(["audit", *arguments, "--json"]) == 0
            told = json.loads(capsys.readouterr().out)
            assert told["passed"]
            assert (told["numeric"], told["offenders"]) == (0, [])
            assert told["residual"] < 1e-10

    def test_a_network_that_does_not(self, capsys, monkeypatch):
        network = create_model(BCOS)
        network.conv1 = torch.nn.Sequential(network.conv1, Digamma())
        monkeypatch.setattr("bcoskit._command_audit.create_model", lambda *_arguments, **_options: network)
        assert cli.main(["audit", BCOS, "--json"]) == 1
        told = json.loads(capsys.readouterr().out)
        assert told["offenders"][0]["module"] == "conv1.1"
        assert "bcoskit.rule" in told["offenders"][0]["suggestion"]
        assert cli.main(["audit", BCOS]) == 1
        assert "digamma" in capsys.readouterr().out

    def test_an_image(self, capsys):
        assert cli.main(["audit", BCOS, f"--image={PHOTOGRAPHS / 'cat.jpg'}"]) == 0
        capsys.readouterr()
        assert cli.main(["audit", BCOS, "--image=absent.jpg"]) == 2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["timm/nothing"], "timm has none of the name"),
            (["nothing"], "nothing"),
            (["timm/test_resnet", "--weights=x.pth"], "x.pth: no such file"),
            ([BCOS, "--convert=exact"], "B-cos layer already"),
            ([BCOS, "--convert=v9"], "v9"),
        ],
    )
    def test_one_line(self, arguments, message, capsys):
        assert cli.main(["audit", *arguments]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert message in error


class Digamma(torch.nn.Module):
    """Not linear, and without a rule."""

    def forward(self, x):
        return torch.digamma(x + 2)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["dance"],
                "there is no command 'dance'; there are: explain, train, align, evaluate, audit, export, app, models",
            ),
            (["explain"], "required: images"),
            (["explain", "absent.png"], "absent.png: no such file or folder"),
            (["explain", "good.png", "absent/"], "absent: no such file or folder"),
            (["explain", "*.jpg"], "*.jpg: no file found"),
            (["explain", "empty"], "empty: no file found"),
            (["explain", "bad.png"], "bad.png: is no image of a known format"),
            (["explain", "nothing.png"], "nothing.png: is empty"),
            (["explain", "half.png"], "half.png: damaged or truncated image"),
            (["explain", "new\nline\x1b.png"], "new line�.png: no such file"),
            (
                ["explain", "good.png", "--model=resnet"],
                "'resnet' is neither the name of a model nor a .safetensors file",
            ),
            (["explain", "good.png", "--model", "resnet20.bcos"], "near: resnet20.bcos_cifar10"),
            (["explain", "good.png", "--model=absent.safetensors"], "absent.safetensors: no such file"),
            (["explain", "good.png", "--model=bad.safetensors"], "bad.safetensors: is no intact safetensors file"),
            (["explain", "good.png", "--model=bare.safetensors"], "bare.safetensors: does not say which network"),
            (["explain", "good.png", "--model=good.png"], "'good.png' is neither"),
            (
                ["explain", "good.png", "--model=resnet110.bcos_cifar10"],
                "has no trained weights; networks that have some: resnet20.bcos_cifar10",
            ),
            (
                ["explain", "good.png", "--target=unicorn"],
                "`target` (='unicorn') is neither a class nor an index below 10",
            ),
            (["explain", "good.png", "--target=10"], "`target` (='10') is neither"),
            (["explain", "good.png", "--target=-1"], "`target` (='-1') is neither"),
            (["explain", "good.png", "--target=1.0"], "`target` (='1.0') is neither"),
            (["explain", "good.png", "--target="], "`target` (='') is neither"),
            (["explain", "good.png", "--top=0"], "`top` (=0) must be between 1 and the number of classes, 10"),
            (["explain", "good.png", "--top=11"], "`top` (=11) must be between"),
            (["explain", "good.png", "--top=-1"], "`top` (=-1) must be between"),
            (["explain", "good.png", "--top=many"], "top"),
            (["explain", "good.png", "--top=1.5"], "top"),
            (["explain", "good.png", "--batch-size=0"], "`batch_size` (=0) must be at least 1"),
            (["explain", "good.png", "--device=toaster"], "`device` (='toaster') cannot be used"),
            (["explain", "good.png", "--device=meta"], "`device` (='meta') cannot be used: its tensors have no values"),
            (["explain", "good.png", "--out=bad.png"], "`out` (='bad.png') must be a folder"),
            (["explain", "good.png", "--out=bad.png/deeper"], "bad.png/deeper: Not a directory"),
            (["explain", "good.png", "--colour=red"], "--colour"),
            (["explain", "good.png", "--top"], "--top"),
            (["explain", "good.png", "-x"], "-x"),
            (["explain", "good.png", "--save=maybe"], "--save"),
            (["models", "vgg20*"], "`pattern` (='vgg20*') matches no model"),
            (["models", "a", "b"], "unrecognized arguments: b"),
            (["--explain"], "there is no command '--explain'"),
        ],
    )
    def test_one_line(self, arguments, message, place, capsys):
        good = write_image(place / "good.png")
        (place / "bad.png").write_text("no image")
        (place / "nothing.png").touch()
        (place / "half.png").write_bytes(good.read_bytes()[:60])
        (place / "empty").mkdir()
        (place / "bad.safetensors").write_text("no weights")
        (place / "bare.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        before = contents(place)
        assert cli.main(arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("bcoskit: error: ")
        assert printed.err.endswith("\n")
        assert printed.err[:-1].isprintable()
        assert message in printed.err
        assert contents(place) == before
        assert not (place / "explanations").exists()

    def test_the_control_is_accepted(self, place, capsys):
        write_image(place / "good.png")
        assert cli.main(["explain", "good.png"]) == 0

    def test_both_spellings_of_options(self, explain, place):
        write_image(place / "x.png")
        for options in (
            ["--batch-size=2"],
            ["--batch_size=2"],
            ["--batch-size", "2"],
            ["--no_shares"],
            ["--no-shares"],
        ):
            assert explain("x.png", *options)[0] == 0
        write_image(place / "with-dash.png")
        assert explain("with-dash.png", "--out=out-with-dash")[0] == 0
        assert files(place / "out-with-dash") == ["with-dash.png"]

    def test_traceback_on_request(self, place, monkeypatch):
        monkeypatch.setenv("BCOSKIT_DEBUG", "1")
        with pytest.raises(ImageError, match=r"absent\.png"):
            cli.main(["explain", "absent.png"])

    def test_errors_that_are_not_for_users(self, monkeypatch, capsys):
        def fail():
            raise KeyError("x\ny")

        monkeypatch.setitem(cli.COMMANDS, "models", cli.Command("", fail))
        assert cli.main(["models"]) == 2
        assert capsys.readouterr().err == "bcoskit: error: KeyError: 'x\\ny'\n"

    def test_interruption(self, explain, place, monkeypatch):
        write_image(place / "x.png")

        def interrupt(_path):
            raise KeyboardInterrupt

        monkeypatch.setattr(_command_explain, "read_image", interrupt)
        assert explain("x.png") == (130, [], ["bcoskit: error: interrupted"])


class TestInstalledScript:
    """The command as a user runs it, with the weights that ship."""

    @staticmethod
    def run(*arguments, **keywords):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
        return subprocess.run(
            [SCRIPT, *arguments], capture_output=True, text=True, env=environment, check=False, **keywords
        )

    def test_explains(self, place):
        done = self.run("explain", PHOTOGRAPHS, "--top=2", "--target=cat", "--out", "out")
        assert (done.returncode, done.stderr) == (0, "")
        rows = done.stdout.splitlines()[1:]
        names = sorted(path.stem for path in PHOTOGRAPHS.iterdir())
        assert len(rows) == 2 * len(names)
        assert all(row[28:].split()[0] == "cat" for row in rows[::2])
        assert files(place / "out") == [f"{name}.png" for name in names]

    def test_json_stays_apart_from_the_progress_on_a_terminal(self, place):
        terminal, other_end = pty.openpty()
        command = [SCRIPT, "explain", PHOTOGRAPHS / "automobile.jpg", "--json", "--no-shares"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=other_end, cwd=place) as process:
            output = process.stdout.read()
        os.close(other_end)
        seen = os.read(terminal, 100_000)
        os.close(terminal)
        assert process.returncode == 0
        told = json.loads(output)
        assert told["classes"][0]["class"] == "automobile"
        assert b"Explaining" in seen
        assert b"classes" not in seen

    @pytest.mark.parametrize("arguments", [["audit", BCOS], ["explain", PHOTOGRAPHS / "cat.jpg", "--top=1"]])
    def test_terminals_without_all_characters(self, arguments, place, monkeypatch):
        monkeypatch.setenv("PYTHONIOENCODING", "ascii")
        done = self.run(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert "?" in done.stdout
        assert "fc.logits.bias" in done.stdout or "W(x)?x" in done.stdout

    def test_refuses(self, place):
        done = self.run("explain", "absent.png")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "bcoskit: error: absent.png: no such file or folder\n"
        assert files(place) == []
        done = self.run("explian", "absent.png")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)

    def test_a_reader_that_goes_away(self, place):
        command = [SCRIPT, "models", "--json"]
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
        os.close(writing)
        assert done.returncode == 1
        assert done.stderr == b""
