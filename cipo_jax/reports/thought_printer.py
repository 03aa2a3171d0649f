"""Prints a generation on the terminal as it grows."""

from cipo_jax.text.chat_format import ChatFormat


class ThoughtPrinter:
    """Prints what is new in the chain of thought, then what is new in the answer."""

    def __init__(self, chat: ChatFormat):
        """Begins a generation."""
        self._chat = chat
        self._shown = {"cot": "", "answer": ""}
        self._closed = False
        self._ids: list[int] = []
        print("[thinks] ", end="", flush=True)

    def show(self, ids: list[int], whole: bool = False) -> None:
        """Prints what is new.

        Args:
          ids: all token ids so far, the prefill included.
          whole: whether no more will come.
        """
        thought = self._chat.split(ids)
        self._ids = ids
        if self._closed and not thought.closed:  # A second block was opened; shown when closed.
            return
        self._print("cot", thought.cot, whole or thought.closed)
        if thought.closed:
            if not self._closed:
                print("\n[answers] ", end="")
            self._closed = True
            self._print("answer", thought.answer, whole)

    def end(self, stopped: bool) -> None:
        """Ends the generation; `stopped` says whether it came to an end of its own."""
        self.show(self._ids, whole=True)
        print("" if stopped else " [cut off at config.sampling.max_new_tokens]")
        if not self._closed:
            print("[the think block was not closed: there is no answer]")

    def _print(self, part: str, text: str, whole: bool) -> None:
        if not whole:
            # Half a letter, or what may turn out to be the beginning of the closing tag.
            text = text.rstrip("\ufffd")
            tag = self._chat.close
            held = [n for n in range(1, len(tag)) if text.endswith(tag[:n])]
            text = text[: len(text) - max(held, default=0)]
        shown = self._shown[part]
        if text.startswith(shown):
            print(printable(text[len(shown) :]), end="", flush=True)
            self._shown[part] = text


def printable(text: str) -> str:
    """Text of a model without the control characters that a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
