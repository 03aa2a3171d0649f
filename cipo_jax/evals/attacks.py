"""Prefills that make a model answer without thinking, which may undo forgetting.

ZeroThink closes the think block at once, LessThink after one sentence (R-TOFU, arXiv 2505.15214).
"""

PREFILLS = {
    "zero": "\n{close}\n\n",
    "less": "Okay, the user asked this, I can answer it without thinking much.\n{close}\n\n",
}


def prefill_text(prefill: str, close: str) -> str:
    """The text that a completion begins with.

    Args:
      prefill: "zero", "less", or a text in which "{close}" stands for the closing tag.
      close: the tag that closes the think block.
    """
    return PREFILLS.get(prefill, prefill).replace("{close}", close)
