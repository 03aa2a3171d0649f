"""LoRA (Hu et al. 2021, arXiv 2106.09685): adapters in a tree of their own, beside a frozen base.

Adapters mirror the training layout: {"layers": {"block": {"q": {"a", "b"}, ...}}}, a [L, inputs, r]
and b [L, r, outputs]. Trained are a and b as the PEFT library stores them; `assemble` folds the
scale alpha / r into b and makes the tree that the decoder takes.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from cipo_jax.errors import UserError
from cipo_jax.files import atomic_directory
from cipo_jax.hub import resolve
from cipo_jax.models.decoder import DecoderConfig, abstract_params, base_params, merged
from cipo_jax.models.hf_fields import read_object
from cipo_jax.models.safetensors_load import load_tree
from cipo_jax.models.safetensors_save import save_tensors, stored_tensors
from cipo_jax.models.tensor_names import PROJECTIONS, Key
from cipo_jax.typing import Array, Params

if TYPE_CHECKING:
    from cipo_jax.shared_config import LoraConfig

OURS = {theirs.rsplit(".", 1)[-1]: ours for ours, theirs in PROJECTIONS.items()}
TARGETS = tuple(OURS)
_LAYER = ("layers", "block")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which projections have adapters, and of which size.

    Attributes:
      rank: r.
      alpha: numerator of the scale alpha / r on the product a b.
      target_modules: projections by their names in transformers ("q_proj"), in the order of
        `TARGETS`.
      dropout: rate of the dropout of the adapters' inputs, in training.
      rank_stabilized: scale alpha / sqrt(r) instead (rsLoRA, arXiv 2312.03732).
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...] = TARGETS
    dropout: float = 0.0
    rank_stabilized: bool = False

    @property
    def scale(self) -> float:
        """The factor on a b."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @classmethod
    def from_config(cls, settings: "LoraConfig") -> "Lora | None":
        """The adapters that `config.lora` asks for; None where it asks for none.

        Raises:
          UserError: for a name that is not a projection, or a rank other than that of the adapters
            in `settings.path`.
        """
        if settings.path:
            found = read_lora(resolve(settings.path))
            if settings.rank not in (0, found.rank):
                raise UserError(
                    f"config.lora.rank = {settings.rank}: the adapters in {settings.path} have "
                    f"rank {found.rank}; set {found.rank}, or 0 to read it from there"
                )
            return dataclasses.replace(found, dropout=settings.dropout)
        if not settings.rank:
            return None
        names = settings.target_modules
        names = TARGETS if names == ("all-linear",) else names
        modules = check_target_modules(names, "config.lora", " or all-linear for all of them")
        return cls(
            settings.rank, settings.alpha, modules, settings.dropout, settings.rank_stabilized
        )


def check_target_modules(names: Iterable[str], where: str, more: str = "") -> tuple[str, ...]:
    """The projections of a config's `target_modules`, each once, in the order of `TARGETS`.

    Args:
      names: projections by their names in transformers.
      where: config group that holds them, for error messages.
      more: what else may be given, for error messages.

    Raises:
      UserError: where there are none, or one is not a projection.
    """
    names = tuple(names)
    allowed = ", ".join(TARGETS) + ("," + more if more else "")
    for name in names:
        if name not in TARGETS:
            raise UserError(
                f"{where}.target_modules: {name!r} is not a projection; choose from {allowed}"
            )
    if not names:
        raise UserError(f"{where}.target_modules is empty; choose from {allowed}")
    return tuple(name for name in TARGETS if name in names)


def abstract_adapters(config: DecoderConfig, lora: Lora) -> Params:
    """Shapes of the adapters, float32, without allocating them."""
    block = abstract_params(config)["layers"]["block"]
    tree = {}
    for target in lora.target_modules:
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
    """Number of axes of a projection's kernel that are summed over."""
    return 2 if projection == "o" else 1


def init_adapters(config: DecoderConfig, lora: Lora, key: Array) -> Params:
    """Adapters with a b = 0: a uniform in +-1 / sqrt(inputs) as in PEFT, b zero."""
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
    """The tree that the decoder takes: {"base": ..., "lora": ...}, with the scale folded into b.

    Args:
      lora: rank, scale and projections of the adapters.
      frozen: base parameters, in the training layout.
      trained: the adapters.
    """
    scaled = jax.tree_util.tree_map_with_path(
        lambda path, x: x * lora.scale if path[-1].key == "b" else x, trained
    )
    return {"base": base_params(frozen), "lora": scaled}


def merge(lora: Lora, base: Params, adapters: Params) -> Params:
    """Base parameters with the adapters merged into them, in the training layout."""
    return merged(assemble(lora, base, adapters))


def _keys(config: DecoderConfig, lora: Lora) -> Iterator[Key]:
    """The key table of adapters: their tensors under the names of PEFT."""
    for target in lora.target_modules:
        ours = OURS[target]
        name = f"base_model.model.model.layers.{{i}}.{PROJECTIONS[ours]}.lora_"
        yield Key((*_LAYER, ours, "a"), name + "A.weight", _inputs(ours))
        yield Key((*_LAYER, ours, "b"), name + "B.weight", 1)


def save_adapters(
    folder: str | Path, config: DecoderConfig, lora: Lora, adapters: Params, base: str
) -> None:
    """Writes adapters in the PEFT format, atomically.

    Args:
      folder: path to write to; an existing folder is replaced.
      config: architecture of the base model.
      lora: rank, scale and projections of the adapters.
      adapters: the trained tree.
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
        "target_modules": list(lora.target_modules),
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


# Fields of an adapter_config.json that do not change results.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "peft_version", "megatron_core", "qalora_group_size", "peft_type",
}  # fmt: skip
_READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"}


def read_lora(folder: str | Path) -> Lora:
    """Reads the adapter_config.json of a PEFT folder.

    Raises:
      UserError: where there is no such file, or naming a field that asks for another method or
        variant than LoRA as implemented here.
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
        raise UserError(f"{path}: field {error} is missing or not a number") from None


def load_adapters(
    folder: str | Path, config: DecoderConfig, lora: Lora, shardings: Params = None
) -> Params:
    """Reads adapters that PEFT or `save_adapters` wrote into the trained tree, float32.

    Raises:
      UserError: naming file and tensor, where a tensor is unknown, missing or of another shape.
    """
    abstract = abstract_adapters(config, lora)
    return load_tree(folder, _keys(config, lora), abstract, shardings, "float32")
