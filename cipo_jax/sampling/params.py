"""Sampling parameters: how tokens are drawn and when a completion ends."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from cipo_jax.config import SamplingConfig
from cipo_jax.errors import UserError
from cipo_jax.text.chat_format import ChatFormat


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn and when a completion ends.

    Attributes:
      max_new_tokens: a completion has at most this many tokens.
      stop_ids: each of these ids ends a completion and is kept as its last token.
      temperature: 0 is greedy.
      top_p: nucleus mass; 1 keeps all tokens.
      vocabulary: ids from here on only pad the embedding and are never drawn; 0 for no padding.
      top_k: number of most likely tokens that are kept; 0 keeps all.
      min_p: least probability that is kept, relative to the most likely token's; 0 keeps all.
      repetition_penalty: for tokens that occur in the prompt or the completion, as in CTRL (arXiv
        1909.05858); 1 for none.
      think_budget: `close_ids` are forced after this many tokens if the think block is still open
        (budget forcing, arXiv 2501.19393); 0 for no limit.
      close_ids: the ids that close the think block.
      stop_texts: the token that completes any of these texts ends a completion and is kept.

    Raises:
      ValueError: `think_budget` is set and `close_ids` is empty.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    vocabulary: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    think_budget: int = 0
    close_ids: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.think_budget and not self.close_ids:
            raise ValueError("think_budget needs close_ids, the ids that close the think block")

    @classmethod
    def for_chat(
        cls,
        chat_format: ChatFormat,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        **more: Any,
    ) -> "SamplingParams":
        """Parameters with the stop ids, vocabulary and closing tag of a chat format.

        Args:
          chat_format: of the model.
          max_new_tokens: as in the attributes, like all the others.
          temperature: 0 is greedy.
          top_p: nucleus mass.
          **more: any other attribute.

        Raises:
          UserError: a think budget is set and the closing tag is not a single special token. A
            spelled tag may share tokens with the text after it, so the sampler cannot detect it.
        """
        if more.get("think_budget") and not chat_format.close_is_token:
            raise UserError(
                f"config.sampling.think_budget: {chat_format.close!r} is ordinary text to this "
                "tokenizer, not a token; a thinking budget needs a closing tag that is one"
            )
        return cls(
            max_new_tokens,
            chat_format.stop_ids,
            temperature,
            top_p,
            chat_format.vocabulary,
            close_ids=tuple(chat_format.close_ids),
            **more,
        )

    @classmethod
    def from_config(
        cls,
        sampling_config: SamplingConfig,
        chat_format: ChatFormat,
        stop_texts: Sequence[str] = (),
    ) -> "SamplingParams":
        """The parameters that config.sampling sets; raises as `for_chat` does."""
        return cls.for_chat(
            chat_format,
            sampling_config.max_new_tokens,
            sampling_config.temperature,
            sampling_config.top_p,
            top_k=sampling_config.top_k,
            min_p=sampling_config.min_p,
            repetition_penalty=sampling_config.repetition_penalty,
            think_budget=sampling_config.think_budget,
            stop_texts=tuple(stop_texts),
        )

    def on_device(self) -> "SamplingParams":
        """The parameters that a compiled program depends on; the host applies the others."""
        close_ids = self.close_ids if self.think_budget else ()
        return dataclasses.replace(self, max_new_tokens=0, stop_texts=(), close_ids=close_ids)

    def for_prefill(self) -> "SamplingParams":
        """The parameters that the prefill of prompts depends on."""
        return SamplingParams(0, (), repetition_penalty=self.repetition_penalty)
