"""Reads which option an answer to a multiple-choice question names, as LLaVA's scripts, SEED-Bench and MMMU do.

Knows strings. Does not know files or samples.
"""

import hashlib
import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SAID = re.compile(r"The answer is ([A-Z]).")
_NUM_LLAVA_LETTERS = 5
"""LLaVA's script takes A to E for a letter, however many options a question has."""
_EDGES = (",", ".", "!", "?", ";", ":", "'")
_MIN_WORDS_TO_QUOTE = 6
"""MMMU looks for the words of an option only in longer answers."""


def llava_letter(answer: str, num_options: int) -> str | None:
    """Reads the option by the rules of LLaVA for ScienceQA: "B", "B. a cat" or one "The answer is B."; None otherwise.

    Any sign may follow the letter in the third form, but one must. A letter beyond the options is what was answered
    all the same: it is returned, names no option and is as wrong as None. What stands behind it is not looked at.
    """
    answer = answer.strip()
    known = LETTERS[: max(num_options, _NUM_LLAVA_LETTERS)]
    if len(answer) == 1 and answer in known:
        return answer
    if len(answer) >= 3 and answer[0] in known and answer[1:3] == ". ":
        return answer[0]
    said = _SAID.findall(answer)
    return said[0] if len(said) == 1 else None


def mmmu_letter(answer: str, options: Sequence[str], *, sample_id: str) -> tuple[str, bool]:
    """Reads the option by the rules of MMMU, and tells whether it was found rather than drawn by lot.

    In this order: "(B)", then " B ", then in answers of more than five words the text of an option; of several the one
    that stands last. Where nothing is found the official code draws an option at random; here the draw is a function
    of the sample's id.
    """
    for edge in _EDGES:
        answer = answer.strip(edge)
    text, letters = f" {answer} ", LETTERS[: len(options)]
    for form in ("({})", " {} "):
        starts = {letter: text.rfind(form.format(letter)) for letter in letters}
        if positions := {letter: start for letter, start in starts.items() if start >= 0}:
            return max(positions, key=lambda letter: positions[letter]), True
    if len(text.split()) >= _MIN_WORDS_TO_QUOTE:
        low = text.lower()
        positions = {a: low.rfind(option.lower()) for a, option in zip(letters, options, strict=True)}
        if positions := {letter: start for letter, start in positions.items() if start >= 0}:
            return max(positions, key=lambda letter: positions[letter]), True
    lot = int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8])
    return letters[lot % len(letters)], False
