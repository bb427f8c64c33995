"""Computes metrics: word and character error rates, VQA accuracies, and how sure one can be of them.

Knows strings and counts. Does not know torch, files, models or budgets.

Error rates follow the audio-visual speech papers: both texts are lower-cased and split at white space, errors are
summed over the whole corpus and divided by its reference words. Both are in NFC, so that one text in two spellings of
Unicode is one text. There is no other normaliser; a mean of rates per utterance is something else and is not computed
here.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

NUM_BOOTSTRAP_RESAMPLES = 1000
CONFIDENCE = 0.95
MIN_ANNOTATORS = 4
"""With fewer answers than this the leave-one-out accuracy cannot reach 1."""


@dataclass(frozen=True)
class ErrorCounts:
    """Edits that turn references into hypotheses, and the units (words or characters) of the references."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_units: int = 0

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        return ErrorCounts(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.reference_units + other.reference_units,
        )

    @property
    def errors(self) -> int:
        """Sums all edits."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float | None:
        """Returns errors per reference unit, above 1 when much was inserted; None when the references are empty."""
        return self.errors / self.reference_units if self.reference_units else None


def word_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Counts word errors of one utterance. With an empty reference each word of the hypothesis is an insertion."""
    import jiwer

    counts = jiwer.process_words(_plain(reference), _plain(hypothesis))
    units = counts.hits + counts.substitutions + counts.deletions
    return ErrorCounts(counts.substitutions, counts.deletions, counts.insertions, units)


def character_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Counts character errors of one utterance; the single space between words counts as a character, as in jiwer."""
    import jiwer

    counts = jiwer.process_characters(_plain(reference), _plain(hypothesis))
    units = counts.hits + counts.substitutions + counts.deletions
    return ErrorCounts(counts.substitutions, counts.deletions, counts.insertions, units)


def corpus(counts: Iterable[ErrorCounts]) -> ErrorCounts:
    """Adds up the counts of a whole corpus."""
    return sum(counts, ErrorCounts())


def bootstrap_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    seed: int,
    num_resamples: int = NUM_BOOTSTRAP_RESAMPLES,
    confidence: float = CONFIDENCE,
) -> tuple[float, float] | None:
    """Computes the percentile interval of sum(numerators) / sum(denominators) over samples drawn with replacement.

    Args:
        numerators, denominators: one of each per sample, e.g. its errors and its reference words.
        seed: the same seed gives the same interval.

    Returns:
        (low, high), or None when the denominators sum to 0.

    Raises:
        ValueError: lists of different lengths, or a confidence outside (0, 1).
    """
    if len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} numerators for {len(denominators)} denominators; one of each per sample")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1, such as {CONFIDENCE}")
    above, below = np.asarray(numerators, float), np.asarray(denominators, float)
    if below.sum() == 0:
        return None
    generator = np.random.default_rng(seed)
    rates = []
    for _ in range(num_resamples):
        resampled = generator.integers(len(above), size=len(above))
        if (units := below[resampled].sum()) > 0:  # nothing but empty references has no rate
            rates.append(above[resampled].sum() / units)
    low, high = np.quantile(rates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def exact_match(reference: str, answer: str) -> float:
    """Returns 1 when both agree after GQA's rule (lower case, no final full stop) and with single spaces, else 0."""
    return float(_short_answer(reference) == _short_answer(answer))


def soft_accuracy(references: Sequence[str], answer: str) -> float:
    """Computes VQA accuracy against several annotators: the mean of min(matches among the others / 3, 1).

    Of ten annotators 1, 2, 3, 4 that agree give 0.3, 0.6, 0.9, 1. The official processing of punctuation, articles and
    number words is not applied.

    Raises:
        ValueError: so few annotators that no answer could be right.
    """
    if len(references) < MIN_ANNOTATORS:
        raise ValueError(
            f"{len(references)} answers are too few for the leave-one-out VQA accuracy; give one, or at least "
            f"{MIN_ANNOTATORS}"
        )
    answered = _short_answer(answer)
    matches = [_short_answer(reference) == answered for reference in references]
    total = sum(matches)
    return sum(min((total - match) / 3, 1.0) for match in matches) / len(matches)


def vqa_accuracy(references: Sequence[str], answer: str) -> float:
    """Computes `exact_match` for one reference, `soft_accuracy` for several.

    Raises:
        ValueError: no reference, or too few for the soft accuracy.
    """
    if len(references) == 1:
        return exact_match(references[0], answer)
    return soft_accuracy(references, answer)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text.lower()).split())


def _short_answer(text: str) -> str:
    return _plain(text).rstrip(".").rstrip()
