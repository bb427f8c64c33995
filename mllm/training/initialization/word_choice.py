"""Chooses the words that a word projector knows, among the tokens of the LLM, and spells every text with them.

Knows the tokenizer and texts. Does not know sounds or weights.

The commonest tokens of the captions are words by themselves. A rarer token is spelled by shorter ones, down to single
characters: `Ġexquisite` by `Ġex`, `qu`, `is`, `ite`. So each word occurs often enough to be learned by its sound, and
texts that no caption holds can be spelled all the same. Where a speech model knows words by their sound already
(`word_decoder.py`), words that no caption holds are chosen too.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from mllm.training.initialization.captions import word_tokens


class Spelling:
    """Spells texts with a few words.

    Args:
        words: ids of the LLM's tokens, in the order in which the projector scores them.
        spelled: by every token id of the captions, the numbers of the words that spell it, from 1 on (0 is nothing).
    """

    def __init__(self, words: Sequence[int], spelled: dict[int, list[int]]) -> None:
        self.words = list(words)
        self.spelled = spelled

    def of(self, token_ids: Iterable[int]) -> list[int]:
        """Spell tokens of the captions; what is no sound, such as punctuation, is left out."""
        return [number for token in token_ids for number in self.spelled.get(token, ())]


def choose_words(
    counts: Counter[int],
    tokenizer: PreTrainedTokenizerBase,
    num_words: int,
    *,
    known: Callable[[str], bool] | None = None,
) -> Spelling:
    """Choose the words that spell these captions, and others like them where they are known without captions.

    Args:
        counts: how often each token id occurs in the captions.
        num_words: how many to choose.
        known: tells whether a token of the LLM, as the tokenizer writes it, is known by its sound. Then only such are
            chosen, besides characters: those of the captions, and behind them, in the order of their ids, in which
            the commoner ones come first, those that are made of the same characters.

    Raises:
        ValueError: the captions need more words than that for their characters alone, or there are not so many.
    """
    strings = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in word_tokens(counts, tokenizer)}
    vocabulary = tokenizer.get_vocab()
    characters = _characters(strings.values(), tokenizer)
    key = "projector.num_words"
    if len(characters) > num_words:
        raise ValueError(f"{key} is {num_words}; the captions have {len(characters)} characters, each of which is one")
    common = [strings[token] for token, _ in counts.most_common() if token in strings]
    if known is not None:
        common = [string for string in [*common, *_others(set(strings.values()), tokenizer)] if known(string)]
    common = [string for string in common if string not in characters]
    if (num_found := len(characters) + len(common)) < num_words:
        found = f"the captions hold {num_found} tokens"
        if known is not None:
            found = f"the LLM and train.word_decoder share {num_found} tokens of the captions' characters"
        raise ValueError(f"{key} is {num_words}; {found}; allowed: as many at most, or more captions")
    chosen = common[: num_words - len(characters)] + sorted(characters)
    total, by_string = sum(counts.values()), {string: counts[token] for token, string in strings.items()}
    # The commoner a word, the cheaper; half a count stands for what never stands alone, and one more for every word.
    costs = {word: math.log(total / (by_string.get(word, 0) + 0.5)) + 1 for word in chosen}
    numbers = {word: number for number, word in enumerate(chosen, start=1)}
    spelled = {token: [numbers[word] for word in spell(string, costs)] for token, string in strings.items()}
    return Spelling([vocabulary[word] for word in chosen], spelled)


def spell(string: str, costs: dict[str, float]) -> list[str]:
    """Part a string into words so that their costs add up to the least.

    >>> spell("there", {"t": 3.0, "h": 3.0, "e": 3.0, "r": 3.0, "the": 2.0, "re": 2.5})
    ['the', 're']
    """
    longest = max(map(len, costs))
    best: list[tuple[float, int]] = [(0.0, 0)]  # for each length of the beginning: its cost, where its last word starts
    for end in range(1, len(string) + 1):
        starts = range(max(0, end - longest), end)
        best.append(min((best[start][0] + costs.get(string[start:end], math.inf), start) for start in starts))
    assert math.isfinite(best[-1][0]), string  # single characters are words
    words, end = [], len(string)
    while end:
        start = best[end][1]
        words.append(string[start:end])
        end = start
    return words[::-1]


def _others(strings: Collection[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """List the LLM's other words that are made of the characters of these, in the order of their ids."""
    characters = set("".join(strings))
    made = {token: string for string, token in tokenizer.get_vocab().items() if characters.issuperset(string)}
    words = word_tokens(made, tokenizer)
    return [made[token] for token in sorted(words) if made[token] not in strings]


def _characters(strings: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Collect what can spell all of the strings: their characters, also with the mark of a space before them.

    A string with a character that is no token stays whole.
    """
    vocabulary = tokenizer.get_vocab()
    mark = space_mark(tokenizer)
    pieces: set[str] = set()
    for string in strings:
        characters = set(string)
        pieces |= characters if characters <= vocabulary.keys() else {string}
        if mark and string.startswith(mark) and (first := string[: len(mark) + 1]) in vocabulary:
            pieces.add(first)
    return pieces


def space_mark(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what a tokenizer's words begin with where a space stands before them; nothing where it keeps none."""
    return tokenizer.tokenize("a a")[-1].removesuffix("a")


def spoken(word: str, mark: str) -> str:
    """Write a space for a tokenizer's mark of one.

    >>> spoken("Ġred", "Ġ"), spoken("red", "Ġ")
    (' red', 'red')
    """
    return f" {word.removeprefix(mark)}" if mark and word.startswith(mark) else word
