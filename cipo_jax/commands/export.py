"""``export``: writes the model of any run, finished or not, as a Hugging Face folder."""

import json
from pathlib import Path

from cipo_jax.commands.flags import parse_flags
from cipo_jax.config import Config, parse
from cipo_jax.errors import UserError

HELP = """Writes the parameters that the run's last finished phase (the warm-up or an iteration; or
the one named by --phase) ended with, to --out (default: WORKDIR/export). The config is the run's
own. A finished run has exported its best iteration already."""


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    _, flags = parse_flags(
        Config,
        "export",
        argv,
        HELP,
        strings={
            "workdir": "the run folder",
            "phase": "warmup or iteration-NN; default: the last one there",
            "out": "the folder to write; default: WORKDIR/export",
        },
        needs=("workdir",),
    )
    workdir = Path(flags.workdir)
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; --workdir must be the folder of a run")
    config = parse(Config, json.loads(path.read_text(encoding="utf-8")))
    phases = sorted(
        p.name
        for p in (workdir / "checkpoints").glob("*")
        if p.is_dir() and "." not in p.name
    )  # fmt: skip
    phase = flags.phase or max(phases, key=lambda name: (name != "warmup", name), default="")
    if phase not in phases:
        there = ", ".join(phases) or "none yet"
        raise UserError(f"{workdir / 'checkpoints'}: no phase {phase!r}; there: {there}")

    from cipo_jax.models.reasoning_model import ReasoningModel
    from cipo_jax.training.checkpoints import Checkpoints
    from cipo_jax.training.mesh import abstract_on, make_mesh

    model = ReasoningModel.open(config.model.path)
    abstract = abstract_on(make_mesh(), model.config)
    weights = Checkpoints(workdir / "checkpoints").load_phase(phase, {"params": abstract})
    out = Path(flags.out) if flags.out else workdir / "export"
    model.save(out, weights["params"], config.model.export_dtype)
    print(f"wrote {out}: the model that {phase} ended with")
    return 0
