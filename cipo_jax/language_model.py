"""The library: a language model on a mesh, and the sampler, scorer and train step made from it.

    model = LanguageModel.from_pretrained("asset:tiny_lrm/target", lora=Lora(rank=8, alpha=16.0))
    sampler = model.sampler(max_batch_size=32)
    step = model.train_step(PreferenceObjective("dpo"), optax.adamw(1e-4))
    state = step.init(model.init_trainable())
    batch = model.pair_batch([TextPair(question, (cot, answer), (other_cot, other_answer))])
    state, metrics = step(state, batch, model.base_params)
    model.save("out", state.params)

It knows no method and no run folder. Weights are read when they are first asked for; what is
trained is an argument of every function, never an attribute.
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from cipo_jax.data.batches import PadShape, TokenizedExample, collate_pairs
from cipo_jax.errors import UserError
from cipo_jax.hub import resolve
from cipo_jax.models import lora as adapters
from cipo_jax.models.decoder import Compute, DecoderConfig, Remat, abstract_params, merged
from cipo_jax.models.lora import Lora
from cipo_jax.models.pretrained import PretrainedFolder, compute_from_config, fingerprint
from cipo_jax.models.trainable import ParamSubset, Trainable, abstract_trainable, assemble
from cipo_jax.sampling.job import Request
from cipo_jax.sampling.memory import MemoryPlan, fit_batch_size, sharded_bytes
from cipo_jax.sampling.params import SamplingParams
from cipo_jax.sampling.sampler import Sampler
from cipo_jax.shared_config import LoraConfig, ModelConfig, ThinkConfig
from cipo_jax.text.chat_format import ChatFormat
from cipo_jax.training.mesh import abstract_on, make_mesh, param_shardings
from cipo_jax.training.objective import Batch, Objective
from cipo_jax.training.optimizer import Optimizer
from cipo_jax.training.policy import Policy
from cipo_jax.training.scoring import Scorer
from cipo_jax.training.step import TrainStep
from cipo_jax.typing import Array, Params

Dtype = Literal["float32", "bfloat16"]


class TextPair(NamedTuple):
    """A preference pair as text.

    Attributes:
      question: the question.
      chosen: chain of thought and answer of the chosen completion.
      rejected: those of the rejected completion.
    """

    question: str
    chosen: tuple[str, str]
    rejected: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A causal language model with a think block, on a mesh of devices.

    Attributes:
      pretrained: its Hugging Face folder.
      chat: prompts and completions as token ids.
      mesh: the devices, axes data x fsdp x tensor.
      compute: dtype and kernels of training and scoring.
      decode_compute: those of sampling.
      trainable: adapters (`Lora`), a `ParamSubset`, or None for all parameters.
      adapters: folder of PEFT adapters to start from; "" for fresh ones.
      path: as it was given, for the config of saved adapters.
    """

    pretrained: PretrainedFolder
    chat: ChatFormat
    mesh: Mesh
    compute: Compute = Compute()
    decode_compute: Compute = Compute()
    trainable: Trainable = None
    adapters: str = ""
    path: str = ""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        mesh: Mesh | None = None,
        lora: Lora | str | None = None,
        dtype: Dtype = "float32",
        *,
        remat: Remat = "names",
        think: ThinkConfig | None = None,
    ) -> "LanguageModel":
        """Opens a model; its weights are read when they are first asked for.

        Args:
          path: a Hugging Face folder, "asset:NAME", or "OWNER/NAME" of the hub; see `hub.resolve`.
          mesh: from `make_mesh`; all devices along `data` by default.
          lora: fresh adapters to train, or a folder of PEFT adapters to go on with; None trains
            all parameters.
          dtype: of the computation; parameters that are trained stay in float32.
          remat: what the backward pass computes again: "none", "names" or "full".
          think: prompt template and think tags, where the tokenizer's chat template is not right.

        Raises:
          UserError: where the folder cannot be read or the mesh does not fit the model.
        """
        model_config = ModelConfig(path=str(path), dtype=dtype, decode_dtype=dtype, remat=remat)
        folder = lora if isinstance(lora, str) else ""
        trainable = Lora.from_config(LoraConfig(path=folder)) if folder else lora
        assert not isinstance(trainable, str)
        return cls.from_config(
            model_config, think, make_mesh() if mesh is None else mesh, trainable, folder
        )

    @classmethod
    def from_config(
        cls,
        config: ModelConfig,
        think: ThinkConfig | None = None,
        mesh: Mesh | None = None,
        trainable: Trainable = None,
        adapters: str = "",
    ) -> "LanguageModel":
        """Opens the model of a config group; arguments as in the attributes of the class.

        Raises:
          UserError: where the folder cannot be read or the mesh does not fit the model.
        """
        mesh = make_mesh() if mesh is None else mesh
        pretrained = PretrainedFolder.open(config.path)
        chat = ChatFormat(
            pretrained.tokenizer,
            stop_ids=pretrained.stop_ids,
            **dataclasses.asdict(think or ThinkConfig()),
        )
        param_shardings(abstract_params(pretrained.config), mesh)  # Raises where it does not fit.
        compute = compute_from_config(config)
        decoding = compute_from_config(config, decoding=True)
        return cls(pretrained, chat, mesh, compute, decoding, trainable, adapters, config.path)

    @property
    def config(self) -> DecoderConfig:
        """The shape of the decoder."""
        return self.pretrained.config

    def with_trainable(self, trainable: Trainable, adapters: str = "") -> "LanguageModel":
        """The same model with something else to be trained."""
        return dataclasses.replace(self, trainable=trainable, adapters=adapters)

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the folder's config, tokenizer or weights do, or the adapters."""
        own = self.pretrained.fingerprint()
        return f"{own}:{fingerprint(resolve(self.adapters))}" if self.adapters else own

    # ---- parameters

    def load_params(self, dtype: str = "float32") -> Params:
        """The stored weights in the training layout, sharded over the mesh."""
        shardings = param_shardings(abstract_params(self.config), self.mesh)
        return self.pretrained.load_params(shardings, dtype)

    @cached_property
    def base_params(self) -> Params:
        """The stored weights in the dtype of the computation: what adapters stand beside."""
        return self.load_params(self.compute.dtype)

    def abstract_trainable(self) -> Params:
        """Shapes, dtypes and shardings of what is trained."""
        return abstract_on(self.mesh, abstract_trainable(self.config, self.trainable))

    def init_trainable(self, key: Array | None = None) -> Params:
        """What is trained, as it is before training, in float32.

        Args:
          key: PRNG key of fresh adapters; key 0 by default.
        """
        if self.trainable is None:
            return self.load_params()
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_trainable())
        if isinstance(self.trainable, ParamSubset):
            return jax.jit(self.trainable.take, out_shardings=shardings)(self.load_params())
        if self.adapters:
            folder = resolve(self.adapters)
            return adapters.load_adapters(folder, self.config, self.trainable, shardings)
        key = jax.random.key(0) if key is None else key
        return jax.device_put(adapters.init_adapters(self.config, self.trainable, key), shardings)

    def assemble(self, trained: Params) -> Params:
        """The parameters that `Sampler.prepare`, `Scorer` and `Policy` take.

        Args:
          trained: in the shapes of `abstract_trainable`.
        """
        if self.trainable is None:
            return trained
        return assemble(self.trainable, self.base_params, trained)

    @cached_property
    def params(self) -> Params:
        """The parameters before training, assembled; kept."""
        return self.assemble(self.init_trainable())

    # ---- what is made from a model

    @property
    def policy(self) -> Policy:
        """Log-probabilities and hidden states as functions of parameters, without dropout."""
        return Policy(self.config, self.compute)

    def plan_sampler(
        self,
        max_batch_size: int,
        max_prompt_tokens: int,
        max_new_tokens: int,
        *,
        int8_cache: bool = False,
        beside_training: bool = False,
        setting: str = "max_batch_size",
    ) -> MemoryPlan:
        """The memory of a sampler, computed from shapes; arguments as in `sampler`."""
        resident = 0
        if beside_training:
            shapes = abstract_params(self.config)
            dtype = self.compute.dtype if isinstance(self.trainable, Lora) else "float32"
            stored = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
            resident = sharded_bytes(stored, param_shardings(shapes, self.mesh))
        return fit_batch_size(
            f"{setting} = {max_batch_size}",
            max_batch_size,
            self.config,
            self.decode_compute,
            self.mesh,
            max_prompt_tokens,
            max_new_tokens,
            int8_cache=int8_cache,
            resident=resident,
        )

    def sampler(
        self,
        sampling_params: SamplingParams | None = None,
        *,
        max_batch_size: int = 0,
        decode_chunk: int = 32,
        int8_cache: bool = False,
        max_prompt_tokens: int = 512,
        max_new_tokens: int | None = None,
        beside_training: bool = False,
        setting: str = "max_batch_size",
    ) -> Sampler:
        """A sampler whose batch fits into memory.

        Args:
          sampling_params: how to draw and when to stop, where a job does not say.
          max_batch_size: completions decoded at a time, at most; 0 for as many as fit.
          decode_chunk: decoding steps between two looks at what has ended.
          int8_cache: whether keys and values are kept as int8.
          max_prompt_tokens: for the memory plan.
          max_new_tokens: for the memory plan; that of `sampling_params`, or 512, by default.
          beside_training: whether the training layout of the weights is in memory as well.
          setting: name of the setting, for messages.

        Raises:
          UserError: where such a batch does not fit.
        """
        if max_new_tokens is None:
            max_new_tokens = 512 if sampling_params is None else sampling_params.max_new_tokens
        plan = self.plan_sampler(
            max_batch_size,
            max_prompt_tokens,
            max_new_tokens,
            int8_cache=int8_cache,
            beside_training=beside_training,
            setting=setting,
        )
        return Sampler(
            self.config,
            self.decode_compute,
            self.mesh,
            plan.batch_size,
            decode_chunk,
            int8_cache,
            sampling_params,
        )

    def sampling_params(
        self, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, **more: Any
    ) -> SamplingParams:
        """Sampling parameters with this model's stop tokens; see `SamplingParams.for_chat`."""
        return SamplingParams.for_chat(self.chat, max_new_tokens, temperature, top_p, **more)

    def request(self, question: str, item: int = 0, prefill: str = "") -> Request:
        """A sampling request for a question.

        Args:
          question: the plain text.
          item: the number that its randomness is addressed by.
          prefill: how the completion is made to begin.
        """
        return Request(self.chat.prompt_ids(question), item, self.chat.text_ids(prefill))

    def scorer(self, max_batch_size: int = 64) -> Scorer:
        """Log-probabilities of given completions."""
        return Scorer(self.policy, self.mesh, max_batch_size)

    def pair_batch(
        self,
        pairs: Sequence[TextPair | tuple[str, tuple[str, str], tuple[str, str]]],
        reference: Params = None,
        *,
        shape: PadShape | None = None,
    ) -> Batch:
        """A batch of preference pairs, as `PreferenceObjective` takes it, in numpy arrays.

        Args:
          pairs: questions with a chosen and a rejected completion.
          reference: assembled parameters of the reference; those before training by default.
          shape: padded sizes; the smallest that fit by default. One shape for all batches means one
            compilation.

        Returns:
          "pairs": the completions, every array [B, 2, ...]; "ref": [B, 2] their log-probabilities
          under the reference, in nats.

        `TrainStep.put` places it on the mesh, where its rows divide over the data and fsdp axes; a
        step takes it unplaced as well, and every device then computes all rows.

        Raises:
          ValueError: without pairs, or where a row is longer than the shape.
        """
        if not pairs:
            raise ValueError("no pairs")
        chosen, rejected = (
            [
                TokenizedExample(
                    self.chat.prompt_ids(question), self.chat.completion_ids(*completions[side])
                )
                for question, *completions in pairs
            ]
            for side in (0, 1)
        )
        rows = [row for pair in zip(chosen, rejected, strict=True) for row in pair]
        shape = PadShape.fitting(rows) if shape is None else shape
        params = self.params if reference is None else reference
        logps = self.scorer(min(len(rows), 64)).token_logps(params, rows, shape)
        sums = np.array([float(lp.sum()) for lp in logps], np.float32).reshape(-1, 2)
        return {"pairs": collate_pairs(chosen, rejected, shape), "ref": sums}

    def train_step(
        self,
        objective: Objective,
        optimizer: Optimizer,
        *,
        gradient_accumulation_steps: int = 1,
        ema_decay: float | None = None,
    ) -> TrainStep:
        """The update step of an objective: a hashable value, compiled once for equal values."""
        return TrainStep(
            self.policy,
            objective,
            optimizer,
            self.mesh,
            self.trainable,
            gradient_accumulation_steps,
            ema_decay,
        )

    # ---- out

    def save(
        self,
        folder: str | Path,
        trained: Params | None = None,
        dtype: Dtype = "float32",
        form: Literal["merged", "adapter"] = "merged",
    ) -> None:
        """Writes a Hugging Face folder, or adapters as PEFT reads them; whole or not at all.

        Args:
          folder: where to; an older model there is replaced.
          trained: in the shapes of `abstract_trainable`; as before training by default.
          dtype: of the stored weights.
          form: "merged" for the whole model with adapters merged, "adapter" for adapters alone.

        Raises:
          UserError: for form="adapter" without adapters.
        """
        trained = self.init_trainable() if trained is None else trained
        if form == "adapter":
            if not isinstance(self.trainable, Lora):
                raise UserError(f"{folder}: there are no adapters to save; save the merged model")
            adapters.save_adapters(folder, self.config, self.trainable, trained, self.path)
            return
        params = merged(self.assemble(trained))
        self.pretrained.save(folder, params, dtype=dtype)
