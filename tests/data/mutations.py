"""Good data of every format, and rows of it broken in every way that files of other people's are."""

import base64
import copy
import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm.config.data import Format

SHORT = "\nAnswer the question using a single word or phrase."
SURROGATE, DEEP = "\ud800", [[[[[[[[]]]]]]]]
STRANGE: list[Any] = [
    *(None, True, False, 0, -1, 7, 25, 10**30, 1.5, float("nan"), float("inf"), "", " ", "x", "Z", "7", "yes"),
    *("../../x", "/etc/passwd", "a\0b", "a\nb", "C:\\x", "http://x/y", "data:image/png;base64,xx", "~", "x" * 5_000),
    *(SURROGATE, "<image>", "<image><image>", "<video>", "user", "assistant", "[", "{}", "\u2028"),
    *([], {}, [None], [[]], {"a": 1}, [1, 2], ["a", "b", "c", "d", "e", "f"], {"bytes": None, "path": None}, DEEP),
]
PIECES = [b",", b'"', b"\t", b"..", b"/", b"\\", b"\0", b"\xff", b"{", b"}", b"[", b":", b"1" * 5_000, b"-1", b"\r"]
PIECES += [b"\xe2\x80\xa8", b" ", b"\xed\xa0\x80", b"null", b"NaN", b"\x1c", b"Text:", b"a.mp4", b"\xef\xbb\xbf"]


def png(shade: int = 0) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(held, "PNG")
    return held.getvalue()


def mutated(tree: Any, rng: np.random.Generator) -> Any:
    """Return a copy of a row in which one place, or a few, hold something else, or nothing."""
    tree = copy.deepcopy(tree)
    for _ in range(int(rng.integers(1, 4))):
        positions = list(_places(tree))
        if not positions or rng.random() < 0.03:
            return _strange(rng)
        parent, key = positions[rng.integers(len(positions))]
        change = rng.random()
        if change < 0.2 and isinstance(parent, dict):
            del parent[key]
        elif change < 0.3 and isinstance(parent, dict):
            parent[str(_strange(rng))] = parent.pop(key)
        elif change < 0.4 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            parent[key] = _strange(rng)
    return tree


def mutated_bytes(line: bytes, rng: np.random.Generator) -> bytes:
    """Return a line in which pieces were put or cut out."""
    for _ in range(int(rng.integers(1, 4))):
        index = int(rng.integers(len(line) + 1))
        cut = int(rng.integers(4)) if rng.random() < 0.5 else 0
        piece = PIECES[rng.integers(len(PIECES))] if rng.random() < 0.8 else b""
        line = line[:index] + piece + line[index + cut :]
    return line.replace(b"\n", b" ")


def _places(tree: Any) -> Any:
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])


def _strange(rng: np.random.Generator) -> Any:
    return copy.deepcopy(STRANGE[rng.integers(len(STRANGE))])


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def json_line(row: Any, rng: np.random.Generator) -> bytes:
    """Return a row as a line, mostly with a broken tree, sometimes with broken bytes."""
    return mutated_bytes(as_json(row), rng) if rng.random() < 0.3 else as_json(mutated(row, rng))


# Each writes `num` broken rows of a format below a folder and gives its source back.
Writer = Callable[[Path, int, np.random.Generator], Path]


def _lines(name: str, row: Any, others: Callable[[Path, np.random.Generator], None] | None = None) -> Writer:
    def write(root: Path, num: int, rng: np.random.Generator) -> Path:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\n".join([as_json(row), *(json_line(row, rng) for _ in range(num))]))
        if others is not None:
            others(root, rng)
        return root / name

    return write


def _whole(name: str, row: Any, key: str | None = None, others: Any = None) -> Writer:
    """Return a writer of a file that is one JSON list, or holds one under a key."""

    def write(root: Path, num: int, rng: np.random.Generator) -> Path:
        rows = [row, *(mutated(row, rng) for _ in range(num))]
        (root / name).write_bytes(as_json(rows if key is None else {key: rows}))
        if others is not None:
            others(root, rng)
        return root / name

    return write


