"""The distribution: what is built, and that it works where nothing else of the repository is."""

import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import bcoskit

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and source distribution, the wheel being built from the latter."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


def test_one_version():
    assert bcoskit.__version__ == PROJECT["version"]
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## \[([^\]]+)\] - (unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None
    assert newest[1] == PROJECT["version"]
    stated = [file for file in (ROOT / "src").rglob("*.py") if PROJECT["version"] in file.read_text()]
    assert not stated


def test_the_floor_of_the_workflow_is_that_of_the_project():
    optional = (each for extra in PROJECT["optional-dependencies"].values() for each in extra)
    matches = (re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", each) for each in (*PROJECT["dependencies"], *optional))
    lowest = {match[1]: match[2] for match in matches if match is not None}
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    pins = dict(re.findall(r"'([\w-]+)==([\d.]+?)(?:\.\*)?'", workflow))
    assert len(pins) >= 10
    assert not {name: pin for name, pin in pins.items() if not f"{pin}.".startswith(f"{lowest[name]}.")}


def test_what_is_in_the_distributions(built):
    wheel, source = built
    tracked = {str(file.relative_to(ROOT / "src")) for file in (ROOT / "src" / "bcoskit").rglob("*") if file.is_file()}
    tracked = {name for name in tracked if "__pycache__" not in name}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == tracked
    assert {"bcoskit/py.typed", "bcoskit/assets/photographs/cat.jpg"} <= held
    with tarfile.open(source) as archive:
        tops = {Path(name).parts[1] for name in archive.getnames()}
    assert {"src", "tests", "docs", "notebooks", "recipes", "mkdocs.yml", "LICENSE", "README.md"} <= tops
    assert not {".git", ".venv", "site", "runs", "demo"} & tops


def test_the_wheel_works_in_an_environment_of_its_own(built, tmp_path):
    """The package is in the new environment alone; its dependencies, which take gigabytes, are those of this one."""
    environment, here = tmp_path / "environment", Path(sysconfig.get_paths()["purelib"])
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    install = ["install", "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check", str(built[0])]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True, capture_output=True)
    (packages,) = (environment / "lib").glob("python*/site-packages")
    # A path in a `.pth` file is added behind, and no `.pth` file in it is read: not the editable install's.
    (packages / "dependencies.pth").write_text(f"{here}\n")

    def run(*command: object) -> str:
        words = [str(word) for word in command]
        nothing = {"PATH": "", "HOME": str(tmp_path)}
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=nothing)
        assert done.returncode == 0, done.stderr
        return done.stdout

    package = Path(run(python, "-c", "import bcoskit; print(bcoskit.__path__[0])").strip())
    assert package == packages / "bcoskit"
    command = environment / "bin" / "bcoskit"
    assert run(command, "--version") == f"bcoskit {PROJECT['version']}\n"
    table = run(command, "explain", package / "assets" / "photographs" / "cat.jpg", "--out", "explained")
    assert "cat" in table
    assert (tmp_path / "explained" / "cat.png").stat().st_size > 1000
