"""``compare``: methods side by side, over several seeds, into one table."""

from typing import TYPE_CHECKING

from cipo_jax.commands.flags import run_with_folder

if TYPE_CHECKING:
    from cipo_jax.config import Config

HELP = """Runs config.compare.methods (or variants of CiPO) over the same data and seeds, each with
the same budget to be tuned; writes comparison.json, comparison.md and comparison.png. The same
command goes on where it was stopped."""


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""

    def work(config: "Config", workdir: str) -> None:
        from cipo_jax.experiments.compare import Comparison
        from cipo_jax.progress import Reporter
        from cipo_jax.reports.comparison import print_comparison, write_comparison

        comparison = Comparison(config, workdir, Reporter())
        result = comparison.compare()
        written = write_comparison(result, config, comparison.run.folder)
        print_comparison(result, config)
        for path in written:
            print(f"  {path}")

    return run_with_folder("compare", argv, HELP, work)
