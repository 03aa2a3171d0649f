"""``python -m cipo_jax COMMAND --config=FILE --workdir=DIR``; ``cipo`` is the same."""

import importlib
import os
import sys
from pathlib import Path

from cipo_jax import __version__
from cipo_jax.errors import EXIT_USER_ERROR, exit_code

COMMANDS = {
    "unlearn": "make a model forget, with CiPO or another method; goes on where a stopped run was",
    "compare": "methods side by side, tuned alike, over several seeds: one table, one plot",
    "sequential": "requests to forget, one after another, on the model that the last one left",
    "evaluate": "leak, retain and reasoning scores of a model, without changing it",
    "sample": "ask a model questions and see its chain of thought",
    "export": "write the model of any run, finished or not, as a Hugging Face folder",
    "config": "print the resolved settings of a config file and its overrides",
    "pretrain": "train the embedded tiny world and its two models from random parameters",
}


def usage() -> str:
    """The text of ``--help``."""
    rows = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return (
        f"cipo_jax {__version__}: unlearning for reasoning models, in JAX\n\n"
        "usage: python -m cipo_jax COMMAND --config=FILE[:ARG] [--config.KEY=VALUE ...] [flags]\n\n"
        f"commands:\n{rows}\n\n"
        "`python -m cipo_jax COMMAND --help` lists a command's flags."
    )


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code (0 good, 2 bad input, 3 diverged, 75 stopped)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else EXIT_USER_ERROR
    if argv[0] == "--version":
        print(__version__)
        return 0
    name = argv[0]
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; commands: {', '.join(COMMANDS)}"
        print(f"cipo: no command {name!r}{hint}", file=sys.stderr)
        return EXIT_USER_ERROR
    _quiet_libraries()
    _keep_programs()
    try:
        return exit_code(lambda: importlib.import_module(f"cipo_jax.commands.{name}").run(argv[1:]))
    except SystemExit as end:  # --help
        return int(end.code or 0)


def _quiet_libraries() -> None:
    """Keeps start-up chatter of libraries off the terminal, unless the user has set it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from absl import logging

    logging.set_verbosity(logging.ERROR)


def _keep_programs() -> None:
    """Has JAX keep what it compiles for the next process, unless the user says where or not at all.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(home / "cipo_jax" / "programs"))


if __name__ == "__main__":
    sys.exit(main())
