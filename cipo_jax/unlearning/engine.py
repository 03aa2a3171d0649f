"""What every unlearning method shares: one loader, sampler, scorer, evaluator and run folder."""

import dataclasses
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from cipo_jax.config import Config
from cipo_jax.data.examples import Example, example_row
from cipo_jax.data.splits import Splits, load_splits
from cipo_jax.errors import UserError
from cipo_jax.evals import evaluate
from cipo_jax.evals.evaluate import Scores
from cipo_jax.hub import resolve
from cipo_jax.models import lora as adapters
from cipo_jax.models.decoder import abstract_params
from cipo_jax.models.lora import Lora
from cipo_jax.models.reasoning_model import ReasoningModel, compute_of, fingerprint
from cipo_jax.models.trainable import ParamSubset, Trainable, abstract_trainable, assemble
from cipo_jax.progress import Reporter
from cipo_jax.sampling.decode import SamplingParams
from cipo_jax.sampling.memory import fitting_rows, sharded_bytes
from cipo_jax.sampling.sampler import Completion, Request, Sampler
from cipo_jax.training.checkpoints import Checkpoints
from cipo_jax.training.mesh import abstract_on, make_mesh, param_shardings
from cipo_jax.training.scoring import Scorer
from cipo_jax.training.step import Policy
from cipo_jax.typing import Array, Params
from cipo_jax.unlearning import methods
from cipo_jax.unlearning.run_folder import MetricsLog, Row, RunFolder


def derive_key(seed: int, *names: str | int) -> Array:
    """A PRNG key for a named place in the run, independent of what was drawn before."""
    key = jax.random.key(seed)
    for name in names:
        number = name if isinstance(name, int) else zlib.crc32(name.encode())
        key = jax.random.fold_in(key, number)
    return key


