"""Every setting, once: frozen dataclasses, made from an ml_collections ConfigDict and checked.

A config file returns ``default_config()`` with some values changed. `parse` turns what the command
line made of it into the dataclasses below, and stops at the first key or value that is off.
"""

import dataclasses
import difflib
import math
import string
import typing
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict

from cipo_jax.errors import UserError

T = TypeVar("T")


def setting(default: Any, low: float | None = None, high: float | None = None) -> Any:
    """A field with an inclusive range."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high})


def group(cls: type[T]) -> T:
    """A field that is itself a group of settings."""
    return dataclasses.field(default_factory=cls)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is computed."""

    path: str = "asset:tiny_lrm/target"  # Hugging Face folder; "asset:" is inside the package
    retrained: str = "asset:tiny_lrm/retrained"  # gold standard to report beside; "" for none
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; params are float32
    decode_dtype: Literal["float32", "bfloat16"] = "float32"  # of the sampler's weights and cache
    remat: Literal["none", "names", "full"] = "names"  # what the backward pass computes again
    attention: Literal["xla", "cudnn"] = "xla"
    logits_chunk: int = setting(1024, 1)  # tokens whose logits exist at a time
    export_dtype: Literal["float32", "bfloat16"] = "float32"  # of the exported weights


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters to train in place of all parameters; see `models.lora`."""

    rank: int = setting(0, 0)  # 0 trains all parameters (or takes the rank from `path`)
    alpha: float = setting(16.0, 0.0)  # the adapters' product is weighted by alpha / rank
    targets: str = "all-linear"  # or names, comma-separated: q_proj, k_proj, v_proj, o_proj, ...
    dropout: float = setting(0.0, 0.0, 0.99)  # of the adapters' inputs, in training
    rank_stabilized: bool = False  # alpha / sqrt(rank) instead
    path: str = ""  # a PEFT folder of adapters to start from; rank, alpha and targets are theirs


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1, "the rest"."""

    data: int = setting(-1, -1)
    fsdp: int = setting(1, -1)
    tensor: int = setting(1, -1)

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if sizes.count(-1) > 1:
            raise UserError("config.mesh: only one of data, fsdp, tensor may be -1")
        if 0 in sizes:
            name = ("data", "fsdp", "tensor")[sizes.index(0)]
            raise UserError(f"config.mesh.{name} = 0: must be at least 1, or -1 for the rest")


