"""The command line: each subcommand calls one public function, whose signature defines its options."""

import importlib
import inspect
import io
import keyword
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import docstring_parser
from jsonargparse import ActionYesNo, ArgumentParser

from bcoskit._processes import is_first
from bcoskit._text import printable


class UsageError(ValueError):
    """A command line that cannot be parsed."""


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        summary: What `bcoskit --help` says of it.
        load: Imports its function, which takes seconds where torch and Lightning come with it; the function returns
            an exit code, or figures, which are printed.
        positional: The parameter that is given without an option's name, and how many values it takes: `"one"`, `"?"`
            for one or none, `"+"` for one or more.
        configurable: Whether `--config FILE` gives options in YAML.
    """

    summary: str
    load: Callable[[], Callable[..., int | dict[str, float]]]
    positional: tuple[str, str] | None = None
    configurable: bool = False


def _explain() -> Callable[..., int]:
    from bcoskit._command_explain import explain_images

    return explain_images


def _audit() -> Callable[..., int]:
    from bcoskit._command_audit import audit_model

    return audit_model


def _evaluate() -> Callable[..., int]:
    try:
        return importlib.import_module("bcoskit._command_evaluate").evaluate_model
    except ModuleNotFoundError as error:
        raise ImportError(f"evaluation needs {error.name}: pip install 'bcoskit[eval]'") from error


def _export() -> Callable[..., int]:
    from bcoskit._command_export import export_model

    return export_model


def _app() -> Callable[..., int]:
    try:
        return importlib.import_module("bcoskit._command_app").show_app
    except ModuleNotFoundError as error:
        raise ImportError(f'the page needs {error.name}: pip install "bcoskit[app]"') from error


def _models() -> Callable[..., int]:
    from bcoskit._command_models import show_models

    return show_models


def _train() -> Callable[..., dict[str, float]]:
    return _training().train


def _align() -> Callable[..., dict[str, float]]:
    return _training().align


def _training() -> Any:
    try:
        return importlib.import_module("bcoskit.training")
    except ModuleNotFoundError as error:
        raise ImportError(f"training needs {error.name}: pip install 'bcoskit[train]'") from error


COMMANDS = {
    "explain": Command("Explain images: a table, and a picture for each.", _explain, ("images", "+")),
    "train": Command("Train a network on images, or fine-tune one.", _train, configurable=True),
    "align": Command("Convert a network; it learns from the original, without labels.", _align, configurable=True),
    "evaluate": Command("Measure accuracy and the quality of explanations.", _evaluate, ("model", "one"), True),
    "audit": Command("Prove that a network is dynamic linear, or name what is not.", _audit, ("model", "one")),
    "export": Command("Write a network with its explanation as an ONNX file.", _export, ("model", "one")),
    "app": Command("Show a page in the browser that explains photographs.", _app),
    "models": Command("List the networks that are known by name.", _models, ("pattern", "?")),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: The arguments; those of the process if None.

    Returns:
        The exit code: 0; 1 if some of many things could not be done; 2, with one line on stderr, if nothing could.
        With `BCOSKIT_DEBUG=1` in the environment an error's traceback is shown.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every terminal has all characters
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of the output has gone; what Python would still flush has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("BCOSKIT_DEBUG"):
            raise
        return _fail(_message(error), 2)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    readable = isinstance(error, (ValueError, TypeError, OSError, RuntimeError, ImportError)) and str(error)
    return str(error) if readable else f"{type(error).__name__}: {error}"


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"bcoskit: error: {printable(message)}\n")
    return code


def _run(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        sys.stdout.write(_overview())
        return 0
    if name == "--version":
        from bcoskit import __version__

        sys.stdout.write(f"bcoskit {__version__}\n")
        return 0
    if name not in COMMANDS:
        raise UsageError(f"there is no command {name!r}; there are: {', '.join(COMMANDS)}")
    function = COMMANDS[name].load()
    parser = _parser(name, COMMANDS[name], function)
    _check_files(arguments[1:])
    try:
        options = parser.parse_args(_with_underscores(arguments[1:]))
    except SystemExit as stop:  # of --help
        return int(stop.code or 0)
    _check_values(function, options)
    values = dict(vars(parser.instantiate(options)))
    values.pop("config", None)
    # An option may go by a word that Python keeps for itself.
    values = {f"{name}_" if keyword.iskeyword(name) else name: value for name, value in values.items()}
    with warnings.catch_warnings():
        # Of damaged images, which get a line of their own.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        # Of strange tensors in files of weights, which are refused.
        warnings.filterwarnings("ignore", module=r"torch\.", category=UserWarning)
        result = function(**values)
    if isinstance(result, int):
        return result
    if not is_first():
        return 0
    sys.stdout.writelines(f"{name}: {value:.4f}\n" for name, value in result.items())
    return 0


class _Parser(ArgumentParser):
    def error(self, message: str | None, ex: Exception | None = None) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def _parser(name: str, command: Command, function: Callable[..., Any]) -> _Parser:
    documentation = docstring_parser.parse(inspect.getdoc(function) or "")
    helps = {parameter.arg_name: parameter.description or "" for parameter in documentation.params}
    parameters = inspect.signature(function).parameters
    parser = _Parser(prog=f"bcoskit {name}", description=command.summary)
    if command.configurable:
        parser.add_argument("--config", action="config", help="File with options, in YAML.")
    special: set[str | int] = set()
    if command.positional is not None:
        positional, count = command.positional
        options: dict[str, Any] = {} if count == "one" else {"nargs": count}
        if count == "?":
            options["default"] = parameters[positional].default
        parser.add_argument(positional, help=helps[positional], **options)
        special.add(positional)
    for parameter in parameters.values():
        if keyword.iskeyword(parameter.name.removesuffix("_")):
            option = f"--{parameter.name.removesuffix('_')}"
            kind: Any = parameter.annotation
            parser.add_argument(option, type=kind, default=parameter.default, help=helps[parameter.name])
            special.add(parameter.name)
        if parameter.annotation is bool:
            switch = ActionYesNo(no_prefix="no_")
            parser.add_argument(
                f"--{parameter.name}", action=switch, default=parameter.default, help=helps[parameter.name]
            )
            special.add(parameter.name)
        if parameter.annotation == list[str] and parameter.name not in special:
            parser.add_argument(f"--{parameter.name}", nargs="+", default=parameter.default, help=helps[parameter.name])
            special.add(parameter.name)
    parser.add_function_arguments(function, skip=special)
    return parser


def _check_files(arguments: Sequence[str]) -> None:
    """Refuse files of options that hold no text, of which the parser would not tell the name."""
    for index, argument in enumerate(arguments):
        option, equals, file = argument.partition("=")
        if option == "--config":
            file = file if equals else next(iter(arguments[index + 1 :]), "")
            try:
                text = Path(file).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise UsageError(f"`config` (={file!r}) is no text in UTF-8") from error
            except OSError:  # the parser tells that
                continue
            if not text.strip():
                raise UsageError(f"`config` (={file!r}) is empty")


def _check_values(function: Callable[..., Any], options: Any) -> None:
    """Refuse what a file of options may give for one, and a command line cannot: nothing, or no group of options."""
    for name, parameter in inspect.signature(function).parameters.items():
        value = options.get(name, parameter.default)
        if is_dataclass(parameter.default) and not hasattr(value, "keys") and value is not parameter.default:
            raise UsageError(
                f"`{name}` (={value!r}) must be a group of options, such as {{{_some_field(parameter)}: …}}"
            )
        if value is None and parameter.default is not None:
            raise UsageError(f"`{name}` has no value")


def _some_field(parameter: inspect.Parameter) -> str:
    return fields(parameter.default)[0].name


def _with_underscores(arguments: Sequence[str]) -> list[str]:
    """`--batch-size=3` as `--batch_size=3`: both spellings of an option are one; after `--` there are none."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return [_with_underscore(argument) for argument in arguments[:end]] + list(arguments[end:])


def _with_underscore(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument.partition("=")
    return "--" + option[2:].replace("-", "_") + equals + value


def _overview() -> str:
    commands = [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        (
            "usage: bcoskit COMMAND [options]",
            "",
            "B-cos networks: inherently interpretable networks whose explanations are exact.",
            "",
            *commands,
            "",
            "`bcoskit COMMAND --help` lists the options of a command.",
            "",
        )
    )
