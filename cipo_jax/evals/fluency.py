"""How natural a generation is to another model, its facts left aside."""

import functools
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from cipo_jax.text.matching import normalized_words


@functools.lru_cache(maxsize=65536)
def _piece(tokenizer: Any, tokens: tuple[int, ...]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=False)


def fact_tokens(tokenizer: Any, ids: Sequence[int], fact_words: Collection[str]) -> np.ndarray:
    """[C] bool: the tokens that touch a word which states a fact (or a number)."""
    # Tokens that hold parts of one letter are read together and share its place in the text.
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
    """Mean log-probability of all tokens that do not state a fact, in nats per token."""
    kept = np.concatenate([lp[~f] for lp, f in zip(logps, facts, strict=True)])
    return float(kept.mean()) if kept.size else 0.0