@dataclasses.dataclass(frozen=True)
class Engine:
    """The machinery of a run.

    Attributes:
      config: every setting.
      model: shape, format and folder of the model to be unlearned.
      part: what is trained; None trains all parameters.
      splits: the data.
      mesh: the devices.
      sampler: for rollouts and counterfactuals.
      eval_sampler: for evaluations.
      scorer: token log-probabilities of given completions.
      folder: the run folder.
      checkpoints: inside the run folder.
      log: per-step metrics.
      reporter: the terminal.
      updates: compiled updates by what they were made from, shared by runs side by side.
      trainers: trainers, whose making of a state is compiled too, by that and their phase.
    """

    config: Config
    model: ReasoningModel
    part: Trainable
    splits: Splits
    mesh: Mesh
    sampler: Sampler
    eval_sampler: Sampler
    scorer: Scorer
    folder: RunFolder
    checkpoints: Checkpoints
    log: MetricsLog
    reporter: Reporter
    updates: dict[Any, Any] = dataclasses.field(default_factory=dict)
    trainers: dict[Any, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(
        cls,
        config: Config,
        workdir: str | Path,
        reporter: Reporter,
        parent: "Engine | None" = None,
        claim: bool = True,
    ) -> "Engine":
        """Reads the model's shape and the data, and opens the run folder. No weights yet.

        Args:
          config: every setting.
          workdir: the run folder.
          reporter: the terminal.
          parent: the engine of a run that this one belongs to, which hears when it is to stop.
          claim: whether no other process may be at work in the folder.
        """
        model = ReasoningModel.open(config.model.path, config.think)
        config = methods.configured(config)
        methods.check(config, model.config)
        part = methods.part_of(config, model.config)
        splits = load_splits(config)
        mesh = make_mesh(**dataclasses.asdict(config.mesh))
        # Raises early where the mesh does not fit the model.
        param_shardings(abstract_params(model.config), mesh)
        _check_batches(config, mesh)
        _check_lengths(config, model, splits)
        made_from = _made_from(config, model, splits)
        folder = RunFolder(workdir, config, made_from, parent.folder if parent else None)
        if claim and parent is None:
            folder.claim()
        policy = Policy(model.config, compute_of(config.model))
        evaluating = _sampler("eval", config, model, mesh, part)
        return cls(
            config=config,
            model=model,
            part=part,
            splits=splits,
            mesh=mesh,
            sampler=_sampler("sampling", config, model, mesh, part),
            eval_sampler=evaluating,
            scorer=Scorer(policy, mesh, evaluating.rows),
            folder=folder,
            checkpoints=Checkpoints(folder.path / "checkpoints"),
            log=MetricsLog(folder),
            reporter=reporter,
        )

    def child(self, config: Config, workdir: str | Path, reporter: Reporter) -> "Engine":
        """The engine of a run that belongs to this one.

        It shares samplers and what is compiled, and the data, unless the config asks for others.
        """
        config = methods.configured(config)
        own, theirs = config.model, self.config.model
        alike = dataclasses.replace(own, path=theirs.path, retrained=theirs.retrained) == theirs
        shared = ("lora", "mesh", "sampling", "eval")
        if not alike or any(getattr(config, k) != getattr(self.config, k) for k in shared):
            return Engine.open(config, workdir, reporter, self)
        model, splits = self.model, self.splits
        if any(getattr(config, k) != getattr(self.config, k) for k in ("model", "think")):
            model = ReasoningModel.open(own.path, config.think)
        if any(getattr(config, k) != getattr(self.config, k) for k in ("data", "forget")):
            splits = load_splits(config)
        if model.config != self.model.config:
            return Engine.open(config, workdir, reporter, self)
        methods.check(config, model.config)
        _check_batches(config, self.mesh)
        _check_lengths(config, model, splits)
        folder = RunFolder(workdir, config, _made_from(config, model, splits), self.folder)
        return dataclasses.replace(
            self,
            config=config,
            model=model,
            splits=splits,
            part=methods.part_of(config, model.config),
            folder=folder,
            checkpoints=Checkpoints(folder.path / "checkpoints"),
            log=MetricsLog(folder),
            reporter=reporter,
        )

    def key(self, *names: str | int) -> Array:
        """A key addressed by the run's seed and these names."""
        return derive_key(self.config.seed, *names)

    def load_model(self, model: ReasoningModel) -> Params:
        """The weights of a model, sharded for training."""
        return model.load_params(param_shardings(abstract_params(model.config), self.mesh))

    @cached_property
    def frozen(self) -> Params:
        """The model as it came in, where something stands beside it or refers to it; else {}.

        In the dtype of the computation.
        """
        method = methods.find(self.config.method)
        if self.part is None and not method.refers(self.config.baseline):
            return {}
        shardings = param_shardings(abstract_params(self.model.config), self.mesh)
        return self.model.load_params(shardings, self.config.model.dtype)

    def abstract_trained(self) -> Params:
        """Shapes, dtypes and shardings of what is trained: all parameters, or a part."""
        return abstract_on(self.mesh, abstract_trainable(self.model.config, self.part))

    def start(self) -> Params:
        """What is trained, as it is before training."""
        if self.part is None:
            return self.load_model(self.model)
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_trained())
        if isinstance(self.part, ParamSubset):
            return jax.jit(self.part.take, out_shardings=shardings)(self.load_model(self.model))
        path = self.config.lora.path
        if path:
            return adapters.load_adapters(resolve(path), self.model.config, self.part, shardings)
        fresh = adapters.init_adapters(self.model.config, self.part, self.key("adapters"))
        return jax.device_put(fresh, shardings)

    def assemble(self, trained: Params) -> Params:
        """The model that the sampler and the scorer take, from what is trained."""
        return assemble(self.part, self.frozen, trained)

    def sample_rows(
        self,
        part: str,
        title: str,
        params: Params,
        requests: Sequence[Request],
        rules: SamplingParams,
        key: Array,
        samples: int,
    ) -> list[list[Row]]:
        """Samples completions of each request, with a progress bar, resumable request by request.

        Args:
          part: where partial results are kept; see `RunFolder.in_parts`.
          title: of the bar.
          params: from `assemble`.
          requests: prompts and item ids.
          rules: how to draw.
          key: addressed by the caller.
          samples: completions of each request.

        Returns:
          For each request its samples, each {"item", "sample", "ids", "stopped", "cot", "answer",
          "closed"}.
        """
        if not requests:
            return []
        decoding = self.sampler.prepare(params)

        def work(missing: list[int]) -> Iterator[tuple[int, list[Row]]]:
            wanted = [requests[i] for i in missing]
            for i, drawn in self.sampler.stream_requests(decoding, wanted, rules, key, samples):
                yield missing[i], [self._row(completion) for completion in drawn]

        with self.reporter.bar(title, len(requests) * samples) as bar:

            def on_part(rows: list[Row], cached: bool) -> None:
                if cached:
                    bar.skip(len(rows))
                else:
                    bar.advance(len(rows), sum(len(r["ids"]) for r in rows))

            rows = self.folder.in_parts(part, len(requests), work, on_part)
        return [rows[i : i + samples] for i in range(0, len(rows), samples)]

    def _row(self, completion: Completion) -> Row:
        thought = self.model.format.split(completion.ids)
        return (
            {"item": completion.item, "sample": completion.sample}
            | thought._asdict()
            | {"stopped": completion.stopped, "ids": completion.ids}
        )

    def evaluate(
        self,
        part: str,
        title: str,
        params: Params,
        splits: Mapping[str, Sequence[Example]],
        model: ReasoningModel | None = None,
        prefill: str = "",
    ) -> tuple[list[Row], Scores]:
        """Greedy generations on the splits "forget", "retain" and "reasoning", judged.

        Args:
          part: where partial results are kept; see `RunFolder.in_parts`.
          title: of the bar.
          params: from `assemble`.
          splits: the questions, by role.
          model: whose shape and format; the run's own by default.
          prefill: how completions begin; see `evals.attacks`.

        Returns:
          One row per question, and the scores.
        """
        model = model or self.model
        # Another model of the same shape shares the sampler's programs.
        sampler = self.eval_sampler
        if model.config != self.model.config:
            sampler = dataclasses.replace(sampler, config=model.config)
        questions = [(name, example) for name, rows in splits.items() for example in rows]
        decoding = sampler.prepare(params)

        def work(missing: list[int]) -> Iterator[tuple[int, list[Row]]]:
            asked = [questions[i] for i in missing]
            limit = self.config.eval.max_new_tokens
            for i, row in evaluate.judged(sampler, model.format, decoding, asked, limit, prefill):
                yield missing[i], [row]

        with self.reporter.bar(title, len(questions)) as bar:

            def on_part(rows: list[Row], cached: bool) -> None:
                if cached:
                    bar.skip(len(rows))
                else:
                    bar.advance(len(rows), sum(r["tokens"] for r in rows))

            rows = self.folder.in_parts(part, len(questions), work, on_part)
        return rows, evaluate.scores(rows, self.splits.words)


