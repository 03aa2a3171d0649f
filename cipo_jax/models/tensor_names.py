"""The key table: each parameter and the Hugging Face tensor that stores it.

Also the shapes and shardings of stored tensors, which loading and saving share.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from cipo_jax.models.decoder import DecoderConfig
from cipo_jax.typing import Array, Params


class Key(NamedTuple):
    """How Hugging Face stores a parameter.

    Attributes:
      path: of the parameter in our tree.
      name: of the tensor; "{i}" is the layer index of a stacked parameter.
      inputs: number of our axes that are summed over. They are stored last, as one axis, and the
        other axes first, as one. 0 for tensors that are stored unchanged or flat (biases, scales).
    """

    path: tuple[str, ...]
    name: str
    inputs: int = 0

    @property
    def stacked(self) -> bool:
        return "{i}" in self.name


PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def keys(config: DecoderConfig) -> Iterator[Key]:
    """The table: every parameter of a model and the tensor that stores it."""
    yield Key(("embed",), "model.embed_tokens.weight")
    yield Key(("final_norm", "scale"), "model.norm.weight")
    if not config.tied_head:
        yield Key(("head",), "lm_head.weight", 1)
    layer, at = ("layers", "block"), "model.layers.{i}."
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.post_norm:
        norms = {
            "attn_norm": "post_attention_layernorm",
            "mlp_norm": "post_feedforward_layernorm",
        }
    if config.qk_norm != "none":
        norms |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    for ours, theirs in norms.items():
        yield Key((*layer, ours, "scale"), f"{at}{theirs}.weight")
    for ours, theirs in PROJECTIONS.items():
        yield Key((*layer, ours, "kernel"), f"{at}{theirs}.weight", 2 if ours == "o" else 1)
        if has_bias(config, ours):
            yield Key((*layer, ours, "bias"), f"{at}{theirs}.bias")


def has_bias(config: DecoderConfig, projection: str) -> bool:
    """Whether a projection has a bias, by our name of it ("q")."""
    if projection in ("q", "k", "v"):
        return config.qkv_bias
    return config.o_bias if projection == "o" else config.mlp_bias


def get(tree: Params, path: tuple[str, ...]) -> Params:
    """The value at a path of a nested dict."""
    for part in path:
        tree = tree[part]
    return tree


def put(tree: Params, path: tuple[str, ...], value: Array) -> None:
    """Sets the value at a path of a nested dict."""
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def to_stored(inputs: int, x: Array) -> Array:
    """Our array (without its layer axis) -> the stored array of one or two dimensions."""
    return x.reshape(math.prod(x.shape[:inputs]), -1).T if inputs else x


def stored_shape(key: Key, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the stored tensor; `shape` is ours, without the layer axis."""
    if key.path[-1] == "bias":
        return (math.prod(shape),)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(functools.partial(to_stored, key.inputs), x).shape


def stored_sharding(key: Key, sharding: Sharding) -> Sharding:
    """The sharding of a stored tensor that gives each device its own part of `sharding`."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = tuple(sharding.spec)[1:] if key.stacked else tuple(sharding.spec)
    if key.path[-1] == "bias":
        return NamedSharding(sharding.mesh, PartitionSpec(*spec[:1]))
    if key.inputs:
        # Of the axes that are stored as one, only the first is ever sharded.
        spec = (spec[key.inputs] if key.inputs < len(spec) else None, spec[0] if spec else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))
