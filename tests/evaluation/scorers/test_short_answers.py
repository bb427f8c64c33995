"""What short answers are worth: vectors of the official processors, and cases worked by hand."""

import pytest

from mllm.evaluation.scorers.multiple_choice import llava_letter, mmmu_letter
from mllm.evaluation.scorers.open_answers import anls, edit_distance, gqa_match, mmmu_open_match, relaxed_match
from mllm.evaluation.scorers.short_answers import (
    agreement,
    evalai_accuracy,
    evalai_answer,
    vqa_eval_accuracy,
    vqa_eval_answer,
)
from mllm.evaluation.scorers.yes_no import Detection, mme_answer, pope_answer

# Of the processor that LLaVA and TextVQA use, as it ran.
VECTORS = {
    "Yes.": "yes",
    "The Cat's hat": "cat 's hat",
    "2.5": "2.5",
    "1,000": "1000",
    "two dogs": "2 dogs",
    "none": "0",
    "It's 3.0 kg.": "it 's 3.0 kg",
    "a/b": "b",
    "dont know": "don't know",
    "U.S.A.": "usa",
    "10:30 a.m.": "10:30 am",
    "red-and-white": "red and white",
    "50%": "50%",
    "$5.00": "$5.00",
    "the": "",
    "3 - 4": "3 4",
    "let's go": "let 's go",
    "theyre": "they're",
    "OCR_TEXT": "ocr text",
    "x.y": "xy",
    "5.": "5",
    "....": "",
}


@pytest.mark.parametrize(("text", "processed"), VECTORS.items())
def test_answers_are_processed_as_evalai_does(text: str, processed: str) -> None:
    assert evalai_answer(text) == processed


def test_quirks_of_the_official_processing_are_kept() -> None:
    assert evalai_answer("." * 33) == "."  # a flag stands where a number of replacements belongs
    assert evalai_answer("a-b -c") == "ab c"  # one sign beside a blank takes all of its kind away, without a blank
    assert evalai_answer("im") == "im"  # "Im" is listed with a capital that no text has left
    assert evalai_answer("somebody'd") == "somebodyd"
    assert evalai_answer("couldnt've") == evalai_answer("couldn'tve") == "couldn't've"
    assert vqa_eval_answer("the cat's 1,000 e-mails") == "cat's 1000 emails"  # a comma in a number: nothing is a blank


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_annotators_are_left_out_one_at_a_time(agreeing: int, score: float) -> None:
    references = ["yes"] * agreeing + [f"no {number}" for number in range(10 - agreeing)]
    assert agreement(references, "yes") == pytest.approx(score)
    assert evalai_accuracy(references, "Yes.") == pytest.approx(score)


def test_vqav2_leaves_references_alone_that_all_agree() -> None:
    assert vqa_eval_accuracy(["two"] * 10, "two") == 0  # handed in as "2"
    assert vqa_eval_accuracy(["two"] * 9 + ["3"], "Two.") == 1
    assert evalai_accuracy(["two"] * 10, "two") == 1
    assert vqa_eval_accuracy(["cat's"] * 9 + ["dog's"], "the cat's") == 0  # "cat 's" was handed in
    with pytest.raises(ValueError, match="3 answers of annotators; this accuracy is defined on 10"):
        evalai_accuracy(["a"] * 3, "a")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" B ", "B"),
        ("B. a cat", "B"),
        ("The answer is B.", "B"),
        ("Well. The answer is B, surely", "B"),
        ("The answer is B", None),  # the pattern wants a sign after the letter
        ("The answer is A. The answer is B.", None),
        ("B.", None),  # three characters are wanted
        ("b", None),
        ("D", "D"),  # an answer, if to none of the three options
        ("E. four. The answer is B.", "E"),  # what stands behind a letter is not read, as in LLaVA's script
        ("F. four. The answer is B.", "B"),  # which knows the letters to E
        ("(B)", None),
        ("", None),
    ],
)
def test_letters_are_read_as_llava_does(answer: str, letter: str | None) -> None:
    assert llava_letter(answer, 3) == letter


