"""Reads ChartQA and DocVQA from their official files, or from the tables of a hub.

    chartqa/  test/test_human.json, test/test_augmented.json, test/png/
    docvqa/   val_v1.0_withQT.json or val_v1.0.json (test_v1.0.json: judged by the server), documents/

Knows these files. Does not open images.
"""

from functools import partial
from pathlib import Path
from typing import Any

from mllm.config.data import ReaderConfig
from mllm.data.findings import Listing, text_at
from mllm.data.json_files import json_list
from mllm.data.table_files import is_table
from mllm.data.vision.from_tables import read_chartqa_table, read_docvqa_table
from mllm.data.vision.questions import SHORT, Question, Questions, find_file, folder_of, texts_of

CHART_KINDS = {"test_human.json": "human", "test_augmented.json": "augmented"}


def read_chartqa(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read both halves of the test set where the source is a folder, or one file."""
    if is_table(source):
        return read_chartqa_table(source, root, config)
    files = [source] if source.is_file() else [find_file(source, (name, f"test/{name}")) for name in CHART_KINDS]
    images = folder_of(root, ("test/png", "png"), named=config.images)
    gathered = Questions("chartqa", root)
    for file in files:
        kind = CHART_KINDS.get(file.name, file.stem)
        for number, row in enumerate(json_list(file)):
            make = partial(_chart, row, images, kind, number)
            gathered.add((file, None), make, what=f"entry {number}")
    return gathered.listing


def _chart(row: dict[str, Any], images: str, kind: str, number: int) -> Question:
    label, image = row["label"], images + text_at(row, "imgname")
    if isinstance(label, list | dict | None):
        raise ValueError(f"label: must be a text or a number, got {label!r}")
    return Question(f"{kind}-{number}", [image], f"{text_at(row, 'query')}\n{SHORT}", [str(label)], kind)


def read_docvqa(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read questions with all answers that count; none in the test set."""
    if is_table(source):
        return read_docvqa_table(source, root, config)
    file = find_file(source, ("val_v1.0_withQT.json", "val_v1.0.json", "test_v1.0.json"))
    named = config.images
    images = folder_of(root, ("documents",), named=named)
    gathered = Questions("docvqa", root)

    def make(row: dict[str, Any]) -> Question:
        image = text_at(row, "image")
        name = image.split("/")[-1] if images == "documents/" else image
        text, meta = f"{text_at(row, 'question')}\n{SHORT}", {"question_id": row["questionId"]}
        return Question(str(row["questionId"]), [images + name], text, texts_of(row.get("answers") or []), None, meta)

    gathered.add_all(file, json_list(file, "data"), make)
    return gathered.listing
