"""The decoder: a Llama-family transformer in Flax Linen, applied with plain nested dicts.

Two layouts of the same weights serve two jobs. Training scans over layers stacked on a leading L
axis (small programs, named rematerialisation). Decoding walks a list of per-layer dicts, because a
scan would copy every layer's slice at each token. `Block` is the one definition that both apply.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cipo_jax.ops import attention as attention_ops
from cipo_jax.ops.rope import rope
from cipo_jax.typing import Array, Float, Int, Params

Remat = Literal["none", "full", "names"]
# Given queries, keys and values of this call, returns the attended values and whatever the caller
# wants to keep of the layer (its keys and values, an updated cache, or nothing).
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that decides the decoder's numbers; read from a Hugging Face config.json."""

    vocab_size: int
    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tied_head: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the decoder is computed, which changes speed and memory but not what it means."""

    dtype: str = "float32"
    remat: Remat = "none"
    attention: attention_ops.Implementation = "xla"
    logits_chunk: int = 1024


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, in float32 (Zhang & Sennrich 2019)."""

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * scale).astype(self.dtype)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU, each added to the residual stream."""

    config: DecoderConfig
    compute: Compute

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], attend: Attend
    ) -> tuple[Array, Any]:
        c, dtype = self.config, jnp.dtype(self.compute.dtype)

        def project(name: str, heads: int) -> nn.DenseGeneral:
            return nn.DenseGeneral((heads, c.head_dim), use_bias=c.qkv_bias, dtype=dtype, name=name)

        h = RMSNorm(c.norm_eps, dtype, name="attn_norm")(x)
        q = project("q", c.heads)(h)
        k = project("k", c.kv_heads)(h)
        v = project("v", c.kv_heads)(h)
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, dtype, name="q_norm")(q)
            k = RMSNorm(c.norm_eps, dtype, name="k_norm")(k)
        q = checkpoint_name(rope(q, positions, c.rope_theta), "q")
        k = checkpoint_name(rope(k, positions, c.rope_theta), "k")
        v = checkpoint_name(v, "v")
        with jax.named_scope("attention"):
            attended, kept = attend(q, k, v)
        attended = checkpoint_name(attended, "attended")
        x = x + nn.DenseGeneral(c.d_model, axis=(-2, -1), use_bias=False, dtype=dtype, name="o")(
            attended
        )

        h = RMSNorm(c.norm_eps, dtype, name="mlp_norm")(x)
        gate = nn.Dense(c.d_ff, use_bias=False, dtype=dtype, name="gate")(h)
        up = nn.Dense(c.d_ff, use_bias=False, dtype=dtype, name="up")(h)
        x = x + nn.Dense(c.d_model, use_bias=False, dtype=dtype, name="down")(nn.silu(gate) * up)
        return checkpoint_name(x, "block"), kept


_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("q", "k", "v", "attended"),
}


class _TrainingBlock(nn.Module):
    """`Block` with causal attention, in the (carry, x) -> (carry, y) form that nn.scan wants."""

    config: DecoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, positions: Array) -> tuple[Array, None]:
        def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
            out = attention_ops.causal_attention(q, k, v, self.compute.attention)
            return out, None

        block = Block(self.config, self.compute, name="block")
        return block(x, positions, attend)


class Decoder(nn.Module):
    """The whole model up to its final norm; the head is applied where logits are needed."""

    config: DecoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        embedding = self.param(
            "embed", nn.initializers.normal(0.02), (c.vocab_size, c.d_model), jnp.float32
        )
        if not c.tied_head:
            self.param("head", nn.initializers.normal(0.02), (c.d_model, c.vocab_size), jnp.float32)
        x = jnp.take(embedding, tokens, axis=0).astype(dtype)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        block: Any = _TrainingBlock
        if self.compute.remat != "none":
            block = nn.remat(block, policy=_REMAT_POLICIES[self.compute.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  (typed too narrowly)
            length=c.layers,
        )
        x, _ = layers(c, self.compute, name="layers")(x, positions)
        return RMSNorm(c.norm_eps, dtype, name="final_norm")(x)


def init_params(config: DecoderConfig, key: Array) -> Params:
    """Random parameters in float32, layers stacked: the tree that every other function takes."""
    variables = Decoder(config, Compute()).init(key, jnp.zeros((1, 2), jnp.int32))
    return variables["params"]


def abstract_params(config: DecoderConfig) -> Params:
    """The shapes and dtypes of `init_params`, without making anything."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def hidden_states(
    config: DecoderConfig, compute: Compute, params: Params, tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Final hidden states (after the last norm) of right-padded sequences."""
    return Decoder(config, compute).apply({"params": params}, tokens)  # type: ignore[return-value]


def head_matrix(config: DecoderConfig, params: Params) -> Float[Array, "D V"]:
    """The output matrix: the head's own, or the transposed embedding where they are tied."""
    return params["embed"].T if config.tied_head else params["head"]


def decoding_layout(config: DecoderConfig, params: Params, dtype: str) -> Params:
    """Training layout -> decoding layout: a list of per-layer dicts, cast to the decoding dtype."""
    cast = jax.tree.map(lambda x: x.astype(dtype), params)
    stacked = cast["layers"]["block"]
    layers = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(config.layers)]
    return {
        "embed": cast["embed"],
        "head": head_matrix(config, cast),
        "final_norm": cast["final_norm"],
        "layers": layers,
    }


def decode_layers(
    config: DecoderConfig,
    compute: Compute,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    attend: Callable[[int, Array, Array, Array], tuple[Array, Any]],
) -> tuple[Float[Array, "B T D"], list[Any]]:
    """Applies the layers of a decoding layout one by one.

    Args:
      config: the model's shape.
      compute: dtype and kernels.
      params: from `decoding_layout`.
      tokens: token ids.
      positions: their absolute positions.
      attend: (layer, q, k, v) -> (attended values, what to keep of the layer).

    Returns:
      Final hidden states, and what `attend` kept of each layer.
    """
    x = jnp.take(params["embed"], tokens, axis=0).astype(compute.dtype)
    kept = []
    for i, layer in enumerate(params["layers"]):

        def attend_here(q: Array, k: Array, v: Array, i: int = i) -> tuple[Array, Any]:
            return attend(i, q, k, v)

        x, keep = Block(config, compute).apply({"params": layer}, x, positions, attend_here)  # type: ignore[misc]
        kept.append(keep)
    norm = RMSNorm(config.norm_eps, jnp.dtype(compute.dtype))
    return norm.apply({"params": params["final_norm"]}, x), kept  # type: ignore[return-value]
