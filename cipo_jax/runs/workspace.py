"""Workspace: model, samplers, scorer and encoded data, shared by the runs of an experiment."""

import dataclasses

from jax.sharding import Mesh

from cipo_jax.data.splits import load_splits
from cipo_jax.errors import UserError
from cipo_jax.language_model import LanguageModel
from cipo_jax.models.trainable import Trainable
from cipo_jax.runs.data import RunData
from cipo_jax.sampling.sampler import Sampler
from cipo_jax.shared_config import RunConfig
from cipo_jax.training.mesh import make_mesh
from cipo_jax.training.scoring import Scorer


@dataclasses.dataclass(frozen=True)
class Workspace:
    """The model and the data of a run. No weights are read here.

    Attributes:
      model: the model to be unlearned, with what is trained of it.
      data: encoded.
      sampler: for rollouts and counterfactuals.
      eval_sampler: for evaluations.
      scorer: token log-probabilities of given completions.
    """

    model: LanguageModel
    data: RunData
    sampler: Sampler
    eval_sampler: Sampler
    scorer: Scorer

    @classmethod
    def open(cls, config: RunConfig, model: LanguageModel) -> "Workspace":
        """Loads the data and makes the samplers.

        Args:
          config: of the run.
          model: from `open_model`.

        Raises:
          UserError: where the data is bad, or a batch does not fit into memory or the mesh.
        """
        splits = load_splits(config.data, config.forget)
        check_batch_sizes(config, model.mesh)
        data = RunData.encode(splits, model.chat, config.data)
        sampling, evaluation = config.sampling, config.eval

        def sampler(name: str, max_batch_size: int, max_new_tokens: int) -> Sampler:
            return model.sampler(
                max_batch_size=max_batch_size,
                decode_chunk=sampling.decode_chunk,
                int8_cache=sampling.int8_cache,
                max_prompt_tokens=config.data.max_prompt_tokens,
                max_new_tokens=max_new_tokens,
                beside_training=True,
                setting=f"config.{name}.max_batch_size",
            )

        rollouts = sampler("sampling", sampling.max_batch_size, sampling.max_new_tokens)
        evaluating = sampler("eval", evaluation.max_batch_size, evaluation.max_new_tokens)
        scorer = model.scorer(evaluating.max_batch_size)
        return cls(model, data, rollouts, evaluating, scorer)

    def derive(self, old: RunConfig, new: RunConfig, trainable: Trainable) -> "Workspace":
        """The workspace of another run's config, which shares what it can with this one.

        Args:
          old: the config of this workspace.
          new: that of the other run.
          trainable: what the other run trains.
        """
        if not _same_programs(old, new):
            return Workspace.open(new, open_model(new, trainable))
        model = self.model.with_trainable(trainable, new.lora.path)
        if (old.model, old.think) != (new.model, new.think):
            model = LanguageModel.from_config(
                new.model, new.think, self.model.mesh, trainable, new.lora.path
            )
        if model.config != self.model.config:
            return Workspace.open(new, model)
        check_batch_sizes(new, model.mesh)
        data = self.data
        if (old.data, old.forget, old.think) != (new.data, new.forget, new.think):
            splits = load_splits(new.data, new.forget)
            data = RunData.encode(splits, model.chat, new.data)
        return dataclasses.replace(self, model=model, data=data)


def open_model(config: RunConfig, trainable: Trainable = None) -> LanguageModel:
    """The model of a run's config on its mesh."""
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    return LanguageModel.from_config(config.model, config.think, mesh, trainable, config.lora.path)


def _same_programs(old: RunConfig, new: RunConfig) -> bool:
    """Whether two configs compute alike, so that samplers can be shared."""
    theirs = dataclasses.replace(new.model, path=old.model.path, retrained=old.model.retrained)
    keys = ("lora", "mesh", "sampling", "eval")
    return theirs == old.model and all(getattr(old, k) == getattr(new, k) for k in keys)


def check_batch_sizes(config: RunConfig, mesh: Mesh) -> None:
    """Raises UserError where a micro-batch does not divide over the rows of the mesh."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    for phase in ("warmup", "train"):
        settings = getattr(config, phase)
        need = shards * settings.gradient_accumulation_steps
        for key in ("batch_size", "retain_batch_size", "reasoning_batch_size"):
            rows = getattr(settings, key)
            if rows % need:
                raise UserError(
                    f"config.{phase}.{key} = {rows}: must be a multiple of {need}, which is data x "
                    "fsdp x gradient_accumulation_steps"
                )
