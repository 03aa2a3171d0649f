"""LoRA (Hu et al. 2021, arXiv 2106.09685): adapters as a tree of their own beside a frozen base.

Adapters mirror the training layout: {"layers": {"block": {"q": {"a", "b"}, ...}}}, a [L, inputs, r]
and b [L, r, outputs]. What is trained is a and b as they stand in files of the PEFT library;
`assemble` folds alpha / r into b and gives the tree that the decoder takes.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cipo_jax.errors import UserError
from cipo_jax.hub import resolve
from cipo_jax.models.decoder import DecoderConfig, abstract_params, base_of, merged
from cipo_jax.models.hf_config import read_object
from cipo_jax.models.safetensors_io import (
    PROJECTIONS,
    Key,
    atomic_directory,
    load_tree,
    save_tensors,
    stored_tensors,
)
from cipo_jax.typing import Array, Params

OURS = {theirs.rsplit(".", 1)[-1]: ours for ours, theirs in PROJECTIONS.items()}
TARGETS = tuple(OURS)
_LAYER = ("layers", "block")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which projections have adapters, and of what size.

    Attributes:
      rank: r.
      alpha: the product of a and b is weighted by alpha / r.
      targets: names of projections as transformers has them ("q_proj").
      dropout: of the adapters' inputs, in training.
      rank_stabilized: weighs by alpha / sqrt(r) instead (rsLoRA, arXiv 2312.03732).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS
    dropout: float = 0.0
    rank_stabilized: bool = False

    @property
    def weight(self) -> float:
        """The factor on a @ b."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def lora_of(settings: Any) -> Lora | None:
    """The adapters that a config.LoraConfig asks for; None for full fine-tuning.

    Raises:
      UserError: for a target that is no projection, or a rank that is not that of the adapters to
        start from.
    """
    if settings.path:
        found = read_lora(resolve(settings.path))
        if settings.rank not in (0, found.rank):
            raise UserError(
                f"config.lora.rank = {settings.rank}: the adapters in {settings.path} have rank "
                f"{found.rank}; set that, or 0 to take it from there"
            )
        return dataclasses.replace(found, dropout=settings.dropout)
    if not settings.rank:
        return None
    given = [name.strip() for name in settings.targets.split(",") if name.strip()]
    given = TARGETS if given == ["all-linear"] else given
    for name in given:
        if name not in TARGETS:
            raise UserError(
                f"config.lora.targets: {name!r} is no projection; there are {', '.join(TARGETS)}, "
                "and all-linear for all of them"
            )
    targets = tuple(name for name in TARGETS if name in given)
    if not targets:
        raise UserError(f"config.lora.targets is empty; there are {', '.join(TARGETS)}")
    return Lora(settings.rank, settings.alpha, targets, settings.dropout, settings.rank_stabilized)


def abstract_adapters(config: DecoderConfig, lora: Lora) -> Params:
    """The shapes of the adapters, float32, without making anything."""
    block = abstract_params(config)["layers"]["block"]
    tree = {}
    for target in lora.targets:
        ours = OURS[target]
        layers, *axes = block[ours]["kernel"].shape
        inputs = _inputs(ours)
        shapes = {
            "a": (layers, *axes[:inputs], lora.rank),
            "b": (layers, lora.rank, *axes[inputs:]),
        }
        tree[ours] = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    return {"layers": {"block": tree}}


def _inputs(projection: str) -> int:
    """How many axes of a projection's kernel are summed over."""
    return 2 if projection == "o" else 1


def init_adapters(config: DecoderConfig, lora: Lora, key: Array) -> Params:
    """Adapters that change nothing yet: a uniform in +-1 / sqrt(inputs) as in PEFT, b zero."""
    block = abstract_adapters(config, lora)["layers"]["block"]
    tree = {}
    for ours, shapes in block.items():
        bound = math.prod(shapes["a"].shape[1:-1]) ** -0.5
        own = jax.random.fold_in(key, zlib.crc32(ours.encode()))
        tree[ours] = {
            "a": jax.random.uniform(own, shapes["a"].shape, jnp.float32, -bound, bound),
            "b": jnp.zeros(shapes["b"].shape, jnp.float32),
        }
    return {"layers": {"block": tree}}


