"""Scores open answers: MMMU's numbers and phrases, DocVQA's edit similarity, ChartQA's tolerance, GQA's match.

Knows strings. Does not know files or samples.
"""

import re
from collections.abc import Sequence

ANLS_THRESHOLD = 0.5
TOLERANCE = 0.05
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def gqa_match(reference: str, answer: str) -> float:
    """Returns 1 where the answer in lower case without its last full stops is the reference, as LLaVA hands it in."""
    return float(answer.strip().rstrip(".").lower() == reference.lower())


def anls(references: Sequence[str], answer: str) -> float:
    """Returns DocVQA's 1 - edit distance / length to the nearest reference, in lower case; 0 below one half.

    As in the official code, exactly one half is kept, and the length is that of the longer text as it was written:
    blanks that do not count as edits count there.
    """
    best = max(1.0 - _distance_share(reference, answer) for reference in references)
    return best if best >= ANLS_THRESHOLD else 0.0


def relaxed_match(reference: str, answer: str) -> float:
    """Returns 1 for a number within 5 % of ChartQA's reference or a text that equals it in lower case, else 0.

    "12%" is 0.12, and so is not within reach of "12". As in the official code, a reference of 0 is compared as text,
    and blanks around a text count.
    """
    wanted, answered = _float(reference), _float(answer)
    if answered is not None and wanted:
        return float(abs(answered - wanted) / abs(wanted) <= TOLERANCE)
    return float(answer.lower() == reference.lower())


def mmmu_open_match(references: Sequence[str], answer: str) -> float:
    """Returns 1 where a number of the answer is a reference, or a phrase of it holds one, else 0."""
    wanted: set[str | float] = {form for reference in references for form in _forms(reference)}
    texts = [form for form in wanted if isinstance(form, str)]
    for form in mmmu_open_answers(answer):
        if isinstance(form, str) and any(text in form for text in texts):
            return 1.0
        if not isinstance(form, str) and form in wanted:
            return 1.0
    return 0.0


def mmmu_open_answers(answer: str) -> set[str | float]:
    """Lists what an open answer may say: its key phrases and the numbers in them, rounded to two digits."""
    phrases = _key_phrases(answer)
    numbers = [number for phrase in phrases for pattern in _NUMBERS for number in pattern.findall(phrase)]
    return {form for text in (*phrases, *numbers) for form in _forms(text)}


def _key_phrases(answer: str) -> list[str]:
    """Finds the shortest rest after an indicator such as "is ", by line; the whole answer where there is none.

    The official code lowers the text before it splits sentences at capitals, so only line breaks part it.
    """
    whole = answer.strip().strip(".").lower()
    lines = whole.split("\n")
    phrases = []
    for number, line in enumerate(lines):
        indicators = (*_INDICATORS, "=") if number == len(lines) - 1 else _INDICATORS
        rests = [line.split(indicator)[-1].strip() for indicator in indicators if indicator in line]
        shortest = _shortest(rests)
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            phrases.append(shortest)
    return phrases or [whole]


def _shortest(rests: Sequence[str]) -> str | None:
    """Finds the first of the shortest; an empty one gives way to whatever follows it, as in the official code."""
    best: str | None = None
    for rest in rests:
        if not best or len(rest) < len(best):
            best = rest
    return best


def _forms(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        low = text.lower()
        return [f" {low}", f"{low} "] if len(low) == 1 else [low]


def _float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _distance_share(reference: str, answer: str) -> float:
    """Returns the edit distance with white space collapsed over the longer raw length. Two empty texts agree."""
    one, two = (" ".join(text.lower().split()) for text in (reference, answer))
    # Upper case may be longer ("ß" is "SS"), and it is upper case whose length the official code takes.
    length = max(len(reference.upper()), len(answer.upper()))
    return edit_distance(one, two) / length if length else 0.0


def edit_distance(one: str, two: str) -> int:
    """Counts the insertions, deletions and substitutions between two texts."""
    row = list(range(len(two) + 1))
    for number, character in enumerate(one, start=1):
        before, row = row, [number]
        for column, other in enumerate(two, start=1):
            row.append(min(before[column] + 1, row[-1] + 1, before[column - 1] + (character != other)))
    return row[-1]
