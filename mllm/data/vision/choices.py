"""Reads POPE, MME, ScienceQA, MMBench and SEED-Bench in the layout of LLaVA's evaluation.

    pope/        llava_pope_test.jsonl, coco/coco_pope_{random,popular,adversarial}.json, val2014/
    MME/         llava_mme.jsonl, MME_Benchmark_release_version/<subtask>/
    scienceqa/   llava_test_CQM-A.json, problems.json, images/test/; or the tables of a hub
    mmbench/     mmbench_dev_20230712.tsv; its images are inside
    seed_bench/  llava-seed-bench.jsonl, SEED-Bench.json, SEED-Bench-image/

Knows these files. Opens no images but writes those that a table holds.
"""

import base64
import binascii
import csv
from pathlib import Path
from typing import Any

from mllm.config.data import ReaderConfig
from mllm.data.findings import Listing, shown_type, text_at
from mllm.data.json_files import json_lines, json_list, json_of, list_in
from mllm.data.table_files import is_table
from mllm.data.vision.from_tables import read_scienceqa_table
from mllm.data.vision.questions import (
    CHOOSE,
    LETTERS,
    SHORT,
    Question,
    Questions,
    find_file,
    folder_of,
    letter_among,
    letter_at,
    texts_of,
    with_options,
)
from mllm.data.vision.table_images import ImageFolder
from mllm.media import path_problem

POPE_CATEGORIES = ("random", "popular", "adversarial")
MME_ASK = "Please answer yes or no."
MAX_FIELD_BYTES = 2**27
MAX_INDEX_DIGITS = 12
"""A shorter image is the index of the row that holds it."""


