"""Types that signatures in the whole package use: array aliases, JSON values, tokenizers.

The axis letters of array annotations:

B batch · T query/target length · S key/value length · C completion length · N query heads ·
K key/value heads · G = N/K · H head dim · D model dim · F feed-forward dim · V vocabulary ·
L layers · P prompts · R response slots · n samples per prompt.

The letters are those of ``jax.nn.dot_product_attention``; einsums are spelled in them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from jaxtyping import Array, Bool, Float, Int, Key, UInt

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None
Params = Any  # A nested dict of arrays; layers are stacked on a leading L axis.


class AddedToken(Protocol):
    """A token that a tokenizer has beside its vocabulary."""

    @property
    def content(self) -> str: ...
    @property
    def special(self) -> bool: ...


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that this package uses.

    The annotations of transformers are wider: of batches, and of all that templates may return.
    """

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def all_special_ids(self) -> list[int]: ...
    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]: ...
    @property
    def chat_template(self) -> str | Mapping[str, str] | None: ...
    def get_vocab(self) -> dict[str, int]: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(
        self,
        token_ids: list[int],
        skip_special_tokens: bool = False,
        *,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str: ...
    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        chat_template: str,
        tokenize: bool,
        add_generation_prompt: bool,
        **switches: bool,
    ) -> str: ...
    def save_pretrained(self, save_directory: str | Path) -> object: ...
    def __len__(self) -> int: ...


__all__ = [
    "AddedToken",
    "Array",
    "Bool",
    "Float",
    "Int",
    "Json",
    "Key",
    "Params",
    "Tokenizer",
    "UInt",
]
