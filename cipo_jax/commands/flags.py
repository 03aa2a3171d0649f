"""Command-line flags to a checked config: absl and config_flags, with errors a person can use."""

import sys
from collections.abc import Sequence
from typing import Any, TypeVar

from absl import flags
from ml_collections import ConfigDict, config_flags

from cipo_jax.config import flatten, nearest, parse
from cipo_jax.errors import UserError

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
        _check_override_keys(argv)
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
        if not values[name].value:
            raise UserError(f"{command}: --{name}=... is missing")
    if not isinstance(values.config, ConfigDict):
        raise UserError(f"{command}: get_config() of the config file returns no ConfigDict")
    return parse(cls, values.config), values


def _one_line(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return " ".join(text.split())


def _check_override_keys(argv: Sequence[str]) -> None:
    """Raises UserError for ``--config.KEY`` where the config has no such key."""
    path = next((a.split("=", 1)[1] for a in argv if a.startswith(("--config=", "-config="))), None)
    keys = [
        arg.lstrip("-").split("=", 1)[0].removeprefix("config.")
        for arg in argv
        if arg.startswith(("--config.", "-config."))
    ]
    if not path or not keys:
        return
    probe = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=probe)
    before, sys.argv = sys.argv, ["probe", f"--config={path}"]
    try:
        probe(sys.argv)
    finally:
        sys.argv = before
    known = flatten(probe.config)
    groups = {key.rsplit(".", i)[0] for key in known for i in range(1, key.count(".") + 1)}
    for key in keys:
        if key in groups:
            raise UserError(f"config.{key}: is a group of settings, not a value")
        if key not in known:
            raise UserError(f"config.{key}: no such setting; nearest: {nearest(key, known)}")
