"""Log-probability of a generation under another model, without its facts."""

import functools
import re
from collections.abc import Collection, Sequence

import numpy as np

from cipo_jax.text.matching import normalized_words
from cipo_jax.typing import Tokenizer


@functools.lru_cache(maxsize=65536)
def _piece(tokenizer: Tokenizer, tokens: tuple[int, ...]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=False)


def fact_tokens(
    tokenizer: Tokenizer, ids: Sequence[int], fact_words: Collection[str]
) -> np.ndarray:
    """[C] bool: the tokens that overlap with a fact word or a number.

    Args:
      tokenizer: of the model.
      ids: [C] the tokens of a completion.
      fact_words: normalized words.
    """
    # Tokens that are parts of one letter are decoded together and share its place in the text.
    text, starts, ends, pending = "", [], [], []
    for i in ids:
        pending.append(int(i))
        piece = _piece(tokenizer, tuple(pending))
        if piece.endswith("\ufffd") and len(pending) < 4:
            continue
        starts += [len(text)] * len(pending)
        text += piece
        ends += [len(text)] * len(pending)
        pending = []
    starts += [len(text)] * len(pending)
    ends += [len(text)] * len(pending)
    spans = [
        m.span()
        for m in re.finditer(r"[^\W_]+", text)
        if any(w in fact_words or w.isdigit() for w in normalized_words(m.group()))
    ]
    return np.array(
        [any(s < b and e > a for a, b in spans) for s, e in zip(starts, ends, strict=True)], bool
    )


def nonfact_logp(logps: Sequence[np.ndarray], facts: Sequence[np.ndarray]) -> float:
    """Mean log-probability of all tokens that state no fact, in nats per token; 0 without any.

    Args:
      logps: [C] of each completion.
      facts: [C] of each completion, from `fact_tokens`.
    """
    kept = np.concatenate([lp[~f] for lp, f in zip(logps, facts, strict=True)])
    return float(kept.mean()) if kept.size else 0.0
