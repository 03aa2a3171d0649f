"""A plain loader to compare with, and counters of the reads of safetensors files."""

import contextlib
import weakref

import numpy as np
import safetensors
from safetensors.numpy import load_file

_PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def plain_tensors(folder):
    """All tensors of a folder, by name."""
    return {k: x for path in folder.glob("*.safetensors") for k, x in load_file(path).items()}


def plain_params(folder, config, dtype="float32"):
    """The training layout, from whole tensors in numpy."""
    tensors = {k: x.astype(dtype) for k, x in plain_tensors(folder).items()}
    D, F, H = config.d_model, config.d_ff, config.head_dim
    inputs = {"o": (config.heads, H), "down": (F,)}
    outputs = {
        "q": (config.heads, H), "k": (config.kv_heads, H), "v": (config.kv_heads, H),
        "gate": (F,), "up": (F,),
    }  # fmt: skip

    def stack(name):
        return np.stack([tensors[f"model.layers.{i}.{name}"] for i in range(config.layers)])

    block = {}
    for ours, theirs in _PROJECTIONS.items():
        shape = inputs.get(ours, (D,)), outputs.get(ours, (D,))
        kernel = np.swapaxes(stack(f"{theirs}.weight"), 1, 2)
        block[ours] = {"kernel": kernel.reshape(config.layers, *shape[0], *shape[1])}
        if f"model.layers.0.{theirs}.bias" in tensors:
            block[ours]["bias"] = stack(f"{theirs}.bias").reshape(config.layers, *shape[1])
    norms = ("input_layernorm", "post_attention_layernorm")
    if config.post_norm:
        norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    for ours, theirs in zip(("attn_norm", "mlp_norm"), norms, strict=True):
        block[ours] = {"scale": stack(f"{theirs}.weight")}
    if config.qk_norm != "none":
        for name in ("q_norm", "k_norm"):
            block[name] = {"scale": stack(f"self_attn.{name}.weight")}
    params = {
        "embed": tensors["model.embed_tokens.weight"],
        "final_norm": {"scale": tensors["model.norm.weight"]},
        "layers": {"block": block},
    }
    if not config.tied_head:
        params["head"] = tensors["lm_head.weight"].T
    return params


class _Slice:
    def __init__(self, stored, sizes, seen):
        self._stored, self._sizes, self._seen = stored, sizes, seen

    def get_shape(self):
        return self._stored.get_shape()

    def get_dtype(self):
        return self._stored.get_dtype()

    def __getitem__(self, index):
        part = self._stored[index]
        self._sizes.append(part.nbytes)
        self._seen(part)
        return part


class _Handle:
    """A file of safe_open without the method that reads whole tensors."""

    def __init__(self, handle, reads, seen):
        self._handle, self._reads, self._seen = handle, reads, seen

    def keys(self):
        return self._handle.keys()

    def get_slice(self, name):
        sizes = self._reads.setdefault(name, [])
        return _Slice(self._handle.get_slice(name), sizes, lambda part: self._seen(name, part))


@contextlib.contextmanager
def counted_reads(seen=lambda name, part: None):
    """Yields a dict: tensor -> bytes of each read of it. Each read is passed to `seen`."""
    real, reads = safetensors.safe_open, {}
    safetensors.safe_open = lambda path, framework: _Handle(real(path, framework), reads, seen)
    try:
        yield reads
    finally:
        safetensors.safe_open = real


class Alive:
    """Bytes of the numpy arrays that were read and are still alive, by address."""

    def __init__(self):
        self._parts = {}

    def add(self, part):
        at = part.__array_interface__["data"][0]
        self._parts[at] = part.nbytes
        weakref.finalize(part, self._parts.pop, at, None)

    def addresses(self):
        return dict(self._parts)
