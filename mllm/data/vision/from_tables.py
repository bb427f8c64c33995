"""Reads MMMU, AI2D, ChartQA, DocVQA and ScienceQA from the tables of a hub; their images are written under the root.

    format     split        columns
    mmmu       validation   id, question, options, answer, question_type, image_1, ...
    ai2d       test         question, options, answer, image
    chartqa    test         question, answer, type, image; or query, label, human_or_machine, image
    docvqa     validation   questionId, question, answers, image
    scienceqa  test         question, choices, answer, hint, subject, image

Knows these columns. Does not decode images.
"""

import ast
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mllm.config.data import ReaderConfig
from mllm.data.findings import Listing, text_at
from mllm.data.table_files import table_files, table_rows
from mllm.data.vision.questions import (
    CHOOSE,
    LETTERS,
    SHORT,
    Question,
    Questions,
    letter_among,
    letter_at,
    texts_of,
    with_options,
)
from mllm.data.vision.table_images import ImageFolder

Make = Callable[[dict[str, Any], int, "Write"], Question | None]
Write = Callable[[Any], str]
MAX_MMMU_IMAGES = 7
_UNKNOWN = "?"
"""Stands for the answers of MMMU's test split."""


def read_mmmu(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read questions of all subjects, images where the text names them; kinds are the subjects."""
    return _read(source, root, config, task="mmmu", split="validation", make=_mmmu)


def read_ai2d(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read questions about diagrams with four options."""
    return _read(source, root, config, task="ai2d", split="test", make=_ai2d)


def read_chartqa_table(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read both halves of the split; kinds are "human" and "augmented"."""
    return _read(source, root, config, task="chartqa", split="test", make=_chartqa)


def read_docvqa_table(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read questions with all answers that count; none in the test split."""
    return _read(source, root, config, task="docvqa", split="validation", make=_docvqa, inside=("DocVQA",))


def read_scienceqa_table(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read questions that have an image; kinds are the subjects."""
    return _read(source, root, config, task="scienceqa", split="test", make=_scienceqa, inside=("ScienceQA-IMG",))


def _read(
    source: Path,
    root: Path,
    config: ReaderConfig,
    *,
    task: str,
    split: str,
    make: Make,
    inside: Sequence[str] = (),
) -> Listing:
    images = ImageFolder(root, config.images)
    gathered, number = Questions(task, root), 0

    def write(cell: Any) -> str:
        if not isinstance(cell, dict) or not cell.get("bytes"):
            raise ValueError("an image is named in the table and is not in it")
        return images.write(cell["bytes"])

    for file in table_files(source, config.split or split, inside=inside):
        with gathered.listing.noting(file):
            for row in table_rows(file):
                gathered.add((file, None), partial(make, row, number, write), what=f"row {number}")
                number += 1
    return gathered.listing


def _mmmu(row: dict[str, Any], number: int, write: Write) -> Question:
    options = [] if row["question_type"] == "open" else _listed(row["options"])
    held = [row.get(f"image_{image}") for image in range(1, MAX_MMMU_IMAGES + 1)]
    images = [write(cell) for cell in held if cell is not None]
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS[: len(options)], options, strict=True)]
    text = "\n".join([row["question"], *lines]) + f"\n\n{CHOOSE if options else SHORT}"
    answer = str(row["answer"])
    if answer == _UNKNOWN:
        answers = []
    elif options:
        answers = [letter_among(answer, options)]
    else:
        answers = _listed(answer, bare=True)
    subject = "_".join(text_at(row, "id").split("_")[1:-1])
    return Question(row["id"], images, text, answers, subject or None, {"options": options})


def _ai2d(row: dict[str, Any], number: int, write: Write) -> Question:
    options = texts_of(row["options"])
    option = row["answer"]  # a text in the official table
    answer = letter_at(int(option) if isinstance(option, str) else option, options)
    text = with_options(row["question"], options)
    return Question(str(number), [write(row["image"])], text, [answer], None, {"options": options})


def _chartqa(row: dict[str, Any], number: int, write: Write) -> Question:
    if "query" in row:
        question, label = row["query"], row["label"]
        kind = ("human", "augmented")[int(row["human_or_machine"])]
    else:
        question, label, kind = row["question"], row["answer"], row["type"].removesuffix("_test")
    if isinstance(label, list):
        label = label[0]
    return Question(f"{kind}-{number}", [write(row["image"])], f"{question}\n{SHORT}", [str(label)], kind)


def _docvqa(row: dict[str, Any], number: int, write: Write) -> Question:
    meta = {"question_id": int(row["questionId"])}
    text, answers = f"{row['question']}\n{SHORT}", list(row.get("answers") or [])
    return Question(str(row["questionId"]), [write(row["image"])], text, answers, None, meta)


def _scienceqa(row: dict[str, Any], number: int, write: Write) -> Question | None:
    if row["image"] is None:
        return None
    options = texts_of(row["choices"])
    hint = f"Context: {row['hint']}" if row.get("hint") else None
    text = with_options(row["question"], options, hint=hint)
    kind = row.get("subject") or None
    answer = letter_at(row["answer"], options)
    return Question(str(number), [write(row["image"])], text, [answer], kind, {"options": options})


def _listed(text: Any, *, bare: bool = False) -> list[str]:
    """Read a list of texts that is written as Python writes it; a `bare` text stands for itself."""
    if isinstance(text, list):
        return [str(item) for item in text]
    if bare and not text.startswith("["):
        return [text]
    try:
        items = ast.literal_eval(text)
    except (SyntaxError, ValueError) as error:
        if bare:
            return [text]
        raise ValueError(f"options must be a list of texts, got {text!r}") from error
    return [str(item) for item in items]
