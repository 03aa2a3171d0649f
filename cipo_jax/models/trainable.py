"""Which parameters are trained: all of them, adapters (`Lora`), or named projections.

A trainable splits the parameters into two trees: the trained one, and the frozen one beside it.
Where all parameters are trained, the frozen tree is empty.
"""

import dataclasses
from collections.abc import Iterable

import jax

from cipo_jax.errors import UserError
from cipo_jax.models import lora as adapters
from cipo_jax.models.decoder import DecoderConfig, abstract_params
from cipo_jax.models.lora import OURS, Lora, check_target_modules
from cipo_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class ParamSubset:
    """Kernels of chosen projections in chosen layers; all other parameters stay frozen.

    Attributes:
      layers: indices of the layers, ascending.
      target_modules: projections by their names in transformers ("down_proj").
    """

    layers: tuple[int, ...]
    target_modules: tuple[str, ...]

    @classmethod
    def from_config(
        cls,
        layers: Iterable[int],
        target_modules: Iterable[str],
        decoder_config: DecoderConfig,
        where: str,
    ) -> "ParamSubset":
        """The subset that a config group asks for.

        Args:
          layers: indices of layers, from 0, in any order.
          target_modules: projections by their names in transformers, in any order.
          decoder_config: architecture of the model.
          where: name of the config group ("config.representation"), for error messages.

        Raises:
          UserError: for a layer that the model does not have, a name that is not a projection, or
            an empty selection.
        """
        layers = tuple(layers)
        if not layers or min(layers) < 0 or max(layers) >= decoder_config.layers:
            raise UserError(
                f"{where}.layers = {layers!r}: the model has layers 0 to "
                f"{decoder_config.layers - 1}"
            )
        return cls(tuple(sorted(set(layers))), check_target_modules(target_modules, where))

    def take(self, params: Params) -> Params:
        """The trained tree {"layers": {"block": {name: {"kernel"}}}} out of the training layout."""
        block, at = params["layers"]["block"], list(self.layers)
        names = [OURS[module] for module in self.target_modules]
        chosen = {name: {"kernel": block[name]["kernel"][at, ...]} for name in names}
        return {"layers": {"block": chosen}}

    def put(self, params: Params, trained: Params) -> Params:
        """The training layout with the trained kernels in their places."""
        block, at = params["layers"]["block"], list(self.layers)
        changed = {}
        for name, new in trained["layers"]["block"].items():
            old = block[name]["kernel"]
            wide = old.astype(new["kernel"].dtype)
            changed[name] = block[name] | {"kernel": wide.at[at, ...].set(new["kernel"])}
        return params | {"layers": params["layers"] | {"block": block | changed}}


Trainable = Lora | ParamSubset | None


def abstract_trainable(config: DecoderConfig, trainable: Trainable) -> Params:
    """Shapes and dtypes of the trained tree, without allocating it."""
    if isinstance(trainable, Lora):
        return adapters.abstract_adapters(config, trainable)
    params = abstract_params(config)
    return params if trainable is None else jax.eval_shape(trainable.take, params)


def assemble(trainable: Trainable, frozen: Params, trained: Params) -> Params:
    """The tree that the decoder takes, from the trained and the frozen parameters.

    Args:
      trainable: which parameters are trained.
      frozen: base parameters in the training layout; not read where all parameters are trained.
      trained: in the shapes of `abstract_trainable`.
    """
    if trainable is None:
        return trained
    if isinstance(trainable, ParamSubset):
        return trainable.put(frozen, trained)
    return adapters.assemble(trainable, frozen, trained)
