"""The device mesh and the one table that says how every parameter lies on it.

Axes: `data` replicates parameters, `fsdp` shards them and is gathered for use, `tensor` splits
heads, feed-forward and vocabulary. Rows of a batch lie over data and fsdp.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cipo_jax.errors import UserError
from cipo_jax.typing import Array, Params

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# Paths of the training layout, layers stacked. The first rule that matches wins.
_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed$", PartitionSpec("tensor", "fsdp")),
    (r"head$", PartitionSpec("fsdp", "tensor")),
    (r"layers/.*/[qkv]/kernel$", PartitionSpec(None, "fsdp", "tensor", None)),
    (r"layers/.*/[qkv]/bias$", PartitionSpec(None, "tensor", None)),
    (r"layers/.*/o/kernel$", PartitionSpec(None, "tensor", None, "fsdp")),
    (r"layers/.*/(gate|up)/kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"layers/.*/(gate|up)/bias$", PartitionSpec(None, "tensor")),
    (r"layers/.*/down/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"layers/.*/(o|down)/bias$", PartitionSpec(None, "fsdp")),
    (r"scale$", PartitionSpec()),
)

# Adapters: an axis that meets an activation is split as the activation is, ranks never are.
_ADAPTER_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"layers/.*/[qkv]/a$", PartitionSpec(None, "fsdp", None)),
    (r"layers/.*/[qkv]/b$", PartitionSpec(None, None, "tensor", None)),
    (r"layers/.*/o/a$", PartitionSpec(None, "tensor", None, None)),
    (r"layers/.*/(gate|up)/a$", PartitionSpec(None, "fsdp", None)),
    (r"layers/.*/(gate|up)/b$", PartitionSpec(None, None, "tensor")),
    (r"layers/.*/down/a$", PartitionSpec(None, "tensor", None)),
    (r"layers/.*/(o|down)/b$", PartitionSpec(None, None, "fsdp")),
)


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over all devices; one size may be -1, "the rest".

    Raises:
      UserError: where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if -1 in sizes:
        given = math.prod(s for s in sizes if s != -1)
        fits = given > 0 and len(devices) % given == 0
        sizes[sizes.index(-1)] = len(devices) // given if fits else 0
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise UserError(
            f"config.mesh: data {data} x fsdp {fsdp} x tensor {tensor} does not cover the "
            f"{len(devices)} devices there are"
        )
    # Linen's partitioning and plain jit want compiler-decided ("auto") axes, which are no longer
    # jax.make_mesh's default.
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, devices=devices, axis_types=auto)


def _path_name(path: tuple[object, ...]) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def param_shardings(params: Params, mesh: Mesh) -> Params:
    """The sharding of each parameter, from the table.

    Args:
      params: the training layout, as arrays or shapes.
      mesh: from `make_mesh`.

    Raises:
      UserError: naming the parameter and the axis, where a dimension does not divide.
    """
    return _shardings(params, mesh, _RULES + _ADAPTER_RULES)


def _shardings(params: Params, mesh: Mesh, rules: tuple[tuple[str, PartitionSpec], ...]) -> Params:
    def one(
        path: tuple[object, ...], leaf: np.ndarray | Array | jax.ShapeDtypeStruct
    ) -> NamedSharding:
        name = _path_name(path)
        spec = next((spec for rule, spec in rules if re.search(rule, name)), None)
        if spec is None:
            raise KeyError(f"no sharding rule matches parameter {name!r}")
        if name.endswith(("embed", "head")):
            # A vocabulary may have any size: where it does not divide it is not split.
            spec = PartitionSpec(
                *(
                    None if axis == "tensor" and size % mesh.shape[axis] else axis
                    for size, axis in zip(leaf.shape, spec, strict=True)
                )
            )
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"config.mesh.{axis} = {mesh.shape[axis]} does not divide parameter {name} "
                    f"of shape {tuple(leaf.shape)}; choose a divisor of {size}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, params)


def _decoding_rule(rule: str, spec: PartitionSpec) -> tuple[str, PartitionSpec]:
    """A rule of the training layout, without the layers' axis and with copies over fsdp."""
    axes = spec[1:] if rule.startswith("layers") else spec[:]
    axes = tuple(None if axis == "fsdp" else axis for axis in axes)
    return rule, PartitionSpec(*axes) if any(axes) else PartitionSpec()


# Paths of the decoding layout, which has no adapters.
_DECODING_RULES = tuple(_decoding_rule(*rule) for rule in _RULES)


def decoding_shardings(params: Params, mesh: Mesh) -> Params:
    """The sharding of each parameter of the decoding layout; raises as `param_shardings` does."""
    return _shardings(params, mesh, _DECODING_RULES)


def abstract_on(mesh: Mesh, abstract: Params) -> Params:
    """Shapes, dtypes and shardings of parameters or adapters on a mesh, without making them."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        param_shardings(abstract, mesh),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over data and fsdp."""
    return NamedSharding(mesh, BATCH)
