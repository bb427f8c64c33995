"""ChartQA and DocVQA from their official files, or from the tables of a hub.

    chartqa/  test/test_human.json, test/test_augmented.json, test/png/
    docvqa/   val_v1.0_withQT.json or val_v1.0.json (test_v1.0.json: judged by the server), documents/

Knows these files. Does not open pictures.
"""

from pathlib import Path
from typing import Any

from mllm.data.settings import ReaderSettings
from mllm.data.utterances import Listing
from mllm.data.vision.from_tables import read_chartqa_table, read_docvqa_table
from mllm.data.vision.questions import SHORT, Question, Questions, find, folder_of, json_of
from mllm.data.vision.tables import is_table

CHART_KINDS = {"test_human.json": "human", "test_augmented.json": "augmented"}


def read_chartqa(source: Path, root: Path, settings: ReaderSettings) -> Listing:
    """Both halves of the test set where the source is a folder, or one file."""
    if is_table(source):
        return read_chartqa_table(source, root, settings)
    files = [source] if source.is_file() else [find(source, (name, f"test/{name}")) for name in CHART_KINDS]
    images = folder_of(root, ("test/png", "png"), named=settings.images)
    gathered = Questions("chartqa", root)
    for file in files:
        kind = CHART_KINDS.get(file.name, file.stem)
        for number, row in enumerate(json_of(file)):
            gathered.add((file, None), lambda row=row, kind=kind, number=number: _chart(row, images, kind, number))
    return gathered.listing


def _chart(row: dict[str, Any], images: str, kind: str, number: int) -> Question:
    label = row["label"]
    return Question(f"{kind}-{number}", [images + row["imgname"]], f"{row['query']}\n{SHORT}", [str(label)], kind)


def read_docvqa(source: Path, root: Path, settings: ReaderSettings) -> Listing:
    """Questions with all answers that count; none in the test set."""
    if is_table(source):
        return read_docvqa_table(source, root, settings)
    file = find(source, ("val_v1.0_withQT.json", "val_v1.0.json", "test_v1.0.json"))
    named = settings.images
    images = folder_of(root, ("documents",), named=named)
    gathered = Questions("docvqa", root)

    def make(row: dict[str, Any]) -> Question:
        name = row["image"].split("/")[-1] if images == "documents/" else row["image"]
        text, meta = f"{row['question']}\n{SHORT}", {"question_id": row["questionId"]}
        return Question(str(row["questionId"]), [images + name], text, row.get("answers") or [], None, meta)

    for row in json_of(file)["data"]:
        gathered.add((file, None), lambda row=row: make(row))
    return gathered.listing
