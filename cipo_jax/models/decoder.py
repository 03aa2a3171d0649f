"""The decoder: a Llama-family transformer in Flax Linen, applied to plain nested dicts.

The same weights have two layouts. Training scans over layers stacked on a leading L axis (small
programs, named rematerialization). Decoding iterates over a list of per-layer dicts, because a scan
would copy the slice of each layer at each token. Both apply the same `Block`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cipo_jax.ops import attention as attention_ops
from cipo_jax.ops.matmul import contract
from cipo_jax.ops.rope import Rope, Rotation, rotate, rotation
from cipo_jax.typing import Array, Float, Int, Params

Remat = Literal["none", "full", "names"]
# (queries, keys, values), before their rotation -> (attended values, what the caller keeps of the
# layer, such as its keys and values).
Kept = TypeVar("Kept")
Attend = Callable[[Array, Array, Array], tuple[Array, Kept]]


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """The properties that may differ between the layers of a model.

    Attributes:
      rope: position embedding; None for a layer without one (NoPE).
      window: largest number of tokens that a query attends to, itself included; None for no limit.
    """

    rope: Rope | None = Rope()
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of the decoder; read from a Hugging Face config.json.

    Attributes:
      qkv_bias: whether the q, k and v projections have biases.
      o_bias: whether the output projection of the attention has one.
      mlp_bias: whether the three projections of the MLP have biases.
      qk_norm: norm of queries and keys: none, over each head (Qwen3), or over all heads of a token
        (OLMo 2).
      post_norm: norms come after attention and MLP, inside the residual branch (OLMo 2), instead of
        before them.
      layer_kinds: one kind for all layers, or one per layer.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    tied_head: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "all"] = "none"
    post_norm: bool = False
    layer_kinds: tuple[LayerKind, ...] = (LayerKind(),)

    def __post_init__(self) -> None:
        if len(self.layer_kinds) not in (1, self.layers):
            raise ValueError(
                f"layer_kinds has {len(self.layer_kinds)} entries for {self.layers} layers"
            )

    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds that occur, each once."""
        return tuple(dict.fromkeys(self.layer_kinds))

    def kind_ids(self) -> list[int]:
        """Per layer, the index of its kind in `kinds()`."""
        kinds = self.kinds()
        ids = [kinds.index(kind) for kind in self.layer_kinds]
        return ids if len(ids) == self.layers else ids * self.layers


@dataclasses.dataclass(frozen=True)
class Compute:
    """Numerics and kernels of the decoder: they change speed, memory and rounding alone.

    Attributes:
      dtype: of activations and matrix products; norms, rotations and softmax are float32.
      remat: what the backward pass computes again: nothing, everything, or all but named values.
      attention: implementation of the attention.
      logits_chunk: number of tokens whose logits exist at a time.
      lora_dropout: rate of the dropout of the adapters' inputs, where a dropout key is given.
    """

    dtype: str = "float32"
    remat: Remat = "none"
    attention: attention_ops.Implementation = "xla"
    logits_chunk: int = 1024
    lora_dropout: float = 0.0


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, in float32 (Zhang & Sennrich 2019)."""

    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * scale).astype(self.dtype)


class Projection(nn.Module):
    """x @ kernel (+ bias), plus x @ a @ b with an adapter (LoRA, arXiv 2106.09685).

    Attributes:
      inputs: sizes of the trailing axes of x that are summed over.
      outputs: sizes of the axes that replace them.
      compute: dtype, and dropout rate of the adapter's input.
      bias: whether the projection has one.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    compute: Compute
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = jnp.dtype(self.compute.dtype)
        axes = len(self.inputs)
        kernel = self.param("kernel", self._init, (*self.inputs, *self.outputs), jnp.float32)
        y: Any = contract(x, kernel.astype(dtype), axes)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, self.outputs, jnp.float32)
            y = y + bias.astype(dtype)
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            if self.has_rng("dropout") and self.compute.lora_dropout:
                x = nn.Dropout(self.compute.lora_dropout, deterministic=False)(x)
            y = y + jnp.tensordot(jnp.tensordot(x, a.astype(dtype), axes), b.astype(dtype), 1)
        return y

    def _init(self, key: Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Array:
        flat = (math.prod(self.inputs), math.prod(self.outputs))
        return nn.initializers.lecun_normal()(key, flat, dtype).reshape(shape)


class Block(nn.Module):
    """Attention and SwiGLU, each added to the residual stream."""

    config: DecoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], attend: Attend[Kept]) -> tuple[Array, Kept]:
        c, dtype = self.config, jnp.dtype(self.compute.dtype)

        def norm(name: str) -> RMSNorm:
            return RMSNorm(c.norm_eps, dtype, name=name)

        def project(
            name: str, inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool
        ) -> Projection:
            return Projection(inputs, outputs, self.compute, bias, name=name)

        h = x if c.post_norm else norm("attn_norm")(x)
        q = project("q", (c.d_model,), (c.heads, c.head_dim), c.qkv_bias)(h)
        k = project("k", (c.d_model,), (c.kv_heads, c.head_dim), c.qkv_bias)(h)
        v = project("v", (c.d_model,), (c.kv_heads, c.head_dim), c.qkv_bias)(h)
        if c.qk_norm == "head":
            q, k = norm("q_norm")(q), norm("k_norm")(k)
        elif c.qk_norm == "all":
            q = norm("q_norm")(q.reshape(*q.shape[:-2], -1)).reshape(q.shape)
            k = norm("k_norm")(k.reshape(*k.shape[:-2], -1)).reshape(k.shape)
        with jax.named_scope("attention"):
            attended, kept = attend(q, k, v)
        attended = checkpoint_name(attended, "attended")
        h = project("o", (c.heads, c.head_dim), (c.d_model,), c.o_bias)(attended)
        x = x + (norm("attn_norm")(h) if c.post_norm else h)

        h = x if c.post_norm else norm("mlp_norm")(x)
        gate = project("gate", (c.d_model,), (c.d_ff,), c.mlp_bias)(h)
        up = project("up", (c.d_model,), (c.d_ff,), c.mlp_bias)(h)
        h = project("down", (c.d_ff,), (c.d_model,), c.mlp_bias)(nn.silu(gate) * up)
        x = x + (norm("mlp_norm")(h) if c.post_norm else h)
        return checkpoint_name(x, "block"), kept


