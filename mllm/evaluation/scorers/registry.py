"""Defines the benchmarks: how one answer is judged, how answers become the number that papers print, and where.

A package outside adds its own by `register_benchmark`; samples whose `task` is its name are then judged by it.

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
from mllm.utils.registry import Registry

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
    """A number over lines; `parts` are numerator and denominator of each question where it is a ratio of sums."""

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

    Args:
        metric: what its number is called.
        columns: of the table.
        judge_answer: scores an answer that is there, 0 to 1.
        question: names the question a line belongs to; the score of a question is that of its worst answer.
        total: makes the number of all lines.
        num_references: how many a line must have, None for any number but none.
        meta: keys of `meta` that a line must have.
        reads: tells whether an answer could be read at all, where that can be told.
    """

    metric: str
    columns: tuple[Column, ...]
    judge_answer: Callable[[Line], float]
    question: Callable[[Line], str] = lambda line: line["id"]
    total: Callable[["Benchmark", Sequence[Line]], Total] = lambda benchmark, lines: mean_of_questions(benchmark, lines)
    num_references: int | None = 1
    meta: tuple[str, ...] = ()
    reads: Callable[[Line], bool] | None = None

    def judge(self, line: Line) -> float:
        """Scores a line, 0 to 1; what failed gets 0."""
        return 0.0 if "error" in line else self.judge_answer(line)

    def score(self, lines: Sequence[Line]) -> Total:
        """Computes the number of the lines that have references; None where none has, as where a server judges."""
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
        """Refuses what could not be judged.

        Raises:
            ValueError: another number of answers, or facts that are not there.
        """
        if missing := [key for key in self.meta if key not in meta]:
            raise ValueError(f"meta.{missing[0]} is missing")
        if references and self.num_references not in (None, len(references)):
            raise ValueError(f"{len(references)} answers; {self.columns[0].title} has {self.num_references}")


def mean_of_questions(benchmark: Benchmark, lines: Sequence[Line]) -> Total:
    """Takes the mean over questions of their worst answers."""
    scores = list(scores_of_questions(benchmark, lines).values())
    return Total(sum(scores) / len(scores), [(score, 1) for score in scores])


def scores_of_questions(benchmark: Benchmark, lines: Sequence[Line]) -> dict[str, float]:
    """Scores each question by its worst answer."""
    scores: dict[str, float] = {}
    for line in lines:
        question = benchmark.question(line)
        scores[question] = min(benchmark.judge(line), scores.get(question, 1.0))
    return scores


def _pope_total(benchmark: Benchmark, lines: Sequence[Line]) -> Total:
    """Computes F1 and its companions of a category, or their means over categories; a failed answer is wrong."""
    detections = [_detection([line for line in lines if line["kind"] == kind]) for kind in _kinds(lines)]
    means = {key: sum(one.rates[key] for one in detections) / len(detections) for key in detections[0].rates}
    if len(detections) > 1:
        return Total(means["f1"], details=means)
    parts = [_f1_part(line) for line in lines]
    return Total(means["f1"], parts, means)


def _label(line: Line) -> str:
    """Reads the label "yes" or "no"; people write them in any case."""
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


def _mme_total(benchmark: Benchmark, lines: Sequence[Line]) -> Total:
    """Sums accuracy and the share of images with all answers right over subtasks; in hundreds, 20 + 8 at most."""
    scores: dict[Any, tuple[float, float]] = {}
    parts: list[tuple[float, float]] = []
    for kind in _kinds(lines):
        lines_of_kind = [line for line in lines if line["kind"] == kind]
        images: dict[str, list[float]] = {}
        for line in lines_of_kind:
            images.setdefault(line["meta"]["image"], []).append(benchmark.judge(line))
        accuracy = sum(benchmark.judge(line) for line in lines_of_kind) / len(lines_of_kind)
        plus = sum(min(of_image) for of_image in images.values()) / len(images)
        scores[kind] = (accuracy, plus)
        parts = [(sum(of_image) / len(of_image) + min(of_image), 1.0) for of_image in images.values()]
    sums = {kind: sum(score) for kind, score in scores.items()}
    details: dict[str, Any] = {
        name: sum(value for kind, value in sums.items() if kind in kinds) if set(sums) & set(kinds) else None
        for name, kinds in (("perception", MME_PERCEPTION), ("cognition", MME_COGNITION))
    }
    if len(scores) == 1:
        details["accuracy"], details["accuracy_plus"] = next(iter(scores.values()))
    return Total(sum(sums.values()), parts if len(scores) == 1 else [], details)


def _seed_total(benchmark: Benchmark, lines: Sequence[Line]) -> Total:
    """Computes accuracy over all questions, and over those on images and those on videos."""
    total = mean_of_questions(benchmark, lines)
    for name in ("image", "video"):
        scores = [benchmark.judge(line) for line in lines if line["meta"]["data_type"] == name]
        total.details[name] = sum(scores) / len(scores) if scores else None
    return total


def _kinds(lines: Sequence[Line]) -> list[Any]:
    return list(dict.fromkeys(line["kind"] for line in lines))


def _letter(line: Line) -> str | None:
    return llava_letter(line["hypothesis"], len(line["meta"]["options"]))


def _names_right_letter(line: Line) -> float:
    return float(_letter(line) == line["references"][0])


def _reads_letter(line: Line) -> bool:
    return (_letter(line) or " ") in LETTERS[: len(line["meta"]["options"])]


def _judge_mmmu(line: Line) -> float:
    if not line["meta"]["options"]:
        return mmmu_open_match(line["references"], line["hypothesis"])
    letter, _ = mmmu_letter(line["hypothesis"], line["meta"]["options"], sample_id=line["id"])
    return float(letter == line["references"][0])


def _mmmu_reads(line: Line) -> bool:
    options = line["meta"]["options"]
    return not options or mmmu_letter(line["hypothesis"], options, sample_id=line["id"])[1]


def _mmbench_question(line: Line) -> str:
    return str(line["meta"]["index"] % MMBENCH_ROTATION)


def _judge_mme(line: Line) -> float:
    return float(mme_answer(line["hypothesis"]) == _label(line))


_BENCHMARKS: dict[str, Benchmark] = {
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
        _judge_mme,
        total=_mme_total,
        meta=("image",),
        reads=lambda line: mme_answer(line["hypothesis"]) != "other",
    ),
    "mmbench": Benchmark(
        "circular accuracy",
        (Column("MMBench"),),
        _names_right_letter,
        question=_mmbench_question,
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
        "accuracy", (Column("MMMU"),), _judge_mmmu, num_references=None, meta=("options",), reads=_mmmu_reads
    ),
}
BENCHMARKS: Registry[Benchmark] = Registry("benchmark", _BENCHMARKS)
"""By the `task` of a sample."""


def register_benchmark(task: str, benchmark: Benchmark) -> None:
    """Adds a benchmark of a package outside, for samples of a task; see `mllm.utils.registry`.

    Raises:
        ValueError: the task has a benchmark already.
    """
    BENCHMARKS.register(task, benchmark)