def _notes(name: str, notes: Any, kind: str = "tree") -> Callable[[Path, np.random.Generator], None]:
    """Return a writer of a file of answers beside the questions, broken itself half of the time."""

    def write(root: Path, rng: np.random.Generator) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        broken = mutated(notes, rng) if rng.random() < 0.5 else notes
        lines = broken if kind == "lines" and isinstance(broken, list) else [broken]
        (root / name).write_bytes(b"\n".join(map(as_json, lines)))

    return write


def _text_lines(name: str, line: bytes, files: dict[str, bytes], head: bytes = b"") -> Writer:
    def write(root: Path, num: int, rng: np.random.Generator) -> Path:
        for file, content in files.items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes(content)
        rows = [line, *(mutated_bytes(line, rng) for _ in range(num))]
        (root / name).write_bytes(head + b"\n".join(rows))
        if name.endswith(".tsv"):
            count = sum(bool(row.strip()) for row in (head + b"\n".join(rows)).split(b"\n")) - 1
            (root / name).with_suffix(".wrd").write_bytes(b"a word\n" * count)
        return root / name

    return write


def _table(row: dict[str, Any]) -> Writer:
    """Return a writer of Parquet files of one row each, since a column has one type; rows that no table can hold are
    not written.
    """

    def write(root: Path, num: int, rng: np.random.Generator) -> Path:
        import pyarrow
        from pyarrow import parquet

        for number in range(num):
            broken = mutated(row, rng)
            try:
                table = pyarrow.Table.from_pylist([broken])
                parquet.write_table(table, root / f"test-{number:05d}.parquet")
            except (pyarrow.ArrowException, TypeError, ValueError, AttributeError, OverflowError):
                parquet.write_table(pyarrow.Table.from_pylist([row]), root / f"test-{number:05d}.parquet")
                file = root / f"test-{number:05d}.parquet"
                file.write_bytes(mutated_bytes(file.read_bytes(), rng))
        return root

    return write


def _mmbench(root: Path, num: int, rng: np.random.Generator) -> Path:
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category"]
    row = ["7", "Which?", "nan", "x", "y", "", "", "A", "c", base64.b64encode(png()).decode(), "l2"]
    held = io.StringIO()
    writer = csv.writer(held, delimiter="\t")
    writer.writerow(columns)
    for _ in range(num):
        cells = [str(_strange(rng)) if rng.random() < 0.15 else cell for cell in row]
        writer.writerow([cell.encode("utf-8", "replace").decode() for cell in cells])
    content = held.getvalue().encode()
    if rng.random() < 0.2:
        content = mutated_bytes(content.replace(b"\n", b"\r"), rng).replace(b"\r", b"\n")
    (root / "mmbench_dev_20230712.tsv").write_bytes(content)
    return root / "mmbench_dev_20230712.tsv"