_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("q", "k", "v", "attended"),
}


class _TrainingBlock(nn.Module):
    """`Block` with causal attention, in the form (carry, x) -> (carry, y) of nn.scan."""

    config: DecoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, kind: Array, rotations: Rotation) -> tuple[Array, None]:
        windows = tuple(k.window for k in self.config.kinds())
        # With a single kind of layer, nothing is chosen at run time.
        by = jax.tree.map(lambda r: r[kind] if len(windows) > 1 else r[0], rotations)

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
            q = checkpoint_name(rotate(q, by), "q")
            k = checkpoint_name(rotate(k, by), "k")
            v = checkpoint_name(v, "v")

            def within(window: int | None) -> Callable[[Array, Array, Array], Array]:
                return lambda q, k, v: attention_ops.causal_attention(
                    q, k, v, self.compute.attention, window
                )

            if len(set(windows)) == 1:
                return within(windows[0])(q, k, v), None
            return jax.lax.switch(kind, [within(w) for w in windows], q, k, v), None

        return Block(self.config, self.compute, name="block")(x, attend)


def _rotations(
    config: DecoderConfig, positions: Array, seq_len_at_token: Array | None
) -> list[Rotation]:
    """The rotation of each of the config's layer kinds, all of one shape."""
    kinds = config.kinds()
    if seq_len_at_token is not None and any(k.rope and k.rope.kind == "dynamic" for k in kinds):
        positions = jnp.broadcast_to(positions, seq_len_at_token.shape)
    else:
        seq_len_at_token = None
    return [rotation(kind.rope, config.head_dim, positions, seq_len_at_token) for kind in kinds]


class Decoder(nn.Module):
    """The model up to its final norm; the head is applied where logits are needed."""

    config: DecoderConfig
    compute: Compute
    normed: bool = True

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"], seq_len_at_token: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        embedding = self.param(
            "embed", nn.initializers.normal(0.02), (c.vocab_size, c.d_model), jnp.float32
        )
        if not c.tied_head:
            self.param("head", nn.initializers.normal(0.02), (c.d_model, c.vocab_size), jnp.float32)
        x = jnp.take(embedding, tokens, axis=0).astype(dtype)
        rotations = _rotations(c, jnp.arange(tokens.shape[1]), seq_len_at_token)
        block: Any = _TrainingBlock
        if self.compute.remat != "none":
            block = nn.remat(block, policy=_REMAT_POLICIES[self.compute.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]  (typed too narrowly)
            length=c.layers,
        )
        stacked = jax.tree.map(lambda *r: jnp.stack(r), *rotations)
        x, _ = layers(c, self.compute, name="layers")(x, jnp.array(c.kind_ids()), stacked)
        return RMSNorm(c.norm_eps, dtype, name="final_norm")(x) if self.normed else x


def init_params(config: DecoderConfig, key: Array) -> Params:
    """Random parameters in the training layout: float32, layers stacked."""
    variables = Decoder(config, Compute()).init(key, jnp.zeros((1, 2), jnp.int32))
    return variables["params"]


