"""Takes sentences to say from WordNet's example sentences and definitions, and makes up numbers to say.

Knows WordNet's files. Does not know voices.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

MOST_PHRASE_WORDS = 3
MOST_LETTERS = 3
PARTS_OF_SPEECH = ("adj", "adv", "noun", "verb")
LEAST_WORDS, MOST_WORDS = 2, 14
MOST_CHARACTERS = 75
"""About five seconds of speech, which the encoder's window holds with some silence."""
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

_PLAIN = re.compile(r"[A-Za-z][A-Za-z' ,;?!.-]*")


def normalise(text: str) -> str:
    """Reduce a sentence to what is compared: lower-case words of letters and apostrophes, one space apart.

    >>> normalise("He's ill-disposed, isn't he?")
    "he's ill disposed isn't he"
    """
    words = re.sub(r"[^a-z']+", " ", text.lower()).split()
    return " ".join(word for word in (word.strip("'") for word in words) if word)


def wordnet_examples(root: Path) -> list[str]:
    """List example sentences of WordNet, each once and in the order of the files, as they are written there.

    Args:
        root: the unpacked Debian package `wordnet-base`.

    Raises:
        OSError: WordNet's files are not there.
    """
    return list(_suitable(example for gloss in _glosses(root) for example in re.findall(r'"([^"]+)"', gloss)))


def wordnet_definitions(root: Path) -> list[str]:
    """List first definitions of WordNet's entries, each once and in the order of the files.

    Raises:
        OSError: WordNet's files are not there.
    """
    definitions = (re.sub(r"\([^)]*\)", "", gloss.partition(";")[0]).strip() for gloss in _glosses(root))
    return list(_suitable(definitions))


def spoken_number(rng: np.random.Generator) -> str:
    """Make up a number as one says it: some digits one by one, or one below a million."""
    if rng.random() < 0.5:
        return " ".join(DIGITS[digit] for digit in rng.integers(10, size=rng.integers(2, 8)))
    return in_words(int(10 ** rng.uniform(0.5, 6)))


def phrase_of(text: str, rng: np.random.Generator) -> str:
    """Cut some neighbouring words out of a sentence: what is said by itself is often no sentence.

    Returns:
        one to `MOST_PHRASE_WORDS` words, without the stops between them.
    """
    words = normalise(text).split()
    count = min(len(words), int(rng.integers(1, MOST_PHRASE_WORDS + 1)))
    first = int(rng.integers(len(words) - count + 1))
    return " ".join(words[first : first + count])


def spelled_letters(rng: np.random.Generator) -> str:
    """Make up some letters as one spells them, in capitals so that each is said by its name."""
    letters = rng.integers(26, size=rng.integers(1, MOST_LETTERS + 1))
    return " ".join(chr(ord("A") + letter) for letter in letters)


def in_words(number: int) -> str:
    """Write a number below a million as it is said.

    >>> in_words(21_305)
    'twenty one thousand three hundred five'
    """
    if number >= 1000:
        rest = number % 1000
        return f"{in_words(number // 1000)} thousand" + (f" {in_words(rest)}" if rest else "")
    if number >= 100:
        rest = number % 100
        return f"{DIGITS[number // 100]} hundred" + (f" {in_words(rest)}" if rest else "")
    if number >= 20:
        rest = number % 10
        return TENS[number // 10 - 2] + (f" {DIGITS[rest]}" if rest else "")
    return TEENS[number - 10] if number >= 10 else DIGITS[number]


def _glosses(root: Path) -> Iterator[str]:
    for part in PARTS_OF_SPEECH:
        for line in (root / "usr/share/wordnet" / f"data.{part}").read_text(encoding="latin-1").splitlines():
            if not line.startswith("  "):  # the licence at the top
                yield line.partition("|")[2].strip()


def _suitable(texts: Iterator[str]) -> Iterator[str]:
    """Yield those that any voice reads as they are written, and that are neither too long nor a single word."""
    seen = set()
    for text in texts:
        said = normalise(text)
        if not _PLAIN.fullmatch(text) or len(text) > MOST_CHARACTERS or said in seen:
            continue
        if LEAST_WORDS <= len(said.split()) <= MOST_WORDS:
            seen.add(said)
            yield text