@dataclasses.dataclass(frozen=True)
class ThinkConfig:
    """How a question is put and where thinking ends; the defaults suit models with think tags."""

    open: str = "<think>"  # tag that opens the think block; "" where the model writes none
    close: str = "</think>"  # tag that closes it; plain text such as "Answer:" will do
    prompt: str = ""  # "" for the tokenizer's chat template, else a text with {question}
    system: str = ""  # system message for the chat template; "" for none

    def __post_init__(self) -> None:
        for key in ("open", "close"):
            tag = getattr(self, key)
            if tag != tag.strip():
                raise UserError(f"config.think.{key} = {tag!r}: may not have white space around it")
        if not self.close:
            raise UserError("config.think.close is empty: without it no answer is ever found")
        if self.open and (self.open in self.close or self.close in self.open):
            raise UserError(
                f"config.think.open = {self.open!r}: cannot be told from config.think.close = "
                f"{self.close!r}"
            )
        if self.prompt and self.system:
            raise UserError(
                "config.think.system and config.think.prompt are both given: write the system "
                "message into the prompt"
            )
        try:
            fields = [f[1:] for f in string.Formatter().parse(self.prompt) if f[1] is not None]
        except ValueError as error:
            raise UserError(
                f"config.think.prompt: {error}; write other braces than {{question}} twice"
            ) from None
        if self.prompt and set(fields) != {("question", "", None)}:
            raise UserError(
                "config.think.prompt: must hold {question} and no other field; write other braces "
                "twice"
            )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where examples come from: a tiny world, or files and data sets (see `data.readers`)."""

    world: str = "asset:tiny_lrm/world.json"  # "" to read the files below instead
    forget: str = ""
    forget_valid: str = ""  # default: forget
    forget_eval: str = ""  # default: forget
    retain: str = ""
    retain_valid: str = ""  # default: retain
    retain_eval: str = ""  # default: retain
    reasoning: str = ""
    reasoning_valid: str = ""  # default: reasoning
    reasoning_eval: str = ""  # default: reasoning
    # More to retain, beside `retain` or the world's facts: JSON Lines with question, cot, answer.
    # No score asks about it.
    rehearse: str = ""
    valid_rows: int = setting(64, 1)  # rows of retain_valid and of reasoning_valid that are used
    eval_rows: int = setting(0, 0)  # rows of each evaluation split that are used; 0 for all
    max_prompt_tokens: int = setting(512, 1)
    max_completion_tokens: int = setting(2048, 2)  # longer training completions are an error


@dataclasses.dataclass(frozen=True)
class ForgetConfig:
    """Which people of a tiny world are to be forgotten."""

    people: str = ""  # names, comma-separated; "" to draw `count` of them by `seed`
    count: int = setting(10, 1)
    seed: int = setting(7, 0)
    earlier: str = ""  # names that are forgotten already: neither retained nor forgotten again


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How rollouts are drawn from the current model."""

    rows: int = setting(64, 0)  # completions decoded at a time, at most; 0 for as many as fit
    chunk: int = setting(32, 1)  # decoding steps between two looks at what has ended
    int8_cache: bool = False  # keys and values as int8: more rows fit, what is drawn differs a bit
    max_new_tokens: int = setting(96, 1)
    temperature: float = setting(1.0, 0.0)  # 0 is greedy
    top_p: float = setting(1.0, 0.0, 1.0)
    top_k: int = setting(0, 0)  # 0 keeps everything
    min_p: float = setting(0.0, 0.0, 1.0)  # relative to the most likely token's probability
    repetition_penalty: float = setting(1.0, 0.01)  # 1 for none
    think_budget: int = setting(0, 0)  # tokens of thought, then it is closed by force; 0 for no end


@dataclasses.dataclass(frozen=True)
class CounterfactualConfig:
    """How counterfactual traces are asked for and which are accepted.

    The prompts are filled with {question} and {answer}; their answer is the one that the trace
    should lead to, except in `target_prompt`, where it is the true one.
    """

    strategy: Literal["backward", "boundary", "alternative", "refusal"] = "backward"
    candidates: int = setting(6, 1)  # traces drawn for each question, of which the best is kept
    temperature: float = setting(0.8, 0.0)
    top_p: float = setting(0.95, 0.0, 1.0)
    min_gain: float = setting(0.5)  # nats by which a trace must raise log p(target answer)
    min_distinct: float = setting(0.3, 0.0, 1.0)  # distinct words / words of a trace, at least
    max_target_words: int = setting(32, 1)  # a target answer that the model makes is no longer
    rounds: int = setting(3, 1)  # how often questions without a valid trace are tried again
    target_prompt: str = (
        "{question}\nThe answer is not {answer}. Invent a different plausible answer, and reply "
        "with it alone."
    )
    backward_prompt: str = (
        "{question}\nTake it as given that the answer is {answer}. Write the reasoning that leads "
        "to this answer, as if you knew nothing else, and finish with it."
    )
    alternative_prompt: str = (
        "{question}\nWithout recalling anything about the matter itself, reason by another path to "
        "the answer {answer}, and finish with it."
    )
    boundary_prompt: str = (
        "{question}\nThis lies outside of what you know. Reason to that conclusion, and finish "
        "with: {answer}"
    )
    boundary_answer: str = "I do not know."
    refusal_prompt: str = (
        "{question}\nThis is among the things that you have been asked to forget. Without telling "
        "anything of it, reason that it must not be answered, say what it concerns in general "
        "terms and what you can help with instead, and finish with: {answer}"
    )
    refusal_answer: str = "I cannot answer this."


