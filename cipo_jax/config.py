"""Every setting: the root configs, made from an ml_collections ConfigDict and checked.

A config file returns `default_config()` with some values changed. `parse` makes the dataclasses of
it, and stops at the first key or value that is not valid. docs/config.md lists all settings.
"""

import dataclasses
from typing import Any, ClassVar

from ml_collections import ConfigDict

from cipo_jax import legacy
from cipo_jax.config_dict import to_config_dict
from cipo_jax.errors import UserError
from cipo_jax.methods.cipo.config import CipoConfig
from cipo_jax.methods.distillation import DistillationConfig
from cipo_jax.methods.fixed_target import FixedTargetConfig
from cipo_jax.methods.gradient_ascent import GradientAscentConfig
from cipo_jax.methods.npo import NpoConfig
from cipo_jax.methods.pdu import PduConfig
from cipo_jax.methods.preference import PreferenceConfig
from cipo_jax.methods.refusal import RefusalConfig
from cipo_jax.methods.representation import RepresentationConfig
from cipo_jax.settings import (
    Changes,
    Legacy,
    checked,
    flatten,
    group,
    nearest,
    parse,
    required_setting,
    setting,
    with_changes,
)
from cipo_jax.settings_text import parse_arg
from cipo_jax.shared_config import (
    CounterfactualConfig,
    DataConfig,
    EvalConfig,
    ForgetConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
    SelectionConfig,
    ThinkConfig,
    TrainConfig,
)

__all__ = [
    "Changes",
    "CipoConfig",
    "CompareConfig",
    "Config",
    "CounterfactualConfig",
    "DataConfig",
    "DistillationConfig",
    "EvalConfig",
    "FixedTargetConfig",
    "ForgetConfig",
    "GradientAscentConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "NpoConfig",
    "PduConfig",
    "PreferenceConfig",
    "PretrainConfig",
    "RefusalConfig",
    "RepresentationConfig",
    "RowLrs",
    "RowOverrides",
    "RunConfig",
    "SamplingConfig",
    "SelectionConfig",
    "SequenceConfig",
    "ThinkConfig",
    "TrainConfig",
    "Variant",
    "compared_config",
    "default_config",
    "flatten",
    "long_reasoning_config",
    "nearest",
    "parse",
    "parse_arg",
    "tiny_config",
    "to_config_dict",
    "with_changes",
]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of a comparison that differs from the others in some settings."""

    name: str = required_setting("name of the row")
    changes: Changes = required_setting('settings of the row; "method" names its method')


@dataclasses.dataclass(frozen=True)
class RowOverrides:
    """Settings of some rows of a comparison."""

    rows: tuple[str, ...] = required_setting("names of rows")
    changes: Changes = required_setting("their settings")


@dataclasses.dataclass(frozen=True)
class RowLrs:
    """Learning rates of some rows of a comparison."""

    rows: tuple[str, ...] = required_setting("names of rows")
    lrs: tuple[float, ...] = required_setting("their learning rates", above=0.0)


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Methods compared on the same data, each tuned with the same budget."""

    methods: tuple[str, ...] = setting((), "names of methods, a row each; empty for all")
    variants: tuple[Variant, ...] = setting(
        (), 'rows in place of `methods`: ("name", {"cipo.nll_weight": 0.0}); method cipo by default'
    )
    overrides: tuple[RowOverrides, ...] = setting(
        (), 'settings of some rows: (("rmu", "r2mu"), {"fixed_target.retain_weight": 1.4})'
    )
    seeds: int = setting(3, "number of seeds: 0, 1, ...", 1)
    lrs: tuple[float, ...] = setting(
        (), "learning rates to choose from with seed 0; empty for train.lr alone", above=0.0
    )
    row_lrs: tuple[RowLrs, ...] = setting(
        (), 'learning rates of some rows: (("rmu", "r2mu"), (1e-3, 1e-2))'
    )
    keep_models: bool = setting(False, "keep the checkpoints and exports of all runs")
    workers: int = setting(1, "processes side by side, each on its share of the CPU cores", 1)