def read_pope(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read questions by category; labels are found by category, image and words, not by the order of lines."""
    file = find_file(source, ("llava_pope_test.jsonl",))
    folder = Path(config.annotations) if config.annotations else file.parent / "coco"
    gathered = Questions("pope", root)
    labels = _pope_labels(folder, gathered.listing)
    images = folder_of(root, ("val2014",), named=config.images)
    hint = "" if labels else "; the label files hold no labels"

    def make(row: dict[str, Any]) -> Question:
        category, image = text_at(row, "category"), text_at(row, "image")
        question = text_at(row, "text").removesuffix(SHORT).strip()
        label = labels.get((category, image, question))
        if label is None:
            raise ValueError(f"no label of category {category} for {question!r} about {image}{hint}")
        return Question(str(row["question_id"]), [images + image], row["text"], [label], category)

    gathered.add_lines(file, make)
    return gathered.listing


def _pope_labels(folder: Path, listing: Listing) -> dict[tuple[str, str, str], str]:
    """Return labels by category, image and words; of two that contradict each other neither counts."""
    labels: dict[tuple[str, str, str], str] = {}
    contradicted = set()
    for category in POPE_CATEGORIES:
        notes = folder / f"coco_pope_{category}.json"
        for number, note in json_lines(notes, listing):
            with listing.noting(notes, number):
                key = (category, text_at(note, "image"), text_at(note, "text").strip())
                label = text_at(note, "label").strip().lower()
                if labels.setdefault(key, label) != label:
                    contradicted.add(key)
                    raise ValueError(f"{note['text']!r} about {note['image']} has two labels")
    return {key: label for key, label in labels.items() if key not in contradicted}


def read_mme(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read questions with the answers beside the images; an image with other than two questions, which accuracy+ is not
    defined on, is noted and left out.
    """
    file = find_file(source, ("llava_mme.jsonl",))
    images = folder_of(root, ("MME_Benchmark_release_version",), named=config.images)
    gathered = Questions("mme", root)

    def make(row: dict[str, Any]) -> Question:
        question_id, image = text_at(row, "question_id"), text_at(row, "image")
        subtask, name = question_id.split("/")[0], Path(question_id)
        for key in ("question_id", "image"):  # both name files
            if problem := path_problem(row[key]):
                raise ValueError(f"{key}: {problem}, got {row[key]!r}")
        question, how = _mme_question(text_at(row, "text"))
        official, answer = _mme_answer(root / images / subtask, f"{name.stem}.txt", question)
        if not (root / images / image).is_file() and (root / images / subtask / "images" / name.name).is_file():
            image = f"{subtask}/images/{name.name}"
        meta = {"image": f"{subtask}/{name.name}", "question": official}
        return Question(question_id, [images + image], how, [answer], subtask, meta)

    gathered.add_lines(file, make)
    counts: dict[str, int] = {}
    for sample in gathered.listing.samples:
        counts[sample.meta["image"]] = counts.get(sample.meta["image"], 0) + 1
    odd = {name: count for name, count in counts.items() if count != 2}
    for name, count in odd.items():
        gathered.listing.note(file, None, f"{name} has {count} questions; MME has two per image")
    gathered.listing.samples = [one for one in gathered.listing.samples if one.meta["image"] not in odd]
    return gathered.listing


def _mme_question(text: str) -> tuple[str, str]:
    """Return the question, on one line, and the whole prompt; one with "Please answer yes or no." is asked as LLaVA
    asks.
    """
    said = text.rstrip().removesuffix(SHORT).rstrip()
    question = said.removesuffix(MME_ASK).rstrip()
    return " ".join(question.split()), text if question == said else f"{question}\n{SHORT}"


def _mme_answer(folder: Path, name: str, question: str) -> tuple[str, str]:
    inner = folder / "questions_answers_YN"
    file = (inner if inner.is_dir() else folder) / name
    if not file.is_file():
        raise ValueError(f"{file} with the answers is missing")
    for line in file.read_text(encoding="utf-8").splitlines():
        listed, _, answer = line.strip().partition("\t")
        if " ".join(listed.removesuffix(MME_ASK).split()) == question:
            return listed, answer.strip().lower()
    raise ValueError(f"{file} does not ask {question!r}")


def read_scienceqa(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read questions that have an image; those of text alone do not depend on a budget and are left out."""
    if is_table(source):
        return read_scienceqa_table(source, root, config)
    file = find_file(source, ("llava_test_CQM-A.json",))
    notes = find_file(source, ("problems.json",), named=config.annotations, what="annotations")
    problems = json_of(notes)
    if not isinstance(problems, dict):
        raise ValueError(f"{notes}: must be an object of problems by id, got {shown_type(problems)}")
    images = folder_of(root, ("images/test",), named=config.images)
    gathered = Questions("scienceqa", root)

    def make(row: dict[str, Any]) -> Question | None:
        if row.get("image") is None:
            return None
        problem = problems[str(row["id"])]
        text = text_at(row["conversations"][0], "value").replace("<image>", "").strip()
        options = texts_of(problem["choices"])
        answer = letter_at(problem["answer"], options)
        kind = problem.get("subject")
        image = images + text_at(row, "image")
        return Question(str(row["id"]), [image], f"{text}\n{CHOOSE}", [answer], kind, {"options": options})

    gathered.add_all(file, json_list(file), make)
    return gathered.listing


def read_mmbench(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read all rows of the table, rotations included; images are written to a folder under the root."""
    names = ("mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv", "mmbench_test_20230712.tsv", "MMBench_TEST_EN.tsv")
    file = find_file(source, names)
    images = ImageFolder(root, config.images)
    gathered = Questions("mmbench", root)
    csv.field_size_limit(MAX_FIELD_BYTES)
    with open(file, encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    by_index = {row.get("index"): row for row in rows}

    def make(row: dict[str, Any]) -> Question:
        held = text_at(row, "image")
        held = text_at(by_index[held], "image") if len(held) <= MAX_INDEX_DIGITS else held
        try:
            image = images.write(base64.b64decode(held, validate=True))
        except binascii.Error as error:
            raise ValueError(f"row {row['index']}: image is not base64: {error}") from error
        return mmbench_question(row, image)

    for number, row in enumerate(rows, start=2):
        gathered.add((file, number), lambda row=row: make(row))
    return gathered.listing


def mmbench_question(row: dict[str, Any], image: str) -> Question:
    """Make the question of a row of MMBench; options end at the first that is not there."""
    options = []
    for letter in LETTERS[:4]:
        if _is_none(row.get(letter)):
            break
        options.append(row[letter])
    hint = None if _is_none(row.get("hint")) else row["hint"]
    answers = [] if _is_none(row.get("answer")) else [letter_among(row["answer"], options)]
    kept = ("question", *LETTERS[:4], "answer", "l2-category", "L2-category")
    kept_row = {key: row[key] for key in kept if not _is_none(row.get(key))}
    meta = {"options": options, "index": int(row["index"]), "row": kept_row}
    text = with_options(row["question"], options, hint=hint)
    kind = None if _is_none(row.get("category")) else row["category"]
    return Question(str(row["index"]), [image], text, answers, kind, meta)


def _is_none(value: Any) -> bool:
    return value is None or str(value).strip().lower() in ("", "nan", "none")


def read_seedbench(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read all questions of LLaVA's file; those on videos are asked about one frame, as LLaVA asks them."""
    file = find_file(source, ("llava-seed-bench.jsonl",))
    notes = find_file(source, ("SEED-Bench.json",), named=config.annotations, what="annotations")
    gathered = Questions("seedbench", root)
    content = json_of(notes)
    by_id = gathered.index(notes, list_in(content, notes, "questions"), lambda note: str(note["question_id"]))
    kinds = content.get("question_type")
    if not isinstance(kinds, dict):
        raise ValueError(f"{notes}: question_type must be an object, got {shown_type(kinds)}")
    names = {number: name for name, number in kinds.items() if isinstance(number, int)}
    images = folder_of(root, ("",), named=config.images)

    def make(row: dict[str, Any]) -> Question:
        note = by_id[str(row["question_id"])]
        options = [note[f"choice_{letter}"] for letter in "abcd" if note.get(f"choice_{letter}") is not None]
        meta = {"options": options, "data_type": note["data_type"], "question_id": note["question_id"]}
        kind = names[note["question_type_id"]]
        answer = letter_among(note["answer"], options)
        image = images + text_at(row, "image")
        return Question(str(row["question_id"]), [image], text_at(row, "text"), [answer], kind, meta)

    gathered.add_lines(file, make)
    return gathered.listing
