"""Runs: resumed after any part, shared by processes, with the same rows; the command line; wrong data."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bcoskit.cli import main
from bcoskit.evaluation import (
    Completeness,
    EnergyPointing,
    GridPointing,
    Perturbation,
    Randomization,
    Result,
    Stability,
    accuracy,
    accuracy_figures,
    energy_pointing_game,
    evaluate,
    example_sheet,
    grid_scores,
    write_results,
)
from evaluation_toys import images, noise, patches, small

METRICS = (GridPointing(grid=2, count=3), Perturbation("deletion", steps=4, count=5))
METHODS = ("bcos", "rise")


class Interrupted(BaseException):
    """As a kill is: nobody catches it."""


def run(out, **options):
    return evaluate(patches(), images(), METRICS, METHODS, out=out, **options)


def rows_of(results):
    return [(result.metric, result.method, list(result.rows)) for result in results]


def test_a_run_that_was_broken_off_ends_with_the_same_rows(tmp_path):
    whole = run(tmp_path / "whole")
    broken = tmp_path / "broken"
    for after in (1, 3, 6, 11):
        done = []

        def stop(job, *_, done=done, after=after):
            done.append(job)
            if len(done) > after:
                raise Interrupted

        with pytest.raises(Interrupted):
            run(broken, resume=True, progress=stop)
    resumed = run(broken, resume=True)
    assert rows_of(resumed) == rows_of(whole)
    for folder in (tmp_path / "whole", broken):
        write_results(run(folder, resume=True), folder)
    assert (broken / "rows.jsonl").read_bytes() == (tmp_path / "whole" / "rows.jsonl").read_bytes()
    assert pq.read_table(broken / "rows.parquet").equals(pq.read_table(tmp_path / "whole" / "rows.parquet"))


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    run(tmp_path)

    def never(*_):
        raise Interrupted

    monkeypatch.setattr(GridPointing, "measure", never)
    monkeypatch.setattr(Perturbation, "measure", never)
    assert rows_of(run(tmp_path, resume=True))
    damaged = next(next((tmp_path / "parts").glob("grid_pointing-rise*")).iterdir())
    damaged.write_text(damaged.read_text()[:20])
    with pytest.raises(Interrupted):
        run(tmp_path, resume=True)


def test_processes_share_the_parts(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    done = {}
    original = GridPointing.measure

    def counted(self, model, dataset, units, method):
        done.setdefault(os.environ["RANK"], []).append(method)
        if os.environ["RANK"] == "0" and len(done["0"]) == 3:
            raise Interrupted
        return original(self, model, dataset, units, method)

    monkeypatch.setattr(GridPointing, "measure", counted)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(Interrupted):
        run(tmp_path / "shared")
    monkeypatch.setenv("RANK", "1")  # takes over what the other one, which was killed, has not done
    assert rows_of(run(tmp_path / "shared")) == rows_of(whole)
    assert done["0"] == ["bcos", "rise", "bcos"]  # both are tried before the long work
    assert sorted(done["1"]) == ["bcos", "bcos", "rise", "rise"]


def test_another_run_is_refused(tmp_path):
    run(tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run already"):
        run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"`batch_size`.* is not that of the run"):
        run(tmp_path / "run", resume=True, batch_size=2)
    with pytest.raises(ValueError, match="`weights`"):
        evaluate(patches(scale=5), images(), METRICS, METHODS, out=tmp_path / "run", resume=True)
    (tmp_path / "run" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        run(tmp_path / "run", resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="must be a new folder"):
        run(tmp_path / "other")
    with pytest.raises(ValueError, match="must have different names"):
        evaluate(patches(), images(), METRICS, ("bcos", "bcos"), out=tmp_path / "new")
    with pytest.raises(ValueError, match="evaluation mode"):
        evaluate(patches().train(), images(), METRICS, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


class Holes:
    """Images of which one cannot be read, and one has another size."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index == 3:
            raise OSError("damaged")
        x, label = images()[index]
        return (x.repeat(1, 2, 2), label) if index == 4 else (x, label)


