"""Compares short answers as VQAv2, VizWiz and TextVQA do: processing, then agreement among annotators.

    EvalAI    lower case, "'s" apart, punctuation, full stops, number words, articles, contractions; TextVQA and VizWiz
    VQA eval  the same without the first two, and nothing at all where all annotators said the same; VQAv2

Knows strings. Does not know files or samples.

Quirks of the official code that are kept because scores depend on them: punctuation becomes nothing when a blank stands
beside any occurrence of that sign and a blank otherwise, only the first 32 full stops go, any full stop before a digit
stays, some contractions are written with capitals and so never match, and "somebody'd" loses its apostrophe.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

NUM_ANNOTATORS = 10
NUM_AGREEING = 3
MAX_KEPT_TEXTS = 2**17
"""The same references are compared at every budget."""
MAX_FULL_STOPS = 32
"""re.UNICODE is 32, and stands where the official call takes a number of replacements."""

ARTICLES = frozenset(("a", "an", "the"))
NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")

_FULL_FORMS = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll
    how's I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't
    should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd
    there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll
    you're you've"""
_DOUBLE_FORMS = """couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've
    someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've"""
"""Known with either apostrophe missing, not with both."""
_ODD_FORMS = {
    "let's": "let's",
    "she's": "she's",
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


def _contractions() -> dict[str, str]:
    forms = {form.replace("'", ""): form for form in _FULL_FORMS.split()}
    for form in _DOUBLE_FORMS.split():
        first, second, third = form.split("'")
        forms |= {f"{first}{second}'{third}": form, f"{first}'{second}{third}": form}
    return forms | _ODD_FORMS


CONTRACTIONS = _contractions()


@lru_cache(MAX_KEPT_TEXTS)
def evalai_answer(text: str) -> str:
    """Processes an answer as EvalAI does; LLaVA prepares submissions and scores TextVQA with it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_eval_answer(text)


@lru_cache(MAX_KEPT_TEXTS)
def vqa_eval_answer(text: str) -> str:
    """Processes an answer as the official code of VQA does: punctuation, then numbers, articles and contractions."""
    return _plain_words(_without_punctuation(_on_one_line(text)))


def agreement(references: Sequence[str], answer: str) -> float:
    """Takes the mean over annotators of min(matches among the others / 3, 1); of ten 1 to 4 give 0.3, 0.6, 0.9, 1."""
    matches = [reference == answer for reference in references]
    total = sum(matches)
    return sum(min(1.0, (total - match) / NUM_AGREEING) for match in matches) / len(matches)


def evalai_accuracy(references: Sequence[str], answer: str) -> float:
    """Computes the accuracy of TextVQA and VizWiz: everything is processed.

    Raises:
        ValueError: other than ten annotators.
    """
    _check_annotators(references)
    return agreement([evalai_answer(reference) for reference in references], evalai_answer(answer))


def vqa_eval_accuracy(references: Sequence[str], answer: str) -> float:
    """Computes the accuracy of VQAv2 of what is submitted, which is what EvalAI's processor leaves of the answer.

    Where all annotators said the same, neither side is processed again.

    Raises:
        ValueError: other than ten annotators.
    """
    _check_annotators(references)
    submitted, processed = evalai_answer(answer), [_on_one_line(reference) for reference in references]
    if len(set(processed)) > 1:
        submitted, processed = vqa_eval_answer(submitted), [vqa_eval_answer(reference) for reference in processed]
    return agreement(processed, submitted)


def _check_annotators(references: Sequence[str]) -> None:
    if len(references) != NUM_ANNOTATORS:
        raise ValueError(f"{len(references)} answers of annotators; this accuracy is defined on {NUM_ANNOTATORS}")


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    made = text
    for sign in _SIGNS:
        goes = has_number or f"{sign} " in text or f" {sign}" in text
        made = made.replace(sign, "" if goes else " ")
    return _FULL_STOP.sub("", made, count=MAX_FULL_STOPS)


def _plain_words(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
