"""Language of a text, identified offline with py3langid."""

import functools
import re

from py3langid.langid import MODEL_FILE, LanguageIdentifier

UNKNOWN = "unknown"
READ = 1000  # characters that are read
LETTERS = 20  # minimum size of the letters in bytes of UTF-8; shorter texts fit several languages
PROBABILITY = 0.5  # minimum probability of the best language
CODE = re.compile(r"```.*?(?:```|$)|`[^`\n]*`|https?://\S+", re.S)
LETTER = re.compile(r"[^\W\d_]+")


def language(text: str) -> str:
    """Return the ISO 639 code of a text's language, or `unknown` if it is too short or no language is likely.

    Code and addresses are ignored, and so is everything but letters.
    """
    letters = " ".join(LETTER.findall(CODE.sub(" ", text[: 2 * READ])[:READ]))
    if len(letters.encode("utf-8", errors="replace")) < LETTERS:
        return UNKNOWN
    found, probability = _identifier().classify(letters)
    return found if probability >= PROBABILITY else UNKNOWN


@functools.cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