def test_a_failing_image_does_not_lose_the_run(tmp_path):
    results = evaluate(patches(), Holes(), METRICS, out=tmp_path, batch_size=4)
    accuracy, pointing, deleted = results
    assert [failure.unit for failure in accuracy.failures] == [3]
    assert accuracy.failures[0].reason == "image 3: damaged"
    assert len(accuracy.rows) == 19
    assert 3 not in {row["image"] for row in pointing.rows}
    assert len(deleted.rows) + len(deleted.failures) == 5
    summary = write_results(results, tmp_path)
    assert summary["failures"][0] == {"metric": "accuracy", "method": None, "unit": 3, "reason": "image 3: damaged"}


def test_a_method_that_never_works_is_told_at_once(tmp_path):
    calls = []

    def broken(model, x, target):
        calls.append(len(x))
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        evaluate(patches(), images(), (Perturbation("deletion"),), (broken,), out=tmp_path)
    assert len(calls) == 5


def test_what_fails_alike_and_stands_together_does_not_lose_the_run():
    masks = [torch.zeros(4, 4)] * 14 + [torch.eye(4)] * 6
    data = [(x, label, mask) for (x, label), mask in zip(images(), masks, strict=True)]
    for batch_size in (1, 3, 20):
        result = energy_pointing_game(patches(), data, "gradient", batch_size=batch_size)
        assert [row["unit"] for row in result.rows] == list(range(14, 20))
        assert len(result.failures) == 14
    with pytest.raises(ValueError, match="not zeros alone"):
        energy_pointing_game(patches(), [(*item[:2], masks[0]) for item in data], "gradient")


def test_what_does_not_fit_is_told_before_the_long_work(tmp_path):
    def counted(model, x, target):
        counted.calls += 1
        return x.sum(1)

    def broken(model, x, target):
        raise ValueError("no such thing")

    counted.calls = 0
    metrics = (Perturbation("deletion", steps=2),)
    with pytest.raises(ValueError, match="no such thing"):
        evaluate(patches(), images(), metrics, (counted, broken), out=tmp_path)
    assert counted.calls == 1
    # The folder is free for other methods, which take what is done.
    results = evaluate(patches(), images(), metrics, (counted,), out=tmp_path)
    assert len(results[1].rows) == counted.calls == 20
    with pytest.raises(ValueError, match="holds a run already"):
        evaluate(patches(), images(), metrics, (counted,), out=tmp_path)
    with pytest.raises(ValueError, match="`methods`"):
        evaluate(patches(), images(), metrics, (counted, broken), out=tmp_path, resume=True)


def test_what_failed_when_it_was_tried_is_tried_again(tmp_path, monkeypatch):
    metrics = (Perturbation("deletion", steps=2, count=3),)

    def not_yet(*_):
        raise OSError("the disk is not there")

    with monkeypatch.context() as patch:
        patch.setattr(Perturbation, "measure", not_yet)
        with pytest.raises(ValueError, match="the disk is not there"):
            evaluate(patches(), images(), metrics, out=tmp_path)
    assert len(evaluate(patches(), images(), metrics, out=tmp_path)[1].rows) == 3


def test_another_batch_size_after_a_rejected_run(tmp_path):
    with pytest.raises(ValueError, match="`patch`"):
        evaluate(patches(), images(), (Completeness(), Perturbation("deletion", patch=3)), out=tmp_path)
    metrics = (Completeness(), Perturbation("deletion", patch=2))
    results = evaluate(patches(), images(), metrics, out=tmp_path, batch_size=7)
    assert [len(result.rows) for result in results] == [20, 20, 20]


def test_scores_that_are_not_finite_are_failures(tmp_path):
    class Divided(torch.nn.Module):
        def forward(self, x):
            return patches()(x / x.flatten(1).norm(dim=1)[:, None, None, None])  # of zeros not a number

    data = [(x[:5], label) for x, label in images()]
    for metric in (Perturbation("deletion", steps=2, count=3), Completeness(count=3)):
        with pytest.raises(ValueError, match="must be finite logits"):
            evaluate(Divided().eval(), data, (metric,), ("gradient",), out=tmp_path / metric.name)
    assert torch.equal(grid_scores(torch.full((1, 4, 64, 64), 1e38), 2), torch.full((1, 4), 0.25))


