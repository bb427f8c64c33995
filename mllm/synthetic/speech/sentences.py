"""Makes the sentences of the synthetic corpus, and says which split each of them belongs to.

Knows a small lexicon and two grammars: GRID-style commands ("place blue at f two now") and an open grammar of everyday
sentences. Does not know who speaks them, how they sound or what is trained on them.

    sample_sentences(100, split="train", seed=0)  -> 100 different sentences, none of which is in another split
    random_sentence(generator)                    -> one sentence of any split
    split_of("place blue at f two now")           -> "train" | "validation" | "test", decided by the text alone
    LEXICON                                       -> every word that can occur, sorted

Sentences are lower case, without punctuation, words parted by single spaces; they last about 2 seconds when spoken.
Source of the commands: the GRID corpus (Cooke et al. 2006), less the letter "a", which is spoken like the article.
"""

import hashlib

import numpy as np

SPLITS = ("train", "validation", "test")
COMMAND_FRACTION = 0.4  # of all sentences; the rest is open grammar
_TRAIN_PERCENT = 80
_VALIDATION_PERCENT = 10

_COMMAND_SLOTS: tuple[tuple[str, ...], ...] = (
    ("bin", "lay", "place", "set"),
    ("blue", "green", "red", "white"),
    ("at", "by", "in", "with"),
    tuple("bcdefghijklmnopqrstuvxyz"),
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    ("again", "now", "please", "soon"),
)

# One class of words per capital letter; the patterns below are made of these letters and of literal words.
_CLASSES: dict[str, tuple[str, ...]] = {
    "D": ("the", "my", "this", "that", "your", "our", "every", "another"),
    "A": (
        "small", "large", "old", "young", "warm", "cold", "quick", "quiet", "happy", "heavy", "broken", "empty",
        "yellow", "black", "brown", "golden", "purple", "strange", "simple", "careful",
    ),
    "N": (
        "dog", "horse", "bird", "fish", "monkey", "rabbit", "child", "teacher", "doctor", "farmer", "sister", "father",
        "boat", "train", "window", "table", "garden", "kitchen", "letter", "paper", "bottle", "basket", "hammer",
        "ladder", "river", "mountain", "village", "market", "school", "station", "bridge", "forest", "island",
        "pocket", "button", "jacket", "butter", "orange", "coffee", "music", "picture", "money",
    ),
    "T": (
        "found", "moved", "watched", "carried", "painted", "followed", "opened", "forgot", "sold", "brought",
        "dropped", "finished", "wanted", "noticed", "washed", "loved", "borrowed", "measured",
    ),
    "I": ("slept", "waited", "laughed", "fell", "stopped", "vanished", "danced", "worked", "shouted", "arrived"),
    "P": ("under", "behind", "near", "over", "beside", "above", "inside", "across"),
    "W": ("today", "yesterday", "tonight", "often", "early", "always", "once", "before", "together", "slowly"),
    "S": ("we", "they", "he", "she", "nobody", "somebody"),
    "V": ("find", "move", "watch", "carry", "paint", "follow", "open", "forget", "sell", "bring", "drop", "wash"),
    "M": ("can", "will", "should", "must", "could", "might"),
    "Q": ("when", "where", "how"),
}  # fmt: skip

_PATTERNS: tuple[str, ...] = (
    "D A N T D N", "D N T D A N W", "S T D A N P D N", "D N I P D A N", "D A N I W", "S M V D A N W", "M S V D A N",
    "Q M S V D N", "S M V D N P D N", "W S T D A N", "D N P D N I", "Q did S V D A N", "V D A N P D N",
    "S never T D A N", "P D N S T D N", "D N M not V D N",
)  # fmt: skip

LEXICON: tuple[str, ...] = tuple(
    sorted(
        {word for words in (*_COMMAND_SLOTS, *_CLASSES.values()) for word in words}
        | {part for pattern in _PATTERNS for part in pattern.split() if part not in _CLASSES}
    )
)


def random_sentence(generator: np.random.Generator) -> str:
    """Sample one sentence of any split: a command with probability `COMMAND_FRACTION`, else one of the open grammar."""
    if generator.random() < COMMAND_FRACTION:
        return " ".join(_pick(slot, generator) for slot in _COMMAND_SLOTS)
    parts = _pick(_PATTERNS, generator).split()
    return " ".join(_pick(_CLASSES[part], generator) if part in _CLASSES else part for part in parts)


def split_of(sentence: str) -> str:
    """Compute the split of a sentence, a function of its text, so that no sentence stands in two splits."""
    percent = int.from_bytes(hashlib.sha256(sentence.encode()).digest()[:8], "big") % 100
    if percent < _TRAIN_PERCENT:
        return "train"
    return "validation" if percent < _TRAIN_PERCENT + _VALIDATION_PERCENT else "test"


def sample_sentences(count: int, *, split: str, seed: int) -> list[str]:
    """Sample `count` different sentences of one split, the same for the same seed.

    Raises:
        ValueError: an unknown split, or a negative count.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if count < 0:
        raise ValueError(f"count of sentences must not be negative, got {count}")
    generator = np.random.default_rng([seed, SPLITS.index(split)])
    sampled: dict[str, None] = {}  # a dict keeps the order in which they were sampled
    while len(sampled) < count:
        sentence = random_sentence(generator)
        if split_of(sentence) == split:
            sampled[sentence] = None
    return list(sampled)


def _pick(words: tuple[str, ...], generator: np.random.Generator) -> str:
    return words[int(generator.integers(len(words)))]
