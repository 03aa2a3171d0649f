"""``export``: writes the model of any run, finished or not, as a Hugging Face folder."""

import json
from pathlib import Path

from cipo_jax.commands.flags import parse_flags
from cipo_jax.config import Config, parse
from cipo_jax.errors import UserError

HELP = """Writes the parameters of a run to --out: those that its last finished phase (the warm-up
or an iteration; or the one named by --phase) ended with or, before the first is finished, those of
the last checkpoint. A run with adapters gives its base with the adapters worked into it, or with
--form=adapter the adapters alone, as the PEFT library reads them. The config is the run's own. A
finished run has exported its best iteration already."""


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
            "form": "merged (default) or adapter",
            "out": "the folder to write; default: WORKDIR/export, or WORKDIR/adapter",
        },
        needs=("workdir",),
    )
    workdir, form = Path(flags.workdir), flags.form or "merged"
    if form not in ("merged", "adapter"):
        raise UserError(f"--form={form}: must be merged or adapter")
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; --workdir must be the folder of a run")
    config = parse(Config, json.loads(path.read_text(encoding="utf-8")))

    import dataclasses

    from cipo_jax.models.decoder import abstract_params, merged
    from cipo_jax.models.lora import Lora, save_adapters
    from cipo_jax.models.reasoning_model import ReasoningModel
    from cipo_jax.models.trainable import abstract_trainable, assemble
    from cipo_jax.training.checkpoints import Checkpoints
    from cipo_jax.training.mesh import abstract_on, make_mesh, param_shardings
    from cipo_jax.unlearning.methods import configured, part_of

    checkpoints = Checkpoints(workdir / "checkpoints", clean=False)
    phase, step = checkpoints.choose(flags.phase)
    model = ReasoningModel.open(config.model.path, config.think)
    part = part_of(configured(config), model.config)
    if form == "adapter" and not isinstance(part, Lora):
        raise UserError(f"{path}: it has no adapters, which this run did not train; drop --form")
    try:
        mesh = make_mesh(**dataclasses.asdict(config.mesh))
    except UserError:  # Other devices than the run had; any will do to write files.
        mesh = make_mesh()
    shapes = abstract_params(model.config)
    shardings = param_shardings(shapes, mesh)
    trained = abstract_on(mesh, abstract_trainable(model.config, part))
    params = checkpoints.load_params(phase, step, trained)
    out = Path(flags.out) if flags.out else workdir / ("adapter" if form == "adapter" else "export")
    if form == "adapter":
        assert isinstance(part, Lora)
        save_adapters(out, model.config, part, params, config.model.path)
    else:
        if part is not None:
            base = model.load_params(shardings, config.model.dtype)
            params = merged(assemble(part, base, params))
        model.save(out, params, config.model.export_dtype)
    at = f"{phase} after {step} steps" if step is not None else f"the end of {phase}"
    print(f"wrote {out}: {'the adapters' if form == 'adapter' else 'the model'} of {at}")
    return 0