def test_rows_say_what_they_were_measured_by(tmp_path):
    every = (
        *METRICS,
        Randomization(count=2),
        Stability(draws=2, count=2),
        Completeness(count=2),
        Perturbation("insertion", steps=2, count=2),
    )
    data = [(x[:5], label) for x, label in images()]
    results = evaluate(patches(), data, every, out=tmp_path, name="patches")
    summary = write_results(results, tmp_path)
    rows = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == len(lines) == sum(len(result.rows) for result in results)
    for row, line in zip(rows, lines, strict=True):
        assert {key: value for key, value in row.items() if value is not None} == {
            key: value for key, value in line.items() if value is not None
        }
        assert row["model"] == "patches"
        assert row["weights"] == summary["weights"]
        assert row["torch_version"] == torch.__version__
    pointing = [row for row in rows if row["metric"] == "grid_pointing"]
    assert [row["seed"] for row in pointing] == [42] * 12
    line = next(line for line in summary["results"] if line["metric"] == "grid_pointing")
    assert line["median"] == 1.0
    assert line["count"] == 12
    assert "| grid_pointing | bcos | 12 | 1 | 1 to 1 |" in (tmp_path / "summary.md").read_text()
    for name in ("grid_pointing.png", "deletion.png", "deletion_curves.png", "stability.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 300


def test_intervals_are_bootstraps_of_units():
    result = evaluate_small()
    low, high = result.interval()
    assert low <= result.median <= high
    assert result.interval() == (low, high)
    assert result.interval(0.5)[0] >= low
    assert result.interval(seed=1) != (low, high)
    with pytest.raises(ValueError, match="`level`"):
        result.interval(1.5)


def evaluate_small():
    from bcoskit.evaluation import deletion

    return deletion(small(), noise(30), "input_x_gradient", steps=4)


def test_energy_pointing_in_a_run(tmp_path):
    data = [(x, label, torch.tensor([[0, 0, 4, 2]])) for x, label in images()]
    results = evaluate(patches(), data, (EnergyPointing(),), out=tmp_path)
    assert results[1].scores.tolist() == pytest.approx([0.5] * 20)


@pytest.fixture
def photographs(tmp_path):
    """The photographs that ship, in folders by class."""
    for path in (files("bcoskit.assets") / "photographs").iterdir():
        name = path.name.partition(".")[0]
        if path.name.endswith(".jpg") and name != "chelsea":
            folder = tmp_path / "data" / "test" / name
            folder.mkdir(parents=True)
            with Image.open(path) as image:
                image.save(folder / "photograph.png")
    return tmp_path / "data"


def test_the_command(photographs, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["evaluate", "resnet20.bcos_cifar10", "--data", str(photographs), "--out", str(out), "--count", "1"]
    arguments += ["--grid", "2", "--metrics", "grid_pointing", "completeness", "--methods", "bcos,gradient"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "10 images: top-1" in printed.out
    assert "grid_pointing" in printed.out
    with Image.open(out / "grid_pointing_examples.png") as picture:
        assert picture.width > 300
    assert main(arguments) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main([*arguments, "--resume", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["accuracy"]["top1"] > 0.5
    assert {line["method"] for line in summary["results"]} == {"bcos", "gradient"}
    exact = next(line for line in summary["results"] if (line["metric"], line["method"]) == ("completeness", "bcos"))
    assert exact["median"] < 1e-5


def test_the_command_with_boxes(photographs, tmp_path, capsys):
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps([[[0, 0, 32, 32]]] * 9 + [[[0, 0, 99, 32]]]))
    arguments = ["evaluate", "resnet20.bcos_cifar10", "--data", str(photographs), "--metrics", "energy_pointing"]
    arguments += ["--out", str(tmp_path / "out"), "--boxes", str(boxes)]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert "energy_pointing, unit 9: the box (0, 0, 99, 32)" in printed.err
    boxes.write_text("[")
    assert main([*arguments, "--resume"]) == 2
    assert "is no JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "nothing"], "`metrics` (=['nothing']) must be of: accuracy, grid_pointing"),
        (["--methods", "nothing"], "`methods`"),
        (["--metrics", "energy_pointing"], "`boxes`"),
        (["--grid", "1"], "`grid`"),
        (["--count", "500"], "`count` (=500)"),
        (["--smooth", "4"], "`smooth`"),
        (["--batch-size", "0"], "`batch_size`"),
        (["--device", "nothing"], "`device`"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options(photographs, tmp_path, capsys, arguments, message):
    given = [
        "evaluate",
        "resnet20.bcos_cifar10",
        "--data",
        str(photographs),
        "--out",
        str(tmp_path / "out"),
        *arguments,
    ]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("bcoskit: error: ")
    assert error.count("\n") == 1
    assert message in error


def test_data_of_other_classes(photographs, tmp_path, capsys):
    shutil.copytree(photographs / "test" / "cat", photographs / "test" / "eleventh")
    assert main(["evaluate", "resnet20.bcos_cifar10", "--data", str(photographs), "--out", str(tmp_path / "o")]) == 2
    assert "has 11 classes, the network 10" in capsys.readouterr().err


def test_one_metric_with_several_settings(tmp_path):
    large = [(x.repeat_interleave(4, 1).repeat_interleave(4, 2), label) for x, label in images()]
    metrics = (GridPointing(2, 2, smooth=1), GridPointing(2, 2, smooth=9), Perturbation("deletion", steps=2, count=2),
               Perturbation("deletion", steps=4, count=2))  # fmt: skip
    results = evaluate(patches(), large, metrics, out=tmp_path)
    _, sharp, blurred, coarse, fine = results
    assert sharp.median == 1.0 > blurred.median
    assert [len(result.rows[0]["curve"]) for result in (coarse, fine)] == [3, 5]
    summary = write_results(results, tmp_path)
    names = [line["metric"] for line in summary["results"]]
    assert names == ["grid_pointing", "grid_pointing_2", "deletion", "deletion_2"]
    assert (tmp_path / "deletion_2_curves.png").exists()


def test_other_data_and_other_methods_are_refused(tmp_path):
    def method(model, x, target):
        return x

    evaluate(patches(), images(), METRICS, (method,), out=tmp_path / "run")
    reversed_labels = [(x, 4 - label) for x, label in images()]
    with pytest.raises(ValueError, match="`data`"):
        evaluate(patches(), reversed_labels, METRICS, (method,), out=tmp_path / "run", resume=True)

    def method(model, x, target):
        return -x

    with pytest.raises(ValueError, match="`methods`"):
        evaluate(patches(), images(), METRICS, (method,), out=tmp_path / "run", resume=True)
    (tmp_path / "parts" / "parts").mkdir(parents=True)
    with pytest.raises(ValueError, match="must be a new folder"):
        run(tmp_path / "parts")


def test_what_failed_is_tried_again(tmp_path):
    data = images()
    broken = {3}

    class Sometimes(Holes):
        def __getitem__(self, index):
            if index in broken:
                raise OSError("not yet there")
            return data[index]

    metrics = (Perturbation("deletion", steps=2),)
    assert len(evaluate(patches(), Sometimes(), metrics, out=tmp_path)[1].failures) == 1
    broken.clear()
    results = evaluate(patches(), Sometimes(), metrics, out=tmp_path, resume=True)
    assert [len(result.rows) for result in results] == [20, 20]
    assert not results[0].failures


def test_numbers_of_numpy_and_names_of_paths_are_settings_too(tmp_path):
    metrics = (GridPointing(grid=2, count=np.int64(2)),)
    first = evaluate(patches(), images(), metrics, out=str(tmp_path))
    assert rows_of(evaluate(patches(), images(), metrics, out=tmp_path, resume=True)) == rows_of(first)


def test_images_of_fewer_classes_are_matched_by_name(photographs, tmp_path, capsys):
    shutil.rmtree(photographs / "test" / "airplane")
    command = ["evaluate", "resnet20.bcos_cifar10", "--data", str(photographs), "--metrics", "accuracy", "--json"]
    assert main([*command, "--out", str(tmp_path / "o")]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"]["top1"] > 0.7
    (photographs / "test" / "cat").rename(photographs / "test" / "lion")
    assert main([*command, "--out", str(tmp_path / "p")]) == 2
    assert "is no 'lion'" in capsys.readouterr().err


def test_examples_show_what_every_method_has(tmp_path):
    results = evaluate(patches(), images(), (GridPointing(2, 3),), ("bcos",), out=tmp_path / "a")
    fewer = replace(results[1], rows=[row for row in results[1].rows if row["unit"] != 0])
    example_sheet(patches(), images(), [results[1], fewer], ["bcos", "bcos"], tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").exists()


def test_what_failed_and_decides_who_is_in_a_grid(tmp_path):
    data, broken = images(), {9, 19}

    class Sometimes:
        def __len__(self):
            return 20

        def __getitem__(self, index):
            if index in broken:
                raise OSError("not yet there")
            return data[index]

    metrics = (GridPointing(grid=2, count=3),)
    evaluate(patches(), Sometimes(), metrics, out=tmp_path / "mended")
    broken.clear()
    mended = evaluate(patches(), Sometimes(), metrics, out=tmp_path / "mended", resume=True)
    assert rows_of(mended) == rows_of(evaluate(patches(), data, metrics, out=tmp_path / "whole"))
    others = [(x / 2, label) for x, label in data]
    with pytest.raises(ValueError, match="`data`"):
        evaluate(patches(), others, metrics, out=tmp_path / "mended", resume=True)


class Regions:
    def __init__(self, regions):
        self.regions, self.images = regions, images(4)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return *self.images[index], self.regions[index]


def test_other_regions_are_refused(tmp_path):
    left, right = torch.tensor([[0, 0, 2, 4]]), torch.tensor([[2, 0, 4, 4]])
    evaluate(patches(), Regions([left] * 4), (EnergyPointing(),), out=tmp_path)
    with pytest.raises(ValueError, match="`data`"):
        evaluate(patches(), Regions([left] * 3 + [right]), (EnergyPointing(),), out=tmp_path, resume=True)
    evaluate(patches(), Regions([left] * 4), (EnergyPointing(),), out=tmp_path, resume=True)


def scaled(factor):
    def scaling(model, x, target):
        return sorted([x], key=lambda each: factor)[0] * factor

    return scaling


def test_functions_are_told_apart_by_what_they_hold(tmp_path):
    metrics = (Perturbation("deletion", steps=2),)
    first = evaluate(patches(), images(), metrics, (scaled(1),), out=tmp_path)
    with pytest.raises(ValueError, match="`methods`"):
        evaluate(patches(), images(), metrics, (scaled(-1),), out=tmp_path, resume=True)
    assert rows_of(evaluate(patches(), images(), metrics, (scaled(1),), out=tmp_path, resume=True)) == rows_of(first)
    addresses = [json.loads((tmp_path / "settings.json").read_text())["methods"]]
    code = "import json, sys; sys.path.insert(0, sys.argv[1]); from evaluation.test_run import scaled; "
    code += "from bcoskit.evaluation._run import _identity; print(json.dumps([_identity(scaled(1))]))"
    tests = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code, str(tests)], capture_output=True, text=True, check=True)
    assert [json.loads(found.stdout)] == addresses


def test_a_rejected_run_leaves_its_folder_free(tmp_path):
    with pytest.raises(ValueError, match="`count`"):
        evaluate(patches(), images(), (GridPointing(grid=2, count=500),), out=tmp_path)
    predictions = list((tmp_path / "parts").glob("accuracy*/*.json"))
    written = [file.stat().st_mtime_ns for file in predictions]
    results = evaluate(patches(), images(), (GridPointing(grid=2, count=2),), out=tmp_path)
    assert len(results[1].rows) == 2 * 4
    assert [file.stat().st_mtime_ns for file in predictions] == written != []
    with pytest.raises(ValueError, match="holds a run already"):
        evaluate(patches(), images(), (GridPointing(grid=2, count=3),), out=tmp_path)


def test_a_package_that_is_missing_leaves_the_folder_free(tmp_path):
    def missing(*_, **__):
        raise ModuleNotFoundError("`needy` needs a package: pip install it")

    metrics = (GridPointing(grid=2, count=2),)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        evaluate(patches(), images(), metrics, (missing,), out=tmp_path)
    assert len(evaluate(patches(), images(), metrics, out=tmp_path)[1].rows) == 2 * 4


def test_a_run_that_is_cut_off_at_its_predictions_is_not_rejected(tmp_path):
    def stop(*_):
        raise Interrupted

    metrics = (GridPointing(grid=2, count=2),)
    with pytest.raises(Interrupted):
        evaluate(patches(), images(), metrics, out=tmp_path, progress=stop)
    with pytest.raises(ValueError, match="holds a run already"):
        evaluate(patches(), images(), metrics, out=tmp_path)
    with pytest.raises(ValueError, match="`metrics`"):
        evaluate(patches(), images(), (GridPointing(grid=2, count=3),), out=tmp_path, resume=True)


def test_items_with_more_parts(tmp_path):
    data = [(x, label, f"{index}.png" if index else None) for index, (x, label) in enumerate(images())]
    metrics = (Perturbation("deletion", steps=2, count=3),)
    first = evaluate(patches(), data, metrics, out=tmp_path)
    assert rows_of(evaluate(patches(), data, metrics, out=tmp_path, resume=True)) == rows_of(first)


def test_a_function_that_calls_itself(tmp_path):
    def method(model, x, target):
        return torch.zeros_like(x[:, 0]) if len(x) else method(model, x, target)

    metrics = (Perturbation("deletion", steps=2, count=3),)
    assert evaluate(patches(), images(), metrics, (method,), out=tmp_path)[1].rows


def test_a_function_by_the_name_of_a_method(tmp_path):
    def bcos(model, x, target):
        return torch.zeros_like(x[:, 0])

    _, own = evaluate(patches(), images(), (Completeness(count=5),), (bcos,), out=tmp_path)
    assert own.median == pytest.approx(1)


def test_equal_logits_are_no_hits():
    network = patches(12)
    torch.nn.init.zeros_(network.conv.weight)
    data = [(torch.rand(12, 4, 4), label) for label in range(12)]
    rows = accuracy(network, data).rows
    assert [row["top5"] for row in rows] == [1] * 5 + [0] * 7
    assert accuracy_figures(rows)["top5"] == pytest.approx(5 / 12)


def test_as_many_classes_of_which_one_is_another(photographs, tmp_path, capsys):
    (photographs / "test" / "airplane").rename(photographs / "test" / "zebra")
    assert main(["evaluate", "resnet20.bcos_cifar10", "--data", str(photographs), "--out", str(tmp_path / "o")]) == 2
    assert "there is no 'zebra'" in capsys.readouterr().err


GAIN = 1.0


def gained(model, x, target):
    return GAIN * x.sum(1)


class Gained:
    def __init__(self, gain):
        self.gain = gain

    def __call__(self, model, x, target):
        return self.gain * x.sum(1)


def test_objects_and_globals_are_part_of_a_function(tmp_path, monkeypatch):
    metrics = (Perturbation("deletion", steps=2, count=3),)
    for method in (Gained(1), gained):
        evaluate(patches(), images(), metrics, (method,), out=tmp_path / type(method).__name__)
        assert evaluate(patches(), images(), metrics, (method,), out=tmp_path / type(method).__name__, resume=True)
    monkeypatch.setattr(sys.modules[__name__], "GAIN", -1.0)
    for method in (Gained(-1), gained):
        with pytest.raises(ValueError, match="`methods`"):
            evaluate(patches(), images(), metrics, (method,), out=tmp_path / type(method).__name__, resume=True)


def test_sheets_of_grey_networks_and_of_nothing_in_common(tmp_path):
    data = [(torch.cat([x, 1 - x]), label) for x, label in ((torch.rand(1, 4, 4), k) for k in (0, 1, 2, 3, 4) * 3)]

    class Grey(torch.nn.Module):
        def forward(self, x):
            return x[:, :1].mean((2, 3)) * torch.arange(5.0)

    result = Result("grid_pointing", "gradient", [
        {"unit": 0, "cell": cell, "image": cell, "target": cell, "score": 0.25} for cell in range(4)
    ], {"grid": 2})  # fmt: skip
    assert example_sheet(Grey().eval(), data, [result], ["gradient"], tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").exists()
    other = replace(result, rows=[row | {"unit": 1} for row in result.rows])
    assert not example_sheet(Grey().eval(), data, [result, other], ["gradient"] * 2, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
