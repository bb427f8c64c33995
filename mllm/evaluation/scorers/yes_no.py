"""Reads answers of yes or no as POPE and MME do, and counts what they count.

Knows strings and counts. Does not know files or samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass


def pope_answer(text: str) -> str:
    """Applies POPE's rule: "no" where the first sentence holds the word No, no or not; else "yes", whatever it says."""
    first = text.split(".")[0].replace(",", "")
    return "no" if {"No", "no", "not"} & set(first.split(" ")) else "yes"


def mme_answer(text: str) -> str:
    """Applies MME's rule: "yes" or "no" where the first four characters hold it, in any case; else "other"."""
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


@dataclass(frozen=True)
class Detection:
    """The counts of yes and no, "yes" being positive."""

    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int

    @classmethod
    def of(cls, labels: Sequence[str], answers: Sequence[str]) -> "Detection":
        """Counts answers, "yes" or "no", against labels in the same order."""
        pairs = list(zip(labels, answers, strict=True))
        return cls(*(pairs.count(pair) for pair in (("yes", "yes"), ("no", "yes"), ("no", "no"), ("yes", "no"))))

    @property
    def total(self) -> int:
        """Counts all answers."""
        return self.true_positives + self.false_positives + self.true_negatives + self.false_negatives

    @property
    def rates(self) -> dict[str, float]:
        """Computes accuracy, precision, recall, f1 and yes_ratio, the part of answers that are "yes"; 0 / 0 is 0."""
        yes, positives = self.true_positives + self.false_positives, self.true_positives + self.false_negatives
        return {
            "accuracy": _share(self.true_positives + self.true_negatives, self.total),
            "precision": _share(self.true_positives, yes),
            "recall": _share(self.true_positives, positives),
            "f1": _share(2 * self.true_positives, yes + positives),
            "yes_ratio": _share(yes, self.total),
        }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
