"""From judged answers to the numbers that papers print."""

import pytest

from mllm.evaluation.scorers.registry import BENCHMARKS, MME_COGNITION, MME_PERCEPTION, scores_of_questions


def line(number: object, reference: str, said: str | None, *, kind: str | None = None, **meta) -> dict:
    values = {"id": str(number), "kind": kind, "references": [reference], "meta": meta}
    return values | ({"error": {"kind": "missing", "reason": "x"}} if said is None else {"hypothesis": said})


def test_mmbench_is_right_only_in_all_rotations() -> None:
    options = ["x", "y"]
    lines = [
        line(7, "A", "A", options=options, index=7),
        line(1000007, "B", "B. y", options=options, index=1000007),
        line(8, "A", "A", options=options, index=8),
        line(1000008, "B", "A", options=options, index=1000008),
        line(9, "A", "A", options=options, index=9),
        line(1000009, "B", None, options=options, index=1000009),
        line(10, "A", "what?", options=options, index=10),
    ]
    total = BENCHMARKS["mmbench"].score(lines)
    assert scores_of_questions(BENCHMARKS["mmbench"], lines) == {"7": 1, "8": 0, "9": 0, "10": 0}
    assert (total.value, total.details) == (0.25, {"num_unread": 1})


def test_mme_adds_accuracy_and_pairs_over_subtasks() -> None:
    lines = [
        line("a1", "yes", "Yes", kind="color", image="a"),
        line("a2", "no", "No.", kind="color", image="a"),
        line("b1", "yes", "Yes", kind="color", image="b"),
        line("b2", "no", "maybe", kind="color", image="b"),
        line("c1", "yes", "no", kind="text_translation", image="c"),
        line("c2", "no", None, kind="text_translation", image="c"),
    ]
    total = BENCHMARKS["mme"].score(lines)
    assert total.details == {"perception": 0.75 + 0.5, "cognition": 0.0, "num_unread": 1}
    assert total.value == 1.25
    color = BENCHMARKS["mme"].score(lines[:4])
    assert (color.details["accuracy"], color.details["accuracy_plus"], color.value) == (0.75, 0.5, 1.25)
    assert sum(above for above, _ in color.parts) / sum(below for _, below in color.parts) == color.value
    assert (len(MME_PERCEPTION), len(MME_COGNITION)) == (10, 4)


def test_pope_is_the_mean_f1_of_its_categories_and_failures_are_wrong() -> None:
    lines = [
        line(1, "yes", "yes", kind="random"),
        line(2, "no", "no", kind="random"),
        line(1, "yes", "no", kind="popular"),
        line(2, "no", "yes", kind="popular"),
        line(3, "yes", "yes", kind="popular"),
        line(4, "no", None, kind="popular"),
    ]
    total = BENCHMARKS["pope"].score(lines)
    assert total.value == pytest.approx((1 + 2 / 5) / 2)  # popular: 1 right yes, 2 wrong, 1 missed
    one = BENCHMARKS["pope"].score(lines[2:])
    assert one.value == pytest.approx(2 / 5)
    assert sum(above for above, _ in one.parts) / sum(below for _, below in one.parts) == pytest.approx(2 / 5)
    assert one.details["yes_ratio"] == 0.75


def test_what_a_server_judges_has_no_number_and_what_failed_is_wrong() -> None:
    known = {"id": "1", "kind": None, "references": ["red"] * 10, "meta": {}, "hypothesis": "Red"}
    failed = {key: value for key, value in known.items() if key != "hypothesis"} | {"id": "2", "error": {}}
    assert BENCHMARKS["vqav2"].score([known, failed]).value == 0.5
    assert BENCHMARKS["vqav2"].score([{**known, "references": []}]).value is None
    assert BENCHMARKS["vqav2"].score([]).value is None


def test_one_line_without_a_reference_is_left_out_and_counted() -> None:
    lines = [line(number, "red", said) for number, said in enumerate(("red", "blue", "red"))]
    unknown = {**line(9, "", "red"), "references": []}
    total = BENCHMARKS["gqa"].score([*lines, unknown])
    assert (total.value, total.details) == (2 / 3, {"num_unjudged": 1})
    assert len(total.parts) == 3
    assert "num_unjudged" not in BENCHMARKS["gqa"].score(lines).details


@pytest.mark.parametrize("written", [str.lower, str.upper, str.title])
def test_labels_are_the_same_in_any_case(written) -> None:
    rows = [(1, "yes", "Yes", "a"), (2, "no", "No", "a"), (3, "yes", "no", "b"), (4, "no", None, "b")]
    for name, facts in (("pope", {}), ("mme", {"image": "x"})):
        lines = [line(number, written(label), said, kind=kind, **facts) for number, label, said, kind in rows]
        plain = [line(number, label, said, kind=kind, **facts) for number, label, said, kind in rows]
        assert BENCHMARKS[name].score(lines) == BENCHMARKS[name].score(plain)
        assert scores_of_questions(BENCHMARKS[name], lines) == {"1": 1, "2": 1, "3": 0, "4": 0}


def test_mmmu_and_letters_count_what_could_not_be_read() -> None:
    open_one = line(1, "24", "it is 24", options=[])
    guessed = [line(number, "A", "hm", options=["x", "y"]) for number in range(20)]
    total = BENCHMARKS["mmmu"].score([open_one, *guessed])
    assert total.details == {"num_unread": 20}
    assert 1 / 21 < total.value < 1
    assert (
        BENCHMARKS["seedbench"].score([line(1, "A", "A. x", options=["x"], data_type="image")]).value == 0
    )  # the bare letter only
    assert BENCHMARKS["scienceqa"].score([line(1, "A", "A. x", options=["x"])]).value == 1


def test_facts_that_are_missing_are_named() -> None:
    with pytest.raises(ValueError, match=r"meta\.options is missing"):
        BENCHMARKS["mmbench"].check(["A"], {})
    with pytest.raises(ValueError, match="3 answers; TextVQA has 10"):
        BENCHMARKS["textvqa"].check(["a"] * 3, {})
