# ruff: noqa: RUF001  (the synthesiser writes its phones in IPA, whose letters look like ASCII ones)
"""Names the 43 phones in which the speech of every synthetic voice is written.

Knows the names of the phones (ARPABET, lower case, plus `oh` as in British "dog") and how the synthesiser's own IPA
symbols map onto them. Does not know about audio, timing or faces.

`PHONES[0]` is silence. The order is fixed: it is the class order of the frame labels the shipped encoders learnt from.
"""

SILENCE = "sil"

_IPA: dict[str, str] = {
    "p": "p", "b": "b", "t": "t", "d": "d", "k": "k", "ɡ": "g", "tʃ": "ch", "dʒ": "jh", "f": "f", "v": "v",
    "θ": "th", "ð": "dh", "s": "s", "z": "z", "ʃ": "sh", "ʒ": "zh", "h": "hh", "m": "m", "n": "n", "ŋ": "ng",
    "l": "l", "ɹ": "r", "w": "w", "j": "y",
    "iː": "iy", "ɪ": "ih", "eɪ": "ey", "ɛ": "eh", "æ": "ae", "ɑː": "aa", "ɒ": "oh", "ɔː": "ao", "oʊ": "ow", "ʊ": "uh",
    "uː": "uw", "ʌ": "ah", "ɜː": "er", "ə": "ax", "ɚ": "axr", "aɪ": "ay", "aʊ": "aw", "ɔɪ": "oy",
}  # fmt: skip

# What the synthesiser's accents use beyond that: near sounds, and a vowel with an r or l written as one symbol.
_ALIASES: dict[str, str] = {
    "": "sil", "i": "iy", "ᵻ": "ih", "a": "ae", "ɐ": "ax", "əʊ": "ow", "ɔ": "ao", "əɪ": "er", "ɾ": "d", "ʔ": "t",
    "r": "r", "n̩": "n", "əl": "ax l", "əɹ": "ax r", "ɑːɹ": "aa r", "ɔːɹ": "ao r", "oːɹ": "ao r", "ʊɹ": "uh r",
    "ɪɹ": "ih r", "ɛɹ": "eh r", "aɪɚ": "ay axr", "aɪə": "ay ax", "iə": "iy ax", "eə": "eh ax", "ɛə": "eh ax",
    "ʊə": "uh ax",
}  # fmt: skip

PHONES: tuple[str, ...] = (SILENCE, *_IPA.values())
PHONE_IDS: dict[str, int] = {phone: index for index, phone in enumerate(PHONES)}
_STRESS_MARKS = str.maketrans("", "", "ˈˌ")


def phones_of_ipa(symbol: str) -> tuple[str, ...]:
    """Look up the phones of the inventory that one IPA symbol of the synthesiser stands for; stress is dropped.

    Raises:
        ValueError: the symbol occurs in no accent of the synthetic voices.
    """
    bare = symbol.translate(_STRESS_MARKS)
    if bare in _IPA:
        return (_IPA[bare],)
    if bare not in _ALIASES:
        raise ValueError(f"IPA symbol {symbol!r} is unknown; known are {' '.join([*_IPA, *_ALIASES])}")
    return tuple(_ALIASES[bare].split())
