"""Reduces transcripts to the form that a model learns and is measured on, in any language.

Knows Unicode. Does not know files, formats or tasks.

`words` keeps what writes words and drops the rest: letters, marks (vowel signs, harakat, points, accents that have no
letter of their own) and digits of every script, apostrophes inside a word, and the joiners that Indic and Persian
spelling needs there. Everything else parts words, except what cannot be seen, which goes without a trace. Texts that
look alike come out alike (NFC, one kind of apostrophe, no case).
"""

import unicodedata
from collections.abc import Callable

APOSTROPHES = (
    "'\N{RIGHT SINGLE QUOTATION MARK}\N{MODIFIER LETTER APOSTROPHE}\N{FULLWIDTH APOSTROPHE}"
    "\N{HEBREW PUNCTUATION GERESH}"
)
JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
_CAPITAL_DOTTED_I = "\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}"


class _KeptCharacters(dict[int, str]):
    """Fills itself as a table for `str.translate`: each character, a blank, or no character, by its category."""

    def __missing__(self, code: int) -> str:
        made = self[code] = _kept(chr(code))
        return made


def _kept(character: str) -> str:
    category = unicodedata.category(character)
    if character in APOSTROPHES:
        return "'"
    if character in JOINERS:
        return character
    if character == "\N{ZERO WIDTH SPACE}":  # a format character that parts words, as Khmer is written
        return " "
    # Variation selectors are marks by category, but say how a sign is drawn and not which it is.
    if category == "Cf" or "VARIATION SELECTOR-" in unicodedata.name(character, ""):
        return ""
    return character if category[0] in "LMN" else " "


_KEPT = _KeptCharacters()


def as_is(text: str) -> str:
    """Return the text with single blanks for blanks and line breaks."""
    return " ".join(text.split())


def lower(text: str) -> str:
    """Return the text in lower case, with single blanks."""
    return as_is(text.lower())


def words(text: str) -> str:
    """Return the words of a text in lower case, parted by single blanks.

    Lower case is that of no language in particular: "I" is "i" in Turkish too, whose "İ" is "i" as well, without the
    dot above it that `str.lower` leaves. "ß" stays.
    """
    # NFC on both sides: what is decomposed has no category of its own, and lower case may decompose.
    plain = unicodedata.normalize("NFC", text).replace(_CAPITAL_DOTTED_I, "i").lower()
    bare = (_bare(word) for word in unicodedata.normalize("NFC", plain).translate(_KEPT).split())
    return " ".join(word for word in bare if word)


def _bare(word: str) -> str:
    """Return the word without apostrophes and joiners at its edges, and without marks that stand on nothing."""
    edges = "'" + JOINERS
    word = word.rstrip(edges)
    start = next((index for index, sign in enumerate(word) if sign not in edges and not _is_mark(sign)), len(word))
    return word[start:]


def _is_mark(sign: str) -> bool:
    return unicodedata.category(sign).startswith("M")


TEXT_FORMS: dict[str, Callable[[str], str]] = {"as_is": as_is, "lower": lower, "words": words}
"""The forms by their names in configs."""
