"""Takes sentences to say from WordNet's example sentences, and makes up numbers, pairs and phrases.

Knows WordNet's files. Does not know voices.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

OTHER_FORM_PROBABILITIES = {"sentence": 0.68, "pair": 0.2, "phrase": 0.1, "letters": 0.02}
"""How often a clip holds one sentence, two, a few words that are none, or spelled letters. An LLM that was trained on
single sentences alone ends after the first one, and makes a sentence of two words."""
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


def spoken_number(rng: np.random.Generator) -> str:
    """Make up a number as one says it: some digits one by one, or one below a million."""
    if rng.random() < 0.5:
        return " ".join(DIGITS[digit] for digit in rng.integers(10, size=rng.integers(2, 8)))
    return in_words(int(10 ** rng.uniform(0.5, 6)))


def in_other_forms(sentences: Sequence[str], spare: list[str], *, seed: int, tested: Collection[str]) -> Iterator[str]:
    """Yield each sentence, or what stands in its place: two sentences in one clip, a phrase of it, or letters.

    Args:
        sentences: what would be said one by one.
        spare: sentences of at most half of `MOST_CHARACTERS` that nobody says yet; those that go into pairs are taken
            from it.
        tested: normalised texts that are not made.
    """
    forms, probabilities = zip(*OTHER_FORM_PROBABILITIES.items(), strict=True)
    for number, sentence in enumerate(sentences):
        rng = np.random.default_rng([seed, 3, number])
        form = rng.choice(forms, p=probabilities)
        other = sentence
        if form == "pair" and spare and len(sentence) <= MOST_CHARACTERS // 2:
            other = f"{sentence.rstrip(' .,;!?')}. {spare.pop()}"
        elif form == "phrase":
            other = phrase_of(sentence, rng)
        elif form == "letters":
            other = spelled_letters(rng)
        yield sentence if normalise(other) in tested else other


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