def abstract_params(config: DecoderConfig) -> Params:
    """Shapes and dtypes of `init_params`, without allocating them."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def base_params(params: Params) -> Params:
    """The parameters without adapters; see `models.lora`."""
    return params.get("base", params)


def merged(params: Params) -> Params:
    """The training layout with adapters merged into it; `params` itself where it has none."""
    if "lora" not in params:
        return params

    def add(base: Params, adapters: Params) -> Params:
        if "a" not in adapters:
            return {k: add(v, adapters[k]) if k in adapters else v for k, v in base.items()}
        change = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(adapters["a"], adapters["b"])
        kernel = base["kernel"]
        wide = jnp.promote_types(kernel.dtype, jnp.float32)
        return base | {"kernel": (kernel.astype(wide) + change.astype(wide)).astype(kernel.dtype)}

    return add(params["base"], params["lora"])


def hidden_states(
    config: DecoderConfig,
    compute: Compute,
    params: Params,
    tokens: Int[Array, "B T"],
    seq_len_at_token: Int[Array, "B T"] | None = None,
    dropout_key: Array | None = None,
) -> Float[Array, "B T D"]:
    """Final hidden states (after the last norm) of right-padded sequences.

    Args:
      config: architecture of the model.
      compute: dtype, kernels and dropout rate.
      params: training layout, or {"base": training layout, "lora": adapters}.
      tokens: token ids.
      seq_len_at_token: length of the sequence when each token was computed; only a dynamic rope
        reads it, see `ops.rope.rotation`.
      dropout_key: PRNG key of the dropout of the adapters' inputs; None for no dropout.
    """
    return _apply(Decoder(config, compute), params, tokens, seq_len_at_token, dropout_key)


def layer_states(
    config: DecoderConfig,
    compute: Compute,
    params: Params,
    tokens: Int[Array, "B T"],
    layer: int,
    seq_len_at_token: Int[Array, "B T"] | None = None,
    dropout_key: Array | None = None,
) -> Float[Array, "B T D"]:
    """Output of one layer, before any norm; the layers above it are not computed.

    Args:
      config: architecture of the model.
      compute: dtype, kernels and dropout rate.
      params: as in `hidden_states`.
      tokens: token ids.
      layer: index of the layer, from 0.
      seq_len_at_token: as in `hidden_states`.
      dropout_key: as in `hidden_states`.
    """
    depth = layer + 1
    kinds = config.layer_kinds if len(config.layer_kinds) == 1 else config.layer_kinds[:depth]
    lower = dataclasses.replace(config, layers=depth, layer_kinds=kinds)

    def cut(tree: Params) -> Params:
        return tree | {"layers": jax.tree.map(lambda x: x[:depth], tree["layers"])}

    if "lora" in params:
        params = params | {"base": cut(params["base"]), "lora": cut(params["lora"])}
    else:
        params = cut(params)
    decoder = Decoder(lower, compute, normed=False)
    return _apply(decoder, params, tokens, seq_len_at_token, dropout_key)


def _apply(
    decoder: Decoder,
    params: Params,
    tokens: Array,
    seq_len_at_token: Array | None,
    dropout_key: Array | None,
) -> Array:
    variables = {"params": base_params(params)}
    rngs = {}
    if "lora" in params:
        variables["lora"] = params["lora"]
        if dropout_key is not None and decoder.compute.lora_dropout:
            # Calls on different tokens (the groups of a batch) get different masks.
            rngs["dropout"] = jax.random.fold_in(dropout_key, jnp.sum(tokens))
    return decoder.apply(variables, tokens, seq_len_at_token, rngs=rngs)  # type: ignore[return-value]


def head_matrix(config: DecoderConfig, params: Params) -> Float[Array, "D V"]:
    """The output matrix: the head, or the transposed embedding where they are tied."""
    base = base_params(params)
    return base["embed"].T if config.tied_head else base["head"]


def decoding_layout(config: DecoderConfig, params: Params, dtype: str) -> Params:
    """Training layout -> decoding layout: a list of per-layer dicts, cast to the decoding dtype.

    Adapters are merged into the weights, so that they do not slow decoding down.
    """
    cast = jax.tree.map(lambda x: x.astype(dtype), merged(params))
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
    attend: Callable[[int, Array, Array, Array], tuple[Array, Kept]],
    seq_len_at_token: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], list[Kept]]:
    """Applies the layers of a decoding layout one by one.

    Args:
      config: architecture of the model.
      compute: dtype and kernels.
      params: from `decoding_layout`.
      tokens: token ids.
      positions: absolute positions of the tokens.
      attend: (layer, rotated q, rotated k, v) -> (attended values, what to keep of the layer).
      seq_len_at_token: as in `hidden_states`.

    Returns:
      Final hidden states, and per layer what `attend` kept.
    """
    x = jnp.take(params["embed"], tokens, axis=0).astype(compute.dtype)
    rotations, kinds = _rotations(config, positions, seq_len_at_token), config.kind_ids()
    kept = []
    for i, layer in enumerate(params["layers"]):

        def attend_here(q: Array, k: Array, v: Array, i: int = i) -> tuple[Array, Kept]:
            by = rotations[kinds[i]]
            return attend(i, rotate(q, by), rotate(k, by), v)

        x, keep = Block(config, compute).apply({"params": layer}, x, attend_here)  # type: ignore[misc]
        kept.append(keep)
    norm = RMSNorm(config.norm_eps, jnp.dtype(compute.dtype))
    return norm.apply({"params": params["final_norm"]}, x), kept  # type: ignore[return-value]