def test_letters_are_read_as_mmmu_does() -> None:
    options = ["red apple", "green pear", "plum"]
    for answer, letter in {
        "(B)": "B",
        "B": "B",
        "'B'": "B",
        "(A) or rather (C)": "C",
        "A beats B here": "B",
        "(A) B": "A",  # brackets come first
        "I would say it is the Green Pear": "B",
        "first a red apple but then a plum": "C",
    }.items():
        assert mmmu_letter(answer, options, sample_id="x") == (letter, True)
    drawn = [mmmu_letter("green pear", options, sample_id=str(number)) for number in range(60)]  # too short to quote
    assert drawn == [mmmu_letter("green pear", options, sample_id=str(number)) for number in range(60)]
    assert {letter for letter, _ in drawn} == {"A", "B", "C"}
    assert not any(is_correct for _, is_correct in drawn)


@pytest.mark.parametrize(
    ("references", "answer", "right"),
    [
        (["24"], "The answer is 24.", 1),
        (["1,200"], "so the total = 1200.001", 1),
        (["0.333"], "1/3 is 0.33", 1),
        (["24"], "It is 25", 0),
        (["Paris", "the capital"], "it could be Paris", 1),
        (["Paris"], "it could be Paris in spring", 0),  # "is " of "Paris in" begins a shorter phrase
        (["paris"], "London", 0),
        (["x"], "the variable is x", 1),
        (["x"], "the answer must be exact", 0),  # single letters need a blank beside them
    ],
)
def test_open_answers_of_mmmu(references: list[str], answer: str, right: int) -> None:
    assert mmmu_open_match(references, answer) == right


def test_anls_counts_what_is_at_least_half_right() -> None:
    assert anls(["Hello World"], " hello  world ") == 1
    # The official code collapses blanks to count edits, and divides by the lengths of the texts as they were written.
    assert anls(["ab  cd"], "ab xx") == pytest.approx(1 - 2 / 6)
    assert anls(["ab cd"], "ab    cx  ") == pytest.approx(1 - 1 / 10)
    assert anls(["stra\u00dfe"], "strasse") == pytest.approx(1 - 2 / 7)
    assert anls(["stra\u00dfe"], "stra\u00dfa") == pytest.approx(1 - 1 / 7)  # "ß" is two letters in upper case
    assert anls(["abcd"], "abxx") == 0.5  # one half is kept by the official code
    assert anls(["abcd"], "axxx") == 0
    assert anls(["no", "abcde"], "abcdx") == 0.8
    assert anls(["a"], "") == 0
    assert edit_distance("kitten", "sitting") == 3


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("100", "105", 1),
        ("100", "105.1", 0),
        ("-100", "-95", 1),
        ("14%", "14%", 1),
        ("14", "14%", 0),  # 0.14
        ("0.14", "14%", 1),
        ("0", "0", 1),
        ("0", "0.0", 0),  # compared as text
        ("Yes", "yes", 1),
        ("2019", "two thousand", 0),
        ("0.0", "0%", 0),
        ("12 ", " 12.5", 1),
        ("Yes ", "yes", 0),  # the official code compares texts as they are
        ("12%\n", "0.12", 0),
        ("nan", "nan", 0),
        ("1e2", "96", 1),
    ],
)
def test_charts_are_read_with_tolerance(reference: str, answer: str, right: int) -> None:
    assert relaxed_match(reference, answer) == right


def test_gqa_takes_off_full_stops_and_capitals_only() -> None:
    assert [gqa_match("on the left", answer) for answer in ("On the left..", "the left", "on  the left")] == [1, 0, 0]
    assert gqa_match("Yes", "yes.") == 1  # a label of one's own data


def test_yes_and_no() -> None:
    said = {"No, it isn't.": "no", "no": "no", "There is not": "no", "NO": "yes", "I see none": "yes", "": "yes"}
    assert {text: pope_answer(text) for text in said} == said
    assert pope_answer("Yes. No.") == "yes"  # the first sentence counts
    assert [mme_answer(text) for text in ("Yes", "a no", "No.", "Hmm, yes", "know")] == [
        "yes",
        "no",
        "no",
        "other",
        "no",
    ]
    detection = Detection.of(["yes", "yes", "no", "no", "no"], ["yes", "no", "yes", "no", "no"])
    rates = {"accuracy": 0.6, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.4}
    assert detection.rates == rates
    assert Detection.of(["yes"], ["no"]).rates["precision"] == 0
