"""Which part of a model is trained: everything, adapters (`Lora`), or named projections.

A part has two trees: what is trained, and what stands beside it and stays as it was. Where all
parameters are trained there is nothing beside them.
"""

import dataclasses
import re

import jax

from cipo_jax.errors import UserError
from cipo_jax.models import lora as adapters
from cipo_jax.models.decoder import DecoderConfig, abstract_params
from cipo_jax.models.lora import OURS, TARGETS, Lora
from cipo_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class ParamSubset:
    """Projections of some layers, by name; everything else stays as it was.

    Attributes:
      layers: their indices, ascending.
      targets: names of projections as transformers has them ("down_proj").
    """

    layers: tuple[int, ...]
    targets: tuple[str, ...]

    def take(self, params: Params) -> Params:
        """What is trained of the training layout: {"layers": {"block": {name: {"kernel"}}}}."""
        block, at = params["layers"]["block"], list(self.layers)
        chosen = {OURS[t]: {"kernel": block[OURS[t]]["kernel"][at, ...]} for t in self.targets}
        return {"layers": {"block": chosen}}

    def put(self, params: Params, trained: Params) -> Params:
        """The training layout with what is trained in its place."""
        block, at = params["layers"]["block"], list(self.layers)
        changed = {}
        for name, new in trained["layers"]["block"].items():
            old = block[name]["kernel"]
            wide = old.astype(new["kernel"].dtype)
            changed[name] = block[name] | {"kernel": wide.at[at, ...].set(new["kernel"])}
        return params | {"layers": params["layers"] | {"block": block | changed}}


Trainable = Lora | ParamSubset | None


def param_subset(layers: str, targets: str, config: DecoderConfig, where: str) -> ParamSubset:
    """A selection as a config writes it.

    Args:
      layers: indices and ranges, comma-separated, "5-7" or "0,3"; both ends count.
      targets: names of projections, comma-separated.
      config: of the model.
      where: the config's group, for messages.

    Raises:
      UserError: for a layer or a projection that there is not.
    """
    found: set[int] = set()
    for piece in (p.strip() for p in layers.split(",") if p.strip()):
        if not re.fullmatch(r"\d+(-\d+)?", piece):
            raise UserError(f"{where}.layers = {layers!r}: write 5-7, or 0,3")
        first, _, end = piece.partition("-")
        found |= set(range(int(first), int(end or first) + 1))
    if not found or max(found) >= config.layers:
        raise UserError(
            f"{where}.layers = {layers!r}: the model has layers 0 to {config.layers - 1}"
        )
    names = tuple(t.strip() for t in targets.split(",") if t.strip())
    for name in names:
        if name not in TARGETS:
            raise UserError(
                f"{where}.targets: {name!r} is no projection; there are {', '.join(TARGETS)}"
            )
    if not names:
        raise UserError(f"{where}.targets is empty; there are {', '.join(TARGETS)}")
    return ParamSubset(tuple(sorted(found)), tuple(t for t in TARGETS if t in names))


def abstract_trainable(config: DecoderConfig, part: Trainable) -> Params:
    """Shapes and dtypes of what is trained, without making anything."""
    if isinstance(part, Lora):
        return adapters.abstract_adapters(config, part)
    params = abstract_params(config)
    return params if part is None else jax.eval_shape(part.take, params)


def assemble(trainable: Trainable, frozen: Params, trained: Params) -> Params:
    """What the decoder takes, from what is trained and what stands beside it.

    Args:
      trainable: what is trained.
      frozen: the model beside it, in the training layout; not looked at where all is trained.
      trained: in the shapes of `abstract_trainable`.
    """
    if trainable is None:
        return trained
    if isinstance(trainable, ParamSubset):
        return trainable.put(frozen, trained)
    return adapters.assemble(trainable, frozen, trained)
