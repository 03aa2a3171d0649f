"""The model of any run, finished or not, as a Hugging Face folder."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

from cipo_jax.config import Config, parse
from cipo_jax.errors import UserError
from cipo_jax.language_model import LanguageModel
from cipo_jax.methods.registry import resolve_method
from cipo_jax.models.lora import Lora
from cipo_jax.runs.context import WORKDIR
from cipo_jax.training.checkpoints import Checkpoints
from cipo_jax.training.mesh import make_mesh


def export_checkpoint(
    workdir: Path, out: Path, phase: str = "", form: Literal["merged", "adapter"] = "merged"
) -> str:
    """Writes the parameters of a checkpoint of a run, which may still be going on.

    Args:
      workdir: the run folder.
      out: the folder to write.
      phase: name of the checkpoint; "" for the last one.
      form: see `LanguageModel.save`.

    Returns:
      Which checkpoint it was, in words.

    Raises:
      UserError: where there is no such run, checkpoint or adapter.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; --workdir must be the folder of a run")
    config = parse(Config, json.loads(path.read_text(encoding="utf-8")))
    method, config = resolve_method(config)
    model_path = config.model.path
    if model_path.startswith(WORKDIR):
        model_path = str(workdir / model_path.removeprefix(WORKDIR))
    checkpoints = Checkpoints(workdir / "checkpoints", clean=False)
    chosen, step = checkpoints.choose(phase)
    try:
        mesh = make_mesh(**dataclasses.asdict(config.mesh))
    except UserError:  # Other devices than the run had; any will do to write files.
        mesh = make_mesh()
    model = LanguageModel.from_config(
        dataclasses.replace(config.model, path=model_path), config.think, mesh
    )
    model = model.with_trainable(method.trainable(config, model.config), config.lora.path)
    if form == "adapter" and not isinstance(model.trainable, Lora):
        raise UserError(f"{path}: it has no adapters, which this run did not train; drop --form")
    trained = checkpoints.load_params(chosen, step, model.abstract_trainable())
    model.save(out, trained, config.model.export_dtype, form)
    return f"{chosen} after {step} steps" if step is not None else f"the end of {chosen}"
