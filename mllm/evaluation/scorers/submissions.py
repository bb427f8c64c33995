"""Writes answers as the files that servers judge: VQAv2, VizWiz, GQA, MMBench, DocVQA and MMMU, in official form.

Knows answers and forms of files. Does not know folders or models. What failed is submitted as an empty answer.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm.evaluation.scorers.multiple_choice import mmmu_letter
from mllm.evaluation.scorers.short_answers import evalai_answer
from mllm.evaluation.scorers.xlsx import xlsx_of


@dataclass(frozen=True)
class Answer:
    """The answer to one question; `meta` is that of its sample."""

    id: str
    text: str
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class Submission:
    """The file of one server.

    Args:
        suffix: of its name.
        make: writes its content.
        meta: keys of a sample's `meta` that it needs.
        is_always: whether to write it although answers are known here.
    """

    suffix: str
    make: Callable[[Sequence[Answer], Sequence[int]], bytes]
    meta: tuple[str, ...] = ()
    is_always: bool = False

    def check(self, answer: Answer) -> None:
        """Refuses a sample that could not be submitted.

        Raises:
            ValueError: facts are missing, or its id is not one of the server's.
        """
        if missing := [key for key in self.meta if key not in answer.meta]:
            raise ValueError(f"meta.{missing[0]} is missing, which the server wants")
        try:
            self.make([answer], ())
        except ValueError as error:
            raise ValueError(f"the server wants other ids or facts: {error}") from error


def _json(content: Any) -> bytes:
    return (json.dumps(content, ensure_ascii=False) + "\n").encode()


def _vqav2(answers: Sequence[Answer], all_ids: Sequence[int]) -> bytes:
    """Lists every question of the test set, those that are in no manifest with an empty answer."""
    said = {int(answer.id): evalai_answer(answer.text) for answer in answers}
    if all_ids and (strangers := said.keys() - set(all_ids)):
        raise ValueError(
            f"question {min(strangers)} of VQAv2 is not among all {len(all_ids)} questions that were named"
        )
    return _json([{"question_id": one, "answer": said.get(one, "")} for one in all_ids or said])


def _vizwiz(answers: Sequence[Answer], _: Sequence[int]) -> bytes:
    return _json([{"image": answer.meta["image"], "answer": evalai_answer(answer.text)} for answer in answers])


def _gqa(answers: Sequence[Answer], _: Sequence[int]) -> bytes:
    said = [{"questionId": answer.id, "prediction": answer.text.rstrip(".").lower()} for answer in answers]
    return _json(said)


def _docvqa(answers: Sequence[Answer], _: Sequence[int]) -> bytes:
    return _json([{"questionId": answer.meta["question_id"], "answer": answer.text} for answer in answers])


def _mmmu(answers: Sequence[Answer], _: Sequence[int]) -> bytes:
    """Writes letters where there are options, else whole answers; MMMU's lot is drawn by the question's id."""
    return _json({answer.id: _mmmu_said(answer) for answer in answers})


def _mmmu_said(answer: Answer) -> str:
    options = answer.meta["options"]
    return mmmu_letter(answer.text, options, sample_id=answer.id)[0] if options else answer.text


def _mmbench(answers: Sequence[Answer], _: Sequence[int]) -> bytes:
    """Writes the table of questions without hints, images and categories, and with a column of predictions."""
    columns = ("question", "A", "B", "C", "D")
    has_answers = any("answer" in answer.meta["row"] for answer in answers)
    rows: list[list[str | int | None]] = [["index", *columns, "prediction", *(["answer"] if has_answers else [])]]
    for answer in answers:
        row = answer.meta["row"]
        last = [row.get("answer")] if has_answers else []
        rows.append([answer.meta["index"], *(row.get(name) for name in columns), answer.text, *last])
    return xlsx_of(rows)


SUBMISSIONS = {
    "vqav2": Submission(".json", _vqav2),
    "vizwiz": Submission(".json", _vizwiz, meta=("image",)),
    "gqa": Submission(".json", _gqa),
    "docvqa": Submission(".json", _docvqa, meta=("question_id",)),
    "mmmu": Submission(".json", _mmmu, meta=("options",)),
    "mmbench": Submission(".xlsx", _mmbench, meta=("row", "index"), is_always=True),
}
"""By the `task` of a sample. MMBench's server reads answers with a language model, and so counts differently."""