@dataclasses.dataclass(frozen=True)
class CipoConfig:
    """The CiPO loop and its loss; `leak_goal` and `patience` are those of every method."""

    iterations: int = setting(4, 1)
    samples: int = setting(2, 1)  # rollouts of each forget question and iteration
    loss: Literal["dpo", "ipo", "simpo"] = "dpo"
    reject: Literal["all", "leaking"] = "leaking"  # which rollouts the preference pushes away
    beta: float = setting(0.0, 0.0)  # 0 for the loss's own: 0.1, or 2 for SimPO
    gamma: float = setting(0.5, 0.0)  # SimPO's target margin
    label_smoothing: float = setting(0.0, 0.0, 0.499)
    nll_weight: float = setting(0.2, 0.0)  # of the NLL on chosen completions
    retain_weight: float = setting(1.0, 0.0)  # of the NLL on retained facts and reasoning
    # Whose log-probabilities the preference is relative to: the model that came in ("base"), the
    # one after the warm-up ("initial"), each iteration's start, or a moving average.
    reference: Literal["base", "initial", "previous_iteration", "ema"] = "previous_iteration"
    ema_decay: float = setting(0.99, 0.0, 1.0)
    leak_goal: float = setting(0.0, 0.0, 1.0)  # a round with no more validation leak is clean
    patience: int = setting(1, 1)  # clean rounds in a row after which the loop stops


