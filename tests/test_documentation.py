"""Every block of code of README and documentation is executed, and the notebooks are."""

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import bcoskit
from bcoskit import cli
from bcoskit.dynamic._mode import RULES
from documentation import PAGES, ROOT, blocks, check_inline, execute


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with what pages read; whatever rules a page registers are gone afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("src", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    rules = dict(RULES)
    yield tmp_path
    RULES.clear()
    RULES.update(rules)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


WITH_CODE = [page for page in PAGES if blocks(page.read_text())]


@pytest.mark.parametrize("page", WITH_CODE, ids=_name)
@pytest.mark.filterwarnings("ignore::UserWarning:captum")
def test_code_of_a_page_runs(page, folder):
    markdown = page.read_text()
    counts = execute(_name(page), markdown)
    assert counts["python"] == markdown.count("```python\n")
    assert sum(counts.values()) >= len(blocks(markdown))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_in_sentences_have_their_options(page):
    check_inline(page.read_text())


@pytest.mark.parametrize(
    ("block", "error", "message"),
    [
        ("```python\n1 / 0\n```", ZeroDivisionError, "division"),
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```", AssertionError, None),
        ("- of a list:\n\n  ```python\n  1 / 0\n  ```", ZeroDivisionError, "division"),
        ("```ruby\nputs 1\n```", AssertionError, "page:2: there is no rule for blocks of 'ruby'"),
        ("```\nx = 1\n```", AssertionError, "no rule for blocks of ''"),
        ("```python\n1 / 0\n", AssertionError, "1 fences make 0 blocks"),
        ("```console\n$ bcoskit explain FILE --tpo 2\n```", AssertionError, "exit code 2"),
        ("```console\n$ bcoskit train --data DATA --out OUT --loss.kin bce\n```", AssertionError, "exit code 2"),
        ("```console\n$ bcoskit explain nothing.jpg\n```", AssertionError, "exit code 2"),
        ("```console\n$ bcoskit nothing FILE\n```", AssertionError, "no command 'nothing'"),
        ("```console\n$ torchrun --no-python bcoskit explain FOLDER --nothing\n```", AssertionError, "exit code 2"),
        (
            "```console\n$ bcoskit explain FILE --model resnet18.bcos_v9_in1k\n```",
            AssertionError,
            "no network 'resnet18",
        ),
        ("```console\nmake nothing\n```", AssertionError, "no target"),
        ("```console\n$ pip install 'bcoskit[nothing]'\n```", AssertionError, "no extra"),
        ("```console\n$ python benchmarks/nothing.py\n```", AssertionError, "there is no benchmarks/nothing.py"),
        ("```console\n$ python benchmarks/bulk.py --nothing 3\n```", AssertionError, "has no option --nothing"),
        ("```console\n$ python -m nothing\n```", AssertionError, "there is no module nothing"),
        ("```console\n$ nothing\n```", AssertionError, "no rule for the program 'nothing'"),
    ],
)
def test_a_broken_block_is_found(block, error, message, folder):
    with pytest.raises(error, match=message):
        execute("page", block)


@pytest.mark.parametrize("sentence", ["`bcoskit explain --tpo 2`", "`python benchmarks/bulk.py --nothing`"])
def test_a_broken_sentence_is_found(sentence):
    with pytest.raises(AssertionError, match="has no option"):
        check_inline(f"What {sentence} does.")


def test_what_is_run_and_what_is_parsed(folder):
    page = """
```console
$ bcoskit models '*vit*' > list  # run
$ bcoskit models MODEL
$ bcoskit explain a.jpg --model resnet18.bcos_v2_in1k
```
"""
    assert execute("page", page) == {"python": 0, "run": 1, "parsed": 2, "shown": 0}


def documented() -> set[str]:
    """The public addresses that the reference has: each by itself, or with all of its module."""
    found: set[str] = set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        for address in re.findall(r"^::: (bcoskit[\w.]*)", page.read_text(), flags=re.M):
            found.add(address)
            place = Path(ROOT, "src", *address.split("."))
            if place.is_dir() or place.with_suffix(".py").is_file():
                found.update(f"{address}.{name}" for name in importlib.import_module(address).__all__)
    return found


def test_the_reference_has_every_public_name():
    short = {address.rpartition(".")[2] for address in documented()}
    assert set(bcoskit.__all__) - short == {"__version__"}
    commands = (ROOT / "docs" / "reference" / "cli.md").read_text()
    assert all(f'heading: "bcoskit {name}"' in commands for name in cli.COMMANDS)


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def _run(notebook: Path, folder: Path) -> None:
    """Run a notebook in a process of its own; where a cell fails it raises."""
    import nbformat
    from nbclient import NotebookClient

    NotebookClient(
        nbformat.read(notebook, as_version=4), timeout=300, resources={"metadata": {"path": str(folder)}}
    ).execute()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
@pytest.mark.filterwarnings("default")  # of the client's own packages
def test_notebook_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    cells = json.loads(notebook.read_text())["cells"]
    assert any("assert " in "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    _run(notebook, tmp_path)


@pytest.mark.filterwarnings("default")
def test_a_broken_notebook_is_found(tmp_path):
    import nbformat
    from nbclient.exceptions import CellExecutionError

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")])
    nbformat.write(notebook, tmp_path / "broken.ipynb")
    with pytest.raises(CellExecutionError, match="AssertionError"):
        _run(tmp_path / "broken.ipynb", tmp_path)


@pytest.fixture(scope="module")
def hooks():
    """The hooks of the pages' build."""
    pytest.importorskip("mkdocs", reason="mkdocs is of the dependency group `docs`")
    specification = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://elsewhere/a.js"></script>',
        "<script async src=//elsewhere/a.js></script>",
        '<link rel="stylesheet" href="https://elsewhere/a.css">',
        '<img alt="" src="http://elsewhere/a.png">',
    ],
)
def test_a_page_that_fetches_from_elsewhere_is_refused(hooks, page):
    from mkdocs.exceptions import PluginError

    file = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    with pytest.raises(PluginError, match=r"page\.md fetches from elsewhere"):
        hooks.on_post_page(f"<html>{page}</html>", file, None)
    near = '<a href="https://elsewhere">read</a><img src="data:image/png;base64,AA//"><script src="../a.js"></script>'
    assert hooks.on_post_page(near, file, None) == near


def test_links_of_the_repository_become_links_of_the_site(hooks):
    def linked(page, link):
        file = SimpleNamespace(file=SimpleNamespace(src_uri=page))
        return hooks.on_page_markdown(f"[text]({link})", file, None, None)

    assert linked("index.md", "docs/convert.md#the-proof") == "[text](convert.md#the-proof)"
    assert linked("results/index.md", "../../benchmarks/results/layers.md") == "[text](layers.md)"
    assert linked("comparison.md", "../notebooks/compare_methods.ipynb") == "[text](notebooks/compare_methods.md)"
    assert linked("notebooks/compare_methods.md", "../docs/evaluate.md") == "[text](../evaluate.md)"
    assert linked("index.md", "docs/nothing.md") == "[text](docs/nothing.md)"  # which the build reports
