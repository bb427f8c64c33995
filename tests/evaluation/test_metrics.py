"""What the metrics promise: counts one can do by hand, corpus rates, and intervals that a seed fixes."""

import subprocess
import sys

import pytest

from mllm.evaluation.metrics import (
    ErrorCounts,
    bootstrap_interval,
    character_errors,
    corpus,
    exact_match,
    soft_accuracy,
    vqa_accuracy,
    word_errors,
)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("place blue at f two now", "place blue at f two now", ErrorCounts(0, 0, 0, 6)),
        ("place blue at f two now", "place red f two now please", ErrorCounts(1, 1, 1, 6)),
        ("Set  White\tin A", "set white in a", ErrorCounts(0, 0, 0, 4)),
        ("bin green", "", ErrorCounts(0, 2, 0, 2)),
        ("", "bin green", ErrorCounts(0, 0, 2, 0)),
        ("", "", ErrorCounts(0, 0, 0, 0)),
        ("don't", "dont", ErrorCounts(1, 0, 0, 1)),  # nothing but case and white space is normalised
    ],
)
def test_word_errors_are_those_counted_by_hand(reference: str, hypothesis: str, expected: ErrorCounts) -> None:
    assert word_errors(reference, hypothesis) == expected


def test_two_spellings_of_one_text_in_unicode_are_no_error() -> None:
    composed, apart = "caf\u00e9 \u0915\u093c", "cafe\u0301 \u0958"  # each of the two spellings in one of them
    for errors in (word_errors, character_errors):
        assert errors(composed, apart).errors == 0
        assert errors(apart, composed).errors == 0
    assert character_errors(apart, composed).reference_units == len("caf\u00e9 \u0915\u093c")


def test_character_errors_count_the_space_between_words() -> None:
    assert character_errors("AB  cd", "ab cd") == ErrorCounts(0, 0, 0, 5)
    assert character_errors("ab cd", "abcd") == ErrorCounts(0, 1, 0, 5)
    assert character_errors("cat", "cut it") == ErrorCounts(1, 0, 3, 3)


def test_the_rate_of_a_corpus_is_no_mean_of_rates() -> None:
    short = word_errors("a", "b")  # rate 1
    long = word_errors("a b c d e f g h i", "a b c d e f g h i")  # rate 0
    assert corpus([short, long]).rate == pytest.approx(1 / 10)
    assert corpus([]).rate is None
    assert word_errors("", "a b").rate is None
    assert corpus([word_errors("", "a b"), word_errors("a", "a")]).rate == 2.0


def test_an_interval_holds_the_rate_and_depends_on_the_seed_alone() -> None:
    errors, words = [0, 1, 0, 3, 2, 0, 1, 0] * 10, [6] * 80
    low, high = bootstrap_interval(errors, words, seed=0) or (1, 0)
    assert low < sum(errors) / sum(words) < high
    assert bootstrap_interval(errors, words, seed=0) == (low, high)
    assert bootstrap_interval(errors, words, seed=1) != (low, high)
    narrow = bootstrap_interval(errors * 16, words * 16, seed=0) or (0, 1)
    # Sixteen times the samples make the interval a quarter as wide.
    assert narrow[1] - narrow[0] == pytest.approx((high - low) / 4, rel=0.25)


def test_an_interval_of_nothing_or_of_no_spread() -> None:
    assert bootstrap_interval([1.0], [0], seed=0) is None
    assert bootstrap_interval([], [], seed=0) is None
    assert bootstrap_interval([1, 1, 1], [2, 2, 2], seed=0) == (0.5, 0.5)
    with pytest.raises(ValueError, match="2 numerators for 1 denominators"):
        bootstrap_interval([1, 2], [1], seed=0)
    with pytest.raises(ValueError, match="confidence is 95"):
        bootstrap_interval([1], [1], seed=0, confidence=95)


@pytest.mark.parametrize(("matching", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_accuracy_leaves_one_annotator_out(matching: int, expected: float) -> None:
    references = ["two"] * matching + [f"other {i}" for i in range(10 - matching)]
    assert soft_accuracy(references, "Two.") == pytest.approx(expected)


def test_an_exact_match_minds_neither_case_nor_a_final_stop() -> None:
    assert exact_match("light blue", "  Light  blue.") == 1.0
    assert exact_match("blue", "light blue") == 0.0
    assert vqa_accuracy(["red"], "red") == 1.0
    assert vqa_accuracy(["red"] * 4, "red") == 1.0


@pytest.mark.parametrize("references", [[], ["a", "b"], ["a", "a", "a"]])
def test_too_few_annotators_are_refused(references: list[str]) -> None:
    with pytest.raises(ValueError, match="too few for the leave-one-out VQA accuracy"):
        vqa_accuracy(references, "a")


def test_metrics_need_no_torch() -> None:
    code = "import sys, mllm.evaluation.metrics as m; m.word_errors('a', 'b'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
