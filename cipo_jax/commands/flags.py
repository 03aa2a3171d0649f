"""Command-line flags to a checked config: absl and config_flags, with errors a person can use."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import flags
from ml_collections import ConfigDict, config_flags

from cipo_jax.config import Config, flatten, nearest, parse
from cipo_jax.errors import EXIT_DIVERGED, UserError

T = TypeVar("T")


def parse_flags(
    cls: type[T],
    command: str,
    argv: Sequence[str],
    help_text: str,
    *,
    strings: dict[str, str] | None = None,
    needs: Sequence[str] = ("config",),
) -> tuple[T, Any]:
    """Reads ``--config=FILE[:ARG]``, its overrides and a command's own string flags.

    Args:
      cls: the config's dataclass.
      command: name of the command, for messages.
      argv: what stands after the command.
      help_text: shown by ``--help``.
      strings: the command's own flags and their help; each is a string, "" by default.
      needs: flags that must be given.

    Returns:
      The checked config, and the flag values.

    Raises:
      UserError: naming the flag or the key and what would be right.
      SystemExit: after printing the help.
    """
    strings = strings or {}
    if any(arg in ("-h", "--help", "-help") for arg in argv):
        print(f"usage: python -m cipo_jax {command} --config=FILE[:ARG] [--config.KEY=VALUE ...]")
        for name, text in strings.items():
            print(f"  --{name:<12} {text}")
        print(f"\n{help_text}")
        raise SystemExit(0)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, lock_config=True, flag_values=values)
    for name, text in strings.items():
        flags.DEFINE_string(name, "", text, flag_values=values)
    # config_flags looks for overrides in sys.argv, wherever the other flags come from.
    before, sys.argv = sys.argv, [f"cipo_jax {command}", *argv]
    try:
        path = _config_path(argv)
        overrides = [arg for arg in argv if arg.startswith(("--config.", "-config."))]
        if not path and ("config" in needs or overrides):
            raise UserError(f"{command}: --config=... is missing")
        if path and not Path(path.split(":", 1)[0]).is_file():
            raise UserError(f"{command}: --config={path}: no such file")
        if path:
            _check_override_keys(overrides, path)
        left = values(sys.argv)
    except UserError:
        raise
    except SystemExit as end:
        raise UserError(f"{command}: the config file stopped ({end})") from None
    except Exception as error:
        # absl and config_flags raise many types, and run the config file, which may raise any.
        raise UserError(f"{command}: {_one_line(error)}") from None
    finally:
        sys.argv = before
    if len(left) > 1:
        raise UserError(f"{command}: {left[1]!r} is not a flag; flags begin with --")
    for name in needs:
        if name != "config" and not values[name].value:
            raise UserError(f"{command}: --{name}=... is missing")
    return (parse(cls, values.config) if path else cls()), values


def _one_line(error: Exception) -> str:
    """The message of an error, of which config_flags may have made a whole traceback, as a line."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        lines = lines[-1:]
    return " ".join(lines) or type(error).__name__


def _config_path(argv: Sequence[str]) -> str:
    """The value of ``--config=FILE[:ARG]`` or ``--config FILE[:ARG]``; "" where there is none."""
    for i, arg in enumerate(argv):
        name, equals, value = arg.partition("=")
        if name in ("--config", "-config"):
            return value if equals else next(iter(argv[i + 1 :]), "")
    return ""


def _check_override_keys(overrides: Sequence[str], path: str) -> None:
    """Loads the config file alone; raises UserError where an override names no key of it."""
    probe = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=probe)
    before, sys.argv = sys.argv, ["probe", f"--config={path}"]
    try:
        probe(sys.argv)
        if probe.config is not None:
            probe.config.items  # noqa: B018  (a failure to load is raised at the first use)
    finally:
        sys.argv = before
    if not isinstance(probe.config, ConfigDict):
        raise UserError(f"--config={path}: its get_config() returns no ConfigDict")
    known = flatten(probe.config)
    groups = {key.rsplit(".", i)[0] for key in known for i in range(1, key.count(".") + 1)}
    for override in overrides:
        key = override.lstrip("-").split("=", 1)[0].removeprefix("config.")
        if key in groups:
            raise UserError(f"config.{key}: is a group of settings, not a value")
        if key not in known:
            raise UserError(f"config.{key}: no such setting; nearest: {nearest(key, known)}")


def run_with_folder(
    command: str, argv: Sequence[str], help_text: str, work: Callable[[Config, str], None]
) -> int:
    """Runs a command that takes --config and --workdir; returns the exit code.

    Args:
      command: name of the command.
      argv: what stands after it.
      help_text: shown by ``--help``.
      work: what it does with the config and the folder.
    """
    from cipo_jax.training.loop import Diverged

    strings = {"workdir": "the run folder, made if it is not there"}
    needs = ("config", "workdir")
    config, flags = parse_flags(Config, command, argv, help_text, strings=strings, needs=needs)
    try:
        work(config, flags.workdir)
    except Diverged as error:
        print(f"cipo: {error}", file=sys.stderr)
        return EXIT_DIVERGED
    return 0
