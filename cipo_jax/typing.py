"""The axis letters and array aliases that every signature in the package uses.

B batch · T query/target length · S key/value length · C completion length · N query heads ·
K key/value heads · G = N/K · H head dim · D model dim · F feed-forward dim · V vocabulary ·
L layers · P prompts · R response slots · n samples per prompt.

The letters are those of ``jax.nn.dot_product_attention``; einsums are spelled in them.
"""

from typing import Any

from jaxtyping import Array, Bool, Float, Int, Key, UInt

Params = Any  # A nested dict of arrays; layers are stacked on a leading L axis.

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Params", "UInt"]