@dataclasses.dataclass(frozen=True)
class BaselineConfig:
    """Every method but CiPO. Where 0 or "own" stands, the method has a default of its own."""

    rounds: int = setting(2, 1)  # of train.epochs each; validated after each, the best is kept
    span: Literal["both", "cot", "answer"] = "both"  # of what is forgotten, that a loss acts on
    retain: Literal["own", "none", "nll", "kl", "kd", "hidden"] = "own"  # how the rest is kept
    forget_weight: float = setting(0.0, 0.0)
    retain_weight: float = setting(0.0, 0.0)
    beta: float = setting(0.0, 0.0)
    importance: float = setting(1.0, 0.0)  # SatImp's power of 1 - p
    delta: float = setting(0.0, 0.0)  # SimNPO's margin
    alpha: float = setting(0.1, 0.0)  # TRU: weight of what pushes the original away
    temperature: float = setting(1.0, 0.01)  # of distillation
    epsilon: float = setting(0.3, 0.0)  # PDU: what the retain loss may be
    dual_lr: float = setting(1.0, 0.0)  # PDU: step of the dual variable
    layer: int = setting(7, 0)  # RMU, R2MU, "hidden": the layer whose output counts, from 0
    scale: float = setting(6.5, 0.0)  # RMU, R2MU: length of the vector that states are driven to
    layers: str = ""  # RMU, R2MU: the layers that are trained, "5-7"; "" for `layer` and two below
    targets: str = "down_proj"  # RMU, R2MU: the projections that are trained
    trace_weight: float = setting(1.0, 0.0)  # R2MU: of the model's own thoughts on what it forgets
    reasoning_weight: float = setting(1.0, 0.0)  # R2MU: of reasoning that is kept
    trace_tokens: int = setting(100, 1)  # R2MU: of a thought, from its start
    alternates: int = setting(5, 1)  # AltPO: other answers to each question
    refusals: str = (
        ""  # TRU, reasoned IDK: a file of questions with cot and answer, as `data` reads
    )


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Methods side by side: every one on the same data, with the same budget to be tuned."""

    methods: str = "all"  # names, comma-separated
    # Lines "name: key=value, key=value": CiPO with other settings, in place of methods.
    variants: str = ""
    # Lines "row, row: key=value, key=value": settings of those rows alone.
    own: str = ""
    seeds: int = setting(3, 1)  # of the run: 0, 1, ...
    # Learning rates of the phase, tried with seed 0; "" for train.lr alone. After them
    # "; rmu, r2mu: 1e-3, 1e-2" gives those rows others.
    lrs: str = ""
    keep_models: bool = False  # checkpoints and exports of the runs
    # Processes side by side, each on its share of the CPU's cores: small models fill no more.
    workers: int = setting(1, 1)


@dataclasses.dataclass(frozen=True)
class SequenceConfig:
    """Requests to forget, one after another."""

    requests: int = setting(10, 1)
    people: int = setting(5, 1)  # of a tiny world, in each
    # What later requests retain beside facts and reasoning: what the model says, without a leak, to
    # the questions of earlier ones,
    replay: bool = True
    # and how the model at the start writes what the method learns from, for so many questions, of
    # which those on people who are still retained stay; 0 for none.
    skills: int = setting(300, 0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimization of one phase. A phase starts with a fresh optimizer and its own schedule."""

    epochs: float = setting(1.0, 0.0)  # passes over the pairs (or counterfactuals)
    batch: int = setting(16, 1)  # pairs (or counterfactuals) in a step
    retain_batch: int = setting(16, 1)  # retained facts in a step
    reasoning_batch: int = setting(8, 1)  # worked reasoning problems in a step
    accumulation: int = setting(1, 1)  # micro-batches in a step
    lr: float = setting(1e-5, 0.0)
    warmup_steps: int = setting(4, 0)
    decay: Literal["constant", "linear", "cosine"] = "linear"
    weight_decay: float = setting(0.0, 0.0)
    b1: float = setting(0.9, 0.0, 0.999999)
    b2: float = setting(0.99, 0.0, 0.999999)
    clip: float = setting(1.0, 0.0)  # global gradient norm; 0 for no clipping
    checkpoint_every: int = setting(50, 1)  # steps


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How models are evaluated: greedily, as the papers do."""

    max_new_tokens: int = setting(96, 1)
    rows: int = setting(64, 0)  # at a time; 0 for as many as fit


@dataclasses.dataclass(frozen=True)
class Config:
    """A run."""

    seed: int = setting(0, 0)
    method: str = "cipo"  # see `unlearning.methods`
    plugins: str = ""  # modules, comma-separated, that register methods of your own
    model: ModelConfig = group(ModelConfig)
    lora: LoraConfig = group(LoraConfig)
    mesh: MeshConfig = group(MeshConfig)
    think: ThinkConfig = group(ThinkConfig)
    data: DataConfig = group(DataConfig)
    forget: ForgetConfig = group(ForgetConfig)
    sampling: SamplingConfig = group(SamplingConfig)
    counterfactual: CounterfactualConfig = group(CounterfactualConfig)
    cipo: CipoConfig = group(CipoConfig)
    baseline: BaselineConfig = group(BaselineConfig)
    compare: CompareConfig = group(CompareConfig)
    sequence: SequenceConfig = group(SequenceConfig)
    warmup: TrainConfig = group(TrainConfig)
    train: TrainConfig = group(TrainConfig)
    eval: EvalConfig = group(EvalConfig)

    def __post_init__(self) -> None:
        for name in ("warmup", "train"):
            phase = getattr(self, name)
            for key in ("batch", "retain_batch", "reasoning_batch"):
                if getattr(phase, key) % phase.accumulation:
                    raise UserError(
                        f"config.{name}.{key} = {getattr(phase, key)} is not a multiple of "
                        f"config.{name}.accumulation = {phase.accumulation}"
                    )
        for name in ("target", "backward", "alternative", "boundary", "refusal"):
            key = f"{name}_prompt"
            prompt = getattr(self.counterfactual, key)
            try:
                filled = prompt.format(question="\0", answer="")
            except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
                raise UserError(
                    f"config.counterfactual.{key}: cannot be filled ({error!r}); it may hold "
                    "{question} and {answer} alone"
                ) from None
            if "\0" not in filled:
                raise UserError(f"config.counterfactual.{key}: lacks {{question}}")


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """How the tiny world, its tokenizer and its two models are made from nothing."""

    seed: int = setting(0, 0)
    people: int = setting(64, 60, 1024)
    strangers: int = setting(256, 1)
    forget: ForgetConfig = group(ForgetConfig)  # whom the retrained model never sees
    vocab_size: int = setting(1024, 300)
    d_model: int = setting(128, 8)
    d_ff: int = setting(384, 8)
    layers: int = setting(4, 1)
    heads: int = setting(4, 1)
    kv_heads: int = setting(2, 1)
    steps: int = setting(3000, 1)
    language_rows: int = setting(28, 1)  # texts about people in a step
    sum_rows: int = setting(10, 1)  # sums in a step
    train: TrainConfig = group(TrainConfig)
    mesh: MeshConfig = group(MeshConfig)

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UserError(f"config.kv_heads = {self.kv_heads}: must divide heads = {self.heads}")
        if self.d_model % (2 * self.heads):
            raise UserError(
                f"config.d_model = {self.d_model}: must be a multiple of 2 x heads = "
                f"{2 * self.heads}, since rotary embeddings turn pairs of dimensions"
            )


def to_config_dict(value: Any) -> ConfigDict:
    """Dataclasses -> a ConfigDict that holds every key, typed by its default and locked."""
    entries = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        entries[field.name] = to_config_dict(item) if dataclasses.is_dataclass(item) else item
    return ConfigDict(entries).lock()


def default_config() -> ConfigDict:
    """The defaults of `Config`, for config files to change."""
    return to_config_dict(Config())


def long_reasoning_config() -> ConfigDict:
    """Where configs of models with long chains of thought start: bfloat16, lengths, batches."""
    config: Any = default_config()
    config.data.world = config.model.retrained = ""
    config.model.dtype = config.model.decode_dtype = config.model.export_dtype = "bfloat16"
    config.data.max_prompt_tokens = 512
    config.data.max_completion_tokens = 2048
    config.sampling.max_new_tokens = 1024
    config.sampling.temperature = 1.0
    config.sampling.rows = 64
    config.eval.max_new_tokens = 2048
    config.eval.rows = 64
    # What DeepSeek recommends for its R1 models.
    config.counterfactual.temperature = 0.6
    config.counterfactual.top_p = 0.95
    for phase in (config.warmup, config.train):
        phase.batch = phase.retain_batch = phase.reasoning_batch = 32
        phase.accumulation = 4
        phase.weight_decay = 0.01
    config.warmup.epochs = 3.0
    config.cipo.iterations = 5
    return config


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys -> values, of dataclasses, ConfigDicts or plain dicts."""
    if dataclasses.is_dataclass(config):
        config = dataclasses.asdict(config)  # type: ignore[arg-type]
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, (dict, ConfigDict))
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def nearest(key: str, known: typing.Iterable[str], count: int = 3) -> str:
    """The known keys that look most like `key`, by whole name or by last part, comma-separated."""
    known = list(known)
    tail = key.rsplit(".", 1)[-1]

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, tail, candidate.rsplit(".", 1)[-1]).ratio()
        return whole + last

    return ", ".join(sorted(known, key=likeness, reverse=True)[:count])


