"""The rope fields of config.json (`rope_parameters`, `rope_scaling`) to `Rope`."""

import math

from cipo_jax.errors import UserError
from cipo_jax.models.hf_fields import Fields, boolean, positive_int, positive_number
from cipo_jax.ops.rope import Rope

_ROPE_FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
        "mscale", "mscale_all_dim", "truncate",
        # In the config of DeepSeek-R1-0528-Qwen3-8B. transformers ignores it, and must read exports
        # as we do; so it is ignored here too. See docs/models.md.
        "attn_factor",
    },
}  # fmt: skip


def uniform_rope(fields: Fields, default_theta: float) -> Rope:
    """The one rope of all layers, from `rope_parameters` or the older `rope_scaling`.

    Args:
      fields: of a config.json.
      default_theta: base of the wavelengths where config.json gives none.

    Raises:
      UserError: naming the field, where the two differ, or one is not supported.
    """
    both = [fields.get(name) for name in ("rope_parameters", "rope_scaling")]
    if all(both) and both[0] != both[1]:
        raise UserError(
            f"fields 'rope_parameters' = {both[0]} and 'rope_scaling' = {both[1]} differ; keep one"
        )
    name = "rope_parameters" if both[0] else "rope_scaling"
    return parse_rope(fields, both[0] or both[1], name, default_theta)


def parse_rope(fields: Fields, given: Fields | None, name: str, default_theta: float) -> Rope:
    """One rope out of a config.json.

    Args:
      fields: of the config.json.
      given: the object that describes the rope; None for a plain one.
      name: field that holds `given`, for error messages.
      default_theta: as in `uniform_rope`.

    Raises:
      UserError: naming the field, where it is not supported.
    """
    if given is not None and not isinstance(given, dict):
        raise UserError(f"field {name!r} = {given!r}: must be an object")
    given = dict(given or {})
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)  # Old configs have both keys.
    theta = positive_number(fields, "rope_theta", default=default_theta)
    theta = positive_number(given, "rope_theta", name, theta)
    given.pop("rope_theta", None)
    if kind not in _ROPE_FIELDS:
        raise UserError(
            f"field {name!r}: rope type {kind!r} is not supported; supported are "
            f"{', '.join(_ROPE_FIELDS)}"
        )
    if given.get("partial_rotary_factor") == 1.0:
        del given["partial_rotary_factor"]
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        if key not in _ROPE_FIELDS[kind]:
            raise UserError(
                f"field {name!r}: {key!r} = {value!r} is not understood for rope type {kind!r}; it "
                "may change results"
            )
    if kind == "default":
        return Rope(theta)
    longest = 0
    if kind in ("dynamic", "llama3", "yarn"):
        longest = positive_int(fields, "max_position_embeddings")
    trained = positive_int(given, "original_max_position_embeddings", longest)
    # yarn alone has a default factor: the ratio of the two lengths.
    factor = positive_number(given, "factor", name, longest / trained if kind == "yarn" else None)
    if kind == "linear":
        return Rope(theta, "linear", factor)
    if kind == "dynamic":
        return Rope(theta, "dynamic", factor, longest)
    if kind == "llama3":
        low, high = (positive_number(given, f"{end}_freq_factor", name) for end in ("low", "high"))
        return Rope(theta, "llama3", factor, trained, low_freq_factor=low, high_freq_factor=high)
    return Rope(
        theta,
        "yarn",
        factor,
        trained,
        beta_fast=positive_number(given, "beta_fast", name, 32.0),
        beta_slow=positive_number(given, "beta_slow", name, 1.0),
        truncate=boolean(given, "truncate", True),
        scale=_yarn_scale(given, factor, name),
    )


def _yarn_scale(given: Fields, factor: float, name: str) -> float:
    """The temperature of yarn, as a factor on cosines and sines (arXiv 2309.00071, eq. 22)."""

    def mscale(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if given.get("attention_factor") is not None:
        return positive_number(given, "attention_factor", name)
    if given.get("mscale") and given.get("mscale_all_dim"):
        return mscale(positive_number(given, "mscale", name)) / mscale(
            positive_number(given, "mscale_all_dim", name)
        )
    return mscale()
