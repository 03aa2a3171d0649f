r"""Think templates: questions to prompt ids, generated ids to (chain of thought, answer).

Prompt and completion are tokenised apart, so that a completion's ids do not depend on its prompt's
last token. The prompt comes from the tokenizer's own chat template and ends with the opened think
block; the completion is ``{cot}\\n</think>\\n\\n{answer}`` plus one end-of-sequence token.
"""

import bisect
import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from cipo_jax.errors import UserError

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"


class Thought(NamedTuple):
    """A generation taken apart."""

    cot: str
    answer: str
    closed: bool  # Whether the think block was closed; if not, all the text is `cot`.


@dataclasses.dataclass(frozen=True)
class ThinkFormat:
    """Text in, ids out, and back, for one tokenizer.

    Attributes:
      tokenizer: a Hugging Face tokenizer with a chat template.
    """

    tokenizer: Any

    @cached_property
    def eos_id(self) -> int:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise UserError("the tokenizer has no eos_token; set it in tokenizer_config.json")
        return int(eos)

    @cached_property
    def _opens_itself(self) -> bool:
        """Whether the chat template's generation prompt already ends inside the think block."""
        return self._template("?").rstrip().endswith(THINK_OPEN)

    def _template(self, question: str) -> str:
        if not self.tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template; add chat_template.jinja")
        turns = [{"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def prompt_text(self, question: str) -> str:
        """The prompt as text: the chat template, then an opened think block."""
        text = self._template(question)
        return text if self._opens_itself else f"{text}{THINK_OPEN}\n"

    def prompt_ids(self, question: str) -> list[int]:
        """The prompt's ids; the template brings the one BOS there is."""
        ids = self._prompts.get(question)
        if ids is None:
            ids = self._prompts[question] = self._encode(self.prompt_text(question))
        return ids

    @cached_property
    def _prompts(self) -> dict[str, list[int]]:
        """Prompts that were encoded before: rendering a chat template takes its time."""
        return {}

    def completion_ids(self, cot: str, answer: str) -> list[int]:
        """Ids of a whole completion, closed by exactly one EOS."""
        return [*self._encode(f"{cot}\n{THINK_CLOSE}\n\n{answer}"), self.eos_id]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    @cached_property
    def close_ids(self) -> list[int]:
        """Ids of the tag that closes the think block."""
        return self._encode(THINK_CLOSE)

    def answer_start(self, ids: Sequence[int]) -> int | None:
        """Index right after the first ``</think>``, or None where the block is not closed.

        Where the tag is a token of its own it is looked for among the ids, so that text which only
        spells it is not taken for it.
        """
        ids = list(ids)
        if len(self.close_ids) == 1:
            return ids.index(self.close_ids[0]) + 1 if self.close_ids[0] in ids else None
        # A tag of several tokens may share its last one with what follows: go by the text.
        if THINK_CLOSE not in self.tokenizer.decode(ids):
            return None
        ends = range(1, len(ids) + 1)
        return 1 + bisect.bisect_left(
            ends, True, key=lambda end: THINK_CLOSE in self.tokenizer.decode(ids[:end])
        )

    def split(self, ids: Sequence[int]) -> Thought:
        """Takes a generation apart at its first ``</think>``; a trailing EOS is dropped."""
        ids = list(ids)
        while ids and ids[-1] == self.eos_id:
            ids.pop()
        start = self.answer_start(ids)
        if start is None:
            return Thought(self._decode(ids), "", False)
        before, _, between = self._decode_raw(ids[:start]).partition(THINK_CLOSE)
        answer = between + self._decode_raw(ids[start:])
        return Thought(self._clean(before), self._clean(answer), True)

    def _decode_raw(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._clean(self.tokenizer.decode(ids, skip_special_tokens=True))

    @staticmethod
    def _clean(text: str) -> str:
        return text.strip().removeprefix(THINK_OPEN).strip()