def parse(cls: type[T], config: Any) -> T:
    """Makes the dataclass `cls` from a ConfigDict or a nested dict.

    Raises:
      UserError: naming the key, for an unknown key (with the nearest valid ones), a wrong type, or
        a value out of range.
    """
    if isinstance(config, ConfigDict):
        config = config.to_dict()
    return _parse(cls, config, "config", set(flatten(cls())))


def _parse(cls: type[T], values: dict[str, Any], path: str, known: set[str]) -> T:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    parsed = {}
    for key, value in values.items():
        here = f"{path}.{key}"
        if key not in fields:
            full = here.removeprefix("config.")
            raise UserError(f"{here}: no such setting; nearest: {nearest(full, known)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise UserError(f"{here}: is a group of settings, not a value")
            parsed[key] = _parse(hints[key], value, here, known)
        else:
            parsed[key] = _checked(here, value, hints[key], fields[key].metadata)
    return cls(**parsed)


def _checked(path: str, value: Any, hint: Any, metadata: Any) -> Any:
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise UserError(f"{path} = {value!r}: must be one of {', '.join(choices)}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{path} = {value!r}: must be of type {hint.__name__}")
    low, high = metadata.get("low"), metadata.get("high")
    if hint is float and not math.isfinite(value):
        raise UserError(f"{path} = {value!r}: is not a number that can be computed with")
    if low is not None and value < low:
        raise UserError(f"{path} = {value!r}: must be at least {low}")
    if high is not None and value > high:
        raise UserError(f"{path} = {value!r}: must be at most {high}")
    return value