def _sampler(
    name: str, config: Config, model: ReasoningModel, mesh: Mesh, part: Trainable
) -> Sampler:
    """The sampler of config.sampling or config.eval; raises UserError where it does not fit."""
    settings, decoding = getattr(config, name), compute_of(config.model, decoding=True)
    trained = abstract_params(model.config)
    dtype = config.model.dtype if isinstance(part, Lora) else "float32"
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), trained)
    planned = fitting_rows(
        f"config.{name}.rows = {settings.rows}",
        settings.rows,
        model.config,
        decoding,
        mesh,
        config.data.max_prompt_tokens,
        settings.max_new_tokens,
        int8_cache=config.sampling.int8_cache,
        resident=sharded_bytes(frozen, param_shardings(trained, mesh)),
    )
    return Sampler(
        model.config,
        decoding,
        mesh,
        planned.rows,
        config.sampling.chunk,
        config.sampling.int8_cache,
    )


def _made_from(config: Config, model: ReasoningModel, splits: Splits) -> str:
    """Changes when the model, the adapters or the data that a run starts from do."""
    data = {name: [example_row(e) for e in rows] for name, rows in splits.named()}
    digest = zlib.crc32(json.dumps(data, sort_keys=True).encode())
    made_from = f"{model.fingerprint()}:{digest:08x}"
    if config.lora.path:
        made_from += f":{fingerprint(resolve(config.lora.path))}"
    return made_from


def _check_batches(config: Config, mesh: Mesh) -> None:
    """Raises UserError where a micro-batch does not divide over the mesh's rows."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    for phase in ("warmup", "train"):
        settings = getattr(config, phase)
        for key in ("batch", "retain_batch", "reasoning_batch"):
            rows, need = getattr(settings, key), shards * settings.accumulation
            if rows % need:
                raise UserError(
                    f"config.{phase}.{key} = {rows}: must be a multiple of {need}, which is data x "
                    "fsdp x accumulation"
                )


def _check_lengths(config: Config, model: ReasoningModel, splits: Splits) -> None:
    """Raises UserError where a prompt, or a completion that is trained on, is too long."""
    limits = config.data
    for name, examples in splits.named():
        for number, example in enumerate(examples, 1):
            tokens = len(model.format.prompt_ids(example.question))
            if tokens > limits.max_prompt_tokens:
                raise UserError(
                    f"{name}, example {number}: its prompt has {tokens} tokens, "
                    f"config.data.max_prompt_tokens is {limits.max_prompt_tokens}"
                )
            if name not in ("retain", "reasoning", "rehearse"):
                continue
            tokens = len(model.format.completion_ids(example.cot or "", example.answer))
            if tokens > limits.max_completion_tokens:
                raise UserError(
                    f"{name}, example {number}: its chain of thought and answer have {tokens} "
                    f"tokens, config.data.max_completion_tokens is {limits.max_completion_tokens}"
                )