@dataclasses.dataclass(frozen=True)
class SequenceConfig:
    """Forget requests, one after another."""

    requests: int = setting(10, "number of requests", 1)
    people: int = setting(5, "people of a tiny world in each request", 1)
    replay: bool = setting(
        True,
        "retain the answers without a leak that the model gives to the questions of earlier "
        "requests",
    )
    skills: int = setting(
        300,
        "questions for which the base model's counterfactuals are retained, as far as they are on "
        "people who are still retained; 0 for none",
        0,
    )


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """A run: the shared settings, those of the methods, and those of many runs."""

    cipo: CipoConfig = group(CipoConfig)
    fixed_target: FixedTargetConfig = group(FixedTargetConfig)
    gradient_ascent: GradientAscentConfig = group(GradientAscentConfig)
    npo: NpoConfig = group(NpoConfig)
    preference: PreferenceConfig = group(PreferenceConfig)
    refusal: RefusalConfig = group(RefusalConfig)
    representation: RepresentationConfig = group(RepresentationConfig)
    distillation: DistillationConfig = group(DistillationConfig)
    pdu: PduConfig = group(PduConfig)
    compare: CompareConfig = group(CompareConfig)
    sequence: SequenceConfig = group(SequenceConfig)

    legacy: ClassVar[Legacy] = legacy.LEGACY

    def __post_init__(self) -> None:
        super().__post_init__()
        rows = [("variants", v.name, v.changes) for v in self.compare.variants]
        rows += [("overrides", ", ".join(o.rows), o.changes) for o in self.compare.overrides]
        for key, name, changes in rows:
            for changed, value in changes:
                try:
                    checked(Config, changed, value)
                except UserError as error:
                    raise UserError(f"config.compare.{key}: row {name!r}: {error}") from None


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """How the tiny world, its tokenizer and its two models are made."""

    seed: int = setting(0, "seed of the world and of training", 0)
    people: int = setting(64, "people of the world", 60, 1024)
    strangers: int = setting(256, "names that belong to nobody", 1)
    forget: ForgetConfig = group(ForgetConfig)
    vocab_size: int = setting(1024, "tokens of the tokenizer", 300)
    d_model: int = setting(128, "width of hidden states", 8)
    d_ff: int = setting(384, "width of feed-forward blocks", 8)
    layers: int = setting(4, "number of layers", 1)
    heads: int = setting(4, "query heads", 1)
    kv_heads: int = setting(2, "key and value heads; must divide `heads`", 1)
    steps: int = setting(3000, "optimizer steps", 1)
    language_rows: int = setting(28, "texts about people in a step", 1)
    sum_rows: int = setting(10, "sums in a step", 1)
    train: TrainConfig = group(TrainConfig)
    mesh: MeshConfig = group(MeshConfig)

    legacy: ClassVar[Legacy] = {
        key: convert
        for key, convert in {**legacy.PHASES, **legacy.PEOPLE}.items()
        if key.startswith(("train.", "forget."))
    }

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UserError(f"config.kv_heads = {self.kv_heads}: must divide heads = {self.heads}")
        if self.d_model % (2 * self.heads):
            raise UserError(
                f"config.d_model = {self.d_model}: must be a multiple of 2 x heads = "
                f"{2 * self.heads}, since rotary embeddings turn pairs of dimensions"
            )


# ---- where config files start


def default_config() -> ConfigDict:
    """The defaults of `Config`, for config files to change."""
    return to_config_dict(Config())


def long_reasoning_config() -> ConfigDict:
    """Settings for models with long chains of thought: bfloat16, lengths, batch sizes."""
    config: Any = default_config()
    config.data.world = config.model.retrained = ""
    config.model.dtype = config.model.decode_dtype = config.model.export_dtype = "bfloat16"
    config.data.max_prompt_tokens = 512
    config.data.max_completion_tokens = 2048
    config.sampling.max_new_tokens = 1024
    config.sampling.temperature = 1.0
    config.sampling.max_batch_size = 64
    config.eval.max_new_tokens = 2048
    config.eval.max_batch_size = 64
    # What DeepSeek recommends for its R1 models.
    config.counterfactual.temperature = 0.6
    config.counterfactual.top_p = 0.95
    for phase in (config.warmup, config.train):
        phase.batch_size = phase.retain_batch_size = phase.reasoning_batch_size = 32
        phase.gradient_accumulation_steps = 4
        phase.weight_decay = 0.01
    config.warmup.epochs = 3.0
    config.cipo.iterations = 5
    return config


def tiny_config() -> ConfigDict:
    """Settings for the embedded tiny model: lengths, and the prompts that it was trained on."""
    from cipo_jax.data import tiny_world

    config: Any = default_config()
    config.model.logits_chunk = 4096

    config.sampling.max_batch_size = 128
    config.sampling.max_new_tokens = 48
    config.eval.max_batch_size = 128
    config.eval.max_new_tokens = 96

    config.counterfactual.backward_prompt = tiny_world.BACKWARD_PROMPT
    config.counterfactual.alternative_prompt = tiny_world.ALTERNATIVE_PROMPT
    config.counterfactual.boundary_prompt = tiny_world.BOUNDARY_PROMPT
    config.counterfactual.boundary_answer = tiny_world.BOUNDARY_ANSWER
    # It was trained on one way to decline: not to know.
    config.counterfactual.refusal_prompt = tiny_world.BOUNDARY_PROMPT
    config.counterfactual.refusal_answer = tiny_world.BOUNDARY_ANSWER
    config.counterfactual.target_prompt = tiny_world.TARGET_PROMPT
    config.counterfactual.num_candidates = 4
    return config


def compared_config() -> ConfigDict:
    """Settings that the comparison, the ablation and the sequence share."""
    config: Any = tiny_config()
    config.model.remat = "none"
    config.data.valid_rows = 48

    for phase in (config.warmup, config.train):
        phase.lr = 8e-4
        phase.batch_size, phase.retain_batch_size, phase.reasoning_batch_size = 16, 32, 8
    config.cipo.num_samples = 1
    config.cipo.nll_weight = 1.0
    config.cipo.retain_weight = 5.0
    return config
