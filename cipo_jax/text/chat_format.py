r"""Chat formats: questions to prompt ids, generated ids to (chain of thought, answer).

Prompt and completion are tokenized separately, so that a completion's ids do not depend on the last
token of its prompt. The prompt comes from the tokenizer's chat template or from the config, and
ends with the opened think block; the completion is ``{cot}\\n</think>\\n\\n{answer}`` plus one
end-of-sequence token. The control tokens come from the tokenizer and its template, never from a
model's name.

Questions, thoughts and answers are data: a control token that they spell stays text.
"""

import bisect
import dataclasses
import datetime
import itertools
import operator
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from cipo_jax.errors import UserError
from cipo_jax.typing import AddedToken, Tokenizer

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"

# Placeholder of the question while a template is rendered.
_QUESTION = "CIPO7QUESTION7CIPO"
# Variables that the templates of reasoning models read; other templates ignore them.
_SWITCHES = {"enable_thinking": True, "thinking": True}
# Some templates contain the date. A run that resumes tomorrow must use today's prompts.
_DATE = datetime.date(2024, 7, 26)
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


class Thought(NamedTuple):
    """A generation, split.

    Attributes:
      cot: the chain of thought.
      answer: the text outside of think blocks.
      closed: whether the last think block was closed; if not, all the text is `cot`.
    """

    cot: str
    answer: str
    closed: bool


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """Prompts, completions and generations of one tokenizer, as text and as ids.

    Attributes:
      tokenizer: a Hugging Face tokenizer.
      open: the tag that opens a think block, or "" for none.
      close: the tag that closes it.
      prompt: "" for the tokenizer's chat template, else a text with {question}; a tokenizer that
        adds a BOS adds it here as well.
      system: a system message for the chat template, or "".
      stop_ids: ids that end a generation: EOS first, then those given, without repetitions.
    """

    tokenizer: Tokenizer
    open: str = THINK_OPEN
    close: str = THINK_CLOSE
    prompt: str = ""
    system: str = ""
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        stop_ids = tuple(dict.fromkeys((self.eos_id, *map(int, self.stop_ids))))
        object.__setattr__(self, "stop_ids", stop_ids)

    @cached_property
    def eos_id(self) -> int:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise UserError("the tokenizer has no eos_token; set it in tokenizer_config.json")
        return int(eos)

    @cached_property
    def vocabulary(self) -> int:
        """The largest token id plus one; an embedding may have more rows."""
        return 1 + max(self.tokenizer.get_vocab().values())

    # ---- questions to prompts

    def prompt_text(self, question: str) -> str:
        """The prompt as text, up to the opened think block."""
        return self._fitted(question).join(self._around)

    def prompt_ids(self, question: str) -> list[int]:
        """The prompt's ids, with one BOS if the tokenizer or the template adds any.

        Each question is encoded once.
        """
        ids = self._prompts.get(question)
        if ids is None:
            data = [self._fitted(question)] * (len(self._around) - 1)
            ids = self._encode_apart(self._around, data)
            ids = self._prompts[question] = self._with_one_bos(ids)
        return ids

    @cached_property
    def _prompts(self) -> dict[str, list[int]]:
        """Encoded prompts by question."""
        return {}

    def _with_one_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return ids
        rest = list(itertools.dropwhile(lambda i: i == bos, ids))
        return [bos, *rest] if len(rest) < len(ids) or self._adds_bos else ids

    @cached_property
    def _adds_bos(self) -> bool:
        """Whether the tokenizer itself prepends a BOS to a text."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer.encode("x")[:1] == [bos]

    @cached_property
    def _around(self) -> tuple[str, ...]:
        """The texts before, between and after the occurrences of the question in the prompt."""
        field = "config.think.prompt" if self.prompt else "the chat template"
        if self.prompt:
            around = self.prompt.format(question=_QUESTION).split(_QUESTION)
        else:
            around = self._rendered(_QUESTION).split(_QUESTION)
        if len(around) < 2:
            raise UserError(f"{field} leaves the question out; set config.think.prompt")
        end = around[-1].rstrip()
        if end.endswith(self.close):
            raise UserError(
                f"{field} ends with {self.close!r}, so that the model would not think; set "
                "config.think.prompt to a text with {question} that ends where thinking starts"
            )
        if self.open and not self.prompt and not end.endswith(self.open):
            around[-1] += f"{self.open}\n"
        return tuple(around)

    def _fitted(self, question: str) -> str:
        """The question as the template inserts it: many templates strip it."""
        left, right = self._strips
        question = question.lstrip() if left else question
        return question.rstrip() if right else question

    @cached_property
    def _strips(self) -> tuple[bool, bool]:
        """Whether the chat template strips white space from the question's left and right."""
        if self.prompt:
            return False, False
        plain, space = self._rendered(_QUESTION), " \n "
        padded = self._rendered(space + _QUESTION + space)
        for left in (False, True):
            for right in (False, True):
                fitted = ("" if left else space) + _QUESTION + ("" if right else space)
                if padded == plain.replace(_QUESTION, fitted):
                    return left, right
        raise UserError("the chat template rewrites the question; set config.think.prompt")

    @cached_property
    def _template(self) -> str:
        """The source of the chat template, or ""."""
        template = self.tokenizer.chat_template or ""
        if not isinstance(template, str):
            template = template.get("default", "")
        return _TODAY.sub(lambda match: repr(_DATE.strftime(match[2])), template)

    def _rendered(self, question: str) -> str:
        """The chat template's prompt for a question."""
        if not self._template:
            raise UserError(
                "the tokenizer has no default chat template; add chat_template.jinja or set "
                "config.think.prompt"
            )
        turns = [{"role": "user", "content": question}]
        if self.system:
            turns.insert(0, {"role": "system", "content": self.system})
        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
                **_SWITCHES,
            )
        except Exception as error:  # A template is a program: it may raise anything.
            why = " ".join(str(error).split()) or type(error).__name__
            way = "empty config.think.system or set" if self.system else "set"
            raise UserError(f"the chat template fails ({why}); {way} config.think.prompt") from None
        if self.system.strip() not in text:
            raise UserError(
                "the chat template leaves config.think.system out; empty it and set "
                "config.think.prompt"
            )
        return text

    # ---- thoughts and answers to completions

    def completion_ids(self, cot: str, answer: str) -> list[int]:
        """Ids of a whole completion, closed by exactly one EOS.

        Raises:
          UserError: where a text contains a tag, so that the completion could not be split.
        """
        # Only tags with ids of their own differ from text that spells them.
        spelled = [(tag, text) for tag in self._spelled_tags for text in (cot, answer)]
        for tag, text in [(self.close, cot), *spelled]:
            if tag in text:
                raise UserError(
                    f"a chain of thought or answer holds the tag {tag!r}, which would end it: "
                    "take it out"
                )
        around = ("", f"\n{self.close}\n\n", "")
        return [*self._encode_apart(around, (cot, answer)), self.eos_id]

    @cached_property
    def close_ids(self) -> list[int]:
        """Ids of the tag that closes the think block."""
        return self._encode(self.close)

    @property
    def close_is_token(self) -> bool:
        """Whether the closing tag is a token of its own."""
        return self.close not in self._spelled_tags

    # ---- text to ids

    def text_ids(self, text: str) -> list[int]:
        """Ids of a trusted text, in which tags become control tokens."""
        return self._encode(text) if text else []

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        known = [int(i) for i in ids if i < self.vocabulary]
        return self.tokenizer.decode(known, clean_up_tokenization_spaces=False)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _encode_apart(self, around: tuple[str, ...], data: Sequence[str]) -> list[int]:
        """Ids of around[0] + data[0] + around[1] + ..., where no data becomes a control token.

        Ordinary texts are encoded at once. Where data spells control tokens, the text is cut
        inside of each of them and the pieces are encoded separately.
        """
        ids = self._encode(_woven(around, data))
        if self._control(ids) == self._expected(around):
            return ids
        pieces = [around[0]]
        for text, after in zip(data, around[1:], strict=True):
            first, *others = self._cut(text)
            pieces[-1] += first
            pieces += others
            pieces[-1] += after
        ids = [i for piece in pieces for i in self._encode(piece)]
        if self._control(ids) != self._expected(around):
            raise UserError(
                "a question, chain of thought or answer spells a control token that the tokenizer "
                f"cannot read as text: {' '.join(data)[:80]!r}"
            )
        return ids

    def _control(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self._control_ids]

    def _expected(self, around: tuple[str, ...]) -> list[int]:
        """The control tokens of the trusted texts."""
        if around not in self._expectations:
            plain = _woven(around, ["x"] * (len(around) - 1))
            self._expectations[around] = self._control(self._encode(plain))
        return self._expectations[around]

    @cached_property
    def _expectations(self) -> dict[tuple[str, ...], list[int]]:
        return {}

    @cached_property
    def _added(self) -> Mapping[int, AddedToken]:
        return self.tokenizer.added_tokens_decoder

    @cached_property
    def _control_ids(self) -> dict[int, str]:
        """Added tokens that are special, a tag, or part of a template.

        The turn and think tokens of many models are not flagged special.
        """
        return {
            i: token.content
            for i, token in self._added.items()
            if token.special
            or token.content in (self.open, self.close)
            or (token.content.strip() and token.content in self._template + self.prompt)
        }

    def _cut(self, text: str) -> list[str]:
        """The text, cut after the first character of each control token, overlaps included."""
        cuts = [0, *(match.end() for match in self._control_start.finditer(text)), len(text)]
        return [text[start:end] for start, end in itertools.pairwise(cuts)]

    @cached_property
    def _control_start(self) -> re.Pattern[str]:
        tokens = map(re.escape, self._control_ids.values())
        return re.compile(f"(?={'|'.join(tokens)}).", re.DOTALL)

    # ---- generations to thoughts and answers

    def answer_start(self, ids: Sequence[int]) -> int | None:
        """Index right after the first closing tag, or None where there is none.

        Where the tag is a single token, the ids are searched for it, so that text which spells the
        tag does not count.
        """
        ids = list(ids)
        if self.close not in self._spelled_tags:
            return ids.index(self.close_ids[0]) + 1 if self.close_ids[0] in ids else None
        # The last token of a tag may contain text that follows the tag: search the decoded text.
        if self.close not in self._decode(ids):
            return None
        ends = range(1, len(ids) + 1)
        return 1 + bisect.bisect_left(
            ends, True, key=lambda end: self.close in self._decode(ids[:end])
        )

    def split(self, ids: Sequence[int]) -> Thought:
        """Splits a generation that starts inside of a think block.

        The texts of all think blocks form the chain of thought, the texts outside of them the
        answer, each joined by newlines. If the last block is never closed there is no answer.
        """
        parts = self._parts(list(ids))
        # Tags and texts alternate: the tag before a text decides whether it is thought.
        texts = [text.strip() for text in parts[::2]]
        thinks = [tag != self.close for tag in (self.open, *parts[1::2])]
        closed = not thinks[-1]
        labeled = list(zip(texts, thinks, strict=True))
        cot = "\n".join(text for text, think in labeled if text and (think or not closed))
        answer = "\n".join(text for text, think in labeled if text and not think and closed)
        return Thought(cot, answer, closed)

    def _parts(self, ids: Sequence[int]) -> list[str]:
        """Text, tag, text, ..., text."""
        parts: list[str] = []
        start = 0
        for end, i in enumerate(ids):
            if i in self._tag_ids:
                parts += [*self._parts_of_text(ids[start:end]), self._tag_ids[i]]
                start = end + 1
        return parts + self._parts_of_text(ids[start:])

    def _parts_of_text(self, ids: Sequence[int]) -> list[str]:
        text = self._decode(ids)
        if not self._spelled_tags:
            return [text]
        return re.split(f"({'|'.join(map(re.escape, self._spelled_tags))})", text)

    @cached_property
    def _tag_ids(self) -> dict[int, str]:
        """Tags that are tokens of their own, by their ids."""
        tags = ((self._encode(tag), tag) for tag in (self.open, self.close) if tag)
        return {ids[0]: tag for ids, tag in tags if len(ids) == 1 and ids[0] in self._added}

    @cached_property
    def _spelled_tags(self) -> tuple[str, ...]:
        """Tags that are ordinary text to the tokenizer."""
        own = self._tag_ids.values()
        return tuple(tag for tag in (self.open, self.close) if tag and tag not in own)

    @cached_property
    def _silent(self) -> frozenset[int]:
        """Ids that decoding leaves out: special tokens and stop ids."""
        special = (i for i, token in self._added.items() if token.special)
        return frozenset((*special, *self.tokenizer.all_special_ids, *self.stop_ids))

    def _decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens and incomplete characters.

        Ids beyond the vocabulary, with which embeddings are padded, decode to nothing.
        """
        shown = [int(i) for i in ids if i not in self._silent]
        # Cleaning up spaces would change the generated text.
        text = self.tokenizer.decode(shown, clean_up_tokenization_spaces=False)
        return text.replace("\ufffd", "")


def _woven(around: Sequence[str], data: Sequence[str]) -> str:
    """around[0] + data[0] + around[1] + data[1] + ... + around[-1]."""
    return around[0] + "".join(map(operator.add, data, around[1:]))
