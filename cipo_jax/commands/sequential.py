"""``sequential``: requests to forget, one after another, on the model that the last one left."""

from typing import TYPE_CHECKING

from cipo_jax.commands.flags import run_with_folder

if TYPE_CHECKING:
    from cipo_jax.config import Config

HELP = """Forgets config.sequence.people people config.sequence.requests times, each request on the
model that the last one left, and scores everybody forgotten so far after each; writes
sequence.json, and the run folder of each request. The same command goes on where it was stopped."""


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""

    def work(config: "Config", workdir: str) -> None:
        from cipo_jax.experiments.sequential import unlearn_in_sequence
        from cipo_jax.progress import Reporter
        from cipo_jax.reports.comparison import print_sequence

        print_sequence(unlearn_in_sequence(config, workdir, Reporter()))
        print(f"  {workdir}/sequence.json")

    return run_with_folder("sequential", argv, HELP, work)