def _tar(root: Path, num: int, rng: np.random.Generator) -> Path:
    row = {"conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "x"}]}
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        for number in range(num):
            files = [("png", png()), ("json", json_line(row, rng))]
            files += [("txt", mutated_bytes(b"a text", rng))] if rng.random() < 0.3 else []
            files += [("pkl", b"x"), ("png", png())][: int(rng.integers(3))] if rng.random() < 0.2 else []
            for suffix, content in files:
                info = tarfile.TarInfo(f"{number:05d}.{suffix}" if rng.random() < 0.9 else f"../{number}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    content = bytearray(held.getvalue())
    for _ in range(int(rng.integers(3))):
        content[rng.integers(len(content))] = int(rng.integers(256))
    (root / "a.tar").write_bytes(content)
    return root / "a.tar"


def _mme(root: Path, num: int, rng: np.random.Generator) -> Path:
    folder = root / "MME_Benchmark_release_version" / "OCR"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "1.jpg").write_bytes(png())
    answers = b"Is it A? Please answer yes or no.\tYes\nIs it B? Please answer yes or no.\tNo\n"
    (folder / "1.txt").write_bytes(mutated_bytes(answers, rng) if rng.random() < 0.5 else answers)
    row = {"question_id": "OCR/1.jpg", "image": "OCR/1.jpg", "text": f"Is it A?{SHORT}", "category": "OCR"}
    return _lines("llava_mme.jsonl", row)(root, num, rng)


def _pope(root: Path, rng: np.random.Generator) -> None:
    for category in ("random", "popular", "adversarial"):
        note = {"question_id": 1, "image": "x.jpg", "text": "Is there a cat?", "label": "yes"}
        _notes(f"coco/coco_pope_{category}.json", [note] * 3, "lines")(root, rng)


def _lrs(root: Path, num: int, rng: np.random.Generator) -> Path:
    text = b"Text:  ONE TWO\nConf: 4\n\nWORD START END ASDSCORE\nONE 0.2 0.5 5\nTWO 0.6 0.9 4\n"
    (root / "main" / "s").mkdir(parents=True, exist_ok=True)
    for number in range(8):
        (root / "main" / "s" / f"{number}.mp4").write_bytes(b"")
        broken = b"\n".join(mutated_bytes(one, rng) for one in text.split(b"\n"))
        (root / "main" / "s" / f"{number}.txt").write_bytes(broken)
    return _text_lines("test.txt", b"s/1 NF", {})(root, num, rng)


def _clips(root: Path, num: int, rng: np.random.Generator) -> Path:
    (root / "clips").mkdir(exist_ok=True)
    (root / "clips" / "a.wav").write_bytes(b"RIFF")
    for number in range(num):
        (root / "clips" / f"{number}.wav").write_bytes(b"RIFF")
        (root / "clips" / f"{number}.txt").write_bytes(mutated_bytes(b"some text", rng))
    return root / "clips"


TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]
SAID = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "x"}]
PARTS = [{"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "?"}]}, SAID[1]]
CELL = {"bytes": png(), "path": "a.png"}
WRITERS: dict[Format, list[Writer]] = {
    "manifest": [_lines("m.jsonl", {"id": "a", "task": "vqa", "messages": PARTS, "meta": {"seconds": 1}})],
    "llava": [
        _lines("l.jsonl", {"id": "1", "image": "a.png", "conversations": TURNS}),
        _whole("l.json", {"id": "1", "image": ["a.png"], "conversations": TURNS}),
    ],
    "sharegpt": [
        _lines("s.jsonl", {"conversations": TURNS, "images": ["a.png"], "system": "Be kind."}),
        _whole("s.json", {"conversation": [{"human": "<image>?", "assistant": "x"}], "image": "a.png"}),
    ],
    "messages": [
        _lines("m.jsonl", {"messages": SAID, "images": [{"path": "a.png"}], "id": 3}),
        _lines("m.jsonl", {"messages": PARTS, "videos": [], "task": "t", "kind": "k", "meta": {}}),
        _lines("m.jsonl", {"query": "<image>?", "response": "x", "history": [["a", "b"]], "images": ["a.png"]}),
    ],
    "parquet": [_table({"messages": SAID, "images": [CELL], "id": "a"}), _table({"image": CELL, "caption": "x"})],
    "datasets": [_table({"conversations": TURNS, "image": CELL})],
    "webdataset": [_tar],
    "auto_avsr": [_text_lines("l.csv", b"d,a.mp4,25,1 2", {"d/a.mp4": b"", "d/a.txt": b"hello"})],
    "omni_csv": [_text_lines("l.csv", b"d,a.mp4,25,1 2,some text", {"d/a.mp4": b"", "d/a.wav": b""})],
    "fairseq": [_text_lines("l.tsv", b"a\td/a.mp4\td/a.wav\t25\t16000", {"d/a.mp4": b""}, b"/\n")],
    "lrs": [_lrs],
    "clips": [_clips],
    "vqav2": [
        _lines("llava_vqav2_mscoco_test-dev2015.jsonl", {"question_id": 1, "image": "a.jpg", "text": f"Is it?{SHORT}"}),
        _whole(
            "v2_OpenEnded_mscoco_val2014_questions.json",
            {"question_id": 1, "image_id": 42, "question": "What?"},
            "questions",
            _notes(
                "v2_mscoco_val2014_annotations.json",
                {"annotations": [{"question_id": 1, "answer_type": "other", "answers": [{"answer": "red"}] * 3}]},
            ),
        ),
    ],
    "gqa": [
        _lines(
            "llava_gqa_testdev_balanced.jsonl",
            {"question_id": "1", "image": "n.jpg", "text": f"Is it?{SHORT}"},
            _notes("testdev_balanced_questions.json", {"1": {"answer": "no", "types": {"structural": "verify"}}}),
        )
    ],
    "textvqa": [
        _lines(
            "llava_textvqa_val_v051_ocr.jsonl",
            {"question_id": "p", "image": "p.jpg", "text": f"what is it?\nReference OCR token: A{SHORT}"},
            _notes(
                "TextVQA_0.5.1_val.json",
                {"data": [{"question_id": 3, "image_id": "p", "question": "What is it?", "answers": ["a", "b"]}]},
            ),
        )
    ],
    "pope": [
        _lines(
            "llava_pope_test.jsonl",
            {"question_id": 1, "image": "x.jpg", "text": f"Is there a cat?{SHORT}", "category": "random"},
            _pope,
        )
    ],
    "scienceqa": [
        _whole(
            "llava_test_CQM-A.json",
            {"id": "5", "image": "5/image.png", "conversations": TURNS},
            None,
            _notes("problems.json", {"5": {"choices": ["x", "y"], "answer": 1, "subject": "natural science"}}),
        ),
        _table({"question": "?", "choices": ["x", "y"], "answer": 1, "hint": "", "subject": "s", "image": CELL}),
    ],
    "mme": [_mme],
    "mmbench": [_mmbench],
    "vizwiz": [
        _lines("llava_test.jsonl", {"question_id": "t.jpg", "image": "t.jpg", "text": f"Ok?{SHORT}"}),
        _whole("val.json", {"image": "v.jpg", "question": "Ok?", "answers": [{"answer": "x"}], "answer_type": "other"}),
    ],
    "seedbench": [
        _lines(
            "llava-seed-bench.jsonl",
            {"question_id": "1", "image": "a", "text": "?"},
            _notes(
                "SEED-Bench.json",
                {
                    "question_type": {"Scene": 1},
                    "questions": [
                        {
                            **{"question_id": "1", "question_type_id": 1, "data_type": "image", "answer": "A"},
                            **{"choice_a": "x", "choice_b": "y", "choice_c": "z", "choice_d": "w"},
                        }
                    ],
                },
            ),
        )
    ],
    "chartqa": [
        _whole("test_human.json", {"imgname": "a.png", "query": "How many?", "label": "7"}),
        _table({"question": "?", "answer": ["7"], "type": "human_test", "image": CELL}),
    ],
    "docvqa": [
        _whole(
            "val_v1.0.json", {"questionId": 1, "question": "?", "image": "documents/a.png", "answers": ["x"]}, "data"
        ),
        _table({"questionId": "1", "question": "?", "answers": ["x"], "image": CELL}),
    ],
    "mmmu": [
        _table(
            {
                **{"id": "validation_Art_1", "question": "<image 1>?", "options": "['x', 'y']", "answer": "A"},
                **{"question_type": "multiple-choice", "image_1": CELL, "image_2": None},
            }
        )
    ],
    "ai2d": [_table({"question": "?", "options": ["x", "y"], "answer": "1", "image": CELL})],
}
"""By format the ways its data may lie."""
