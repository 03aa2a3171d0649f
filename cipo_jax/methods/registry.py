"""All methods by name: those that ship, and those of plugins."""

import difflib
import importlib
from typing import TypeVar

from cipo_jax.errors import UserError
from cipo_jax.methods.base import METHODS, Method

# Each import registers the methods of a family, in the order in which they are listed.
from cipo_jax.methods.cipo import algorithm  # noqa: F401  # isort: skip
from cipo_jax.methods import gradient_ascent, npo  # noqa: F401  # isort: skip
from cipo_jax.methods import refusal, preference  # noqa: F401  # isort: skip
from cipo_jax.methods import representation, distillation, pdu, retrain  # noqa: F401  # isort: skip
from cipo_jax.shared_config import RunConfig

C = TypeVar("C", bound=RunConfig)


def find(name: str) -> Method:
    """The method of a name; raises UserError with the nearest ones where there is none."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 3, 0.0)
        raise UserError(
            f"config.method = {name!r}: no such method; nearest: {', '.join(near)}; "
            f"all: {', '.join(METHODS)}"
        )
    return METHODS[name]


def import_plugins(config: RunConfig) -> None:
    """Imports the modules of config.plugins, so that their methods are known.

    Raises:
      UserError: where there is no such module.
    """
    for name in config.plugins:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"config.plugins: {name!r} cannot be imported ({error}); it is looked for where "
                "Python looks for modules, the present folder among them"
            ) from None


def resolve_method(config: C) -> tuple[Method, C]:
    """The method of a config, and the config with the method's overrides."""
    import_plugins(config)
    method = find(config.method)
    return method, method.configured(config)
