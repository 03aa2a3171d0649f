"""Command-line flags to a checked config, with errors of one line."""

import contextlib
import importlib.util
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from absl import flags
from ml_collections import ConfigDict

from cipo_jax.errors import EXIT_DIVERGED, UserError
from cipo_jax.settings import (
    RenamedSetting,
    find_setting,
    flatten,
    legacy_of,
    parse,
    translated,
    unflatten,
)
from cipo_jax.settings_text import from_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from cipo_jax.config import Config

C = TypeVar("C", bound="DataclassInstance")
_OVERRIDES = ("--config.", "-config.", "--noconfig.", "-noconfig.")


def parse_flags(
    cls: type[C] | Sequence[type[C]],
    command: str,
    argv: Sequence[str],
    help_text: str,
    *,
    strings: dict[str, str] | None = None,
    needs: Sequence[str] = ("config",),
) -> tuple[C, flags.FlagValues]:
    """Reads ``--config=FILE[:ARG]``, its overrides and a command's own string flags.

    Args:
      cls: the config's dataclass; of several the first that has all of the file's keys.
      command: name of the command, for messages.
      argv: the arguments after the command.
      help_text: shown by ``--help``.
      strings: the command's own flags and their help; each is a string, "" by default.
      needs: flags that must be given.

    Returns:
      The checked config, and the flag values.

    Raises:
      UserError: naming the flag or the key and what would be right.
      SystemExit: after printing the help.
    """
    classes = [cls] if isinstance(cls, type) else list(cls)
    strings = strings or {}
    exit_for_help(command, argv, help_text, strings)
    overrides, others = _split(classes, argv)
    values = flags.FlagValues()
    flags.DEFINE_string("config", "", "the config file and its argument", flag_values=values)
    for name, text in strings.items():
        flags.DEFINE_string(name, "", text, flag_values=values)
    try:
        left = values([f"cipo_jax {command}", *others])
    except flags.Error as error:
        raise UserError(f"{command}: {_one_line(error)}") from None
    if not values.config and ("config" in needs or overrides):
        raise UserError(f"{command}: --config=... is missing")
    if len(left) > 1:
        raise UserError(f"{command}: {left[1]!r} is not a flag; flags begin with --")
    with _warnings_of_one_line():
        config = _resolved(classes, values.config, overrides) if values.config else classes[0]()
    for name in needs:
        if not values[name].value:
            raise UserError(f"{command}: --{name}=... is missing")
    return config, values


def exit_for_help(
    command: str, argv: Sequence[str], help_text: str, strings: Mapping[str, str]
) -> None:
    """Prints the help of a command where ``--help`` is among its arguments.

    Commands call it before they import the config, which imports jax.

    Args:
      command: name of the command.
      argv: the arguments after the command.
      help_text: what the command does.
      strings: the command's own flags and their help.

    Raises:
      SystemExit: after printing the help.
    """
    if not any(arg in ("-h", "--help", "-help") for arg in argv):
        return
    print(f"usage: python -m cipo_jax {command} --config=FILE[:ARG] [--config.KEY=VALUE ...]")
    for name, text in strings.items():
        print(f"  --{name:<12} {text}")
    print(f"\n{help_text}")
    raise SystemExit(0)


def _split(
    classes: Sequence[type], argv: Sequence[str]
) -> tuple[list[tuple[str, str]], Sequence[str]]:
    """The overrides as pairs of key and text, and the other arguments."""
    overrides, others = [], []
    pieces = iter(argv)
    for arg in pieces:
        if not arg.startswith(_OVERRIDES):
            others.append(arg)
            continue
        name, equals, text = arg.partition("=")
        key = name.split(".", 1)[1]
        if name.lstrip("-").startswith("no"):
            text = "false"
        elif not equals and any(_is_bool(cls, key) for cls in classes):
            text = "true"
        elif not equals:
            text = next(pieces, None)
            if text is None:
                raise UserError(f"config.{key}: write --config.{key}=VALUE")
        overrides.append((key, text))
    return overrides, others


def _is_bool(cls: type, key: str) -> bool:
    try:
        return find_setting(cls, key)[0] is bool
    except UserError:
        return False


def _resolved(classes: Sequence[type[C]], path: str, overrides: Sequence[tuple[str, str]]) -> C:
    """The config file's values with those of the command line in their place."""
    settings = flatten(load_config(path))
    cls = next((c for c in classes if settings.keys() <= flatten(c()).keys()), classes[0])
    settings = translated(settings, legacy_of(cls))
    for key, text in overrides:
        settings |= _override(cls, key, text)
    return parse(cls, unflatten(settings))


def _override(cls: type, key: str, text: str) -> dict[str, object]:
    """The settings that ``--config.key=text`` changes; an old key may stand for several."""
    legacy = legacy_of(cls)
    if key not in legacy:
        return {key: _value(cls, key, text)}
    value: object = text
    # An old way to write the value of a key that there still is cannot always be read as today's.
    with contextlib.suppress(UserError):
        value = _value(cls, key, text)
    new = translated({key: value}, legacy)
    return {k: _value(cls, k, v) if isinstance(v, str) else v for k, v in new.items()}


def _value(cls: type, key: str, text: str) -> object:
    hint, _ = find_setting(cls, key)
    try:
        return from_text(hint, text)
    except ValueError as error:
        raise UserError(f"config.{key} = {text!r}: {error}") from None


def load_config(path: str) -> ConfigDict:
    """Runs a config file's ``get_config``.

    Args:
      path: ``FILE`` or ``FILE:ARG``.

    Raises:
      UserError: where there is no such file, or it fails; the message has the line of the file.
    """
    file, colon, arg = path.partition(":")
    if not Path(file).is_file():
        raise UserError(f"--config={path}: no such file")
    spec = importlib.util.spec_from_file_location("cipo_config_file", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # As an import does; dataclasses in the file look it up.
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config={path}: the file defines no get_config()")
        config = module.get_config(arg) if colon else module.get_config()
    except UserError:
        raise
    except SystemExit as end:
        raise UserError(f"--config={path}: the config file exited ({end})") from None
    except Exception as error:  # The file may raise any.
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        where = f"{file}:{lines[-1]}" if lines else file
        raise UserError(f"{where}: {type(error).__name__}: {_one_line(error)}") from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={path}: its get_config() returns no ConfigDict")
    return config


def _one_line(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


@contextlib.contextmanager
def _warnings_of_one_line() -> Iterator[None]:
    """Prints the warnings of renamed settings as one line each, and once."""
    printed = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", RenamedSetting)
        others = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, RenamedSetting):
                others(message, category, filename, lineno, file, line)
            elif str(message) not in printed:
                printed.add(str(message))
                print(f"cipo: warning: {message}", file=sys.stderr)

        warnings.showwarning = show
        yield


def run_with_folder(
    command: str, argv: Sequence[str], help_text: str, work: "Callable[[Config, str], None]"
) -> int:
    """Runs a command that takes --config and --workdir; returns the exit code.

    Args:
      command: name of the command.
      argv: the arguments after the command.
      help_text: shown by ``--help``.
      work: called with the config and the folder.
    """
    strings = {"workdir": "the run folder, made if it does not exist"}
    exit_for_help(command, argv, help_text, strings)
    from cipo_jax.config import Config
    from cipo_jax.training.loop import Diverged

    needs = ("config", "workdir")
    config, values = parse_flags(Config, command, argv, help_text, strings=strings, needs=needs)
    try:
        work(config, values.workdir)
    except Diverged as error:
        print(f"cipo: {error}", file=sys.stderr)
        return EXIT_DIVERGED
    return 0
