"""``config``: print the resolved config, without running anything."""

from typing import TYPE_CHECKING

from cipo_jax.commands.flags import exit_for_help, parse_flags
from cipo_jax.settings import flatten
from cipo_jax.settings_text import to_literal

if TYPE_CHECKING:
    from cipo_jax.config import Config, PretrainConfig

HELP = """Prints every setting as the config file, its argument and the overrides resolve it, a line
each, as a config file sets it. A setting that differs from its default has the default in a
comment. docs/config.md says what each setting means."""


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    exit_for_help("config", argv, HELP, {})
    from cipo_jax.config import Config, PretrainConfig

    config, _ = parse_flags((Config, PretrainConfig), "config", argv, HELP)
    for line in config_lines(config):
        print(line)
    return 0


def config_lines(config: "Config | PretrainConfig") -> list[str]:
    """Lines ``config.key = value  # default: value`` of a config, in the order of its fields."""
    defaults = flatten(type(config)())
    lines = []
    for key, value in flatten(config).items():
        line = f"config.{key} = {to_literal(value)}"
        if value != defaults[key]:
            line += f"  # default: {to_literal(defaults[key])}"
        lines.append(line)
    return lines
