"""The blocks of code of README and documentation, and what it means to execute each kind of them.

Blocks of one page share a folder, which is empty but for `src` and `recipes`, and Python blocks share their names.
A command is run, unless it names what only the reader has (a word in CAPITALS), downloads, or does not end by itself:
it is parsed then, by the parser that would have run it.
"""

import functools
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import torch

from bcoskit import cli
from bcoskit.models import list_models, model_row

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LASTING = {"app"}  # commands that serve until they are stopped

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S)
_INLINE = re.compile(r"`([^`\n]+)`")
_NETWORK = re.compile(r"[a-z0-9_]+\.(bcos|standard|he)[\w-]*")
_BENCHMARK = re.compile(r"python (benchmarks/\w+\.py)([^`\n]*)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page where the text begins."""

    language: str
    text: str
    line: int


def blocks(markdown: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = [
        Block(match["language"], dedent(match["text"]), markdown[: match.start("text")].count("\n") + 1)
        for match in _FENCE.finditer(markdown)
    ]
    fences = len(re.findall(r"^ *```", markdown, flags=re.M))
    assert fences == 2 * len(found), f"{fences} fences make {len(found)} blocks"
    return found


def execute(page: str, markdown: str) -> dict[str, int]:
    """Execute all blocks of a page in the working directory; says how many of each kind there were."""
    counts = dict.fromkeys(("python", "run", "parsed", "shown"), 0)
    names: dict[str, Any] = {"__name__": "__main__"}
    torch.manual_seed(0)
    for block in blocks(markdown):
        place = f"{page}:{block.line}"
        if block.language == "python":
            # Empty lines before it, so that a traceback names the line of the page.
            exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)
            counts["python"] += 1
        elif block.language == "console":
            for command in commands(block.text):
                try:
                    counts[execute_command(command)] += 1
                except AssertionError as error:
                    raise AssertionError(f"{place}: `{command}`: {error}") from error
        elif block.language == "text":  # what a command prints, or a formula
            counts["shown"] += 1
        else:
            raise AssertionError(f"{place}: there is no rule for blocks of {block.language!r}")
    return counts


def commands(text: str) -> list[str]:
    """The commands of a console block: the lines after `$`, or all of them if there is none."""
    lines = text.replace("\\\n", " ").splitlines()
    prompted = [line[2:] for line in lines if line.startswith("$ ")]
    return prompted or [line for line in lines if line.strip()]


def execute_command(command: str) -> str:
    """Run a command, or parse it; says which."""
    words = _words(command)
    program = words[0] if words else ""
    check = _PROGRAMS.get(program)
    assert check is not None, f"there is no rule for the program {program!r}"
    unknown = [word for word in words if _NETWORK.fullmatch(word) and word not in list_models()]
    assert not unknown, f"there is no network {unknown[0]!r}"
    return check(words)


def _words(command: str) -> list[str]:
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|>&;")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:  # without its comment, and what becomes of its output
        if word[0] in "|>&;":
            break
        words.append(word)
    return words


def _bcoskit(words: list[str]) -> str:
    if not _can_run(words):
        return _parse(words)
    with torch.random.fork_rng():
        code = cli.main(words[1:])
    assert code == 0, f"exit code {code}"
    return "run"


def _can_run(words: list[str]) -> bool:
    if words[1] in LASTING or any(re.search(r"\b[A-Z]{2,}\b|…", word) for word in words):
        return False
    named = [model_row(word).checkpoint for word in words if word in list_models()]
    return not any(checkpoint is not None and not checkpoint.carried for checkpoint in named)


def _parse(words: list[str]) -> str:
    """Let the command line do all but the command itself."""
    assert words[1] in cli.COMMANDS, f"there is no command {words[1]!r}"
    command = cli.COMMANDS[words[1]]
    function = command.load()

    @functools.wraps(function)
    def nothing(*_arguments: Any, **_options: Any) -> int:
        return 0

    cli.COMMANDS[words[1]] = replace(command, load=lambda: nothing)
    try:
        code = cli.main(words[1:])
    finally:
        cli.COMMANDS[words[1]] = command
    assert code == 0, f"exit code {code}"
    return "parsed"


def _torchrun(words: list[str]) -> str:
    return _parse(words[words.index("bcoskit") :])


def _make(words: list[str]) -> str:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    missing = [word for word in words[1:] if "=" not in word and word not in targets]
    assert not missing, f"the Makefile has no target {missing}"
    return "parsed"


def _pip(words: list[str]) -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {extra for word in words for group in re.findall(r"\[([\w,]+)\]", word) for extra in group.split(",")}
    missing = extras - set(project["optional-dependencies"])
    assert words[1] == "install", f"pip {words[1]}"
    assert not missing, f"there is no extra {missing}"
    return "parsed"


def _python(words: list[str]) -> str:
    if words[1] == "-c":
        compile(words[2], "-c", "exec")
    elif words[1] == "-m":
        assert importlib.util.find_spec(words[2]) is not None, f"there is no module {words[2]}"
    else:
        check_script(words[1], " ".join(words[2:]))
    return "parsed"


def _of_the_system(words: list[str]) -> str:
    return "shown"


_PROGRAMS: dict[str, Callable[[list[str]], str]] = {
    "bcoskit": _bcoskit,
    "make": _make,
    "pip": _pip,
    "python": _python,
    "torchrun": _torchrun,
    # They are not ours to test, and most of them want a network.
    **dict.fromkeys(("cd", "cp", "curl", "git", "hf"), _of_the_system),
}


def check_script(script: str, arguments: str) -> None:
    """That a script and its options are there; most of them take hours, or need data."""
    file = ROOT / script
    assert file.is_file(), f"there is no {script}"
    source = file.read_text()
    for option in re.findall(r"--[\w-]+", arguments):
        assert f'"{option}"' in source or f'"{option[2:]}"' in source, f"{script} has no option {option}"


def check_inline(markdown: str) -> int:
    """That the commands in a page's sentences and tables, which need not be complete, have their options."""
    text = _FENCE.sub("", markdown)
    for script, arguments in _BENCHMARK.findall(text):
        check_script(script, arguments)
    mentioned = list(_mentioned(text))
    for command, option in mentioned:
        assert option in _options(command), f"`bcoskit {command}` has no option {option}"
    return len(mentioned)


def _mentioned(text: str) -> Iterator[tuple[str, str]]:
    for code in _INLINE.findall(text):
        words = code.split()
        if len(words) > 1 and words[0] == "bcoskit" and words[1] in cli.COMMANDS:
            for option in re.findall(r"--[\w.-]+", code):
                yield words[1], option


@functools.cache
def _options(command: str) -> set[str]:
    """The options of a command in both spellings, as its help lists them."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main([command, "--help"]) == 0
    names = set(re.findall(r"--[\w.-]+", out.getvalue()))
    return names | {name.replace("_", "-") for name in names}
