"""The settings that a run of any method has; `config.Config` adds those of the methods."""

import dataclasses
import string
from typing import Literal, TypeVar

from cipo_jax.errors import UserError
from cipo_jax.settings import group, setting

Dtype = Literal["float32", "bfloat16"]
G = TypeVar("G")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is computed."""

    path: str = setting(
        "asset:tiny_lrm/target",
        'Hugging Face folder or hub name; "asset:" is a folder inside of the package',
    )
    retrained: str = setting(
        "asset:tiny_lrm/retrained",
        "model that never saw the forget set, scored for comparison; empty for none",
    )
    dtype: Dtype = setting("float32", "dtype of training computations; parameters are float32")
    decode_dtype: Dtype = setting("float32", "dtype of the sampler's weights and cache")
    remat: Literal["none", "names", "full"] = setting(
        "names", "rematerialization: activations that the backward pass recomputes"
    )
    attention: Literal["xla", "cudnn"] = setting(
        "xla", "implementation of attention over whole sequences"
    )
    logits_chunk: int = setting(1024, "tokens whose logits are in memory at a time", 1)
    export_dtype: Dtype = setting("float32", "dtype of exported weights")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """LoRA adapters, trained in place of all parameters; see `models.lora`."""

    rank: int = setting(0, "rank; 0 trains all parameters, or takes the rank of `path`", 0)
    alpha: float = setting(16.0, "the adapters' product is scaled by alpha / rank", 0.0)
    target_modules: tuple[str, ...] = setting(
        ("all-linear",),
        "projections with adapters, by their names in transformers: q_proj, k_proj, ...",
    )
    dropout: float = setting(0.0, "dropout of the adapters' inputs in training", 0.0, 0.99)
    rank_stabilized: bool = setting(False, "scale by alpha / sqrt(rank) instead (rsLoRA)")
    path: str = setting(
        "", "PEFT folder of adapters to start from; it sets rank, alpha and target_modules"
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1, for the rest."""

    data: int = setting(-1, "devices along the data axis", -1)
    fsdp: int = setting(1, "devices along the fsdp axis, over which parameters are sharded", -1)
    tensor: int = setting(1, "devices along the tensor axis", -1)

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if sizes.count(-1) > 1:
            raise UserError("config.mesh: only one of data, fsdp, tensor may be -1")
        if 0 in sizes:
            name = ("data", "fsdp", "tensor")[sizes.index(0)]
            raise UserError(f"config.mesh.{name} = 0: must be at least 1, or -1 for the rest")


@dataclasses.dataclass(frozen=True)
class ThinkConfig:
    """The prompt of a question and the tags of a chain of thought."""

    open: str = setting("<think>", "tag that opens the chain of thought; empty for none")
    close: str = setting("</think>", 'tag that closes it; plain text such as "Answer:" will do')
    prompt: str = setting(
        "", "prompt with {question}; empty for the chat template of the tokenizer"
    )
    system: str = setting("", "system message of the chat template; empty for none")

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

    world: str = setting(
        "asset:tiny_lrm/world.json", "a tiny world; empty to read the sources below instead"
    )
    forget: str = setting("", "source of the forget set, for training")
    forget_valid: str = setting("", "source of its validation split; empty for forget")
    forget_eval: str = setting("", "source of its evaluation split; empty for forget")
    retain: str = setting("", "source of facts to retain, for training")
    retain_valid: str = setting("", "source of their validation split; empty for retain")
    retain_eval: str = setting("", "source of their evaluation split; empty for retain")
    reasoning: str = setting("", "source of reasoning problems to retain, for training")
    reasoning_valid: str = setting("", "source of their validation split; empty for reasoning")
    reasoning_eval: str = setting("", "source of their evaluation split; empty for reasoning")
    rehearse: str = setting(
        "",
        "more examples to retain, beside `retain` or the world's facts: JSON Lines of question, "
        "cot, answer; they are in no score",
    )
    valid_rows: int = setting(64, "rows used of retain_valid and of reasoning_valid", 1)
    eval_rows: int = setting(0, "rows used of each evaluation split; 0 for all", 0)
    max_prompt_tokens: int = setting(512, "longest prompt, in tokens", 1)
    max_completion_tokens: int = setting(
        2048, "longest completion in training, in tokens; a longer one is an error", 2
    )