def assemble(lora: Lora, frozen: Params, trained: Params) -> Params:
    """What the decoder takes, from the adapters that are trained and the base that is not.

    Args:
      lora: the adapters.
      frozen: the base, in the training layout.
      trained: the adapters.
    """
    weighted = jax.tree_util.tree_map_with_path(
        lambda path, x: x * lora.weight if path[-1].key == "b" else x, trained
    )
    return {"base": base_of(frozen), "lora": weighted}


def merge(lora: Lora, base: Params, adapters: Params) -> Params:
    """The training layout of the base with the adapters worked into it."""
    return merged(assemble(lora, base, adapters))


def _keys(config: DecoderConfig, lora: Lora) -> Iterator[Key]:
    """The names that PEFT gives the tensors."""
    for target in lora.targets:
        ours = OURS[target]
        name = f"base_model.model.model.layers.{{i}}.{PROJECTIONS[ours]}.lora_"
        yield Key((*_LAYER, ours, "a"), name + "A.weight", _inputs(ours))
        yield Key((*_LAYER, ours, "b"), name + "B.weight", 1)


def save_adapters(
    folder: str | Path, config: DecoderConfig, lora: Lora, adapters: Params, base: str
) -> None:
    """Writes adapters in the PEFT format, whole or not at all.

    Args:
      folder: where to; older adapters there are replaced.
      config: of the base.
      lora: of the adapters.
      adapters: as they are trained.
      base: path or hub name of the base model, for `base_model_name_or_path`.
    """
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilized,
        "target_modules": list(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    with atomic_directory(folder) as temporary:
        tensors = dict(stored_tensors(_keys(config, lora), adapters, "float32"))
        if temporary is not None:
            text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
            (temporary / "adapter_config.json").write_text(text, encoding="utf-8")
            save_tensors(temporary / "adapter_model.safetensors", tensors)


# Fields of an adapter_config.json that change nothing by themselves.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "peft_version", "megatron_core", "qalora_group_size", "peft_type",
}  # fmt: skip
_READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"}


def read_lora(folder: str | Path) -> Lora:
    """Reads the adapter_config.json of a PEFT folder.

    Raises:
      UserError: naming the field, where there is none, or one asks for what is not LoRA as it is
        done here.
    """
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; config.lora.path must be a folder made by PEFT")
    fields = read_object(path)
    if fields.get("peft_type") != "LORA":
        raise UserError(f"{path}: field 'peft_type' = {fields.get('peft_type')!r}: must be 'LORA'")
    for name, value in fields.items():
        plain = {"bias": ("none",), "init_lora_weights": (True, "gaussian")}.get(name, ())
        if name not in _HARMLESS | _READ and value and value not in plain:
            raise UserError(f"{path}: field {name!r} = {value!r} is not supported")
    targets = fields.get("target_modules")
    if not isinstance(targets, list) or not set(targets) <= set(TARGETS):
        raise UserError(
            f"{path}: field 'target_modules' = {targets!r}: must be a list of {', '.join(TARGETS)}"
        )
    try:
        return Lora(
            int(fields["r"]),
            float(fields["lora_alpha"]),
            tuple(name for name in TARGETS if name in targets),
            float(fields.get("lora_dropout") or 0.0),
            bool(fields.get("use_rslora", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: field {error} is missing or no number") from None


def load_adapters(
    folder: str | Path, config: DecoderConfig, lora: Lora, shardings: Params = None
) -> Params:
    """Reads adapters that PEFT (or `save_adapters`) wrote, as they are trained, float32.

    Raises:
      UserError: naming file and tensor, where a tensor is unknown, missing or misshapen.
    """
    abstract = abstract_adapters(config, lora)
    return load_tree(folder, _keys(config, lora), abstract, shardings, "float32")
