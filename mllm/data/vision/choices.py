"""POPE, MME, ScienceQA, MMBench and SEED-Bench in the layout of LLaVA's evaluation.

    pope/        llava_pope_test.jsonl, coco/coco_pope_{random,popular,adversarial}.json, val2014/
    MME/         llava_mme.jsonl, MME_Benchmark_release_version/<subtask>/
    scienceqa/   llava_test_CQM-A.json, problems.json, images/test/; or the tables of a hub
    mmbench/     mmbench_dev_20230712.tsv; its pictures are inside
    seed_bench/  llava-seed-bench.jsonl, SEED-Bench.json, SEED-Bench-image/

Knows these files. Opens no pictures but writes those that a table holds.
"""

import base64
import binascii
import csv
from pathlib import Path
from typing import Any

from mllm.data.settings import ReaderSettings
from mllm.data.utterances import Listing
from mllm.data.vision.from_tables import read_scienceqa_table
from mllm.data.vision.pictures import PictureFolder
from mllm.data.vision.questions import (
    CHOOSE,
    LETTERS,
    SHORT,
    Question,
    Questions,
    find,
    folder_of,
    json_lines,
    json_of,
    letter_among,
    letter_at,
    with_options,
)
from mllm.data.vision.tables import is_table

POPE_CATEGORIES = ("random", "popular", "adversarial")
MME_ASK = "Please answer yes or no."
MAX_FIELD_BYTES = 2**27
MAX_INDEX_DIGITS = 12
"""A shorter picture is the index of the row that holds it."""


def read_pope(source: Path, root: Path, settings: ReaderSettings) -> Listing:
    """Questions by category; labels are found by category, picture and words, not by the order of lines."""
    file = find(source, ("llava_pope_test.jsonl",))
    folder = Path(settings.annotations) if settings.annotations else file.parent / "coco"
    labels: dict[tuple[str, str, str], str] = {}
    for category in POPE_CATEGORIES:
        notes = folder / f"coco_pope_{category}.json"
        for number, note in json_lines(notes):
            key = (category, note["image"], note["text"].strip())
            label = str(note["label"]).strip().lower()
            if labels.setdefault(key, label) != label:
                raise ValueError(f"{notes}:{number}: {note['text']!r} about {note['image']} has two labels")
    images = folder_of(root, ("val2014",), named=settings.images)
    gathered = Questions("pope", root)

    def make(row: dict[str, Any]) -> Question:
        asked = row["text"].removesuffix(SHORT).strip()
        label = labels.get((row["category"], row["image"], asked))
        if label is None:
            raise ValueError(f"no label of category {row['category']} for {asked!r} about {row['image']}")
        return Question(str(row["question_id"]), [images + row["image"]], row["text"], [label], row["category"])

    for number, row in json_lines(file):
        gathered.add((file, number), lambda row=row: make(row))
    return gathered.listing


def read_mme(source: Path, root: Path, settings: ReaderSettings) -> Listing:
    """Questions with the answers beside the pictures; two questions per picture.

    Raises:
        ValueError: a picture with other than two questions, which accuracy+ is not defined on.
    """
    file = find(source, ("llava_mme.jsonl",))
    images = folder_of(root, ("MME_Benchmark_release_version",), named=settings.images)
    gathered = Questions("mme", root)

    def make(row: dict[str, Any]) -> Question:
        subtask, name = row["question_id"].split("/")[0], Path(row["question_id"])
        text = row["text"].removesuffix(SHORT).rstrip()
        asked = " ".join(text.removesuffix(MME_ASK).split())
        official, answer = _mme_answer(root / images / subtask, f"{name.stem}.txt", asked)
        image = row["image"]
        if not (root / images / image).is_file() and (root / images / subtask / "images" / name.name).is_file():
            image = f"{subtask}/images/{name.name}"
        meta = {"picture": f"{subtask}/{name.name}", "question": official}
        # LLaVA asks without the official phrase; a file that holds it asks the same.
        text = f"{text.removesuffix(MME_ASK).rstrip()}\n{SHORT}" if text.endswith(MME_ASK) else row["text"]
        return Question(row["question_id"], [images + image], text, [answer], subtask, meta)

    for number, row in json_lines(file):
        gathered.add((file, number), lambda row=row: make(row))
    counts: dict[str, int] = {}
    for sample in gathered.listing.samples:
        counts[sample.meta["picture"]] = counts.get(sample.meta["picture"], 0) + 1
    if odd := [picture for picture, count in counts.items() if count != 2]:
        if not gathered.listing.problems:
            raise ValueError(f"{file}: {odd[0]} has {counts[odd[0]]} questions; MME has two per picture")
        gathered.listing.samples = [one for one in gathered.listing.samples if one.meta["picture"] not in odd]
    return gathered.listing


