"""``export``: writes the model of any run, finished or not, as a Hugging Face folder."""

from pathlib import Path

from cipo_jax.commands.flags import exit_for_help, parse_flags
from cipo_jax.errors import UserError

HELP = """Writes the parameters of a run to --out: those that its last finished phase (the warm-up
or an iteration; or the one named by --phase) ended with or, before the first is finished, those of
the last checkpoint. A run with adapters gives its base with the adapters merged, or with
--form=adapter the adapters alone, as the PEFT library reads them. The config is the run's own. A
finished run has exported its best iteration already."""

FLAGS = {
    "workdir": "the run folder",
    "phase": "warmup or iteration-NN; default: the last one there",
    "form": "merged (default) or adapter",
    "out": "the folder to write; default: WORKDIR/export, or WORKDIR/adapter",
}


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    exit_for_help("export", argv, HELP, FLAGS)
    from cipo_jax.config import Config

    _, flags = parse_flags(
        Config,
        "export",
        argv,
        HELP,
        strings=FLAGS,
        needs=("workdir",),
    )
    form = flags.form or "merged"
    if form not in ("merged", "adapter"):
        raise UserError(f"--form={form}: must be merged or adapter")
    from cipo_jax.experiments.export import export_checkpoint

    workdir = Path(flags.workdir)
    out = Path(flags.out) if flags.out else workdir / ("adapter" if form == "adapter" else "export")
    at = export_checkpoint(workdir, out, flags.phase, form)
    print(f"wrote {out}: {'the adapters' if form == 'adapter' else 'the model'} of {at}")
    return 0
