"""The benchmarks by name: how one answer is judged, how answers become the number that papers print, and where.

Knows lines of answers (`id`, `kind`, `references`, `meta`, and `hypothesis` or `error`). Does not know files or models.

What failed is wrong: it stays in the denominator. A line without references is judged by a server and not here; among
others that have some it is left out and counted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mllm.evaluation.scorers.multiple_choice import LETTERS, llava_letter, mmmu_letter
from mllm.evaluation.scorers.open_answers import anls, gqa_match, mmmu_open_match, relaxed_match
from mllm.evaluation.scorers.short_answers import NUM_ANNOTATORS, evalai_accuracy, vqa_eval_accuracy
from mllm.evaluation.scorers.yes_no import Detection, mme_answer, pope_answer

Line = Mapping[str, Any]
MME_COGNITION = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
MME_PERCEPTION = (
    "OCR",
    "artwork",
    "celebrity",
    "color",
    "count",
    "existence",
    "landmark",
    "position",
    "posters",
    "scene",
)
MMBENCH_ROTATION = 1_000_000
"""Row index + k million is the k-th rotation of a question."""


@dataclass(frozen=True)
class Total:
    """A number over lines; `parts` are numerator and denominator of each unit where it is the ratio of their sums."""

    value: float | None
    parts: list[tuple[float, float]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A number of the table: its title, its key in a row of results, and what a perfect model gets.

    A second number on the same questions is not `in_average`.
    """

    title: str
    key: str = "value"
    full: float = 1.0
    in_average: bool = True


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    worth: of an answer that is there, 0 to 1. unit: what counts as one question; it is worth its worst answer.
    references: the numbers of references that are allowed, None for any but none. reads: whether an answer could be
    read at all, where that is asked.
    """

    metric: str
    columns: tuple[Column, ...]
    worth: Callable[[Line], float]
    unit: Callable[[Line], str] = lambda line: line["id"]
    total: Callable[["Benchmark", Sequence[Line]], Total] = lambda own, lines: mean_of_units(own, lines)
    num_references: int | None = 1
    meta: tuple[str, ...] = ()
    reads: Callable[[Line], bool] | None = None

    def judge(self, line: Line) -> float:
        """What a line is worth; 0 where it failed."""
        return 0.0 if "error" in line else self.worth(line)

    def score(self, lines: Sequence[Line]) -> Total:
        """Compute the number of the lines that have references; None where none has, as where a server judges."""
        judged = [line for line in lines if line["references"]]
        if not judged:
            return Total(None)
        total = self.total(self, judged)
        if self.reads is not None:
            total.details["num_unread"] = sum("error" not in line and not self.reads(line) for line in judged)
        if len(judged) < len(lines):
            total.details["num_unjudged"] = len(lines) - len(judged)
        return total

    def check(self, references: Sequence[str], meta: Mapping[str, Any]) -> None:
        """Raises: ValueError for what could not be judged: other numbers of answers, or facts that are not there."""
        if missing := [key for key in self.meta if key not in meta]:
            raise ValueError(f"meta.{missing[0]} is missing")
        if references and self.num_references not in (None, len(references)):
            raise ValueError(f"{len(references)} answers; {self.columns[0].title} has {self.num_references}")


def mean_of_units(own: Benchmark, lines: Sequence[Line]) -> Total:
    """The mean over units of their worst answers."""
    worths = list(worths_of_units(own, lines).values())
    return Total(sum(worths) / len(worths), [(worth, 1) for worth in worths])


def worths_of_units(own: Benchmark, lines: Sequence[Line]) -> dict[str, float]:
    """What each question is worth."""
    worths: dict[str, float] = {}
    for line in lines:
        unit = own.unit(line)
        worths[unit] = min(own.judge(line), worths.get(unit, 1.0))
    return worths


def _pope_total(own: Benchmark, lines: Sequence[Line]) -> Total:
    """F1 and its companions, of a category, or their means over categories; a failed answer is the wrong one."""
    found = [_detection([line for line in lines if line["kind"] == kind]) for kind in _kinds(lines)]
    means = {key: sum(one.rates[key] for one in found) / len(found) for key in found[0].rates}
    if len(found) > 1:
        return Total(means["f1"], details=means)
    parts = [_f1_part(line) for line in lines]
    return Total(means["f1"], parts, means)


def _label(line: Line) -> str:
    """The label "yes" or "no"; people write them in any case."""
    return line["references"][0].strip().lower()


def _pope_said(line: Line) -> str:
    if "error" in line:
        return "no" if _label(line) == "yes" else "yes"
    return pope_answer(line["hypothesis"])


def _detection(lines: Sequence[Line]) -> Detection:
    return Detection.of([_label(line) for line in lines], [_pope_said(line) for line in lines])


def _f1_part(line: Line) -> tuple[float, float]:
    label, said = _label(line), _pope_said(line)
    return 2.0 * (label == said == "yes"), float(label == "yes") + float(said == "yes")


def _mme_total(own: Benchmark, lines: Sequence[Line]) -> Total:
    """Accuracy plus the share of images with all answers right, summed over subtasks; in hundreds, 20 + 8 at most."""
    scores: dict[Any, tuple[float, float]] = {}
    parts: list[tuple[float, float]] = []
    for kind in _kinds(lines):
        mine = [line for line in lines if line["kind"] == kind]
        images: dict[str, list[float]] = {}
        for line in mine:
            images.setdefault(line["meta"]["image"], []).append(own.judge(line))
        accuracy = sum(own.judge(line) for line in mine) / len(mine)
        plus = sum(min(worths) for worths in images.values()) / len(images)
        scores[kind] = (accuracy, plus)
        parts = [(sum(worths) / len(worths) + min(worths), 1.0) for worths in images.values()]
    sums = {kind: sum(score) for kind, score in scores.items()}
    details: dict[str, Any] = {
        name: sum(value for kind, value in sums.items() if kind in kinds) if set(sums) & set(kinds) else None
        for name, kinds in (("perception", MME_PERCEPTION), ("cognition", MME_COGNITION))
    }
    if len(scores) == 1:
        details["accuracy"], details["accuracy_plus"] = next(iter(scores.values()))
    return Total(sum(sums.values()), parts if len(scores) == 1 else [], details)


def _seed_total(own: Benchmark, lines: Sequence[Line]) -> Total:
    """Accuracy over all questions, and over those on images and those on videos."""
    total = mean_of_units(own, lines)
    for name in ("image", "video"):
        mine = [own.judge(line) for line in lines if line["meta"]["data_type"] == name]
        total.details[name] = sum(mine) / len(mine) if mine else None
    return total


def _kinds(lines: Sequence[Line]) -> list[Any]:
    return list(dict.fromkeys(line["kind"] for line in lines))


def _letter(line: Line) -> str | None:
    return llava_letter(line["hypothesis"], len(line["meta"]["options"]))


def _names_right_letter(line: Line) -> float:
    return float(_letter(line) == line["references"][0])


def _reads_letter(line: Line) -> bool:
    return (_letter(line) or " ") in LETTERS[: len(line["meta"]["options"])]


def _mmmu_worth(line: Line) -> float:
    if not line["meta"]["options"]:
        return mmmu_open_match(line["references"], line["hypothesis"])
    letter, _ = mmmu_letter(line["hypothesis"], line["meta"]["options"], sample_id=line["id"])
    return float(letter == line["references"][0])


def _mmmu_reads(line: Line) -> bool:
    options = line["meta"]["options"]
    return not options or mmmu_letter(line["hypothesis"], options, sample_id=line["id"])[1]


def _mmbench_unit(line: Line) -> str:
    return str(line["meta"]["index"] % MMBENCH_ROTATION)


def _mme_worth(line: Line) -> float:
    return float(mme_answer(line["hypothesis"]) == _label(line))


BENCHMARKS: dict[str, Benchmark] = {
    "vqav2": Benchmark(
        "accuracy",
        (Column("VQAv2"),),
        lambda line: vqa_eval_accuracy(line["references"], line["hypothesis"]),
        num_references=NUM_ANNOTATORS,
    ),
    "gqa": Benchmark("accuracy", (Column("GQA"),), lambda line: gqa_match(line["references"][0], line["hypothesis"])),
    "textvqa": Benchmark(
        "accuracy",
        (Column("TextVQA"),),
        lambda line: evalai_accuracy(line["references"], line["hypothesis"]),
        num_references=NUM_ANNOTATORS,
    ),
    "pope": Benchmark(
        "f1",
        (Column("POPE (F1)"),),
        lambda line: float(pope_answer(line["hypothesis"]) == _label(line)),
        total=_pope_total,
    ),
    "scienceqa": Benchmark(
        "accuracy", (Column("SQA-IMG"),), _names_right_letter, meta=("options",), reads=_reads_letter
    ),
    "mme": Benchmark(
        "mme",
        (Column("MME-P", "perception", 20.0), Column("MME-C", "cognition", 8.0)),
        _mme_worth,
        total=_mme_total,
        meta=("image",),
        reads=lambda line: mme_answer(line["hypothesis"]) != "other",
    ),
    "mmbench": Benchmark(
        "circular accuracy",
        (Column("MMBench"),),
        _names_right_letter,
        unit=_mmbench_unit,
        meta=("options", "index"),
        reads=_reads_letter,
    ),
    "vizwiz": Benchmark(
        "accuracy",
        (Column("VizWiz"),),
        lambda line: evalai_accuracy(line["references"], line["hypothesis"]),
        num_references=NUM_ANNOTATORS,
    ),
    "seedbench": Benchmark(
        "accuracy",
        (Column("SEED"), Column("SEED-IMG", "image", in_average=False)),
        lambda line: float(line["hypothesis"].strip() == line["references"][0]),
        total=_seed_total,
        meta=("options", "data_type"),
        reads=lambda line: line["hypothesis"].strip() in LETTERS[: len(line["meta"]["options"])],
    ),
    "ai2d": Benchmark("accuracy", (Column("AI2D"),), _names_right_letter, meta=("options",), reads=_reads_letter),
    "chartqa": Benchmark(
        "relaxed accuracy",
        (Column("ChartQA"),),
        lambda line: relaxed_match(line["references"][0], line["hypothesis"]),
    ),
    "docvqa": Benchmark(
        "anls",
        (Column("DocVQA"),),
        lambda line: anls(line["references"], line["hypothesis"]),
        num_references=None,
    ),
    "mmmu": Benchmark(
        "accuracy", (Column("MMMU"),), _mmmu_worth, num_references=None, meta=("options",), reads=_mmmu_reads
    ),
}
"""By the `task` of a sample."""