def _mme_answer(folder: Path, name: str, asked: str) -> tuple[str, str]:
    inner = folder / "questions_answers_YN"
    file = (inner if inner.is_dir() else folder) / name
    if not file.is_file():
        raise ValueError(f"{file} with the answers is missing")
    for line in file.read_text(encoding="utf-8").splitlines():
        question, _, answer = line.strip().partition("\t")
        if " ".join(question.removesuffix(MME_ASK).split()) == asked:
            return question, answer.strip().lower()
    raise ValueError(f"{file} does not ask {asked!r}")


def read_scienceqa(source: Path, root: Path, settings: ReaderSettings) -> Listing:
    """Questions that have a picture; those of text alone do not depend on a budget and are left out."""
    if is_table(source):
        return read_scienceqa_table(source, root, settings)
    file = find(source, ("llava_test_CQM-A.json",))
    problems = json_of(find(source, ("problems.json",), named=settings.annotations, what="annotations"))
    images = folder_of(root, ("images/test",), named=settings.images)
    gathered = Questions("scienceqa", root)

    def make(row: dict[str, Any]) -> Question | None:
        if "image" not in row:
            return None
        problem = problems[str(row["id"])]
        text = row["conversations"][0]["value"].replace("<image>", "").strip()
        answer = letter_at(problem["answer"], problem["choices"])
        kind = problem.get("subject")
        meta = {"options": problem["choices"]}
        return Question(str(row["id"]), [images + row["image"]], f"{text}\n{CHOOSE}", [answer], kind, meta)

    for row in json_of(file):
        gathered.add((file, None), lambda row=row: make(row))
    return gathered.listing


def read_mmbench(source: Path, root: Path, settings: ReaderSettings) -> Listing:
    """All rows of the table, rotations included; pictures are written to a folder under the root."""
    names = ("mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv", "mmbench_test_20230712.tsv", "MMBench_TEST_EN.tsv")
    file = find(source, names)
    csv.field_size_limit(MAX_FIELD_BYTES)
    with open(file, encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    pictures = PictureFolder(root, settings.images)
    gathered = Questions("mmbench", root)
    by_index = {row.get("index"): row for row in rows}

    def make(row: dict[str, Any]) -> Question:
        held = row["image"]
        held = by_index[held]["image"] if len(held) <= MAX_INDEX_DIGITS else held
        try:
            image = pictures.write(base64.b64decode(held, validate=True))
        except binascii.Error as error:
            raise ValueError(f"row {row['index']}: image is not base64: {error}") from error
        return mmbench_question(row, image)

    for number, row in enumerate(rows, start=2):
        gathered.add((file, number), lambda row=row: make(row))
    return gathered.listing


def mmbench_question(row: dict[str, Any], image: str) -> Question:
    """A row of MMBench; options end at the first that is not there."""
    options = []
    for letter in LETTERS[:4]:
        if _is_none(row.get(letter)):
            break
        options.append(row[letter])
    hint = None if _is_none(row.get("hint")) else row["hint"]
    answers = [] if _is_none(row.get("answer")) else [letter_among(row["answer"], options)]
    kept = ("question", *LETTERS[:4], "answer", "l2-category", "L2-category")
    shown = {key: row[key] for key in kept if not _is_none(row.get(key))}
    meta = {"options": options, "index": int(row["index"]), "row": shown}
    text = with_options(row["question"], options, hint=hint)
    kind = None if _is_none(row.get("category")) else row["category"]
    return Question(str(row["index"]), [image], text, answers, kind, meta)


def _is_none(value: Any) -> bool:
    return value is None or str(value).strip().lower() in ("", "nan", "none")


def read_seedbench(source: Path, root: Path, settings: ReaderSettings) -> Listing:
    """All questions of LLaVA's file; those on videos are asked about one frame, as LLaVA asks them."""
    file = find(source, ("llava-seed-bench.jsonl",))
    notes = json_of(find(source, ("SEED-Bench.json",), named=settings.annotations, what="annotations"))
    by_id = {str(note["question_id"]): note for note in notes["questions"]}
    names = {number: name for name, number in notes["question_type"].items()}
    images = folder_of(root, ("",), named=settings.images)
    gathered = Questions("seedbench", root)

    def make(row: dict[str, Any]) -> Question:
        note = by_id[str(row["question_id"])]
        options = [note[f"choice_{letter}"] for letter in "abcd" if note.get(f"choice_{letter}") is not None]
        meta = {"options": options, "data_type": note["data_type"], "question_id": note["question_id"]}
        kind = names[note["question_type_id"]]
        answer = letter_among(note["answer"], options)
        return Question(str(row["question_id"]), [images + row["image"]], row["text"], [answer], kind, meta)

    for number, row in json_lines(file):
        gathered.add((file, number), lambda row=row: make(row))
    return gathered.listing
