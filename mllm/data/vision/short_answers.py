"""Reads VQAv2, GQA, TextVQA and VizWiz in the layout of LLaVA's evaluation, or with the official files of questions.

    vqav2/    llava_vqav2_mscoco_test-dev2015.jsonl, test2015/; or v2_OpenEnded_mscoco_val2014_questions.json,
              v2_mscoco_val2014_annotations.json, val2014/
    gqa/      llava_gqa_testdev_balanced.jsonl, data/testdev_balanced_questions.json, data/images/
    textvqa/  llava_textvqa_val_v051_ocr.jsonl, TextVQA_0.5.1_val.json, train_images/
    vizwiz/   llava_test.jsonl, test/; or val.json, val/

Knows these files. Does not open images.
"""

from pathlib import Path
from typing import Any

from mllm.config.data import ReaderConfig
from mllm.data.findings import BadRows, Listing, shown_type, text_at
from mllm.data.json_files import json_lines, json_list, json_of
from mllm.data.vision.questions import (
    SHORT,
    UNSURE,
    Question,
    Questions,
    find_file,
    folder_of,
    texts_of,
)

OCR_LINE = "Reference OCR token:"


def read_vqav2(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read LLaVA's questions of test-dev, which the server judges; or the official questions with their annotations."""
    names = ("llava_vqav2_mscoco_test-dev2015.jsonl", "v2_OpenEnded_mscoco_val2014_questions.json")
    file = find_file(source, names)
    gathered = Questions("vqav2", root)
    if file.suffix == ".jsonl":
        images = folder_of(root, ("test2015",), named=config.images)
        gathered.add_lines(file, lambda row: _llava_question(row, images, []))
        return gathered.listing
    notes = find_file(source, ("v2_mscoco_val2014_annotations.json",), named=config.annotations, what="annotations")
    answers = gathered.index(notes, json_list(notes, "annotations"), lambda note: note["question_id"])
    images = folder_of(root, ("val2014",), named=config.images)

    def make(row: dict[str, Any]) -> Question:
        note = answers[row["question_id"]]
        annotated = [text_at(answer, "answer") for answer in note["answers"]]
        image = f"{images}COCO_val2014_{row['image_id']:012d}.jpg"
        text = f"{text_at(row, 'question')}\n{SHORT}"
        return Question(str(row["question_id"]), [image], text, annotated, note.get("answer_type"), {})

    gathered.add_all(file, json_list(file, "questions"), make)
    return gathered.listing


def read_gqa(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read LLaVA's questions of testdev-balanced with the official answers; kinds are the official "open" and
    "binary".
    """
    file = find_file(source, ("llava_gqa_testdev_balanced.jsonl",))
    names = ("data/testdev_balanced_questions.json", "testdev_balanced_questions.json")
    notes = json_of(find_file(source, names, named=config.annotations, what="annotations"))
    if not isinstance(notes, dict):
        raise ValueError(f"the annotations must be an object of answers by id, got {shown_type(notes)}")
    images = folder_of(root, ("data/images", "images"), named=config.images)
    gathered = Questions("gqa", root)

    def make(row: dict[str, Any]) -> Question:
        note = notes[str(row["question_id"])]
        kind = "open" if note["types"]["structural"] == "query" else "binary"
        return _llava_question(row, images, [text_at(note, "answer")], kind)

    gathered.add_lines(file, make)
    return gathered.listing


def read_textvqa(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read LLaVA's questions of the validation set, with the words that an OCR found or without them.

    A question is matched with its annotation by image and words, as the official script does.
    """
    file = find_file(source, ("llava_textvqa_val_v051_ocr.jsonl",))
    notes = find_file(source, ("TextVQA_0.5.1_val.json",), named=config.annotations, what="annotations")
    gathered = Questions("textvqa", root)
    rows = json_list(notes, "data")
    by_words = gathered.index(notes, rows, lambda note: (note["image_id"], text_at(note, "question").lower()))
    images = folder_of(root, ("train_images",), named=config.images)

    def make(row: dict[str, Any]) -> Question:
        # LLaVA's file gives the image's id as that of the question, so the words are needed to tell questions apart.
        lines = text_at(row, "text").split("\n")
        question = next((line for line in lines if not line.startswith((OCR_LINE, SHORT))), "")
        question = question.removeprefix("Question: ")
        note = by_words.get((row["question_id"], question.lower()))
        if note is None:
            raise ValueError(f"no annotation of image {row['question_id']!r} asks {question!r}")
        if not config.ocr_tokens:
            row = {**row, "text": "\n".join(line for line in lines if not line.startswith(OCR_LINE))}
        return _llava_question({**row, "question_id": note["question_id"]}, images, texts_of(note["answers"]))

    gathered.add_lines(file, make)
    return gathered.listing


def read_vizwiz(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read LLaVA's questions of the test set, which the server judges; or the official files, test.json among them."""
    file = find_file(source, ("llava_test.jsonl", "val.json"))
    gathered = Questions("vizwiz", root)
    if file.suffix == ".jsonl":
        images = folder_of(root, ("test",), named=config.images)
        gathered.add_lines(file, lambda row: _llava_question(row, images, [], image_name=row["image"]))
        return gathered.listing
    images = folder_of(root, ("val",), named=config.images)

    def make(row: dict[str, Any]) -> Question:
        answers = [text_at(answer, "answer") for answer in row.get("answers", [])]
        text, image = f"{text_at(row, 'question')}\n{UNSURE}\n{SHORT}", text_at(row, "image")
        meta = {"image": image}
        return Question(image, [images + image], text, answers, row.get("answer_type"), meta)

    gathered.add_all(file, json_list(file), make)
    return gathered.listing


def question_ids(path: str) -> list[int]:
    """Return all ids of a file of questions, LLaVA's or the official one; VQAv2 wants an answer to each.

    Raises:
        ValueError: neither form, or a row without an id.
    """
    file = Path(path)
    listing = Listing()
    lines = file.suffix == ".jsonl"
    rows = [row for _, row in json_lines(file, listing)] if lines else json_list(file, "questions")
    if listing.problems:
        raise BadRows(listing.problems)
    ids = [row["question_id"] for row in rows if isinstance(row, dict) and isinstance(row.get("question_id"), int)]
    if not ids or len(ids) < len(rows):
        raise ValueError(f"{path}: must hold questions with a question_id each, a whole number")
    return ids


def _llava_question(
    row: dict[str, Any], images: str, answers: list[str], kind: str | None = None, *, image_name: str | None = None
) -> Question:
    meta = {} if image_name is None else {"image": image_name}
    image = images + text_at(row, "image")
    return Question(str(row["question_id"]), [image], text_at(row, "text"), answers, kind, meta)