@dataclasses.dataclass(frozen=True)
class ForgetConfig:
    """The people of a tiny world that are to be forgotten."""

    people: tuple[str, ...] = setting((), "their names; empty to draw `count` people by `seed`")
    count: int = setting(10, "number of people to draw", 1)
    seed: int = setting(7, "seed of the draw", 0)
    earlier: tuple[str, ...] = setting(
        (), "names forgotten by earlier requests: neither retained nor forgotten again"
    )


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How rollouts are sampled."""

    max_batch_size: int = setting(
        64, "completions decoded at a time, at most; 0 for as many as fit in memory", 0
    )
    decode_chunk: int = setting(
        32, "decoding steps between two checks for completions that have ended", 1
    )
    int8_cache: bool = setting(
        False, "int8 keys and values: more rows fit, samples differ slightly"
    )
    max_new_tokens: int = setting(96, "longest completion, in tokens", 1)
    temperature: float = setting(1.0, "sampling temperature; 0 is greedy", 0.0)
    top_p: float = setting(1.0, "nucleus sampling: probability mass that is kept", 0.0, 1.0)
    top_k: int = setting(0, "most likely tokens that are kept; 0 for all", 0)
    min_p: float = setting(
        0.0, "least probability that is kept, relative to the most likely token's", 0.0, 1.0
    )
    repetition_penalty: float = setting(
        1.0, "penalty on tokens that have occurred; 1 for none", 0.01
    )
    think_budget: int = setting(
        0, "tokens after which a chain of thought is closed by force; 0 for no limit", 0
    )


@dataclasses.dataclass(frozen=True)
class CounterfactualConfig:
    """How counterfactual traces are generated and which are accepted.

    The prompts hold {question} and {answer}; {answer} is the target answer of the trace, except in
    `target_prompt`, where it is the true one.
    """

    strategy: Literal["backward", "boundary", "alternative", "refusal"] = setting(
        "backward", "which of the prompts below asks for a trace"
    )
    num_candidates: int = setting(6, "traces sampled for each question, of which one is kept", 1)
    temperature: float = setting(0.8, "sampling temperature of traces", 0.0)
    top_p: float = setting(0.95, "nucleus sampling of traces: probability mass kept", 0.0, 1.0)
    min_gain: float = setting(
        0.5, "least gain in log p(target answer) by an accepted trace, in nats"
    )
    min_distinct: float = setting(
        0.3, "least ratio of distinct words to words of an accepted trace", 0.0, 1.0
    )
    max_target_words: int = setting(32, "most words of a target answer that the model writes", 1)
    rounds: int = setting(3, "attempts at questions without an accepted trace", 1)
    target_prompt: str = setting(
        "{question}\nThe answer is not {answer}. Invent a different plausible answer, and reply "
        "with it alone.",
        "asks for a target answer",
    )
    backward_prompt: str = setting(
        "{question}\nTake it as given that the answer is {answer}. Write the reasoning that leads "
        "to this answer, as if you knew nothing else, and finish with it.",
        "asks for a trace that leads to the target answer",
    )
    alternative_prompt: str = setting(
        "{question}\nWithout recalling anything about the matter itself, reason by another path to "
        "the answer {answer}, and finish with it.",
        "asks for a trace that reaches the target answer by another path",
    )
    boundary_prompt: str = setting(
        "{question}\nThis lies outside of what you know. Reason to that conclusion, and finish "
        "with: {answer}",
        "asks for a trace that ends in not knowing",
    )
    boundary_answer: str = setting("I do not know.", "target answer of boundary_prompt")
    refusal_prompt: str = setting(
        "{question}\nThis is among the things that you have been asked to forget. Without telling "
        "anything of it, reason that it must not be answered, say what it concerns in general "
        "terms and what you can help with instead, and finish with: {answer}",
        "asks for a trace that ends in a refusal",
    )
    refusal_answer: str = setting("I cannot answer this.", "target answer of refusal_prompt")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimization in one phase, which starts with a fresh optimizer and its own schedule."""

    epochs: float = setting(1.0, "passes over the pairs (or targets)", 0.0)
    batch_size: int = setting(16, "pairs (or targets) in a step", 1)
    retain_batch_size: int = setting(16, "retained facts in a step", 1)
    reasoning_batch_size: int = setting(8, "retained reasoning problems in a step", 1)
    gradient_accumulation_steps: int = setting(1, "micro-batches in a step", 1)
    lr: float = setting(1e-5, "peak learning rate", 0.0)
    warmup_steps: int = setting(4, "steps of linear warm-up of the learning rate", 0)
    lr_schedule: Literal["constant", "linear", "cosine"] = setting(
        "linear", "decay of the learning rate after its warm-up"
    )
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay", 0.0)
    # Adam's bias correction would divide by zero with 1.
    b1: float = setting(0.9, "decay of Adam's first moment", 0.0, 0.999999)
    b2: float = setting(0.99, "decay of Adam's second moment", 0.0, 0.999999)
    max_grad_norm: float = setting(1.0, "clips the global gradient norm; 0 for no clipping", 0.0)
    checkpoint_every: int = setting(50, "steps between two checkpoints", 1)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation, by greedy decoding."""

    max_new_tokens: int = setting(96, "longest completion, in tokens", 1)
    max_batch_size: int = setting(
        64, "completions decoded at a time, at most; 0 for as many as fit in memory", 0
    )


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """Which checkpoint a run keeps, and when it stops early."""

    leak_goal: float = setting(
        0.0, "an iteration (or round) with no more validation leak than this is clean", 0.0, 1.0
    )
    patience: int = setting(1, "clean iterations (or rounds) in a row after which the run stops", 1)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A run, but for the settings of its method."""

    seed: int = setting(0, "seed of every random choice of the run", 0)
    method: str = setting("cipo", "name of the method; docs/methods.md lists them")
    plugins: tuple[str, ...] = setting((), "modules that register methods of your own")
    model: ModelConfig = group(ModelConfig)
    lora: LoraConfig = group(LoraConfig)
    mesh: MeshConfig = group(MeshConfig)
    think: ThinkConfig = group(ThinkConfig)
    data: DataConfig = group(DataConfig)
    forget: ForgetConfig = group(ForgetConfig)
    sampling: SamplingConfig = group(SamplingConfig)
    counterfactual: CounterfactualConfig = group(CounterfactualConfig)
    warmup: TrainConfig = group(TrainConfig)
    train: TrainConfig = group(TrainConfig)
    eval: EvalConfig = group(EvalConfig)
    selection: SelectionConfig = group(SelectionConfig)

    def group(self, cls: type[G]) -> G:
        """The group of settings of a class; its defaults where this config has no such group."""
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), cls):
                return value
        return cls()

    def __post_init__(self) -> None:
        for name in ("warmup", "train"):
            phase = getattr(self, name)
            steps = phase.gradient_accumulation_steps
            for key in ("batch_size", "retain_batch_size", "reasoning_batch_size"):
                if getattr(phase, key) % steps:
                    raise UserError(
                        f"config.{name}.{key} = {getattr(phase, key)} is not a multiple of "
                        f"config.{name}.gradient_accumulation_steps = {steps}"
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
