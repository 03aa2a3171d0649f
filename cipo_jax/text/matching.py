"""Whether a text gives a fact away: words, phrases, and sentences of facts."""

import re
import unicodedata

# Scripts without spaces: each letter is a word, so that a phrase is found inside a sentence.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def normalized_words(text: str) -> list[str]:
    """Lower-case words of a text: letters and digits of any script, accents and width folded."""
    folded = unicodedata.normalize("NFKD", text).casefold()
    folded = "".join(c for c in folded if not unicodedata.combining(c))
    return _WORD.findall(folded)


def mentions(text: str, phrase: str) -> bool:
    """Whether the phrase's words appear in the text as a run of whole words."""
    words, wanted = normalized_words(text), normalized_words(phrase)
    if not wanted:
        return False
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))


_LONG = 8  # words; a fact of more is a sentence
_SHARE = 0.75
# They say nothing about whether a sentence's fact was given away.
_FUNCTION_WORDS = {
    "a", "an", "and", "are", "as", "at", "be", "been", "but", "by", "for", "from", "had", "has",
    "have", "he", "her", "his", "in", "into", "is", "it", "its", "not", "of", "on", "or", "s",
    "she", "that", "the", "their", "they", "this", "to", "was", "were", "which", "who", "whose",
    "will", "with", "would",
}  # fmt: skip


def reveals(text: str, fact: str, question: str) -> bool:
    """Whether a text gives a fact away.

    A short fact is given away where its words appear as a run (`mentions`). Of a sentence, such as
    the answers of R-TOFU, nobody repeats every word: it is given away where three quarters of the
    words that it adds to the question appear, in any order; function words do not count.
    """
    words = normalized_words(fact)
    added = set(words) - set(normalized_words(question)) - _FUNCTION_WORDS
    if len(words) <= _LONG or not added:
        return mentions(text, fact)
    return len(added & set(normalized_words(text))) >= _SHARE * len(added)
