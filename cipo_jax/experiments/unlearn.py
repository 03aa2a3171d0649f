"""One model, one method, one run folder."""

from pathlib import Path

from cipo_jax.methods.base import Method
from cipo_jax.methods.registry import resolve_method
from cipo_jax.progress import Reporter
from cipo_jax.runs.context import Run
from cipo_jax.runs.evaluation import Result
from cipo_jax.runs.measurement import FullMeasurement
from cipo_jax.runs.workspace import Workspace, open_model
from cipo_jax.shared_config import RunConfig


def open_run(
    config: RunConfig, workdir: str | Path, reporter: Reporter, claim: bool = True
) -> tuple[Method, Run]:
    """The method of a config and its run; no weights are read yet.

    Args:
      config: every setting.
      workdir: the run folder, made if it is not there.
      reporter: the terminal.
      claim: whether to keep other processes out of the folder.

    Raises:
      UserError: for bad settings or data, or a folder that holds another run.
    """
    method, config = resolve_method(config)
    model = open_model(config)
    model = model.with_trainable(method.trainable(config, model.config), config.lora.path)
    workspace = Workspace.open(config, model)
    return method, Run.open(config, workdir, workspace, reporter, claim=claim)


def derive_run(
    parent: Run, config: RunConfig, workdir: str | Path, reporter: Reporter | None = None
) -> tuple[Method, Run]:
    """The method of a config and a run that belongs to another one."""
    method, config = resolve_method(config)
    trainable = method.trainable(config, parent.workspace.model.config)
    return method, parent.derive(config, workdir, trainable, reporter)


def unlearn(method: Method, run: Run) -> Result:
    """Makes the model forget, or goes on with it.

    Raises:
      UserError: for "retrain", where no model never saw this forget set.
      Diverged: where the loss stops being a number.
      Preempted: where the process was asked to stop.
    """
    return method.run(run, FullMeasurement())
